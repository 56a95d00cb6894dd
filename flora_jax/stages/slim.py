"""The ViT-Slim stage: learn the gates, cut, retrain (ViT-Slim, section 3)."""

import dataclasses
import logging

from flora_jax import slim
from flora_jax.evaluation.evaluate import top1
from flora_jax.models.network import Network
from flora_jax.models.spec import Spec
from flora_jax.runs.checks import doubt_gates
from flora_jax.runs.images import Images
from flora_jax.runs.sections import SlimSettings
from flora_jax.slim.masks import write_decision_once
from flora_jax.stages.budget import check_macs_budget
from flora_jax.stages.measured import evaluators
from flora_jax.stages.run import Run, load_dense
from flora_jax.stages.training import train_stage
from flora_jax.weights import folder

log = logging.getLogger(__name__)

DECISION_FILE = "slim/decision.safetensors"


def slim_down(run: Run, images: Images) -> None:
    """Cuts out of the dense model what its gates can spare, and retrains it."""
    settings, dense = run.settings.slim, load_dense(run)
    gated = train_gates(run, images, dense)
    masks = choose_masks(settings, dense.spec, gated)
    write_decision_once(run.folder / DECISION_FILE, gated, masks)
    small = slim.extract(gated, masks, fold=settings.fold, tile=settings.tile)
    log.info(
        "cut: %.1f %% of the multiply-adds, %.1f %% of the parameters stay; %.2f %% top-1 held-out "
        "before retraining (with gates and nothing cut: %.2f %%)",
        100 * small.spec.macs() / dense.spec.macs(),
        100 * small.spec.num_params() / dense.spec.num_params(),
        100 * top1(small, images.heldout_set),
        100 * top1(gated.network, images.heldout_set),
    )
    check_macs_budget(run.settings, dense.spec, small.spec)
    folder.save_once(small, run.folder / "slim/cut")
    folder.save_description_once(small, run.folder / "slim/retrain")
    retrain = settings.retrain
    small = train_stage(
        run,
        small,
        retrain,
        "slim/retrain",
        images.train,
        teacher=dense,
        evaluators=evaluators(run, images),
    )
    folder.save_once(small, run.folder / "slim")


def train_gates(run: Run, images: Images, dense: Network) -> slim.Gated:
    """Trains the dense model with gates."""
    settings = run.settings.slim
    gated = slim.add_gates(dense, settings.attention, settings.tokens)
    network = train_stage(
        run,
        gated.network,
        settings.gates,
        "slim/gates",
        images.train,
        teacher=dense,
        penalty=settings.penalty,
        evaluators=evaluators(run, images),
    )
    gated = dataclasses.replace(gated, network=network)
    doubt_gates(gated.gates())
    return gated


def choose_masks(settings: SlimSettings, dense: Spec, gated: slim.Gated) -> slim.Masks:
    """Applies the budget of each kind, or the one MAC budget where that is set."""
    budget = settings.budget
    if budget.macs:
        return slim.threshold_to_macs(gated, round(budget.macs * dense.macs()), settings.tile)
    patch = budget.patch if gated.has_token_gates else 1.0
    return slim.threshold(gated, budget.attn, budget.mlp, patch)
