"""Closed form (ours): ranks allocated by measured sensitivity, without labels or training.

The factors are weighed by the second moments of what enters each layer, every choice of a layer is
tried on unlabelled images, and a knapsack over blocks picks the ranks of least total sensitivity
for each budget. `configs/minutes.py` runs this; FLORA's `improved` starts from it.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from flora_jax.closed_form.allocate import allocate_by, full_rank_sensitivity
from flora_jax.closed_form.calibrate import calibrate
from flora_jax.closed_form.sensitivity import Sensitivity
from flora_jax.cluster.processes import by_the_first, wait_for_all
from flora_jax.flora.extras.latency import LatencyTable
from flora_jax.flora.supernet import Supernet
from flora_jax.flora.svd import factorize
from flora_jax.io.files import read_json, write_json_once
from flora_jax.methods import shared
from flora_jax.methods.slim import slim_where_named
from flora_jax.models.network import Network
from flora_jax.models.spec import Spec
from flora_jax.runs.budgets import ALLOCATION_FILE, budgets_of
from flora_jax.runs.settings import (
    AllocationSettings,
    CalibrationSettings,
    SpaceSettings,
    Spending,
)
from flora_jax.runs.workdir import Result, Run, SavedJson, SavedSupernet, Step


def closed_form(run: Run) -> None:
    """Calibrate, allocate, cut out and fine-tune."""
    dense = shared.start(run)
    base = slim_where_named(run, dense)
    supernet = calibrated(run, base, otherwise=shared.inherited(run, base))
    latency = shared.latency_table(run, run.derived(_space_of, supernet))
    found = allocated(run, supernet, base, latency)
    shared.cut_and_finish(run, base, supernet, supernet, found, None, latency)


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


def _space_of(supernet: Supernet):
    return supernet.space


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
    file = step.directory / "sensitivity.json"
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
    wait_for_all("sensitivities are looked for")
    if not file.exists():
        write_json_once(file, [each.tolist() for each in full_rank_sensitivity(sensitivity)])
    return sensitivity, [np.array(each) for each in read_json(file)]


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
