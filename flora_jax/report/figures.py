"""Figures of a run: models, candidates, training curves and ranks, each on axes of its own.

Each is a panel. One sheet with all panels is report.png, a sheet for each panel is the page's.
"""

import collections
import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from flora_jax.evaluation.comparison import kind_of
from flora_jax.evaluation.quality import TOP1, Metric
from flora_jax.report.data import RANKED, Curve, ReportData
from flora_jax.report.formats import GROUND, INK, titled
from flora_jax.report.table import count_unit

MODEL_COLORS = {  # of a kind of model in every panel, colour-blind safe
    "dense": INK,
    "subnet": "#2f6fb0",
    "allocated": "#1f7a3d",
    "uniform": "#c0401d",
    "slim": "#98306d",
    "transfer": "#0f7f86",
    "supernet": "#8a6d00",
}
OTHER_COLOR, QUIET = "#6b5fa3", "#5d6470"
PART_COLORS = ("#1d4a73", "#5b93c7", "#a9c9e6")  # of the parts of a block: none is a model's
LINE_STYLES = ("-", "--", ":", "-.")
_STYLE = pathlib.Path(__file__).with_name("report.mplstyle")
_WIDTH, _HEIGHT = 4.4, 1.8  # inches, of a panel and of its axes
_AROUND, _TITLE, _LEGEND_ROW, _LABEL_ROW = 0.65, 0.2, 0.17, 0.2  # inches
_LABEL_HEIGHT = 13  # points
_MAX_MARKERS = 20  # of a curve, beyond which they hide it
_MAX_BLOCK_TICKS = 13
_LOG_RANGE = 10  # largest / smallest value from which a linear axis hides the end of training


@dataclasses.dataclass(frozen=True)
class Panel:
    """A figure with its title, a function that draws it on axes, and a sentence below it."""

    title: str
    draw: Callable[[Axes], None]
    note: str = ""


