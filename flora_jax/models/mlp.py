"""The MLP of a block: two searchable layers and what is between them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


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
    computes fc2(activation(gate) * value).
    """

    def __init__(
        self, fc1: nnx.Module, fc2: nnx.Module, activation: str = "gelu", is_gated: bool = False
    ):
        self.fc1: Any = fc1
        self.fc2: Any = fc2
        self.activation, self.is_gated = activation, is_gated

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden, activate = self.fc1(x), ACTIVATIONS[self.activation]
        if self.is_gated:
            gate, value = jnp.split(hidden, 2, axis=-1)
            return self.fc2(activate(gate) * value)
        return self.fc2(activate(hidden))
