"""ViT-Slim (Chavan et al., CVPR 2022, arXiv 2201.00814): learn gates, threshold, cut, retrain.

One-shot l1 gates over attention dimensions, MLP units and tokens are trained with the weights, one
global quantile a kind decides what stays, and that is trained on. Published: DeiT-B at 10.6 G of
17.57 G multiply-adds with 82.4 % top-1. The published code only masks; here what is masked is cut
out, which is the same function (docs/decisions.md). Ours: one share of the dense MACs in place of
the three quantiles (`slim.budget.macs`), gates folded into the weights (`slim.fold`), and heads
turned first, so that gate i is that of the i-th direction of importance (`slim.rotate_images`).
"""

import logging

from flora_jax import slim as vit_slim
from flora_jax.closed_form.calibrate import calibrate
from flora_jax.closed_form.reduce import rotated
from flora_jax.evaluation.evaluate import top1
from flora_jax.methods import shared
from flora_jax.models.network import Network
from flora_jax.models.spec import Spec
from flora_jax.runs.checks import check_macs_budget, warn_of_idle_gates
from flora_jax.runs.settings import SlimSettings
from flora_jax.runs.workdir import Result, Run, SavedModel, Step
from flora_jax.slim.threshold import DECISION_FILE, write_decision_once
from flora_jax.training.train import train
from flora_jax.weights import folder

log = logging.getLogger(__name__)


def slim(run: Run) -> None:
    """Slim the dense model, and compare the two."""
    dense = shared.start(run)
    small = slim_where_named(run, dense)
    shared.finish(run, dense, small)


def slim_where_named(run: Run, dense: Result) -> Result:
    """The slimmed model where the run slims, otherwise the dense one."""
    settings = run.settings
    metric = run.metric_of(settings.slim.retrain)
    return run.step(
        "slim",
        cut_and_retrain,
        *(dense, settings.slim, metric),
        saved=SavedModel("slim"),
        otherwise=dense,
    )


def cut_and_retrain(step: Step, dense: Network, settings: SlimSettings, metric: str) -> Network:
    """ViT-Slim: learns gates, cuts out what they close, retrains"""
    gated = train_gates(step, dense, settings, metric)
    masks = choose_masks(settings, dense.spec, gated)
    write_decision_once(step.run.folder / DECISION_FILE, gated, masks)
    small = vit_slim.extract(gated, masks, fold=settings.fold, tile=settings.tile)
    heldout = step.images.heldout_set
    log.info(
        "cut: %.1f %% of the multiply-adds, %.1f %% of the parameters stay; %.2f %% top-1 held-out "
        "before retraining (with gates and nothing cut: %.2f %%)",
        100 * small.spec.macs() / dense.spec.macs(),
        100 * small.spec.num_params() / dense.spec.num_params(),
        100 * top1(small, heldout),
        100 * top1(gated.network, heldout),
    )
    check_macs_budget(step.run.settings, dense.spec, small.spec)
    folder.save_once(small, step.directory / "cut")
    folder.save_description_once(small, step.directory / "retrain")
    looks = step.images.looked_at(dense)
    return train(
        small,
        step.images.train_set,
        settings.retrain,
        **step.training("slim/retrain"),
        teacher=dense,
        heldout=looks,
        metric=metric,
    )


def train_gates(step: Step, dense: Network, settings: SlimSettings, metric: str) -> vit_slim.Gated:
    """Trains the dense model with gates, whose l1 norm is a part of the loss."""
    start = dense
    if settings.rotate_images:
        normalization = step.images.train_set.normalization
        batches = step.images.without_augmentation(settings.rotate_images, "rotate")
        start = rotated(dense, calibrate(dense, batches, normalize=normalization))
    gated = vit_slim.add_gates(start, settings.attention, settings.tokens)
    gated = train(
        gated,
        step.images.train_set,
        settings.gates,
        **step.training("slim/gates"),
        teacher=dense,
        penalty=settings.penalty,
        heldout=step.images.looked_at(dense),
        metric=metric,
    )
    warn_of_idle_gates(gated.gates())
    return gated


def choose_masks(settings: SlimSettings, dense: Spec, gated: vit_slim.Gated) -> vit_slim.Masks:
    """Applies the budget of each kind, or the one MAC budget where that is set."""
    budget = settings.budget
    if budget.macs:
        return vit_slim.threshold_to_macs(gated, round(budget.macs * dense.macs()), settings.tile)
    patch = budget.patch if gated.has_token_gates else 1.0
    return vit_slim.threshold(gated, budget.attn, budget.mlp, patch)
