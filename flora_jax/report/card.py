"""The model card of a model that a run hands out, in the form of the Hugging Face hub."""

import dataclasses
import json
import os
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flora_jax.data.preprocessing import Preprocessing
from flora_jax.evaluation.quality import quality_of
from flora_jax.io.files import read_json
from flora_jax.io.paths import absolute, as_text
from flora_jax.models.spec import Spec
from flora_jax.report.table import difference_text, human_count, in_points, named_entries
from flora_jax.runs.budgets import ALLOCATED, WINNERS_FILE, Finished, load_budgets, load_found
from flora_jax.runs.model_files import EVALUATION_FILE
from flora_jax.runs.workdir import Run
from flora_jax.training.settings import Recipe
from flora_jax.weights.export import EXPORTS
from flora_jax.weights.hub import is_repository, repository_name

CARD_FILE = "README.md"


def card_of(
    run: Run,
    found: Finished,
    spec: Spec,
    class_names: Sequence[str],
    coarse: Mapping[str, float] | None = None,
) -> str:
    """The card of a finished model of the run, as Markdown behind a front matter in YAML.

    Args:
      coarse: top-1 in 0..1 of the files of lower precision, by the kind of export.
    """
    path, evaluation = run.folder / "result.json", run.folder / found.folder / EVALUATION_FILE
    entries = named_entries(read_json(path)) if path.exists() else {}
    entry, exports = entries.get(found.name, {}), run.settings.export
    tested = read_json(evaluation) if evaluation.exists() else entry
    models = {"this model": (spec, tested)}
    if found.kind in ("slim", "subnet"):
        models["dense model"] = (run.spec, entries.get("dense", {}))
    difference = entry.get("against", {}).get("dense", {}).get(quality_of(spec).shown.name)
    title = f"{as_text(absolute(run.folder).name)}: {found.name}"
    steps = "\n".join(f"- {step}" for step in _steps(run, found))
    limits = "\n".join(f"- {limit}" for limit in _limits(spec, class_names, bool(tested), exports))
    return f"""---
{_front_matter(run, found, title, spec, tested)}
---

# {title}

{_summary(spec, run.spec if "dense model" in models else None)}

{_figures(models, coarse or {})}

{_how_measured(run, spec, tested, difference)}

## How it was made

{steps}

## How to load it

{_how_to_load(spec, exports)}

Instead of zeros, `images` are pictures that are prepared as follows, any number of them.

## What it wants of pictures

{_pictures(run.settings.data.preprocessing(spec.image_size), spec.in_channels)}

## Limits

{limits}
"""


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


def _front_matter(run: Run, found: Finished, title: str, spec: Spec, tested: Mapping) -> str:
    """Lines of YAML, whose values are JSON, which is YAML."""
    task = "image-classification" if spec.num_classes else "image-feature-extraction"
    is_compressed = spec != dataclasses.replace(spec, blocks=())
    tags = ["vision-transformer", *["compressed"] * is_compressed]
    tags += ["vit-slim"] * (found.kind == "slim" or "slim" in run.settings.stages)
    tags += ["flora", "low-rank"] * (found.kind == "subnet")
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
    lines = ["# license: apache-2.0  # yours to say: what the first weights and pictures allow"]
    lines += [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items()]
    return "\n".join(lines)


def _summary(spec: Spec, dense: Spec | None) -> str:
    names = {"ViT": "vision transformer", "Swin": "Swin transformer"}
    output = f"that tells {spec.num_classes} classes apart" if spec.num_classes else "for features"
    size, macs, params = spec.image_size, human_count(spec.macs()), human_count(spec.num_params())
    text = f"A {names.get(spec.title, spec.title)} {output}, of images of {size} x {size} pixels: "
    text += f"{macs} multiply-adds (MACs), {params} parameters."
    if dense:
        saved = 100 * (1 - spec.macs() / dense.macs())
        text += f" It was made of a dense one, with {saved:.1f} % fewer MACs."
    return text


