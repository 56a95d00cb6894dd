"""Quality against cost: what a search has scored, and the models that came out of it."""

from collections.abc import Iterable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from flora_jax.evaluation.comparison import kind_of
from flora_jax.report.drawn import Drawn
from flora_jax.report.table import count_unit

_POINT_COLORS = ("black", "#0077bb", "#cc3311", "#aa3377", "#ee7733")
_LINE_HEIGHT, _LEAST_HEIGHT = 14, 190  # points, of a label and of the plot


def plot_models(ax: Axes, drawn: Drawn) -> None:
    """Quality on the test images against cost, of every finished model.

    Models of one kind at several budgets, such as "subnet 0.55", are joined to a front.
    """
    metric, points = drawn.metric, drawn.points
    if not points:
        ax.set_axis_off()
        ax.text(0.5, 0.5, "no model is evaluated yet", ha="center", va="center", color="0.4")
        return
    unit, label = cost_axis(drawn)
    cost = np.array([point[0] for point in points.values()]) / unit
    shown = metric.scale * np.array([point[1] for point in points.values()])
    _shade_windows(ax, drawn, unit)
    colors = _point_colors(points)
    for members in _by_kind(points).values():
        if len(members) > 1:
            front_cost, values = np.array([points[name] for name in members]).T
            ax.plot(front_cost / unit, metric.scale * values, color=colors[members[0]], zorder=3)
    ax.scatter(
        cost,
        shown,
        s=150,
        marker="*",
        c=[colors[name] for name in points],
        edgecolor="white",
        zorder=4,
        label="models",
    )
    ax.margins(x=0.1, y=_margin(len(points)))
    form = "{:.1f} %" if metric.in_percent else "{:.3f}"
    texts = [f"{name} {form.format(y)}" for name, y in zip(points, shown, strict=True)]
    _label_points(ax, texts, cost, shown, list(colors.values()))
    ax.set_xlabel(label)
    ax.set_ylabel(f"{metric.label}, test images")
    legend_below(ax)


def plot_candidates(ax: Axes, drawn: Drawn) -> None:
    """Quality on the held-out images against cost, of everything that the search scored.

    They are no forecast for the test images: the best were chosen by what is shown.
    """
    unit, label = cost_axis(drawn)
    metric = drawn.metric
    columns = (drawn.cost, metric.name, "generation")
    cost, values, generation = (np.asarray(drawn.candidates[column]) for column in columns)
    cost, values = cost / unit, metric.scale * values
    _shade_windows(ax, drawn, unit)
    scatter = ax.scatter(cost, values, c=generation, s=16, alpha=0.8, label="candidates")
    on_front = front(cost, values)
    ax.plot(
        cost[on_front],
        values[on_front],
        color="0.2",
        linewidth=1.2,
        drawstyle="steps-post",
        label="Pareto front",
    )
    if len(np.unique(generation)) > 1:
        bar = ax.figure.colorbar(scatter, ax=ax, pad=0.01, aspect=30, label="generation")
        bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel(label)
    ax.set_ylabel(f"{metric.label}, held-out images")
    legend_below(ax)


def cost_axis(drawn: Drawn) -> tuple[float, str]:
    """The unit in which costs are drawn, and the title of their axis."""
    if drawn.cost == "ms":
        return 1, "latency (ms)"
    costs = [*(cost for cost, _ in drawn.points.values()), *(high for _, high in drawn.windows)]
    unit, symbol = count_unit(max(costs, default=1))
    return unit, f"MACs ({symbol})" if symbol else "MACs"


def _shade_windows(ax: Axes, drawn: Drawn, unit: float) -> None:
    name = "latency" if drawn.cost == "ms" else "MAC"
    for i, (low, high) in enumerate(drawn.windows):
        label_once = f"{name} window{'s' * (len(drawn.windows) > 1)}" if i == 0 else None
        ax.axvspan(low / unit, high / unit, color="0.92", zorder=0, label=label_once)


def legend_below(ax: Axes) -> None:
    """A legend below the axes: inside, it would hide models, or curves in any corner."""
    ax.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, 0),
        borderaxespad=4.5,  # times the font: below the ticks and the title of the axis
        ncols=2,
        frameon=False,
        fontsize="small",
    )


def _by_kind(names: Iterable[str]) -> dict[str, list[str]]:
    """Names such as "subnet 0.55" and "subnet 0.35" under "subnet"."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(kind_of(name), []).append(name)
    return kinds


def _point_colors(names: Iterable[str]) -> dict[str, str]:
    """A colour for each kind of model."""
    kinds = list(_by_kind(names))
    return {name: _POINT_COLORS[kinds.index(kind_of(name)) % len(_POINT_COLORS)] for name in names}


def front(macs: np.ndarray, top1: np.ndarray) -> np.ndarray:
    """Indices of the Pareto front by ascending MACs: nothing costs as little and is as accurate.

    macs [P], top1 [P] -> int64 [F]; of equal points the first one.
    """
    macs, top1 = np.asarray(macs), np.asarray(top1)
    order = np.lexsort((-top1, macs))
    best_before = np.concatenate([[-np.inf], np.maximum.accumulate(top1[order])[:-1]])
    return order[top1[order] > best_before[: len(order)]]


def _margin(num_labels: int) -> float:
    """Room for the labels of the lowest and the highest point, as a share of the points' range."""
    share = min(0.4, _LINE_HEIGHT * (num_labels + 1) / 2 / _LEAST_HEIGHT)
    return share / (1 - 2 * share)


def _label_points(
    ax: Axes, labels: list[str], x: np.ndarray, y: np.ndarray, colors: list[str]
) -> None:
    """Names the points, each towards the middle of the plot.

    The labels are fanned out by a line each, in the order of their points: whatever the final size
    of the plot, no two of them meet.
    """
    middle = np.mean(ax.get_xlim())
    for position, i in enumerate(np.argsort(-y)):
        on_left, color = x[i] < middle, colors[i]
        ax.annotate(
            labels[i],
            (x[i], y[i]),
            xytext=(18 if on_left else -18, _LINE_HEIGHT * ((len(y) - 1) / 2 - position)),
            textcoords="offset points",
            ha="left" if on_left else "right",
            va="center",
            color=color,
            weight="bold",
            arrowprops={
                "arrowstyle": "-",
                "color": color,
                "relpos": (0 if on_left else 1, 0.5),  # from the near end of the label
                "shrinkA": 0,
                "shrinkB": 4,
            },
            zorder=5,
            path_effects=[withStroke(linewidth=3, foreground="white")],
        )
