"""Random changes of pixel values of uint8 [H, W, 3]: RandAugment, colour jitter, random erasing.

RandAugment (arXiv 1909.13719) is timm's `rand-m9-mstd0.5-inc1`, with which DeiT is trained: "inc1"
is the set of 15 operations below, each of which changes an image more the larger the magnitude is.
They agree with timm's pixel for pixel.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from flora_jax.data.normalize import Normalization

_ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
BICUBIC = Image.Resampling.BICUBIC
AFFINE = Image.Transform.AFFINE

FILL = (124, 116, 104)  # ImageNet's mean colour, where an operation has no pixel to take
MAX_MAGNITUDE = 10
PROBABILITY = 0.5


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation on an RGB picture.

    Attributes:
      apply: (picture) or (picture, argument) -> picture.
      argument: magnitude -> what `apply` takes, in its own units (degrees, bits, ...). None: it
        takes nothing.
      signed: magnitudes lie in -10..10, the negative ones going the other way; otherwise 0..10.
    """

    apply: Callable[..., Image.Image]
    argument: Callable[[float], float] | None = None
    signed: bool = False

    def __call__(self, picture: Image.Image, magnitude: float) -> Image.Image:
        if self.argument is None:
            return self.apply(picture)
        return self.apply(picture, self.argument(magnitude))


def _up_to(limit: float) -> Callable[[float], float]:
    return lambda magnitude: magnitude / MAX_MAGNITUDE * limit


def _enhance(enhancer) -> Operation:
    return Operation(
        lambda picture, factor: enhancer(picture).enhance(factor),
        lambda magnitude: max(0.1, 1 + magnitude / MAX_MAGNITUDE * 0.9),
        signed=True,
    )


def _solarize_add(picture: Image.Image, addend: int) -> Image.Image:
    table = [min(255, value + addend) if value < 128 else value for value in range(256)]
    return picture.point(table * 3)


def _affine(inverse: Callable[..., tuple[float, ...]], limit: float) -> Operation:
    """A motion by the inverse (picture, argument) -> the six numbers that Pillow takes."""

    def move(picture: Image.Image, argument: float) -> Image.Image:
        numbers = inverse(picture, argument)
        return picture.transform(picture.size, AFFINE, numbers, BICUBIC, fillcolor=FILL)

    return Operation(move, _up_to(limit), signed=True)


# By timm's names. timm posterizes to 0 bits at magnitude 10, which Pillow refuses.
OPERATIONS = {
    "AutoContrast": Operation(ImageOps.autocontrast),
    "Equalize": Operation(ImageOps.equalize),
    "Invert": Operation(ImageOps.invert),
    "Rotate": Operation(
        lambda picture, degrees: picture.rotate(degrees, BICUBIC, fillcolor=FILL),
        _up_to(30),
        signed=True,
    ),
    "PosterizeIncreasing": Operation(ImageOps.posterize, lambda m: max(1, 4 - int(m / 10 * 4))),
    "SolarizeIncreasing": Operation(ImageOps.solarize, lambda m: 256 - int(m / 10 * 256)),
    "SolarizeAdd": Operation(_solarize_add, lambda m: int(m / 10 * 110)),
    "ColorIncreasing": _enhance(ImageEnhance.Color),
    "ContrastIncreasing": _enhance(ImageEnhance.Contrast),
    "BrightnessIncreasing": _enhance(ImageEnhance.Brightness),
    "SharpnessIncreasing": _enhance(ImageEnhance.Sharpness),
    "ShearX": _affine(lambda picture, slope: (1, slope, 0, 0, 1, 0), 0.3),
    "ShearY": _affine(lambda picture, slope: (1, 0, 0, slope, 1, 0), 0.3),
    "TranslateXRel": _affine(lambda picture, share: (1, 0, share * picture.width, 0, 1, 0), 0.45),
    "TranslateYRel": _affine(lambda picture, share: (1, 0, 0, 0, 1, share * picture.height), 0.45),
}


def draw_operations(
    rng: np.random.Generator, magnitude: float, std: float, num_operations: int
) -> list[tuple[str, float]]:
    """What to do to one image: (name, magnitude, negative for the other way) in order.

    `num_operations` are drawn, the same one perhaps again, and each is kept with probability 0.5.
    Their magnitudes are normal(magnitude, std) clipped to 0..10.
    """
    names = list(OPERATIONS)
    drawn = []
    for index in rng.integers(len(names), size=num_operations):
        if rng.random() < PROBABILITY:
            strength = min(max(rng.normal(magnitude, std), 0.0), MAX_MAGNITUDE)
            negated = OPERATIONS[names[index]].signed and rng.random() < 0.5
            drawn.append((names[index], -strength if negated else strength))
    return drawn


def rand_augment(
    image: np.ndarray, rng: np.random.Generator, magnitude: float, std: float, num_operations: int
) -> np.ndarray:
    """Does randomly drawn operations to the image, uint8 [H, W, 3]; see `draw_operations`.

    Resampling is bicubic, as DeiT's recipe asks of timm.
    """
    picture = Image.fromarray(image)
    for name, strength in draw_operations(rng, magnitude, std, num_operations):
        picture = OPERATIONS[name](picture, strength)
    return np.array(picture)


def color_jitter(image: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
    """Changes brightness, contrast and saturation, in random order.

    Args:
      strength: each factor is uniform in 1 - strength..1 + strength; in 0..1.
    """
    picture = Image.fromarray(image)
    for index in rng.permutation(len(_ENHANCERS)):
        factor = rng.uniform(1 - strength, 1 + strength)
        picture = _ENHANCERS[index](picture).enhance(factor)
    return np.array(picture)


def random_erasing(
    image: np.ndarray,
    rng: np.random.Generator,
    probability: float = 0.25,
    area: tuple[float, float] = (0.02, 1 / 3),
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
) -> np.ndarray:
    """Puts noise in the place of a random box of the image (arXiv 1708.04896, "pixel" mode).

    timm erases after normalisation, with noise of mean 0 and deviation 1 in every value. Here
    images are uint8 until they are on the device, so the noise is drawn such that ImageNet's
    normalisation gives it that mean and deviation: normal(255 * mean, 255 * std) per channel,
    rounded and clipped to 0..255, which about 3 % of the values run into.

    Args:
      probability: of erasing.
      area: of the box, as a share of the image's, is uniform in this range.
      aspect: height over width of the box is log-uniform in this range. A box that does not fit
        is drawn again; after ten the image stays as it is.
    """
    if rng.random() >= probability:
        return image
    height, width, _ = image.shape
    for _ in range(10):
        box_area = height * width * rng.uniform(*area)
        ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        box_height = round(math.sqrt(box_area * ratio))
        box_width = round(math.sqrt(box_area / ratio))
        if box_height < height and box_width < width:
            top = rng.integers(height - box_height, endpoint=True)
            left = rng.integers(width - box_width, endpoint=True)
            noise = rng.standard_normal((box_height, box_width, 3), np.float32)
            noise *= np.float32(255) * np.array(Normalization.std, np.float32)
            noise += np.float32(255) * np.array(Normalization.mean, np.float32)
            erased = image.copy()
            box = erased[top : top + box_height, left : left + box_width]
            box[:] = np.clip(np.rint(noise), 0, 255)
            return erased
    return image
