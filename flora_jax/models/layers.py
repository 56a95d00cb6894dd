"""The layers a vision transformer is made of. Activations are two-dimensional, [B*N, D]."""

import abc
import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from flora_jax.errors import InputError
from flora_jax.models.spec import LinearShape, Rank

# DeiT's truncated normal of std 0.02 fits a width of 768 only: at width 64 it trains to 88 % on the
# digits where this reaches 98 % (docs/decisions.md).
_initializer = nnx.initializers.xavier_uniform()


class Linear(nnx.Module):
    """x [M, in] -> x @ kernel + bias [M, out]."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias_features: int | None = None,
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(_initializer(rngs.params(), (in_features, out_features)))
        self.bias = zero_bias(out_features if bias_features is None else bias_features)

    def __call__(self, x: jax.Array) -> jax.Array:
        return add_bias(x @ self.kernel, self.bias)


class LowRankLinear(nnx.Module):
    """x [M, in] -> x @ down.T @ up + bias [M, out], with down [R, in] and up [R, out]."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias_features: int,
        rngs: nnx.Rngs,
    ):
        self.down = nnx.Param(_initializer(rngs.params(), (rank, in_features)))
        self.up = nnx.Param(_initializer(rngs.params(), (rank, out_features)))
        self.bias = zero_bias(bias_features)

    def __call__(self, x: jax.Array) -> jax.Array:
        return add_bias(x @ self.down.T @ self.up, self.bias)


LAYER_OUTPUT = "layer_output"  # what a loop over blocks keeps for its backward pass


def zero_bias(features: int) -> nnx.Param | None:
    return nnx.Param(jnp.zeros(features)) if features else None


def whole_bias(bias: jax.Array, features: int) -> jax.Array:
    """A layer's bias [features] out of the one that is stored, which may lack that of the key."""
    if len(bias) == features:
        return bias
    query, value = jnp.split(bias, 2)
    return jnp.concatenate([query, jnp.zeros_like(query), value])


def add_bias(product: jax.Array, bias: nnx.Param | None) -> jax.Array:
    if bias is not None:
        product = product + whole_bias(bias[...], product.shape[-1])[None]
    return checkpoint_name(product, LAYER_OUTPUT)


class MakeLinear(Protocol):
    """Makes a searchable layer: a module that maps x [M, in] to [M, out]."""

    def __call__(self, layer: LinearShape, rank: Rank, *, rngs: nnx.Rngs) -> nnx.Module: ...


def make_linear(layer: LinearShape, rank: Rank, *, rngs: nnx.Rngs) -> nnx.Module:
    """One dense matrix, or a pair of factors where there is a rank."""
    sizes = (layer.in_features, layer.out_features)
    if rank is None:
        return Linear(*sizes, bias_features=layer.bias_features, rngs=rngs)
    return LowRankLinear(*sizes, rank, bias_features=layer.bias_features, rngs=rngs)


class LayerNorm(nnx.Module):
    """Normalises the last axis of x [M, D]; statistics in float32."""

    def __init__(self, features: int, epsilon: float):
        self.scale = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        return _layer_norm(x, self.scale[...], self.bias[...], self.epsilon)


class PartialLayerNorm(LayerNorm):
    """A LayerNorm of x [M, D], some of whose `uncut` features have left: they count as zeros."""

    def __init__(self, features: int, uncut: int, epsilon: float):
        super().__init__(features, epsilon)
        self.num_left = uncut - features

    def __call__(self, x: jax.Array) -> jax.Array:
        scale, bias = (jnp.pad(p[...], (0, self.num_left)) for p in (self.scale, self.bias))
        whole = jnp.pad(x, ((0, 0), (0, self.num_left)))
        return _layer_norm(whole, scale, bias, self.epsilon)[:, : x.shape[-1]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _layer_norm(x, scale, bias, epsilon):
    return _layer_norm_forward(x, scale, bias, epsilon)[0]


def _layer_norm_forward(x, scale, bias, epsilon):
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    inverse_std = jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + epsilon)
    normal = (centred * inverse_std).astype(x.dtype)
    return normal * scale[None] + bias[None], (normal, inverse_std, scale)


def _layer_norm_backward(epsilon, saved, grad):
    # By hand, because the derived backward makes XLA:CPU's training step 1.5 times as slow.
    normal, inverse_std, scale = saved
    wide_grad, wide_normal = (grad * scale[None]).astype(jnp.float32), normal.astype(jnp.float32)
    along = (wide_grad * wide_normal).mean(-1, keepdims=True)
    grad_x = inverse_std * (wide_grad - wide_grad.mean(-1, keepdims=True) - wide_normal * along)
    return grad_x.astype(normal.dtype), (grad * normal).sum(0), grad.sum(0)


_layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU, x times the normal distribution's share below x; computed in float32.

    `jax.nn.gelu` takes 6 times as long on XLA:CPU, for it is written with erfc, and keeps more for
    the backward pass.
    """
    wide = x.astype(jnp.float32)
    return (wide * _share_below(wide)).astype(x.dtype)


def _share_below(x: jax.Array) -> jax.Array:
    return (1 + jax.lax.erf(x * np.float32(0.5**0.5))) / 2


def _gelu_backward(x: jax.Array, grad: jax.Array) -> tuple[jax.Array]:
    wide = x.astype(jnp.float32)
    density = jnp.exp(-wide * wide / 2) * np.float32((2 * np.pi) ** -0.5)
    return ((grad.astype(jnp.float32) * (_share_below(wide) + wide * density)).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # CLIP's
    "silu": jax.nn.silu,
}


class Mlp(nnx.Module):
    """x [B*N, D] -> fc2(activation(fc1(x))) [B*N, D].

    A gated one (SwiGLU, Shazeer 2020) has an fc1 twice as wide, whose first half is the gate: it
    computes fc2(activation(gate) * value). A `norm` is of what enters fc2.
    """

    def __init__(
        self,
        fc1: nnx.Module,
        fc2: nnx.Module,
        activation: str = "gelu",
        is_gated: bool = False,
        norm: nnx.Module | None = None,
    ):
        self.fc1: Any = fc1
        self.fc2: Any = fc2
        self.activation, self.is_gated, self.norm = activation, is_gated, norm

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(self.hidden(x))

    def hidden(self, x: jax.Array) -> jax.Array:
        """The hidden units, [B*N, hidden]."""
        hidden, activate = self.fc1(x), ACTIVATIONS[self.activation]
        if not self.is_gated:
            return activate(hidden)
        gate, value = jnp.split(hidden, 2, axis=-1)
        hidden = activate(gate) * value
        if self.norm is None:
            return hidden
        # A gate of fc2 (ViT-Slim) keeps a closed unit out of the norm's statistics as well.
        closing = getattr(self.fc2, "gate", None)
        return self.norm(hidden if closing is None else hidden * closing[None])


class Attention(nnx.Module):
    """x [B*N, D] -> proj(context(x)) [B*N, D]."""

    qkv: Any
    proj: Any

    @abc.abstractmethod
    def context(self, x: jax.Array) -> jax.Array:
        """The values that each token attends to, its heads side by side, [B*N, H*d]."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.proj(self.context(x))


def split_heads(qkv: jax.Array, num_tokens: int, num_heads: int) -> jax.Array:
    """Splits [B*N, 3*H*d] into query, key and value [3, B, H, N, d]."""
    head_dim = qkv.shape[-1] // (3 * num_heads)
    qkv = qkv.reshape(-1, num_tokens, 3, num_heads, head_dim)
    return qkv.transpose(2, 0, 3, 1, 4)


def merge_heads(x: jax.Array) -> jax.Array:
    """Puts heads [B, H, N, d] side by side: [B*N, H*d]."""
    batch, num_heads, num_tokens, head_dim = x.shape
    return x.transpose(0, 2, 1, 3).reshape(batch * num_tokens, num_heads * head_dim)


@jax.custom_vjp
def attend(query: jax.Array, key: jax.Array, value: jax.Array, bias) -> jax.Array:
    """Attends from query [..., N, d] to key and value [..., M, d]: [..., N, d]; float32 softmax.

    `bias`, of as many axes, is added to the logits [..., N, M].
    """
    return _attend_forward(query, key, value, bias)[0]


def _attend_forward(query, key, value, bias):
    logits = _times_transposed(query, key) * query.shape[-1] ** -0.5 + bias.astype(jnp.float32)
    weights = jax.nn.softmax(logits).astype(value.dtype)
    mixed = weights @ value
    return mixed, (query, key, value, bias, weights, mixed)


def _attend_backward(saved, grad):
    # By hand, because the derived backward takes 1.6 times as long on XLA:CPU.
    query, key, value, bias, weights, mixed = saved
    along = (grad.astype(jnp.float32) * mixed.astype(jnp.float32)).sum(-1, keepdims=True)
    grad_logits = weights.astype(jnp.float32) * (_times_transposed(grad, value) - along)
    grad_scores = (grad_logits * query.shape[-1] ** -0.5).astype(query.dtype)
    shared = tuple(axis for axis, size in enumerate(bias.shape) if size != grad_logits.shape[axis])
    return (
        grad_scores @ key,
        grad_scores.mT @ query,
        weights.mT @ grad,
        grad_logits.sum(shared, keepdims=True).astype(bias.dtype),
    )


attend.defvjp(_attend_forward, _attend_backward)


def _times_transposed(x: jax.Array, y: jax.Array) -> jax.Array:
    """x [..., N, d] and y [..., M, d] -> the float32 products [..., N, M] of their rows."""
    return jnp.einsum("...nd,...md->...nm", x, y, preferred_element_type=jnp.float32)


def check_images(images: jax.Array | np.ndarray, image_shape: tuple[int, int, int]) -> None:
    if images.ndim != 4 or images.shape[1:] != image_shape:
        raise InputError(
            f"images have shape {tuple(images.shape)}; expected [B, {image_shape[0]}, "
            f"{image_shape[1]}, {image_shape[2]}] (batch, height, width, channels)"
        )
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise InputError(
            f"images have dtype {images.dtype}; expected normalised floating point images, float32"
        )
