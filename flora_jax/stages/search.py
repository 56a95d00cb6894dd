"""The search: subnets inside the window of each budget, ranked on held-out images."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flora_jax.cluster.processes import StopRequest
from flora_jax.flora.cost import Cost
from flora_jax.flora.evolution import evolve
from flora_jax.flora.extras.halving import ImageScores
from flora_jax.flora.extras.latency import LatencyTable, measure_networks
from flora_jax.flora.history import Candidate
from flora_jax.flora.image_scores import image_scores
from flora_jax.flora.proposals import neighbours
from flora_jax.flora.space import RankSpace
from flora_jax.flora.supernet import Supernet
from flora_jax.io.files import write_json_once
from flora_jax.io.json_lines import read_lines
from flora_jax.models.spec import Spec
from flora_jax.progress import Progress
from flora_jax.runs.images import Images
from flora_jax.stages.budget import (
    ALLOCATED,
    ALLOCATION_FILE,
    SEARCHED,
    WINNERS_FILE,
    Budget,
    budget_cost,
    load_budgets,
    load_found,
    load_latency_table,
)
from flora_jax.stages.measured import heldout_parts
from flora_jax.stages.run import Run, load_shared, load_space
from flora_jax.timing import median_ratio
from flora_jax.training.watch import watching

log = logging.getLogger(__name__)

# The winner is the best of hundreds on the very images that it is compared on: of 300 that are no
# better, one leads by 1.8 standard errors in every second search (docs/decisions.md).
SURE = 2.0


def search(run: Run, images: Images) -> None:
    """Evolves subnets inside the window of each budget, scored on held-out images.

    Where ranks were allocated, these stay unless those of the search are surely better.
    """
    space = load_space(run)
    supernet = Supernet(load_shared(run).network, space)
    cost, budgets = budget_cost(run, space), load_budgets(run)
    heldout, halving = heldout_parts(run, images), run.settings.search.halving
    scores = image_scores(supernet, heldout, run.settings.metric, halving=halving)
    shown = heldout.quality.shown.name

    winners = _evolve(run, space, scores, cost, budgets, shown)
    found = [
        {"generation": best.generation} | _entry(space, best.genes, best.score, best.metrics)
        for best in winners
    ]
    if "allocate" in run.settings.stages:
        for i, allocation in enumerate(load_found(run, ALLOCATION_FILE)):
            low, high = budgets[i].window
            if low <= cost(np.array(allocation.genes)) <= high:
                found[i] = better(space, scores, budgets[i], found[i], allocation.genes, shown)
    if run.settings.spends_latency:
        table = load_latency_table(run)
        for entry in found:
            genes = np.array(entry["genes"])
            subnet, predicted = space.extracted_spec(genes), int(cost(genes))
            entry["latency"] = _check_prediction(table, run.spec, subnet, predicted)
    write_json_once(run.folder / WINNERS_FILE, found if len(found) > 1 else found[0])


def _evolve(
    run: Run,
    space: RankSpace,
    scores: ImageScores,
    cost: Cost,
    budgets: Sequence[Budget],
    shown: str,
) -> list[Candidate]:
    """The winner of each budget; goes on where the history ends."""
    settings, history = run.settings.search, run.folder / "search/history.jsonl"
    total, start = settings.generations, max(0, len(read_lines(history)) - 1)  # behind the header
    if start:
        log.info("search: goes on at generation %d of %d", start, total)
    with (
        StopRequest() as stop_request,
        watching(run.settings.watch, run.folder, "search")(start) as write,
        Progress("search", total=total, start=start, unit="generation") as progress,
    ):

        def on_generation(generation: int, members: list[Candidate]) -> None:
            seen_all = [member.metrics[shown] for member in members if member.has_seen_all]
            best = {f"best_{shown}": max(seen_all)} if seen_all else {}
            share = sum(member.share for member in members) / len(members)
            progress.update(1, **best, images_seen=share)
            if best:
                write([{"step": generation, **best}])
            if stop_request.is_set():
                raise stop_request.stopped(
                    f"search is saved at generation {generation + 1} of {total}"
                )

        return evolve(
            space,
            scores,
            cost,
            [budget.window for budget in budgets],
            settings.evolution,
            run.settings.seed_of("search"),
            history,
            on_generation,
            first=first_genes(run, space),
            shown=shown,
        )


def _entry(
    space: RankSpace, genes: Sequence[int], score: float, metrics: Mapping[str, float]
) -> dict[str, Any]:
    """What is written of a subnet that was found."""
    return {
        "genes": list(genes),
        "macs": int(space.macs(genes)),
        "score": score,
        **metrics,
        "ranks": space.ranks(genes).tolist(),
    }


def better(
    space: RankSpace,
    scores: ImageScores,
    budget: Budget,
    searched: dict[str, Any],
    allocated: Sequence[int],
    shown: str,
) -> dict[str, Any]:
    """The entry of the search's winner, if it is surely ahead of the allocation, else of that.

    Sure is a lead of `SURE` standard errors of the differences on the same images.
    """
    genes = np.array([searched["genes"], allocated], np.int32)
    score, others = scores.checked(genes, 0, scores.num_images)
    differences = score[0] - score[1]
    lead, error = float(differences.mean()), float(differences.std() / len(differences) ** 0.5)
    ahead = (lead, lead - SURE * error, lead + SURE * error)
    is_ahead = ahead[1] > 0
    log.info(
        "%s: the best of the search is ahead of the allocated ranks by %.4g (%.4g..%.4g, %g "
        "standard errors) on %d held-out images: %s",
        *(budget.name("subnet"), *ahead, SURE, scores.num_images),
        "it is chosen" if is_ahead else "the allocated ranks stay",
    )
    if is_ahead:
        return searched | {"chosen": SEARCHED, "ahead": ahead}
    own = _entry(space, allocated, float(score[1].mean()), {shown: float(others[1].mean())})
    return own | {"chosen": ALLOCATED, "ahead": ahead, "searched": searched}


def first_genes(run: Run, space: RankSpace) -> np.ndarray | None:
    """The allocation of each budget and its neighbours, half of the first population."""
    if "allocate" not in run.settings.stages:
        return None
    rng = np.random.default_rng(run.settings.seed_of("search/first"))
    count, first = run.settings.search.population // 2, []
    for found in load_found(run, ALLOCATION_FILE):
        genes = np.array(found.genes)
        first += [genes[None], neighbours(space, genes, count - 1, rng)]
    return np.concatenate(first)


def _check_prediction(
    table: LatencyTable, dense: Spec, subnet: Spec, predicted_ns: int
) -> dict[str, float]:
    """Times the subnet as a whole beside the dense model, and compares with the table."""
    specs = {"dense": dense, "subnet": subnet}
    ms = measure_networks(specs, table.batch_size, table.dtype)
    predicted = predicted_ns / 1e6 / table.dense_ms
    measured = median_ratio(ms["subnet"], ms["dense"])
    found = {
        "dense_ms": float(np.median(ms["dense"])),
        "subnet_ms": float(np.median(ms["subnet"])),
        "predicted_share": predicted,
        "measured_share": measured,
        "error": predicted / measured - 1,
    }
    log.info(
        "latency of the subnet: predicted %.3f of the dense model's, measured %.3f (%+.1f %%)",
        *(predicted, measured, 100 * found["error"]),
    )
    return found
