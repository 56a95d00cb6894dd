"""Charts as SVG for a page: a frame with ticks, and marks that each say what they are.

Colours and fonts are classes, which the page's style gives a meaning: so they follow the reader's
light or dark screen. "c0" to "c5" are the series; a mark's text is its <title>, shown on hover.
"""

import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator

_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 14, 12, 44
_NUM_COLORS = 6
_LABEL_HEIGHT = 16
_STEPS = (1, 2, 2.5, 5, 10)  # between ticks
Range = tuple[float, float]


def padded(values: Iterable[float], share: float = 0.08) -> Range:
    """The range of some values, at least one, with a margin: no mark lies on the frame."""
    values = list(values)
    low, high = min(values), max(values)
    margin = share * (high - low) or 0.05 * abs(high) or 1
    return low - margin, high + margin


class Chart:
    """A chart to draw marks on, in the units of its axes. `text` gives the SVG.

    Args:
      x, y: the ranges of the axes.
      x_ticks: where the x axis has ticks, if not at round numbers.
      is_log: whether the y axis is logarithmic.
    """

    def __init__(
        self,
        x: Range,
        y: Range,
        x_label: str,
        y_label: str,
        *,
        width: int = 480,
        height: int = 300,
        x_ticks: Sequence[float] | None = None,
        is_log: bool = False,
    ):
        self._x, self._y, self._is_log = x, y, is_log
        self._width, self._height = width, height
        self._svg = ET.Element("svg", viewBox=f"0 0 {width} {height}", role="img")
        self._svg.set("aria-label", f"{y_label} against {x_label}")
        self._draw_axes(x_label, y_label, _ticks(x, 7) if x_ticks is None else x_ticks)
        inner = (_LEFT, _TOP, width - _LEFT - _RIGHT, height - _TOP - _BOTTOM)
        names = ("x", "y", "width", "height")
        # One SVG inside another cuts off what lies outside of its box.
        box = dict(zip(names, map(str, inner), strict=True), viewBox=" ".join(map(str, inner)))
        self._marks = ET.SubElement(self._svg, "svg", box)

    @property
    def text(self) -> str:
        """The SVG element."""
        return ET.tostring(self._svg, encoding="unicode")

    def point(self, x: float, y: float, color: int, title: str, *, opacity: float = 1.0) -> None:
        """Draws a dot."""
        dot = _add(self._marks, "circle", f"mark c{color % _NUM_COLORS}", title)
        dot.attrib.update(cx=_text(self._at_x(x)), cy=_text(self._at_y(y)), r="4")
        if opacity < 1:
            dot.set("fill-opacity", _text(opacity))

    def line(
        self, points: Iterable[tuple[float, float]], color: int, title: str, *, dash: int = 0
    ) -> None:
        """Draws a line through points; `dash` is one of four styles, 0 a line without gaps."""
        line = _add(self._marks, "polyline", f"line c{color % _NUM_COLORS} d{dash % 4}", title)
        pairs = (f"{_text(self._at_x(x))},{_text(self._at_y(y))}" for x, y in points)
        line.set("points", " ".join(pairs))

    def spot(self, x: float, y: float, color: int, title: str) -> None:
        """Draws a dot that shows itself under the pointer alone, to read a line by."""
        spot = _add(self._marks, "circle", f"spot c{color % _NUM_COLORS}", title)
        spot.attrib.update(cx=_text(self._at_x(x)), cy=_text(self._at_y(y)), r="4")

    def bar(
        self, x: float, width: float, y: float, color: int, title: str, *, is_open: bool = False
    ) -> None:
        """Draws a bar from the bottom to y, around x; an open one is an outline."""
        kind = "open" if is_open else "mark"
        bar = _add(self._marks, "rect", f"{kind} c{color % _NUM_COLORS}", title)
        left, top, bottom = self._at_x(x - width / 2), self._at_y(y), self._at_y(self._y[0])
        bar.attrib.update(
            x=_text(left),
            y=_text(top),
            width=_text(self._at_x(x + width / 2) - left),
            height=_text(bottom - top),
        )

    def band(self, low: float, high: float, title: str) -> None:
        """Shades the part of the x axis between two values, behind what is drawn later."""
        band = _add(self._marks, "rect", "band", title)
        band.attrib.update(
            x=_text(self._at_x(low)),
            y=_text(_TOP),
            width=_text(max(2.0, self._at_x(high) - self._at_x(low))),
            height=_text(self._height - _TOP - _BOTTOM),
        )

    def level(self, y: float, title: str) -> None:
        """Draws a dashed line across at y."""
        self._line(self._marks, (self._x[0], y), (self._x[1], y), "level", title)

    def labels(self, labels: Sequence[tuple[float, float, int, str]]) -> None:
        """Writes texts beside points (x, y, color, text), towards the middle, none on another."""
        placed = sorted((self._at_y(y), self._at_x(x), color, text) for x, y, color, text in labels)
        rows = _spread([y for y, *_ in placed], _TOP + 6, self._height - _BOTTOM - 6)
        for row, (y, x, color, text) in zip(rows, placed, strict=True):
            side = 1 if x < self._at_x(sum(self._x) / 2) else -1
            kind, end = f"c{color % _NUM_COLORS}", x + 20 * side
            leader = _add(self._svg, "path", f"leader {kind}")
            leader.set("d", f"M{_text(x)} {_text(y)}L{_text(end)} {_text(row)}")
            label = self._write(end + 3 * side, row + 4, text, "start" if side > 0 else "end")
            label.set("class", f"label {kind}")

    def _draw_axes(self, x_label: str, y_label: str, x_ticks: Sequence[float]) -> None:
        bottom, left = self._height - _BOTTOM, _LEFT
        for tick in _ticks(self._y, 6, self._is_log):
            self._line(self._svg, (self._x[0], tick), (self._x[1], tick), "grid")
            self._write(left - 6, self._at_y(tick) + 4, f"{tick:g}", "end")
        for tick in x_ticks:
            self._write(self._at_x(tick), bottom + 17, f"{tick:g}", "middle")
        self._line(self._svg, (self._x[0], self._y[0]), (self._x[1], self._y[0]), "axis")
        self._write((left + self._width - _RIGHT) / 2, self._height - 6, x_label, "middle")
        middle = (_TOP + bottom) / 2
        turned = self._write(14, middle, y_label, "middle")
        turned.set("transform", f"rotate(-90 14 {_text(middle)})")

    def _line(
        self, parent: ET.Element, start: Range, end: Range, kind: str, title: str = ""
    ) -> None:
        line = _add(parent, "line", kind, title)
        line.attrib.update(x1=_text(self._at_x(start[0])), y1=_text(self._at_y(start[1])))
        line.attrib.update(x2=_text(self._at_x(end[0])), y2=_text(self._at_y(end[1])))

    def _write(self, x: float, y: float, text: str, anchor: str) -> ET.Element:
        element = ET.SubElement(self._svg, "text", x=_text(x), y=_text(y))
        element.set("text-anchor", anchor)
        element.text = text
        return element

    def _at_x(self, x: float) -> float:
        low, high = self._x
        return _LEFT + (x - low) / (high - low) * (self._width - _LEFT - _RIGHT)

    def _at_y(self, y: float) -> float:
        low, high = np.log(self._y) if self._is_log else self._y
        share = ((np.log(y) if self._is_log else y) - low) / (high - low)
        return self._height - _BOTTOM - share * (self._height - _TOP - _BOTTOM)


def _add(parent: ET.Element, tag: str, kind: str, title: str = "") -> ET.Element:
    element = ET.SubElement(parent, tag, {"class": kind})
    if title:
        ET.SubElement(element, "title").text = title
    return element


def _ticks(ends: Range, most: int, is_log: bool = False) -> list[float]:
    locator = LogLocator(subs=(1, 2, 5)) if is_log else MaxNLocator(most, steps=_STEPS)
    found = locator.tick_values(*ends)
    return [float(f"{tick:.10g}") for tick in found if ends[0] <= tick <= ends[1]]


def _spread(rows: Sequence[float], low: float, high: float) -> list[float]:
    """Ascending rows moved apart by a label's height, and back into the frame."""
    placed: list[float] = []
    for row in rows:
        placed.append(max(row, placed[-1] + _LABEL_HEIGHT) if placed else max(row, low))
    limit = high
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], limit)
        limit = placed[i] - _LABEL_HEIGHT
    return placed


def _text(number: float) -> str:
    return f"{number:.2f}".rstrip("0").rstrip(".")
