"""The plots of a run as charts of its page, each with a title and a legend."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from markupsafe import Markup

from flora_jax.evaluation.comparison import kind_of
from flora_jax.evaluation.quality import Metric
from flora_jax.report.drawn import Curve, Drawn
from flora_jax.report.svg import Chart, padded
from flora_jax.report.trade_off import cost_axis, front

_WIDE = 960
_LOG_LOSS_RANGE = 20  # largest / smallest loss from which a linear axis hides the end of training
_MAX_SPOTS = 100  # of a curve
_LAYERS = ("qkv", "fc1", "fc2")


@dataclasses.dataclass(frozen=True)
class Panel:
    """A chart with what stands around it.

    Attributes:
      svg: the chart.
      legend: (class of the swatch, text) of each series.
      note: a sentence below.
      is_wide: whether it takes the width of the page.
    """

    title: str
    svg: Markup
    legend: Sequence[tuple[str, str]] = ()
    note: str = ""
    is_wide: bool = False


def panels_of(drawn: Drawn) -> list[Panel]:
    """The charts of a run; those that have nothing to show are left out."""
    return [
        *_models(drawn),
        *_candidates(drawn),
        *_qualities(drawn),
        *_losses(drawn),
        *_ranks(drawn),
    ]


def _models(drawn: Drawn) -> Iterator[Panel]:
    if not drawn.points:
        return
    unit, label = cost_axis(drawn)
    metric = drawn.metric
    kinds = list(dict.fromkeys(map(kind_of, drawn.points)))
    points = [
        (name, cost / unit, metric.scale * value, kinds.index(kind_of(name)))
        for name, (cost, value) in drawn.points.items()
    ]
    chart = Chart(
        padded([x for _, x, _, _ in points], 0.12),
        padded([y for _, _, y, _ in points], 0.15),
        label,
        f"test {metric.column}",
        height=max(300, 100 + 16 * len(points)),  # room for every label
    )
    _shade_windows(chart, drawn, unit)
    for color, kind in enumerate(kinds):
        members = sorted((x, y) for name, x, y, _ in points if kind_of(name) == kind)
        if len(members) > 1:
            chart.line(members, color, kind)
    form = "{:.1f} %" if metric.in_percent else "{:.3f}"
    chart.labels([(x, y, color, f"{name} {form.format(y)}") for name, x, y, color in points])
    for name, x, y, color in points:
        chart.point(x, y, color, f"{name}: {_shown(metric, y)}, {x:.4g} {label}")
    yield Panel("Models, on the test images", Markup(chart.text), note=_window_note(drawn.windows))


def _candidates(drawn: Drawn) -> Iterator[Panel]:
    if not drawn.is_searched:
        return
    unit, label = cost_axis(drawn)
    metric = drawn.metric
    cost = np.asarray(drawn.candidates[drawn.cost]) / unit
    values = metric.scale * np.asarray(drawn.candidates[metric.name])
    generation = np.asarray(drawn.candidates["generation"])
    chart = Chart(padded(cost), padded(values), label, f"held-out {metric.column}")
    _shade_windows(chart, drawn, unit)
    on_front = front(cost, values)
    steps = np.repeat(np.stack([cost[on_front], values[on_front]], axis=1), 2, axis=0)
    chart.line(zip(steps[1:, 0], steps[:-1, 1], strict=True), 0, "Pareto front")
    for x, y, number in zip(cost, values, generation, strict=True):
        title = f"generation {number}: {_shown(metric, y)}, {x:.4g} {label}"
        chart.point(x, y, 1, title, opacity=0.25 + 0.65 * (number + 1) / (generation.max() + 1))
    yield Panel(
        "What the search scored, on held-out images",
        Markup(chart.text),
        (("mark c1", "candidate, later ones stronger"), ("line c0", "Pareto front")),
        "They were chosen by these images, so that their values are no forecast for others.",
    )


def _qualities(drawn: Drawn) -> Iterator[Panel]:
    scale = drawn.metric.scale
    series = [
        (color, dash, f"{stage} {subnet}".strip(), (steps, [scale * value for value in values]))
        for color, (stage, subnets) in enumerate(drawn.accuracies.items())
        for dash, (subnet, (steps, values)) in enumerate(subnets.items())
        if len(steps)
    ]
    if series:
        values = np.concatenate([values for *_, (_, values) in series])
        low, high = np.quantile(values, (0.1, 1))  # a beginning would hide the end
        label = f"held-out {drawn.metric.column}"
        yield _curves("Held-out quality while training", label, series, padded((low, high)))


def _losses(drawn: Drawn) -> Iterator[Panel]:
    series = [
        (color, 0, f"{stage} ({steps[-1]:,} steps)", (steps, values))
        for color, (stage, (steps, values)) in enumerate(drawn.curves.items())
        if len(steps)
    ]
    if series:
        values = np.concatenate([values for *_, (_, values) in series])
        is_log = values.min() > 0 and values.max() / values.min() > _LOG_LOSS_RANGE
        ends = (values.min() / 1.1, values.max() * 1.1) if is_log else padded(values)
        yield _curves("Training loss", "training loss", series, ends, is_log)


def _curves(
    title: str,
    label: str,
    series: Iterable[tuple[int, int, str, Curve]],
    ends: tuple[float, float],
    is_log: bool = False,
) -> Panel:
    """Lines (color, dash, name, curve) over the share of their stage that is done."""
    chart = Chart((0, 100), ends, "share of the stage (%)", label, is_log=is_log)
    legend = []
    for color, dash, name, (steps, values) in series:
        dash = (dash + 3 * (color // 6)) % 4  # where colours come again, the style is another
        points = list(zip(100 * np.asarray(steps) / max(1, steps[-1]), values, strict=True))
        chart.line(points, color, name, dash=dash)
        for i in range(0, len(points), 1 + (len(points) - 1) // _MAX_SPOTS):
            chart.spot(*points[i], color, f"{name}, step {steps[i]:,}: {values[i]:.4g}")
        legend.append((f"line c{color % 6} d{dash}", name))
    return Panel(title, Markup(chart.text), legend)


def _ranks(drawn: Drawn) -> Iterator[Panel]:
    for i, (name, ranks) in enumerate(drawn.ranks.items()):
        num_blocks, width = len(ranks) // len(_LAYERS), 0.8 / len(_LAYERS)
        blocks = range(0, num_blocks, 1 + num_blocks // 26)
        ends = (-0.6, num_blocks - 0.4)
        axes = (ends, (0, 104), "block", "rank (% of full rank)")
        chart = Chart(*axes, width=_WIDE, height=260, x_ticks=blocks)
        for layer, (rank, full) in enumerate(zip(ranks, drawn.full_ranks, strict=True)):
            block, kind = divmod(layer, len(_LAYERS))
            where = f"block {block} {_LAYERS[kind]}"
            text = f"{where}: kept dense" if rank is None else f"{where}: rank {rank} of {full}"
            share = 100.0 if rank is None else 100 * rank / full
            x = block + (kind - 1) * width
            chart.bar(x, 0.9 * width, share, 1 + kind, text, is_open=rank is None)
        legend = [(f"mark c{1 + kind}", layer) for kind, layer in enumerate(_LAYERS)]
        if None in ranks:
            legend.append(("open c0", "kept dense"))
        if drawn.uniform_ratios is not None:
            uniform = f"uniform ({100 * drawn.uniform_ratios[i]:.0f} %)"
            chart.level(100 * drawn.uniform_ratios[i], uniform)
            legend.append(("level", uniform))
        yield Panel(f"Ranks of the {name}", Markup(chart.text), legend, is_wide=True)


def _shade_windows(chart: Chart, drawn: Drawn, unit: float) -> None:
    for low, high in drawn.windows:
        chart.band(low / unit, high / unit, f"budget {low / unit:.4g} to {high / unit:.4g}")


def _window_note(windows: Sequence) -> str:
    return "Shaded: what the subnets may cost." if windows else ""


def _shown(metric: Metric, value: float) -> str:
    return f"{value:.{metric.digits}f}{' %' if metric.in_percent else ''}"
