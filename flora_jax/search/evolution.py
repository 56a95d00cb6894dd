"""Evolutionary search for the best subnet inside a window of cost (FLORA, evolutionary search).

The random numbers of a generation depend on (seed, generation) alone and every scored generation
is appended to a history file, so an interrupted search continues bit for bit as if it had not been.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterable

import numpy as np
from etils import epath

from flora_jax.cluster.processes import is_first, wait_for_all
from flora_jax.errors import InputError, check_at_least
from flora_jax.io.json_lines import JsonLines
from flora_jax.lowrank.cost import Cost
from flora_jax.lowrank.space import RankSpace
from flora_jax.lowrank.window import WindowSampler
from flora_jax.models.spec import LAYERS_PER_BLOCK
from flora_jax.search import history
from flora_jax.search.history import Candidate

log = logging.getLogger(__name__)

# Offspring are proposed in batches until enough are new and legal, or the rounds are used up.
_BATCH = 256
_ROUNDS = 20


@dataclasses.dataclass(frozen=True)
class EvolutionSettings:
    """Sizes of the search; the defaults are FLORA's.

    Attributes:
      generations: scored populations, the first, random one among them.
      population: candidates a generation.
      parents: the best candidates so far, which mutants and crossovers descend from.
      mutants, crossovers: how many of a generation are made in each way; the rest is random.
      mutation_probability: chance of each block of a mutant to be redrawn.
    """

    generations: int = 20
    population: int = 50
    parents: int = 10
    mutants: int = 25
    crossovers: int = 25
    mutation_probability: float = 0.2

    def __post_init__(self):
        check_at_least(self, 1, "generations", "population", "parents")
        check_at_least(self, 0, "mutants", "crossovers")
        if self.parents > self.population:
            raise InputError(f"{self.parents} parents exceed the population of {self.population}")
        if self.mutants + self.crossovers > self.population:
            raise InputError(
                f"{self.mutants} mutants and {self.crossovers} crossovers exceed the population "
                f"of {self.population}"
            )
        if not 0 < self.mutation_probability <= 1:
            raise InputError(
                f"mutation_probability must lie in (0, 1], got {self.mutation_probability}"
            )


def evolve(
    space: RankSpace,
    score: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    cost: Cost,
    window: tuple[float, float],
    settings: EvolutionSettings,
    seed: int,
    history_path: epath.PathLike,
    on_generation: Callable[[int, list[Candidate]], None] | None = None,
) -> Candidate:
    """Searches for the subnet of the highest score; continues the history where there is one.

    No candidate is scored twice. The search ends early when no unseen legal genes are found.

    Args:
      space: the kept triples to search.
      score: genes int32 [P, L] -> (score float [P], top1 float [P]) of inherited subnets on
        held-out images; the two may be the same.
      cost: of a candidate, such as `space.macs_cost`.
      window: least and most cost of a legal candidate.
      settings: sizes of the search.
      seed: of all random draws.
      history_path: JSON lines, created if missing: what the search is, then every generation.
      on_generation: called with a generation's number and candidates as soon as it is saved;
        not for generations read from the history.

    Returns:
      The candidate of the highest score; among equals the cheaper one, then the earlier one.

    Raises:
      ValueError: the window holds no kept genes, the history belongs to another search, or `score`
        returns another shape or a value that is not finite.
    """
    path = epath.Path(history_path)
    sampler = WindowSampler(space.kept, cost)
    kept, generations = history.resume(path, _identity(space, cost, window, settings, seed))
    sampler.draw(np.random.default_rng(0), 1, *window)  # raises before anything is written
    wait_for_all("history is read")  # the first process may cut it
    candidates = [candidate for members in generations for candidate in members]
    with JsonLines(path, kept) if is_first() else contextlib.nullcontext() as lines:
        for generation in range(len(generations), settings.generations):
            rng = np.random.default_rng([seed, generation])
            genes = _propose(space, sampler, window, settings, rng, candidates)
            if len(genes) == 0:
                log.info("generation %d: no unseen subnet is left in the window", generation)
                break
            members = _scored(score, cost, genes, generation)
            candidates += members
            if lines is not None:
                lines.append([history.to_record(generation, members)], durable=True)
            wait_for_all("generation is saved")
            if on_generation is not None:
                on_generation(generation, members)
    return _best(candidates, 1)[0]


def cross_blocks(rng: np.random.Generator, mothers: np.ndarray, fathers: np.ndarray) -> np.ndarray:
    """Children int32 [n, L] that take each block's whole triple from one of two parents [n, L].

    Whole triples, because a mix of two kept triples need not be a kept one.
    """
    from_mother = rng.random((len(mothers), mothers.shape[1] // LAYERS_PER_BLOCK)) < 0.5
    return np.where(np.repeat(from_mother, LAYERS_PER_BLOCK, axis=1), mothers, fathers)


def mutate(
    rng: np.random.Generator, space: RankSpace, genes: np.ndarray, probability: float
) -> np.ndarray:
    """genes [n, L] with each block redrawn from its kept triples at this probability."""
    redrawn = rng.random((len(genes), space.num_blocks)) < probability
    fresh = space.sample(rng, len(genes))
    return np.where(np.repeat(redrawn, LAYERS_PER_BLOCK, axis=1), fresh, genes)


def _propose(
    space: RankSpace,
    sampler: WindowSampler,
    window: tuple[float, float],
    settings: EvolutionSettings,
    rng: np.random.Generator,
    candidates: list[Candidate],
) -> np.ndarray:
    """Unseen legal genes int32 [P, L]; fewer than the population where the space runs out."""
    seen = {candidate.genes for candidate in candidates}
    population: list[tuple[int, ...]] = []

    def fill(propose: Callable[[], np.ndarray], count: int) -> None:
        wanted = len(population) + count
        for _ in range(_ROUNDS):
            if len(population) == wanted:
                return
            genes = propose()
            cost = sampler.cost(genes)
            legal = genes[(window[0] <= cost) & (cost <= window[1])]
            new = [g for g in dict.fromkeys(map(tuple, legal.tolist())) if g not in seen]
            new = new[: wanted - len(population)]
            population.extend(new)
            seen.update(new)

    if candidates:
        best = np.array([c.genes for c in _best(candidates, settings.parents)], np.int32)

        def draw_parents():
            return best[rng.integers(len(best), size=_BATCH)]

        fill(
            lambda: mutate(rng, space, draw_parents(), settings.mutation_probability),
            settings.mutants,
        )
        fill(lambda: cross_blocks(rng, draw_parents(), draw_parents()), settings.crossovers)
    fill(lambda: sampler.draw(rng, _BATCH, *window), settings.population - len(population))
    return np.array(population, np.int32).reshape(-1, space.num_layers)


def _scored(score: Callable, cost: Cost, genes: np.ndarray, generation: int) -> list[Candidate]:
    scores, top1 = (np.asarray(values, np.float64) for values in score(genes))
    for values in (scores, top1):
        if values.shape != (len(genes),) or not np.isfinite(values).all():
            raise ValueError(f"score must return {len(genes)} finite numbers, got {values}")
    columns = (genes.tolist(), cost(genes).tolist(), scores.tolist(), top1.tolist())
    return [
        Candidate(generation, tuple(row), *values) for row, *values in zip(*columns, strict=True)
    ]


def _best(candidates: Iterable[Candidate], count: int) -> list[Candidate]:
    return sorted(candidates, key=lambda candidate: (-candidate.score, candidate.cost))[:count]


def _identity(
    space: RankSpace,
    cost: Cost,
    window: tuple[float, float],
    settings: EvolutionSettings,
    seed: int,
) -> dict:
    """What tells one search from another."""
    return {
        "seed": seed,
        "unit": cost.unit,
        "window": [float(bound) for bound in window],
        "settings": dataclasses.asdict(settings),
        "space": _digest(repr(space.spec) + json.dumps(space.to_json())),
        "costs": _digest(json.dumps([cost.fixed, *(layer.tolist() for layer in cost.layers)])),
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
