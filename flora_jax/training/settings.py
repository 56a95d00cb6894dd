"""A training's recipe in epochs, and its settings in steps."""

import dataclasses
import warnings
import zlib
from typing import Any

import numpy as np

from flora_jax.errors import InputError, check_at_least, check_known

COMPUTE_DTYPES = ("float32", "bfloat16")
RESULTS = ("last", "best")
_RATES = ("learning_rate", "warmup_learning_rate", "min_learning_rate")


def without_effect(default) -> Any:
    """A field of settings that changes how a result is come by, but not the result."""
    return dataclasses.field(default=default, metadata={"has_effect": False})


def seed_of(seed: int, purpose: str) -> int:
    """A seed of its own, 31 bits, for each purpose of what has this seed."""
    words = np.random.SeedSequence([seed, zlib.crc32(purpose.encode())])
    return int(words.generate_state(1)[0] >> 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """Fields that a recipe and the settings made of it share; defaults are FLORA's supernet's.

    Attributes:
      batch_size: images of all processes together in one step.
      learning_rate, warmup_learning_rate, min_learning_rate: at the end of warm-up, at its start,
        and where the cosine ends.
      relative_steps: whether each parameter's steps are multiplied by its root mean square, at
        least .001 (Adafactor, arXiv 1804.04235, section 8).
      accumulate: micro-batches that a step is cut into; saves activation memory.
      compute_dtype: "float32" or "bfloat16" for activations; parameters stay float32.
      ema_decay: decay of an exponential moving average of the parameters, which is then the
        result of the stage; 0 for none.
      distill_features: weight, beside a teacher's soft targets, of how far the tokens after the
        last norm are from the teacher's: squared error as a share of their square; 0 for none. Of a
        network without classes it is the whole loss, and 0 stands for 1.
      label_smoothing: share of the target mass spread over all classes (not with a teacher).
      mixup, cutmix: parameters of the Beta distributions that images of a batch are mixed by; 0
        for none. A teacher sees the mixed images.
      rematerialize: keep the blocks' outputs alone for the backward pass and compute the rest
        again: less memory for a third more multiply-adds.
      log_every, checkpoint_every: steps. The two newest checkpoints stay.
      checkpoint_minutes: a checkpoint comes after so much time, too, when metrics are logged; 0 for
        by step alone.
      keep_every: checkpoints at multiples of this step stay too; 0 for none.
      keep_best: whether the parameters that evaluate best are kept, too, in the folder best/.
      result: which parameters go on, the "last" or the "best".

    Raises:
      InputError: a value is out of range; names it.
    """

    batch_size: int
    learning_rate: float
    warmup_learning_rate: float = 5e-7
    min_learning_rate: float = 5e-7
    weight_decay: float = 0.01
    relative_steps: bool = False
    clip_norm: float = 5.0
    accumulate: int = without_effect(1)
    compute_dtype: str = "float32"
    ema_decay: float = 0.0
    distill_features: float = 0.0
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    rematerialize: bool = without_effect(False)
    log_every: int = without_effect(20)
    checkpoint_every: int = without_effect(1000)
    checkpoint_minutes: float = without_effect(5.0)
    keep_every: int = without_effect(0)
    keep_best: bool = without_effect(False)
    result: str = "last"

    def __post_init__(self):
        check_at_least(self, 1, "batch_size", "accumulate", "log_every", "checkpoint_every")
        check_at_least(self, 0, *_RATES, "weight_decay", "mixup", "cutmix", "keep_every")
        check_at_least(self, 0, "checkpoint_minutes", "distill_features")
        if not self.clip_norm > 0:
            raise InputError(f"clip_norm must be above 0, got {self.clip_norm}")
        check_known(self, "compute_dtype", COMPUTE_DTYPES)
        check_known(self, "result", RESULTS)
        if self.result == "best" and not self.keep_best:
            raise InputError("result 'best' needs keep_best=True")
        if self.batch_size % self.accumulate:
            raise InputError(
                f"batch_size {self.batch_size} is not a multiple of accumulate {self.accumulate}"
            )
        for name in ("ema_decay", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} must lie in [0, 1), got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings(Hyperparameters):
    """One training, counted in steps, with learning rates that are scaled to its batch size.

    Attributes:
      steps: optimiser steps.
      warmup_steps: steps of linear warm-up.
      b1, b2, epsilon: of AdamW.
      loop_over_blocks: compute like blocks in a loop over their stacked parameters, which makes
        the program as many times smaller.
      seed: of everything random inside a step.
    """

    steps: int
    warmup_steps: int = 0
    b1: float = 0.9
    b2: float = 0.999
    epsilon: float = 1e-8
    loop_over_blocks: bool = False
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, 1, "steps")
        check_at_least(self, 0, "warmup_steps")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe(Hyperparameters):
    """One training stage of a config, whatever the number of images.

    Attributes:
      epochs, warmup_epochs: passes over the training images.
      learning_rate, warmup_learning_rate, min_learning_rate: for 512 images of a batch; they are
        scaled by batch_size / 512.
      repeats: times that an image comes in a row, each time augmented anew.
      distill: soft targets from the model before, or its features where it has no classes; False:
        the labels.
      stored_predictions: the teacher runs once, before training, and its top 100 classes of every
        augmented image are kept on disk (ImageNet: 0.5 GB an epoch); False: it runs in every step.
      evaluate_epochs: epochs between two evaluations on the held-out images; 0 for none.
    """

    epochs: float = 150.0
    batch_size: int = 1024
    learning_rate: float = 2.5e-5
    warmup_epochs: float = 5.0
    repeats: int = 1
    distill: bool = True
    stored_predictions: bool = False
    evaluate_epochs: float = without_effect(1.0)

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, 0, "epochs", "warmup_epochs", "evaluate_epochs")
        if self.keep_best and not self.evaluate_epochs:
            raise InputError("keep_best needs evaluations: evaluate_epochs must be above 0")
        check_at_least(self, 1, "repeats")
        if self.distill_features and (self.stored_predictions or not self.distill):
            raise InputError(
                "distill_features needs a teacher in every step: distill=True and "
                "stored_predictions=False"
            )
        if self.distill and self.stored_predictions and (self.mixup or self.cutmix):
            raise InputError(
                "stored predictions are of single images and cannot teach mixed ones; set mixup "
                "and cutmix to 0, or stored_predictions to False"
            )

    def evaluate_every(self, num_images: int) -> int:
        """Steps between two evaluations, for this many training images; 0 for none."""
        if not self.evaluate_epochs:
            return 0
        return max(1, round(self.evaluate_epochs * num_images / self.batch_size))

    def settings(self, num_images: int, seed: int = 0, **changes) -> TrainSettings:
        """The steps and learning rates for this many training images.

        Args:
          changes: further fields of the settings.
        """
        shared = {f.name: getattr(self, f.name) for f in dataclasses.fields(Hyperparameters)}
        if self.epochs and self.warmup_epochs > self.epochs:
            warnings.warn(
                f"warmup_epochs {self.warmup_epochs} is more than epochs {self.epochs}: the "
                f"learning rate reaches {self.epochs / self.warmup_epochs:.2f} of learning_rate",
                stacklevel=2,
            )
        scale = self.batch_size / 512
        scaled = {rate: shared[rate] * scale for rate in _RATES}
        steps_per_epoch = num_images / self.batch_size
        return TrainSettings(
            **shared | scaled,
            steps=max(1, round(self.epochs * steps_per_epoch)),
            warmup_steps=round(self.warmup_epochs * steps_per_epoch),
            seed=seed,
            **changes,
        )