def sheet(panels: Sequence[Panel], title: str = "", *, has_titles: bool = True) -> Figure:
    """All panels on one figure, two in a row; an odd last one takes the whole row."""
    columns, num_rows = min(2, len(panels)) or 1, -(-len(panels) // 2) or 1
    inside, outside = [0.1] * num_rows, [0.0] * num_rows  # inches, of the axes and around them
    with matplotlib.rc_context(fname=_STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08)
        figure = Figure(figsize=(_WIDTH * columns, 1), layout=layout)
        grid = figure.add_gridspec(num_rows, columns)
        for i, panel in enumerate(panels):
            row, column = divmod(i, columns)
            is_alone = i == len(panels) - 1 and column == 0
            ax = figure.add_subplot(grid[row, :] if is_alone else grid[row, column])
            panel.draw(ax)
            legend_rows = -(-len(legend.get_texts()) // 2) if (legend := ax.get_legend()) else 0
            inside[row] = max(inside[row], _axes_height(len(ax.texts)))
            outside[row] = max(outside[row], _AROUND + _LEGEND_ROW * legend_rows)
            if has_titles:
                ax.set_title(panel.title)
        grid.set_height_ratios(inside)
        figure.set_figheight(sum(inside + outside) + _TITLE * (has_titles * num_rows + bool(title)))
        figure.suptitle(title)
    return figure


def panels_of(data: ReportData) -> list[Panel]:
    """Panels of a run without those of its slimming; what has nothing to show is left out."""
    panels, of = [], functools.partial
    if data.points:
        panels.append(Panel("Models, on the test images", of(plot_models, data=data)))
    if data.candidates:
        title = "What the search scored, on held-out images"
        note = "They were chosen by these images, so that their values are no forecast for others."
        panels.append(Panel(title, of(plot_candidates, data=data), note))
    looks = [steps for of_stage in data.accuracies.values() for steps, _ in of_stage.values()]
    if any(len(steps) > 1 for steps in looks):  # one is no curve
        plot = of(plot_accuracies, accuracies=data.accuracies, metric=data.metric)
        panels.append(Panel("Held-out quality while training", plot))
    if any(len(steps) for steps, _ in data.curves.values()):
        panels.append(Panel("Training loss", of(plot_losses, curves=data.curves)))
    for i, (name, ranks) in enumerate(data.ranks.items()):
        ratio = None if data.uniform_ratios is None else data.uniform_ratios[i]
        plot = of(
            plot_ranks,
            ranks=ranks,
            full_ranks=data.full_ranks,
            names=data.parts,
            uniform_ratio=ratio,
        )
        what = "Ranks" if data.parts == RANKED else "Sizes"
        panels.append(Panel(f"{what} of the {name}", plot))
    return panels


def color_of(name: str) -> str:
    """Colour of a model such as "subnet 0.55", or of a stage such as "finetune/subnet_0.55"."""
    model = {"pretrain": "dense", "slim/retrain": "slim"}.get(name, name.rpartition("/")[2])
    return MODEL_COLORS.get(re.split("[ _]", model)[0], OTHER_COLOR)


def plot_models(ax: Axes, data: ReportData) -> None:
    """Quality on the test images against cost, of every finished model.

    Models of one kind at several budgets, such as "subnet 0.55", are joined to a front.
    """
    metric, points = data.metric, data.points
    unit, label = _cost_axis(data)
    cost = np.array([point[0] for point in points.values()]) / unit
    shown = metric.scale * np.array([point[1] for point in points.values()])
    _shade_windows(ax, data, unit)
    for kind in dict.fromkeys(map(kind_of, points)):
        of_kind = [kind_of(name) == kind for name in points]
        if sum(of_kind) > 1:
            (line,) = ax.plot(cost[of_kind], shown[of_kind], color=color_of(kind), zorder=3)
            titled(line, kind)
    colors = [color_of(name) for name in points]
    stars = ax.scatter(cost, shown, s=130, marker="*", c=colors, edgecolor=GROUND, zorder=4)
    named = list(zip(points, cost, shown, strict=True))
    titled(stars, "models", *(f"{n}: {_text(metric, y)}, {x:.4g} {label}" for n, x, y in named))
    # Room for the labels of the lowest and the highest point.
    room = min(0.4, _LABEL_HEIGHT * (len(points) + 1) / 2 / (72 * _axes_height(len(points))))
    ax.margins(x=0.1, y=room / (1 - 2 * room))
    if np.ptp(shown) == 0:
        ax.set_ylim(shown[0] - 0.01 * metric.scale, shown[0] + 0.01 * metric.scale)
    form = "{:.1f} %" if metric.in_percent else "{:.3f}"
    labels = [f"{name} {form.format(y)}" for name, _, y in named]
    _label_points(ax, labels, cost, shown, colors)
    ax.set_xlabel(label)
    ax.set_ylabel(f"test {metric.column}")
    legend_below(ax)


def plot_candidates(ax: Axes, data: ReportData) -> None:
    """Quality on the held-out images against cost, of everything that the search scored."""
    (unit, label), metric = _cost_axis(data), data.metric
    cost = np.asarray(data.candidates[data.cost]) / unit
    values = metric.scale * np.asarray(data.candidates[metric.name])
    generation = np.asarray(data.candidates["generation"])
    last = int(generation.max())
    _shade_windows(ax, data, unit)
    on_front = front(cost, values)
    ax.step(cost[on_front], values[on_front], where="post", color=INK, label="Pareto front")
    colors = ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0.2, 1, last + 1)))
    dots = ax.scatter(cost, values, c=generation, cmap=colors, s=16, alpha=0.8, zorder=3)
    dots.set_clim(-0.5, last + 0.5)
    named = zip(cost, values, generation, strict=True)
    texts = (f"generation {n}: {_text(metric, y)}, {x:.4g} {label}" for x, y, n in named)
    titled(dots, "candidates", *texts)
    if last:
        bar = ax.figure.colorbar(dots, ax=ax, pad=0.02, aspect=30, label="generation")
        bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))
        bar.ax.yaxis.set_minor_locator(NullLocator())
    ax.set_xlabel(label)
    ax.set_ylabel(f"held-out {metric.column}")
    legend_below(ax)


def plot_losses(ax: Axes, curves: Mapping[str, Curve]) -> None:
    """Training loss of every stage, over the share of the stage that is done.

    Stages differ in length by orders of magnitude; the legend gives the steps of each.

    Args:
      curves: {stage: (steps [T], loss [T])}, in the order in which they ran, some T > 0.
    """
    lines = [
        (f"{stage} ({steps[-1]:,} steps)", color_of(stage), steps, losses, losses)
        for stage, (steps, losses) in curves.items()
        if len(steps)
    ]
    _plot_lines(ax, lines)
    ax.set_ylabel("training loss")


