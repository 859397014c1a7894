"""The figures of the report: values in, SVG out. The baseline is a grey square and dashes, MRL a blue dot and full lines."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mrl.report.svg import Axis, Canvas, shorten, text_width
from mrl.report.words import Words, known

STYLES = {"baseline": "b", "mrl": "m"}
GROUP_GAP = 7.0


@dataclass(frozen=True)
class Span:
    """One estimate with its interval: a row of an interval figure."""

    label: str
    estimate: float | None
    low: float | None
    high: float | None
    arm: str = ""


@dataclass(frozen=True)
class Guides:
    """What helps to read an interval figure.

    Args:
        reference: a value with a line of its own (no difference).
        band: a shaded range (the margin).
        band_label: its name.
        sides: what left and right of the reference mean.
        log: a logarithmic axis, for ratios.
        group: rows that belong together; a faint line parts the groups.
    """

    reference: float | None = None
    band: tuple[float, float] | None = None
    band_label: str = ""
    sides: tuple[str, str] | None = None
    log: bool = False
    group: int = 0


def intervals(
    rows: Sequence[Span],
    guides: Guides,
    *,
    label: str,
    text: Callable[[float], str],
    missing: str,
    width: float = 520,
    row: float = 24,
) -> str:
    """Estimates with intervals on one axis.

    Args:
        rows: what to draw, from top to bottom.
        guides: reference line, margin, direction.
        label: the sentence for readers who cannot see the figure.
        text: writes a value of the axis.
        missing: what stands in a row without numbers.
        width: of the image.
        row: height of a row.

    Example:
        >>> "<svg" in intervals([Span("a", 1.0, 0.5, 1.5)], Guides(0.0), label="one", text=str, missing="none")
        True
    """
    names = [span.label for span in rows if span.label]
    left = min(170.0, max(map(text_width, names)) + 12) if names else 14.0
    top = 21.0 if guides.sides or guides.band_label else 6.0
    gap = GROUP_GAP if guides.group else 0.0
    bottom = top + row * len(rows) + gap * (len(rows) // max(guides.group, 1))
    canvas = Canvas(width, bottom + 24, label)
    low, high = _range(rows, guides)
    axis = Axis(low, high, left, width - 18, log=guides.log)
    _guide(canvas, axis, guides, top, bottom)
    canvas.x_axis(axis, bottom, text, top=top)
    if guides.reference is not None:
        canvas.line(axis(guides.reference), top - 4, axis(guides.reference), bottom, "reference")
    for i, span in enumerate(rows):
        shift = gap * (i // max(guides.group, 1) + 0.5)
        if guides.group and i and i % guides.group == 0:
            y = top + row * i + shift - gap / 2
            canvas.line(left - 4, y, width - 18, y, "grid")
        _span(canvas, axis, top + row * (i + 0.5) + shift, span, left, text, missing)
    return canvas.markup()


def _guide(canvas: Canvas, axis: Axis, guides: Guides, top: float, bottom: float) -> None:
    left, right, taken = axis.start, axis.stop, 0.0
    if guides.sides:
        canvas.text(left, 13, f"← {guides.sides[0]}", "side")
        canvas.text(right, 13, f"{guides.sides[1]} →", "side", anchor="end")
        taken = max(map(text_width, guides.sides)) + 20
    if guides.band:
        low, high = map(axis, guides.band)
        canvas.rect(low, top, high - low, bottom - top, "band")
        for edge in (low, high):
            canvas.line(edge, top, edge, bottom, "bandedge")
        half = text_width(guides.band_label) / 2
        middle = min(max((low + high) / 2, left + taken + half), right - taken - half)
        canvas.text(middle, top - 8, guides.band_label, "tick", anchor="middle")


def _range(rows: Sequence[Span], guides: Guides) -> tuple[float, float]:
    log, reference, band = guides.log, guides.reference, guides.band
    values = [v for r in rows for v in (r.estimate, r.low, r.high) if known(v) and (v > 0 or not log)]
    values += [reference] if reference is not None else []
    values += list(band or ())
    if not values:
        return (0.5, 2.0) if log else (0.0, 1.0)
    low, high = min(values), max(values)
    if log:
        room = max((high / low) ** 0.12, 1.04)
        return low / room, high * room
    room = max(0.12 * (high - low), 0.004)
    return low - room, high + room


def _span(
    canvas: Canvas, axis: Axis, y: float, span: Span, left: float, text: Callable[[float], str], missing: str
) -> None:
    style = STYLES.get(span.arm, "n")
    if span.label:
        canvas.text(left - 10, y + 4, shorten(span.label, left - 12), "name", anchor="end")
    if not known(span.estimate):
        canvas.text(left + 4, y + 4, missing, "tick")
        return
    if known(span.low) and known(span.high):
        canvas.line(axis(span.low), y, axis(span.high), y, f"whisker {style}")
        for end in (span.low, span.high):
            canvas.line(axis(end), y - 4, axis(end), y + 4, f"whisker {style}")
    canvas.mark(axis(span.estimate), y, f"mark {style}", square=span.arm == "baseline")
    told = [f"{span.label} {text(span.estimate)}".strip()]
    if known(span.low) and known(span.high):
        told.append(f"{text(span.low)} … {text(span.high)}")
    start, stop = min(axis.start, axis.stop), max(axis.start, axis.stop)
    canvas.tip((start, y - 10, stop - start, 20), told, at=(axis(span.estimate), y - 2))


@dataclass(frozen=True)
class Curve:
    """A line of a curve figure, with its name, arm, points, and the one point to ring (the best update)."""

    label: str
    arm: str
    points: Sequence[tuple[float, float]]
    ring: tuple[float, float] | None = None
    dots: bool = False


def curves(
    lines: Sequence[Curve],
    *,
    label: str,
    x_label: str,
    text: Callable[[float], str],
    missing: str,
    levels: Sequence[tuple[str, str, float]] = (),
    before: tuple[str, str] | None = None,
    width: float = 520,
    height: float = 250,
) -> str:
    """Lines over the updates of the fit.

    Args:
        lines: what to draw; values that are not finite are left out.
        label: the sentence for readers who cannot see the figure.
        x_label: the name of the x axis.
        text: writes a value of the y axis.
        missing: what stands in an empty figure.
        levels: horizontal lines (label, arm, value): the linear probes.
        before: two lines of text for a hatched strip in front of update 0 (calibration; not to scale).
        width: of the image.
        height: of the image.

    Example:
        >>> "<path" in curves([Curve("a", "mrl", [(0, 1.0), (1, 2.0)])], label="", x_label="", text=str, missing="")
        True
    """
    canvas = Canvas(width, height, label)
    kept = [(line, [(x, y) for x, y in line.points if known(x) and known(y)]) for line in lines]
    ys = [y for _, points in kept for _, y in points] + [value for _, _, value in levels if known(value)]
    xs = [x for _, points in kept for x, _ in points]
    strip = min(118.0, max(map(text_width, before)) + 12) if before else 0.0
    top, bottom, left, right = 12.0, height - 40, 52.0, width - 14
    if not xs:
        canvas.text(width / 2, height / 2, missing, "tick", anchor="middle")
        return canvas.markup()
    room = max(0.06 * (max(ys) - min(ys)), 1e-3)
    y_axis = Axis(min(ys) - room, max(ys) + room, bottom, top)
    x_axis = Axis(0, max(xs), left + strip, right)
    canvas.y_axis(y_axis, left, text, right=right)
    canvas.x_axis(x_axis, bottom, lambda v: f"{v:,.0f}", most=7)
    canvas.text((left + strip + right) / 2, height - 6, x_label, "tick", anchor="middle")
    if before:
        canvas.rect(left, top, strip, bottom - top, "hatch")
        for i, words in enumerate(before):
            canvas.text(left + 6, top + 16 + 15 * i, shorten(words, strip - 8), "tick")
    for name, arm, value in levels:
        if known(value):
            style = STYLES.get(arm, "n")
            canvas.line(left + strip, y_axis(value), right, y_axis(value), f"level {style}")
            canvas.tip(
                (left + strip, y_axis(value) - 3, right - left - strip, 6), [name], at=(left + strip, y_axis(value))
            )
    for line, points in kept:
        _curve(canvas, x_axis, y_axis, line, points)
    _read_across(canvas, x_axis, (top, bottom), kept, text, x_label)
    return canvas.markup()


def _curve(canvas: Canvas, x_axis: Axis, y_axis: Axis, line: Curve, points: Sequence[tuple[float, float]]) -> None:
    style = STYLES.get(line.arm, "n")
    every = max(1, len(points) // 600)
    drawn = [(x_axis(x), y_axis(y)) for x, y in [*points[::every], *points[-1:]]]
    canvas.path(drawn, f"curve {style}")
    if line.dots and len(points) <= 60:
        for x, y in drawn[: len(points)]:
            canvas.mark(x, y, f"dot {style}", square=line.arm == "baseline", size=2.6)
    if line.ring and known(line.ring[1]):
        canvas.mark(x_axis(line.ring[0]), y_axis(line.ring[1]), f"ring {style}", square=line.arm == "baseline", size=6)


def _read_across(
    canvas: Canvas,
    axis: Axis,
    span: tuple[float, float],
    kept: Sequence[tuple[Curve, list]],
    text: Callable,
    x_label: str,
) -> None:
    """Columns under the pointer that tell all lines' values at one update."""
    xs = sorted({x for _, points in kept for x, _ in points})
    xs = xs[:: max(1, len(xs) // 60)]
    tables = [(line.label, dict(points)) for line, points in kept]
    step = (axis.stop - axis.start) / max(len(xs), 1)
    for x in xs:
        told = [f"{x_label} {x:,.0f}"] + [f"{name} {text(values[x])}" for name, values in tables if x in values]
        canvas.tip((axis(x) - step / 2, span[0], step, span[1] - span[0]), told, at=(axis(x), span[1] - 70))


def histograms(
    samples: Mapping[str, Sequence[float]], marks: Mapping[str, Mapping[str, float]], words: Words, *, label: str
) -> str:
    """Latencies of both arms as two rows of bars on one axis, with median and 95th percentile.

    The axis ends where a lone outlier would flatten the rest; what lies beyond is counted at the edge.

    Example:
        >>> "<rect" in histograms({"mrl": [1.0, 2.0, 2.5]}, {"mrl": {"median": 2.0}}, Words(), label="")
        True
    """
    lists = {arm: sorted(v for v in values if known(v)) for arm, values in samples.items()}
    lists = {arm: values for arm, values in lists.items() if values}
    width, row = 520.0, 92.0
    canvas = Canvas(width, 14 + row * max(len(lists), 1) + 38, label)
    if not lists:
        canvas.text(width / 2, 40, words("missing"), "tick", anchor="middle")
        return canvas.markup()
    low = min(values[0] for values in lists.values())
    near = max(values[min(len(values) - 1, math.ceil(0.99 * len(values)) - 1)] for values in lists.values())
    high = min(max(values[-1] for values in lists.values()), near * 1.25)
    axis = Axis(low - 0.02 * (high - low), high, 14, width - 14)
    base = 14 + row * len(lists)
    canvas.x_axis(axis, base, lambda v: f"{v:g}", top=14)
    canvas.text(width / 2, base + 32, words("latency.axis"), "tick", anchor="middle")
    for i, (arm, values) in enumerate(lists.items()):
        _histogram(canvas, axis, 14 + row * (i + 1), arm, values, marks.get(arm, {}), words)
    return canvas.markup()


def _histogram(
    canvas: Canvas, axis: Axis, base: float, arm: str, values: Sequence[float], marks: Mapping[str, float], words: Words
) -> None:
    bins, style = 56, STYLES.get(arm, "n")
    inside = [v for v in values if v <= axis.high]
    counts = [0] * bins
    for value in inside:
        counts[min(bins - 1, int((value - axis.low) / (axis.high - axis.low) * bins))] += 1
    step = (axis.stop - axis.start) / bins
    for k, n in enumerate(counts):
        if n:
            height = 48 * n / max(counts)
            canvas.rect(axis.start + k * step, base - height, step - 0.8, height, f"bar {style}")
    for mark, value in marks.items():
        if known(value) and value <= axis.high:
            canvas.line(axis(value), base - 56, axis(value), base, f"markline {style} {mark}")
    canvas.text(18, base - 70, words.arm(arm), f"name {style}")
    told = words("latency.marks", median=words.ms(marks.get("median")), p95=words.ms(marks.get("p95")))
    canvas.text(30 + text_width(words.arm(arm)), base - 70, told, "tick")
    if len(inside) < len(values):
        told = words("latency.beyond", n=len(values) - len(inside), x=words.ms(values[-1]))
        canvas.text(canvas.width - 18, base - 70, told, "tick", anchor="end")


def heat(labels: Sequence[str], counts: Sequence[Sequence[float]], words: Words, *, label: str) -> str:
    """A confusion matrix of many classes as shades: rows are the truth, columns the answer.

    Example:
        >>> "<rect" in heat(["a", "b"], [[3, 1], [0, 2]], Words(), label="")
        True
    """
    size = 480.0
    cell = (size - 40) / len(labels)
    canvas = Canvas(size, size, label)
    canvas.text(40, 14, words("confusion.answer") + " →", "tick")
    canvas.text(14, 60, "↓ " + words("confusion.truth"), "tick")
    for i, row in enumerate(counts):
        total = sum(row) or 1
        for j, n in enumerate(row):
            canvas.rect(40 + j * cell, 24 + i * cell, cell - 0.4, cell - 0.4, "cell", opacity=0.05 + 0.95 * n / total)
            if n:
                told = [words("confusion.told", truth=labels[i], answer=labels[j], n=words.count(n))]
                canvas.tip((40 + j * cell, 24 + i * cell, cell, cell), told, at=(40 + j * cell, 24 + i * cell))
    return canvas.markup()


def share(value: Any, style: str = "n") -> str:
    """A small bar for a table's cell: a share from 0 to 1.

    Example:
        >>> "<svg" in share(0.25)
        True
    """
    width = 100 * min(max(float(value), 0.0), 1.0) if known(value) else 0.0
    shape = f'<rect width="100" height="6" class="trough"/><rect width="{width:.1f}" height="6" class="fill {style}"/>'
    return f'<svg class="share" viewBox="0 0 100 6" preserveAspectRatio="none" aria-hidden="true">{shape}</svg>'
