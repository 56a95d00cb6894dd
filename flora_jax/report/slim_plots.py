"""Pictures of a slimmed network: its gates, what they leave, and the patches that stay.

Everything is drawn on `matplotlib.figure.Figure` objects, as in `flora_jax.report.plots`.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from flora_jax.report import plots
from flora_jax.slim import Masks

_NAMES = {"attn": "attention dimensions", "mlp": "MLP units", "patch": "tokens"}
_COLORS = dict(zip(_NAMES, plots.COLORS, strict=False))
_MAX_TOKEN_MAPS = 4
_MAX_HEAD_TICKS = 13
_GREY = 0.65  # what a dropped patch fades to


def plot_gates(ax: Axes, gates: Sequence[np.ndarray], threshold: float, color: str) -> None:
    """Histogram of one kind's gates, all blocks together, and the value that divides them."""
    values = np.concatenate([np.ravel(gate) for gate in gates])
    ax.hist(values, bins=40, color=color)
    ax.axvline(threshold, color="black", linestyle="--", label=f"threshold {threshold:.3g}")
    ax.locator_params(axis="x", nbins=5)
    ax.set_xlabel("gate")
    ax.set_ylabel("gates")
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    _legend_above(ax)


def plot_kept(ax: Axes, masks: Masks) -> None:
    """What stays of every block, in % of the uncut: heads, attention dimensions, units, tokens."""
    kinds = _kinds(masks)
    num_blocks, width = len(masks.attn), 0.8 / len(kinds)
    for i, kind in enumerate(kinds):
        ax.bar(
            np.arange(num_blocks) + (i - (len(kinds) - 1) / 2) * width,
            [100 * mask.mean() for mask in getattr(masks, kind)],
            width=width,
            color=_COLORS[kind],
            edgecolor="white",
            label=_NAMES[kind],
        )
    ax.plot(
        np.arange(num_blocks) - (len(kinds) - 1) / 2 * width,
        [100 * mask.any(1).mean() for mask in masks.attn],
        color="black",
        linestyle="none",
        marker="_",
        markersize=9,
        markeredgewidth=2,
        label="heads",
    )
    _block_ticks(ax, num_blocks)
    ax.set_ylim(0, 104)
    ax.set_ylabel("kept (%)")
    _legend_above(ax)


def plot_heads(ax: Axes, masks: Masks) -> None:
    """The dimensions that each head keeps, in % of its own; a head that is cut is grey."""
    num_blocks, num_heads = len(masks.attn), max(len(mask) for mask in masks.attn)
    kept = np.full((num_heads, num_blocks), np.nan)  # blocks may differ in their number of heads
    for b, mask in enumerate(masks.attn):
        kept[: len(mask), b] = 100 * mask.mean(1)
    colors = LinearSegmentedColormap.from_list(
        "kept", ["#d6e4f0", _COLORS["attn"], "#173a5c"]
    ).with_extremes(under="0.6")
    image = ax.pcolormesh(
        *(np.arange(num_blocks + 1) - 0.5, np.arange(num_heads + 1) - 0.5, kept),
        cmap=colors,
        vmin=1e-6,
        vmax=100,
        edgecolor="white",
    )
    _block_ticks(ax, num_blocks, _MAX_HEAD_TICKS)
    ax.set_xlim(-0.5, num_blocks - 0.5)
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_ylabel("head")
    bar = ax.figure.colorbar(image, ax=ax, pad=0.02, aspect=15, label="dimensions kept (%)")
    bar.set_ticks([0, 50, 100])
    if np.any(kept == 0):
        cut = Line2D([], [], color="0.6", marker="s", linestyle="none", label="head cut")
        _legend_above(ax, handles=[cut])


