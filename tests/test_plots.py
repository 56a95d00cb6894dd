"""Figures of a run: what is drawn is what was given, nothing overlaps, and no display is needed."""

import io
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from flora_jax.report import figures
from flora_jax.report.data import ReportData
from flora_jax.report.formats import png

CANDIDATES = {
    "macs": [4.0e6, 4.5e6, 4.2e6, 5.0e6, 4.5e6],
    "top1": [0.90, 0.95, 0.89, 0.95, 0.93],
    "generation": [0, 0, 1, 1, 2],
}
POINTS = {"dense": (8.1e6, 0.98), "uniform": (4.6e6, 0.94), "subnet": (4.5e6, 0.96)}


def example(**changes) -> ReportData:
    arguments = {
        "candidates": CANDIDATES,
        "points": POINTS,
        "windows": [(4.0e6, 5.0e6)],
        "ranks": {"subnet": [8, None, 16, 32, 24, None]},
        "full_ranks": [32] * 6,
        "curves": {"supernet": (np.arange(1, 50), np.geomspace(2, 0.5, 49))},
        "accuracies": {"supernet": {"": ([5, 49], [0.2, 0.9])}},
        "uniform_ratios": [0.5],
    }
    return ReportData(**arguments | changes)


def example_sheet(**changes) -> Figure:
    return figures.sheet(figures.panels_of(example(**changes)), "example")


def legend_texts(ax):
    legend = ax.get_legend()
    return [text.get_text() for text in legend.get_texts()] if legend else []


def colors(collection):
    return [to_hex(color) for color in collection.get_facecolor()]


def test_models_are_drawn_by_what_the_test_images_show():
    ax = Figure().subplots()
    figures.plot_models(ax, example())
    (stars,) = ax.collections
    np.testing.assert_allclose(stars.get_offsets(), [[8.1, 98], [4.6, 94], [4.5, 96]])
    assert colors(stars) == [figures.MODEL_COLORS[name] for name in POINTS]
    (window,) = ax.patches
    assert (window.get_x(), window.get_width()) == (4.0, 1.0)
    texts = {text.get_text() for text in ax.texts}
    assert texts == {"dense 98.0 %", "uniform 94.0 %", "subnet 96.0 %"}
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("MACs (M)", "test top-1 %")
    assert legend_texts(ax) == ["MAC window"]


def test_models_of_several_budgets_are_joined_by_kind():
    ax = Figure().subplots()
    points = {"dense": (8e6, 0.98), "subnet 0.3": (3e6, 0.9), "subnet 0.6": (5e6, 0.95)}
    data = example(points=points, windows=[(2.8e6, 3e6), (4.8e6, 5e6)])
    figures.plot_models(ax, data)
    (joined,) = ax.lines
    np.testing.assert_allclose(joined.get_xydata(), [[3, 90], [5, 95]])
    assert colors(ax.collections[0])[1:] == [joined.get_color()] * 2
    assert len(ax.patches) == 2
    assert legend_texts(ax) == ["MAC windows"]


def test_candidates_have_axes_of_their_own_by_what_the_held_out_images_show():
    ax = Figure().subplots()
    figures.plot_candidates(ax, example())
    (cloud,) = ax.collections
    macs, top1 = np.array(CANDIDATES["macs"]), np.array(CANDIDATES["top1"])
    np.testing.assert_allclose(cloud.get_offsets(), np.stack([macs / 1e6, 100 * top1], -1))
    assert cloud.get_array().tolist() == CANDIDATES["generation"]
    (front,) = ax.lines
    np.testing.assert_allclose(front.get_xydata(), [[4.0, 90], [4.5, 95]])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("MACs (M)", "held-out top-1 %")
    assert legend_texts(ax) == ["MAC window", "Pareto front"]
    assert ax.figure.axes[1].get_ylabel() == "generation"


@pytest.mark.parametrize(
    ("cost", "scale", "label", "window"),
    [("macs", 1e9, "MACs (G)", "MAC window"), ("ms", 1, "latency (ms)", "latency window")],
)
def test_costs_have_their_unit(cost, scale, label, window):
    data = example(
        cost=cost,
        candidates={cost: [8 * scale], "top1": [0.8], "generation": [0]},
        points={"dense": (17.57 * scale, 0.818)},
        windows=[(7 * scale, 9 * scale)],
    )
    for plot in (figures.plot_models, figures.plot_candidates):
        ax = Figure().subplots()
        plot(ax, data)
        assert ax.get_xlabel() == label
        assert legend_texts(ax)[0] == window
        assert len(ax.figure.axes) == 1, "one generation needs no colour bar"


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(st.lists(st.tuples(st.floats(4e9, 18e9), st.floats(0.75, 0.82)), min_size=2, max_size=9))
def test_labels_of_points_never_overlap(values):
    points = {f"subnet {i}": value for i, value in enumerate(values)}
    data = ReportData(points=points, windows=[(7e9, 9e9)])
    figure = figures.sheet(figures.panels_of(data))
    figure.draw_without_rendering()
    ax = figure.axes[0]
    # The extent of an annotation includes its leader line, that of a text does not.
    boxes = [Text.get_window_extent(text) for text in ax.texts]
    assert len(boxes) == len(points)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(ax.bbox.y0 <= box.y0 and box.y1 <= ax.bbox.y1 for box in boxes)


def test_legends_cover_no_plot():
    figure = example_sheet()
    figure.draw_without_rendering()
    legends = [ax.get_legend().get_window_extent() for ax in figure.axes if ax.get_legend()]
    assert len(legends) == 5
    for ax in figure.axes:
        assert not any(ax.get_window_extent().overlaps(legend) for legend in legends)


