"""Where a run begins: the uncompressed model, or any model on its way to another dataset."""

import logging

import jax.numpy as jnp

from flora_jax.evaluation.evaluate import top1
from flora_jax.models.factory import create
from flora_jax.models.network import Network
from flora_jax.runs.checks import check_not_chance
from flora_jax.runs.images import Images
from flora_jax.stages.measured import evaluators
from flora_jax.stages.run import Run
from flora_jax.stages.training import train_stage
from flora_jax.training.probe import fit_classifier, has_no_classifier
from flora_jax.weights import folder
from flora_jax.weights.pretrained import from_pretrained

log = logging.getLogger(__name__)


def pretrain(run: Run, images: Images) -> None:
    """Makes the dense model: reads the weights that the config names, or trains it, or both."""
    settings = run.settings
    if settings.pretrained:
        model = _with_classifier(run, images, from_pretrained(settings.pretrained, run.spec))
    else:
        model = create(run.spec, settings.seed_of("create"))
    if settings.trains_dense:
        folder.save_description_once(model, run.folder / "pretrain")
        model = train_stage(
            run,
            model,
            settings.pretrain,
            "pretrain",
            images.train,
            evaluators=evaluators(run, images),
        )
    folder.save_once(model, run.folder / "dense")
    if images.are_labelled:
        share = float(top1(model, images.heldout_set))
        log.info("dense model: %.2f %% top-1 held-out", 100 * share)
        check_not_chance(settings, share, images.heldout_set.num_images)


def transfer(run: Run, images: Images) -> None:
    """Fine-tunes a model, compressed or not, on this dataset with a new classifier.

    The shape is that of the model in the folder `pretrained`, which a run or `flora_jax.save`
    wrote, or Hugging Face or timm; of the config's `model` section only num_classes counts. A file
    that stands alone has the shape of that section.
    """
    model = _with_classifier(run, images, from_pretrained(run.settings.pretrained, run.spec))
    folder.save_description_once(model, run.folder / "transfer/training")
    model = train_stage(
        run,
        model,
        run.settings.finetune,
        "transfer/training",
        images.train,
        evaluators=evaluators(run, images),
    )
    folder.save_once(model, run.folder / "transfer")


def _with_classifier(run: Run, images: Images, model: Network) -> Network:
    """Fits a classifier that has no weights yet to some training images."""
    number, normalization = run.settings.probe_images, run.settings.data.normalization
    if not number or not images.are_labelled or not has_no_classifier(model):
        return model
    batches = images.labelled(number, "probe")
    model = fit_classifier(model, ((normalization(jnp.asarray(i)), y) for i, y in batches))
    share = 100 * top1(model, images.heldout_set)
    log.info("new classifier, a linear probe: %.2f %% top-1 held-out", share)
    return model
