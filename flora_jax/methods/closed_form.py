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
from flora_jax.closed_form.calibrate import calibrate
from flora_jax.closed_form.compress import Plans
from flora_jax.closed_form.sensitivity import Sensitivity
from flora_jax.cluster.processes import by_the_first
from flora_jax.flora.extras.latency import LatencyTable
from flora_jax.flora.supernet import Supernet
from flora_jax.flora.svd import factorize
from flora_jax.methods import shared
from flora_jax.methods.slim import slim_where_named
from flora_jax.models.network import Network
from flora_jax.models.spec import Spec
from flora_jax.runs.budgets import ALLOCATION_FILE, budgets_of
from flora_jax.runs.settings import (
    AllocationSettings,
    CalibrationSettings,
    CompressionSettings,
    SpaceSettings,
    Spending,
)
from flora_jax.runs.workdir import Result, Run, SavedJson, SavedSupernet, Step
from flora_jax.weights import folder

log = logging.getLogger(__name__)


def closed_form(run: Run) -> None:
    """Allocate, cut and fit, then fine-tune."""
    dense = shared.start(run)
    base = slim_where_named(run, dense)
    cut = run.step(
        "compress",
        compress_to_budgets,
        *(base, run.spec, run.settings.spending, run.settings.compression),
    )
    shared.tune_and_finish(run, base, cut)


def compress_to_budgets(
    step: Step, base: Network, dense: Spec, spending: Spending, settings: CompressionSettings
) -> None:
    """closed form: cuts heads and MLPs, and fits what is left, for each budget"""
    images, budgets = step.images, budgets_of(spending, dense)
    normalize = images.train_set.normalization
    batches = list(images.without_augmentation(settings.images, "compress"))
    plans = Plans.of(base, batches, normalize=normalize, directory=step.directory / "calibration")
    for budget in budgets:
        place = step.directory / budget.folder("subnet")
        if (place / folder.SPEC_FILE).exists():
            continue
        shapes = plans.shapes([budget.window[1]])[0]
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
        batches = images.without_augmentation(settings.images, "calibrate")
        calibration = calibrate(base, batches, directory=step.directory, normalize=normalize)
        calibration = dataclasses.replace(calibration, shrinkage=settings.shrinkage)
    supernet = factorize(base, space.of(base.spec), calibration=calibration)
    _delete_once(step.directory)
    return supernet


@by_the_first
def _delete_once(directory: epath.Path) -> None:
    if directory.exists():
        directory.rmtree()
