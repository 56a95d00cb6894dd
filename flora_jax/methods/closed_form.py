"""Closed form (ours): smaller in minutes, without labels or training.

Head dimensions and MLP widths are allocated together for each budget, cut by second moments, and
all layers are fitted to the dense network's activations (`flora_jax/closed_form/compress.py`);
fine-tuning may follow. `configs/minutes.py` runs this, and `configs/yours.py` with longer training.

FLORA's `improved` takes two steps of here: factors weighed by what enters each layer, and ranks
allocated by measured sensitivity.
"""

import dataclasses
import logging
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from flora_jax.closed_form.allocate import allocate_by, full_rank_sensitivity
from flora_jax.closed_form.calibrate import calibrate, in_batches
from flora_jax.closed_form.compress import Plans
from flora_jax.closed_form.reduce import Shape, reduced_spec
from flora_jax.closed_form.sensitivity import Sensitivity
from flora_jax.cluster.processes import by_the_first
from flora_jax.flora.supernet import Supernet
from flora_jax.flora.svd import factorize
from flora_jax.io.files import read_json, write_json
from flora_jax.methods import shared
from flora_jax.methods.slim import slim_where_named
from flora_jax.models.network import Network
from flora_jax.models.spec import Spec
from flora_jax.runs.budgets import ALLOCATION_FILE, Budget, budgets_of
from flora_jax.runs.settings import (
    AllocationSettings,
    CalibrationSettings,
    CompressionSettings,
    SpaceSettings,
    Spending,
)
from flora_jax.runs.workdir import Result, Run, SavedJson, SavedSupernet, Step
from flora_jax.timing import median_ratio
from flora_jax.weights import folder
from flora_jax.weights.export.engines import Engine, engine_of
from flora_jax.weights.export.latency import LatencyTable, time_specs

log = logging.getLogger(__name__)

_ATTEMPTS, _ROUNDS = 4, 24  # to meet a budget of milliseconds; of each measurement


def closed_form(run: Run) -> None:
    """Allocate, cut and fit, then fine-tune."""
    dense = shared.start(run)
    base = slim_where_named(run, dense)
    latency = shared.latency_table(run, base)
    cut = run.step(
        "compress",
        compress_to_budgets,
        *(base, run.spec, run.settings.spending, latency, run.settings.compression),
    )
    shared.tune_and_finish(run, base, cut, latency)


def compress_to_budgets(
    step: Step,
    base: Network,
    dense: Spec,
    spending: Spending,
    latency: LatencyTable | None,
    settings: CompressionSettings,
) -> None:
    """closed form: cuts heads and MLPs, and fits what is left, for each budget"""
    images, budgets = step.images, budgets_of(spending, dense, latency)
    normalize = images.train_set.normalization
    every = np.concatenate(list(images.without_augmentation(settings.images, "compress")))
    batches = in_batches(every, base.spec)
    plans = Plans.of(base, batches, normalize=normalize, directory=step.directory / "calibration")
    for budget in budgets:
        place = step.directory / budget.folder("subnet")
        if (place / folder.SPEC_FILE).exists():
            continue
        if latency is None:
            shapes = plans.shapes([budget.window[1]])[0]
        else:
            engine = engine_of(latency.engine, step.run.settings.finetune.compute_dtype)
            file = step.directory / f"{place.name}_shapes.json"
            save_shapes_in_time_once(file, plans, budget, latency, engine, dense)
            shapes = [Shape(*sizes) for sizes in read_json(file)]
        model = plans.network(
            shapes, ridge=settings.ridge, directory=step.directory / f"{place.name}_blocks"
        )
        log.info(
            "%s: %.1f %% of the multiply-adds; heads of %s dimensions, MLPs of %s units",
            *(budget.name("subnet"), 100 * model.spec.macs() / dense.macs()),
            *(", ".join(str(size) for size in sizes) for sizes in zip(*shapes, strict=True)),
        )
        folder.save_once(model, place)
        _delete_once(step.directory / f"{place.name}_blocks")
    _delete_once(step.directory / "calibration")


