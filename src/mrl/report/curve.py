"""What `mrl curve` drew: the score of every arm against the number of training images, differences, generalisation gaps."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mrl.report.figures import STYLES, Guides, Span, intervals
from mrl.report.parts import Cell, Part, Section, View, figure, side_by_side, table, text
from mrl.report.svg import Axis, Canvas, shorten, text_width
from mrl.report.words import MINUS, known

LABEL = 96.0  # user units that a name may take beside a line


@dataclass(frozen=True)
class Point:
    """One size of one arm: training images, score, ends of the interval, and what the pointer is told."""

    n: float
    estimate: float | None
    low: float | None
    high: float | None
    told: str


def by_images(view: View) -> Section:
    """Scores, differences to the first arm and generalisation gaps by the number of training images."""
    words, found = view.words, view.run.curve or {}
    first, *others = _arms(found)
    others.sort(key=lambda arm: arm != view.featured)
    say, *more = [_seen(view, found, first, arm) for arm in others] or [words("missing")]
    parts = [
        *map(text, more),
        side_by_side(_scores(view, found), _differences(view, found, first)),
        _gaps(view, found),
        text(words("curve.scope", folds=words.count(found["n_folds"]))),
    ]
    if found.get("left_out"):
        shares = words.listed([_share(view, share) for share in found["left_out"]])
        parts.append(text(words("curve.left_out", shares=shares)))
    return Section("curve", say, parts)


def _arms(found: Mapping[str, Any]) -> list[str]:
    return list(found["sizes"][0]["arms"])


def _seen(view: View, found: Mapping[str, Any], first: str, arm: str) -> str:
    """At which sizes the interval of an arm's difference excludes 0, in one sentence."""
    words = view.words
    told = [(size["share"], size["differences"][arm]) for size in found["sizes"]]
    told = [(share, gap) for share, gap in told if known(gap["low"]) and known(gap["high"])]
    above = [_share(view, share) for share, gap in told if gap["low"] > 0]
    below = [_share(view, share) for share, gap in told if gap["high"] < 0]
    key = "both" if above and below else "above" if above else "below" if below else "none" if told else "unknown"
    names = {"arm": view.name(arm), "first": view.name(first), "m": words.count(len(told))}
    return words(f"curve.{key}", **names, above=words.listed(above), below=words.listed(below))


def _share(view: View, share: float) -> str:
    return view.words.percent(share, 0 if abs(100 * share - round(100 * share)) < 1e-9 else 1)


def _scores(view: View, found: Mapping[str, Any]) -> Part:
    words, metric, arms = view.words, found["metric"], _arms(found)
    kind = "3" if metric == "auroc" else "percent"

    def cell(size: Mapping[str, Any], arm: str) -> Cell:
        score = size["arms"][arm]
        return Cell(words.score(metric, score["estimate"]), sub=_between(view, score, kind))

    lines = [
        (
            view.name(arm),
            view.colour(arm),
            [
                Point(
                    size["n_train"],
                    *(size["arms"][arm][key] for key in ("estimate", "low", "high")),
                    told=f"{view.name(arm)} {cell(size, arm).text} ({cell(size, arm).sub or words('missing')})",
                )
                for size in found["sizes"]
            ],
        )
        for arm in arms
    ]
    svg = by_size(
        lines,
        label=words("curve.label", m=words.count(len(found["sizes"]))),
        x_label=words("curve.images"),
        text=(lambda v: f"{round(v, 4):g}") if metric == "auroc" else (lambda v: f"{round(v * 100, 1):g} %"),
        missing=words("missing"),
    )
    rows = [[_size(view, size), *(cell(size, arm) for arm in arms)] for size in found["sizes"]]
    caption = words("curve.scores", metric=words.metric(metric), level=view.level_of(found["alpha"]))
    return figure(svg, caption, more=table("", [words("curve.images"), *map(view.name, arms)], rows))


