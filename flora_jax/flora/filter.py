"""Low-rank aware candidate filtering: which gene triples of each block stay in the search.

A triple is judged by one number, its local supernet's accuracy minus a price on its MACs (FLORA,
section on low-rank aware candidate filtering). The price comes from the target budget.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from flora_jax.errors import InputError
from flora_jax.flora.space import RankSpace


def budget_price(scores: list[np.ndarray], macs: list[np.ndarray], budget: int) -> float:
    """The price of a MAC under "least total accuracy drop within the MAC budget".

    It is the Lagrange multiplier: the least price at which the blocks' best triples by
    `score - price * macs`, the cheaper one where two are equal, fit the budget together.

    Args:
      scores: one float array [K_b] a block, top1 of each triple.
      macs: one integer array [K_b] a block, MACs of the same triples.
      budget: MACs of all blocks' searchable layers together.

    Returns:
      Accuracy per MAC, at least 0; 0 when the most accurate triples fit already.

    Raises:
      ValueError: scores and macs differ in shape, a score is not finite, or the budget is below
        the cheapest total.
    """
    scores = [np.asarray(score, np.float64) for score in scores]
    macs = [np.asarray(cost, np.int64) for cost in macs]
    _check_aligned(scores, macs)
    cheapest = sum(int(cost.min()) for cost in macs)
    if budget < cheapest:
        raise InputError(f"budget {budget} is below the cheapest total, {cheapest} MACs")
    steps = [_hull_steps(score, cost) for score, cost in zip(scores, macs, strict=True)]
    slopes, extra = np.concatenate(steps, axis=1)
    order = np.argsort(-slopes)
    too_much = cheapest + np.cumsum(extra[order]) > budget
    return float(slopes[order][np.argmax(too_much)]) if too_much.any() else 0.0


def keep_triples(
    score: np.ndarray, macs: np.ndarray, price: float, drop: float = 0.7
) -> np.ndarray:
    """Indices of the triples kept of a block, ascending int64 [N - int(drop * N)].

    The lowest int(drop * N) by `score - price * macs` go, the costlier first where two are equal;
    the last triple, which is full rank, always stays.

    Args:
      score: float [N], top1 of each triple.
      macs: int [N].
      price: accuracy per MAC.
      drop: share to drop, in [0, 1).
    """
    if not 0 <= drop < 1:
        raise InputError(f"drop must lie in [0, 1), got {drop}")
    score, macs = np.asarray(score, np.float64), np.asarray(macs, np.int64)
    _check_aligned([score], [macs])
    count = len(score) - int(drop * len(score))
    full_rank = len(score) - 1
    best_first = np.lexsort((macs, -(score - price * macs)))
    others = best_first[best_first != full_rank]
    return np.sort(np.append(others[: count - 1], full_rank))


def filter_space(
    space: RankSpace, scores: list[np.ndarray], budgets: Sequence[int], drop: float = 0.7
) -> tuple[RankSpace, list[float]]:
    """The space of the triples kept at the price of any budget, and the prices.

    Args:
      space: every block of it keeps the full-rank triple.
      scores: one float array [K_b] a block, aligned with `space.kept`.
      budgets: MACs of the whole network for one image.
      drop: share of each block's triples to drop, at each price.

    Raises:
      ValueError: scores do not fit the space, or a budget is below its least MACs.
    """
    if not space.contains(space.full_rank_genes):
        raise InputError("filtering needs a space that keeps the full-rank triple of every block")
    if min(budgets) < space.macs_range()[0]:
        raise InputError(
            f"budget {min(budgets)} is below the least MACs of the space, {space.macs_range()[0]}"
        )
    macs = [space.block_macs(b) for b in range(space.num_blocks)]
    prices = [budget_price(scores, macs, budget - space.fixed_macs) for budget in budgets]
    kept = []
    for triples, score, cost in zip(space.kept, scores, macs, strict=True):
        at_each = [keep_triples(score, cost, price, drop) for price in prices]
        kept.append(triples[np.unique(np.concatenate(at_each))])
    return space.keep(kept), prices


def _check_aligned(scores: list[np.ndarray], macs: list[np.ndarray]) -> None:
    if len(scores) != len(macs):
        raise ValueError(f"expected scores of {len(macs)} blocks, got {len(scores)}")
    for b, (score, cost) in enumerate(zip(scores, macs, strict=True)):
        if score.shape != cost.shape or score.ndim != 1:
            raise ValueError(
                f"block {b} has scores of shape {score.shape} for macs of shape {cost.shape}"
            )
        if not np.isfinite(score).all():
            raise ValueError(f"block {b} has a score that is not finite")


def hull_options(score: np.ndarray, macs: np.ndarray) -> list[int]:
    """Indices along the upper concave hull of score over MACs, from the cheapest up."""
    by_cost = np.lexsort((-score, macs))
    hull = by_cost[:1].tolist()
    for i in by_cost[1:].tolist():
        if score[i] <= score[hull[-1]]:
            continue
        while len(hull) > 1 and _slope(score, macs, hull[-1], i) >= _slope(score, macs, *hull[-2:]):
            hull.pop()
        hull.append(i)
    return hull


def _hull_steps(score: np.ndarray, macs: np.ndarray) -> np.ndarray:
    """Steps up the hull of one block, float64 [2, S]: accuracy per MAC, MACs."""
    hull = hull_options(score, macs)
    slopes = [_slope(score, macs, a, b) for a, b in itertools.pairwise(hull)]
    return np.array([slopes, np.diff(macs[hull])])


def _slope(score: np.ndarray, macs: np.ndarray, a: int, b: int) -> float:
    return (score[b] - score[a]) / (macs[b] - macs[a])
