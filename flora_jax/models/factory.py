"""One factory for every network: a spec in, a model out, with the layers that the caller makes."""

from collections.abc import Callable

import jax
from flax import nnx

from flora_jax.models.layers import MakeLinear, make_linear
from flora_jax.models.network import Block, Network
from flora_jax.models.spec import Spec
from flora_jax.models.swin import Swin
from flora_jax.models.tiny_vit import TinyViT
from flora_jax.models.vit import ViT

_MODELS: dict[str, Callable[..., Network]] = {"vit": ViT, "swin": Swin, "tiny_vit": TinyViT}


def create(
    spec: Spec, seed: int = 0, *, linear: MakeLinear = make_linear, block: type[Block] = Block
) -> Network:
    """A model of this spec with random weights (Xavier uniform; zero biases).

    Args:
      spec: what to build.
      seed: of the weights.
      linear: makes each searchable layer: (LinearShape, its rank or None, rngs) -> a module that
        maps [M, in] to [M, out].
      block: class of the transformer blocks.
    """
    return _MODELS[spec.family](spec, linear, block, rngs=nnx.Rngs(seed))


def create_abstract(
    spec: Spec, *, linear: MakeLinear = make_linear, block: type[Block] = Block
) -> Network:
    """A model of this spec whose parameters are shapes without values."""
    return nnx.eval_shape(lambda: _MODELS[spec.family](spec, linear, block, rngs=_SameKey()))


class _SameKey(nnx.Rngs):
    """One key for all parameters, whose values nobody asks for.

    To count what is drawn would take most of the time of a trace: flax asks the count for its
    sharding, and JAX puts the program so far into words to say that a traced value has none.
    """

    def params(self) -> jax.Array:
        return jax.random.key(0)
