"""The multiple-choice knapsack: one option a group, least total loss, costs within a budget."""

import math

import numpy as np

_MAX_CELLS = 2**17


def least_loss(
    losses: list[np.ndarray], costs: list[np.ndarray], budgets: np.ndarray
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
