"""The model card of a model that a run hands out, in the form of the Hugging Face hub.

`card.md` says what stands where, and holds the texts.
"""

import dataclasses
import itertools
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jinja2

from flora_jax.data.preprocessing import Preprocessing
from flora_jax.evaluation.outputs import outputs_of, outputs_title, quality_of
from flora_jax.io.files import read_json
from flora_jax.io.paths import absolute, as_text
from flora_jax.models.spec import Spec
from flora_jax.report.table import (
    by_engine,
    difference_text,
    human_count,
    in_points,
    ms_cells,
    named_entries,
    timed_on,
)
from flora_jax.runs.budgets import ALLOCATED, WINNERS_FILE, Finished, load_budgets, load_found
from flora_jax.runs.model_files import EVALUATION_FILE
from flora_jax.runs.workdir import BENCHMARK_FILE, Run
from flora_jax.weights.export import EXPORTS
from flora_jax.weights.export.engines import ENGINES
from flora_jax.weights.hub import is_repository, repository_name

CARD_FILE = "README.md"
_NETWORKS = {"ViT": "vision transformer", "Swin": "Swin transformer"}
_MOST_NAMES = 20  # of classes

Rows = list[list[str]]


def card_of(
    run: Run,
    found: Finished,
    spec: Spec,
    class_names: Sequence[str],
    coarse: Mapping[str, float] | None = None,
) -> str:
    """The card of a finished model of the run, as Markdown behind a front matter in YAML.

    Args:
      coarse: top-1 in 0..1 of the files of lower precision, by the kind of export; of other outputs
        their cosine to the model's.
    """
    path, evaluation = run.folder / "result.json", run.folder / found.folder / EVALUATION_FILE
    entries = named_entries(read_json(path)) if path.exists() else {}
    settings, entry, metric = run.settings, entries.get(found.name, {}), quality_of(spec).shown
    tested = read_json(evaluation) if evaluation.exists() else entry
    models = {"this model": (spec, tested)}
    if is_smaller := found.kind in ("slim", "subnet"):
        models["dense model"] = (run.spec, entries.get("dense", {}))
    timed, of_run = run.folder / BENCHMARK_FILE, [found.name, "dense"][: len(models)]
    benchmark = read_json(timed) if timed.exists() else {}
    milliseconds = [
        [f"ms, {engine}", *ms_cells(ms, of_run)]
        for engine, ms in by_engine(benchmark).items()
        if found.name in ms
    ]
    difference = entry.get("against", {}).get("dense", {}).get(metric.name)
    if difference is not None:
        unit = "points of top-1" if metric.in_percent else metric.title
        difference = difference_text(in_points(difference, metric), metric.digits) + f" {unit}"
    has_won = False
    if found.budget is not None and "search" in settings.stages:
        winner = load_found(run, WINNERS_FILE)[load_budgets(run).index(found.budget)]
        has_won = winner.chosen == ALLOCATED
    names, more = _as_markdown(", ".join(class_names[:_MOST_NAMES])), len(class_names) - _MOST_NAMES
    title = f"{as_text(absolute(run.folder).name)}: {found.name}"
    wanted = settings.data.preprocessing(spec.image_size)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=False,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("card.md").render(
        ENGINES=ENGINES,
        found=found,
        settings=settings,
        stages=settings.stages,
        spec=spec,
        size=spec.image_size,
        tested=tested,
        fields=_front_matter(run, found, title, spec, tested),
        title=_as_markdown(title),
        does=outputs_of(spec).card.format(spec.num_classes),
        network=_NETWORKS.get(spec.title, spec.title),
        saved=100 * (1 - spec.macs() / run.spec.macs()) if is_smaller else None,
        figures=_figures(models, coarse or {}) + milliseconds,
        timed_on=timed_on(benchmark) if milliseconds else "",
        difference=difference,
        data=_as_markdown(dataset_name(settings.data.name)),
        weights=_as_markdown(base_model(settings.pretrained)),
        ratios=", ".join(f"{ratio:.3g}" for ratio in settings.space.ratios),
        allocation_won=has_won,
        names=f"{names} and {more} more" if more > 0 else names,
        wanted=wanted,
        resizing=_resizing(wanted),
        exports=EXPORTS,
        files=[[*of] for _, of in itertools.groupby(sorted(settings.export), _program)],
        meaning=outputs_title(spec) if spec.num_classes else "features",
        jax_version=jax.__version__,
        human_count=human_count,
    )


