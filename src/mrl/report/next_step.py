"""The next step of a decision, with what this very run measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mrl.report.parts import View
from mrl.report.words import known


def steps(view: View) -> list[tuple[str, str]]:
    """The next steps of this decision: a few words in bold, and a sentence each."""
    return {"go": _go, "no-go": _no_go, "inconclusive": _open}[view.data["decision"]](view)


def _exported(view: View, key: str, arm: str) -> str:
    words, export = view.words, view.run.export or {}
    if export.get("arm") != arm:
        return words(f"next.{key}_no_file", home=view.home)
    n = words.count((export.get("parity") or {}).get("n_images"))
    return words(f"next.{key}_text", file=export.get("file", "model.onnx"), arm=words.arm(arm), n=n)


def _go(view: View) -> list[tuple[str, str]]:
    words = view.words
    share, low = words.percent(view.data["disagreement"]), words.score(view.data["metric"], view.arm("mrl")["low"])
    return [
        (words("next.go_shadow"), _exported(view, "go_shadow", "mrl")),
        (words("next.go_pilot"), words("next.go_pilot_text", share=share, section=view.number("disagree"))),
        (words("next.go_rollback"), words("next.go_rollback_text", low=low, home=view.home)),
    ]


def _no_go(view: View) -> list[tuple[str, str]]:
    words = view.words
    said = [
        (words("next.nogo_keep"), _exported(view, "nogo_keep", "baseline")),
        (words("next.nogo_where"), _where(view)),
    ]
    if view.data["verdict"]["quality"] == "inferior":
        said.append((words("next.nogo_quality"), words("next.nogo_quality_text")))
    if view.data["verdict"]["cost"] == "slower":
        setting = str((view.run.plan or {}).get("setting") or view.run.protocol.get("swap") or "")
        if setting == "cheap":
            text = words("next.nogo_speed_cheapest")
        else:
            text = words("next.nogo_speed_text", setting=words.get(f"setting.{setting}", setting))
        said.append((words("next.nogo_speed"), text))
    return said


def _where(view: View) -> str:
    """Where in this report's own measurements MRL is faster than at the deciding size."""
    words, decisive = view.words, view.run.decisive()
    rows = [r for r in view.run.measure.get("rows") or [] if known((r.get("ratio") or {}).get("estimate"))]
    others = [r for r in rows if r.get("image_size") != decisive.get("image_size")]
    if not others:
        return words("next.nogo_where_unknown")
    faster = [r for r in others if known(r["ratio"].get("high")) and r["ratio"]["high"] < 1]
    if faster:
        row = min(faster, key=lambda r: (pixels(r["image_size"]), r.get("backend") != decisive.get("backend")))
        found = row["ratio"]
        return words(
            "next.nogo_where_faster",
            ratio=words.percent(found["estimate"], 0),
            interval=words.between(words.number(found["low"] * 100, 0), words.percent(found["high"], 0)),
            best=_best(view, faster, row),
            **view.how(row),
        )
    best = min(others, key=lambda r: r["ratio"]["estimate"])
    sizes = sorted({pixels(r["image_size"]): view.size(r["image_size"]) for r in rows}.items())
    return words(
        "next.nogo_where_nowhere",
        sizes=words.listed([text for _, text in sizes]),
        ratio=words.ratio(best["ratio"]["estimate"]),
        size=view.size(best["image_size"]),
    )


def _best(view: View, rows: Sequence[Mapping[str, Any]], row: Mapping[str, Any]) -> str:
    """The most that was measured, where it is more than at the smallest size that is faster."""
    words, best = view.words, min(rows, key=lambda r: r["ratio"]["estimate"])
    if best["image_size"] == row["image_size"]:
        return ""
    ratio = words.percent(best["ratio"]["estimate"], 0)
    return words("next.nogo_where_best", size=view.size(best["image_size"]), ratio=ratio)


def pixels(size: Any) -> int:
    """The area of an image size, one number or (height, width).

    Example:
        >>> pixels(112) < pixels([112, 224])
        True
    """
    if size is None:
        return 0
    return int(size[0] * size[1]) if isinstance(size, Sequence) else int(size) ** 2


def widest(view: View) -> Mapping[str, Any] | None:
    """The class of the MRL arm whose recall is known least well."""
    rows = ((view.run.comparison.get("arms") or {}).get("mrl") or {}).get("per_class") or []
    rows = [row for row in rows if known(row.get("low")) and known(row.get("high"))]
    return max(rows, key=lambda row: row["high"] - row["low"], default=None)


def _open(view: View) -> list[tuple[str, str]]:
    words, verdict, said = view.words, view.data["verdict"], []
    if verdict["quality"] == "inconclusive":
        row, more = (
            widest(view),
            next((k["params"]["more"] for k in view.data["reason_keys"] if k["key"] == "more_images"), None),
        )
        title = words("next.open_images", n=more) if more else words("next.open_images_unknown")
        text = ""
        if row:
            interval = words.interval(row["low"], row["high"], "percent")
            text = words("next.open_images_text", name=row["class"], interval=interval)
        said.append((title, text))
    if verdict["quality"] == "superior" and verdict["cost"] == "slower":
        said.append((words("next.open_slowdown"), words("next.open_slowdown_text")))
    elif verdict["cost"] not in ("faster", "slower"):
        said.append((words("next.open_time"), words("next.open_time_text")))
    return [*said, (words("next.open_keep"), words("next.open_keep_text"))]
