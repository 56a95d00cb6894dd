"""Decoding of pictures of every kind that Pillow reads."""

import contextlib
import io
import logging
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from flora_jax.errors import InputError

WHITE = (255, 255, 255)

MAX_MEGAPIXELS = 179.0  # where Pillow stops, too
# Pillow's own limit belongs to the process, and its error cannot say what lifts it.
Image.MAX_IMAGE_PIXELS = None
warnings.filterwarnings("ignore", "Corrupt EXIF data")  # such a picture is taken as it is stored

log = logging.getLogger(__name__)
_nearly_black: list[str] = []  # the picture that is warned of, for all of its kind


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
    and grey of more than 8 bits is scaled, not clipped: 16 bits by 1/256, 12 bits of a TIFF that
    says so by 1/16; 32-bit integers where they lie in 0..255 or in 0..65535, floats where they lie
    in 0..1 or in 0..255. Beyond that there is no scale to know, and the image is bad.

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
            if exif_orientation:
                picture.load()  # what is damaged beside EXIF data is to be heard of
                with contextlib.suppress(Exception):
                    ImageOps.exif_transpose(picture, in_place=True)
            seen = _opaque(picture, name)
            if len(background) and picture.has_transparency_data:
                page = Image.new("RGB", seen.size, tuple(background))
                page.paste(seen, mask=_alpha(picture))
                return np.asarray(page)
            return np.asarray(seen)
    except Exception as error:  # a damaged file can raise anything in a decoder
        is_unknown = isinstance(error, UnidentifiedImageError)
        reason = "not an image, or of a kind that Pillow does not read" if is_unknown else error
        raise BadImageError(f"{name} cannot be decoded: {reason}") from error


def _opaque(picture: Image.Image, name: str) -> Image.Image:
    """The picture in RGB, without its transparency."""
    if picture.mode[0] in "IF":
        return Image.fromarray(_in_8_bits(picture, name)).convert("RGB")
    if picture.mode == "P":  # straight to RGB, Pillow warns of a transparent palette
        return picture.convert("RGBA").convert("RGB")
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _in_8_bits(picture: Image.Image, name: str) -> np.ndarray:
    """Grey uint8 [H, W] of more bits, by the smallest of the known scales that holds all values."""
    values, mode = np.asarray(picture), picture.mode
    if mode == "F":
        factors = {1: 255.0, 255: 1.0}
    elif mode == "I" and picture.format == "TIFF":
        factors = {255: 1.0, 65535: 1 / 256}
    else:  # of a PGM, too
        bits = getattr(picture, "tag_v2", {}).get(258, (16,))[0]
        factors = {2**bits - 1: 2.0 ** (8 - bits)}
    least, most = values.min(), values.max()
    factor = next((f for limit, f in factors.items() if least >= 0 and most <= limit), None)
    if factor is None:
        scales = " or ".join(f"0..{limit}" for limit in factors)
        raise InputError(f"its values, {least:g} to {most:g}, are not in {scales}: rescale them")
    if {*factors} == {65535} and most < 4096 and not _nearly_black:
        _nearly_black.append(name)
        log.warning(
            "%s has 16 bits but no value above %d, and comes out nearly black, as others may: "
            "values of 12 bits are to be multiplied by 16 first",
            *(name, most),
        )
    return (np.rint(values * factor) if mode == "F" else values * factor).astype(np.uint8)


def _alpha(picture: Image.Image) -> Image.Image:
    """How opaque each pixel of a picture with transparency is, in 0..255."""
    transparent = picture.info.get("transparency")
    if picture.mode.startswith("I"):  # one grey is transparent, which Pillow does not convert
        return Image.fromarray(np.where(np.asarray(picture) == transparent, 0, 255).astype("u1"))
    return picture.convert("RGBA").getchannel("A")
