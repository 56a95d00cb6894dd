"""Evaluation: the finished models of a run on its test images, and each beside its baselines."""

from typing import Any

import numpy as np
from etils import epath
from safetensors import numpy as safetensors

from flora_jax.cluster.processes import by_the_first, is_first
from flora_jax.evaluation.comparison import baseline_pairs, compare
from flora_jax.evaluation.evaluate import evaluate_images, top1
from flora_jax.evaluation.quality import Quality, commonest_share
from flora_jax.io.files import replacing, write_json_once
from flora_jax.models.spec import Spec
from flora_jax.report.table import DATA
from flora_jax.runs.budgets import PROBE, Finished, finished_models
from flora_jax.runs.checks import warn_of_remembered_images
from flora_jax.runs.model_files import report_models_once
from flora_jax.runs.workdir import TEST_IMAGES_FILE, Run, Step
from flora_jax.timing import busy_elsewhere, median_ratio, other_work
from flora_jax.weights import folder
from flora_jax.weights.export.engines import engine_of, onnx_runtime
from flora_jax.weights.export.latency import LatencyTable, time_specs
from flora_jax.weights.export.speed import measure

PerImage = dict[str, np.ndarray]


def evaluate(step: Step, models: None, latency: LatencyTable | None, is_pretrained: bool) -> None:
    """compares all models on the test images: result.json

    It is the only look at them.
    """
    run, images = step.run, step.images
    finished = list(finished_models(run))
    if "pretrain" in run.settings.stages and (run.folder / PROBE / folder.SPEC_FILE).exists():
        finished.insert(1, Finished("probe", "probe", PROBE, None))
    dense = None
    if "pretrain" in run.settings.stages:
        dense = folder.load_model(run.folder / "dense")
    test_set = images.measured(images.evaluation_set(images.splits.test), dense)
    entries, specs, found = {}, {}, {}
    for _, name, path, budget in finished:
        model = folder.load_model(run.folder / path)
        specs[name], found[name] = model.spec, evaluate_images(model, test_set)
        entries[name] = _entry(specs[name], test_set.quality, found[name])
        if name == "dense" and is_pretrained and images.are_labelled:
            heldout = images.heldout_set
            share = float(top1(model, heldout))
            numbers = heldout.num_images, entries[name]["top1"], test_set.num_images
            warn_of_remembered_images(share, *numbers)
        if budget is not None:
            entries[name]["budget"] = budget.shares
    labels = test_set.labels if run.spec.classifies else None
    save_images_once(run.folder / TEST_IMAGES_FILE, labels, found)
    for name, against in compare(found, baseline_pairs(found)).items():
        entries[name]["against"] = against
        if "dense" in against and run.spec.classifies:
            entries[name]["agreement"] = _agreement(found[name], found["dense"])
    times, timed_in = _milliseconds(run, latency, specs)
    for name, ms in times.items():
        entries[name]["ms"] = ms
    if "probe" in entries and "dense" in times:
        entries["probe"]["ms"] = times["dense"]  # the same network
    result: dict[str, Any] = {}
    for kind, name, _, budget in finished:
        if budget is None or budget.is_only:
            result[kind] = entries[name]
        else:
            result.setdefault(kind, []).append(entries[name])
    known = {}
    if images.splits.num_classes and labels is not None:
        known["commonest_class"] = commonest_share(labels)
    if images.copies:
        known["test_copies"] = images.copies[1]
    result[DATA] = known | {
        "classes": list(images.class_names) if images.are_labelled else [],
        "left_out": {
            "train": images.splits.train.left_out,
            "test": images.splits.test.left_out,
        },
        "test_images": test_set.num_images,
        "skipped_test_images": len(images.splits.test) - test_set.num_images,
    }
    if timed_in:
        result[DATA]["timed_in"] = timed_in
    write_json_once(run.folder / "result.json", result)
    about = known | {
        "dataset": run.settings.data.name,
        "test_images": test_set.num_images,
        "labels_of": "the dataset" if images.are_labelled else "the dense model",
    }
    report_models_once(run.folder, entries, {name: path for _, name, path, _ in finished}, about)


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


def _milliseconds(
    run: Run, latency: LatencyTable | None, specs: dict[str, Spec]
) -> tuple[dict[str, float], str]:
    """Times of the finished models, and what they are times of.

    That is the device of the table that the search used, on its scale, or ONNX Runtime, where it
    is installed.
    """
    if latency is not None:
        named = engine_of(latency.engine, run.settings.finetune.compute_dtype)
        times = time_specs(specs | {"dense": run.spec}, named, latency.batch_size)
        scaled = {n: latency.dense_ms * median_ratio(times[n], times["dense"]) for n in specs}
        return scaled, f"{named}, batch {latency.batch_size}"
    if (engine := onnx_runtime()) is None or not is_first():
        return {}, ""
    models = {n: folder.load_model(run.folder / path) for _, n, path, _ in finished_models(run)}
    cores_elsewhere = other_work()
    rows, _ = measure(models, [engine], [1], repeats=1)
    beside = busy_elsewhere(cores_elsewhere())
    timed_in = f"{engine}, batch 1{beside and ', while '}{beside}"
    return {row.model: row.ms for row in rows}, timed_in
