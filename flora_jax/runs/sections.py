"""The sections of a run's settings: frozen values that check themselves.

Configs take their defaults here, so that each stands in one place.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from flora_jax.closed_form.calibrate import SHRINKAGE
from flora_jax.errors import InputError, check_at_least, check_between, check_known
from flora_jax.flora.evolution import EvolutionSettings
from flora_jax.flora.space import RankSpace
from flora_jax.models.spec import Spec
from flora_jax.slim.gates import ATTENTION_GATES, SparsityPenalty
from flora_jax.training.settings import Recipe

BUDGETS = ("macs", "latency")
Window = tuple[float, float]

# DeiT's own training, for the dense model and after slimming.
DEIT_TRAINING: dict[str, Any] = {
    "epochs": 300.0,
    "learning_rate": 5e-4,
    "warmup_learning_rate": 1e-6,
    "min_learning_rate": 1e-5,
    "weight_decay": 0.05,
    "mixup": 0.8,
    "cutmix": 1.0,
    "repeats": 3,
}


@dataclasses.dataclass(frozen=True)
class SlimBudget:
    """Shares of each kind of gate to keep, or one share of the dense MACs that sets them all.

    Attributes:
      macs: 0 where the other three count.
    """

    attn: float = 0.7
    mlp: float = 0.7
    patch: float = 0.7
    macs: float = 0.0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            share = getattr(self, field.name)
            if not (0 < share <= 1 or (field.name == "macs" and share == 0)):
                raise InputError(f"{field.name} must lie in (0, 1], got {share}")


@dataclasses.dataclass(frozen=True)
class SlimSettings:
    """ViT-Slim (CVPR 2022), where the stages name it.

    Attributes:
      attention: kind of the attention gates, as in `flora_jax.slim.add_gates`.
      tokens: whether tokens get gates; None: where the network's tokens can leave.
      gates, retrain: trainings of the gates, and of what is left after the cut.
      fold: as in `flora_jax.slim.extract`.
      tile: widths are rounded up to a multiple of it.
    """

    attention: str = "dim"
    tokens: bool | None = None
    penalty: SparsityPenalty = SparsityPenalty()
    gates: Recipe = Recipe(
        epochs=50.0,
        learning_rate=5e-4,
        min_learning_rate=5e-4,
        warmup_epochs=0.0,
        weight_decay=1e-3,
        distill=False,
    )
    budget: SlimBudget = SlimBudget()
    fold: bool = True
    tile: int = 1
    retrain: Recipe = Recipe(**DEIT_TRAINING)

    def __post_init__(self):
        check_at_least(self, 1, "tile")
        check_known(self, "attention", ATTENTION_GATES)


@dataclasses.dataclass(frozen=True)
class SpaceSettings:
    """Rank choices: ratios of full rank, rounded to multiples of a tile apart from full rank."""

    ratios: tuple[float, ...] = (1 / 8, 2 / 8, 3 / 8, 4 / 8, 5 / 8, 6 / 8, 1.0)
    tile: int = 1

    def of(self, spec: Spec) -> RankSpace:
        """Every rank triple of this network. Raises as `RankSpace.regular`."""
        return RankSpace.regular(spec, self.ratios, self.tile)


@dataclasses.dataclass(frozen=True)
class CalibrationSettings:
    """The images that weigh the supernet's factors (`flora_jax.calibrate`).

    Attributes:
      images: of the training split, without augmentation; fewer where there are fewer. 0: the plain
        SVD, as published.
      shrinkage: as in `Calibration`.
    """

    images: int = 1024
    shrinkage: float = SHRINKAGE

    def __post_init__(self):
        check_at_least(self, 0, "images")
        if not 0 < self.shrinkage <= 1:
            raise InputError(f"shrinkage must lie in (0, 1], got {self.shrinkage}")


@dataclasses.dataclass(frozen=True)
class AllocationSettings:
    """The images on which `flora_jax.allocate` measures what each rank spoils.

    Attributes:
      images: of the training split, without augmentation; fewer where there are fewer.
    """

    images: int = 256

    def __post_init__(self):
        check_at_least(self, 1, "images")


@dataclasses.dataclass(frozen=True)
class BudgetSettings:
    """What a subnet may cost, at least and at most, as shares of the dense model's.

    Either is one window (low, high), or several, from each of which comes a subnet.

    Attributes:
      macs: multiply-adds. The filter's price is in them, whatever the search spends.
      latency: time on this device.
    """

    macs: Window | tuple[Window, ...] = (0.43, 0.46)
    latency: Window | tuple[Window, ...] = (0.55, 0.6)

    def __post_init__(self):
        for name in BUDGETS:
            _check_windows(name, getattr(self, name))

    def windows(self, name: str) -> tuple[Window, ...]:
        """The windows of "macs" or "latency", ascending."""
        (*windows,) = map(tuple, _listed(getattr(self, name)))
        return tuple(sorted(windows))


def _listed(value) -> Sequence:
    """One window or several, as several."""
    return value if any(isinstance(part, Sequence) for part in value) else [value]


def _check_windows(name: str, value) -> None:
    for window in _listed(value):
        if not (isinstance(window, Sequence) and len(window) == 2):
            raise InputError(
                f"{name} must be one window (low, high) or several of them, got {value}"
            )
        low, high = window
        if not 0 < low < high <= 1:
            raise InputError(
                f"{name} {window} must be two shares of the dense model's, 0 < low < high <= 1"
            )
    windows = sorted(map(tuple, _listed(value)))
    for lower, upper in itertools.pairwise(windows):
        if lower == upper:
            raise InputError(f"{name} {lower} is given twice")
        if upper[0] < lower[1]:
            raise InputError(
                f"{name} {lower} and {upper} overlap: windows must be apart, so that every subnet "
                f"belongs to one"
            )


FILTER_TRAINING = Recipe(epochs=20.0, warmup_epochs=3.0, learning_rate=7.5e-6, evaluate_epochs=0.0)


@dataclasses.dataclass(frozen=True)
class FilterSettings:
    """Candidate filtering: the share of triples to drop, and the training of local supernets.

    Attributes:
      train_fraction: of the training images.
    """

    drop: float = 0.7
    train_fraction: float = 0.1
    train: Recipe = FILTER_TRAINING

    def __post_init__(self):
        if not 0 <= self.drop < 1:
            raise InputError(f"drop must lie in [0, 1), got {self.drop}")
        check_between(self, 0, 1, "train_fraction")


@dataclasses.dataclass(frozen=True)
class SearchSettings(EvolutionSettings):
    """The evolution, and what it spends.

    Attributes:
      budget: "macs", or "latency" on this device.
      latency_batch: images that the device runs at once.
      halving: whether a candidate that is behind on a part of the held-out images is not scored on
        the others.
    """

    budget: str = "macs"
    latency_batch: int = 16
    halving: bool = True

    def __post_init__(self):
        super().__post_init__()
        check_known(self, "budget", BUDGETS)
        check_at_least(self, 1, "latency_batch")

    @property
    def evolution(self) -> EvolutionSettings:
        names = [field.name for field in dataclasses.fields(EvolutionSettings)]
        return EvolutionSettings(**{name: getattr(self, name) for name in names})
