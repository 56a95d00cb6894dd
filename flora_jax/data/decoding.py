"""Decoding of pictures of every kind that Pillow reads."""

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from flora_jax.errors import InputError

WHITE = (255, 255, 255)

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
    background: tuple[int, ...] = WHITE,
) -> np.ndarray:
    """The pixels of an encoded image of any kind that Pillow reads, uint8 [H, W, 3].

    As torchvision reads images, EXIF rotation is ignored. Unlike there, 16-bit grey is scaled to 8
    bits, not clipped, and what is transparent shows the background.

    Args:
      name: of the image, for the error.
      least_side: pixels that the short side needs. A JPEG that is twice, four or eight times as
        large is decoded at 1/2, 1/4 or 1/8 of its size, which is quicker; None: at full size.
      max_megapixels: millions of pixels that are decoded at most.
      background: red, green and blue in 0..255 behind a transparent image. Empty: transparency is
        ignored, as torchvision does.

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
            width, height = size if "progressive" in picture.info else picture.size
            if width * height > 1e6 * max_megapixels:
                raise InputError(
                    f"its {width} x {height} pixels, {width * height / 1e6:.4g} megapixels, are "
                    f"more than max_megapixels={max_megapixels:g} allows"
                )
            seen = _opaque(picture)
            if len(background) and picture.has_transparency_data:
                page = Image.new("RGB", seen.size, tuple(background))
                page.paste(seen, mask=_alpha(picture))
                return np.asarray(page)
            return np.asarray(seen)
    except Exception as error:  # a damaged file can raise anything in a decoder
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else error
        raise BadImageError(f"{name} cannot be decoded: {reason}") from error


def _opaque(picture: Image.Image) -> Image.Image:
    """The picture in RGB, without its transparency."""
    if picture.mode.startswith("I"):
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert("RGB")
    if picture.mode == "P":  # straight to RGB, Pillow warns of a transparent palette
        return picture.convert("RGBA").convert("RGB")
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _alpha(picture: Image.Image) -> Image.Image:
    """How opaque each pixel of a picture with transparency is, in 0..255."""
    transparent = picture.info.get("transparency")
    if picture.mode.startswith("I"):  # one grey is transparent, which Pillow does not convert
        return Image.fromarray(np.where(np.asarray(picture) == transparent, 0, 255).astype("u1"))
    return picture.convert("RGBA").getchannel("A")