@by_the_first
def save_shapes_in_time_once(
    file: epath.Path,
    plans: Plans,
    budget: Budget,
    table: LatencyTable,
    engine: Engine,
    dense: Spec,
) -> None:
    """Writes the shapes for a budget of milliseconds, unless they are there already.

    They are measured as a whole, and chosen again where the table was off. No two measurements are
    alike: what is written is what all processes, and an interrupted fit, go on with.
    """
    if file.exists():
        return
    low, high = budget.shares
    middle, target = (low + high) / 2, high
    tried: list[tuple[float, float, list[Shape]]] = []
    while not tried or (tried[-1][0] > high - middle and len(tried) < _ATTEMPTS):
        most = max(round(1e6 * table.dense_ms * target), table.cost.least)
        shapes = plans.shapes([most], table.cost)[0]
        specs = {"dense": dense, "subnet": reduced_spec(plans.model.spec, shapes)}
        times = time_specs(specs, engine, table.batch_size, _ROUNDS)
        share = median_ratio(times["subnet"], times["dense"])
        log.info(
            "%s: %.3f of the dense model's milliseconds in %s where the table says %.3f",
            *(budget.name("subnet"), share, engine, target),
        )
        tried.append((abs(share - middle), share, shapes))
        # What is saved is off by a factor; from here on it aims at the middle.
        target = 1 - (1 - middle) * (1 - target) / max(1 - share, 1 - high)
    _, share, shapes = min(tried)
    if not low <= share <= high:
        log.warning("budget.latency (%g, %g): the nearest that came out is %.3f", low, high, share)
    write_json(file, shapes)


def calibrated(run: Run, base: Result, otherwise: Result) -> Result:
    """The supernet with factors weighed by what enters each layer, or another."""
    return run.step(
        "calibrate",
        weigh_factors,
        *(base, run.settings.space, run.settings.calibration),
        saved=SavedSupernet("inherited"),
        otherwise=otherwise,
    )


def allocated(run: Run, supernet: Result, base: Result, latency: Result | None) -> Result | None:
    """The subnets of least measured sensitivity, one a budget; None where none are allocated."""
    settings = run.settings
    return run.step(
        "allocate",
        allocate_ranks,
        *(supernet, base, run.spec, settings.spending, latency, settings.allocation),
        saved=SavedJson(ALLOCATION_FILE),
    )


def allocate_ranks(
    step: Step,
    supernet: Supernet,
    base: Network,
    dense: Spec,
    spending: Spending,
    latency: LatencyTable | None,
    settings: AllocationSettings,
) -> list[dict[str, Any]]:
    """finds ranks by measured sensitivity, without training"""
    space = supernet.space
    cost = space.macs_cost if latency is None else latency.cost
    file = step.directory / "sensitivity.jsonl"
    sensitivity, found = measured_sensitivity(step, supernet, base, settings, file)
    most = [budget.window[1] for budget in budgets_of(spending, dense, latency)]
    return [
        {
            "genes": genes.tolist(),
            "macs": int(space.macs(genes)),
            "ranks": space.ranks(genes).tolist(),
        }
        for genes in allocate_by(sensitivity, found, cost, most)
    ]


def measured_sensitivity(
    step: Step, supernet: Supernet, base: Network, settings: AllocationSettings, file: epath.Path
) -> tuple[Sensitivity, list[np.ndarray]]:
    """The measure, and the sensitivity of each layer to each of its choices, kept in a file."""
    normalization = step.images.train_set.normalization
    batches = step.images.unseen(settings.images, "allocate")
    normalized = (np.asarray(normalization(jnp.asarray(batch))) for batch in batches)
    sensitivity = Sensitivity(supernet, normalized, reference=base)
    return sensitivity, full_rank_sensitivity(sensitivity, file)


def weigh_factors(
    step: Step, base: Network, space: SpaceSettings, settings: CalibrationSettings
) -> Supernet:
    """weighs the supernet's factors by what enters each layer"""
    calibration = None
    if settings.images:
        images, normalize = step.images, step.images.train_set.normalization
        every = np.concatenate(list(images.without_augmentation(settings.images, "calibrate")))
        batches = in_batches(every, base.spec)
        calibration = calibrate(base, batches, directory=step.directory, normalize=normalize)
        calibration = dataclasses.replace(calibration, shrinkage=settings.shrinkage)
    supernet = factorize(base, space.of(base.spec), calibration=calibration)
    _delete_once(step.directory)
    return supernet


@by_the_first
def _delete_once(directory: epath.Path) -> None:
    if directory.exists():
        directory.rmtree()
