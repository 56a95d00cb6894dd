"""From the bytes of a picture to its pixels."""

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from flora_jax.errors import InputError

MAX_MEGAPIXELS = 179.0  # where Pillow stops, too
# Pillow's own limit belongs to the process, and its error cannot say what lifts it.
Image.MAX_IMAGE_PIXELS = None


class BadImageError(InputError):
    """An encoded image that cannot be decoded; the message names it."""


def decode_rgb(
    encoded: bytes,
    name: str,
    least_side: int | None = None,
    max_megapixels: float = MAX_MEGAPIXELS,
) -> np.ndarray:
    """The pixels of an encoded image of any kind that Pillow reads, uint8 [H, W, 3].

    As torchvision reads images, EXIF rotation and transparency are ignored. Unlike there, 16-bit
    grey is scaled to 8 bits, not clipped.

    Args:
      name: of the image, for the error.
      least_side: pixels that the short side needs. A JPEG that is twice, four or eight times as
        large is decoded at 1/2, 1/4 or 1/8 of its size, which is quicker; None: at full size.
      max_megapixels: millions of pixels that are decoded at most.

    Raises:
      BadImageError: not an image, a damaged one, or one that is too large; the message starts with
        `name`.
    """
    try:
        with Image.open(io.BytesIO(encoded)) as picture:
            size = picture.size
            if least_side:
                picture.draft(None, (least_side, least_side))
            # A progressive JPEG is held whole until it is scaled.
            _check_size(size if "progressive" in picture.info else picture.size, max_megapixels)
            if picture.mode.startswith("I"):
                grey = (np.asarray(picture) >> 8).astype(np.uint8)
                return np.repeat(grey[..., None], 3, axis=2)
            if picture.mode == "P":  # straight to RGB, Pillow warns of a transparent palette
                return np.asarray(picture.convert("RGBA").convert("RGB"))
            return np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB"))
    except Exception as error:  # a damaged file can raise anything in a decoder
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else error
        raise BadImageError(f"{name} cannot be decoded: {reason}") from error


def _check_size(size: tuple[int, int], max_megapixels: float) -> None:
    width, height = size
    if width * height > 1e6 * max_megapixels:
        raise InputError(
            f"its {width} x {height} pixels, {width * height / 1e6:.4g} megapixels, are more than "
            f"max_megapixels={max_megapixels:g} allows"
        )