def _size(view: View, size: Mapping[str, Any]) -> Cell:
    return Cell(view.words.count(size["n_train"]), sub=_share(view, size["share"]))


def _between(view: View, gap: Mapping[str, Any], kind: str) -> str:
    marks = (0.0,) if kind == "points" else ()
    ends = gap["low"], gap["high"]
    return view.words.interval(*ends, kind, marks) if all(map(known, ends)) else ""


def by_size(
    lines: Sequence[tuple[str, str, Sequence[Point]]],
    *,
    label: str,
    x_label: str,
    text: Callable[[float], str],
    missing: str,
    width: float = 520,
    height: float = 270,
) -> str:
    """Scores over the number of training images, with an interval at every point and each line's name at its end.

    Scores are fractions: what a t interval of few folds has outside 0 to 1 is cut off (the table has it).

    Args:
        lines: name, arm and points of each; points without a score are left out.
        label: the sentence for readers who cannot see the figure.
        x_label: the name of the x axis.
        text: writes a value of the y axis.
        missing: what stands in an empty figure.
        width: of the image.
        height: of the image.

    Example:
        >>> points = [Point(40, 0.8, 0.7, 0.9, "a"), Point(80, 0.85, None, None, "b")]
        >>> svg = by_size([("MRL", "mrl", points)], label="", x_label="", text=str, missing="")
        >>> svg.count("<circle"), svg.count("whisker"), svg.count("curve m")
        (2, 3, 1)
    """
    canvas = Canvas(width, height, label)
    kept = [(shorten(name, LABEL), arm, [p for p in points if known(p.estimate)]) for name, arm, points in lines]
    kept = [line for line in kept if line[2]]
    if not kept:
        canvas.text(width / 2, height / 2, missing, "tick", anchor="middle")
        return canvas.markup()
    ys = [v for _, _, points in kept for p in points for v in (p.estimate, p.low, p.high) if known(v)]
    sizes = sorted({p.n for _, _, points in kept for p in points})
    room = max(0.06 * (max(ys) - min(ys)), 1e-3)
    top, bottom, left = 12.0, height - 40, 52.0
    right = width - 20 - max(text_width(name) for name, _, _ in kept)
    y_axis = Axis(max(min(ys) - room, 0.0), min(max(ys) + room, 1.0), bottom, top)  # no score lies beyond
    x_axis = Axis(0, 1.04 * max(sizes), left, right)
    apart = min([x_axis(b) - x_axis(a) for a, b in itertools.pairwise(sizes)] or [right - left])
    step = min(6.0, 0.8 * apart / len(kept))
    canvas.y_axis(y_axis, left, text, right=right)
    _ticks(canvas, x_axis, bottom, sizes)
    canvas.text((left + right) / 2, height - 6, x_label, "tick", anchor="middle")
    ends = []
    for i, (name, arm, points) in enumerate(kept):
        shift = step * (i - (len(kept) - 1) / 2)
        _line(canvas, y_axis, [(x_axis(p.n) + shift, p) for p in points], arm)
        ends.append((y_axis(points[-1].estimate), name, arm))
    _names(canvas, ends, right + 8, (top, bottom))
    for n in sizes:
        told = [f"{x_label} {n:,.0f}", *(p.told for _, _, points in kept for p in points if p.n == n)]
        half = min(20.0, apart / 2)
        canvas.tip((x_axis(n) - half, top, 2 * half, bottom - top), told, at=(x_axis(n), bottom - 40))
    return canvas.markup()


def _ticks(canvas: Canvas, axis: Axis, y: float, sizes: Sequence[float]) -> None:
    """A tick at every size; a number that would stand on its right neighbour is left out."""
    free = canvas.width
    for n in reversed(sizes):
        x, shown = axis(n), f"{n:,.0f}"
        canvas.line(x, y, x, y + 4, "axis")
        if x + text_width(shown) / 2 < free:
            canvas.text(x, y + 16, shown, "tick", anchor="middle")
            free = x - text_width(shown) / 2 - 4
    canvas.line(axis.start, y, axis.stop, y, "axis")


