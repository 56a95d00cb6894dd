"""How an evolutionary search comes to new genes: crossover, mutation, and neighbours of good ones.

All of it exchanges whole triples of a block, because a mix of two kept triples need not be a kept
one.
"""

import numpy as np

from flora_jax.flora.space import RankSpace
from flora_jax.models.spec import LAYERS_PER_BLOCK

# A neighbour takes triples out of so many that are nearest to the block's own, itself among them.
_NEAREST = 9
# So many times the neighbours asked for are drawn; those nearest in cost are taken.
_DRAWS = 16


def cross_blocks(rng: np.random.Generator, mothers: np.ndarray, fathers: np.ndarray) -> np.ndarray:
    """Children int32 [n, L] that take each block's triple from one of two parents [n, L]."""
    from_mother = rng.random((len(mothers), mothers.shape[1] // LAYERS_PER_BLOCK)) < 0.5
    return np.where(np.repeat(from_mother, LAYERS_PER_BLOCK, axis=1), mothers, fathers)


def mutate(
    rng: np.random.Generator, space: RankSpace, genes: np.ndarray, probability: float
) -> np.ndarray:
    """genes [n, L] with each block redrawn from its kept triples at this probability."""
    redrawn = rng.random((len(genes), space.num_blocks)) < probability
    fresh = space.sample(rng, len(genes))
    return np.where(np.repeat(redrawn, LAYERS_PER_BLOCK, axis=1), fresh, genes)


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
    like in another block down. Genes outside the kept triples are no error.

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
    """The kept triples [K_b, 3] of each block, those nearest to its triple in genes [L] first."""
    ordered = []
    own = space.validate(genes).reshape(-1, LAYERS_PER_BLOCK)
    for block, (kept, triple) in enumerate(zip(space.kept, own, strict=True)):
        steps = np.abs(kept - triple).sum(axis=1)
        ordered.append(kept[np.lexsort((space.block_macs(block), steps))])
    return ordered
