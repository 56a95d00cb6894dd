"""Ranks for a budget out of what each layer's choices cost and spoil alone: no training, no labels.

Every choice of a layer is tried with all other layers as they are, on calibration images. The drops
are taken to add up; then the ranks of least total drop inside a budget are a knapsack problem with
one choice a block, which dynamic programming solves for all budgets at once.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from flora_jax.closed_form.knapsack import least_loss
from flora_jax.closed_form.sensitivity import Sensitivity
from flora_jax.errors import InputError
from flora_jax.flora.cost import Cost
from flora_jax.flora.filter import hull_options
from flora_jax.flora.space import RankSpace
from flora_jax.flora.supernet import Supernet
from flora_jax.models.spec import by_block
from flora_jax.progress import Progress

_ROUNDS = 4  # of exchanges, at most


def allocate(
    supernet: Supernet,
    images: np.ndarray | Iterable[np.ndarray],
    *,
    macs: int | Sequence[int],
    measure: str | None = None,
) -> np.ndarray:
    """Genes for budgets of multiply-adds, without training or labels.

    Args:
      supernet: as `factorize` gives it, or trained.
      images: float32 [n, H, W, C], normalised, or batches of such; some hundreds.
      macs: the most that the subnet may cost; or K such budgets.
      measure: "divergence" of the predictions from the full-rank network's, or "squared_error" of
        its outputs, where these are features; None: what suits the network.

    Returns:
      int32 [L], or [K, L] for K budgets, of the kept triples.

    Raises:
      InputError: a budget is below the least MACs of the space, or the images do not fit.
    """
    budgets, cost = np.atleast_1d(np.asarray(macs)), supernet.space.macs_cost
    _check_reachable(supernet.space, cost, budgets)
    sensitivity = Sensitivity(supernet, images, measure)
    drops = full_rank_sensitivity(sensitivity)
    genes = allocate_by(sensitivity, drops, cost, budgets.tolist())
    return genes if np.ndim(macs) else genes[0]


def full_rank_sensitivity(sensitivity: Sensitivity) -> list[np.ndarray]:
    """What each choice of each layer spoils alone; shows its progress."""
    with Progress("sensitivity", total=sensitivity.space.num_blocks, unit="block") as progress:
        return sensitivity.drops(on_block=progress.update)


def allocate_by(
    sensitivity: Sensitivity, drops: list[np.ndarray], cost: Cost, budgets: Sequence[int]
) -> np.ndarray:
    """Genes int32 [K, L] for budgets of any cost, out of the drops at full rank and what follows.

    The drops say where to start. There, drops of choices nearby are measured anew and ranks are
    exchanged, as long as that makes the whole network better. So it goes on from two starts, for
    exchanges find no way from one to the other.
    """
    space = sensitivity.space
    with Progress("allocate", total=2 * _ROUNDS * len(budgets), unit="round") as progress:

        def descend(genes: np.ndarray, budget: int) -> np.ndarray:
            for _ in range(_ROUNDS):
                genes, before = _exchange(sensitivity, genes, cost, budget), genes
                progress.update(loss=sensitivity.loss(genes))
                if (genes == before).all():
                    break
            return genes

        found = [
            min(
                (descend(start, budget) for start in _starts(sensitivity, drops, cost, budget)),
                key=sensitivity.loss,
            )
            for budget in budgets
        ]
    return np.array(found, np.int32).reshape(-1, space.num_layers)


def _starts(
    sensitivity: Sensitivity, drops: list[np.ndarray], cost: Cost, budget: int
) -> list[np.ndarray]:
    """The better of least sum of drops and least sum of their roots; and nearly uniform choices.

    Drops add up where errors are small and independent, their roots where errors point the same
    way.
    """
    space = sensitivity.space
    roots = [np.sqrt(np.maximum(drop, 0)) for drop in drops]
    sums = [best_within(space, each, cost, [budget])[0] for each in (drops, roots)]
    return [min(sums, key=sensitivity.loss), *nearly_uniform(space, drops, cost, budget)]


def nearly_uniform(
    space: RankSpace, drops: list[np.ndarray], cost: Cost, budget: int
) -> list[np.ndarray]:
    """The largest common choice inside the budget, and one more where what is left does most.

    None where no common choice is affordable, or the kept triples are not that near to it.
    """
    common = [np.minimum(gene, space.full_rank_genes) for gene in range(max(map(len, drops)))]
    affordable = [genes for genes in common if cost(genes) <= budget]
    if not affordable:
        return []
    near = [
        np.where(np.isin(np.arange(len(drop)), (gene, gene + 1)), drop, np.inf)
        for drop, gene in zip(drops, affordable[-1], strict=True)
    ]
    genes = best_within(space, near, cost, [budget])[0]
    is_near = np.isin(genes - affordable[-1], (0, 1)).all()
    return [genes] if is_near and cost(genes) <= budget else []


def _exchange(sensitivity: Sensitivity, genes: np.ndarray, cost: Cost, budget: int) -> np.ndarray:
    """The genes after the best exchange of ranks between layers, or the same if none is better.

    Each layer goes one choice up or down at most. Drops of many changes at once do not add up, so
    changes are made dearer and dearer, and what remains is tried as a whole.
    """
    drops = sensitivity.drops(genes, reach=1)
    gains = np.concatenate([-drop[np.isfinite(drop)] for drop in drops])
    prices = np.quantile(gains[gains > 0], (0, 0.5, 0.75, 0.9)) if (gains > 0).any() else [0.0]
    candidates = {tuple(genes.tolist())}
    for price in prices:
        priced = [drop + price for drop in drops]
        for layer, gene in enumerate(genes):
            priced[layer][gene] = 0.0
        candidate = best_within(sensitivity.space, priced, cost, [budget])[0]
        candidates.add(tuple(candidate.tolist()))
    return np.array(min(sorted(candidates), key=sensitivity.loss), np.int32)


def best_within(
    space: RankSpace, drops: list[np.ndarray], cost: Cost, budgets: Sequence[int] | np.ndarray
) -> np.ndarray:
    """Genes of the least total drop for each budget, of the kept triples, int32 [K, L].

    Args:
      drops: one array [choices] a layer, as `Sensitivity.drops` gives them.
      cost: that the budgets are of.

    Raises:
      InputError: a budget is below what the space can reach.
    """
    budgets = np.asarray(budgets)
    _check_reachable(space, cost, budgets)
    of_triples = [
        np.sum([drop[genes] for drop, genes in zip(layers, triples.T, strict=True)], axis=0)
        for layers, triples in zip(by_block(drops), space.kept, strict=True)
    ]
    costs = [cost.of_block(block, triples) for block, triples in enumerate(space.kept)]
    picks = least_loss(of_triples, costs, budgets - cost.fixed)
    genes = [triples[pick] for triples, pick in zip(space.kept, picks.T, strict=True)]
    return np.concatenate(genes, axis=1)


def multiplier_path(drops: list[np.ndarray], cost: Cost) -> np.ndarray:
    """The ranks that a falling price of cost picks, int32 [T, L]: nested, cheapest first, to full.

    Along it every layer climbs the lower convex hull of its drops over its costs.
    """
    steps = []
    for layer, (drop, spent) in enumerate(zip(drops, cost.layers, strict=True)):
        hull = hull_options(-drop, spent)
        gains = -np.diff(drop[hull]) / np.diff(spent[hull])
        steps += [(gain, layer, gene) for gain, gene in zip(gains, hull[1:], strict=True)]
    genes = np.array([hull_options(-d, c)[0] for d, c in zip(drops, cost.layers, strict=True)])
    path = [genes.copy()]
    for _, layer, gene in sorted(steps, key=lambda step: -step[0]):
        genes[layer] = gene
        path.append(genes.copy())
    path.append(np.array([len(drop) - 1 for drop in drops]))
    return np.array(path, np.int32)


def _check_reachable(space: RankSpace, cost: Cost, budgets: np.ndarray) -> None:
    least, most = cost.range_over(space.kept)
    if not budgets.min() >= least:
        raise InputError(
            f"no subnet costs at most {budgets.min()} {cost.unit}; the space reaches "
            f"{least}..{most}"
        )
