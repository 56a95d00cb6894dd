"""Page and figures of a run: drawn is what was given, texts are escaped, parts may be missing."""

import dataclasses
import html
import html.parser
import io
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from flora_jax.report import data as report_data
from flora_jax.report import figures
from flora_jax.report.classes import Confusion, class_rows, confusions
from flora_jax.report.data import ReportData, Slimming
from flora_jax.report.figures import panels_of, sheet
from flora_jax.report.formats import png, svg
from flora_jax.report.page import render
from flora_jax.runs.settings import Settings
from flora_jax.slim import Masks

NASTY = '<b a="1">&amp\''
GATES = {"attn": [np.eye(2, 4)] * 2, "mlp": [np.linspace(0, 1, 8)] * 2, "patch": []}
KEPT = [tuple(gate > 0 for gate in gates) for gates in GATES.values()]
MASKS = Masks(*KEPT, {"attn": 0.1, "mlp": 0.2})
DATA = ReportData(
    name=NASTY,
    about=f"a network {NASTY}",
    unfinished=f"not finished {NASTY}",
    conclusions=[f"it is {NASTY}"],
    models=[["model", "top-1 %"], [NASTY, "98.0"]],
    points={"dense": (8.1e6, 0.98), "subnet": (4.5e6, 0.96)},
    candidates={"macs": [4.1e6, 4.4e6], "top1": [0.91, 0.93], "generation": [0, 1]},
    windows=[(4.0e6, 5.0e6)],
    ranks={NASTY: [8, None, 16, 32, 24, None]},
    full_ranks=[32] * 6,
    uniform_ratios=[0.5],
    curves={NASTY: ([1, 2, 3], [30.0, 1.0, 0.5])},
    accuracies={NASTY: {"": ([2, 3], [0.5, 0.9]), "smallest": ([2, 3], [0.1, 0.2])}},
    slimming=Slimming(GATES, MASKS),
    benchmark={
        "machine": NASTY,
        "rows": [
            {"engine": "JAX", "batch": 8, "model": "dense", "ms": 2.023},
            {"engine": "JAX", "batch": 8, "model": NASTY, "ms": 1.234}
            | {"ratio": 0.61, "low": 0.58, "high": 0.66},
            {"engine": NASTY, "batch": 64, "model": "dense", "ms": 16.0},
        ],
    },
    classes=class_rows(np.array([0, 1]), {"dense": np.array([0, 0])}, [NASTY, "dog"]),
    confused=NASTY,
    confusions=[Confusion(NASTY, "dog", 10, 3, 1, 0, np.zeros((200, 300, 3), np.uint8))],
    given={"budget.macs": NASTY},
    recipe=[("seed", "0", NASTY)],
    stages={NASTY: 3.2},
    images={"source": NASTY},
    versions={"flora_jax": NASTY},
)
PARTS = {  # of each field, the title of its part
    "models": "Models",
    "slimming": "What slimming leaves",
    "benchmark": "Milliseconds",
    "classes": "Accuracy by class, on the test images",
    "confusions": f"What the {NASTY} confuses most",
    "given": "What was set",
    "recipe": "Other settings that differ from the defaults (1)",
    "stages": "Stages",
    "images": "Images",
    "versions": "This page was made with",
}
TITLES = ["Models", "Plots", *list(PARTS.values())[1:]]
PANELS = {
    "points": "Models, on the test images",
    "candidates": "What the search scored, on held-out images",
    "accuracies": "Held-out quality while training",
    "curves": "Training loss",
    "ranks": f"Ranks of the {NASTY}",
}


