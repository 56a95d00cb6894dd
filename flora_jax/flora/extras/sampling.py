"""Samplings of the supernet beside the published one (ours).

"sandwich" is that of BigNAS (arXiv 2003.11142), "nested" that of FlexRank (arXiv 2602.02680).
"""

from collections.abc import Callable

import numpy as np

from flora_jax.flora.space import RankSpace

Draw = Callable[[int], np.ndarray]  # step -> genes int32 [L], the same on every host
EXTRA_SAMPLINGS = ("sandwich", "nested")
_STRAY = 0.1  # chance of a gene to leave its profile, by one choice up or down


def sandwich(space: RankSpace, seed: int) -> Draw:
    """The largest subnet, the smallest, and one drawn with favour for low ranks, in turn."""
    extremes = space.full_rank_genes, space.cheapest_genes

    def draw(step: int) -> np.ndarray:
        if (turn := step % 3) < 2:
            return extremes[turn]
        return space.sample(np.random.default_rng([seed, step]), 1, "low_rank_aware")[0]

    return draw


def nested(space: RankSpace, profiles: np.ndarray, seed: int) -> Draw:
    """Subnets along a path of ascending ranks [T, L], each with small random steps off it."""
    last = space.full_rank_genes

    def draw(step: int) -> np.ndarray:
        rng = np.random.default_rng([seed, step])
        stray = (rng.random(space.num_layers) < _STRAY) * rng.choice((-1, 1), space.num_layers)
        genes = profiles[rng.integers(len(profiles))] + stray
        return np.clip(genes, 0, last).astype(np.int32)

    return draw