def _line(canvas: Canvas, y_axis: Axis, points: Sequence[tuple[float, Point]], arm: str) -> None:
    style = STYLES.get(arm, "n")
    canvas.path([(x, y_axis(p.estimate)) for x, p in points], f"curve {style}")
    for x, p in points:
        if known(p.low) and known(p.high):
            canvas.line(x, y_axis(p.low), x, y_axis(p.high), f"whisker {style}")
            for end in (p.low, p.high):
                canvas.line(x - 3, y_axis(end), x + 3, y_axis(end), f"whisker {style}")
        canvas.mark(x, y_axis(p.estimate), f"mark {style}", square=arm == "baseline", size=3.6)


def _names(canvas: Canvas, ends: Sequence[tuple[float, str, str]], x: float, span: tuple[float, float]) -> None:
    """The lines' names at their ends, moved apart where they would stand on each other."""
    placed = sorted(ends)
    ys = [y for y, _, _ in placed]
    for i in range(1, len(ys)):
        ys[i] = max(ys[i], ys[i - 1] + 14)
    ys[-1] = min(ys[-1], span[1])
    for i in range(len(ys) - 2, -1, -1):
        ys[i] = min(ys[i], ys[i + 1] - 14)
    for (own, name, arm), y in zip(placed, ys, strict=True):
        canvas.line(x - 7, own, x + 2, y, "axis")
        canvas.text(x + 4, y + 4, name, STYLES.get(arm, "n"))


def _differences(view: View, found: Mapping[str, Any], first: str) -> Part:
    words, others = view.words, _arms(found)[1:]
    spans, rows = [], []
    for size in found["sizes"]:
        shown, cells = words.count(size["n_train"]), []
        for arm in others:
            gap = size["differences"][arm]
            label = shown if len(others) == 1 else f"{shown} {shorten(view.name(arm), LABEL)}"
            spans.append(Span(label, gap["estimate"], gap["low"], gap["high"], view.colour(arm)))
            cells.append(Cell(words.points(gap["estimate"]), sub=_between(view, gap, "points")))
        rows.append([_size(view, size), *cells])
    level, name = view.level_of(found["alpha"]), view.name(first)
    svg = intervals(
        spans,
        Guides(
            reference=0.0,
            sides=(words("curve.lower"), words("curve.higher")),
            group=len(others) if len(others) > 1 else 0,
        ),
        label=words("curve.difference_label", first=name),
        text=lambda v: ("+" if v > 0 else "") + f"{round(v * 100, 9):g}".replace("-", MINUS),
        missing=words("missing"),
        row=24 if len(others) == 1 else 18,
    )
    data = table("", [words("curve.images"), *map(view.name, others)], rows)
    return figure(svg, words("curve.differences", first=name, level=level), more=data)


def _gaps(view: View, found: Mapping[str, Any]) -> Part:
    words, arms = view.words, _arms(found)

    def cell(gap: Mapping[str, Any]) -> Cell:
        few = known(gap["gap"]) and gap["n_gaps"] < found["n_folds"]
        counts = {"n": words.count(gap["n_gaps"]), "total": words.count(found["n_folds"])}
        return Cell(words.points(gap["gap"]), sub=words("curve.of_folds", **counts) if few else "")

    rows = [
        [_size(view, size), _range(view, size["updates"]), *(cell(size["arms"][arm]) for arm in arms)]
        for size in found["sizes"]
    ]
    head = [words("curve.images"), words("curve.updates"), *map(view.name, arms)]
    return table(words("curve.gaps"), head, rows, foot=words("curve.gap_foot"), width="medium")


def _range(view: View, updates: Sequence[int]) -> str:
    words = view.words
    ends = list(dict.fromkeys(words.count(n) for n in (min(updates), max(updates)))) if updates else []
    return words.between(*ends) if len(ends) == 2 else ends[0] if ends else words("missing")
