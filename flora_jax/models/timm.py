"""Weights in, until the callers import them from flora_jax.io.pretrained."""

from flora_jax.io.pretrained import from_pretrained, from_state_dict

__all__ = ["from_pretrained", "from_state_dict"]