def plot_kept_patches(ax: Axes, image: np.ndarray, kept: np.ndarray) -> None:
    """The image with the dropped patches faded to grey.

    Args:
      image: float [H, W, 3] in 0..1.
      kept: bool [number of patches], row by row.
    """
    side = math.isqrt(len(kept))
    pixels = (np.arange(length) * side // length for length in image.shape[:2])
    shown = kept.reshape(side, side)[np.ix_(*pixels)][..., None]
    faded = _GREY + 0.12 * (image.mean(-1, keepdims=True) - 0.5)
    ax.imshow(np.where(shown, image, faded), interpolation="nearest")
    ax.set_axis_off()


def slim_figure(
    gates: Mapping[str, Sequence[np.ndarray]],
    masks: Masks,
    *,
    image: np.ndarray | None = None,
    num_prefix_tokens: int = 1,
    title: str = "",
) -> Figure:
    """Gates with their thresholds, what stays of every block, and the patches over an image.

    Args:
      gates: as `Gated.gates()` returns them.
      image: [H, W, C] uint8, or float in 0..1, C 1 or 3; None leaves the patches out, as does a
        network whose tokens have no gates.
      num_prefix_tokens: tokens before those of the patches.

    Raises:
      ValueError: gates and masks of different networks, an image of another shape, or patches that
        are no square grid.
    """
    _check_same_network(gates, masks)
    patches = [mask[num_prefix_tokens:] for mask in masks.patch]
    has_map = image is not None and bool(patches)
    if has_map:
        _check_grid(patches)

    figure = Figure(figsize=(12, 10 if has_map else 7), layout=plots.padded_layout())
    rows = figure.subfigures(2 + has_map, 1, squeeze=False)[:, 0]
    kinds = _kinds(masks)
    for ax, kind in zip(rows[0].subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        plot_gates(ax, gates[kind], masks.thresholds[kind], _COLORS[kind])
        kept = np.mean(np.concatenate([np.ravel(mask) for mask in getattr(masks, kind)]))
        _title(ax, f"{_NAMES[kind][0].upper()}{_NAMES[kind][1:]}: {100 * kept:.1f} % kept")
    left, right = rows[1].subplots(1, 2, width_ratios=(2, 1))
    plot_kept(left, masks)
    _title(left, "What every block keeps")
    plot_heads(right, masks)
    _title(right, "Dimensions of every head")
    for ax in (*rows[0].axes, left):
        ax.spines[["top", "right"]].set_visible(False)
    if image is not None and has_map:
        _plot_token_maps(rows[2], _in_color(image), patches)
    figure.suptitle(title)
    return figure


def _plot_token_maps(row, image: np.ndarray, patches: Sequence[np.ndarray]) -> None:
    blocks = np.unique(np.linspace(0, len(patches) - 1, _MAX_TOKEN_MAPS).round().astype(int))
    first, *others = row.subplots(1, 1 + len(blocks))
    plot_kept_patches(first, image, np.ones_like(patches[0]))
    first.set_title(f"image\n{len(patches[0])} patches", fontsize="medium")
    for ax, b in zip(others, blocks, strict=True):
        plot_kept_patches(ax, image, patches[b])
        ax.set_title(f"block {b}\n{patches[b].sum()} of {len(patches[b])} kept", fontsize="medium")


def _kinds(masks: Masks) -> list[str]:
    return [kind for kind in _NAMES if getattr(masks, kind)]


def _block_ticks(ax: Axes, num_blocks: int, most: int = plots.MAX_BLOCK_TICKS) -> None:
    ax.set_xticks(range(0, num_blocks, 1 + num_blocks // most))
    ax.set_xlim(-0.6, num_blocks - 0.4)
    ax.set_xlabel("block")


def _title(ax: Axes, text: str) -> None:
    ax.set_title(text, loc="left", pad=24)  # the legend lies between it and the axes


def _legend_above(ax: Axes, **options) -> None:
    """Puts the legend above the axes; inside it would hide bars."""
    columns = len(options.get("handles", ax.get_legend_handles_labels()[0]))
    ax.legend(
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=columns,
        frameon=False,
        fontsize="small",
        **options,
    )


def _check_same_network(gates: Mapping[str, Sequence[np.ndarray]], masks: Masks) -> None:
    for kind in _NAMES:
        if len(gates[kind]) != len(getattr(masks, kind)):
            raise ValueError(
                f"{kind} gates of {len(gates[kind])} blocks were given, but masks of "
                f"{len(getattr(masks, kind))}"
            )


def _in_color(image: np.ndarray) -> np.ndarray:
    """The image as float [H, W, 3] in 0..1."""
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[-1] not in (1, 3):
        raise ValueError(f"the image has shape {image.shape}; expected [H, W, 1 or 3]")
    if image.dtype == np.uint8:
        image = image / 255
    return np.broadcast_to(image, (*image.shape[:2], 3))


def _check_grid(patches: Sequence[np.ndarray]) -> None:
    number = len(patches[0])
    if math.isqrt(number) ** 2 != number:
        raise ValueError(
            f"{number} patches are no square grid; num_prefix_tokens must leave the patches alone"
        )
