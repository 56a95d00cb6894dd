"""The picture of a search: what is drawn is what was given, and nothing overlaps."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from flora_jax.report import plots
from flora_jax.report.drawn import Drawn
from flora_jax.report.trade_off import front, plot_candidates, plot_models

CANDIDATES = {
    "macs": [4.0e6, 4.5e6, 4.2e6, 5.0e6, 4.5e6],
    "top1": [0.90, 0.95, 0.89, 0.95, 0.93],
    "generation": [0, 0, 1, 1, 2],
}


POINTS = {"dense": (8.1e6, 0.98), "uniform": (4.6e6, 0.94), "subnet": (4.5e6, 0.96)}


WINDOW = (4.0e6, 5.0e6)


def example(**changes) -> Drawn:
    arguments = {
        "candidates": CANDIDATES,
        "points": POINTS,
        "windows": [WINDOW],
        "ranks": {"subnet": [8, None, 16, 32, 24, None]},
        "full_ranks": [32] * 6,
        "curves": {"supernet": (np.arange(1, 50), np.geomspace(2, 0.5, 49))},
        "uniform_ratios": [0.5],
        "title": "example",
    }
    return Drawn(**arguments | changes)


def example_figure(**changes):
    return plots.report_figure(example(**changes))


def legend_texts(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_models_are_drawn_by_what_the_test_images_show():
    ax = Figure().subplots()
    plot_models(ax, example())
    (stars,) = ax.collections
    np.testing.assert_allclose(stars.get_offsets(), [[8.1, 98], [4.6, 94], [4.5, 96]])
    assert len(np.unique(stars.get_facecolor(), axis=0)) == len(POINTS)
    (window,) = ax.patches
    assert (window.get_x(), window.get_width()) == (4.0, 1.0)
    assert {text.get_text() for text in ax.texts} == {
        "dense 98.0 %",
        "uniform 94.0 %",
        "subnet 96.0 %",
    }
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("MACs (M)", "top-1 accuracy (%), test images")
    assert legend_texts(ax) == ["MAC window", "models"]


def test_candidates_have_axes_of_their_own_by_what_the_held_out_images_show():
    ax = Figure().subplots()
    plot_candidates(ax, example())
    (cloud,) = ax.collections
    macs, top1 = np.array(CANDIDATES["macs"]), np.array(CANDIDATES["top1"])
    np.testing.assert_allclose(cloud.get_offsets(), np.stack([macs / 1e6, 100 * top1], -1))
    assert cloud.get_array().tolist() == CANDIDATES["generation"]
    (front,) = ax.lines
    np.testing.assert_allclose(front.get_xydata(), [[4.0, 90], [4.5, 95]])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("MACs (M)", "top-1 accuracy (%), held-out images")
    assert legend_texts(ax) == ["MAC window", "candidates", "Pareto front"]
    assert ax.figure.axes[1].get_ylabel() == "generation"


def test_costs_of_large_models_are_in_giga():
    candidates = {"macs": [8e9], "top1": [0.8], "generation": [0]}
    points = {"dense": (17.57e9, 0.818)}
    drawn = example(candidates=candidates, points=points, windows=[(7e9, 9e9)])
    for plot in (plot_models, plot_candidates):
        ax = Figure().subplots()
        plot(ax, drawn)
        assert ax.get_xlabel() == "MACs (G)"
        assert len(ax.figure.axes) == 1, "one generation needs no colour bar"


def test_latency_is_in_milliseconds():
    candidates = {"ms": [4.0, 4.5], "top1": [0.8, 0.9], "generation": [0, 0]}
    points = {"dense": (8.0, 0.9)}
    drawn = example(cost="ms", candidates=candidates, points=points, windows=[(4.0, 5.0)])
    for plot in (plot_models, plot_candidates):
        ax = Figure().subplots()
        plot(ax, drawn)
        assert ax.get_xlabel() == "latency (ms)"
        assert legend_texts(ax)[0] == "latency window"


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(st.lists(st.tuples(st.floats(4e9, 18e9), st.floats(0.75, 0.82)), min_size=2, max_size=4))
def test_labels_of_points_never_overlap(values):
    points = dict(zip(("dense", "uniform", "subnet", "slim"), values, strict=False))
    figure = example_figure(points=points, windows=[(7e9, 9e9)])
    figure.draw_without_rendering()
    ax = figure.axes[0]
    # The extent of an annotation includes its leader line, that of a text does not.
    boxes = [Text.get_window_extent(text) for text in ax.texts]
    assert len(boxes) == len(points)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_legends_cover_no_plot():
    figure = example_figure()
    figure.draw_without_rendering()
    legends = [ax.get_legend().get_window_extent() for ax in figure.axes if ax.get_legend()]
    assert len(legends) == 4
    for ax in figure.axes:
        assert not any(ax.get_window_extent().overlaps(legend) for legend in legends)


def test_models_of_several_budgets_are_joined_by_kind():
    points = {"dense": (8e6, 0.98), "subnet 0.3": (3e6, 0.9), "subnet 0.6": (5e6, 0.95)}
    nothing = {"macs": [], "top1": [], "generation": []}
    figure = example_figure(
        candidates=nothing,
        points=points,
        windows=[(2.8e6, 3e6), (4.8e6, 5e6)],
        ranks={"subnet 0.3": [8, 8, 8], "subnet 0.6": [16, 16, None]},
        full_ranks=[32] * 3,
        uniform_ratios=[0.2, 0.4],
    )
    trade_off, _, _, *ranks = figure.axes
    (joined,) = trade_off.lines
    np.testing.assert_allclose(joined.get_xydata(), [[3, 90], [5, 95]])
    assert len(trade_off.patches) == 2
    assert [ax.get_title("left") for ax in ranks] == [
        "Ranks of the subnet 0.3",
        "Ranks of the subnet 0.6",
    ]


def test_ranks_draw_three_bars_a_block():
    ax = Figure().subplots()
    plots.plot_ranks(ax, [8, None, 16, 32, 24, 4], [32, 32, 32, 64, 64, 64], uniform_ratio=0.3)
    qkv, fc1, fc2 = ([bar.get_height() for bar in bars] for bars in ax.containers)
    assert (qkv, fc1, fc2) == ([25, 50], [100, 37.5], [50, 6.25])
    assert [[bool(bar.get_hatch()) for bar in bars] for bars in ax.containers] == [
        [False, False],
        [True, False],
        [False, False],
    ]
    centres = [bars[1].get_x() + bars[1].get_width() / 2 for bars in ax.containers]
    assert np.mean(centres) == pytest.approx(1)
    assert ax.lines[0].get_ydata() == pytest.approx([30, 30])
    assert legend_texts(ax) == ["qkv", "fc1", "fc2", "kept dense", "uniform (30 %)"]
    assert ax.get_xticks().tolist() == [0, 1]


def test_ranks_without_dense_layers_or_uniform_ratio():
    ax = Figure().subplots()
    plots.plot_ranks(ax, [8] * 3 * 60, [32] * 3 * 60)
    assert legend_texts(ax) == ["qkv", "fc1", "fc2"]
    assert not ax.lines
    assert len(ax.get_xticks()) <= 26


@pytest.mark.parametrize(
    "ranks, full_ranks, message",
    [([1, 2, 3], [4] * 2, "3 ranks were given, but 2"), ([1] * 4, [4] * 4, "4 ranks are not a")],
)
def test_ranks_of_other_lengths_are_refused(ranks, full_ranks, message):
    with pytest.raises(ValueError, match=message):
        plots.plot_ranks(Figure().subplots(), ranks, full_ranks)


def test_curves_share_an_axis_of_stage_shares():
    ax = Figure().subplots()
    curves = {
        "pretrain": ([0, 500, 1000], [2.0, 0.5, 0.01]),
        "filter": ([], []),
        "finetune": ([20, 40], [0.1, 0.05]),
    }
    plots.plot_curves(ax, curves)
    pretrain, finetune = ax.lines
    np.testing.assert_allclose(pretrain.get_xydata(), [[0, 2], [50, 0.5], [100, 0.01]])
    np.testing.assert_allclose(finetune.get_xydata(), [[50, 0.1], [100, 0.05]])
    assert ax.get_yscale() == "log"
    assert legend_texts(ax) == ["pretrain (1,000 steps)", "finetune (40 steps)"]


def test_accuracies_have_the_colour_of_their_stage_and_a_style_a_subnet():
    ax = Figure().subplots()
    supernet = {"": ([5, 10], [0.8, 0.9]), "smallest": ([5, 10], [0.2, 0.3])}
    plots.plot_accuracies(ax, {"pretrain": {}, "supernet": supernet})
    full, smallest = ax.lines
    np.testing.assert_allclose(full.get_xydata(), [[50, 80], [100, 90]])
    np.testing.assert_allclose(smallest.get_xydata(), [[50, 20], [100, 30]])
    assert to_rgba(full.get_color()) == to_rgba(smallest.get_color()) == to_rgba(plots.COLORS[1])
    assert (full.get_linestyle(), smallest.get_linestyle()) == ("-", "--")
    assert legend_texts(ax) == ["supernet", "supernet smallest"]


@pytest.mark.parametrize("losses", [[2.0, 1.0], [2.0, 0.0]])
def test_loss_axis_is_linear_where_a_logarithm_would_not_help(losses):
    ax = Figure().subplots()
    plots.plot_curves(ax, {"supernet": ([0, 1], losses)})
    assert ax.get_yscale() == "linear"


@pytest.mark.slow
def test_report_combines_the_plots_and_is_saved_whole(tmp_path):
    figure = example_figure()
    titles = {ax.get_title(loc="left") for ax in figure.axes}
    assert {"Accuracy of the models against cost", "What the search scored"} <= titles
    assert {"Loss while training", "Quality while training", "Ranks of the subnet"} <= titles
    path = tmp_path / "report.png"
    path.write_bytes(b"an older picture")
    plots.save_figure(figure, path)
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.size == (15 * 150, 1728)
        colors = {color for _, color in image.convert("RGB").getcolors(2**24)}
    assert colors >= {
        tuple(round(255 * c) for c in to_rgba(color)[:3]) for color in plots.COLORS[:3]
    }
    assert [file.name for file in tmp_path.iterdir()] == ["report.png"]


@pytest.mark.parametrize(
    "changes",
    [
        {"candidates": {"macs": [4.5e6], "top1": [0.9], "generation": [0]}},
        {"candidates": {"macs": [], "top1": [], "generation": []}, "points": {}},
        {"candidates": {}, "points": {}, "windows": [], "ranks": {}, "curves": {}},
        {"points": {"dense": POINTS["dense"], "subnet": POINTS["subnet"]}, "uniform_ratios": None},
        {"curves": {}},
        {"curves": {"supernet": ([], [])}, "accuracies": {"supernet": {"": ([1], [0.5])}}},
    ],
    ids=[
        "one candidate",
        "no candidate",
        "nothing",
        "no uniform point",
        "no curves",
        "empty curve",
    ],
)
def test_sparse_runs_still_give_a_picture(changes, tmp_path):
    plots.save_figure(example_figure(**changes), tmp_path / "report.png")
    with Image.open(tmp_path / "report.png") as image:
        image.verify()


@pytest.mark.slow
def test_pyplot_stays_out():
    program = (
        "import sys\n"
        "from flora_jax.report import plots, slim_plots\n"
        "from flora_jax.report.drawn import Drawn\n"
        "candidates = dict(macs=[1, 2], top1=[0.5, 0.6], generation=[0, 1])\n"
        "ranks = dict(subnet=[1, 2, 3])\n"
        "drawn = Drawn(candidates=candidates, ranks=ranks, full_ranks=[4] * 3)\n"
        "figure = plots.report_figure(drawn)\n"
        "figure.draw_without_rendering()\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=20))
def test_front(points):
    macs, top1 = np.array(points).reshape(-1, 2).T
    found = front(macs, top1)

    def beaten(i):
        as_good = (macs <= macs[i]) & (top1 >= top1[i])
        return (as_good & ((macs < macs[i]) | (top1 > top1[i]))).any()

    unbeaten = {points[i] for i in range(len(points)) if not beaten(i)}
    assert [points[i] for i in found] == sorted(unbeaten)
