"""Samplings of the supernet beside the published one (ours).

"sandwich" is that of BigNAS (arXiv 2003.11142), "nested" that of FlexRank (arXiv 2602.02680).
"""

import numpy as np

from flora_jax.flora.sampling import Draw, draw_by_step
from flora_jax.flora.space import RankSpace

EXTRA_SAMPLINGS = ("sandwich", "nested")
_STRAY = 0.1  # chance of a gene to leave its profile, by one choice up or down


def sandwich(space: RankSpace, seed: int) -> Draw:
    """The largest subnet, the smallest, and one drawn with favour for low ranks, in turn."""
    drawn, smallest = draw_by_step(space, "low_rank_aware", seed), space.cheapest_genes
    turns = (lambda _: space.full_rank_genes, lambda _: smallest, drawn)
    return lambda step: turns[step % len(turns)](step)


def nested(space: RankSpace, profiles: np.ndarray, seed: int) -> Draw:
    """Subnets along a path of ascending ranks [T, L], each with small random steps off it."""
    last = space.full_rank_genes

    def draw(step: int) -> np.ndarray:
        rng = np.random.default_rng([seed, step])
        stray = (rng.random(space.num_layers) < _STRAY) * rng.choice((-1, 1), space.num_layers)
        genes = profiles[rng.integers(len(profiles))] + stray
        return np.clip(genes, 0, last).astype(np.int32)

    return draw
