"""FLORA (Chang et al., WACV 2024, arXiv 2311.03912): low-rank architecture search.

Every large Linear becomes a pair of factors, candidates are filtered block by block, one supernet
that holds every rank configuration is trained, evolution searches the ranks under a budget, and the
winner is cut out and fine-tuned. Published: DeiT-B at 8.04 G of 17.57 G multiply-adds with 81.85 %
top-1 (dense 81.8 %). `configs/deit_b.py` runs exactly this; what is ours is a step or a setting
beside it that `configs/deit_b.py:improved` switches on:

    calibrate   factors weighed by what enters each layer, in place of the plain SVD
    allocate    ranks by measured sensitivity, from which the search starts and which it must beat
    slim        FLORA on what ViT-Slim leaves (the paper's section on slimmed models)
    search.halving, supernet_sampling, search.budget="latency"
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flora_jax.closed_form.allocate import multiplier_path
from flora_jax.flora.evolution import EvolutionSettings, image_scores, search
from flora_jax.flora.extras.halving import ImageScores
from flora_jax.flora.extras.sampling import nested, sandwich
from flora_jax.flora.extras.warm_start import SURE, first_population, lead
from flora_jax.flora.filter import filter_space
from flora_jax.flora.sampling import SAMPLINGS
from flora_jax.flora.space import RankSpace
from flora_jax.flora.supernet import Supernet
from flora_jax.methods import closed_form, shared
from flora_jax.methods.slim import slim_where_named
from flora_jax.models.network import Network
from flora_jax.models.spec import Spec
from flora_jax.runs.budgets import (
    ALLOCATED,
    SEARCHED,
    WINNERS_FILE,
    budgets_of,
    read_found,
)
from flora_jax.runs.settings import (
    AllocationSettings,
    FilterSettings,
    SpaceSettings,
    Spending,
)
from flora_jax.runs.workdir import Run, SavedJson, SavedSpace, SavedSupernet, Step, Unhashed
from flora_jax.training.settings import Recipe
from flora_jax.training.train import train
from flora_jax.weights import folder
from flora_jax.weights.export.engines import engine_of
from flora_jax.weights.export.latency import LatencyTable, check_prediction

log = logging.getLogger(__name__)


def flora(run: Run) -> None:
    """Factorise, filter, train the supernet, search, cut out and fine-tune."""
    settings, spending = run.settings, run.settings.spending
    dense = shared.start(run)
    base = slim_where_named(run, dense)
    inherited = closed_form.calibrated(run, base, otherwise=shared.inherited(run, base))
    macs = tuple(high for _, high in settings.budget.windows("macs"))
    candidates = run.step(
        "filter",
        filter_candidates,
        *(inherited, base, dense, settings.filter, settings.metric, Unhashed(macs)),
        saved=SavedSpace("filter/space.json"),
        otherwise=run.derived(every_candidate, base, settings.space),
    )
    untrained = run.derived(restricted, inherited, candidates)
    needs_sensitivity = settings.supernet_sampling == "nested"
    supernet = run.step(
        "supernet",
        train_supernet,
        *(untrained, base, dense, settings.supernet, settings.supernet_sampling),
        *(settings.allocation if needs_sensitivity else None, run.metric_of(settings.supernet)),
        saved=SavedSupernet("supernet", is_trained=True),
        otherwise=untrained,
    )
    latency = shared.latency_table(run, candidates)
    allocated = closed_form.allocated(run, supernet, base, latency)
    winners = run.step(
        "search",
        search_subnets,
        *(supernet, dense, run.spec, spending, latency, allocated),
        *(settings.search.evolution, settings.search.halving, settings.metric),
        saved=SavedJson(WINNERS_FILE),
        otherwise=allocated,
    )
    shared.cut_and_finish(run, base, inherited, supernet, winners, allocated, latency)


def every_candidate(base: Network, space: SpaceSettings) -> RankSpace:
    """The space of every rank triple."""
    return space.of(base.spec)


def restricted(supernet: Supernet, space: RankSpace) -> Supernet:
    """The supernet of the candidates that are left."""
    return Supernet(supernet.network, space)


def filter_candidates(
    step: Step,
    inherited: Supernet,
    base: Network,
    dense: Network,
    settings: FilterSettings,
    metric: str,
    budgets: Sequence[float],
) -> RankSpace:
    """FLORA: keeps the best rank triples of each block"""
    place = step.training()
    del place["name"], place["watch"]  # each block has its own
    return filter_space(
        inherited,
        step.images.part_of_train_set(settings.train_fraction),
        step.images.measured(step.images.heldout_set, dense),
        [round(share * dense.spec.macs()) for share in budgets],
        settings.train,
        teacher=base,
        drop=settings.drop,
        metric=metric,
        watch_of=step.watch,
        **place,
    )


def train_supernet(
    step: Step,
    supernet: Supernet,
    base: Network,
    dense: Network,
    recipe: Recipe,
    sampling: str,
    allocation: AllocationSettings | None,
    metric: str,
) -> Supernet:
    """FLORA: trains all subnets at once"""
    folder.save_description_once(supernet, step.directory)
    sample: Any = sampling
    if sampling not in SAMPLINGS:
        space, seed = supernet.space, step.seed_of("supernet/genes")
        sample = sandwich(space, seed)
        if allocation is not None:
            file = step.directory / "sensitivity.jsonl"
            _, drops = closed_form.measured_sensitivity(step, supernet, base, allocation, file)
            sample = nested(space, multiplier_path(drops, space.macs_cost), seed)
    return train(
        supernet,
        step.images.train_set,
        recipe,
        **step.training(),
        teacher=base,
        sample=sample,
        heldout=step.images.looked_at(dense),
        metric=metric,
    )


def search_subnets(
    step: Step,
    supernet: Supernet,
    dense: Network,
    dense_spec: Spec,
    spending: Spending,
    latency: LatencyTable | None,
    allocated: list | None,
    settings: EvolutionSettings,
    halving: bool,
    metric: str,
) -> list | dict:
    """FLORA: evolves the best subnet for each budget

    Where ranks were allocated, these stay unless those of the search are surely better.
    """
    space, images = supernet.space, step.images
    cost = space.macs_cost if latency is None else latency.cost
    budgets = budgets_of(spending, dense_spec, latency)
    parts = images.heldout_parts if halving else images.heldout_set
    heldout = images.measured(parts, dense)
    scores = image_scores(supernet, heldout, metric, halving=halving)
    shown = heldout.quality.shown.name
    genes = [np.array(each.genes, np.int32) for each in read_found(allocated or [])]
    first = None
    if genes:
        rng = np.random.default_rng(step.seed_of("search/first"))
        first = first_population(space, genes, settings.population, rng)
    winners = search(
        space,
        scores,
        cost,
        [budget.window for budget in budgets],
        settings,
        step.seed_of("search"),
        step.directory / "history.jsonl",
        first=first,
        shown=shown,
        watch=step.watch("search"),
    )
    found = [
        {"generation": best.generation} | _entry(space, best.genes, best.score, best.metrics)
        for best in winners
    ]
    for i, own in enumerate(genes):
        low, high = budgets[i].window
        if low <= cost(own) <= high:
            found[i] = _better(space, scores, budgets[i].name("subnet"), found[i], own, shown)
    if latency is not None:
        engine = engine_of(latency.engine, step.run.settings.finetune.compute_dtype)
        for entry in found:
            own = np.array(entry["genes"])
            spec, predicted = space.extracted_spec(own), int(cost(own))
            entry["latency"] = check_prediction(latency, engine, dense_spec, spec, predicted)
    return found if len(found) > 1 else found[0]


def _entry(
    space: RankSpace, genes: Sequence[int], score: float, metrics: Mapping[str, float]
) -> dict[str, Any]:
    """A subnet that was found, as it is written."""
    return {
        "genes": list(genes),
        "macs": int(space.macs(genes)),
        "score": score,
        **metrics,
        "ranks": space.ranks(genes).tolist(),
    }


def _better(
    space: RankSpace,
    scores: ImageScores,
    name: str,
    searched: dict[str, Any],
    allocated: np.ndarray,
    shown: str,
) -> dict[str, Any]:
    """The entry of the search's winner, if it is surely ahead of the allocation, else of that."""
    found = lead(scores, searched["genes"], allocated.tolist())
    log.info(
        "%s: the best of the search is ahead of the allocated ranks by %.4g (%.4g..%.4g, %g "
        "standard errors) on %d held-out images: %s",
        *(name, *found.ahead, SURE, scores.num_images),
        "it is chosen" if found.is_sure else "the allocated ranks stay",
    )
    if found.is_sure:
        return searched | {"chosen": SEARCHED, "ahead": found.ahead}
    own = _entry(space, allocated.tolist(), found.score, {shown: found.shown})
    return own | {"chosen": ALLOCATED, "ahead": found.ahead, "searched": searched}
