"""Rotary positions (Su et al. 2021) of a grid of patches, as DINOv3 has them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Turns each pair (i, i + d/2) of a query's or key's dimensions by its patch's position.

    The first half of an uncut head's pairs turns with y, the second with x, both in [-1, 1] from
    edge to edge; their periods grow geometrically from 1 towards theta. Tokens before those of the
    patches are not turned.

    Attributes:
      grid_size: patches a side.
      head_dim: of the uncut head, a multiple of 4.
      num_prefix_tokens: before the patches.
      tokens: numbers of the tokens that there are, counted in the uncut image; None for all.
      pairs: of each head, numbers of the pairs that it has, in the uncut head; None for all.
    """

    theta: float
    grid_size: int
    head_dim: int
    num_prefix_tokens: int
    tokens: tuple[int, ...] | None = None
    pairs: tuple[tuple[int, ...], ...] | None = None

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, H, N, d] -> the same, turned; computed in float32."""
        cos, sin = tables(self)
        wide = x.astype(jnp.float32)
        first, second = jnp.split(wide, 2, axis=-1)
        turned = wide * cos[None] + jnp.concatenate([-second, first], axis=-1) * sin[None]
        return turned.astype(x.dtype)


@functools.lru_cache(maxsize=64)
def tables(rotary: Rotary) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine, float32 [H, N, d]; [1, N, d] where all heads are alike."""
    periods = rotary.theta ** (np.arange(rotary.head_dim // 4) / (rotary.head_dim // 4))
    places = (np.arange(rotary.grid_size) + 0.5) / rotary.grid_size * 2 - 1
    grid = np.stack(np.meshgrid(places, places, indexing="ij"), -1).reshape(-1, 2)  # y, x
    angles = (2 * np.pi * grid[:, :, None] / periods).reshape(len(grid), -1)
    angles = np.concatenate([np.zeros((rotary.num_prefix_tokens, angles.shape[1])), angles])
    if rotary.tokens is not None:
        angles = angles[np.array(rotary.tokens)]
    by_head = angles[None] if rotary.pairs is None else angles[:, np.array(rotary.pairs)]
    by_head = by_head if rotary.pairs is None else by_head.transpose(1, 0, 2)
    both = np.concatenate([by_head, by_head], axis=-1)
    return np.cos(both).astype(np.float32), np.sin(both).astype(np.float32)
