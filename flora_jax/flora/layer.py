"""The supernet's Linear: a pair of factors whose rank is chosen at run time."""

from collections.abc import Callable

import jax
from flax import nnx

from flora_jax.flora.extras.tpu_kernel import tiled_product
from flora_jax.flora.products import masked_product, sliced_product
from flora_jax.models.functional import Slot
from flora_jax.models.layers import add_bias, zero_bias
from flora_jax.models.linear_shape import LinearShape

IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "masked": masked_product,
    "sliced": sliced_product,
    "tiled": tiled_product,
}


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
