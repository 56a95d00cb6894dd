"""Pictures of a run: the ranks found, the training curves, and all plots on one page.

Everything is drawn on `matplotlib.figure.Figure` objects, never through pyplot: there is no global
state, no window, and no display is needed.
"""

import io
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter
from matplotlib.typing import HashableList

from flora_jax.evaluation.quality import TOP1, Metric
from flora_jax.io.files import replacing
from flora_jax.report.drawn import Curve, Drawn
from flora_jax.report.trade_off import legend_below, plot_candidates, plot_models

COLORS = ("#4477aa", "#ee7733", "#228833", "#aa3377", "#66ccee", "#bbaa22")  # colour-blind safe
LINE_STYLES = ("-", "--", ":", "-.")
MAX_BLOCK_TICKS = 26
MAX_MARKERS = 20  # of a curve, beyond which they hide it
_LOG_LOSS_RANGE = 20  # largest / smallest loss from which a linear axis hides the end of training


def plot_ranks(
    ax: Axes,
    ranks: Sequence[int | None],
    full_ranks: Sequence[int],
    names: Sequence[str] = ("qkv", "fc1", "fc2"),
    uniform_ratio: float | None = None,
) -> None:
    """The rank of every searchable layer as a share of its full rank, block by block.

    Args:
      ranks: [L] ranks in the order block by block, `names` within a block; None is a dense layer.
      full_ranks: [L] the ranks at which nothing is lost.
      names: the searchable layers of one block.
      uniform_ratio: the share that every layer would get at the same budget.

    Raises:
      ValueError: there is not one full rank a layer, or L is not a multiple of len(names).
    """
    if len(ranks) != len(full_ranks):
        raise ValueError(f"{len(ranks)} ranks were given, but {len(full_ranks)} full ranks")
    if len(ranks) % len(names):
        raise ValueError(f"{len(ranks)} ranks are not a multiple of the {len(names)} in a block")
    num_blocks = len(ranks) // len(names)
    shares = np.array([1.0 if r is None else r / f for r, f in zip(ranks, full_ranks, strict=True)])
    width = 0.8 / len(names)
    handles: list[Artist] = []
    for i, name in enumerate(names):
        ax.bar(
            np.arange(num_blocks) + (i - (len(names) - 1) / 2) * width,
            100 * shares[i :: len(names)],
            width=width,
            color=COLORS[i],
            edgecolor="white",
            hatch=["////" if rank is None else "" for rank in ranks[i :: len(names)]],
        )
        handles.append(Patch(facecolor=COLORS[i], label=name))
    if None in ranks:
        handles.append(Patch(facecolor="0.6", edgecolor="white", hatch="////", label="kept dense"))
    if uniform_ratio is not None:
        handles.append(
            ax.axhline(
                100 * uniform_ratio,
                color="black",
                linestyle="--",
                linewidth=1.2,
                label=f"uniform ({100 * uniform_ratio:.0f} %)",
            )
        )
    ax.set_xticks(range(0, num_blocks, 1 + num_blocks // MAX_BLOCK_TICKS))
    ax.set_xlim(-0.6, num_blocks - 0.4)
    ax.set_ylim(0, 104)
    ax.set_xlabel("block")
    ax.set_ylabel("rank (% of full rank)")
    # Above the axes: a legend inside would hide bars.
    ax.legend(
        handles=handles,
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=len(handles),
        frameon=False,
        fontsize="small",
    )


def plot_curves(ax: Axes, curves: Mapping[str, Curve]) -> None:
    """Training loss of every stage, over the share of the stage that is done.

    Stages differ in length by orders of magnitude; the legend gives the steps of each.

    Args:
      curves: {stage: (steps [T], loss [T])}, in the order in which they ran.
    """
    curves = {stage: curve for stage, curve in curves.items() if len(curve[0])}
    if not curves:
        ax.set_axis_off()
        ax.text(0.5, 0.5, "no training curves", ha="center", va="center", color="0.4")
        return
    for i, (stage, (steps, losses)) in enumerate(curves.items()):
        color, last_step = COLORS[i % len(COLORS)], max(1, steps[-1])
        label = f"{stage} ({last_step:,} steps)"
        style = _line_style(i, 0)
        ax.plot(100 * np.asarray(steps) / last_step, losses, style, color=color, lw=1, label=label)
    every_loss = np.concatenate([np.asarray(loss, float) for _, loss in curves.values()])
    if every_loss.min() > 0 and every_loss.max() / every_loss.min() > _LOG_LOSS_RANGE:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("share of the stage (%)")
    ax.set_ylabel("training loss")
    legend_below(ax)


def plot_accuracies(
    ax: Axes, accuracies: Mapping[str, Mapping[str, Curve]], metric: Metric = TOP1
) -> None:
    """Held-out quality while each stage trains, over the share of the stage that is done.

    Args:
      accuracies: {stage: {subnet: (steps [E], top1 [E] in 0..1, or the metric)}}; a stage has the
        colour that `plot_curves` gives it where it gets the same stages, and each of its subnets a
        line style.
    """
    if not any(accuracies.values()):
        ax.set_axis_off()
        ax.text(0.5, 0.5, "no evaluations while training", ha="center", va="center", color="0.4")
        return
    for i, (stage, subnets) in enumerate(accuracies.items()):
        last_step = max((steps[-1] for steps, _ in subnets.values()), default=1)
        for style, (subnet, (steps, values)) in enumerate(subnets.items()):
            ax.plot(
                100 * np.asarray(steps) / last_step,
                metric.scale * np.asarray(values),
                color=COLORS[i % len(COLORS)],
                linestyle=_line_style(i, style),
                lw=1,
                marker="." if len(steps) < MAX_MARKERS else None,
                label=f"{stage} {subnet}".strip(),
            )
    ax.set_xlabel("share of the stage (%)")
    every_value = np.concatenate([found for s in accuracies.values() for _, found in s.values()])
    low, high = metric.scale * np.quantile(every_value, (0.1, 1))  # a beginning would hide the end
    if low < high:
        ax.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))
    ax.set_ylabel(f"held-out {metric.label}")
    legend_below(ax)


