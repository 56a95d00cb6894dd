"""Where a run begins: the uncompressed model, or a finished one on its way to another dataset."""

import logging

from flora_jax.evaluation import top1
from flora_jax.models.factory import create
from flora_jax.stages.images import Images
from flora_jax.stages.run import Run
from flora_jax.stages.training import train_stage
from flora_jax.weights import folder
from flora_jax.weights.pretrained import from_pretrained

log = logging.getLogger(__name__)


def pretrain(run: Run, images: Images) -> None:
    """Makes the dense model: reads the weights that the config names, or trains it, or both."""
    settings = run.settings
    if settings.pretrained:
        model = from_pretrained(settings.pretrained, run.spec)
    else:
        model = create(run.spec, settings.seed_of("create"))
    if settings.trains_dense:
        folder.save_description_once(model, run.folder / "pretrain")
        model = train_stage(run, model, settings.pretrain, "pretrain", images.train)
    folder.save_once(model, run.folder / "dense")
    if images.splits.num_classes:
        log.info("dense model: %.2f %% top-1 held-out", 100 * top1(model, images.heldout_set))


def transfer(run: Run, images: Images) -> None:
    """Fine-tunes a finished model, compressed or not, on this dataset with a new classifier.

    The shape is that of the model in the folder `pretrained`; of the config's `model` section only
    num_classes counts.
    """
    model = from_pretrained(run.settings.pretrained, run.spec)
    folder.save_description_once(model, run.folder / "transfer/training")
    model = train_stage(run, model, run.settings.finetune, "transfer/training", images.train)
    folder.save_once(model, run.folder / "transfer")
