"""Ranks by measured sensitivity and cost, without training or labels.

The sensitivity of a choice is what it adds to the loss with all other layers as they are. Taken to
add up, they make the ranks of least loss inside a budget a knapsack problem with one choice a
block, which dynamic programming solves for all budgets at once.
"""

import contextlib
import json
import math
from collections.abc import Iterable, Sequence

import numpy as np
from etils import epath

from flora_jax.closed_form.sensitivity import Sensitivity
from flora_jax.cluster.processes import is_first, wait_for_all
from flora_jax.errors import InputError
from flora_jax.flora.cost import Cost
from flora_jax.flora.filter import hull_options
from flora_jax.flora.space import RankSpace
from flora_jax.flora.supernet import Supernet
from flora_jax.io.json_lines import JsonLines, read_lines
from flora_jax.models.spec import by_block
from flora_jax.progress import Progress

_ROUNDS = 4  # of exchanges, at most
_MAX_CELLS = 2**17  # of cost, in the knapsack


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
      int32 [L], or [K, L] for K budgets.

    Raises:
      InputError: a budget is below the least MACs of the space, or the images do not fit.
    """
    budgets, cost = np.atleast_1d(np.asarray(macs)), supernet.space.macs_cost
    _check_reachable(supernet.space, cost, budgets)
    sensitivity = Sensitivity(supernet, images, measure)
    sensitivities = full_rank_sensitivity(sensitivity)
    genes = allocate_by(sensitivity, sensitivities, cost, budgets.tolist())
    return genes if np.ndim(macs) else genes[0]


def full_rank_sensitivity(
    sensitivity: Sensitivity, file: epath.Path | None = None
) -> list[np.ndarray]:
    """The sensitivity of every choice where all other layers are at full rank; shows progress.

    Args:
      file: keeps those of each block, as a JSON line, from which an interrupted measure goes on.
    """
    lines = [] if file is None else read_lines(file)
    wait_for_all("sensitivities are read")
    blocks = [json.loads(line)["layers"] for line in lines]
    total = sensitivity.space.num_blocks
    with contextlib.ExitStack() as stack:
        kept = None
        if file is not None and is_first() and len(blocks) < total:
            kept = stack.enter_context(JsonLines(file, lines))
        progress = stack.enter_context(Progress("sensitivity", total, len(blocks), unit="block"))
        for block in range(len(blocks), total):
            blocks.append([layer.tolist() for layer in sensitivity.of_block(block)])
            if kept is not None:
                kept.append([{"layers": blocks[-1]}], durable=True)
            progress.update()
    return [np.array(layer) for layers in blocks for layer in layers]


def allocate_by(
    sensitivity: Sensitivity, sensitivities: list[np.ndarray], cost: Cost, budgets: Sequence[int]
) -> np.ndarray:
    """Genes int32 [K, L] for budgets of any cost.

    The sensitivities at full rank say where to start. There, those of choices nearby are measured
    anew and ranks are exchanged, as long as that makes the whole network better. So it goes on from
    two starts, for exchanges find no way from one to the other.
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
                (
                    descend(start, budget)
                    for start in _starts(sensitivity, sensitivities, cost, budget)
                ),
                key=sensitivity.loss,
            )
            for budget in budgets
        ]
    return np.array(found, np.int32).reshape(-1, space.num_layers)


def _starts(
    sensitivity: Sensitivity, sensitivities: list[np.ndarray], cost: Cost, budget: int
) -> list[np.ndarray]:
    """The better of least sum of sensitivities and of their roots; and nearly uniform choices.

    They add up where errors are small and independent, their roots where errors point the same way.
    """
    space = sensitivity.space
    roots = [np.sqrt(np.maximum(of_layer, 0)) for of_layer in sensitivities]
    sums = [best_within(space, each, cost, [budget])[0] for each in (sensitivities, roots)]
    return [min(sums, key=sensitivity.loss), *nearly_uniform(space, sensitivities, cost, budget)]


def nearly_uniform(
    space: RankSpace, sensitivities: list[np.ndarray], cost: Cost, budget: int
) -> list[np.ndarray]:
    """The largest common choice inside the budget, and one more where what is left does most.

    None where no common choice is affordable, or the candidates are not that near to it.
    """
    most = max(map(len, sensitivities))
    common = [np.minimum(gene, space.full_rank_genes) for gene in range(most)]
    affordable = [genes for genes in common if cost(genes) <= budget]
    if not affordable:
        return []
    near = [
        np.where(np.isin(np.arange(len(of_layer)), (gene, gene + 1)), of_layer, np.inf)
        for of_layer, gene in zip(sensitivities, affordable[-1], strict=True)
    ]
    genes = best_within(space, near, cost, [budget])[0]
    is_near = np.isin(genes - affordable[-1], (0, 1)).all()
    return [genes] if is_near and cost(genes) <= budget else []


def _exchange(sensitivity: Sensitivity, genes: np.ndarray, cost: Cost, budget: int) -> np.ndarray:
    """The genes after the best exchange of ranks between layers, or the same if none is better.

    Each layer goes one choice up or down at most. The sensitivities of many changes at once do not
    add up, so changes are made dearer and dearer, and what remains is tried as a whole.
    """
    sensitivities = sensitivity.of_choices(genes, reach=1)
    gains = np.concatenate([-of_layer[np.isfinite(of_layer)] for of_layer in sensitivities])
    prices = np.quantile(gains[gains > 0], (0, 0.5, 0.75, 0.9)) if (gains > 0).any() else [0.0]
    candidates = {tuple(genes.tolist())}
    for price in prices:
        priced = [of_layer + price for of_layer in sensitivities]
        for layer, gene in enumerate(genes):
            priced[layer][gene] = 0.0
        candidate = best_within(sensitivity.space, priced, cost, [budget])[0]
        candidates.add(tuple(candidate.tolist()))
    return np.array(min(sorted(candidates), key=sensitivity.loss), np.int32)


