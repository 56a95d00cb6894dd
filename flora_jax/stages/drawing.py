"""What the stages of a run have left to draw, however far it has come."""

import numpy as np
from etils import epath

from flora_jax.evaluation.quality import Metric, quality_of
from flora_jax.flora.evolution import Candidate, read_history
from flora_jax.io.files import matching
from flora_jax.io.json_lines import read_lines, read_records
from flora_jax.io.paths import as_text
from flora_jax.report.drawn import Curve, Drawn
from flora_jax.report.table import human_count, named_entries
from flora_jax.runs.budgets import (
    LATENCY_FILE,
    load_budgets,
    load_every_candidate,
    load_uniform_ranks,
)
from flora_jax.runs.workdir import Run
from flora_jax.training.metrics import METRICS_FILE
from flora_jax.weights import folder

_HISTORY = "search/history.jsonl"


def drawn_of(run: Run, result: dict) -> Drawn:
    """Reads what there is to draw.

    Args:
      result: as in result.json; empty as long as nothing is evaluated.
    """
    cost, unit = ("ms", 1e6) if run.settings.spends_latency else ("macs", 1)
    shown, metrics = quality_of(run.spec).shown, _metrics(run.folder)
    candidates = _candidates(run.folder / _HISTORY)
    finds_ranks = run.settings.finds_ranks and is_budget_known(run)
    budgets = load_budgets(run) if finds_ranks else []
    specs = {
        budget.name("subnet"): folder.load_spec(path)
        for budget in budgets
        if ((path := run.folder / "extract" / budget.folder("subnet")) / folder.SPEC_FILE).exists()
    }
    is_extracted = bool(specs) and len(specs) == len(budgets)
    space = load_every_candidate(run) if is_extracted else None
    full_ranks = [layer.full_rank for layer in space.spec.layers] if space else []
    uniform_ratios = None
    if space and run.settings.uniform_baseline != "none":
        uniform_ratios = [ranks[0] / full_ranks[0] for ranks in load_uniform_ranks(run)]
    title = as_text(run.folder.name)
    if is_extracted:
        macs = ", ".join(human_count(spec.macs()) for spec in specs.values())
        title += f": {macs} of {human_count(run.spec.macs())} multiply-adds"
    return Drawn(
        title=title,
        metric=shown,
        cost=cost,
        points={
            name: (row[cost], row[shown.name])
            for name, row in named_entries(result).items()
            if {cost, shown.name} <= set(row)
        },
        candidates={
            cost: [candidate.cost / unit for candidate in candidates],
            shown.name: [candidate.metrics[shown.name] for candidate in candidates],
            "generation": [candidate.generation for candidate in candidates],
        },
        windows=[(low / unit, high / unit) for low, high in (b.window for b in budgets)],
        ranks={name: spec.ranks for name, spec in specs.items()} if is_extracted else {},
        full_ranks=full_ranks,
        uniform_ratios=uniform_ratios,
        curves=_loss_curves(metrics),
        accuracies=_looks(metrics, shown),
    )


def is_budget_known(run: Run) -> bool:
    """Whether the budgets can be read: those of latency are measured while the run goes on."""
    return not run.settings.spends_latency or (run.folder / LATENCY_FILE).exists()


def _candidates(path: epath.Path) -> list[Candidate]:
    """Those whose scores can be drawn beside each other."""
    found = read_history(path) if read_lines(path) else []
    return [candidate for candidate in found if candidate.has_seen_all]


def _metrics(directory: epath.Path) -> dict[str, list[dict]]:
    """The records of the long trainings, a step each, in the order of the stages."""
    patterns = ("pretrain", "slim/retrain", "supernet", "finetune/*")
    files = (f for p in patterns for f in matching(directory, f"{p}/{METRICS_FILE}"))
    found = {str(file.parent.relative_to(directory)): read_records(file) for file in files}
    return {name: records for name, records in found.items() if records}


def _loss_curves(metrics: dict[str, list[dict]]) -> dict[str, Curve]:
    """Loss by step, averaged over about 1 % of the stage."""
    curves: dict[str, Curve] = {}
    for name, records in metrics.items():
        losses = np.array([record["loss"] for record in records])
        parts = np.array_split(losses, min(100, len(losses)))
        steps = np.cumsum([len(part) for part in parts])
        curves[name] = (steps.tolist(), [float(part.mean()) for part in parts])
    return curves


def _looks(metrics: dict[str, list[dict]], shown: Metric) -> dict[str, dict[str, Curve]]:
    """A held-out metric by step, of a plain model under "" and of a supernet by subnet."""
    prefix = f"heldout_{shown.name}"
    found: dict[str, dict[str, Curve]] = {}
    for stage, records in metrics.items():
        found[stage] = {}
        evaluated = [record for record in records if prefix in record]
        steps = [record["step"] + 1 for record in evaluated]
        for key in (key for key in (evaluated or [{}])[0] if key.startswith(prefix)):
            subnet = key.removeprefix(prefix).removeprefix("_")
            found[stage][subnet] = (steps, [record[key] for record in evaluated])
    return found
