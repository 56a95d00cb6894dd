"""A search that starts from allocated ranks, and has to beat them (ours)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from flora_jax.flora.extras.halving import ImageScores
from flora_jax.flora.space import RankSpace
from flora_jax.models.spec import LAYERS_PER_BLOCK

# A neighbour takes triples out of so many that are nearest to the block's own, itself among them.
_NEAREST = 9
# So many times the neighbours asked for are drawn; those nearest in cost are taken.
_DRAWS = 16
# The winner is the best of hundreds on the very images that it is compared on: of 300 that are no
# better, one leads by 1.8 standard errors in every second search (docs/decisions.md).
SURE = 2.0


def first_population(
    space: RankSpace, allocated: Sequence[np.ndarray], population: int, rng: np.random.Generator
) -> np.ndarray:
    """Allocated genes of each budget with neighbours, half of a population: int32 [F, L]."""
    first = [
        np.concatenate([genes[None], neighbours(space, genes, population // 2 - 1, rng)])
        for genes in allocated
    ]
    return np.concatenate(first)


class Lead(NamedTuple):
    """The lead of one subnet over another on the same images, with `SURE` standard errors.

    Attributes:
      ahead: mean, low, high of the differences.
      score, shown: means of the other one.
    """

    ahead: tuple[float, float, float]
    score: float
    shown: float

    @property
    def is_sure(self) -> bool:
        return self.ahead[1] > 0


def lead(scores: ImageScores, genes: Sequence[int], other: Sequence[int]) -> Lead:
    """Compares two subnets, genes [L] each, image by image."""
    score, shown = scores.checked(np.array([genes, other], np.int32), 0, scores.num_images)
    differences = score[0] - score[1]
    mean, error = float(differences.mean()), float(differences.std() / len(differences) ** 0.5)
    ahead = (mean, mean - SURE * error, mean + SURE * error)
    return Lead(ahead, float(score[1].mean()), float(shown[1].mean()))


def nearest_kept(space: RankSpace, genes: np.ndarray) -> np.ndarray:
    """genes [L] with each block's triple replaced by the nearest kept one, int32 [L].

    The distance is the sum of the steps of the three genes; among equals the cheaper triple wins.

    Raises:
      InputError: genes have a wrong length, dtype or value.
    """
    return np.concatenate([triples[0] for triples in _by_distance(space, genes)])


def neighbours(
    space: RankSpace, genes: np.ndarray, count: int, rng: np.random.Generator
) -> np.ndarray:
    """Up to `count` distinct kept genes, int32 [n, L], near `genes` [L] in ranks and in MACs.

    Random exchanges of the triples of one or two blocks of `nearest_kept(space, genes)` for kept
    ones near them; those that change its MACs least come first, such as one gene up a step and its
    like in another block down. Genes that are no candidates are no error.

    Raises:
      InputError: genes have a wrong length, dtype or value.
    """
    near = [triples[:_NEAREST] for triples in _by_distance(space, genes)]
    start = np.stack([triples[0] for triples in near])
    drawn = np.repeat(start[None], _DRAWS * count, axis=0)
    for _ in range(2):
        for neighbour, block in zip(drawn, rng.integers(len(near), size=len(drawn)), strict=True):
            neighbour[block] = rng.choice(near[block])
    _, places = np.unique(drawn, axis=0, return_index=True)
    drawn = drawn[np.sort(places)]
    drawn = drawn[(drawn != start).any(axis=(1, 2))].reshape(-1, space.num_layers)
    change = np.abs(space.macs(drawn) - space.macs(start.ravel()))
    return drawn[np.argsort(change, kind="stable")[:count]]


def _by_distance(space: RankSpace, genes: np.ndarray) -> list[np.ndarray]:
    """The candidates [K_b, 3] of each block, those nearest to its triple in genes [L] first."""
    ordered = []
    own = space.validate(genes).reshape(-1, LAYERS_PER_BLOCK)
    for block, (kept, triple) in enumerate(zip(space.kept, own, strict=True)):
        steps = np.abs(kept - triple).sum(axis=1)
        ordered.append(kept[np.lexsort((space.block_macs(block), steps))])
    return ordered
