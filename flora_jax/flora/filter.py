"""Low-rank aware candidate filtering: the best rank triples of each block (FLORA, section 3).

For each block a local supernet is trained, in which only that block's ranks vary, by uniform draws.
Every triple of the block is then scored on held-out images, and judged by one number,

    score - price * MACs,

of which the lowest int(0.7 * N) go. Deviations from the published code: the price is not published,
here it is the Lagrange multiplier of "least total accuracy drop within the budget" (it explains the
published kept sets best, docs/decisions.md); the full-rank triple always stays; scores are of a
split that is held out of the training images.
"""

import itertools
import logging
from collections.abc import Callable, Sequence

import numpy as np
from etils import epath

from flora_jax.cluster.processes import wait_for_all
from flora_jax.errors import InputError
from flora_jax.evaluation.evaluate import EvaluationSet, check_measures, means
from flora_jax.flora.block_scorer import BlockScorer
from flora_jax.flora.space import RankSpace
from flora_jax.flora.supernet import Supernet
from flora_jax.io.files import read_json, write_json_once
from flora_jax.io.paths import user_path
from flora_jax.models.network import Network
from flora_jax.progress import Progress
from flora_jax.training.image_set import ImageSet
from flora_jax.training.settings import Recipe
from flora_jax.training.train import measured_by, train
from flora_jax.training.watch import Watch, not_watched

log = logging.getLogger(__name__)

LOCAL_TRAINING = Recipe(epochs=20.0, warmup_epochs=3.0, learning_rate=7.5e-6, evaluate_epochs=0.0)


def filter_space(
    supernet: Supernet,
    images: ImageSet,
    heldout: ImageSet | EvaluationSet,
    macs: int | Sequence[int],
    recipe: Recipe = LOCAL_TRAINING,
    *,
    directory: epath.PathLike | None = None,
    teacher: Network | None = None,
    drop: float = 0.7,
    metric: str = "",
    seed: int = 0,
    watch_of: Callable[[str], Watch] = lambda name: not_watched,
    **training,
) -> RankSpace:
    """Keeps the best rank triples of each block; goes on where it stopped.

    Args:
      supernet: with the weights that it inherits.
      images: that the local supernet of each block is trained on, a tenth of all in the paper.
      heldout: that its triples are scored on.
      macs: budgets of the whole network, one or several; they set the price of a MAC.
      recipe: of the local supernets.
      directory: receives a training and the scores of each block; None: nothing is kept.
      drop: share of each block's triples to drop.
      metric: of the score; empty: top-1, or cosine.
      watch_of: of a training's name, as in `flora_jax.train`.
      training: further arguments of `flora_jax.train`.

    Raises:
      InputError, NonFiniteLossError, Stopped: as `flora_jax.train` and `keep_candidates`.
    """
    space, found = supernet.space, []
    folder = None if directory is None else user_path(directory)
    heldout = measured_by(heldout, space.spec, teacher)
    quality = heldout.quality
    deciding, shown = quality.metric(metric), quality.shown.name
    with Progress("filter", total=space.num_blocks, unit="block") as progress:
        for block in range(space.num_blocks):
            name = f"block_{block:02d}"
            file = None if folder is None else folder / name / "scores.json"
            wait_for_all("scores are looked for")
            if file is not None and file.exists():
                metrics = read_json(file)
            else:
                local = train(
                    local_supernet(supernet, block),
                    images,
                    recipe,
                    directory=folder and folder / name,
                    name=f"filter/{name}",
                    teacher=teacher,
                    sample="uniform",
                    seed=seed,
                    watch=watch_of(f"filter/{name}"),
                    **training,
                )
                metrics = score_block(local, block, heldout)
                if file is not None:
                    write_json_once(file, {name: m.tolist() for name, m in metrics.items()})
            found.append(deciding.score(np.asarray(metrics[deciding.name])))
            progress.update(1, **{f"best_{shown}_of_block": float(max(metrics[shown]))})
    kept, prices = keep_candidates(space, found, np.atleast_1d(macs).tolist(), drop)
    each = ", ".join(f"{1e9 * price:.4g}" for price in prices)
    log.info("filter: %s less %s for each giga-MAC is what choices are kept by", shown, each)
    return kept


def local_supernet(supernet: Supernet, block: int) -> Supernet:
    """The supernet whose other blocks stay at full rank."""
    space = supernet.space
    kept = list(space.full_rank_triples[:, None])
    kept[block] = space.kept[block]
    return Supernet(supernet.network, space.keep(kept))


def score_block(
    supernet: Supernet, block: int, evaluation_set: EvaluationSet
) -> dict[str, np.ndarray]:
    """Metrics of each candidate of `block`, other blocks at full rank, in the order of `kept`.

    Returns:
      As `flora_jax.evaluate`, with K in the place of P.

    Raises:
      InputError: as `flora_jax.evaluate`.
      ValueError: the network has no such block.
    """
    space, quality = supernet.space, evaluation_set.quality
    check_measures(space.spec, evaluation_set)
    if not 0 <= block < space.num_blocks:
        raise ValueError(f"block {block} lies outside 0..{space.num_blocks - 1}")
    scorer = BlockScorer(supernet, evaluation_set.mesh, quality.outputs)
    batches, others = evaluation_set.batches, space.full_rank_genes
    sums = scorer.sums(block, space.kept[block], others, batches, quality.sums)
    return means(sums, evaluation_set)


def keep_candidates(
    space: RankSpace, scores: list[np.ndarray], budgets: Sequence[int], drop: float = 0.7
) -> tuple[RankSpace, list[float]]:
    """The space of the candidates that stay at the price of any budget, and the prices.

    Args:
      space: of all candidates, the full-rank triple of every block among them.
      scores: one float array [K_b] a block, aligned with `space.kept`.
      budgets: MACs of the whole network for one image.
      drop: share of each block's triples to drop, at each price.

    Raises:
      InputError: full rank is no candidate, or a budget is below the least MACs of the space.
      ValueError: scores do not fit the space, or one is not finite.
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
      InputError: the budget is below the cheapest total.
      ValueError: scores and macs differ in shape, or a score is not finite.
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
      drop: share to drop.

    Raises:
      InputError: drop lies outside [0, 1).
      ValueError: score and macs differ in shape, or a score is not finite.
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
