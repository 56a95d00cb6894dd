"""PNG and SVG of Matplotlib figures, and small PNGs of images, for files and for a page.

Figures are `matplotlib.figure.Figure` objects, never pyplot's: there is no global state, no window,
and no display is needed. Every output is the same each time, byte by byte.
"""

import base64
import io
import json
import re
import warnings
import xml.etree.ElementTree as ET
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from PIL import Image

INK, GROUND = "#1c1e21", "#ffffff"  # in an SVG they become the page's own
_SIDE = 96  # pixels of a thumbnail


def titled(artist: Artist, title: str, *marks: str) -> None:
    """Gives an artist the text that an SVG shows under the pointer, and one to each of its marks.

    Args:
      marks: of a scatter or of the markers of a line, in their order.
    """
    artist.set_gid(json.dumps([title, *marks]))  # which is all that Matplotlib passes on


def png(figure: Figure) -> bytes:
    """PNG of a figure, 200 dpi."""
    return _saved(figure, format="png", dpi=200)


def svg(figure: Figure, name: str) -> str:
    """SVG of a figure, an element to stand in a page.

    Text stays text; ink and ground become `currentColor` and `var(--ground)`, a colour "#123456"
    becomes `var(--c123456, #123456)`, so that a page may give it another on a dark screen.

    Args:
      name: another for each figure of a page, so that their definitions stay apart.
    """
    options: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": name}
    with matplotlib.rc_context(options):
        content = _saved(figure, format="svg", transparent=True, metadata={"Date": None})
    root = ET.fromstring(content)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        for child in list(element):
            if child.tag.endswith(("}metadata", "}style")):
                element.remove(child)
        if element.tag == "g":
            _write_titles(element, element.attrib.pop("id", ""))
    del root.attrib["width"], root.attrib["height"]  # the page gives it its width
    root.attrib.update({"role": "img", "aria-label": name})
    text = ET.tostring(root, encoding="unicode")
    text = text.replace(INK, "currentColor").replace(GROUND, "var(--ground, #fff)")
    return re.sub("(fill|stroke): #([0-9a-f]{6})", r"\1: var(--c\2, #\2)", text)


def _write_titles(group: ET.Element, gid: str) -> None:
    """Turns what `titled` has said of an artist into elements."""
    if not gid.startswith("["):
        return
    title, *texts = json.loads(gid)
    uses, paths = (
        [e for e in group.iter() if e.tag.endswith("}" + tag)] for tag in ("use", "path")
    )
    marks = uses or paths  # Matplotlib defines a mark once and uses it, or draws each that differs
    if len(marks) == len(texts):
        for mark, text in zip(marks, texts, strict=True):
            ET.SubElement(mark, "title").text = text
    element = ET.Element("title")
    element.text = title
    group.insert(0, element)


def _saved(figure: Figure, **options: Any) -> bytes:
    content = io.BytesIO()
    with warnings.catch_warnings():  # names may be in any script
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(content, **options)
    return content.getvalue()


def thumbnail(image: np.ndarray) -> str:
    """Small PNG of an image uint8 [H, W, 1 or 3], as a data URI; a smaller one stays."""
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    picture.thumbnail((_SIDE, _SIDE))
    content = io.BytesIO()
    picture.save(content, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
