"""Where a run ends: its models on the test split."""

from typing import Any

import numpy as np
from etils import epath
from safetensors import numpy as safetensors

from flora_jax.cluster.processes import by_the_first
from flora_jax.evaluation.comparison import baseline_pairs, compare
from flora_jax.evaluation.evaluate import evaluate_images, top1
from flora_jax.evaluation.quality import Quality
from flora_jax.flora.extras.latency import measure_networks
from flora_jax.io.files import replacing, write_json_once
from flora_jax.models.spec import Spec
from flora_jax.report.table import DATA
from flora_jax.runs.checks import doubt_heldout
from flora_jax.runs.images import Images
from flora_jax.stages.budget import finished_models, load_latency_table
from flora_jax.stages.companions import report_models_once
from flora_jax.stages.measured import measured
from flora_jax.stages.run import Run
from flora_jax.timing import median_ratio
from flora_jax.weights import folder

TEST_IMAGES_FILE = "test_images.safetensors"
PerImage = dict[str, np.ndarray]


def evaluate(run: Run, images: Images) -> None:
    """Measures all finished models on the test split, the only look at it."""
    test_set = measured(run, images, images.evaluation_set(images.splits.test))
    entries, specs, found = {}, {}, {}
    models = list(finished_models(run))
    for _, name, path, budget in models:
        model = folder.load_model(run.folder / path)
        specs[name], found[name] = model.spec, evaluate_images(model, test_set)
        entries[name] = _entry(specs[name], test_set.quality, found[name])
        if name == "dense" and run.settings.pretrained and images.are_labelled:
            heldout = images.heldout_set
            share = float(top1(model, heldout))
            doubt_heldout(share, heldout.num_images, entries[name]["top1"], test_set.num_images)
        if budget is not None:
            entries[name]["budget"] = budget.shares
    labels = test_set.labels if run.spec.num_classes else None
    save_images_once(run.folder / TEST_IMAGES_FILE, labels, found)
    for name, against in compare(found, baseline_pairs(found)).items():
        entries[name]["against"] = against
        if "dense" in against and run.spec.num_classes:
            entries[name]["agreement"] = _agreement(found[name], found["dense"])
    if run.settings.spends_latency:
        for name, ms in _milliseconds(run, specs).items():
            entries[name]["ms"] = ms
    result: dict[str, Any] = {}
    for kind, name, _, budget in models:
        if budget is None or budget.is_only:
            result[kind] = entries[name]
        else:
            result.setdefault(kind, []).append(entries[name])
    result[DATA] = {
        "classes": list(images.class_names),
        "left_out": {
            "train": images.splits.train.left_out,
            "test": images.splits.test.left_out,
        },
        "test_images": test_set.num_images,
        "skipped_test_images": len(images.splits.test) - test_set.num_images,
    }
    write_json_once(run.folder / "result.json", result)
    folders = {name: path for _, name, path, _ in models}
    labels = "the dataset" if images.splits.num_classes else "the dense model"
    about = {"test_images": test_set.num_images, "labels_of": labels}
    report_models_once(run, entries, folders, about)


@by_the_first
def save_images_once(
    path: epath.Path, labels: np.ndarray | None, found: dict[str, PerImage]
) -> None:
    """Writes what each model makes of each image. Raises as `replacing`.

    Args:
      labels: int32 [n]; stored as "label".
      found: {model: what `evaluate_images` gives}; stored as "model/is_correct" (uint8 [n]),
        "model/log_likelihood" (float32 [n]) and "model/predicted" (int32 [n]), or as "model/cosine"
        and "model/relative_error" (float32 [n]).
    """
    tensors = {} if labels is None else {"label": labels}
    for model, values in found.items():
        for name, value in values.items():
            is_bool = value.dtype == bool
            tensors[f"{model}/{name}"] = value.astype(np.uint8) if is_bool else value
    with replacing(path) as partial:
        partial.write_bytes(safetensors.save(tensors))


def _entry(spec: Spec, quality: Quality, found: PerImage) -> dict:
    means = {m.name: float(found[m.of_image].mean(dtype=np.float64)) for m in quality.metrics}
    return means | {"macs": spec.macs(), "params": spec.num_params()}


def _agreement(ours: PerImage, theirs: PerImage) -> float:
    """Share of the images of which both predict the same class."""
    return float((ours["predicted"] == theirs["predicted"]).mean())


def _milliseconds(run: Run, specs: dict[str, Spec]) -> dict[str, float]:
    """Times the finished models, on the scale of the table that the search used."""
    table = load_latency_table(run)
    times = measure_networks(specs | {"dense": run.spec}, table.batch_size, table.dtype)
    return {name: table.dense_ms * median_ratio(times[name], times["dense"]) for name in specs}
