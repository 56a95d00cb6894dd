"""The page of a run: one file, well-formed, texts escaped, a part only where there is one."""

import dataclasses
import html
import html.parser
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from flora_jax.report.classes import Confusion, class_rows, confusions
from flora_jax.report.data import ReportData, Slimming
from flora_jax.report.figures import panels_of, sheet
from flora_jax.report.formats import svg
from flora_jax.report.page import render
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
            {"engine": NASTY, "batch": 8, "model": "subnet", "ms": 1.234}
            | {"ratio": 0.61, "low": 0.58, "high": 0.66}
        ],
    },
    classes=class_rows(np.array([0, 1]), {"dense": np.array([0, 0])}, [NASTY, "dog"]),
    confused=NASTY,
    confusions=[Confusion(NASTY, "dog", 10, 3, 1, 0, np.zeros((200, 300, 3), np.uint8))],
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
    "recipe": "Settings that differ from the defaults (1)",
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
    assert "0.58..0.66" in text
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


@pytest.mark.parametrize("field", PANELS)
def test_a_panel_is_left_out_where_there_is_nothing_to_draw(field):
    data = dataclasses.replace(DATA, **{field: getattr(ReportData(), field)})
    expected = [title for of, title in PANELS.items() if of != field]
    assert [panel.title for panel in panels_of(data)] == expected


def test_marks_say_what_they_are():
    drawn = [svg(sheet([panel]), panel.title) for panel in panels_of(DATA)]
    said = [[title.text for title in ET.fromstring(each).iter("title")] for each in drawn]
    models, candidates, quality, loss, ranks = said
    assert models == [
        "budget 4 to 5",
        "models",
        "dense: 98.00 %, 8.1 MACs (M)",
        "subnet: 96.00 %, 4.5 MACs (M)",
    ]
    assert candidates[-1] == "generation 1: 93.00 %, 4.4 MACs (M)"
    assert f"{NASTY} smallest, step 3: 20" in quality
    assert f"{NASTY} (3 steps), step 2: 1" in loss
    assert {"block 0 qkv: rank 8 of 32", "block 0 fc1: kept dense", "uniform (50 %)"} <= {*ranks}


def test_colours_and_texts_of_a_figure_are_left_to_the_page():
    (panel,) = panels_of(ReportData(points=DATA.points))
    figure = ET.fromstring(text := svg(sheet([panel]), "models"))
    assert (figure.tag, "width" in figure.attrib) == ("svg", False)
    assert "dense 98.0 %" in {element.text for element in figure.iter("text")}
    assert "fill: currentColor" in text
    assert "fill: var(--c2f6fb0, #2f6fb0)" in text


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


def test_of_many_classes_those_are_shown_that_lost_most():
    labels = np.arange(100)
    subnet = np.where(labels >= 70, 0, labels)
    names = [f"class {i}" for i in labels]
    _, *rows = class_rows(labels, {"dense": labels, "subnet": subnet}, names)
    assert [row[0] for row in rows] == names[70:]


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
