"""Quality against cost: what a search has scored, and the models that came out of it."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from flora_jax.comparison import kind_of
from flora_jax.quality import TOP1, Metric
from flora_jax.report.table import count_unit

_POINT_COLORS = ("black", "#0077bb", "#cc3311", "#aa3377", "#ee7733")
_LINE_HEIGHT = 14  # points, of a label


def plot_trade_off(
    ax: Axes,
    candidates: Mapping[str, Sequence[float]],
    points: Mapping[str, tuple[float, float]],
    windows: Sequence[tuple[float, float]],
    metric: Metric = TOP1,
) -> None:
    """Quality against cost of everything the search scored and of the models evaluated.

    Args:
      candidates: {"macs": [P] (or "ms", milliseconds, where these were the budget), "top1": [P]
        in 0..1 on the held-out split (or another metric), "generation": [P]}; P is 0 where nothing
        was searched.
      points: {label: (cost, top1 in 0..1 on the test split)}, such as dense, uniform and subnet;
        those of one kind at several budgets, such as "subnet 0.55", are joined to a front.
      windows: the cost (lo, hi) of each budget.
      metric: that the models are shown by.
    """
    cost_name, window_name = ("ms", "latency") if "ms" in candidates else ("macs", "MAC")
    columns = (cost_name, metric.name, "generation")
    cost, values, generation = (np.asarray(candidates[column]) for column in columns)
    point_cost = np.array([point[0] for point in points.values()])
    shown = metric.scale * np.array([point[1] for point in points.values()])
    unit, label = 1, "latency (ms)"
    if cost_name == "macs":
        unit, symbol = count_unit(max([*cost, *point_cost, windows[-1][1]]))
        label = f"MACs ({symbol})" if symbol else "MACs"

    for i, (low, high) in enumerate(windows):
        label_once = f"{window_name} window{'s' * (len(windows) > 1)}" if i == 0 else None
        ax.axvspan(low / unit, high / unit, color="0.92", zorder=0, label=label_once)
    if len(cost):
        _scatter_candidates(ax, cost / unit, metric.scale * values, generation)
    colors = _point_colors(points)
    for members in _by_kind(points).values():
        if len(members) > 1:
            front_cost, values = np.array([points[name] for name in members]).T
            ax.plot(front_cost / unit, metric.scale * values, color=colors[members[0]], zorder=3)
    ax.scatter(
        point_cost / unit,
        shown,
        s=150,
        marker="*",
        c=[colors[name] for name in points],
        edgecolor="white",
        zorder=4,
        label="models (test split)",
    )
    ax.margins(x=0.1, y=0.15)
    form = "{:.1f} %" if metric.in_percent else "{:.3f}"
    texts = [f"{name} {form.format(y)}" for name, y in zip(points, shown, strict=True)]
    _label_points(ax, texts, point_cost / unit, shown, list(colors.values()))
    ax.set_xlabel(label)
    ax.set_ylabel(metric.label)
    legend_below(ax)


def legend_below(ax: Axes) -> None:
    """A legend below the axes: inside, it would hide models, or curves in any corner."""
    ax.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False, fontsize="small"
    )


def _scatter_candidates(
    ax: Axes, cost: np.ndarray, quality: np.ndarray, generation: np.ndarray
) -> None:
    """What the search scored: cost in the axis' unit, quality as it is shown."""
    scatter = ax.scatter(
        cost, quality, c=generation, s=16, alpha=0.8, label="candidates (held-out split)"
    )
    on_front = front(cost, quality)
    ax.plot(
        cost[on_front],
        quality[on_front],
        color="0.2",
        linewidth=1.2,
        drawstyle="steps-post",
        label="Pareto front (held-out split)",
    )
    if len(np.unique(generation)) > 1:
        bar = ax.figure.colorbar(scatter, ax=ax, pad=0.01, aspect=30, label="generation")
        bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))


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
