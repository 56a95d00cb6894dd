"""The page of a run: report.html, one file that needs nothing else.

`page.html` says what stands where and `page.css` how it looks. Whatever a run has nothing for is
left out; every text is escaped.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from flora_jax.report.charts import panels_of
from flora_jax.report.classes import ClassAccuracy, Confusion
from flora_jax.report.drawn import Drawn
from flora_jax.report.pictures import data_uri

Rows = Sequence[Sequence[str]]  # titles first


@dataclasses.dataclass(frozen=True, kw_only=True)
class Page:
    """What a page says of a run; what is empty is left out.

    Attributes:
      name: of the run.
      about: what it is, in a line.
      unfinished: which stages are done and which are not; "" of a finished run.
      conclusions: sentences that say what came of it.
      models: the table of models.
      drawn: the numbers behind its charts.
      benchmark: as in benchmark.json: {"machine": str, "rows": [{"engine", "model": str, "batch":
        int, "ms", "ratio", "low", "high": float}]}, ratio to the dense model with its quartiles.
      classes: how often models are right about each class.
      confused: the model that `confusions` are of.
      confusions: what it takes for what.
      pictures: {title: PNG} of further pictures.
      recipe: (setting, its default, its value here).
      stages: {stage: seconds}.
      data: {what: value} about the images.
      versions: {what: value} about what made the page.
    """

    name: str
    about: str = ""
    unfinished: str = ""
    conclusions: Sequence[str] = ()
    models: Rows = ()
    drawn: Drawn = Drawn()
    benchmark: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    classes: Sequence[ClassAccuracy] = ()
    confused: str = ""
    confusions: Sequence[Confusion] = ()
    pictures: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    recipe: Sequence[tuple[str, object, object]] = ()
    stages: Mapping[str, float] = dataclasses.field(default_factory=dict)
    data: Mapping[str, object] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, object] = dataclasses.field(default_factory=dict)


def render(page: Page) -> str:
    """The page as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(
        page=page,
        panels=panels_of(page.drawn),
        benchmark=_benchmark_rows(page.benchmark),
        classes=_class_rows(page.classes),
        pictures={title: data_uri(png) for title, png in page.pictures.items()},
        recipe=[("setting", "default", "here"), *(map(_said, row) for row in page.recipe)],
    )


def _benchmark_rows(benchmark: Mapping[str, Any]) -> Rows:
    header = ("engine, batch, model", "ms", "share of dense", "quartiles")
    rows = [
        (
            f"{row['engine']}, {row['batch']}, {row['model']}",
            f"{row['ms']:.2f}",
            f"{row['ratio']:.2f}",
            f"{row['low']:.2f}..{row['high']:.2f}",
        )
        for row in benchmark.get("rows", ())
    ]
    return [header, *rows] if rows else []


def _class_rows(classes: Sequence[ClassAccuracy]) -> Rows:
    if not classes:
        return []
    header = ("class", "images", *(f"{model} %" for model in classes[0].top1))
    return [
        header,
        *(
            (each.name, str(each.images), *(f"{100 * share:.1f}" for share in each.top1.values()))
            for each in classes
        ),
    ]


def _said(value: object) -> str:
    """A setting as it is read: "-" for one that is not there."""
    return "-" if value is None else str(value) if value != "" else '""'
