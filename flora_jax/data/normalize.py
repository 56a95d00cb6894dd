"""Pixel normalisation, on the device: images cross process boundaries as uint8."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.errors import InputError, hold_plain_values


@dataclasses.dataclass(frozen=True)
class Normalization:
    """(pixel / 255 - mean) / std per channel; one value stands for all channels.

    Raises:
      InputError: a mean or standard deviation that pixels in 0..1 cannot have.
    """

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self):
        hold_plain_values(self)
        for name, values, least in (("mean", self.mean, "[0"), ("std", self.std, "(0")):
            if not all(0 <= v <= 1 and (v or name == "mean") for v in values):
                nearest = tuple(round(v / 255, 4) for v in values)
                hint = f" (did you mean {nearest}?)" if max(values) > 1 else ""
                raise InputError(
                    f"{name} must lie in {least}, 1], as of pixels in 0..1; got {values}{hint}"
                )

    def __call__(self, images: jax.Array, dtype=jnp.float32) -> jax.Array:
        """images uint8 [..., C] -> float [..., C]"""
        scaled = images.astype(jnp.float32) / 255.0
        rank = range(images.ndim - 1)
        mean, std = (jnp.expand_dims(jnp.float32(v), rank) for v in (self.mean, self.std))
        return ((scaled - mean) / std).astype(dtype)

    def invert(self, images: np.ndarray) -> np.ndarray:
        """Normalised images float [..., C] -> pixels in 0..1, float."""
        return np.clip(images * np.asarray(self.std) + np.asarray(self.mean), 0, 1)
