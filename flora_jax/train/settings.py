"""What a training stage does, as one immutable value."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """Recipe of one training stage; the defaults are FLORA's supernet recipe where it has one.

    Attributes:
      steps: optimiser steps.
      batch_size: images of all processes together in one step.
      learning_rate, warmup_learning_rate, min_learning_rate: already scaled to the batch size.
      warmup_steps: steps of linear warm-up.
      accumulate: micro-batches a step is cut into; saves activation memory.
      compute_dtype: "float32" or "bfloat16" for activations; parameters stay float32.
      ema_decay: decay of an exponential moving average of the parameters, which is then the
        result of the stage; 0 for none.
      label_smoothing: share of the target mass spread over all classes (not with a teacher).
      mixup, cutmix: parameters of the Beta distributions that images are mixed by; 0 for none.
      rematerialize: keep the blocks' outputs alone for the backward pass and compute the rest
        again: less memory for a third more multiply-adds.
      loop_over_blocks: compute like blocks in a loop over their stacked parameters, which makes
        the program as many times smaller.
      seed: of everything random inside a step.
      log_every, checkpoint_every: steps. The two newest checkpoints stay.
      keep_every: checkpoints at multiples of this step stay too; 0 for none.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup_learning_rate: float = 5e-7
    min_learning_rate: float = 5e-7
    warmup_steps: int = 0
    weight_decay: float = 0.01
    b1: float = 0.9
    b2: float = 0.999
    epsilon: float = 1e-8
    clip_norm: float = 5.0
    accumulate: int = 1
    compute_dtype: str = "float32"
    ema_decay: float = 0.0
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    rematerialize: bool = False
    loop_over_blocks: bool = False
    seed: int = 0
    log_every: int = 20
    checkpoint_every: int = 1000
    keep_every: int = 0

    def __post_init__(self):
        for name in ("steps", "batch_size", "accumulate", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in (
            *("learning_rate", "warmup_learning_rate", "min_learning_rate", "warmup_steps"),
            *("mixup", "cutmix", "keep_every"),
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not self.clip_norm > 0:
            raise ValueError(f"clip_norm must be above 0, got {self.clip_norm}")
        if self.compute_dtype not in ("float32", "bfloat16"):
            raise ValueError(
                f"unknown compute_dtype {self.compute_dtype!r}; choose float32 or bfloat16"
            )
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of accumulate {self.accumulate}"
            )
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), got {self.ema_decay}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {self.label_smoothing}")
