"""The page of a run: report.html, one file that needs nothing else.

`page.html` says what stands where and `page.css` how it looks. Whatever a run has nothing for is
left out; every text is escaped.
"""

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from flora_jax.report.classes import Confusion
from flora_jax.report.data import ReportData, Rows
from flora_jax.report.figures import Panel, panels_of, sheet
from flora_jax.report.formats import svg, thumbnail
from flora_jax.report.slim_figures import slim_panels
from flora_jax.report.table import by_engine, ms_cells, timed_on


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page."""

    title: str
    note: str = ""  # a sentence below the title
    rows: Rows = ()  # of a table
    facts: Mapping[str, object] = dataclasses.field(default_factory=dict)  # {name: value}
    panels: Sequence[tuple[str, Markup, str]] = ()  # title, SVG and a sentence below
    examples: Sequence[tuple[str, Confusion]] = ()  # the address of a picture or "", and of what
    is_folded: bool = False  # until it is clicked

    @property
    def is_empty(self) -> bool:
        return not (len(self.rows) > 1 or self.facts or self.panels or self.examples)


def render(data: ReportData) -> str:
    """The page as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    sections = [section for section in _sections(data) if not section.is_empty]
    return environment.get_template("page.html").render(data=data, sections=sections)


def _sections(data: ReportData) -> list[Section]:
    slimmed = slim_panels(data.slimming) if data.slimming else []
    pairs = data.confusions
    examples = [("" if pair.image is None else thumbnail(pair.image), pair) for pair in pairs]
    return [
        Section("Models", data.timed_in and f"ms: {data.timed_in}", data.models),
        Section("Plots", panels=_figures(panels_of(data))),
        Section("What slimming leaves", panels=_figures(slimmed)),
        Section("Milliseconds", timed_on(data.benchmark), _benchmark_rows(data.benchmark)),
        Section("Accuracy by class, on the test images", rows=data.classes),
        Section(f"What the {data.confused} confuses most", examples=examples),
        Section("What was set", facts=data.given),
        Section(
            f"Other settings that differ from the defaults ({len(data.recipe)})",
            rows=[("setting", "default", "here"), *data.recipe],
            is_folded=True,
        ),
        Section("Stages", facts={name: f"{s:.0f} s" for name, s in data.stages.items()}),
        Section("Images", facts=data.images),
        Section("This page was made with", facts=data.versions),
    ]


def _figures(panels: Iterable[Panel]) -> list[tuple[str, Markup, str]]:
    return [
        (panel.title, Markup(svg(sheet([panel], has_titles=False), panel.title)), panel.note)
        for panel in panels
    ]


def _benchmark_rows(benchmark: Mapping[str, Any]) -> Rows:
    """Milliseconds of each model, and shares of those of the first with their quartiles."""
    timed = by_engine(benchmark)
    models = list(dict.fromkeys(name for found in timed.values() for name in found))
    shares = [f"{name} / {models[0]}" for name in models[1:]]
    rows = [("engine", *(f"{name} ms" for name in models), *shares)]
    for engine, found in timed.items():
        of_first = [_share(found[name]) if name in found else "" for name in models[1:]]
        rows.append((engine, *ms_cells(found, models), *of_first))
    return rows


def _share(row: Mapping[str, float]) -> str:
    return f"{row['ratio']:.2f} ({row['low']:.2f}..{row['high']:.2f})"
