"""The layers a vision transformer is made of. Activations are two-dimensional, [B*N, D]."""

import functools
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from flora_jax.errors import InputError
from flora_jax.models.linear_shape import LinearShape, Rank

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
