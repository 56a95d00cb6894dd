"""Random changes of pixel values of uint8 [H, W, 3] images: colour jitter and random erasing."""

import math

import numpy as np
from PIL import Image, ImageEnhance

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


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
            erased = image.copy()
            erased[top : top + box_height, left : left + box_width] = _noise(
                rng, (box_height, box_width, 3)
            )
            return erased
    return image


def _noise(rng: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    noise = rng.standard_normal(shape, dtype=np.float32)
    noise *= np.float32(255) * np.array(IMAGENET_STD, np.float32)
    noise += np.float32(255) * np.array(IMAGENET_MEAN, np.float32)
    return np.clip(np.rint(noise), 0, 255).astype(np.uint8)
