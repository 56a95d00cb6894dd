"""The augmentations that a config names: random ones to train, fixed ones to test.

Each is made of functions of one image, uint8 [H, W, C], C 1 or 3, and every image it returns has
its `image_shape`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import numpy as np

from flora_jax.data.geometry import (
    affine,
    horizontal_flip,
    match_channels,
    random_resized_crop,
    shift,
)
from flora_jax.data.pixels import MAX_MAGNITUDE, color_jitter, rand_augment, random_erasing
from flora_jax.data.preprocessing import Crop, Shape
from flora_jax.errors import InputError, unknown


class TrainTransform(Protocol):
    """(image uint8 [H, W, C], random generator) -> uint8 `image_shape`.

    Attributes:
      least_side: short side in pixels above which a larger image brings nothing; None: the
        transform is counted in the pixels of the image.
    """

    image_shape: Shape
    least_side: int | None

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class _Shift:
    image_shape: Shape
    pixels: int = 1

    crop_mode: ClassVar = "squash"
    least_side: ClassVar = None

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return Crop(self.image_shape, crop_mode="squash")(shift(image, rng, self.pixels))


@dataclasses.dataclass(frozen=True)
class _Digits:
    image_shape: Shape
    degrees: float = 10.0
    translate_pixels: float = 1.0
    scale: tuple[float, float] = (0.9, 1.1)

    crop_mode: ClassVar = "squash"
    least_side: ClassVar = None

    def __post_init__(self):
        _check_numbers(self, math.inf, "degrees", "translate_pixels")
        _check_range("scale", self.scale)

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        moved = affine(image, rng, self.degrees, self.translate_pixels, self.scale)
        return Crop(self.image_shape, crop_mode="squash")(moved)


@dataclasses.dataclass(frozen=True)
class _Inception:
    image_shape: Shape
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    crop_mode: ClassVar = None  # the settings choose

    def __post_init__(self):
        _check_range("scale", self.scale, highest=1)
        _check_range("ratio", self.ratio)

    @property
    def least_side(self) -> int:
        """Short side from which on even the smallest and longest box is not enlarged."""
        smallest_share = math.sqrt(self.scale[0] * min(self.ratio[0], 1 / self.ratio[1]))
        return math.ceil(self.image_shape[0] / smallest_share)

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        cropped = random_resized_crop(image, rng, self.image_shape[0], self.scale, self.ratio)
        return match_channels(horizontal_flip(cropped, rng), self.image_shape[2])


@dataclasses.dataclass(frozen=True)
class _Deit(_Inception):
    rand_augment: bool = True
    magnitude: float = 9.0
    magnitude_std: float = 0.5
    num_operations: int = 2
    color_jitter: float = 0.4
    erase_probability: float = 0.25

    def __post_init__(self):
        super().__post_init__()
        if self.image_shape[2] != 3:
            raise InputError(
                f"augmentation 'deit' makes colour images, (size, size, 3), got image_shape "
                f"{self.image_shape}; 'inception' is the nearest for other numbers of channels"
            )
        _check_numbers(self, MAX_MAGNITUDE, "magnitude")
        _check_numbers(self, math.inf, "magnitude_std", "num_operations")
        _check_numbers(self, 1, "color_jitter", "erase_probability")

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        image = super().__call__(image, rng)
        if self.rand_augment:
            image = rand_augment(
                image, rng, self.magnitude, self.magnitude_std, self.num_operations
            )
        if self.color_jitter > 0:
            image = color_jitter(image, rng, self.color_jitter)
        return random_erasing(image, rng, self.erase_probability)


_RECIPES = {"digits": _Digits, "shift": _Shift, "inception": _Inception, "deit": _Deit}


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """A recipe by its name, with what replaces its defaults.

    Attributes:
      name: "digits" (affine: degrees, translate_pixels, scale), "shift" (pixels), "inception"
        (random resized crop and flip: scale, ratio) or "deit" (those of "inception", then
        RandAugment: rand_augment=True, magnitude, magnitude_std, num_operations; colour jitter:
        color_jitter, 0 for none; random erasing: erase_probability). timm, with which DeiT was
        trained, leaves the colour jitter out where RandAugment is on: color_jitter=0.
      changes: of the recipe's defaults, by name.

    Its methods take (size, size, channels) of the model, and raise InputError for an unknown name
    or setting, or a value out of range.
    """

    name: str
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def train(self, image_shape: Shape) -> TrainTransform:
        """The random transform."""
        accepted = [field.name for field in dataclasses.fields(self._recipe)][1:]
        for setting in self.changes:
            if setting not in accepted:
                raise InputError(unknown("augmentation setting", setting, accepted))
        return self._recipe(image_shape, **self.changes)

    def evaluation(self, image_shape: Shape) -> Crop:
        """The fixed one that goes with it: "digits" and "shift" take the whole image."""
        return Crop(image_shape, crop_mode=self.crop_mode or Crop.crop_mode)

    @property
    def crop_mode(self) -> str | None:
        """The crop mode of a `Crop` that goes with it; None: any."""
        return self._recipe.crop_mode

    @property
    def _recipe(self):
        if self.name not in _RECIPES:
            raise InputError(unknown("augmentation", self.name, _RECIPES))
        return _RECIPES[self.name]


def _check_range(name: str, bounds: tuple[float, float], highest: float = math.inf) -> None:
    if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1] <= highest:
        raise InputError(f"{name} must be (low, high), 0 < low <= high <= {highest}, got {bounds}")


def _check_numbers(recipe: object, highest: float, *names: str) -> None:
    for name in names:
        if not 0 <= (value := getattr(recipe, name)) <= highest:
            raise InputError(f"{name} must lie in 0..{highest}, got {value}")
