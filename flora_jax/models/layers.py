"""The layers a vision transformer is made of. Activations are two-dimensional, [B*N, D].

Any layer in a searchable position is called as `layer(x, gene)`; only the supernet's own layer
(`flora_jax.lowrank.layer.RankedLinear`) looks at the gene.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from flora_jax.models.spec import Rank

_truncated_normal = nnx.initializers.truncated_normal(0.02)


class Linear(nnx.Module):
    """x [M, in] -> x @ kernel + bias [M, out]."""

    def __init__(self, in_features: int, out_features: int, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(_truncated_normal(rngs.params(), (in_features, out_features)))
        self.bias = nnx.Param(jnp.zeros(out_features))

    def __call__(self, x: jax.Array, gene: jax.Array | None = None) -> jax.Array:
        return x @ self.kernel + self.bias


class LowRankLinear(nnx.Module):
    """x [M, in] -> x @ down.T @ up + bias [M, out], with down [R, in] and up [R, out]."""

    def __init__(self, in_features: int, out_features: int, rank: int, *, rngs: nnx.Rngs):
        self.down = nnx.Param(_truncated_normal(rngs.params(), (rank, in_features)))
        self.up = nnx.Param(_truncated_normal(rngs.params(), (rank, out_features)))
        self.bias = nnx.Param(jnp.zeros(out_features))

    def __call__(self, x: jax.Array, gene: jax.Array | None = None) -> jax.Array:
        return x @ self.down.T @ self.up + self.bias


def make_linear(in_features: int, out_features: int, rank: Rank, *, rngs: nnx.Rngs) -> nnx.Module:
    if rank is None:
        return Linear(in_features, out_features, rngs=rngs)
    return LowRankLinear(in_features, out_features, rank, rngs=rngs)


class LayerNorm(nnx.Module):
    """Normalises the last axis of x [M, D]; statistics in float32."""

    def __init__(self, features: int, epsilon: float = 1e-6):
        self.scale = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        centred = wide - wide.mean(-1, keepdims=True)
        variance = (centred * centred).mean(-1, keepdims=True)
        normal = (centred * jax.lax.rsqrt(variance + self.epsilon)).astype(x.dtype)
        return normal * self.scale + self.bias