def best_within(
    space: RankSpace,
    sensitivities: list[np.ndarray],
    cost: Cost,
    budgets: Sequence[int] | np.ndarray,
) -> np.ndarray:
    """Genes of the least total sensitivity for each budget, of the space, int32 [K, L].

    Args:
      sensitivities: one array [choices] a layer, as `Sensitivity.of_choices` gives them.
      cost: that the budgets are of.

    Raises:
      InputError: a budget is below what the space can reach.
    """
    budgets = np.asarray(budgets)
    _check_reachable(space, cost, budgets)
    of_triples = [
        np.sum([of_layer[genes] for of_layer, genes in zip(layers, triples.T, strict=True)], axis=0)
        for layers, triples in zip(by_block(sensitivities), space.kept, strict=True)
    ]
    costs = [cost.of_block(block, triples) for block, triples in enumerate(space.kept)]
    picks = least_loss(of_triples, costs, budgets - cost.fixed)
    genes = [triples[pick] for triples, pick in zip(space.kept, picks.T, strict=True)]
    return np.concatenate(genes, axis=1)


def multiplier_path(sensitivities: list[np.ndarray], cost: Cost) -> np.ndarray:
    """The ranks that a falling price of cost picks, int32 [T, L]: nested, cheapest first, to full.

    Along it every layer climbs the lower convex hull of its sensitivities over its costs.
    """
    steps = []
    for layer, (of_layer, spent) in enumerate(zip(sensitivities, cost.layers, strict=True)):
        hull = hull_options(-of_layer, spent)
        gains = -np.diff(of_layer[hull]) / np.diff(spent[hull])
        steps += [(gain, layer, gene) for gain, gene in zip(gains, hull[1:], strict=True)]
    pairs = zip(sensitivities, cost.layers, strict=True)
    genes = np.array([hull_options(-of_layer, spent)[0] for of_layer, spent in pairs])
    path = [genes.copy()]
    for _, layer, gene in sorted(steps, key=lambda step: -step[0]):
        genes[layer] = gene
        path.append(genes.copy())
    path.append(np.array([len(of_layer) - 1 for of_layer in sensitivities]))
    return np.array(path, np.int32)


def _check_reachable(space: RankSpace, cost: Cost, budgets: np.ndarray) -> None:
    least, most = cost.range_over(space.kept)
    if not budgets.min() >= least:
        raise InputError(
            f"no subnet costs at most {budgets.min()} {cost.unit}; the space reaches "
            f"{least}..{most}"
        )


def least_loss(
    losses: Sequence[np.ndarray], costs: Sequence[np.ndarray], budgets: np.ndarray
) -> np.ndarray:
    """The options of least total loss for every budget, by dynamic programming over the cost.

    Where a multiplier (the price of a unit of cost) reaches the best options of some budgets only,
    those on the lower convex hull, this finds them for all. Costs are counted in cells of their
    greatest common divisor. Above 2**17 cells a cell is made wider and a cost is rounded up to it:
    the result is legal, and misses at most a cell a group of the budget.

    Args:
      losses: one float array [options] a group.
      costs: one integer array [options] a group, of the same options.
      budgets: integers [K], the most that the options may cost together.

    Returns:
      int64 [K, groups]; of equal options the cheaper one.

    Raises:
      ValueError: a budget is below the cheapest total.
    """
    least = sum(int(cost.min()) for cost in costs)
    if min(budgets) < least:
        raise ValueError(f"budget {min(budgets)} is below the cheapest total, {least}")
    extra = [np.asarray(cost, np.int64) - cost.min() for cost in costs]
    span = sum(int(each.max()) for each in extra)
    cell = int(np.gcd.reduce(np.concatenate(extra))) or 1
    if span > cell * _MAX_CELLS:
        cell = math.ceil(span / _MAX_CELLS)
    steps = [-(-each // cell) for each in extra]
    most = sum(int(each.max()) for each in steps)
    room = np.minimum((np.asarray(budgets, np.int64) - least) // cell, most)

    total = np.zeros(int(room.max()) + 1)  # of the groups so far, within so many cells
    picks = []
    for loss, step in zip(losses, steps, strict=True):
        best, pick = np.full(len(total), np.inf), np.zeros(len(total), np.int64)
        for option in _not_dominated(loss, step):
            within = len(total) - step[option]
            if within <= 0:
                continue
            candidate = total[:within] + loss[option]
            is_better = candidate < best[step[option] :]
            best[step[option] :][is_better] = candidate[is_better]
            pick[step[option] :][is_better] = option
        total = best
        picks.append(pick)

    chosen = np.empty((len(room), len(losses)), np.int64)
    for group in reversed(range(len(losses))):
        chosen[:, group] = picks[group][room]
        room = room - steps[group][chosen[:, group]]
    return chosen


def _not_dominated(loss: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """Indices of the options, by ascending cost, that lose less than all that cost no more."""
    order = np.lexsort((loss, cost))
    best_before = np.concatenate([[np.inf], np.minimum.accumulate(loss[order])[:-1]])
    return order[loss[order] < best_before]
