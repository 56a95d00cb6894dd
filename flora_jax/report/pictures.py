"""Pictures inside a page: PNG as data URIs, so that the page is one file."""

import base64
import io

import numpy as np
from PIL import Image

_SIDE = 96  # pixels of a thumbnail


def data_uri(png: bytes) -> str:
    """The address of a picture that is its own content."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def thumbnail(image: np.ndarray) -> str:
    """A small picture of an image uint8 [H, W, 1 or 3], as a data URI; a smaller one stays."""
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    picture.thumbnail((_SIDE, _SIDE))
    png = io.BytesIO()
    picture.save(png, format="PNG", optimize=True)
    return data_uri(png.getvalue())
