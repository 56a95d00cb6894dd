"""Figures of a slimmed network: its gates, what they leave, and the patches that stay."""

import functools
import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from flora_jax.report.data import Slimming
from flora_jax.report.figures import PART_COLORS, Panel, block_bars, block_ticks, legend_below
from flora_jax.report.formats import GROUND, INK, titled
from flora_jax.slim.threshold import Masks

_NAMES = {"attn": "attention dimensions", "mlp": "MLP units", "patch": "tokens"}
_COLORS = dict(zip(_NAMES, PART_COLORS, strict=True))
_MAX_TOKEN_MAPS = 4
_MAX_HEAD_TICKS = 9
_GREY = 0.65  # what a dropped patch fades to


def plot_gates(ax: Axes, gates: Sequence[np.ndarray], threshold: float, color: str) -> None:
    """Histogram of one kind's gates, all blocks together, and the value that divides them."""
    values = np.concatenate([np.ravel(gate) for gate in gates])
    ax.hist(values, bins=40, color=color)
    ax.axvline(threshold, color=INK, linestyle="--", label=f"threshold {threshold:.3g}")
    ax.locator_params(axis="x", nbins=5)
    ax.set_xlabel("gate")
    ax.set_ylabel("gates")
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    legend_below(ax)


def plot_kept(ax: Axes, masks: Masks) -> None:
    """Shares of every block that stay, in %: heads, attention dimensions, units, tokens."""
    kinds = _kinds(masks)
    kept = np.array([[100 * mask.mean() for mask in of_kind] for of_kind in kinds.values()])
    bars = block_bars(ax, kept, [_NAMES[kind] for kind in kinds])
    for kind, of_kind in zip(kinds, bars, strict=True):
        for b, (bar, mask) in enumerate(zip(of_kind, kinds[kind], strict=True)):
            titled(bar, f"block {b}: {mask.sum()} of {mask.size} {_NAMES[kind]}")
    centres = [bar.get_x() + bar.get_width() / 2 for bar in bars[0]]
    heads = [100 * mask.any(1).mean() for mask in masks.attn]
    ax.plot(centres, heads, "_", color=INK, markersize=9, markeredgewidth=2, label="heads")
    ax.set_ylabel("kept (%)")
    legend_below(ax)


def plot_heads(ax: Axes, masks: Masks) -> None:
    """The dimensions that each head keeps, in % of its own; a head that is cut is grey."""
    num_blocks, num_heads = len(masks.attn), max(len(mask) for mask in masks.attn)
    kept = np.full((num_heads, num_blocks), np.nan)  # blocks may differ in their number of heads
    for b, mask in enumerate(masks.attn):
        kept[: len(mask), b] = 100 * mask.mean(1)
    shades = LinearSegmentedColormap.from_list("kept", ["#d6e4f0", "#6d9fce", "#173a5c"], N=20)
    colors = shades.with_extremes(under="0.6")
    corners = np.arange(num_blocks + 1) - 0.5, np.arange(num_heads + 1) - 0.5
    image = ax.pcolormesh(*corners, kept, cmap=colors, vmin=1e-6, vmax=100, edgecolor=GROUND)
    block_ticks(ax, num_blocks, _MAX_HEAD_TICKS)
    ax.grid(False)
    ax.set_xlim(-0.5, num_blocks - 0.5)
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_ylabel("head")
    bar = ax.figure.colorbar(image, ax=ax, pad=0.02, aspect=15, label="dimensions kept (%)")
    bar.set_ticks([0, 50, 100])
    if np.any(kept == 0):
        cut = Line2D([], [], color="0.6", marker="s", linestyle="none", label="head cut")
        legend_below(ax, [cut])


def plot_patches(ax: Axes, image: np.ndarray, patches: Sequence[np.ndarray]) -> None:
    """The image, then the patches of it that stay in some blocks, three in a row.

    Args:
      image: [H, W, 1 or 3], uint8 or float in 0..1.
      patches: bool [number of patches, a square] of each block, row by row.
    """
    image = image / 255 if image.dtype == np.uint8 else image
    image = np.broadcast_to(image, (*image.shape[:2], 3))
    blocks = np.unique(np.linspace(0, len(patches) - 1, _MAX_TOKEN_MAPS).round().astype(int))
    maps = [(f"image\n{len(patches[0])} patches", np.ones_like(patches[0]))]
    maps += [(f"block {b}\n{patches[b].sum()} of {len(patches[b])}", patches[b]) for b in blocks]
    height = image.shape[0] / image.shape[1]
    for i, (text, kept) in enumerate(maps):
        left, top = 1.12 * (i % 3), -(height + 0.5) * (i // 3)
        corners = (left, left + 1, top - height, top)
        ax.imshow(faded(image, kept), extent=corners, interpolation="none")
        ax.text(left, top + 0.04, text, fontsize="small")
    ax.set_xlim(-0.02, 3.3)
    ax.set_ylim(top - height - 0.02, 0.45)
    ax.set_anchor("W")
    ax.set_axis_off()


def faded(image: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The image with the dropped patches faded to grey, float [H, W, 3].

    Args:
      image: float [H, W, 3] in 0..1.
      kept: bool [number of patches], row by row.
    """
    side = math.isqrt(len(kept))
    pixels = (np.arange(length) * side // length for length in image.shape[:2])
    shown = kept.reshape(side, side)[np.ix_(*pixels)][..., None]
    return np.where(shown, image, _GREY + 0.12 * (image.mean(-1, keepdims=True) - 0.5))


def slim_panels(slimming: Slimming) -> list[Panel]:
    """Gates with their thresholds, what stays of every block, and the patches over an image.

    Patches are left out where there is no image, or tokens have no gates.
    """
    masks, of, panels = slimming.masks, functools.partial, []
    for kind, of_kind in _kinds(masks).items():
        kept = np.mean(np.concatenate([np.ravel(mask) for mask in of_kind]))
        title = f"{_NAMES[kind][0].upper()}{_NAMES[kind][1:]}: {100 * kept:.1f} % kept"
        gates, threshold = slimming.gates[kind], masks.thresholds[kind]
        plot = of(plot_gates, gates=gates, threshold=threshold, color=_COLORS[kind])
        panels.append(Panel(title, plot))
    panels.append(Panel("What every block keeps", of(plot_kept, masks=masks)))
    panels.append(Panel("Dimensions of every head", of(plot_heads, masks=masks)))
    if slimming.image is not None and masks.patch:
        patches = [mask[slimming.num_prefix_tokens :] for mask in masks.patch]
        plot = of(plot_patches, image=slimming.image, patches=patches)
        panels.append(Panel("Patches that stay", plot))
    return panels


def _kinds(masks: Masks) -> dict[str, Sequence[np.ndarray]]:
    """The masks of each kind that has some."""
    return {kind: getattr(masks, kind) for kind in _NAMES if getattr(masks, kind)}
