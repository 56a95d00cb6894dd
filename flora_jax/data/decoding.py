"""Decoding of pictures of every kind that Pillow reads."""

import io
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

from flora_jax.data.pictures import in_rgb
from flora_jax.errors import InputError

WHITE = (255, 255, 255)

MAX_MEGAPIXELS = 179.0  # where Pillow stops, too
# Pillow's own limit belongs to the process, and its error cannot say what lifts it.
Image.MAX_IMAGE_PIXELS = None
warnings.filterwarnings("ignore", "Corrupt EXIF data")  # such a picture is taken as it is stored


class BadImageError(InputError):
    """An encoded image that cannot be decoded; the message names it."""


def decode_rgb(
    encoded: bytes,
    name: str,
    least_side: int | None = None,
    max_megapixels: float = MAX_MEGAPIXELS,
    background: tuple[int, ...] = WHITE,
    exif_orientation: bool = True,
) -> np.ndarray:
    """The pixels of an encoded image of any kind that Pillow reads, uint8 [H, W, 3].

    Unlike in torchvision, what is transparent shows the background, a photograph stands upright,
    and grey of more than 8 bits is scaled, not clipped, as `in_rgb` says.

    Args:
      name: of the image, for the error.
      least_side: pixels that the short side needs. A JPEG that is twice, four or eight times as
        large is decoded at 1/2, 1/4 or 1/8 of its size, which is quicker; None: at full size.
      max_megapixels: millions of pixels that are decoded at most.
      background: red, green and blue in 0..255 behind a transparent image. Empty: transparency is
        ignored, as torchvision does.
      exif_orientation: turn and mirror the picture as its EXIF data say, as transformers does; no
        for torchvision and timm. Pillow does so with every TIFF.

    Raises:
      BadImageError: not an image, a damaged one, one that is too large, or grey on an unknown
        scale; the message starts with `name`.
    """
    try:
        with Image.open(io.BytesIO(encoded)) as picture:
            size = picture.size
            if least_side:
                picture.draft(None, (least_side, least_side))
            # A progressive JPEG is held whole until it is scaled.
            width, height = size if "progressive" in picture.info else picture.size
            if width * height > 1e6 * max_megapixels:
                raise InputError(
                    f"its {width} x {height} pixels, {width * height / 1e6:.4g} megapixels, are "
                    f"more than max_megapixels={max_megapixels:g} allows"
                )
            return in_rgb(picture, background, exif_orientation, name)
    except Exception as error:  # a damaged file can raise anything in a decoder
        is_unknown = isinstance(error, UnidentifiedImageError)
        reason = "not an image, or of a kind that Pillow does not read" if is_unknown else error
        raise BadImageError(f"{name} cannot be decoded: {reason}") from error
