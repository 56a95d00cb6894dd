"""The supernet's Linear: a pair of factors whose rank is chosen at run time (FLORA, section 3).

    y = x @ down[:r].T @ up[:r] + bias

A rank-r choice uses the leading r components, so all choices share a prefix, every step trains the
shared part (gradient sharing), and one compiled program serves every subnet. Two exact forms here;
`extras/tpu_kernel.py` has a third:

- masked: multiply by the whole factors and zero the tail; always spends the full-rank MACs.
- sliced: branch over static slices; spends what the chosen rank says, forward and backward.

The published code only masks.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from flora_jax.models.functional import Slot
from flora_jax.models.layers import add_bias, zero_bias
from flora_jax.models.spec import LinearShape

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


def _tiled_product(x, down, up, gene, ranks: Ranks) -> jax.Array:
    from flora_jax.flora.extras.tpu_kernel import tiled_product  # Pallas, which few need

    return tiled_product(x, down, up, gene, ranks)


IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "masked": masked_product,
    "sliced": sliced_product,
    "tiled": _tiled_product,
}


def default_implementation() -> str:
    """The fastest form on this platform; figures in docs/performance.md.

    On TPU the branches of the sliced form make a program of over 1 GB; v2 to v4 have too little
    vector memory for the tiles of large layers, or no bfloat16 matrix unit that takes them.
    """
    if jax.default_backend() != "tpu":
        return "sliced"
    is_old = any(version in jax.devices()[0].device_kind for version in ("v2", "v3", "v4"))
    return "masked" if is_old else "tiled"


class RankedLinear(nnx.Module):
    """x [M, in] -> x @ down[:r].T @ up[:r] + bias [M, out], r = ranks[gene].

    down [R, in] and up [R, out] are rank-major, so that a rank is a block of leading rows. The gene
    is part of the network's state and no parameter: every subnet is the same program.
    """

    def __init__(
        self, layer: LinearShape, ranks: tuple[int, ...], implementation: str, *, rngs: nnx.Rngs
    ):
        self.ranks = ranks
        self.implementation = implementation
        self.gene = Slot(last=len(ranks) - 1)
        init = nnx.initializers.xavier_uniform()
        self.down = nnx.Param(init(rngs.params(), (ranks[-1], layer.in_features)))
        self.up = nnx.Param(init(rngs.params(), (ranks[-1], layer.out_features)))
        self.bias = zero_bias(layer.bias_features)

    def __call__(self, x: jax.Array) -> jax.Array:
        multiply = IMPLEMENTATIONS[self.implementation]
        product = multiply(x, self.down[...], self.up[...], self.gene[...], self.ranks)
        return add_bias(product, self.bias)
