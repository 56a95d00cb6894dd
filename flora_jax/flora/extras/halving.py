"""Successive halving of the search's candidates by images (ours).

All candidates see the same images in the same order, a growing part of them at a time, so that two
are compared by their differences image by image, which are far smaller than the spread of either.
A candidate that falls behind is not scored on the rest; its score of a part is compared with no
score of all images.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from flora_jax.flora.cost import Range

_SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)  # after which candidates are compared
DEVIATIONS = 1.0  # standard errors behind the last place that nobody makes up (docs/decisions.md)
_FEWEST = 30  # images; fewer do not say how far they spread


def rungs_of(num_images: int) -> tuple[int, ...]:
    """Numbers of images after which candidates are compared, ascending; the last are all."""
    rungs = {math.ceil(share * num_images) for share in _SHARES}
    return tuple(sorted(rung for rung in rungs if rung >= _FEWEST)) or (num_images,)


@dataclasses.dataclass(frozen=True)
class ImageScores:
    """Scores subnets image by image.

    Attributes:
      of: (genes int32 [P, L], start, stop) -> (score, what is shown of them), both [P, n]: of the
        images from number `start` on, to number `stop` or beyond it, as whole batches end. Images
        must be in an order of which every beginning is a fair sample.
      num_images: of these images.
      rungs: after how many of them candidates are compared; (num_images,): never.
      deviations: standard errors behind the last place that a candidate cannot make up.
    """

    of: Callable[[np.ndarray, int, int], tuple[np.ndarray, np.ndarray]]
    num_images: int
    rungs: tuple[int, ...]
    deviations: float = DEVIATIONS

    @property
    def halves(self) -> bool:
        """True where a candidate may be out before it has seen all images."""
        return len(self.rungs) > 1

    def checked(self, genes: np.ndarray, start: int, stop: int) -> np.ndarray:
        """The values of `of`, float64 [2, P, n]; raises ValueError unless all are numbers."""
        values = [np.asarray(each, np.float64) for each in self.of(genes, start, stop)]
        for each in values:
            fits = each.ndim == 2 and len(each) == len(genes)
            if not (fits and each.shape[1] >= stop - start and np.isfinite(each).all()):
                raise ValueError(
                    f"score must return {len(genes)} finite numbers for each of images "
                    f"{start}..{stop}, got {each}"
                )
        return np.stack(values)


class Contest(NamedTuple):
    """The competitors inside one range of cost.

    Attributes:
      entrants: bool [P], the new candidates among them.
      rivals: float [R, num_images], what the best so far have scored on each image.
    """

    entrants: np.ndarray
    rivals: np.ndarray


class Raced(NamedTuple):
    """The results of new candidates in a race.

    Attributes:
      num_seen: int [P], images that each of them was scored on.
      score, shown: float64 [P], means over these.
      of_images: float64 [P, num_images], scores; NaN where a candidate did not see the image.
    """

    num_seen: np.ndarray
    score: np.ndarray
    shown: np.ndarray
    of_images: np.ndarray


def race(scores: ImageScores, genes: np.ndarray, contests: Sequence[Contest], places: int) -> Raced:
    """Scores new candidates, each until it is behind in every contest that it takes part in.

    A candidate is behind that cannot make up, within `deviations` standard errors, what it lacks to
    the last of the places. The error is that of the mean over all the images, of which a part is
    known, so that none is out by chance after the last.

    Args:
      genes: int32 [P, L].
      places: how many of a contest are of use; that many are never out.
    """
    values = np.full((2, len(genes), scores.num_images), np.nan)
    num_seen, running, known = np.zeros(len(genes), int), np.arange(len(genes)), 0
    for rung in scores.rungs:
        if rung > known:
            more = scores.checked(genes[running], known, rung)
            values[:, running, known : known + more.shape[2]] = more
            known += more.shape[2]
        num_seen[running] = rung
        if rung < scores.num_images:
            running = _still_running(scores, values[0, :, :rung], running, contests, places)
        if not len(running):
            break
    seen = np.arange(scores.num_images) < num_seen[:, None]
    score, shown = np.where(seen, values, 0).sum(axis=-1) / num_seen
    return Raced(num_seen, score, shown, values[0])


def _still_running(
    scores: ImageScores,
    values: np.ndarray,
    running: np.ndarray,
    contests: Sequence[Contest],
    places: int,
) -> np.ndarray:
    """Those of the running candidates, by number, that have hope in a contest."""
    is_hopeful, rung = np.zeros(len(values), bool), values.shape[1]
    # Of the mean over all images, of which those seen are a part.
    errors = scores.deviations * math.sqrt(1 / rung - 1 / scores.num_images)
    for entrants, rivals in contests:
        own = running[entrants[running]]
        is_hopeful[own] |= _has_hope(values[own], rivals[:, :rung], places, errors)
    return running[is_hopeful[running]]


def _has_hope(own: np.ndarray, rivals: np.ndarray, places: int, errors: float) -> np.ndarray:
    """For each row of own [A, n], whether it may yet have one of the places: bool [A].

    Args:
      errors: how many standard deviations of the differences between images may be made up.
    """
    field = np.concatenate([rivals, own])
    if len(field) <= places:
        return np.ones(len(own), bool)
    means = field.mean(axis=1)
    last = np.argsort(-means, kind="stable")[places - 1]
    behind = means[len(rivals) :] - means[last]
    return behind + errors * (own - field[last]).std(axis=1, ddof=1) >= 0


class Races:
    """The races of a search, one a generation, a contest for each range of cost.

    Args:
      places: parents that a range has.
    """

    def __init__(self, scores: ImageScores, ranges: Sequence[Range], places: int):
        self.scores, self._ranges, self._places = scores, ranges, places
        self._of_images: dict[tuple[int, ...], np.ndarray] = {}  # of possible parents, [num_images]

    def run(
        self, genes: np.ndarray, costs: np.ndarray, parents: Sequence[Sequence[tuple[int, ...]]]
    ) -> Raced:
        """Scores a generation, genes int32 [P, L] of these costs [P].

        Args:
          parents: genes of the best so far in each range, with whom new ones compete; they are
            scored again where another process has scored them.
        """
        if self.scores.halves:
            self._recall(list(dict.fromkeys(itertools.chain(*parents))))
        contests = [
            Contest((low <= costs) & (costs <= high), self._scores_of(own))
            for (low, high), own in zip(self._ranges, parents, strict=True)
        ]
        raced = race(self.scores, genes, contests, self._places)
        has_seen_all = raced.num_seen == self.scores.num_images
        rows = map(tuple, genes[has_seen_all].tolist())
        self._of_images |= zip(rows, raced.of_images[has_seen_all], strict=True)
        return raced

    def _recall(self, parents: list[tuple[int, ...]]) -> None:
        """Keeps what is known of the parents, and of no others."""
        if missing := [genes for genes in parents if genes not in self._of_images]:
            found, _ = self.scores.checked(np.array(missing, np.int32), 0, self.scores.num_images)
            self._of_images |= zip(missing, found, strict=True)
        self._of_images = {genes: self._of_images[genes] for genes in parents}

    def _scores_of(self, parents: Sequence[tuple[int, ...]]) -> np.ndarray:
        found = [self._of_images[genes] for genes in parents] if self.scores.halves else []
        return np.array(found).reshape(-1, self.scores.num_images)
