"""Which subnet a step of the supernet trains."""

from collections.abc import Callable

import numpy as np

from flora_jax.flora.space import RankSpace

# As published, FLORA draws with favour for low ranks; the others are of BigNAS (arXiv 2003.11142)
# and FlexRank (arXiv 2602.02680).
SUPERNET_LAWS = ("low_rank_aware", "sandwich", "nested")
_STRAY = 0.1  # chance of a gene to leave its profile, by one choice up or down

Draw = Callable[[int], np.ndarray]  # step -> genes int32 [L]


def space_law(space: RankSpace, law: str, seed: int) -> Draw:
    """Independent draws of one of the space's own laws, such as "low_rank_aware" or "uniform"."""
    return lambda step: space.sample(np.random.default_rng([seed, step]), 1, law)[0]


def sandwich_law(space: RankSpace, seed: int) -> Draw:
    """The largest subnet, the smallest, and one drawn with favour for low ranks, in turn."""
    drawn, smallest = space_law(space, "low_rank_aware", seed), space.cheapest_genes
    turns = (lambda _: space.full_rank_genes, lambda _: smallest, drawn)
    return lambda step: turns[step % len(turns)](step)


def nested_law(space: RankSpace, profiles: np.ndarray, seed: int) -> Draw:
    """Subnets along a path of ascending ranks [T, L], each with small random steps off it."""
    last = space.full_rank_genes

    def draw(step: int) -> np.ndarray:
        rng = np.random.default_rng([seed, step])
        stray = (rng.random(space.num_layers) < _STRAY) * rng.choice((-1, 1), space.num_layers)
        genes = profiles[rng.integers(len(profiles))] + stray
        return np.clip(genes, 0, last).astype(np.int32)

    return draw
