"""Evolutionary search for the best subnet inside each window of cost (FLORA, evolutionary search).

One search serves several budgets: every scored candidate counts for each window that holds it.
Which candidates are scored on all images, `halving` decides.

The random numbers of a generation depend on (seed, generation) alone and every scored generation
is appended to a history file, so an interrupted search continues bit for bit as if it had not been.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from etils import epath

from flora_jax.cluster.processes import is_first, wait_for_all
from flora_jax.errors import InputError, check_at_least
from flora_jax.flora import history
from flora_jax.flora.cost import Cost
from flora_jax.flora.extras.halving import ImageScores, Races, Window
from flora_jax.flora.history import Candidate
from flora_jax.flora.proposals import cross_blocks, mutate
from flora_jax.flora.space import RankSpace
from flora_jax.flora.window import WindowSampler
from flora_jax.io.json_lines import JsonLines

log = logging.getLogger(__name__)

# Offspring are proposed in batches until enough are new and legal, or the rounds are used up.
_BATCH = 256
_ROUNDS = 20


@dataclasses.dataclass(frozen=True)
class EvolutionSettings:
    """Sizes of the search; the defaults are FLORA's.

    Attributes:
      generations: scored populations, the first, random one among them.
      population: new candidates a generation for each window.
      parents: the best candidates so far in a window, which mutants and crossovers descend from.
      mutants, crossovers: how many of a population are made in each way; the rest is random.
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
    scores: ImageScores,
    cost: Cost,
    windows: Sequence[Window],
    settings: EvolutionSettings,
    seed: int,
    history_path: epath.PathLike,
    on_generation: Callable[[int, list[Candidate]], None] | None = None,
    *,
    first: np.ndarray | None = None,
    shown: str = "top1",
) -> list[Candidate]:
    """Searches for the best subnet of each window; continues the history where there is one.

    No candidate is scored twice, but for the parents of a search that goes on, whose scores image
    by image no history keeps. The search ends early when no unseen legal genes are found for any
    window.

    Args:
      space: the kept triples to search.
      scores: of inherited subnets on held-out images, and when candidates are compared.
      cost: of a candidate, such as `space.macs_cost`.
      windows: least and most cost of a legal candidate for each budget, in ascending order; they
        may touch, but not overlap.
      settings: sizes of the search.
      seed: of all random draws.
      history_path: JSON lines, created if missing: what the search is, then every generation.
      on_generation: called with a generation's number and candidates as soon as it is saved;
        not for generations read from the history.
      first: genes int32 [F, L] that the first generation takes before random ones, in this order,
        as far as they are kept, lie in a window and fit its population.
      shown: the metric that `scores` gives beside the score.

    Returns:
      For each window the candidate of the highest score inside it, of those that have seen all
      images; among equals the cheaper one, then the earlier one.

    Raises:
      ValueError: there is no window, windows do not ascend or overlap, one of them holds no kept
        genes, `first` are no genes of the space, the history belongs to another search, or `scores`
        returns another shape or a value that is not finite.
    """
    if not windows or any(hi > lo for (_, hi), (lo, _) in itertools.pairwise(windows)):
        raise ValueError(f"windows must ascend and not overlap, got {list(windows)}")
    path = epath.Path(history_path)
    sampler = WindowSampler(space.kept, cost)
    identity = _identity(space, scores, cost, windows, settings, seed, first)
    kept, generations = history.resume(path, identity)
    first = _kept(space, first)
    for window in windows:
        sampler.draw(np.random.default_rng(0), 1, *window)  # raises before anything is written
    wait_for_all("history is read")  # the first process may cut it
    candidates = [candidate for members in generations for candidate in members]
    races = Races(scores, windows, settings.parents)
    with JsonLines(path, kept) if is_first() else contextlib.nullcontext() as lines:
        for generation in range(len(generations), settings.generations):
            rng = np.random.default_rng([seed, generation])
            parents = [_best(candidates, window, settings.parents) for window in windows]
            genes = _propose(space, sampler, windows, settings, rng, candidates, parents, first)
            if len(genes) == 0:
                log.info("generation %d: no unseen subnet is left in any window", generation)
                break
            members = _scored(races, cost, genes, generation, shown, parents)
            candidates += members
            if lines is not None:
                lines.append([history.to_record(generation, members)], durable=True)
            wait_for_all("generation is saved")
            if on_generation is not None:
                on_generation(generation, members)
    return [_best(candidates, window, 1)[0] for window in windows]


