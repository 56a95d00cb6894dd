"""A small space, its budgets, made-up scores, and a search in it that takes milliseconds."""

import dataclasses

import numpy as np

from flora_jax.flora import evolution
from flora_jax.flora.cost import Cost
from flora_jax.flora.evolution import EvolutionSettings
from flora_jax.flora.extras.halving import ImageScores
from flora_jax.flora.space import RankSpace
from tests.helpers.networks import MICRO

REGULAR = RankSpace.regular(dataclasses.replace(MICRO, depth=4, blocks=()))
SPACE = REGULAR.keep(
    np.random.default_rng(block).choice(triples, 100, replace=False)
    for block, triples in enumerate(REGULAR.kept)
)
LEAST, MOST = SPACE.macs_range()
RANGE = (LEAST + 0.4 * (MOST - LEAST), LEAST + 0.5 * (MOST - LEAST))
HIGHER = (LEAST + 0.55 * (MOST - LEAST), LEAST + 0.6 * (MOST - LEAST))
SMALL = EvolutionSettings(generations=4, population=8, parents=3, mutants=3, crossovers=3)
OTHER_COST = Cost("cells", 10, tuple(layer % 1000 for layer in SPACE.macs_cost.layers))
TARGET = SPACE.sample_within(np.random.default_rng(99), 1, RANGE)[0]
FIRST = np.concatenate(
    [
        SPACE.sample_within(np.random.default_rng(1), 3, HIGHER),
        REGULAR.sample_within(np.random.default_rng(1), 2, HIGHER),  # not kept
        SPACE.sample_within(np.random.default_rng(1), 9, RANGE),
        SPACE.sample_within(np.random.default_rng(1), 2, (MOST, MOST)),
    ]
)


def closeness(genes):
    """A made-up score: how near the ranks are to hidden ones."""
    return 1 - np.abs(SPACE.ranks(genes) - SPACE.ranks(TARGET)).mean(axis=-1) / 48


def metrics(genes):
    """Score and top1, which disagree about what is best."""
    return closeness(genes), 1 - closeness(genes)


def search(path, score=metrics, **change):
    """Evolves a small population, scored on one image; `change` are other arguments than usual."""

    def of_one_image(genes, start, stop):
        return tuple(values[:, None] for values in score(genes))

    usual = {"space": SPACE, "cost": SPACE.macs_cost, "ranges": [RANGE], "settings": SMALL}
    usual |= {"seed": 7, "scores": ImageScores(of_one_image, 1, (1,))}
    return evolution.search(history_path=path, **(usual | change))


def best_inside(candidates, bounds):
    """The winner of a range, told independently of the search."""
    inside = [candidate for candidate in candidates if bounds[0] <= candidate.cost <= bounds[1]]
    return max(inside, key=lambda candidate: (candidate.score, -candidate.cost))
