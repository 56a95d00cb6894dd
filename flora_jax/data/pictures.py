"""A picture as a network takes it: in RGB, upright, resized, cut out and normalised.

This file is a part of every export, too, so it needs numpy and Pillow alone.

    pixels = preprocess("cat.jpg")  # as preprocessing.json beside this file says
"""

import contextlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

log = logging.getLogger(__name__)

_ORIENTATION = 0x0112
_TURNS = dict(enumerate((0, 3, 1, 5, 4, 6, 2), start=2))  # of EXIF to Image.Transpose
_nearly_black: list[str] = []  # the picture that is warned of, for all of its kind


def preprocess(
    picture: str | os.PathLike | IO[bytes] | Image.Image, settings: Mapping[str, Any] | None = None
) -> np.ndarray:
    """What a network takes of a picture: float32 [C, H, W].

    Args:
      picture: a file, or an image that Pillow has opened.
      settings: what a preprocessing.json holds; None: of the one beside this file.
    """
    if settings is None:
        settings = json.loads(Path(__file__).with_name("preprocessing.json").read_bytes())
    if not isinstance(picture, Image.Image):
        with Image.open(picture) as opened:
            return preprocess(opened, settings)
    pixels = in_rgb(picture, settings["background"], settings["exif_orientation"])
    size, names = settings["image_size"], ("crop_pct", "crop_mode", "interpolation")
    if settings.get("in_channels") == 1:
        pixels = in_grey(pixels)
    pixels = resized_and_cut(pixels, size, *(settings[name] for name in names))
    scaled = pixels.astype(np.float32) / np.float32(255)
    mean, std = (np.array(settings[name], np.float32) for name in ("mean", "std"))
    return ((scaled - mean) / std).transpose(2, 0, 1)


def in_rgb(
    picture: Image.Image,
    background: tuple[int, ...] = (),
    exif_orientation: bool = True,
    name: str = "the picture",
) -> np.ndarray:
    """The pixels of a picture, uint8 [H, W, 3].

    Grey of more than 8 bits is scaled, not clipped: 16 bits by 1/256, 12 bits of a TIFF that says
    so by 1/16; 32-bit integers where they lie in 0..255 or in 0..65535, floats where they lie in
    0..1 or in 0..255.

    Args:
      background: red, green and blue in 0..255 that show through transparent pixels; empty:
        transparency is ignored.
      exif_orientation: whether the picture is turned and mirrored as its EXIF data say. Pillow
        itself does so with every TIFF.
      name: for the log.

    Raises:
      ValueError: grey of more than 8 bits on another scale.
    """
    picture.load()  # what is damaged beside EXIF data is to be heard of
    seen = _opaque(picture, name)
    if len(background) and picture.has_transparency_data:
        page = Image.new("RGB", seen.size, tuple(background))
        page.paste(seen, mask=_alpha(picture))
        seen = page
    if exif_orientation:
        with contextlib.suppress(Exception):  # damaged EXIF data: taken as it is stored
            seen = seen.transpose(Image.Transpose(_TURNS[picture.getexif()[_ORIENTATION]]))
    return np.asarray(seen)


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
        raise ValueError(f"its values, {least:g} to {most:g}, are not in {scales}: rescale them")
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


def in_grey(pixels: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] -> [H, W, 1], by luminance."""
    return np.asarray(Image.fromarray(pixels).convert("L"))[..., None]


def resized_and_cut(
    image: np.ndarray, size: int, crop_pct: float, crop_mode: str, interpolation: str
) -> np.ndarray:
    """uint8 [H, W, C] -> [size, size, C], C 1 or 3.

    Args:
      crop_pct: share of a side that stays, where the mode is not "squash".
      crop_mode: "center" resizes the short side and cuts out the central square; "squash" resizes
        the whole image, whatever its ratio; "squash_center" does so and cuts out the centre.
      interpolation: by its name in Pillow, in lower case.
    """
    if crop_mode == "squash":
        return resize(image, size, interpolation)
    if crop_mode == "squash_center":
        image = resize(image, int(size / crop_pct), interpolation)
    return resize_and_cut_center(image, size, crop_pct, interpolation)


def resize(image: np.ndarray, size: int, interpolation: str = "bicubic") -> np.ndarray:
    """The whole image at size x size; the same array when it has that size already."""
    if image.shape[:2] == (size, size):
        return image
    return to_array(to_pillow(image).resize((size, size), _method(interpolation)))


def resize_and_cut_center(
    image: np.ndarray, size: int, crop_pct: float = 0.875, interpolation: str = "bicubic"
) -> np.ndarray:
    """The central size x size square of the image, whose short side is first made size/crop_pct.

    At 224 the short side becomes 256, as DeiT and Swin are evaluated. Of an image over
    100 times as long as wide, which would take gigabytes when resized, only the part that stays
    is resized, to nearly the same pixels.
    """
    height, width, _ = image.shape
    short = int(size / crop_pct)
    resized_width = short * width // min(height, width)
    resized_height = short * height // min(height, width)
    top, left = round((resized_height - size) / 2), round((resized_width - size) / 2)
    picture, box = to_pillow(image), (left, top, left + size, top + size)
    if max(height, width) > 100 * min(height, width):
        x, y = width / resized_width, height / resized_height
        box = (left * x, top * y, (left + size) * x, (top + size) * y)
        return to_array(picture.resize((size, size), _method(interpolation), box))
    resized = picture.resize((resized_width, resized_height), _method(interpolation))
    return to_array(resized.crop(box))


def _method(interpolation: str) -> Image.Resampling:
    return Image.Resampling[interpolation.upper()]


def to_pillow(image: np.ndarray) -> Image.Image:
    """From uint8 [H, W, C], C 1 or 3."""
    return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)


def to_array(picture: Image.Image) -> np.ndarray:
    """To uint8 [H, W, C]."""
    pixels = np.array(picture)
    return pixels[..., None] if pixels.ndim == 2 else pixels