class Reader(html.parser.HTMLParser):
    """Reads a page: its titles and addresses; fails where tags do not match."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.titles, self.addresses, self.tags = [], [], [], set()
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "h2":
            self.titles.append("")
        self.addresses += [value for name, value in attributes if name in ("src", "href")]

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.titles[-1] += data


@pytest.fixture(scope="module")
def text():
    return render(DATA)


def test_a_page_is_well_formed_escaped_and_needs_nothing_else(text):
    page = Reader(text)
    assert page.titles == TITLES
    assert "<b a=" not in text
    assert all(re.match("#|data:image/png;base64,", address) for address in page.addresses)
    assert not page.tags & {"script", "link", "iframe", "object", "metadata"}
    assert not re.search(r"url\((?!#)|@import|http", text)
    cells = ("2.02", "1.23", "0.61 (0.58..0.66)")
    assert "<th>JAX, batch 8</th>" + "".join(f"<td>{cell}</td>" for cell in cells) in text
    assert ", batch 64</th><td>16.00</td><td></td><td></td>" in text
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    assert text == render(DATA)


def test_a_part_is_left_out_where_a_run_has_nothing_for_it():
    empty = ReportData()
    undrawn = {name: getattr(empty, name) for name in (*PANELS, "slimming")}
    parts = {field: title for field, title in PARTS.items() if field not in undrawn}
    for left_out in parts:
        changes = undrawn | {left_out: getattr(empty, left_out)}
        titles = Reader(render(dataclasses.replace(DATA, **changes))).titles
        assert titles == [title for field, title in parts.items() if field != left_out]
    assert Reader(render(ReportData(name="run"))).titles == []


def test_what_figures_stand_on_is_among_the_images():
    run = SimpleNamespace(settings=Settings())
    tested = {"test_images": 450, "commonest_class": 0.125, "test_copies": 7}
    assert report_data._images(run, None, tested) == {
        "source": "tfds:imagenet2012",
        "to report on": "450",
        "of the commonest class": "12.50 % of those to report on",
        "copies of others to train with": "7 of those to report on",
    }


@pytest.mark.parametrize("field", PANELS)
def test_a_panel_is_left_out_where_there_is_nothing_to_draw(field):
    data = dataclasses.replace(DATA, **{field: getattr(ReportData(), field)})
    expected = [title for of, title in PANELS.items() if of != field]
    assert [panel.title for panel in panels_of(data)] == expected
    png(sheet(panels_of(data)))


def test_marks_say_what_they_are_and_the_page_gives_colours():
    texts = [svg(sheet([panel]), panel.title) for panel in panels_of(DATA)]
    drawn = [ET.fromstring(text) for text in texts]
    said = [[title.text for title in each.iter("title")] for each in drawn]
    models, candidates, quality, loss, ranks = said
    assert models[:2] == ["budget 4 to 5", "models"]
    assert models[2:] == ["dense: 98.00 %, 8.1 MACs (M)", "subnet: 96.00 %, 4.5 MACs (M)"]
    assert candidates[-1] == "generation 1: 93.00 %, 4.4 MACs (M)"
    assert f"{NASTY} smallest, step 3: 20" in quality
    assert f"{NASTY} (3 steps), step 2: 1" in loss
    assert {"block 0 qkv: rank 8 of 32", "block 0 fc1: kept dense", "uniform (50 %)"} <= {*ranks}
    assert "dense 98.0 %" in {element.text for element in drawn[0].iter("text")}
    assert (drawn[0].tag, "width" in drawn[0].attrib) == ("svg", False)
    assert "fill: currentColor" in texts[0]
    assert "fill: var(--c2f6fb0, #2f6fb0)" in texts[0]


def test_classes_and_what_is_taken_for_what():
    labels = np.array([0, 0, 0, 1, 1, 2, 2, 2])
    dense, subnet = np.array([0, 0, 1, 1, 1, 2, 2, 0]), np.array([0, 1, 1, 1, 0, 2, 2, 2])
    names = ["cat", "dog", "cow", "absent"]
    assert class_rows(labels, {"dense": dense, "subnet": subnet}, names) == [
        ["class", "images", "dense %", "subnet %"],
        ["cat", "3", "66.7", "33.3"],
        ["dog", "2", "100.0", "50.0"],
        ["cow", "3", "66.7", "100.0"],
    ]
    assert confusions(labels, subnet, dense, names) == [
        Confusion("cat", "dog", images=3, count=2, baseline=1, example=1),
        Confusion("dog", "cat", images=2, count=1, baseline=0, example=4),
    ]
    assert [pair.baseline for pair in confusions(labels, subnet, None, names)] == [None, None]
    assert confusions(labels, labels, dense, names) == []
    many, names = np.arange(100), [f"class {i}" for i in range(100)]
    lost = np.where(many >= 70, 0, many)
    _, *rows = class_rows(many, {"dense": many, "subnet": lost}, names)
    assert [row[0] for row in rows] == names[70:]  # those that lost most


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no browser")
def test_a_browser_shows_a_page_without_complaint_and_nothing_wider_than_a_phone(tmp_path):
    wide = [["model", *(f"column {i}" for i in range(30))], ["subnet", *("98.00 %",) * 30]]
    page = html.escape(render(dataclasses.replace(DATA, models=wide)))
    (tmp_path / "outer.html").write_text(
        "<!DOCTYPE html><meta charset=utf-8><title></title><script>addEventListener('load', () => {"
        "const page = document.querySelector('iframe').contentDocument.documentElement;"
        "document.title = `${page.clientWidth} ${page.scrollWidth} ${page.innerText.length}`;"
        f'}})</script><iframe width=400 height=3000 style="border: 0" srcdoc="{page}"></iframe>'
    )
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--v=0"]
    command += ["--window-size=1280,2000", f"file://{tmp_path / 'outer.html'}"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    width, needed, letters = map(int, re.search("<title>(.*?)</title>", shown.stdout)[1].split())
    assert needed == width <= 400
    assert letters > 1000
    assert "CONSOLE" not in shown.stderr


CANDIDATES = {"macs": [4.0e6, 4.5e6, 4.2e6, 5.0e6, 4.5e6], "top1": [0.90, 0.95, 0.89, 0.95, 0.93]}
CANDIDATES["generation"] = [0, 0, 1, 1, 2]
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


def legend_texts(ax):
    legend = ax.get_legend()
    return [text.get_text() for text in legend.get_texts()] if legend else []


def test_models_are_drawn_by_what_the_test_images_show_and_budgets_joined_by_kind():
    points = {"dense": (8e6, 0.98), "subnet 0.3": (3e6, 0.9), "subnet 0.6": (5e6, 0.95)}
    data = example(points=points, windows=[(2.8e6, 3e6), (4.8e6, 5e6)])
    figures.plot_models(ax := Figure().subplots(), data)
    (stars,), (joined,) = ax.collections, ax.lines
    np.testing.assert_allclose(stars.get_offsets(), [[8, 98], [3, 90], [5, 95]])
    found = [to_hex(color) for color in stars.get_facecolor()]
    assert found == [figures.MODEL_COLORS[name] for name in ("dense", "subnet", "subnet")]
    np.testing.assert_allclose(joined.get_xydata(), [[3, 90], [5, 95]])
    bands = [(band.get_x(), band.get_width()) for band in ax.patches]
    np.testing.assert_allclose(bands, [(2.8, 0.2), (4.8, 0.2)])
    texts = {text.get_text() for text in ax.texts}
    assert texts == {"dense 98.0 %", "subnet 0.3 90.0 %", "subnet 0.6 95.0 %"}
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("MACs (M)", "test top-1 %")
    assert legend_texts(ax) == ["MAC budgets"]


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
    assert legend_texts(ax) == ["MAC budget", "Pareto front"]
    assert ax.figure.axes[1].get_ylabel() == "generation"


@pytest.mark.parametrize(
    ("cost", "scale", "label"), [("macs", 1e9, "MACs (G)"), ("ms", 1, "latency (ms)")]
)
def test_costs_have_their_unit(cost, scale, label):
    candidates = {cost: [8 * scale], "top1": [0.8], "generation": [0]}
    points, windows = {"dense": (17.57 * scale, 0.818)}, [(7 * scale, 9 * scale)]
    data = example(cost=cost, candidates=candidates, points=points, windows=windows)
    for plot in (figures.plot_models, figures.plot_candidates):
        plot(ax := Figure().subplots(), data)
        assert ax.get_xlabel() == label
        assert len(ax.figure.axes) == 1, "one generation needs no colour bar"


@pytest.mark.slow
@settings(max_examples=10)
@given(st.lists(st.tuples(st.floats(4e9, 18e9), st.floats(0.75, 0.82)), min_size=2, max_size=9))
def test_labels_of_points_never_overlap(values):
    points = {f"subnet {i}": value for i, value in enumerate(values)}
    data = ReportData(points=points, windows=[(7e9, 9e9)])
    figure = sheet(panels_of(data))
    figure.draw_without_rendering()
    ax = figure.axes[0]
    # The extent of an annotation includes its leader line, that of a text does not.
    boxes = [Text.get_window_extent(text) for text in ax.texts]
    assert len(boxes) == len(points)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(ax.bbox.y0 <= box.y0 and box.y1 <= ax.bbox.y1 for box in boxes)


def test_ranks_draw_three_bars_a_block():
    ax = Figure().subplots()
    ranks, full_ranks = [8, None, 16, 32, 24, 4], [32, 32, 32, 64, 64, 64]
    figures.plot_ranks(ax, ranks, full_ranks, uniform_ratio=0.3)
    bars = [[(b.get_height(), bool(b.get_hatch())) for b in part] for part in ax.containers]
    assert bars[0] == [(25, False), (50, False)]
    assert bars[1] == [(100, True), (37.5, False)]
    assert bars[2] == [(50, False), (6.25, False)]
    assert ax.lines[0].get_ydata() == pytest.approx([30, 30])
    assert legend_texts(ax) == ["qkv", "fc1", "fc2", "kept dense", "uniform (30 %)"]
    figures.plot_ranks(ax := Figure().subplots(), [8] * 3 * 60, [32] * 3 * 60)
    assert legend_texts(ax) == ["qkv", "fc1", "fc2"]
    assert len(ax.get_xticks()) <= 13


@pytest.mark.parametrize(("last", "scale"), [(0.01, "log"), (0.4, "linear"), (0.0, "linear")])
def test_losses_share_an_axis_of_stage_shares(last, scale):
    curves = {"pretrain": ([0, 500, 1000], [2.0, 0.5, last]), "filter": ([], [])}
    curves["finetune/uniform"] = ([20, 40], [0.6, 0.5])
    figures.plot_losses(ax := Figure().subplots(), curves)
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
def test_a_sheet_combines_the_panels_and_legends_cover_none():
    figure, again = (sheet(panels_of(example()), "example") for _ in range(2))
    titles = [title for ax in figure.axes if (title := ax.get_title(loc="left"))]
    assert titles == [panel.title for panel in panels_of(example())]
    content = png(figure)
    assert content == png(again)
    legends = [ax.get_legend().get_window_extent() for ax in figure.axes if ax.get_legend()]
    assert len(titles) == len(legends) == 5
    for ax in figure.axes:
        assert not any(ax.get_window_extent().overlaps(legend) for legend in legends)
    with Image.open(io.BytesIO(content)) as image:
        assert image.size[0] == round(2 * 4.4 * 200)
        drawn = {bytes(color).hex() for _, color in image.convert("RGB").getcolors(2**24)}
    expected = [*figures.PART_COLORS, *map(figures.color_of, POINTS)]
    assert drawn >= {color[1:] for color in expected}


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=20))
def test_front(points):
    macs, top1 = np.array(points).reshape(-1, 2).T
    found = figures.front(macs, top1)

    def beaten(i):
        as_good = (macs <= macs[i]) & (top1 >= top1[i])
        return (as_good & ((macs < macs[i]) | (top1 > top1[i]))).any()

    unbeaten = {points[i] for i in range(len(points)) if not beaten(i)}
    assert [points[i] for i in found] == sorted(unbeaten)
