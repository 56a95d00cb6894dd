"""The ViT-Slim stage: learn the gates, cut, retrain (ViT-Slim, section 3)."""

import dataclasses
import logging

from flora_jax import slim
from flora_jax.evaluation import top1
from flora_jax.io import folder
from flora_jax.run import Run

log = logging.getLogger(__name__)


def slim_down(run: Run) -> None:
    """The dense model with what its gates can spare cut out, retrained."""
    gated, settings = trained_gates(run), run.config.slim
    masks = choose_masks(run, gated)
    small = slim.extract(gated, masks, fold=settings.fold, tile=settings.tile)
    log.info(
        "cut: %.1f %% of the multiply-adds, %.1f %% of the parameters stay; %.2f %% top-1 held-out "
        "before retraining (with gates and nothing cut: %.2f %%)",
        100 * small.spec.macs() / run.spec.macs(),
        100 * small.spec.num_params() / run.spec.num_params(),
        100 * top1(small, run.heldout_set),
        100 * top1(gated.network, run.heldout_set),
    )
    run.check_budget(small.spec)
    folder.save(small, run.folder / "slim/cut")
    folder.save_description(small, run.folder / "slim/retrain")
    small = run.train(small, settings.retrain, "slim/retrain", teacher=run.dense)
    folder.save(small, run.folder / "slim")


def trained_gates(run: Run) -> slim.Gated:
    """The dense model's gates after their training, which is done once."""
    settings = run.config.slim
    gated = slim.add_gates(run.dense, settings.attention, settings.tokens)
    penalty = slim.SparsityPenalty(**settings.penalty)
    network = run.train(
        gated.network, settings.gates, "slim/gates", penalty=penalty, teacher=run.dense
    )
    return dataclasses.replace(gated, network=network)


def choose_masks(run: Run, gated: slim.Gated) -> slim.Masks:
    """By the config's budget of each kind, or by its one MAC budget where that is set."""
    budget = run.config.slim.budget
    if budget.macs:
        macs = round(budget.macs * run.spec.macs())
        return slim.threshold_to_macs(gated, macs, run.config.slim.tile)
    patch = budget.patch if gated.has_token_gates else 1.0
    return slim.threshold(gated, budget.attn, budget.mlp, patch)
