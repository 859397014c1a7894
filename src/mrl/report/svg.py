"""Drawing with inline SVG: a canvas, and axes with round ticks. Colours and fonts are classes of `style.css`."""

from __future__ import annotations

import html
import math
import unicodedata
from collections.abc import Callable, Sequence


class Axis:
    """A number on the page: maps a range of values to a range of pixels.

    Args:
        low, high: the values at the ends; equal ends are moved apart.
        start, stop: the pixels of the ends (`start` may be the larger, as for y).
        log: logarithmic; then low must be positive.

    Example:
        >>> axis = Axis(0.0, 10.0, 100, 200)
        >>> axis(5.0), axis.ticks(3)
        (150.0, [0.0, 5.0, 10.0])
    """

    def __init__(self, low: float, high: float, start: float, stop: float, *, log: bool = False):
        if high <= low:
            low, high = (low / 1.1, low * 1.1) if log else (low - 0.5, low + 0.5)
        self.low, self.high, self.start, self.stop, self.log = low, high, start, stop, log

    def __call__(self, value: float) -> float:
        """The pixel of a value, held inside the range."""
        value = min(max(value, self.low), self.high)
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.stop - self.start)

    def ticks(self, most: int = 6) -> list[float]:
        """Round values inside the range, at most about `most` of them."""
        if self.log and self.high > 3 * self.low:
            return self._log_ticks(most)
        raw = (self.high - self.low) / max(most - 1, 1)
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(power * k for k in (1, 2, 2.5, 5, 10) if power * k >= raw * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [round(k * step, 12) for k in range(first, last + 1)]

    def _log_ticks(self, most: int) -> list[float]:
        for marks in ((1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8), (1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1,)):
            low, high = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            values = [round(m * 10.0**p, 12) for p in range(low - 1, high + 1) for m in marks]
            values = [v for v in values if self.low * 0.999 <= v <= self.high * 1.001]
            if len(values) <= most:
                return values
        return values


class Canvas:
    """An SVG image that is built from top to bottom.

    Args:
        width, height: in user units; the page scales the image to its column.
        label: what a reader who cannot see it is told.

    Example:
        >>> canvas = Canvas(40, 10, "one line")
        >>> canvas.line(0, 5, 40, 5, "axis")
        >>> "<line" in canvas.markup() and 'aria-label="one line"' in canvas.markup()
        True
    """

    def __init__(self, width: float, height: float, label: str):
        self.width, self.height, self.label = width, height, label
        self._parts: list[str] = []
        self._tips: list[str] = []

    def line(self, x1: float, y1: float, x2: float, y2: float, style: str) -> None:
        """A straight line."""
        self._parts.append(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{style}"/>')

    def rect(
        self, x: float, y: float, width: float, height: float, style: str, *, opacity: float | None = None
    ) -> None:
        """A filled rectangle; `opacity` is its share of the class's colour."""
        more = "" if opacity is None else f' fill-opacity="{opacity:.3f}"'
        size = f'width="{max(width, 0):.1f}" height="{max(height, 0):.1f}"'
        self._parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" {size} class="{style}"{more}/>')

    def path(self, points: Sequence[tuple[float, float]], style: str) -> None:
        """A line through points."""
        if points:
            self._parts.append(f'<path d="M{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" class="{style}"/>')

    def mark(self, x: float, y: float, style: str, *, square: bool = False, size: float = 4.5) -> None:
        """A point: a circle, or a square, so that two arms differ without their colour."""
        if square:
            self.rect(x - size * 0.9, y - size * 0.9, size * 1.8, size * 1.8, style)
        else:
            self._parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size:.1f}" class="{style}"/>')

    def text(self, x: float, y: float, text: str, style: str = "", *, anchor: str = "start") -> None:
        """A line of text; `anchor` is "start", "middle" or "end"."""
        more = f' class="{style}"' if style else ""
        self._parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{html.escape(text)}</text>')

    def tip(self, box: tuple[float, float, float, float], lines: Sequence[str], *, at: tuple[float, float]) -> None:
        """Text that shows while the pointer is over `box` (x, y, width, height); it needs no script."""
        width = max(text_width(line) for line in lines) + 14
        height = 16 * len(lines) + 8
        x = min(max(at[0] + 8, 0), self.width - width)
        y = min(max(at[1] - height - 6, 0), self.height - height)
        words = "".join(
            f'<text x="{x + 7:.1f}" y="{y + 17 + 16 * i:.1f}">{html.escape(line)}</text>'
            for i, line in enumerate(lines)
        )
        hit = 'x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"'.format(*box)
        back = f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height}" rx="3" class="tipbox"/>'
        self._tips.append(f'<g class="hit"><rect {hit} class="hitbox"/><g class="tip">{back}{words}</g></g>')

    def x_axis(
        self, axis: Axis, y: float, text: Callable[[float], str], *, top: float | None = None, most: int = 6
    ) -> None:
        """The line of an axis at height `y`, its ticks, and faint lines up to `top`."""
        for value in axis.ticks(most):
            x = axis(value)
            if top is not None:
                self.line(x, top, x, y, "grid")
            self.line(x, y, x, y + 4, "axis")
            self.text(x, y + 16, text(value), "tick", anchor="middle")
        self.line(min(axis.start, axis.stop), y, max(axis.start, axis.stop), y, "axis")

    def y_axis(self, axis: Axis, x: float, text: Callable[[float], str], *, right: float, most: int = 5) -> None:
        """Faint lines from `x` to `right` at round values, with the values at their left."""
        for value in axis.ticks(most):
            y = axis(value)
            self.line(x, y, right, y, "grid")
            self.text(x - 6, y + 4, text(value), "tick", anchor="end")

    def markup(self) -> str:
        """The image as text for an HTML page."""
        size = f'viewBox="0 0 {self.width:.0f} {self.height:.0f}" width="{self.width:.0f}" height="{self.height:.0f}"'
        label = html.escape(self.label, quote=True)
        return f'<svg {size} role="img" aria-label="{label}">{"".join(self._parts)}{"".join(self._tips)}</svg>'


def text_width(text: str) -> float:
    """About how wide a text is at 12 px: East Asian letters are twice as wide as Latin ones.

    Example:
        >>> text_width("ab") < text_width("日本")
        True
    """
    return sum(12.0 if unicodedata.east_asian_width(letter) in "WF" else 6.6 for letter in text)


def shorten(text: str, width: float) -> str:
    """A text cut to about `width` user units, with an ellipsis where something was cut.

    Example:
        >>> shorten("abcdefghij", 40)
        'abcd…'
    """
    if text_width(text) <= width:
        return text
    kept = ""
    for letter in text:
        if text_width(kept + letter) > width - 10:
            break
        kept += letter
    return kept.rstrip() + "…"