def _line_style(stage: int, subnet: int) -> str:
    """Another one where the colours of stages come again."""
    return LINE_STYLES[(subnet + 3 * (stage // len(COLORS))) % len(LINE_STYLES)]


def report_figure(drawn: Drawn) -> Figure:
    """All plots as one picture: models beside candidates, loss beside quality, ranks below."""
    beside = "candidates" if drawn.is_searched else "models"
    rows: list[HashableList[str]] = [["models", beside], ["loss", "quality"]]
    rows += [[name, name] for name in drawn.ranks]
    heights = [2.6 if row < 2 else 2 for row in range(len(rows))]
    figure = Figure(figsize=(15, 1.6 * sum(heights)), layout=padded_layout())
    axes: dict[str, Axes] = figure.subplot_mosaic(rows, height_ratios=heights)
    what = "Accuracy" if drawn.metric is TOP1 else "Agreement"
    plot_models(axes["models"], drawn)
    axes["models"].set_title(f"{what} of the models against cost", loc="left")
    if drawn.is_searched:
        plot_candidates(axes["candidates"], drawn)
        axes["candidates"].set_title("What the search scored", loc="left")
    plot_curves(axes["loss"], drawn.curves)
    axes["loss"].set_title("Loss while training", loc="left")
    plot_accuracies(axes["quality"], drawn.accuracies, drawn.metric)
    axes["quality"].set_title("Quality while training", loc="left")
    for i, (name, own_ranks) in enumerate(drawn.ranks.items()):
        ratio = None if drawn.uniform_ratios is None else drawn.uniform_ratios[i]
        plot_ranks(axes[name], own_ranks, drawn.full_ranks, uniform_ratio=ratio)
        axes[name].set_title(f"Ranks of the {name}", loc="left")
    for ax in figure.axes:
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(drawn.title)
    return figure


def padded_layout() -> ConstrainedLayoutEngine:
    """A layout that leaves some room between the plots of a picture."""
    return ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)


def png(figure: Figure) -> bytes:
    """The picture as PNG, 150 dpi."""
    content = io.BytesIO()
    with warnings.catch_warnings():  # names of runs may be in any script
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(content, format="png", dpi=150)
    return content.getvalue()


def save_figure(figure: Figure, path: epath.PathLike) -> None:
    """Writes a PNG in one piece: a reader never sees half a file."""
    with replacing(path) as partial:
        partial.write_bytes(png(figure))
