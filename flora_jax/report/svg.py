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

    @property
    def text(self) -> str:
        """The SVG element."""
        return ET.tostring(self._svg, encoding="unicode")

    def point(self, x: float, y: float, color: int, title: str, *, opacity: float = 1.0) -> None:
        """Draws a dot."""
        dot = self._mark("circle", f"mark c{color % _NUM_COLORS}", title)
        dot.attrib.update(cx=_text(self._at_x(x)), cy=_text(self._at_y(y)), r="4")
        if opacity < 1:
            dot.set("fill-opacity", _text(opacity))

    def line(
        self, points: Iterable[tuple[float, float]], color: int, title: str, *, dash: int = 0
    ) -> None:
        """Draws a line through points; `dash` is one of three styles, 0 a line without gaps."""
        line = self._mark("polyline", f"line c{color % _NUM_COLORS} d{dash % 3}", title)
        pairs = (f"{_text(self._at_x(x))},{_text(self._at_y(y))}" for x, y in points)
        line.set("points", " ".join(pairs))

    def spot(self, x: float, y: float, color: int, title: str) -> None:
        """Draws a dot that shows itself under the pointer alone, to read a line by."""
        spot = self._mark("circle", f"spot c{color % _NUM_COLORS}", title)
        spot.attrib.update(cx=_text(self._at_x(x)), cy=_text(self._at_y(y)), r="4")

    def bar(
        self, x: float, width: float, y: float, color: int, title: str, *, is_open: bool = False
    ) -> None:
        """Draws a bar from the bottom to y, around x; an open one is an outline."""
        kind = "open" if is_open else "mark"
        bar = self._mark("rect", f"{kind} c{color % _NUM_COLORS}", title)
        left, top, bottom = self._at_x(x - width / 2), self._at_y(y), self._at_y(self._y[0])
        bar.attrib.update(
            x=_text(left),
            y=_text(top),
            width=_text(self._at_x(x + width / 2) - left),
            height=_text(bottom - top),
        )

    def band(self, low: float, high: float, title: str) -> None:
        """Shades the part of the x axis between two values, behind what is drawn later."""
        low, high = np.clip((low, high), *self._x)
        band = self._mark("rect", "band", title)
        band.attrib.update(
            x=_text(self._at_x(low)),
            y=_text(_TOP),
            width=_text(max(2.0, self._at_x(high) - self._at_x(low))),
            height=_text(self._height - _TOP - _BOTTOM),
        )

    def level(self, y: float, title: str) -> None:
        """Draws a dashed line across at y."""
        self._line((self._x[0], y), (self._x[1], y), "level", title)

    def labels(self, labels: Sequence[tuple[float, float, int, str]]) -> None:
        """Writes texts beside points (x, y, color, text), towards the middle, none on another."""
        middle = (self._x[0] + self._x[1]) / 2
        for is_left in (True, False):
            here = sorted(
                (self._at_y(y), self._at_x(x), color, text)
                for x, y, color, text in labels
                if (x < middle) == is_left
            )
            rows = _spread([y for y, *_ in here], _TOP + 6, self._height - _BOTTOM - 6)
            for row, (y, x, color, text) in zip(rows, here, strict=True):
                end = x + (20 if is_left else -20)
                leader = ET.SubElement(self._svg, "path", {"class": f"leader c{color % 6}"})
                leader.set("d", f"M{_text(x)} {_text(y)}L{_text(end)} {_text(row)}")
                attributes = {"class": f"label c{color % _NUM_COLORS}", "dy": "4"}
                attributes |= {"x": _text(end + (3 if is_left else -3)), "y": _text(row)}
                attributes["text-anchor"] = "start" if is_left else "end"
                ET.SubElement(self._svg, "text", attributes).text = text

    def _draw_axes(self, x_label: str, y_label: str, x_ticks: Sequence[float]) -> None:
        bottom, left = self._height - _BOTTOM, _LEFT
        for tick in _ticks(self._y, 6, self._is_log):
            self._line((self._x[0], tick), (self._x[1], tick), "grid")
            self._write(left - 6, self._at_y(tick) + 4, f"{tick:g}", "end")
        for tick in x_ticks:
            self._write(self._at_x(tick), bottom + 17, f"{tick:g}", "middle")
        self._line((self._x[0], self._y[0]), (self._x[1], self._y[0]), "axis")
        self._write((left + self._width - _RIGHT) / 2, self._height - 6, x_label, "middle")
        middle = (_TOP + bottom) / 2
        turned = self._write(14, middle, y_label, "middle")
        turned.set("transform", f"rotate(-90 14 {_text(middle)})")

    def _mark(self, tag: str, kind: str, title: str) -> ET.Element:
        mark = ET.SubElement(self._svg, tag, {"class": kind})
        if title:
            ET.SubElement(mark, "title").text = title
        return mark

    def _line(self, start: Range, end: Range, kind: str, title: str = "") -> None:
        line = self._mark("line", kind, title)
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
        y = np.clip(y, *self._y)  # what lies outside is drawn on the frame
        share = ((np.log(y) if self._is_log else y) - low) / (high - low)
        return self._height - _BOTTOM - share * (self._height - _TOP - _BOTTOM)


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