def test_ranks_draw_three_bars_a_block():
    ax = Figure().subplots()
    ranks, full_ranks = [8, None, 16, 32, 24, 4], [32, 32, 32, 64, 64, 64]
    figures.plot_ranks(ax, ranks, full_ranks, uniform_ratio=0.3)
    qkv, fc1, fc2 = ([bar.get_height() for bar in bars] for bars in ax.containers)
    assert (qkv, fc1, fc2) == ([25, 50], [100, 37.5], [50, 6.25])
    hatched = [[bool(bar.get_hatch()) for bar in bars] for bars in ax.containers]
    assert hatched == [[False, False], [True, False], [False, False]]
    centres = [bars[1].get_x() + bars[1].get_width() / 2 for bars in ax.containers]
    assert np.mean(centres) == pytest.approx(1)
    assert ax.lines[0].get_ydata() == pytest.approx([30, 30])
    assert legend_texts(ax) == ["qkv", "fc1", "fc2", "kept dense", "uniform (30 %)"]
    assert ax.get_xticks().tolist() == [0, 1]
    ax = Figure().subplots()
    figures.plot_ranks(ax, [8] * 3 * 60, [32] * 3 * 60)
    assert legend_texts(ax) == ["qkv", "fc1", "fc2"]
    assert len(ax.get_xticks()) <= 13


@pytest.mark.parametrize(("last", "scale"), [(0.01, "log"), (0.4, "linear"), (0.0, "linear")])
def test_losses_share_an_axis_of_stage_shares(last, scale):
    ax = Figure().subplots()
    curves = {
        "pretrain": ([0, 500, 1000], [2.0, 0.5, last]),
        "filter": ([], []),
        "finetune/uniform": ([20, 40], [0.6, 0.5]),
    }
    figures.plot_losses(ax, curves)
    pretrain, finetune = ax.lines
    np.testing.assert_allclose(pretrain.get_xydata(), [[0, 2], [50, 0.5], [100, last]])
    np.testing.assert_allclose(finetune.get_xydata(), [[50, 0.6], [100, 0.5]])
    assert ax.get_yscale() == scale
    assert legend_texts(ax) == ["pretrain (1,000 steps)", "finetune/uniform (40 steps)"]
    found = [line.get_color() for line in ax.lines]
    assert found == [figures.MODEL_COLORS[name] for name in ("dense", "uniform")]


@pytest.mark.parametrize("top1", [[0.2, 0.99], [0.97, 0.99], [0.2, 1.0], [1.0, 1.0], [0.0, 0.0]])
def test_accuracies_are_drawn_whole_with_a_style_a_subnet(top1):
    figure = Figure()
    ax = figure.subplots()
    supernet = {"": ([5, 10], [0.2, 0.9]), "smallest": ([5, 10], top1)}
    figures.plot_accuracies(ax, {"pretrain": {}, "supernet": supernet})
    full, smallest = ax.lines
    np.testing.assert_allclose(full.get_xydata(), [[50, 80], [100, 10]])  # what is missing
    assert full.get_color() == smallest.get_color() == figures.MODEL_COLORS["supernet"]
    assert (full.get_linestyle(), smallest.get_linestyle()) == ("-", "--")
    assert legend_texts(ax) == ["supernet", "supernet smallest"]
    figure.draw_without_rendering()
    low, high = sorted(ax.get_ylim())
    assert all(low <= value <= high for line in ax.lines for value in line.get_ydata())
    assert ax.yaxis.get_major_formatter()(80) == "20"
    assert ax.yaxis.get_inverted()


@pytest.mark.slow
def test_sheet_combines_the_panels():
    figure = example_sheet()
    titles = [title for ax in figure.axes if (title := ax.get_title(loc="left"))]
    assert titles == [panel.title for panel in figures.panels_of(example())]
    assert len(titles) == 5
    content = png(figure)
    assert content == png(example_sheet())
    with Image.open(io.BytesIO(content)) as image:
        assert image.format == "PNG"
        assert image.size[0] == round(2 * 4.4 * 200)
        drawn = {bytes(color).hex() for _, color in image.convert("RGB").getcolors(2**24)}
    expected = [*figures.PART_COLORS, *map(figures.color_of, POINTS)]
    assert drawn >= {color[1:] for color in expected}


@pytest.mark.parametrize(
    "changes",
    [
        {"candidates": {"macs": [4.5e6], "top1": [0.9], "generation": [0]}},
        {name: {} for name in ("candidates", "points", "ranks", "curves", "accuracies")},
        {"points": {"dense": POINTS["dense"], "slim": (4e6, 0.98)}, "uniform_ratios": None},
        {"curves": {"supernet": ([], [])}, "accuracies": {"supernet": {"": ([1], [0.5])}}},
    ],
    ids=["one candidate", "nothing", "as good as each other", "empty curve"],
)
def test_sparse_runs_still_give_a_picture(changes):
    with Image.open(io.BytesIO(png(example_sheet(**changes)))) as image:
        image.verify()


@pytest.mark.slow
def test_pyplot_stays_out():
    program = (
        "import sys\n"
        "from flora_jax.report import figures, page\n"
        "from flora_jax.report.data import ReportData\n"
        "page.render(ReportData(ranks=dict(subnet=[1, 2, 3]), full_ranks=[4] * 3))\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=20))
def test_front(points):
    macs, top1 = np.array(points).reshape(-1, 2).T
    found = figures.front(macs, top1)

    def beaten(i):
        as_good = (macs <= macs[i]) & (top1 >= top1[i])
        return (as_good & ((macs < macs[i]) | (top1 > top1[i]))).any()

    unbeaten = {points[i] for i in range(len(points)) if not beaten(i)}
    assert [points[i] for i in found] == sorted(unbeaten)