def plot_accuracies(
    ax: Axes, accuracies: Mapping[str, Mapping[str, Curve]], metric: Metric = TOP1
) -> None:
    """Held-out quality while each stage trains, over the share of the stage that is done.

    The axis is of what is missing to 100 %, or to a cosine of 1, upside down: where a beginning is
    far from the end it is logarithmic, and both can be read.

    Args:
      accuracies: {stage: {subnet: (steps [E], top1 [E] in 0..1, or the metric)}}, some E > 0.
    """
    full = metric.scale
    curves = {
        (stage, subnet): (steps, full * np.asarray(values))
        for stage, subnets in accuracies.items()
        for subnet, (steps, values) in subnets.items()
        if len(steps)
    }
    missing = full - np.concatenate([values for _, values in curves.values()])
    least = min(missing[missing > 0], default=full) / 2  # where nothing is missing
    lines = [
        (" ".join(name).strip(), color_of(name[0]), steps, np.maximum(full - values, least), values)
        for name, (steps, values) in curves.items()
    ]
    _plot_lines(ax, lines)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{full - value:.6g}"))
    ax.yaxis.set_inverted(True)
    ax.set_ylabel(f"held-out {metric.column}")


def plot_ranks(
    ax: Axes,
    ranks: Sequence[int | None],
    full_ranks: Sequence[int],
    names: Sequence[str] = RANKED,
    uniform_ratio: float | None = None,
) -> None:
    """The rank of every searchable layer as a share of its full rank, block by block; or sizes.

    Args:
      ranks: [L] ranks in the order block by block, `names` within a block; None is a dense layer.
      full_ranks: [L] the ranks at which nothing is lost.
      names: the searchable layers of one block, or what else there are sizes of, at most three.
      uniform_ratio: the share that every layer would get at the same budget.
    """
    shares = [1.0 if r is None else r / f for r, f in zip(ranks, full_ranks, strict=True)]
    what = "rank" if names == RANKED else "size"
    bars = block_bars(ax, 100 * np.reshape(shares, (-1, len(names))).T)
    for i, bar in enumerate(bar for block in zip(*bars, strict=True) for bar in block):
        text = "kept dense" if ranks[i] is None else f"{what} {ranks[i]} of {full_ranks[i]}"
        titled(bar, f"block {i // len(names)} {names[i % len(names)]}: {text}")
        bar.set_hatch("////" if ranks[i] is None else "")
    handles: list[Artist] = [
        Patch(facecolor=color, label=name) for color, name in zip(PART_COLORS, names, strict=False)
    ]
    if None in ranks:
        handles.append(Patch(facecolor=QUIET, edgecolor=GROUND, hatch="////", label="kept dense"))
    if uniform_ratio is not None:
        label = f"uniform ({100 * uniform_ratio:.0f} %)"
        level, color = 100 * uniform_ratio, color_of("uniform")
        handles.append(ax.axhline(level, color=color, linestyle="--", label=label))
        titled(handles[-1], label)
    ax.set_ylabel(f"{what} (% of full {what})")
    legend_below(ax, handles=handles)


def block_bars(ax: Axes, values: np.ndarray, labels: Sequence[str | None] = (None,) * 3) -> list:
    """Bars beside each other for every block, values [parts, blocks] in %; returns them by part."""
    num_parts, num_blocks = values.shape
    width = 0.8 / num_parts
    look = {"width": 0.94 * width, "edgecolor": GROUND, "linewidth": 0}
    bars = []
    for i, heights in enumerate(values):
        x = np.arange(num_blocks) + (i - (num_parts - 1) / 2) * width
        bars.append(ax.bar(x, heights, color=PART_COLORS[i], label=labels[i], **look))
    block_ticks(ax, num_blocks)
    ax.set_ylim(0, 104)
    return bars


