"""Evolutionary search for the best subnet inside each budget (FLORA, section 3).

    20 generations of 50: the best 10 so far are parents of 25 mutants (each block redrawn with
    probability 0.2) and 25 crossovers; a candidate is legal inside a range of cost

and is scored on held-out images with the weights that it inherits. Deviations from the published
code: crossover and mutation exchange whole triples of a block, for a mix of two candidates need not
be one; scores are of a split held out of the training images, where the published code scores on
the validation images that it reports. Ours, behind switches: a first population (`first`) and
successive halving (`extras/halving.py`). One search serves several budgets: every scored candidate
counts for each whose range holds it.

The random numbers of a generation depend on (seed, generation) alone and every scored generation
is appended to a history file, so an interrupted search continues bit for bit as if it had not been.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
from etils import epath

from flora_jax.cluster.processes import StopRequest, is_first, wait_for_all
from flora_jax.errors import InputError, check_at_least, differences
from flora_jax.evaluation.evaluate import EvaluationSet, evaluate_images
from flora_jax.flora.cost import Cost, Range
from flora_jax.flora.extras.halving import ImageScores, Races, rungs_of
from flora_jax.flora.sampling import RangeSampler
from flora_jax.flora.space import RankSpace
from flora_jax.flora.supernet import Supernet
from flora_jax.io.files import num_bytes
from flora_jax.io.json_lines import JsonLines, read_lines
from flora_jax.io.paths import user_path
from flora_jax.models.network import Network
from flora_jax.models.spec import LAYERS_PER_BLOCK
from flora_jax.progress import Progress
from flora_jax.training.image_set import ImageSet
from flora_jax.training.train import measured_by
from flora_jax.training.watch import Watch, not_watched

log = logging.getLogger(__name__)

# Offspring are proposed in batches until enough are new and legal, or the rounds are used up.
_BATCH = 256
_ROUNDS = 20
_COLUMNS = ("genes", "cost", "score")  # of a line of the history, beside those of the metrics
_SHARE = "share"  # a column of the generations in which a candidate has not seen all images


@dataclasses.dataclass(frozen=True)
class EvolutionSettings:
    """Sizes of the search; the defaults are FLORA's.

    Attributes:
      generations: scored populations, the first, random one among them.
      population: new candidates a generation for each budget.
      parents: the best candidates so far of a budget, which mutants and crossovers descend from.
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


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A scored subnet.

    Attributes:
      genes: L of them.
      cost: in the unit of the search, which the first line of its history names.
      score: what the search maximises.
      metrics: what is shown of it, on the same images, by name, such as "top1" in 0..1.
      share: of the images, that it was scored on; below 1 it was behind and did not see the others.
    """

    generation: int
    genes: tuple[int, ...]
    cost: int
    score: float
    metrics: Mapping[str, float]
    share: float = 1.0

    @property
    def has_seen_all(self) -> bool:
        """True where its score can stand beside that of another."""
        return self.share == 1

    @property
    def top1(self) -> float:
        """Accuracy in 0..1, of a network with classes."""
        return self.metrics["top1"]


def evolve(
    supernet: Supernet,
    heldout: ImageSet | EvaluationSet,
    macs: Range,
    settings: EvolutionSettings = EvolutionSettings(),
    *,
    directory: epath.PathLike | None = None,
    metric: str = "",
    teacher: Network | None = None,
    first: np.ndarray | None = None,
    halving: bool = False,
    seed: int = 0,
) -> Candidate:
    """The subnet inside a range of MACs that does best on held-out images.

    Args:
      macs: (least, most) of the whole network.
      settings: sizes of the search; the defaults are FLORA's.
      directory: receives history.jsonl, from which an interrupted search goes on; None: nothing is
        kept.
      metric: that is maximised: "top1" or "log_likelihood"; of a network without classes "cosine"
        or "relative_error". Empty: top-1, or cosine.
      teacher: the uncompressed network, whose features those of subnets are compared with; it is
        needed where there are no classes.
      first: genes int32 [F, L] to begin with, such as those of `allocate` (ours).
      halving: whether a candidate that is behind on a part of the images is not scored on the
        others (ours).

    Returns:
      The best candidate; its `genes` are what `extract` takes.

    Raises:
      InputError, Stopped: as `search`.
    """
    part = rungs_of(len(heldout))[0] if halving and isinstance(heldout, ImageSet) else None
    heldout = measured_by(heldout, supernet.space.spec, teacher, part)
    scores = image_scores(supernet, heldout, metric, halving=halving)
    history = None if directory is None else user_path(directory) / "history.jsonl"
    shown, cost = heldout.quality.shown.name, supernet.space.macs_cost
    [best] = search(
        supernet.space, scores, cost, [macs], settings, seed, history, first=first, shown=shown
    )
    return best


def search(
    space: RankSpace,
    scores: ImageScores,
    cost: Cost,
    ranges: Sequence[Range],
    settings: EvolutionSettings,
    seed: int,
    history_path: epath.PathLike | None = None,
    *,
    first: np.ndarray | None = None,
    shown: str = "top1",
    watch: Watch = not_watched,
) -> list[Candidate]:
    """Searches for the best subnet of each budget; continues the history where there is one.

    No candidate is scored twice, but for the parents of a search that goes on, whose scores image
    by image no history keeps. The search ends early when no unseen legal genes are found for any
    budget.

    Args:
      space: the candidates to search.
      scores: of inherited subnets on held-out images, and when candidates are compared.
      cost: of a candidate, such as `space.macs_cost`.
      ranges: least and most cost of a legal candidate for each budget, in ascending order; they
        may touch, but not overlap.
      settings: sizes of the search.
      seed: of all random draws.
      history_path: JSON lines, created if missing: what the search is, then every generation; None:
        nothing is kept.
      first: genes int32 [F, L] that the first generation takes before random ones, in this order,
        as far as the space has them, they lie in a range and fit its population.
      shown: the metric that `scores` gives beside the score.
      watch: what else gets the best metric so far, generation by generation.

    Returns:
      For each budget the candidate of the highest score inside its range, of those that have seen
      all images; among equals the cheaper one, then the earlier one.

    Raises:
      InputError: one of the ranges holds no genes, `first` are no genes of the space, or the
        history belongs to another search.
      ValueError: there is no range, ranges do not ascend or overlap, or `scores` returns another
        shape or a value that is not finite.
      Stopped: the process was told to end; the generation it was at is saved.
    """
    if not ranges or any(hi > lo for (_, hi), (lo, _) in itertools.pairwise(ranges)):
        raise ValueError(f"ranges must ascend and not overlap, got {list(ranges)}")
    path = None if history_path is None else epath.Path(history_path)
    sampler = RangeSampler(space.kept, cost)
    identity = _identity(space, scores, cost, ranges, settings, seed, first)
    kept, generations = ([], []) if path is None else _resume(path, identity)
    if first is None:
        first = np.empty((0, space.num_layers), np.int32)
    else:
        first = space.validate(first)[space.contains(first)]
    for bounds in ranges:
        sampler.draw(np.random.default_rng(0), 1, *bounds)  # raises before anything is written
    wait_for_all("history is read")  # the first process may cut it
    candidates = list(itertools.chain(*generations))
    races = Races(scores, ranges, settings.parents)
    start, total = len(generations), settings.generations
    if start:
        log.info("search: goes on at generation %d of %d", start, total)
    with contextlib.ExitStack() as stack:
        lines = None
        if path is not None and is_first():
            lines = stack.enter_context(JsonLines(path, kept))
        stop_request = stack.enter_context(StopRequest())
        write = stack.enter_context(watch(start))
        progress = stack.enter_context(
            Progress("search", total=total, start=min(start, total), unit="generation")
        )
        for generation in range(start, total):
            rng = np.random.default_rng([seed, generation])
            parents = [_best(candidates, bounds, settings.parents) for bounds in ranges]
            genes = _propose(space, sampler, ranges, settings, rng, candidates, parents, first)
            if len(genes) == 0:
                log.info("search: converged at generation %d, all subnets are seen", generation)
                break
            members = _scored(races, cost, genes, generation, shown, parents)
            candidates += members
            if lines is not None:
                lines.append([_record(generation, members)], durable=True)
            wait_for_all("generation is saved")
            seen_all = [each.metrics[shown] for each in candidates if each.has_seen_all]
            best = {f"best_{shown}": max(seen_all)} if seen_all else {}
            share = sum(member.share for member in members) / len(members)
            progress.update(1, **best, images_seen=share)
            if best:
                write([{"step": generation, **best}])
            if stop_request.is_set():
                raise stop_request.stopped(
                    f"search is saved at generation {generation + 1} of {total}"
                )
    return [_best(candidates, bounds, 1)[0] for bounds in ranges]


def image_scores(
    supernet: Supernet, images: EvaluationSet, metric: str, *, halving: bool = True
) -> ImageScores:
    """Scores by a metric of the images, and shows the first one that they have.

    Args:
      images: in an order of which every beginning is a fair sample, in several batches.
      metric: a name, as `Quality.metric` takes it.
      halving: whether candidates are compared before they have seen all images.
    """
    deciding, shown = images.quality.metric(metric), images.quality.shown
    ends = np.cumsum([is_image.sum() for is_image in images.is_image_of])

    def of(genes: np.ndarray, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        first, last = np.searchsorted(ends, start, side="right"), np.searchsorted(ends, stop)
        found = evaluate_images(supernet, images, genes, slice(first, last + 1))
        return deciding.score(found[deciding.of_image]), found[shown.of_image]

    num_images = images.num_images
    return ImageScores(of, num_images, rungs_of(num_images) if halving else (num_images,))


def read_history(path: epath.PathLike) -> list[Candidate]:
    """Every candidate scored so far, in order; an unfinished last line is left out.

    Raises:
      InputError: the file is no history.
    """
    lines = read_lines(path)
    _search_of(path, lines)
    return list(itertools.chain(*_generations(lines)))


def cross_blocks(rng: np.random.Generator, mothers: np.ndarray, fathers: np.ndarray) -> np.ndarray:
    """Children int32 [n, L] that take each block's triple from one of two parents [n, L]."""
    from_mother = rng.random((len(mothers), mothers.shape[1] // LAYERS_PER_BLOCK)) < 0.5
    return np.where(np.repeat(from_mother, LAYERS_PER_BLOCK, axis=1), mothers, fathers)


def mutate(
    rng: np.random.Generator, space: RankSpace, genes: np.ndarray, probability: float
) -> np.ndarray:
    """genes [n, L] with each block redrawn from its candidates at this probability."""
    redrawn = rng.random((len(genes), space.num_blocks)) < probability
    fresh = space.sample(rng, len(genes))
    return np.where(np.repeat(redrawn, LAYERS_PER_BLOCK, axis=1), fresh, genes)


def _propose(
    space: RankSpace,
    sampler: RangeSampler,
    ranges: Sequence[Range],
    settings: EvolutionSettings,
    rng: np.random.Generator,
    candidates: list[Candidate],
    parents: list[list[Candidate]],
    first: np.ndarray,
) -> np.ndarray:
    """Unseen legal genes int32 [P, L], a population for each range or what is left of it."""
    seen = {candidate.genes for candidate in candidates}
    mothers_of = [
        np.array([parent.genes for parent in own], np.int32).reshape(-1, space.num_layers)
        for own in parents
    ]
    fathers = np.concatenate(mothers_of)  # of all ranges: a child may well lie between two

    def draw(parents: np.ndarray) -> np.ndarray:
        return parents[rng.integers(len(parents), size=_BATCH)]

    def rounds(propose: Callable[[], np.ndarray]) -> Iterator[np.ndarray]:
        return (propose() for _ in range(_ROUNDS))

    def ways(bounds: Range, mothers: np.ndarray) -> list[tuple[int, Iterator[np.ndarray]]]:
        """Numbers of genes, and the batches that they are taken out of."""
        probability = settings.mutation_probability
        random = rounds(lambda: sampler.draw(rng, _BATCH, *bounds))
        if len(mothers) == 0:  # the first generation
            return [(settings.population, iter([first])), (settings.population, random)]
        return [
            (settings.mutants, rounds(lambda: mutate(rng, space, draw(mothers), probability))),
            (settings.crossovers, rounds(lambda: cross_blocks(rng, draw(mothers), draw(fathers)))),
            (settings.population, random),
        ]

    proposed: list[tuple[int, ...]] = []
    for bounds, mothers in zip(ranges, mothers_of, strict=True):
        end = len(proposed) + settings.population
        for count, batches in ways(bounds, mothers):
            unseen = _unseen(batches, sampler.cost, bounds, seen)
            proposed += itertools.islice(unseen, min(count, end - len(proposed)))
    return np.array(proposed, np.int32).reshape(-1, space.num_layers)


def _unseen(
    batches: Iterable[np.ndarray], cost: Cost, bounds: Range, seen: set[tuple[int, ...]]
) -> Iterator[tuple[int, ...]]:
    """The rows of batches [n, L] that lie in the range and are not in `seen`, where they go."""
    for genes in batches:
        costs = cost(genes)
        for row in map(tuple, genes[(bounds[0] <= costs) & (costs <= bounds[1])].tolist()):
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
    """The candidates of a generation, which compete with the parents of their range."""
    costs = cost(genes)
    raced = races.run(genes, costs, [[parent.genes for parent in own] for own in parents])
    shares = (raced.num_seen / races.scores.num_images).tolist()
    columns = (genes.tolist(), costs.tolist(), raced.score.tolist(), raced.shown.tolist(), shares)
    return [
        Candidate(generation, tuple(row), price, score, {shown: other}, share)
        for row, price, score, other, share in zip(*columns, strict=True)
    ]


def _best(candidates: Iterable[Candidate], bounds: Range, count: int) -> list[Candidate]:
    """The best that have seen all images; a part of them may flatter."""
    inside = (c for c in candidates if c.has_seen_all and bounds[0] <= c.cost <= bounds[1])
    return sorted(inside, key=lambda candidate: (-candidate.score, candidate.cost))[:count]


def _identity(
    space: RankSpace,
    scores: ImageScores,
    cost: Cost,
    ranges: Sequence[Range],
    settings: EvolutionSettings,
    seed: int,
    first: np.ndarray | None,
) -> dict:
    """All that tells one search from another, as in the first line of its history."""
    bounds = [list(map(float, each)) for each in ranges]
    identity = {
        "seed": seed,
        "unit": cost.unit,
        "window": bounds if len(bounds) > 1 else bounds[0],  # the name that histories have it by
        "settings": dataclasses.asdict(settings),
        "space": _digest(repr(space.spec) + json.dumps(space.to_json())),
        "costs": _digest(json.dumps([cost.fixed, *(layer.tolist() for layer in cost.layers)])),
    }
    if scores.halves:
        identity["halving"] = {"rungs": list(scores.rungs), "deviations": scores.deviations}
    if first is not None:
        identity["first"] = _digest(json.dumps(np.asarray(first).tolist()))
    return identity


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _resume(path: epath.Path, search: dict) -> tuple[list[bytes], list[list[Candidate]]]:
    """The lines of a history that count, and the complete generations in them.

    Raises:
      InputError: the file is no history, or that of another search.
    """
    header = json.dumps({"search": search}).encode() + b"\n"
    lines = read_lines(path)
    if not lines and header.startswith(path.read_bytes() if path.exists() else b""):
        return [header], []  # stopped while the first line was written, or before
    differing = list(differences(_search_of(path, lines), search))
    if differing:
        told = ", ".join(f"{name} {there} instead of {here}" for name, there, here in differing)
        advice = "use another path"
        if [name for name, there, _ in differing if there is None] == ["halving"]:
            advice = "it goes on with halving set to False, or use another path"
        raise InputError(f"history {path} belongs to another search ({told}); {advice}")
    generations = _generations(lines)
    complete = lines[: 1 + len(generations)]
    if sum(map(len, complete)) < num_bytes(path):
        log.warning("history %s is cut behind its %d complete generations", path, len(generations))
    return complete, generations


def _record(generation: int, members: list[Candidate]) -> dict:
    """The line of a generation."""
    columns = {name: [getattr(c, name) for c in members] for name in _COLUMNS}
    if not all(candidate.has_seen_all for candidate in members):
        columns[_SHARE] = [candidate.share for candidate in members]
    metrics = {name: [c.metrics[name] for c in members] for name in members[0].metrics}
    return {"generation": generation, **columns, **metrics}


def _search_of(path: epath.PathLike, lines: list[bytes]) -> dict:
    """The search of a history, by its first line."""
    try:
        return json.loads(lines[0])["search"]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(
            f"{path} is not the history of a search: its first line does not say so"
        ) from error


def _generations(lines: list[bytes]) -> list[list[Candidate]]:
    """The generations behind the first line, up to a line that is damaged."""
    generations: list[list[Candidate]] = []
    for line in lines[1:]:
        members = _from_line(line, generation=len(generations))
        if members is None:
            break
        generations.append(members)
    return generations


def _from_line(line: bytes, generation: int) -> list[Candidate] | None:
    """The candidates of a line of this generation, None for anything else."""
    try:
        record = json.loads(line)
        is_next = record.pop("generation") == generation
        columns = [record.pop(name) for name in _COLUMNS]
        shares = record.pop(_SHARE, [1.0] * len(columns[0]))
        rows = zip(*record.values(), strict=True)
        metrics = [dict(zip(record, row, strict=True)) for row in rows]
        members = [
            Candidate(generation, tuple(genes), cost, score, own, share)
            for genes, cost, score, own, share in zip(*columns, metrics, shares, strict=True)
        ]
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return members if is_next else None
