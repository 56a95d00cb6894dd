"""The page of a run: one file, well-formed, texts escaped, a part only where there is one."""

import dataclasses
import html.parser
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from flora_jax.report.charts import panels_of
from flora_jax.report.classes import Confusion, class_accuracies, confusions
from flora_jax.report.drawn import Drawn
from flora_jax.report.page import Page, render
from flora_jax.report.pictures import thumbnail
from flora_jax.report.svg import Chart

NASTY = '<b a="1">&amp\''
PICTURE = thumbnail(np.zeros((200, 300, 3), np.uint8))
DRAWN = Drawn(
    points={"dense": (8.1e6, 0.98), "subnet": (4.5e6, 0.96)},
    candidates={"macs": [4.1e6, 4.4e6], "top1": [0.91, 0.93], "generation": [0, 1]},
    windows=[(4.0e6, 5.0e6)],
    ranks={NASTY: [8, None, 16, 32, 24, None]},
    full_ranks=[32] * 6,
    uniform_ratios=[0.5],
    curves={NASTY: ([1, 2, 3], [30.0, 1.0, 0.5])},
    accuracies={NASTY: {"": ([2, 3], [0.5, 0.9]), "smallest": ([2, 3], [0.1, 0.2])}},
)
PAGE = Page(
    name=NASTY,
    about=f"a network {NASTY}",
    unfinished=f"not finished {NASTY}",
    conclusions=[f"it is {NASTY}"],
    models=[["model", "top-1 %"], [NASTY, "98.0"]],
    drawn=DRAWN,
    benchmark={
        "machine": NASTY,
        "rows": [
            {"engine": NASTY, "batch": 8, "model": "subnet", "ms": 1.234}
            | {"ratio": 0.61, "low": 0.58, "high": 0.66}
        ],
    },
    classes=class_accuracies(np.array([0, 1]), {"dense": np.array([0, 0])}, [NASTY, "dog"]),
    confused=NASTY,
    confusions=[Confusion(NASTY, "dog", 10, 3, 1, 0, PICTURE)],
    pictures={f"more {NASTY}": b"png"},
    recipe=[("seed", 0, NASTY)],
    stages={NASTY: 3.2},
    data={"source": NASTY},
    versions={"flora_jax": NASTY},
)
PARTS = {  # of each field, the title of its part
    "models": "Models",
    "benchmark": "Milliseconds",
    "classes": "Accuracy by class, on the test images",
    "confusions": f"What the {NASTY} confuses most",
    "pictures": f"more {NASTY}",
    "recipe": "Settings that differ from the defaults (1)",
    "stages": "Stages",
    "data": "Images",
    "versions": "This page was made with",
}
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


def test_a_page_is_well_formed_escaped_and_needs_nothing_else():
    text = render(PAGE)
    page = Reader(text)
    assert page.titles == [
        PARTS["models"],
        *PANELS.values(),
        *(title for field, title in PARTS.items() if field != "models"),
    ]
    assert "<b a=" not in text
    assert len(page.addresses) == 2
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert not page.tags & {"script", "link", "iframe", "object"}
    assert not re.search("url\\(|@import|http", text)
    assert "0.58..0.66" in text


@pytest.mark.parametrize("field", PARTS)
def test_a_part_is_left_out_where_a_run_has_nothing_for_it(field):
    empty = getattr(Page(name="run"), field)
    titles = Reader(render(dataclasses.replace(PAGE, **{field: empty}))).titles
    assert titles == [title for title in Reader(render(PAGE)).titles if title != PARTS[field]]


@pytest.mark.parametrize("field", PANELS)
def test_a_chart_is_left_out_where_there_is_nothing_to_draw(field):
    drawn = dataclasses.replace(DRAWN, **{field: getattr(Drawn(), field)})
    expected = [title for of, title in PANELS.items() if of != field]
    assert [panel.title for panel in panels_of(drawn)] == expected


def test_a_page_of_nothing_is_a_page():
    text = render(Page(name="run"))
    assert Reader(text).titles == []
    assert "<h1>run</h1>" in text


def test_marks_say_what_they_are():
    titles = [
        [element.text for element in ET.fromstring(panel.svg).iter("title")]
        for panel in panels_of(DRAWN)
    ]
    models, candidates, quality, loss, ranks = titles
    assert models[1:] == ["dense: 98.00 %, 8.1 MACs (M)", "subnet: 96.00 %, 4.5 MACs (M)"]
    assert candidates[-1] == "generation 1: 93.00 %, 4.4 MACs (M)"
    assert f"{NASTY} smallest, step 3: 20" in quality
    assert f"{NASTY} (3 steps), step 2: 1" in loss
    assert ranks[:2] == ["block 0 qkv: rank 8 of 32", "block 0 fc1: kept dense"]
    assert ranks[-1] == "uniform (50 %)"


