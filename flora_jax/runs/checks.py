"""What is allowed but can hardly be meant: said with the figure, and before the work where it can.

Values that can never be right are refused by the settings and by `validation`.
"""

import logging
import math
from collections.abc import Mapping, Sequence

import numpy as np

from flora_jax.cluster.processes import is_first
from flora_jax.errors import InputError
from flora_jax.runs.images import Images
from flora_jax.runs.settings import Settings

log = logging.getLogger(__name__)

_SAMPLE = 32  # images whose pixels are looked at
_FAR_MEAN, _FAR_STD = 2.0, 4.0  # standard deviations off, and times too wide or too narrow
_FEW_A_CLASS, _FEW_IN_ALL = 20, 200
_LEAST_TRAVEL = 2e-3  # a tenth of the standard deviation that weights start with
_FAR_ACCURACY = 0.03
_SAME_LOSS = 0.98
_SAME_GATE = 0.05


def say_doubts(settings: Settings, images: Images) -> None:
    """The first process logs a warning for each setting that is unlikely to be meant.

    All processes call it together.
    """
    doubts = (
        *_of_pixels(settings, images),
        *_of_heldout(settings, images),
        *_of_learning_rates(settings, len(images.train)),
    )
    for doubt in doubts if is_first() else ():
        log.warning("%s", doubt)


def _of_pixels(settings: Settings, images: Images):
    """Normalisation that some training images do not look like."""
    pixels = np.concatenate(list(images.without_augmentation(_SAMPLE, "doubts"))) / 255
    channels = pixels.reshape(-1, pixels.shape[-1])
    mean, std = channels.mean(axis=0), np.maximum(channels.std(axis=0), 1 / 255)
    shift = abs(mean - settings.data.mean) / settings.data.std
    spread = std / settings.data.std
    if shift.max() > _FAR_MEAN or not (1 / _FAR_STD < spread.min() <= spread.max() < _FAR_STD):
        yield (
            f"data.mean {settings.data.mean} and data.std {settings.data.std} are far from those "
            f"of {len(pixels)} training images: {_rounded(mean)} and {_rounded(std)}"
        )


def _rounded(values: np.ndarray) -> tuple[float, ...]:
    return tuple(round(value, 3) for value in values.tolist())


def _of_heldout(settings: Settings, images: Images):
    """Held-out images too few to rank subnets by."""
    classes = images.splits.num_classes if images.are_labelled else 0
    number = len(images.splits.heldout)
    ranks_subnets = {"filter", "search"} & set(settings.stages)
    if ranks_subnets and classes and number < max(_FEW_A_CLASS * classes, _FEW_IN_ALL):
        noise = 100 * 1.96 * math.sqrt(0.8 * 0.2 / number)
        yield (
            f"only {number} images are held out to rank subnets, {number / classes:.0f} a class: "
            f"a top-1 of 80 % is known to ±{noise:.1f} points. Raise data.heldout_fraction "
            f"({settings.data.heldout_fraction})"
            + (", or set metric='log_likelihood'" if settings.metric == "top1" else "")
        )


def _of_learning_rates(settings: Settings, num_images: int):
    """Learning rates, scaled to the batch, by which no weight gets anywhere."""
    for name, recipe, images in settings.trainings(num_images):
        training = recipe.settings(images)
        travel = training.learning_rate * training.steps / 2  # AdamW's step, a cosine's mean
        if travel < _LEAST_TRAVEL:
            needed = recipe.learning_rate * _LEAST_TRAVEL / travel if travel else 5e-4
            yield (
                f"{name}: learning_rate {recipe.learning_rate:.2g} is for 512 images and becomes "
                f"{training.learning_rate:.2g} at batch_size {recipe.batch_size}: in "
                f"{training.steps} steps a weight moves by about {travel:.1g}, which changes "
                f"little. {needed:.1g} or more, or more epochs, would"
            )


def check_not_chance(settings: Settings, top1: float, num_images: int) -> None:
    """Refuses to compress a dense model that has learned nothing.

    Args:
      top1: on the held-out images, `num_images` of them.

    Raises:
      InputError: it could be that of guessing (one-sided, 95 %).
    """
    compresses = set(settings.stages) - {"pretrain", "evaluate", "export", "report"}
    classes = settings.model.num_classes
    if not settings.refuse_near_chance or not compresses or not classes:
        return
    chance = 1 / classes
    bound = chance + 1.64 * math.sqrt(chance * (1 - chance) / num_images)
    if top1 > bound:
        return
    if settings.pretrained and not settings.train_pretrained:
        advice = (
            "fine-tune it first with train_pretrained=True, or see whether classes, mean and std "
            "are those that it was trained with"
        )
    else:
        advice = "pretrain longer or with another learning rate"
    raise InputError(
        f"the dense model has {100 * top1:.2f} % top-1 on {num_images} held-out images, where "
        f"guessing has {100 * chance:.2f} %: there is nothing to keep by compressing it; {advice} "
        f"(refuse_near_chance=False goes on all the same)"
    )


def doubt_loss(name: str, losses: Sequence[float]) -> None:
    """Warns of a training at whose end the loss [steps] is that of its beginning."""
    tenth = len(losses) // 10
    if not tenth:
        return
    first, last = np.mean(losses[:tenth]), np.mean(losses[-tenth:])
    if last > _SAME_LOSS * first:
        log.warning(
            "%s: the loss has not moved, %.4g in its first tenth and %.4g in its last: see "
            "learning rate, epochs and labels",
            name,
            first,
            last,
        )


def doubt_heldout(heldout: float, num_heldout: int, test: float, num_test: int) -> None:
    """Warns where weights know the images that subnets were ranked by.

    Args:
      heldout, test: the dense model's top-1 on so many held-out and test images.
    """
    variance = sum(p * (1 - p) / n for p, n in ((heldout, num_heldout), (test, num_test)))
    if heldout - test > max(_FAR_ACCURACY, 3 * math.sqrt(variance)):
        log.warning(
            "the dense model has %.2f %% top-1 on the held-out images and %.2f %% on the test "
            "images: its weights may have been trained on the former, and subnets were ranked by "
            "what it remembers. data.heldout_split names images that it has not seen",
            100 * heldout,
            100 * test,
        )


def doubt_gates(gates: Mapping[str, Sequence[np.ndarray]]) -> None:
    """Warns of kinds of gates, one array a block, that have stayed where they started, at 1."""
    for kind, of_blocks in gates.items():
        values = np.concatenate([block.ravel() for block in of_blocks])
        if values.size and abs(values - 1).max() < _SAME_GATE:
            log.warning(
                "the %s gates have hardly moved from 1 (%.3f to %.3f): what is cut is chosen by "
                "noise. Train them longer, or with a higher slim.gates.learning_rate or penalty",
                kind,
                values.min(),
                values.max(),
            )
