"""Where a run begins: the uncompressed model, or a finished one on its way to another dataset."""

import logging

from flora_jax.evaluation import top1
from flora_jax.io import folder
from flora_jax.io.pretrained import from_pretrained
from flora_jax.models import create
from flora_jax.run import Run

log = logging.getLogger(__name__)


def pretrain(run: Run) -> None:
    """The dense model: trained from scratch, or read from the weights that the config names."""
    if run.config.pretrained:
        model = from_pretrained(run.config.pretrained, run.spec)
    else:
        model = create(run.spec, run.seed("create"))
        folder.save_description(model, run.folder / "pretrain")
        model = run.train(model, run.config.pretrain, "pretrain")
    folder.save(model, run.folder / "dense")
    log.info("dense model: %.2f %% top-1 held-out", 100 * top1(model, run.heldout_set))


def transfer(run: Run) -> None:
    """A finished model, compressed or not, fine-tuned on this run's dataset with a new classifier.

    The shape is that of the model in the folder `pretrained`; of the config's `model` section only
    num_classes counts.
    """
    model = from_pretrained(run.config.pretrained, run.spec)
    folder.save_description(model, run.folder / "transfer/training")
    model = run.train(model, run.config.finetune, "transfer/training")
    folder.save(model, run.folder / "transfer")
