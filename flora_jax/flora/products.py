"""x @ down[:r].T @ up[:r] for a rank r that is chosen at run time.

A rank-r choice uses the leading r components, so all choices share a prefix and one compiled
program serves every subnet (FLORA, section 3). Two exact forms; `tiled.py` has a third, for TPU:

- masked: multiply by the whole factors and zero the tail; always spends the full-rank MACs.
- sliced: branch over static slices; spends what the chosen rank says, forward and backward.
"""

import functools

import jax
import jax.numpy as jnp

Ranks = tuple[int, ...]


def masked_product(x, down, up, gene, ranks: Ranks) -> jax.Array:
    """x [M, in] @ down.T @ up [M, out] with all components from ranks[gene] on set to zero."""
    rank = jnp.asarray(ranks)[gene]
    hidden = x @ down.T
    return jnp.where((jnp.arange(down.shape[0]) < rank)[None], hidden, 0) @ up


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def sliced_product(x, down, up, gene, ranks: Ranks) -> jax.Array:
    """The same as `masked_product`, spending only the chosen rank's multiply-adds."""
    return _switch(_forward, ranks, gene, x, down, up)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _switch(branch, ranks: Ranks, gene, *arrays):
    """A function of its own to JAX, which traces it once for all layers of one shape."""
    branches = [functools.partial(branch, rank) for rank in ranks]
    return jax.lax.switch(gene, branches, *arrays)


# Multiplying the two factors first is cheaper at high rank with many tokens; each direction
# compares its own multiply-adds, which are known when the branch is traced.


def _forward(rank: int, x, down, up):
    down, up = down[:rank], up[:rank]
    tokens, in_features, out_features = x.shape[0], down.shape[1], up.shape[1]
    kernel = in_features * out_features
    if kernel * (rank + tokens) < tokens * rank * (in_features + out_features):
        return x @ (down.T @ up)
    return (x @ down.T) @ up


def _backward(rank: int, x, down, up, grad):
    """Gradients of x, down and up; rows beyond the rank get zeros."""
    used_down, used_up = down[:rank], up[:rank]
    tokens, in_features, out_features = x.shape[0], down.shape[1], up.shape[1]
    kernel = in_features * out_features
    if kernel * (3 * rank + 2 * tokens) < tokens * rank * (3 * in_features + 2 * out_features):
        grad_kernel = x.T @ grad
        grad_down, grad_up = used_up @ grad_kernel.T, used_down @ grad_kernel
        grad_x = grad @ (used_down.T @ used_up).T
    else:
        hidden, grad_hidden = x @ used_down.T, grad @ used_up.T
        grad_down, grad_up = grad_hidden.T @ x, hidden.T @ grad
        grad_x = grad_hidden @ used_down
    unused = ((0, down.shape[0] - rank), (0, 0))
    return grad_x.astype(x.dtype), jnp.pad(grad_down, unused), jnp.pad(grad_up, unused)


def _sliced_forward(x, down, up, gene, ranks: Ranks):
    return sliced_product(x, down, up, gene, ranks), (x, down, up, gene)


def _sliced_backward(ranks: Ranks, saved, grad):
    x, down, up, gene = saved
    return *_switch(_backward, ranks, gene, x, down, up, grad), None


sliced_product.defvjp(_sliced_forward, _sliced_backward)