def _propose(
    space: RankSpace,
    sampler: WindowSampler,
    windows: Sequence[Window],
    settings: EvolutionSettings,
    rng: np.random.Generator,
    candidates: list[Candidate],
    parents: list[list[Candidate]],
    first: np.ndarray,
) -> np.ndarray:
    """Unseen legal genes int32 [P, L], a population for each window or what is left of it."""
    seen = {candidate.genes for candidate in candidates}
    mothers_of = [_genes(space, own) for own in parents]
    fathers = np.concatenate(mothers_of)  # of all windows: a child may well lie between two

    def draw(parents: np.ndarray) -> np.ndarray:
        return parents[rng.integers(len(parents), size=_BATCH)]

    def rounds(propose: Callable[[], np.ndarray]) -> Iterator[np.ndarray]:
        return (propose() for _ in range(_ROUNDS))

    def ways(window: Window, mothers: np.ndarray) -> list[tuple[int, Iterator[np.ndarray]]]:
        """How many genes to take out of which batches."""
        probability = settings.mutation_probability
        random = rounds(lambda: sampler.draw(rng, _BATCH, *window))
        if len(mothers) == 0:  # the first generation
            return [(settings.population, iter([first])), (settings.population, random)]
        return [
            (settings.mutants, rounds(lambda: mutate(rng, space, draw(mothers), probability))),
            (settings.crossovers, rounds(lambda: cross_blocks(rng, draw(mothers), draw(fathers)))),
            (settings.population, random),
        ]

    proposed: list[tuple[int, ...]] = []
    for window, mothers in zip(windows, mothers_of, strict=True):
        end = len(proposed) + settings.population
        for count, batches in ways(window, mothers):
            unseen = _unseen(batches, sampler.cost, window, seen)
            proposed += itertools.islice(unseen, min(count, end - len(proposed)))
    return np.array(proposed, np.int32).reshape(-1, space.num_layers)


def _unseen(
    batches: Iterable[np.ndarray], cost: Cost, window: Window, seen: set[tuple[int, ...]]
) -> Iterator[tuple[int, ...]]:
    """The rows of batches [n, L] that lie in the window and are not in `seen`, where they go."""
    for genes in batches:
        costs = cost(genes)
        for row in map(tuple, genes[(window[0] <= costs) & (costs <= window[1])].tolist()):
            if row not in seen:
                seen.add(row)
                yield row


def _scored(
    races: Races,
    cost: Cost,
    genes: np.ndarray,
    generation: int,
    shown: str,
    parents: list[list[Candidate]],
) -> list[Candidate]:
    """The candidates of a generation, which compete with the parents of their window."""
    costs = cost(genes)
    raced = races.run(genes, costs, [[parent.genes for parent in own] for own in parents])
    shares = (raced.num_seen / races.scores.num_images).tolist()
    columns = (genes.tolist(), costs.tolist(), raced.score.tolist(), raced.shown.tolist(), shares)
    return [
        Candidate(generation, tuple(row), price, score, {shown: other}, share)
        for row, price, score, other, share in zip(*columns, strict=True)
    ]


def _best(candidates: Iterable[Candidate], window: Window, count: int) -> list[Candidate]:
    """The best that have seen all images; a part of them may flatter."""
    inside = (c for c in candidates if c.has_seen_all and window[0] <= c.cost <= window[1])
    return sorted(inside, key=lambda candidate: (-candidate.score, candidate.cost))[:count]


def _genes(space: RankSpace, candidates: list[Candidate]) -> np.ndarray:
    """The genes of candidates, int32 [n, L]."""
    genes = np.array([candidate.genes for candidate in candidates], np.int32)
    return genes.reshape(-1, space.num_layers)


def _kept(space: RankSpace, first: np.ndarray | None) -> np.ndarray:
    """The kept ones of the genes [F, L], int32; none where there is no `first`."""
    if first is None:
        return _genes(space, [])
    return space.validate(first)[space.contains(first)]


def _identity(
    space: RankSpace,
    scores: ImageScores,
    cost: Cost,
    windows: Sequence[Window],
    settings: EvolutionSettings,
    seed: int,
    first: np.ndarray | None,
) -> dict:
    """What tells one search from another; its window is a pair, or a list of pairs for several."""
    bounds = [[float(bound) for bound in window] for window in windows]
    identity = {
        "seed": seed,
        "unit": cost.unit,
        "window": bounds if len(bounds) > 1 else bounds[0],
        "settings": dataclasses.asdict(settings),
        "space": _digest(repr(space.spec) + json.dumps(space.to_json())),
        "costs": _digest(json.dumps([cost.fixed, *(layer.tolist() for layer in cost.layers)])),
    }
    if scores.drops:
        identity["halving"] = {"looks": list(scores.looks), "deviations": scores.deviations}
    if first is not None:
        identity["first"] = _digest(json.dumps(np.asarray(first).tolist()))
    return identity


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