def test_a_chart_for_each_of_several_budgets():
    points = {"dense": (8e6, 0.98), "subnet 0.3": (3e6, 0.9), "subnet 0.6": (5e6, 0.95)}
    ranks = {name: [8, 16, 32] for name in ("subnet 0.3", "subnet 0.6")}
    drawn = Drawn(
        points=points,
        windows=[(2.8e6, 3e6), (4.8e6, 5e6)],
        ranks=ranks,
        full_ranks=[32] * 3,
        uniform_ratios=[0.2, 0.4],
    )
    models, *others = panels_of(drawn)
    svg = ET.fromstring(models.svg)
    (joined,) = svg.iter("polyline")
    assert joined.find("title").text == "subnet"
    ends = {tuple(map(float, pair.split(","))) for pair in joined.get("points").split()}
    dots = [(float(dot.get("cx")), float(dot.get("cy"))) for dot in svg.iter("circle")]
    assert ends == set(dots[1:])
    assert len([band for band in svg.iter("rect") if band.get("class") == "band"]) == 2
    assert [panel.title for panel in others] == [
        "Ranks of the subnet 0.3",
        "Ranks of the subnet 0.6",
    ]
    assert [panel.legend[-1][1] for panel in others] == ["uniform (20 %)", "uniform (40 %)"]


def test_marks_stand_where_the_axes_say():
    chart = Chart((0, 10), (100, 200), "x", "y", width=170, height=156)  # a plot of 100 x 100
    for x, y in ((0, 100), (10, 200), (5, 125)):
        chart.point(x, y, 0, "")
    chart.bar(5, 2, 150, 0, "")
    svg = ET.fromstring(chart.text)
    dots = [(float(dot.get("cx")), float(dot.get("cy"))) for dot in svg.iter("circle")]
    assert dots == [(56, 112), (156, 12), (106, 87)]
    (bar,) = svg.iter("rect")
    assert [float(bar.get(name)) for name in ("x", "y", "width", "height")] == [96, 62, 20, 50]


def test_labels_of_points_keep_apart_and_inside():
    chart = Chart((0, 1), (0, 1), "x", "y", height=300)
    chart.labels([(0.2 * i, y, i, f"model {i}") for i, y in enumerate((0.9, 0.91, 0.0, 0.01, 0.0))])
    labels = [t for t in ET.fromstring(chart.text).iter("text") if "label" in t.get("class", "")]
    rows = sorted(float(label.get("y")) for label in labels)
    assert len(rows) == 5
    assert min(np.diff(rows)) >= 15.9
    assert rows[0] >= 12
    assert rows[-1] <= 300 - 44


def test_classes_and_what_is_taken_for_what():
    labels = np.array([0, 0, 0, 1, 1, 2, 2, 2])
    dense, subnet = np.array([0, 0, 1, 1, 1, 2, 2, 0]), np.array([0, 1, 1, 1, 0, 2, 2, 2])
    names = ["cat", "dog", "cow", "absent"]
    found = class_accuracies(labels, {"dense": dense, "subnet": subnet}, names)
    assert [(each.name, each.images) for each in found] == [("cat", 3), ("dog", 2), ("cow", 3)]
    assert [each.top1["dense"] for each in found] == pytest.approx([2 / 3, 1, 2 / 3])
    assert [each.top1["subnet"] for each in found] == pytest.approx([1 / 3, 1 / 2, 1])
    assert confusions(labels, subnet, dense, names) == [
        Confusion("cat", "dog", images=3, count=2, baseline=1, example=1),
        Confusion("dog", "cat", images=2, count=1, baseline=0, example=4),
    ]
    assert [pair.baseline for pair in confusions(labels, subnet, None, names)] == [None, None]
    assert confusions(labels, labels, dense, names) == []


def test_of_many_classes_those_are_shown_that_lost_most():
    labels = np.arange(100)
    subnet = np.where(labels >= 70, 0, labels)
    names = [f"class {i}" for i in labels]
    found = class_accuracies(labels, {"dense": labels, "subnet": subnet}, names)
    assert [each.name for each in found] == names[70:]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no browser")
def test_a_browser_shows_a_page_without_complaint_and_nothing_wider_than_a_phone(tmp_path):
    wide = [["model", *(f"column {i}" for i in range(30))], ["subnet", *("98.00 %",) * 30]]
    page = render(dataclasses.replace(PAGE, models=wide))
    outer = ET.Element("body")
    ET.SubElement(outer, "iframe", srcdoc=page, width="400", height="3000", style="border: 0")
    measure = (
        "const page = document.querySelector('iframe').contentDocument.documentElement;"
        "document.title = `${page.clientWidth} ${page.scrollWidth} ${page.innerText.length}`;"
    )
    script = f"<title></title><script>addEventListener('load', () => {{{measure}}})</script>"
    frame = ET.tostring(outer, "unicode", method="html")
    (tmp_path / "outer.html").write_text(f"<!DOCTYPE html><meta charset=utf-8>{script}{frame}")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--v=0"]
    command += ["--window-size=1280,2000", f"file://{tmp_path / 'outer.html'}"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    width, needed, letters = map(int, re.search("<title>(.*?)</title>", shown.stdout)[1].split())
    assert needed == width <= 400
    assert letters > 1000
    assert "CONSOLE" not in shown.stderr
