"""The supernet's Linear: a pair of factors whose rank is chosen at run time."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from flora_jax.lowrank.products import masked_product, sliced_product
from flora_jax.lowrank.tiled import tiled_product
from flora_jax.models.layers import add_bias

IMPLEMENTATIONS = {"masked": masked_product, "sliced": sliced_product, "tiled": tiled_product}


def default_implementation() -> str:
    """What is fastest on this platform; figures in docs/performance.md.

    On TPU the branches of the sliced form make a program of over 1 GB; v2 to v4 have too little
    vector memory for the tiles of large layers, or no bfloat16 matrix unit that takes them.
    """
    if jax.default_backend() != "tpu":
        return "sliced"
    is_old = any(version in jax.devices()[0].device_kind for version in ("v2", "v3", "v4"))
    return "masked" if is_old else "tiled"


class RankedLinear(nnx.Module):
    """x [M, in], gene int32 [] -> x @ down[:r].T @ up[:r] + bias [M, out], r = ranks[gene].

    down [R, in] and up [R, out] are rank-major, so that a rank is a block of leading rows.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        ranks: Sequence[int],
        implementation: str,
        *,
        use_bias: bool = True,
        rngs: nnx.Rngs,
    ):
        self.ranks = tuple(ranks)
        self.implementation = implementation
        init = nnx.initializers.xavier_uniform()
        self.down = nnx.Param(init(rngs.params(), (self.ranks[-1], in_features)))
        self.up = nnx.Param(init(rngs.params(), (self.ranks[-1], out_features)))
        self.bias = nnx.Param(jnp.zeros(out_features)) if use_bias else None

    def __call__(self, x: jax.Array, gene: jax.Array | None = None) -> jax.Array:
        if gene is None:
            gene = jnp.int32(len(self.ranks) - 1)
        multiply = IMPLEMENTATIONS[self.implementation]
        product = multiply(x, self.down[...], self.up[...], gene, self.ranks)
        return add_bias(product, self.bias)