def _program(kind: str) -> str:
    """What runs an export: those of one program differ in precision."""
    return kind.partition("_")[0]


def _as_markdown(name: str) -> str:
    """A name that people gave, as text on one line: none of it is markup."""
    return re.sub(r"([\\`*_{}\[\]<>&#|~$])", r"\\\1", " ".join(as_text(name).split()))


def base_model(pretrained: str) -> str:
    """The name of the weights that a run began with: a repository's, a folder's or a file's."""
    if is_repository(pretrained):
        return repository_name(pretrained)
    name = os.path.basename(os.path.abspath(pretrained)) if pretrained else ""
    name = re.sub(r"\.(safetensors|pth|pt|bin)$", "", as_text(name))
    return re.sub(r"[^\w.-]+", "-", name)


def dataset_name(name: str) -> str:
    """The public name of a dataset: folder:/home/me/birds is "birds"."""
    kind, _, place = name.partition(":")
    if not place:
        return name
    return place if kind == "tfds" else as_text(os.path.basename(os.path.abspath(place)))


def _front_matter(
    run: Run, found: Finished, title: str, spec: Spec, tested: Mapping
) -> dict[str, str]:
    """The fields of the YAML as JSON, which is YAML."""
    is_classifier = outputs_of(spec).are_logits
    task = "image-classification" if is_classifier else "image-feature-extraction"
    is_compressed = spec != dataclasses.replace(spec, blocks=())
    tags = ["vision-transformer", *["compressed"] * is_compressed]
    tags += ["vit-slim"] * (found.kind == "slim" or "slim" in run.settings.stages)
    if found.kind == "subnet":
        tags += ["pruned"] if run.settings.cuts_by == "compress" else ["flora", "low-rank"]
    fields: dict[str, Any] = {"library_name": "flora_jax", "pipeline_tag": task, "tags": tags}
    if weights := base_model(run.settings.pretrained):
        fields["base_model"] = weights
    name = dataset_name(run.settings.data.name)
    dataset = re.sub(r"[^\w.-]+", "-", name).strip("-.") or "unnamed"
    fields["datasets"] = [dataset]
    if tested.get("labels_of") == "the dataset":  # of labels that people gave
        metric = {"type": "accuracy", "name": "top-1", "value": round(tested["top1"], 6)}
        images = {"name": name, "type": dataset, "split": "test"}
        result = {"task": {"type": task}, "dataset": images, "metrics": [metric]}
        fields["metrics"] = ["accuracy"]
        fields["model-index"] = [{"name": title, "results": [result]}]
    return {key: json.dumps(value, ensure_ascii=False) for key, value in fields.items()}


def _figures(models: Mapping[str, tuple[Spec, Mapping]], coarse: Mapping[str, float]) -> Rows:
    """The cells of a table, row by row."""
    specs, tested = zip(*models.values(), strict=True)
    rows = [["", *models], ["---"] * (len(models) + 1)]
    for metric in quality_of(specs[0]).metrics:
        if metric.name in tested[0]:
            known = (metric.scale * one[metric.name] for one in tested if metric.name in one)
            cells = [f"{value:.{metric.digits}f}" for value in known]
            rows.append([metric.column, *cells, *[""] * (len(tested) - len(cells))])
    for kind, value in coarse.items():
        name, shown = "top-1 %", f"{100 * value:.2f}"
        if not specs[0].classifies:
            name, shown = "cosine to this model", f"{value:.4f}"
        rows.append([f"{name} of `{EXPORTS[kind].path}`", shown, *[""] * (len(models) - 1)])
    rows.append(["MACs", *(human_count(spec.macs()) for spec in specs)])
    rows.append(["parameters", *(human_count(spec.num_params()) for spec in specs)])
    return rows


def _resizing(wanted: Preprocessing) -> str:
    size, larger = wanted.image_size, int(wanted.image_size / wanted.crop_pct)
    square = size if wanted.crop_mode == "squash" else larger
    text = f"The whole picture is resized to {square} x {square} ({wanted.interpolation})"
    text += ", whatever its ratio"
    if wanted.crop_mode == "center":
        text = f"The short side is resized to {larger} pixels ({wanted.interpolation})"
    if wanted.crop_mode != "squash":
        text += f", and the central {size} x {size} cut out"
    return text