def block_ticks(ax: Axes, num_blocks: int, most: int = _MAX_BLOCK_TICKS) -> None:
    """Ticks at blocks, no more than can be read."""
    ax.set_xticks(range(0, num_blocks, 1 + num_blocks // most))
    ax.set_xlim(-0.6, num_blocks - 0.4)
    ax.set_xlabel("block")


def legend_below(ax: Axes, handles: Sequence[Artist] = ()) -> None:
    """A legend below the axes: inside, it would hide models, or curves in any corner."""
    if handles := handles or ax.get_legend_handles_labels()[0]:
        ax.legend(
            handles=handles,
            loc="upper center",
            bbox_to_anchor=(0.45, 0),
            borderaxespad=4.5,  # times the font: below the ticks and the title of the axis
            ncols=3 if len(handles) == 3 else 2,
        )


def front(macs: np.ndarray, top1: np.ndarray) -> np.ndarray:
    """Indices of the Pareto front by ascending MACs: nothing costs as little and is as accurate.

    macs [P], top1 [P] -> int64 [F]; of equal points the first one.
    """
    order = np.lexsort((-top1, macs))
    best_before = np.concatenate([[-np.inf], np.maximum.accumulate(top1[order])[:-1]])
    return order[top1[order] > best_before[: len(order)]]


def _cost_axis(data: ReportData) -> tuple[float, str]:
    """The unit in which costs are drawn, and the title of their axis."""
    if data.cost == "ms":
        return 1, "latency (ms)"
    costs = [*(cost for cost, _ in data.points.values()), *(high for _, high in data.windows)]
    unit, symbol = count_unit(max(costs, default=1))
    return unit, f"MACs ({symbol})" if symbol else "MACs"


def _shade_windows(ax: Axes, data: ReportData, unit: float) -> None:
    label = f"{'latency' if data.cost == 'ms' else 'MAC'} budget{'s' * (len(data.windows) > 1)}"
    for i, (low, high) in enumerate(data.windows):
        band = ax.axvspan(low / unit, high / unit, color=QUIET, alpha=0.15, lw=0, zorder=0)
        band.set_label("" if i else label)
        titled(band, f"budget {low / unit:.4g} to {high / unit:.4g}")


def _text(metric: Metric, value: float) -> str:
    return f"{value:.{metric.digits}f}{' %' if metric.in_percent else ''}"


def _plot_lines(ax: Axes, lines: Sequence[tuple]) -> None:
    """Lines (name, colour, steps, values, what to say of them) over the share of their stage."""
    seen: collections.Counter[str] = collections.Counter()
    for name, color, steps, values, said in lines:
        style = LINE_STYLES[seen[color] % len(LINE_STYLES)]
        seen[color] += 1
        share, marker = 100 * np.asarray(steps) / steps[-1], "." * (len(steps) < _MAX_MARKERS)
        (line,) = ax.plot(share, values, style, marker=marker, color=color, label=name)
        texts = [f"{name}, step {s:,}: {v:.4g}" for s, v in zip(steps, said, strict=True)]
        titled(line, texts[-1], *(texts if marker else ()))
    every = np.concatenate([values for _, _, _, values, _ in lines])
    if every.min() > 0 and every.max() / every.min() > _LOG_RANGE:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("share of the stage (%)")
    legend_below(ax)


def _axes_height(num_labels: int) -> float:
    return max(_HEIGHT, 0.3 + _LABEL_ROW * num_labels)


def _label_points(
    ax: Axes, labels: list[str], x: np.ndarray, y: np.ndarray, colors: list[str]
) -> None:
    """Names the points, each towards the middle of the plot.

    The labels are fanned out by a line each, in the order of their points: whatever the final size
    of the plot, no two of them meet.
    """
    middle = np.mean(ax.get_xlim())
    box = {"boxstyle": "square,pad=0.1", "facecolor": GROUND, "alpha": 0.7, "linewidth": 0}
    for position, i in enumerate(np.argsort(-y, kind="stable")):
        side, near_end = (1, 0) if x[i] < middle else (-1, 1)
        leader = {"arrowstyle": "-", "color": colors[i], "relpos": (near_end, 0.5)}
        ax.annotate(
            labels[i],
            (x[i], y[i]),
            xytext=(18 * side, _LABEL_HEIGHT * ((len(y) - 1) / 2 - position)),
            textcoords="offset points",
            ha="left" if side > 0 else "right",
            va="center",
            color=colors[i],
            weight="bold",
            bbox=box,
            arrowprops=leader | {"shrinkA": 0, "shrinkB": 4},
            zorder=5,
        )
