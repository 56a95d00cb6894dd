"""The card of a model that is handed out, in the form of the Hugging Face hub."""

import dataclasses
import json
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from flora_jax.data.preprocessing import Preprocessing
from flora_jax.evaluation.comparison import Interval
from flora_jax.evaluation.quality import Quality, quality_of
from flora_jax.models.spec import Spec
from flora_jax.report.table import difference_text, human_count, in_points
from flora_jax.weights.export import EXPORTS

CARD_FILE = "README.md"
Numbers = Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Card:
    """What a card says.

    Attributes:
      title: of the model.
      spec: of the model; dense: of the one that it was made of, None where it is that one.
      base_model: the name of the weights that it began with; empty: none.
      dataset: the name of what it was trained and tested on.
      exports: the kinds of files that lie beside, of `flora_jax.weights.export`.
      tags: what else it can be found by.
      steps: how it was made, a sentence or two each.
      tested: what was measured of it on the test images; where it is known "test_images", how many
        these are, and "labels_of", whose labels; empty where nothing was measured.
      dense_tested: the same of the dense model.
      coarse_top1: in 0..1, of the files of lower precision, by their kind.
      difference: from the dense model in the metric that is shown, on the same images.
    """

    title: str
    spec: Spec
    dense: Spec | None
    base_model: str
    dataset: str
    preprocessing: Preprocessing
    class_names: Sequence[str]
    exports: Sequence[str]
    tags: Sequence[str]
    steps: Sequence[str]
    tested: Mapping[str, Any]
    dense_tested: Numbers
    coarse_top1: Numbers
    difference: Interval | None

    @property
    def quality(self) -> Quality:
        return quality_of(self.spec)

    @property
    def is_by_labels(self) -> bool:
        """Whether its accuracy is of labels that people gave."""
        return self.tested.get("labels_of") == "the dataset"


def card_text(card: Card) -> str:
    """The card as Markdown behind a front matter in YAML."""
    return f"""---
{_front_matter(card)}
---

# {card.title}

{_what_it_is(card)}

{_figures(card)}

## How it was made

{_listed(card.steps)}

## How to load it

{_how_to_load(card)}

Instead of zeros, `images` are pictures that are prepared as follows, any number of them.

## What it wants of pictures

{_pictures(card)}

## Limits

{_listed(_limits(card))}
"""


def _front_matter(card: Card) -> str:
    """Lines of YAML, whose values are JSON, which is YAML."""
    task = "image-classification" if card.spec.num_classes else "image-feature-extraction"
    fields: dict[str, Any] = {"library_name": "flora_jax", "pipeline_tag": task}
    is_compressed = card.spec != dataclasses.replace(card.spec, blocks=())
    fields["tags"] = ["vision-transformer", *["compressed"] * is_compressed, *card.tags]
    if card.base_model:
        fields["base_model"] = card.base_model
    dataset = re.sub(r"[^\w.-]+", "-", card.dataset).strip("-.") or "unnamed"
    fields["datasets"] = [dataset]
    if card.is_by_labels:
        fields["metrics"] = ["accuracy"]
        metric = {"type": "accuracy", "name": "top-1", "value": round(card.tested["top1"], 6)}
        result = {
            "task": {"type": task},
            "dataset": {"name": card.dataset, "type": dataset, "split": "test"},
            "metrics": [metric],
        }
        fields["model-index"] = [{"name": card.title, "results": [result]}]
    lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in fields.items()]
    license_line = (
        "# license: apache-2.0  # yours to choose: what the first weights and the pictures allow"
    )
    return "\n".join([license_line, *lines])


def _what_it_is(card: Card) -> str:
    spec = card.spec
    names = {"ViT": "vision transformer", "Swin": "Swin transformer"}
    kind = names.get(spec.title, spec.title)
    output = f"that tells {spec.num_classes} classes apart" if spec.num_classes else "for features"
    text = (
        f"A {kind} {output}, of images of {spec.image_size} x {spec.image_size} pixels: "
        f"{human_count(spec.macs())} multiply-adds (MACs), {human_count(spec.num_params())} "
        f"parameters"
    )
    if card.dense is None:
        return f"{text}."
    saved = 1 - spec.macs() / card.dense.macs()
    return f"{text}. It was made of a dense one, with {100 * saved:.1f} % fewer MACs."


