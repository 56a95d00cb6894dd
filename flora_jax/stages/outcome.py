"""Where a run ends: its models on the test split, the table and the pictures."""

import json

import numpy as np
from etils import epath

from flora_jax.evaluation import top1
from flora_jax.io import folder
from flora_jax.io.files import read_json, write_json
from flora_jax.models.spec import Spec
from flora_jax.processes import by_the_first
from flora_jax.report import plots, slim_plots, table
from flora_jax.run import Run
from flora_jax.search.history import read_history
from flora_jax.search.latency import measure_networks, median_ratio
from flora_jax.stages.slim import choose_masks, trained_gates


def evaluate(run: Run) -> None:
    """The only look at the test split."""
    test_set = run.evaluation_set(run.splits.test)
    result, specs = {}, {}
    for name, path in _models(run).items():
        model = folder.load(path)
        result[name] = {
            "top1": top1(model, test_set),
            "macs": model.spec.macs(),
            "params": model.spec.num_params(),
        }
        specs[name] = model.spec
    if run.spends_latency:
        for name, ms in _milliseconds(run, specs).items():
            result[name]["ms"] = ms
    write_json(run.folder / "result.json", result)


def _milliseconds(run: Run, specs: dict[str, Spec]) -> dict[str, float]:
    """Of the finished models, on the scale of the table that the search used."""
    table = run.latency_table
    times = measure_networks(specs | {"dense": run.spec}, table.batch_size, table.dtype)
    return {name: table.dense_ms * median_ratio(times[name], times["dense"]) for name in specs}


def _models(run: Run) -> dict[str, epath.Path]:
    """The finished models of the configured stages."""
    stages, names = run.config.stages, {}
    for stage, name in (("pretrain", "dense"), ("slim", "slim"), ("transfer", "transfer")):
        if stage in stages:
            names[name] = name
    if "finetune" in stages:
        names["subnet"] = "subnet"
        if run.config.uniform_baseline != "none":
            names["uniform"] = "uniform"
    elif "extract" in stages:
        names["subnet"] = "extract/subnet"
    return {name: run.folder / path for name, path in names.items()}


def report(run: Run) -> None:
    """The table on the terminal and the pictures in the folder."""
    result = read_json(run.folder / "result.json")
    pictures = []
    if "slim" in run.config.stages:
        pictures.append(run.folder / "slim.png")
        plots.save_figure(_slim_figure(run), pictures[-1])
    if "extract" in run.config.stages:
        pictures.append(run.folder / "report.png")
        plots.save_figure(_search_figure(run, result), pictures[-1])
    _show(result, pictures)


@by_the_first
def _show(result: dict, pictures: list[epath.Path]) -> None:
    print(f"\n{table.comparison_table(result)}\n")
    for picture in pictures:
        print(f"Picture: {picture}")


def _slim_figure(run: Run):
    gated = trained_gates(run)
    batch, _, _ = next(run.heldout_set.batches)
    return slim_plots.slim_figure(
        gated.gates(),
        choose_masks(run, gated),
        image=run.normalization.invert(np.asarray(batch[0], np.float32)),
        num_prefix_tokens=run.spec.num_prefix_tokens,
        title=f"{run.folder.name}: gates and what they leave",
    )


def _search_figure(run: Run, result: dict):
    candidates = read_history(run.folder / "search/history.jsonl")
    cost, unit, window = "macs", 1, run.macs_window
    if run.spends_latency:
        cost, unit, window = "ms", 1e6, run.latency_window
    subnet = folder.load(run.folder / "extract/subnet").spec
    full_ranks = [layer.full_rank for layer in run.base.spec.layers]
    uniform_ratio = None
    if run.config.uniform_baseline != "none":
        uniform_ratio = run.uniform_ranks[0] / full_ranks[0]
    return plots.report_figure(
        candidates={
            cost: [candidate.cost / unit for candidate in candidates],
            "top1": [candidate.top1 for candidate in candidates],
            "generation": [candidate.generation for candidate in candidates],
        },
        points={name: (row[cost], row["top1"]) for name, row in result.items()},
        window=tuple(bound / unit for bound in window),
        ranks=subnet.ranks,
        full_ranks=full_ranks,
        curves=_loss_curves(run.folder),
        uniform_ratio=uniform_ratio,
        title=f"{run.folder.name}: {table.human_count(subnet.macs())} of "
        f"{table.human_count(run.spec.macs())} multiply-adds",
    )


def _loss_curves(directory: epath.Path) -> dict[str, tuple[list[int], list[float]]]:
    """Loss by step of the long stages, averaged over about 1 % of the stage."""
    curves = {}
    for name in ("pretrain", "slim/retrain", "supernet", "finetune/uniform", "finetune/subnet"):
        path = directory / name / "metrics.jsonl"
        if path.exists():
            losses = np.array([json.loads(line)["loss"] for line in path.read_text().splitlines()])
            parts = np.array_split(losses, min(100, len(losses)))
            steps = np.cumsum([len(part) for part in parts])
            curves[name] = (steps.tolist(), [float(part.mean()) for part in parts])
    return curves
