"""What `mrl tune` found, for the section on the swap: the front of quality and latency, importance, the best few again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mrl.report.collect import ARMS
from mrl.report.parts import Cell, Part, View, figure, side_by_side, table, text
from mrl.report.svg import Axis, Canvas
from mrl.report.words import known

Point = tuple[str, float, float, bool, str]  # arm, latency ratio, score, on the front, what the pointer is told


def tuning_parts(view: View) -> list[Part]:
    """The parts on the search, or none where there was no search."""
    words, found = view.words, view.run.tune
    if not found:
        return []
    counts = {arm: found["arms"][arm]["outcomes"].get("trained", 0) for arm in ARMS}
    said = words("tune.say", baseline=words.count(counts["baseline"]), mrl=words.count(counts["mrl"]))
    parts = [text(said), side_by_side(_front(view, found), _importance(view, found)), _judged(view, found)]
    gap = found.get("difference")
    if gap:
        told = {"points": words.points(gap["estimate"]), "n": gap["n"]}
        if known(gap["low"]) and known(gap["high"]):
            ends = {k: words.points(gap[k]) for k in ("low", "high")}
            parts.append(text(words("tune.difference", **told, **ends)))
        else:
            parts.append(text(words("tune.difference_alone", **told)))
    return parts


def _front(view: View, found: Mapping[str, Any]) -> Part:
    words = view.words
    points: list[Point] = []
    for arm in ARMS:
        kept = set(found["arms"][arm]["front"]) if arm == "mrl" else set()
        for row in found["arms"][arm]["trials"]:
            latency = (row.get("latency") or {}).get("ratio")
            if known(row.get("score")) and known(latency):
                told = (
                    f"{words.arm(arm)} {row['trial']}: {words.score(view.metric, row['score'])}, {words.ratio(latency)}"
                )
                points.append((arm, latency, row["score"], row["trial"] in kept, told))
    svg = scatter(
        points,
        label=words("tune.front_label", n=len(points)),
        x_label=words("tune.x"),
        text=lambda v: words.percent(v, 0),
        missing=words("missing"),
    )
    return figure(svg, words("tune.front"), foot=words("tune.front_foot"))


def scatter(points: Sequence[Point], *, label: str, x_label: str, text: Callable[[float], str], missing: str) -> str:
    """Trials by latency and quality; a line joins those of the front.

    Args:
        points: arm, latency ratio, score, whether it is on the front, and what the pointer is told.
        label: the sentence for readers who cannot see the figure.
        x_label: the name of the x axis.
        text: writes a score.
        missing: what stands in an empty figure.

    Example:
        >>> svg = scatter([("mrl", 0.8, 0.9, True, "a"), ("baseline", 1.0, 0.91, False, "b")], label="", x_label="", text=str, missing="")
        >>> svg.count("<circle"), "curve mrl" in svg or "<path" in svg
        (1, True)
    """
    canvas = Canvas(520, 250, label)
    if not points:
        canvas.text(260, 125, missing, "tick", anchor="middle")
        return canvas.markup()
    xs, ys = [p[1] for p in points], [p[2] for p in points]
    room_x, room_y = max(0.08 * (max(xs) - min(xs)), 0.01), max(0.08 * (max(ys) - min(ys)), 0.002)
    x_axis = Axis(min(xs) - room_x, max(xs) + room_x, 52, 506)
    y_axis = Axis(min(ys) - room_y, max(ys) + room_y, 210, 12)
    canvas.y_axis(y_axis, 52, text, right=506)
    canvas.x_axis(x_axis, 210, lambda v: f"{v:.2f}")
    canvas.text(279, 244, x_label, "tick", anchor="middle")
    canvas.path([(x_axis(x), y_axis(y)) for _, x, y, kept, _ in sorted(points, key=lambda p: p[1]) if kept], "curve m")
    for arm, x, y, kept, _ in points:
        style = "m" if arm == "mrl" else "b"
        canvas.mark(x_axis(x), y_axis(y), f"dot {style}", square=arm == "baseline", size=4.5 if kept else 3.2)
    for _, x, y, _, told in points:
        canvas.tip((x_axis(x) - 5, y_axis(y) - 5, 10, 10), [told], at=(x_axis(x), y_axis(y)))
    return canvas.markup()


def _importance(view: View, found: Mapping[str, Any]) -> Part:
    words = view.words
    shares = {arm: found["arms"][arm].get("importance") or {} for arm in ARMS}
    names = sorted({n for each in shares.values() for n in each}, key=lambda n: -shares["mrl"].get(n, 0.0))
    rows = [[Cell(n, name=True), *(words.percent(shares[arm].get(n), 0) for arm in ARMS)] for n in names]
    head = [words("tune.axis"), *(words.arm(arm) for arm in ARMS)]
    return table(words("tune.importance"), head, rows, foot=words("tune.importance_foot"))


def _judged(view: View, found: Mapping[str, Any]) -> Part:
    words = view.words
    rows = []
    for row in found.get("judged") or []:
        chosen = found["chosen"].get(row["arm"]) == row["trial"]
        latency = row["latency"]
        rows.append(
            [
                Cell(words.arm(row["arm"]), strong=chosen, sub=words("tune.chosen") if chosen else ""),
                words.count(row["trial"]),
                words.percent(row["searched_score"]),
                words.percent(row["mean"]),
                words.points(row["sd"], sign=False),
                Cell(
                    words.ratio(latency["ratio"]), sub=f"{words.ratio(latency['low'])} … {words.ratio(latency['high'])}"
                ),
            ]
        )
    keys = ("arm", "trial", "searched", "mean", "sd", "latency")
    return table(words("tune.judged"), [words(f"tune.{key}") for key in keys], rows, foot=words("tune.judged_foot"))
