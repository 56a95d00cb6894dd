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


class EvalTransform(Protocol):
    """Image uint8 [H, W, C] -> uint8 `image_shape`."""

    @property
    def image_shape(self) -> Shape: ...

    def __call__(self, image: np.ndarray) -> np.ndarray: ...


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
        for name in ("degrees", "translate_pixels"):
            _check_number(name, getattr(self, name))
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
        _check_number("magnitude", self.magnitude, MAX_MAGNITUDE)
        _check_number("magnitude_std", self.magnitude_std)
        _check_number("color_jitter", self.color_jitter, 1)
        _check_number("erase_probability", self.erase_probability, 1)
        if not isinstance(self.num_operations, int) or self.num_operations < 1:
            raise InputError(
                f"num_operations must be an integer of at least 1, got {self.num_operations!r}; "
                "rand_augment=False does without"
            )

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


def train_transform(name: str, image_shape: Shape, **settings) -> TrainTransform:
    """The random transform of a recipe.

    Args:
      name: "digits" (affine: degrees, translate_pixels, scale), "shift" (pixels), "inception"
        (random resized crop and flip: scale, ratio) or "deit" (those of "inception", then
        RandAugment: rand_augment=True, magnitude, magnitude_std, num_operations; colour jitter:
        color_jitter, 0 for none; random erasing: erase_probability). timm, with which DeiT was
        trained, leaves the colour jitter out where RandAugment is on: color_jitter=0.
      image_shape: (size, size, channels) that the model takes.
      **settings: replace the recipe's defaults.

    Raises:
      InputError: unknown name or setting, or a value out of range.
    """
    recipe = _recipe(name)
    accepted = [field.name for field in dataclasses.fields(recipe)][1:]
    for setting in settings:
        if setting not in accepted:
            raise InputError(unknown("augmentation setting", setting, accepted))
    return recipe(_square(image_shape), **settings)


def eval_transform(name: str, image_shape: Shape) -> EvalTransform:
    """The fixed transform that goes with a recipe; arguments and errors as in `train_transform`.

    The whole image resized to fit for "digits" and "shift", a `Crop` for "inception" and "deit".
    """
    return Crop(_square(image_shape), crop_mode=_recipe(name).crop_mode or Crop.crop_mode)


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """A recipe by its name, with what replaces its defaults."""

    name: str
    changes: Mapping[str, Any]

    def train(self, image_shape: Shape) -> TrainTransform:
        return train_transform(self.name, image_shape, **self.changes)

    def evaluation(self, image_shape: Shape) -> EvalTransform:
        return eval_transform(self.name, image_shape)

    @property
    def crop_mode(self) -> str | None:
        """The crop mode of a `Crop` that goes with it; None: any."""
        return _recipe(self.name).crop_mode


def _recipe(name: str):
    if name not in _RECIPES:
        raise InputError(unknown("augmentation", name, _RECIPES))
    return _RECIPES[name]


def _square(image_shape: Shape) -> Shape:
    height, width, channels = image_shape
    if height != width:
        raise InputError(f"image_shape must be square, (size, size, channels), got {image_shape}")
    return height, width, channels


def _check_range(name: str, bounds: tuple[float, float], highest: float = math.inf) -> None:
    if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1] <= highest:
        raise InputError(f"{name} must be (low, high), 0 < low <= high <= {highest}, got {bounds}")


def _check_number(name: str, value: float, highest: float = math.inf) -> None:
    if not 0 <= value <= highest:
        raise InputError(f"{name} must lie in 0..{highest}, got {value}")
