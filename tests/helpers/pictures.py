"""Images in class folders."""

import pathlib

import numpy as np
from PIL import Image


def save(path: pathlib.Path, picture=None, **options) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if picture is None:
        picture = np.zeros((3, 5, 3), np.uint8)
    if not isinstance(picture, Image.Image):
        picture = Image.fromarray(picture)
    picture.save(path, **options)
    return path


def keys(source) -> list[str]:
    return [source.key(i) for i in range(len(source))]


def not_an_image(path):
    path.write_text("<html>404</html>")


def scene(seed: int, size: tuple[int, int] = (80, 60)) -> Image.Image:
    """A smooth picture, unlike that of any other seed."""
    colours = np.random.default_rng(seed).integers(256, size=(6, 6, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC)
