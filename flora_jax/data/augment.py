"""Image transforms on uint8 [H, W, C] arrays, C 1 or 3: random ones to train, fixed ones to test.

The functions at the top do one thing to one image. The recipes below them are what a config
names: every image that a recipe returns has the recipe's `image_shape`.
"""

import dataclasses
import difflib
import math
from typing import ClassVar, Protocol

import numpy as np
from PIL import Image

BICUBIC = Image.Resampling.BICUBIC
BILINEAR = Image.Resampling.BILINEAR
AFFINE = Image.Transform.AFFINE

Shape = tuple[int, int, int]


def shift(image: np.ndarray, rng: np.random.Generator, pixels: int) -> np.ndarray:
    """Moves the image by up to `pixels` whole pixels each way; zeros come in at the edges.

    Raises:
      ValueError: pixels is negative or not below the height and width of the image.
    """
    height, width, _ = image.shape
    if not 0 <= pixels < min(height, width):
        raise ValueError(
            f"pixels must lie in 0..{min(height, width) - 1} for an image of shape "
            f"{image.shape}, got {pixels}"
        )
    dy, dx = rng.integers(-pixels, pixels, size=2, endpoint=True)
    shifted = np.zeros_like(image)
    shifted[max(dy, 0) : height + dy, max(dx, 0) : width + dx] = image[
        max(-dy, 0) : height - dy, max(-dx, 0) : width - dx
    ]
    return shifted


def affine(
    image: np.ndarray,
    rng: np.random.Generator,
    degrees: float,
    translate_pixels: float,
    scale: tuple[float, float],
) -> np.ndarray:
    """Rotates, scales and moves the image about its centre, bilinear, zeros outside.

    Args:
      degrees: the angle is uniform in -degrees..degrees.
      translate_pixels: the move along each axis is uniform in -translate_pixels..translate_pixels.
      scale: the factor is uniform in this range; above 1 enlarges.
    """
    u = rng.random(4).tolist()
    angle = math.radians(degrees * (2 * u[0] - 1))
    factor = scale[0] + (scale[1] - scale[0]) * u[1]
    height, width, _ = image.shape
    # Pillow asks where each output pixel comes from: the inverse of the motion.
    cos, sin = math.cos(angle) / factor, math.sin(angle) / factor
    x = width / 2 + translate_pixels * (2 * u[2] - 1)
    y = height / 2 + translate_pixels * (2 * u[3] - 1)
    inverse = (
        *(cos, sin, width / 2 - cos * x - sin * y),
        *(-sin, cos, height / 2 + sin * x - cos * y),
    )
    return _to_array(_to_pillow(image).transform((width, height), AFFINE, inverse, BILINEAR))


