"""Learned positions of one grid or window taken to another, with the numbers timm or transformers
gets."""

import math

import numpy as np
import scipy
from PIL import Image

from flora_jax.errors import InputError


def resample_pos_embed(
    pos_embed: np.ndarray, num_prefix_tokens: int, grid: int, offset: float | None = None
) -> np.ndarray:
    """pos_embed float32 [P + n*n, D] -> [P + grid*grid, D]; the P prefix tokens stay.

    Args:
      offset: None: bicubic with antialiasing, Pillow's, channel by channel, as timm does it. A
        number: bicubic as PyTorch does it without, with points (n / (grid + offset)) apart: 0 as
        transformers does it, 0.1 as the release of DINOv2.

    Raises:
      InputError: the positions without the prefix are no square grid.
    """
    prefix, positions = np.split(pos_embed, [num_prefix_tokens])
    if offset is None:
        return np.concatenate([prefix, _resized(positions, grid, "patches make no square grid")])
    side = _side(positions, "patches make no square grid")
    weights, table = _bicubic(side, grid, offset), positions.reshape(side, side, -1)
    resized = np.einsum("ip,jq,pqd->ijd", weights, weights, table, optimize=True)
    return np.concatenate([prefix, resized.reshape(grid**2, -1).astype(np.float32)])


def resample_relative_position_table(table: np.ndarray, window: int) -> np.ndarray:
    """table float32 [(2w-1)^2, H] of windows of w x w -> [(2*window-1)^2, H].

    Offsets are stretched geometrically, so that near ones, where the table is steep, hardly move
    (timm's resize_rel_pos_bias_table, after BEiT).

    Raises:
      InputError: the table is not that of a square window of at least 2.
    """
    source_side, side = math.isqrt(len(table)), 2 * window - 1
    if source_side**2 != len(table) or source_side % 2 == 0 or source_side < 3:
        raise InputError(
            f"a relative position table of {len(table)} rows belongs to no window; a window of w "
            f"has (2w-1)^2 rows, w >= 2: 9, 25, 49, ..."
        )
    if source_side == side:
        return table
    offsets = _stretched_offsets(source_side // 2, side // 2)
    wanted = np.arange(-(side // 2), side // 2 + 1)
    interpolate = scipy.interpolate.RegularGridInterpolator(
        (offsets, offsets),
        table.reshape(source_side, source_side, -1).astype(np.float64),
        bounds_error=False,
        fill_value=None,  # extrapolate
    )
    rows, columns = np.meshgrid(wanted, wanted, indexing="ij")
    return interpolate((rows, columns)).reshape(side * side, -1).astype(np.float32)


def resample_distance_table(table: np.ndarray, window: int) -> np.ndarray:
    """table float32 [w*w, H] of distances in windows of w x w -> [window*window, H].

    Bicubic with antialiasing, as TinyViT and timm do it.

    Raises:
      InputError: the table is not that of a square window.
    """
    return _resized(table, window, "distances belong to no window of w*w")


def _resized(table: np.ndarray, new_side: int, otherwise: str) -> np.ndarray:
    """[side*side, D] -> [new_side*new_side, D], by Pillow's bicubic, channel by channel."""
    side = _side(table, otherwise)
    resized = [
        np.asarray(Image.fromarray(c).resize((new_side, new_side), Image.Resampling.BICUBIC))
        for c in table.T.reshape(-1, side, side)
    ]
    return np.stack(resized, axis=-1).reshape(new_side * new_side, -1)


def _side(table: np.ndarray, otherwise: str) -> int:
    side = math.isqrt(len(table))
    if side == 0 or side * side != len(table):
        raise InputError(f"{len(table)} {otherwise}")
    return side


def _bicubic(source: int, target: int, offset: float) -> np.ndarray:
    """Weights [target, source] of the four nearest points, the last ones standing for those beyond.

    PyTorch's cubic convolution with a = -0.75; Pillow's, which antialiases, has a = -0.5.
    """
    places = (np.arange(target) + 0.5) * source / (target + offset) - 0.5
    weights = np.zeros((target, source))
    for step in range(-1, 3):
        near = np.floor(places).astype(int) + step
        x = np.abs(places - near)
        inner, outer = (1.25 * x - 2.25) * x**2 + 1, -0.75 * (((x - 5) * x + 8) * x - 4)
        within = np.clip(near, 0, source - 1)
        np.add.at(weights, (np.arange(target), within), np.where(x <= 1, inner, outer))
    return weights


def _stretched_offsets(source: int, target: int) -> np.ndarray:
    """[2*source + 1] offsets, symmetric, growing by powers of q so that `source` reaches `target`.

    The bounds of q are timm's.
    """
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        if (1 - q**source) / (1 - q) > target:
            high = q
        else:
            low = q
    positive = np.cumsum(q ** np.arange(source))
    return np.concatenate([-positive[::-1], [0.0], positive])
