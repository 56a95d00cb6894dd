"""What the page of a run says of it, read from its folder however far it has come."""

import dataclasses
import datetime
import importlib.metadata
import logging
import platform
from collections.abc import Mapping, Sequence

import numpy as np
from safetensors import numpy as safetensors

from flora_jax.errors import UserError, differences
from flora_jax.evaluation.comparison import kind_of
from flora_jax.io.files import read_json
from flora_jax.io.paths import as_text
from flora_jax.models.spec import Spec
from flora_jax.report import table
from flora_jax.report.classes import Confusion, class_accuracies, confusions
from flora_jax.report.drawn import Drawn
from flora_jax.report.page import Page
from flora_jax.report.pictures import thumbnail
from flora_jax.runs.images import Images
from flora_jax.runs.settings import Settings
from flora_jax.runs.workdir import TEST_IMAGES_FILE, Run, done_stages
from flora_jax.timing import describe_device

BENCHMARK_FILE = "benchmark.json"
log = logging.getLogger(__name__)


def page_of(
    run: Run,
    images: Images | None,
    result: Mapping,
    rows: Sequence[Sequence[str]],
    drawn: Drawn,
    pictures: Mapping[str, bytes],
) -> Page:
    """Puts together what there is.

    Args:
      images: of the run; None where they cannot be read.
      result: as in result.json; empty as long as nothing is evaluated.
      rows: the table of models.
      pictures: {title: PNG}, to be shown as they are.
    """
    benchmark = run.folder / BENCHMARK_FILE
    page = Page(
        name=as_text(run.folder.name),
        about=_about(run),
        unfinished=unfinished(run),
        conclusions=table.conclusions(result) if result else (),
        models=rows,
        drawn=drawn,
        benchmark=read_json(benchmark) if benchmark.exists() else {},
        pictures=pictures,
        recipe=list(differences(Settings().to_config(), run.settings.to_config())),
        stages={name: of["seconds"] for name, of in done_stages(run).items()},
        data=_data(run, images, result.get(table.DATA, {})),
        versions=_versions(),
    )
    return _with_classes(page, run, images, result.get(table.DATA, {}).get("classes", ()))


def unfinished(run: Run) -> str:
    """Which stages are done and which are not; "" where all are."""
    done = done_stages(run)
    missing = [name for name in run.settings.stages if name not in done and name != "report"]
    if not missing:
        return ""
    there = ", ".join(name for name in run.settings.stages if name in done and name != "report")
    return (
        f"This run is not finished. Done: {there or 'nothing'}. To come: {', '.join(missing)}. "
        f"Curves of a stage that goes on end where it is."
    )


def _about(run: Run) -> str:
    spec, settings = run.spec, run.settings
    start = f"from {settings.pretrained}" if settings.pretrained else "trained from scratch"
    return f"{_network(spec)}, {start}, on {settings.data.name}"


def _network(spec: Spec) -> str:
    classes = f"{spec.num_classes:,} classes" if spec.num_classes else "without a classifier"
    blocks, (height, width, _) = len(spec.blocks), spec.image_shape
    return f"{spec.title} of {blocks} blocks for images of {height} x {width} pixels, {classes}"


def _with_classes(page: Page, run: Run, images: Images | None, names: Sequence[str]) -> Page:
    """Adds what the models make of each class, where images have labels and all are evaluated."""
    path = run.folder / TEST_IMAGES_FILE
    if not (names and path.exists()):
        return page
    arrays = safetensors.load(path.read_bytes())
    predicted = {
        model: arrays[key] for key in arrays if (model := key.removesuffix("/predicted")) != key
    }
    labels = arrays["label"]
    smaller = _to_show(predicted)
    shown = {name: predicted[name] for name in ("dense", *smaller) if name in predicted}
    if not shown:
        return page
    page = dataclasses.replace(page, classes=class_accuracies(labels, shown, names))
    if not smaller:
        return page
    found = confusions(labels, predicted[smaller[0]], predicted.get("dense"), names)
    return dataclasses.replace(
        page, confused=smaller[0], confusions=_with_pictures(found, labels, images)
    )


def _to_show(names: Mapping[str, np.ndarray]) -> list[str]:
    """The models that a run was made for: its subnets, cheapest first, or what it has of others."""
    for kind in ("subnet", "slim", "transfer"):
        if found := sorted(name for name in names if kind_of(name) == kind):
            return found
    return []


def _with_pictures(
    found: Sequence[Confusion], labels: np.ndarray, images: Images | None
) -> list[Confusion]:
    """Adds an example of each pair, where the images are those that were evaluated."""
    if images is None or len(images.splits.test) != len(labels):
        return list(found)
    test = images.splits.test
    try:
        examples = [test[pair.example] for pair in found]
    except (UserError, OSError) as error:
        log.warning("no pictures of what is confused: %s", error)
        return list(found)
    if any(ex["label"] != labels[pair.example] for ex, pair in zip(examples, found, strict=True)):
        log.warning("no pictures of what is confused: the images are others now")
        return list(found)
    return [
        dataclasses.replace(pair, picture=thumbnail(example["image"]))
        for pair, example in zip(found, examples, strict=True)
    ]


def _data(run: Run, images: Images | None, tested: Mapping) -> dict[str, object]:
    data: dict[str, object] = {"source": run.settings.data.name}
    if images is not None:
        splits = images.splits
        data["to train with"] = f"{len(splits.train):,}"
        data["held out, to choose by"] = f"{len(splits.heldout):,}"
        data["to report on"] = f"{len(splits.test):,}"
    elif tested:
        data["to report on"] = f"{tested['test_images']:,}"
    if names := tested.get("classes"):
        data["classes"] = f"{len(names):,}: {', '.join(names[:20])}{', ...' * (len(names) > 20)}"
    for split, kinds in tested.get("left_out", {}).items():
        for kind, number in kinds.items():
            data[f"left out of {split}"] = f"{number:,} {kind}"
    if skipped := tested.get("skipped_test_images"):
        data["could not be decoded"] = f"{skipped:,} test images"
    return data


def _versions() -> dict[str, object]:
    return {
        "flora_jax": importlib.metadata.version("flora_jax"),
        "Python": platform.python_version(),
        "device": describe_device(),
        "date": f"{datetime.datetime.now():%Y-%m-%d %H:%M}",
    }