def _figures(models: Mapping[str, tuple[Spec, Mapping]], coarse: Mapping[str, float]) -> str:
    specs, tested = zip(*models.values(), strict=True)
    rows = [["", *models], ["---"] * (len(models) + 1)]
    for metric in quality_of(specs[0]).metrics:
        if metric.name in tested[0]:
            known = (metric.scale * one[metric.name] for one in tested if metric.name in one)
            cells = [f"{value:.{metric.digits}f}" for value in known]
            rows.append([metric.column, *cells, *[""] * (len(tested) - len(cells))])
    for kind, top1 in coarse.items():
        empty = [""] * (len(models) - 1)
        rows.append([f"top-1 % of `{EXPORTS[kind].path}`", f"{100 * top1:.2f}", *empty])
    rows.append(["MACs", *(human_count(spec.macs()) for spec in specs)])
    rows.append(["parameters", *(human_count(spec.num_params()) for spec in specs)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _how_measured(run: Run, spec: Spec, tested: Mapping, difference: Any) -> str:
    text, metric = "", quality_of(spec).shown
    if "labels_of" in tested:
        text = f"Measured on {tested['test_images']:,} test images of "
        text += f"{dataset_name(run.settings.data.name)}, by the labels of {tested['labels_of']}.\n"
    if difference is not None:
        unit = "points of top-1" if metric.in_percent else metric.title
        points = difference_text(in_points(difference, metric), metric.digits)
        text += (
            f"Against the dense model on the same images: {points} {unit}, with a 95 % interval."
        )
    return text.strip()


def _steps(run: Run, found: Finished) -> Iterator[str]:
    """The stages that this model went through, with what decided it."""
    settings, stages, search = run.settings, run.settings.stages, run.settings.search
    weights, data = base_model(settings.pretrained), dataset_name(settings.data.name)
    if found.kind == "transfer":
        yield f"The model {weights} took on the classes of {data}: {_recipe(settings.finetune)}."
        return
    start = f"The dense model has the weights {weights}" if weights else "The dense model"
    if settings.trains_dense:
        start += f"{',' if weights else ' was'} trained on {data}: {_recipe(settings.pretrain)}"
    yield f"{start}."
    if "slim" in stages and found.kind != "dense":
        gates, retrain = _recipe(settings.slim.gates), _recipe(settings.slim.retrain)
        yield (
            f"ViT-Slim learned what attention, MLPs and tokens can spare (gates: {gates}), cut it "
            f"out, and retrained: {retrain}."
        )
    if found.budget is None:
        return
    low, high = found.budget.shares
    images = settings.calibration.images if "calibrate" in stages else 0
    start = f"weighed by up to {images:,} images" if images else "of the plain SVD"
    yield (
        f"FLORA split every large layer into low-rank factors, {start}; the budget is {low:g} to "
        f"{high:g} of the dense model's {'latency' if settings.spends_latency else 'MACs'}."
    )
    if "supernet" in stages:
        ratios = ", ".join(f"{ratio:.3g}" for ratio in settings.space.ratios)
        yield (
            f"One supernet of all ranks (ratios {ratios}; sampling {settings.supernet_sampling}) "
            f"was trained: {_recipe(settings.supernet)}."
        )
    allocated = f"allocated by measured sensitivity on {settings.allocation.images} images"
    if "search" in stages:
        yield (
            f"Ranks were searched by evolution, {search.generations} generations of "
            f"{search.population}, scored by {settings.metric} on held-out images."
        )
        winner = load_found(run, WINNERS_FILE)[load_budgets(run).index(found.budget)]
        if winner.chosen == ALLOCATED:
            yield f"None of them was surely better than ranks {allocated}, which the subnet has."
    else:
        yield f"Ranks were {allocated}."
    if "finetune" in stages:
        yield f"The subnet was fine-tuned: {_recipe(settings.finetune)}."


def _recipe(recipe: Recipe) -> str:
    taught = ", taught by the model before" if recipe.distill else ""
    return (
        f"{recipe.epochs:g} epochs in batches of {recipe.batch_size}, learning rate "
        f"{recipe.learning_rate:g} for 512 images{taught}"
    )


def _pictures(wanted: Preprocessing, channels: int) -> str:
    size, larger = wanted.image_size, int(wanted.image_size / wanted.crop_pct)
    square = size if wanted.crop_mode == "squash" else larger
    crop = f"The whole picture is resized to {square} x {square} ({wanted.interpolation})"
    crop += ", whatever its ratio"
    if wanted.crop_mode == "center":
        crop = f"The short side is resized to {larger} pixels ({wanted.interpolation})"
    if wanted.crop_mode != "squash":
        crop += f", and the central {size} x {size} cut out"
    colours = "grey, one channel" if channels == 1 else f"{channels} channels (RGB)"
    numbers = f"mean {list(wanted.mean)} and std {list(wanted.std)}"
    text = f"{crop}. Pixels, {colours}, become (pixel / 255 - mean) / std, with {numbers}."
    return f"{text} `preprocessing.json` says the same."


def _limits(
    spec: Spec, class_names: Sequence[str], is_tested: bool, exports: Sequence[str]
) -> Iterator[str]:
    if spec.num_classes:
        names = as_text(", ".join(class_names[:20]))
        names += f" and {len(class_names) - 20} more" if len(class_names) > 20 else ""
        known = f" ({names}; `classes.json`)" if names else ""
        given = "and gives one of them to any picture, of whatever it is."
        yield f"It knows {spec.num_classes} classes{known}, {given}"
    yield (
        "Its figures are of those test images alone; the interval says what other such images "
        "might have shown, not what another training might, or other kinds of pictures."
        if is_tested
        else "It was not measured on any test images."
    )
    yield (
        "What the first weights and the training pictures get wrong, it gets wrong, too; what is "
        "compressed may lose more on rare classes than the mean shows."
    )
    files = (f"{EXPORTS[kind].tolerance:g} in `{EXPORTS[kind].path}`" for kind in exports)
    yield (
        f"The files were compared with the network on a few images before they were written: "
        f"outputs differ by less than this share of the largest, {', '.join(files)}."
    )


# Of each kind of file: what runs it, imports, images, and the code, in the folder of the card.
_FIRST, _LAST = "(1, $channels, $size, $size)", "(1, $size, $size, $channels)"
_LOADING = {
    "onnx": (
        "with ONNX Runtime",
        "import numpy as np\nimport onnxruntime",
        f"np.zeros({_FIRST}, np.float32)",
        'session = onnxruntime.InferenceSession("$file")\n'
        '(outputs,) = session.run(None, {"images": images})',
    ),
    "torch": (
        "with PyTorch and safetensors",
        "import sys\n\nimport torch",
        f"torch.zeros({_FIRST})",
        'sys.path.insert(0, "$file")\nfrom model import load\n\noutputs = load("$file")(images)',
    ),
    "stablehlo": (
        "with JAX alone, on CPU, CUDA and TPU",
        "import pathlib\n\nimport numpy as np\nfrom jax import export",
        f"np.zeros({_LAST}, np.float32)",
        'program = export.deserialize(pathlib.Path("$file").read_bytes())\n'
        "outputs = program.call(images)",
    ),
    "timm": (
        "weights under the names of timm, with flora_jax",
        "import numpy as np\n\nimport flora_jax",
        f"np.zeros({_LAST}, np.float32)",
        'outputs = flora_jax.load("$file")(images)',
    ),
}


def _how_to_load(spec: Spec, kinds: Sequence[str]) -> str:
    texts = []
    for kind in kinds:
        tool, imports, images, code = _LOADING[kind.partition("_")[0]]
        values = {"file": EXPORTS[kind].path, "size": spec.image_size, "channels": spec.in_channels}
        text = f"`$file`, {tool}:\n\n```python\n{imports}\n\nimages = {images}\n{code}\n```"
        texts.append(string.Template(text).substitute(values))
    return "\n\n".join(texts)