def random_resized_crop(
    image: np.ndarray,
    rng: np.random.Generator,
    size: int,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> np.ndarray:
    """A random box of the image, resized to size x size, bicubic ("Inception" cropping).

    Args:
      scale: the area of the box, as a share of the image's, is uniform in this range.
      ratio: width over height of the box is log-uniform in this range.
    """
    height, width, _ = image.shape
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = rng.integers(height - box_height, endpoint=True)
            left = rng.integers(width - box_width, endpoint=True)
            break
    else:  # no box fits a very long image: the largest central one of an allowed ratio
        aspect = min(max(width / height, ratio[0]), ratio[1])
        box_width = min(width, round(height * aspect))
        box_height = min(height, round(width / aspect))
        top, left = (height - box_height) // 2, (width - box_width) // 2
    return resize(image[top : top + box_height, left : left + box_width], size)


def horizontal_flip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirrors every second image."""
    return image[:, ::-1] if rng.random() < 0.5 else image


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """The whole image at size x size, bicubic; the same array when it has that size already."""
    if image.shape[:2] == (size, size):
        return image
    return _to_array(_to_pillow(image).resize((size, size), BICUBIC))


def eval_resize_crop(image: np.ndarray, size: int, crop_pct: float = 0.875) -> np.ndarray:
    """The central size x size square of the image, whose short side is first made size/crop_pct.

    Bicubic. At 224 the short side becomes 256, as DeiT and Swin are evaluated.
    """
    height, width, _ = image.shape
    short = int(size / crop_pct)
    resized_width = short * width // min(height, width)
    resized_height = short * height // min(height, width)
    top, left = round((resized_height - size) / 2), round((resized_width - size) / 2)
    picture = _to_pillow(image).resize((resized_width, resized_height), BICUBIC)
    return _to_array(picture.crop((left, top, left + size, top + size)))


def match_channels(image: np.ndarray, channels: int) -> np.ndarray:
    """Repeats the channel of a grey image to `channels`.

    Raises:
      ValueError: a colour image has another number of channels.
    """
    if image.shape[2] == channels:
        return image
    if image.shape[2] != 1:
        raise ValueError(
            f"image of shape {image.shape} does not fit a model of {channels} input channels; "
            f"accepted: 1 or {channels} channels"
        )
    return np.repeat(image, channels, axis=2)


class TrainTransform(Protocol):
    """(image uint8 [H, W, C], random generator) -> uint8 `image_shape`."""

    image_shape: Shape

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray: ...


class EvalTransform(Protocol):
    """Image uint8 [H, W, C] -> uint8 `image_shape`."""

    image_shape: Shape

    def __call__(self, image: np.ndarray) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class _Fit:
    """The whole image, resized."""

    image_shape: Shape

    def __call__(self, image: np.ndarray) -> np.ndarray:
        return match_channels(resize(image, self.image_shape[0]), self.image_shape[2])


@dataclasses.dataclass(frozen=True)
class _CentreCrop:
    image_shape: Shape
    crop_pct: float = 0.875

    def __post_init__(self):
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct must lie in (0, 1], got {self.crop_pct}")

    def __call__(self, image: np.ndarray) -> np.ndarray:
        cropped = eval_resize_crop(image, self.image_shape[0], self.crop_pct)
        return match_channels(cropped, self.image_shape[2])


@dataclasses.dataclass(frozen=True)
class _Shift:
    image_shape: Shape
    pixels: int = 1

    evaluation: ClassVar = _Fit

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return _Fit(self.image_shape)(shift(image, rng, self.pixels))


@dataclasses.dataclass(frozen=True)
class _Digits:
    image_shape: Shape
    degrees: float = 10.0
    translate_pixels: float = 1.0
    scale: tuple[float, float] = (0.9, 1.1)

    evaluation: ClassVar = _Fit

    def __post_init__(self):
        for name in ("degrees", "translate_pixels"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        _check_range("scale", self.scale)

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        moved = affine(image, rng, self.degrees, self.translate_pixels, self.scale)
        return _Fit(self.image_shape)(moved)


@dataclasses.dataclass(frozen=True)
class _Inception:
    image_shape: Shape
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    evaluation: ClassVar = _CentreCrop

    def __post_init__(self):
        _check_range("scale", self.scale, highest=1)
        _check_range("ratio", self.ratio)

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        cropped = random_resized_crop(image, rng, self.image_shape[0], self.scale, self.ratio)
        return match_channels(horizontal_flip(cropped, rng), self.image_shape[2])


_RECIPES = {"digits": _Digits, "shift": _Shift, "inception": _Inception}


def train_transform(name: str, image_shape: Shape, **settings) -> TrainTransform:
    """The random transform of a recipe.

    Args:
      name: "digits" (affine: degrees, translate_pixels, scale), "shift" (pixels) or "inception"
        (random resized crop and flip: scale, ratio).
      image_shape: (size, size, channels) that the model takes.
      **settings: replace the recipe's defaults.

    Raises:
      ValueError: unknown name or setting, or a value out of range.
    """
    return _build(_recipe(name), image_shape, settings)


def eval_transform(name: str, image_shape: Shape, **settings) -> EvalTransform:
    """The fixed transform that goes with a recipe.

    The whole image resized to fit for "digits" and "shift"; resize and central crop (setting:
    crop_pct) for "inception". Arguments and errors as in `train_transform`.
    """
    return _build(_recipe(name).evaluation, image_shape, settings)


def _recipe(name: str):
    if name not in _RECIPES:
        raise ValueError(f"unknown augmentation {name!r}; choose one of {', '.join(_RECIPES)}")
    return _RECIPES[name]


def _build(transform, image_shape: Shape, settings: dict):
    height, width, _ = image_shape
    if height != width:
        raise ValueError(f"image_shape must be square, (size, size, channels), got {image_shape}")
    accepted = [field.name for field in dataclasses.fields(transform)][1:]
    for name in settings:
        if name not in accepted:
            nearest = difflib.get_close_matches(name, accepted, n=1)
            raise ValueError(
                f"unknown augmentation setting {name!r}; accepted: {', '.join(accepted) or 'none'}"
                + (f" (did you mean {nearest[0]!r}?)" if nearest else "")
            )
    return transform(tuple(image_shape), **settings)


def _check_range(name: str, bounds: tuple[float, float], highest: float = math.inf) -> None:
    if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1] <= highest:
        raise ValueError(f"{name} must be (low, high), 0 < low <= high <= {highest}, got {bounds}")


def _to_pillow(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)


def _to_array(picture: Image.Image) -> np.ndarray:
    pixels = np.array(picture)
    return pixels[..., None] if pixels.ndim == 2 else pixels