def _figures(card: Card) -> str:
    specs = [card.spec] if card.dense is None else [card.spec, card.dense]
    tested = [card.tested, card.dense_tested][: len(specs)]
    heads = ["", "this model", "dense model"][: len(specs) + 1]
    rows = [heads, ["---"] * len(heads)]
    for metric in card.quality.metrics:
        if metric.name in card.tested:
            values = [
                f"{metric.scale * one[metric.name]:.{metric.digits}f}" if metric.name in one else ""
                for one in tested
            ]
            rows.append([metric.column, *values])
    for kind, top1 in card.coarse_top1.items():
        rows.append([f"top-1 % of `{EXPORTS[kind].path}`", f"{100 * top1:.2f}", ""][: len(heads)])
    rows.append(["MACs", *(human_count(spec.macs()) for spec in specs)])
    rows.append(["parameters", *(human_count(spec.num_params()) for spec in specs)])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    if "labels_of" in card.tested:
        lines.append(
            f"\nMeasured on {card.tested['test_images']:,} test images of {card.dataset}, by the "
            f"labels of {card.tested['labels_of']}."
        )
    if card.difference is not None:
        metric = card.quality.shown
        unit = "points of top-1" if metric.in_percent else metric.title
        text = difference_text(in_points(card.difference, metric), metric.digits)
        lines.append(
            f"Against the dense model on the same images: {text} {unit}, with a 95 % interval."
        )
    return "\n".join(lines)


def _pictures(card: Card) -> str:
    wanted, channels = card.preprocessing, card.spec.in_channels
    size, larger = wanted.image_size, int(wanted.image_size / wanted.crop_pct)
    crop = {
        "center": f"The short side is resized to {larger} pixels ({wanted.interpolation}), and the "
        f"central {size} x {size} cut out.",
        "squash": f"The whole picture is resized to {size} x {size} ({wanted.interpolation}), "
        f"whatever its ratio.",
        "squash_center": f"The whole picture is resized to {larger} x {larger} "
        f"({wanted.interpolation}), whatever its ratio, and the central {size} x {size} cut out.",
    }[wanted.crop_mode]
    colours = "grey, one channel" if channels == 1 else f"{channels} channels (RGB)"
    return (
        f"{crop} Pixels, {colours}, become (pixel / 255 - mean) / std, with mean "
        f"{list(wanted.mean)} and std {list(wanted.std)}. `preprocessing.json` says the same."
    )


def _limits(card: Card) -> list[str]:
    limits = []
    if card.spec.num_classes:
        names = ", ".join(card.class_names[:20])
        more = f" and {len(card.class_names) - 20} more" if len(card.class_names) > 20 else ""
        known = f" ({names}{more}; `classes.json`)" if names else ""
        limits.append(
            f"It knows {card.spec.num_classes} classes{known}, and gives one of them to any "
            f"picture, of whatever it is."
        )
    if card.tested:
        limits.append(
            "Its figures are of those test images alone; the interval says what other such images "
            "might have shown, not what another training might, or other kinds of pictures."
        )
    else:
        limits.append("It was not measured on any test images.")
    limits.append(
        "What the first weights and the training pictures get wrong, it gets wrong, too; what is "
        "compressed may lose more on rare classes than the mean shows."
    )
    within = ", ".join(
        f"{EXPORTS[kind].tolerance:g} in `{EXPORTS[kind].path}`" for kind in card.exports
    )
    limits.append(
        f"The files were compared with the network on a few images before they were written: "
        f"outputs differ by less than this share of the largest, {within}."
    )
    return limits


def _listed(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


_ONNX = """\
`$file`, with ONNX Runtime:

```python
import numpy as np
import onnxruntime

images = np.zeros((1, $channels, $size, $size), np.float32)
session = onnxruntime.InferenceSession("$file")
(outputs,) = session.run(None, {"images": images})
```"""
_TORCH = """\
`$file/`, with PyTorch and safetensors:

```python
import sys

import torch

sys.path.insert(0, "$file")
from model import load

images = torch.zeros(1, $channels, $size, $size)
outputs = load("$file")(images)
```"""
_STABLEHLO = """\
`$file`, with JAX alone, on CPU, CUDA and TPU:

```python
import pathlib

import numpy as np
from jax import export

images = np.zeros((1, $size, $size, $channels), np.float32)
program = export.deserialize(pathlib.Path("$file").read_bytes())
outputs = program.call(images)
```"""
_TIMM = """\
`$file/`, weights under the names of timm, with flora_jax:

```python
import numpy as np

import flora_jax

images = np.zeros((1, $size, $size, $channels), np.float32)
outputs = flora_jax.load("$file")(images)
```"""
# Of each kind, to run in the folder of the card.
_HOW_TO_LOAD = {
    "onnx": _ONNX,
    "onnx_float16": _ONNX,
    "onnx_int8": _ONNX,
    "torch": _TORCH,
    "stablehlo": _STABLEHLO,
    "timm": _TIMM,
}


def _how_to_load(card: Card) -> str:
    size, channels = card.spec.image_size, card.spec.in_channels
    texts = [
        string.Template(_HOW_TO_LOAD[kind]).substitute(
            file=EXPORTS[kind].path, size=size, channels=channels
        )
        for kind in card.exports
    ]
    return "\n\n".join(texts)
