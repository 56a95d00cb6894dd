"""What moves, resizes or crops one image, a uint8 [H, W, C] array, C 1 or 3."""

import math

import numpy as np
from PIL import Image

from flora_jax.data.pictures import resize, to_array, to_pillow
from flora_jax.errors import InputError

INTERPOLATIONS = tuple(method.name.lower() for method in Image.Resampling)
BILINEAR = Image.Resampling.BILINEAR
AFFINE = Image.Transform.AFFINE


def shift(image: np.ndarray, rng: np.random.Generator, pixels: int) -> np.ndarray:
    """Moves the image by up to `pixels` whole pixels each way; zeros come in at the edges.

    Raises:
      InputError: pixels is negative or not below the height and width of the image.
    """
    height, width, _ = image.shape
    if not 0 <= pixels < min(height, width):
        raise InputError(f"a shift of {pixels} pixels is none of an image of shape {image.shape}")
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
    return to_array(to_pillow(image).transform((width, height), AFFINE, inverse, BILINEAR))


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
        box_width = max(1, min(width, round(height * aspect)))
        box_height = max(1, min(height, round(width / aspect)))
        top, left = (height - box_height) // 2, (width - box_width) // 2
    return resize(image[top : top + box_height, left : left + box_width], size)


def horizontal_flip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirrors every second image."""
    return image[:, ::-1] if rng.random() < 0.5 else image


def match_channels(image: np.ndarray, channels: int) -> np.ndarray:
    """Repeats the channel of a grey image to `channels`.

    Raises:
      InputError: a colour image has another number of channels.
    """
    if image.shape[2] == channels:
        return image
    if image.shape[2] != 1:
        raise InputError(
            f"image of shape {image.shape} does not fit a model of {channels} input channels"
        )
    return np.repeat(image, channels, axis=2)
