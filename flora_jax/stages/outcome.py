"""Where a run ends: its models on the test split, the table and the pictures."""

import logging
from typing import Any

import numpy as np
from etils import epath
from matplotlib.figure import Figure
from safetensors import numpy as safetensors

from flora_jax.cluster.processes import by_the_first
from flora_jax.comparison import baseline_pairs, compare
from flora_jax.evaluation import evaluate_images, top1
from flora_jax.io.files import matching, read_json, replacing, write_json_once
from flora_jax.io.json_lines import read_records
from flora_jax.io.paths import as_text
from flora_jax.models.spec import Spec
from flora_jax.quality import Metric, Quality, quality_of
from flora_jax.report import plots, slim_plots, table
from flora_jax.search.history import read_history
from flora_jax.search.latency import measure_networks
from flora_jax.slim.masks import read_decision
from flora_jax.stages.budget import (
    finished_models,
    load_budgets,
    load_latency_table,
    load_uniform_ranks,
)
from flora_jax.stages.companions import report_models_once
from flora_jax.stages.doubts import doubt_heldout
from flora_jax.stages.images import Images
from flora_jax.stages.measured import measured
from flora_jax.stages.run import Run, load_regular_space
from flora_jax.stages.slim import DECISION_FILE
from flora_jax.timing import median_ratio
from flora_jax.training.metrics import METRICS_FILE
from flora_jax.weights import folder

log = logging.getLogger(__name__)
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
    result[table.DATA] = {
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


def report(run: Run, images: Images) -> None:
    """Prints the table and draws the pictures, out of what the stages have saved."""
    result, figures = read_json(run.folder / "result.json"), {}
    if "slim" in run.settings.stages:
        if (run.folder / DECISION_FILE).exists():
            figures["slim.png"] = _slim_figure(run, images)
        else:
            log.warning(
                "no picture of the slimming: %s is missing, because an earlier version of "
                "flora_jax slimmed this model",
                run.folder / DECISION_FILE,
            )
    if "extract" in run.settings.stages:
        figures["report.png"] = _search_figure(run, result)
    _show_once(run.folder, result, figures)


@by_the_first
def _show_once(directory: epath.Path, result: dict, figures: dict[str, Figure]) -> None:
    print(f"\n{table.comparison_table(result)}\n")
    if skipped := result.get(table.DATA, {}).get("skipped_test_images"):
        print(f"{skipped} test images could not be decoded and count for no model.\n")
    for name, figure in figures.items():
        plots.save_figure(figure, directory / name)
        print(f"Picture: {directory / name}")


def _slim_figure(run: Run, images: Images) -> Figure:
    gates, masks = read_decision(run.folder / DECISION_FILE)
    batch, _, _ = next(images.heldout_set.batches)
    image = np.asarray(batch[0], np.float32)
    return slim_plots.slim_figure(
        gates,
        masks,
        image=run.settings.data.normalization.invert(image),
        num_prefix_tokens=run.spec.num_prefix_tokens,
        title=f"{as_text(run.folder.name)}: gates and what they leave",
    )


def _search_figure(run: Run, result: dict) -> Figure:
    history = run.folder / "search/history.jsonl"
    candidates = read_history(history) if "search" in run.settings.stages else []
    cost, unit = ("ms", 1e6) if run.settings.spends_latency else ("macs", 1)
    space, budgets = load_regular_space(run), load_budgets(run)
    windows = [budget.window for budget in budgets]
    full_ranks = [layer.full_rank for layer in space.spec.layers]
    subnets = {
        budget.name("subnet"): folder.load_spec(run.folder / "extract" / budget.folder("subnet"))
        for budget in budgets
    }
    metrics, shown = _metrics(run.folder), quality_of(run.spec).shown
    uniform_ratios = None
    if run.settings.uniform_baseline != "none":
        uniform_ratios = [r[0] / full_ranks[0] for r in load_uniform_ranks(run, space)]
    return plots.report_figure(
        candidates={
            cost: [candidate.cost / unit for candidate in candidates],
            shown.name: [candidate.metrics[shown.name] for candidate in candidates],
            "generation": [candidate.generation for candidate in candidates],
        },
        points={
            name: (row[cost], row[shown.name]) for name, row in table.named_entries(result).items()
        },
        windows=[(low / unit, high / unit) for low, high in windows],
        ranks={name: spec.ranks for name, spec in subnets.items()},
        full_ranks=full_ranks,
        curves=_loss_curves(metrics),
        accuracies=_looks(metrics, shown),
        metric=shown,
        uniform_ratios=uniform_ratios,
        title=f"{as_text(run.folder.name)}: "
        + ", ".join(table.human_count(spec.macs()) for spec in subnets.values())
        + f" of {table.human_count(run.spec.macs())} multiply-adds",
    )


def _metrics(directory: epath.Path) -> dict[str, list[dict]]:
    """The records of the long trainings, a step each, in the order of the stages."""
    patterns = ("pretrain", "slim/retrain", "supernet", "finetune/*")
    files = (f for p in patterns for f in matching(directory, f"{p}/{METRICS_FILE}"))
    found = {str(file.parent.relative_to(directory)): read_records(file) for file in files}
    return {name: records for name, records in found.items() if records}


def _loss_curves(metrics: dict[str, list[dict]]) -> dict[str, plots.Curve]:
    """Loss by step, averaged over about 1 % of the stage."""
    curves: dict[str, plots.Curve] = {}
    for name, records in metrics.items():
        losses = np.array([record["loss"] for record in records])
        parts = np.array_split(losses, min(100, len(losses)))
        steps = np.cumsum([len(part) for part in parts])
        curves[name] = (steps.tolist(), [float(part.mean()) for part in parts])
    return curves


def _looks(metrics: dict[str, list[dict]], shown: Metric) -> dict[str, dict[str, plots.Curve]]:
    """A held-out metric by step, of a plain model under "" and of a supernet by subnet."""
    prefix = f"heldout_{shown.name}"
    found: dict[str, dict[str, plots.Curve]] = {}
    for stage, records in metrics.items():
        found[stage] = {}
        evaluated = [record for record in records if prefix in record]
        steps = [record["step"] + 1 for record in evaluated]
        for key in (key for key in (evaluated or [{}])[0] if key.startswith(prefix)):
            subnet = key.removeprefix(prefix).removeprefix("_")
            found[stage][subnet] = (steps, [record[key] for record in evaluated])
    return found
