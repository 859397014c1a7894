"""Page one: the decision, three numbers behind it, what the data can show, what it costs, the next step."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from mrl.report import arms, folds
from mrl.report.figures import Guides, Span, intervals
from mrl.report.next_step import steps
from mrl.report.parts import Cell, View, hours, machine, table
from mrl.report.reasons import reasons, warnings
from mrl.report.svg import shorten
from mrl.report.words import MINUS, known

WARNINGS = 3
SYMBOL = {"go": "✓", "no-go": "✕", "inconclusive": "?"}
TONE = {
    "superior": "good",
    "equivalent": "good",
    "non-inferior": "good",
    "inferior": "bad",
    "faster": "good",
    "slower": "bad",
}


def front(view: View) -> dict[str, Any]:
    """Everything that page one shows, in words."""
    words, data = view.words, view.data
    protocol = view.run.protocol
    model = str(protocol.get("model", ""))
    return {
        "decision": data["decision"],
        "word": words(f"decision.{data['decision']}"),
        "under": words(f"decision.{data['decision']}_under"),
        "symbol": SYMBOL[data["decision"]],
        "action": words(f"decision.{data['decision']}_action"),
        "because": words(f"decision.{data['decision']}_because"),
        "setup": words(
            "front.setup",
            model=model,
            data=PurePath(str((protocol.get("data") or {}).get("source", ""))).name,
            size=view.size(protocol.get("image_size")),
            preset=protocol.get("preset", ""),
        ),
        "reasons": [*arms.reason(view), *reasons(view)],
        "rows": [_scores(view), _difference(view), _latency(view)],
        "can": _can(view),
        "mde": _mde(view),
        "observed": _observed(view),
        "cannot": _cannot(view),
        "alerts": _alerts(view),
        "warnings": warnings(view, without="skipped")[:WARNINGS],
        "more_warnings": _more_warnings(view),
        "cost": _cost(view),
        "steps": steps(view),
        "footer": words(
            "front.footer",
            hash=str(data["protocol_sha256"] or "?")[:12],
            level=view.level,
            mrl=f"mrl {data['environment'].get('mrl', '')}".strip(),
            date=datetime.date.today().isoformat(),
        ),
    }


def _plain_number(value: float) -> str:
    return f"{round(value, 9):g}".replace("-", MINUS)


def _plain_percent(value: float) -> str:
    return f"{round(value * 100, 6):g}".replace("-", MINUS) + " %"


def _scores(view: View) -> dict[str, Any]:
    words, metric = view.words, view.data["metric"]
    spans, values = [], []
    kind = "3" if metric == "auroc" else "percent"
    for arm, scored in (view.data.get("all_arms") or view.data["arms"]).items():
        label, colour = shorten(view.name(arm), arms.LABEL), view.colour(arm)
        spans.append(Span(label, scored["estimate"], scored["low"], scored["high"], colour))
        interval = words.interval(scored["low"], scored["high"], kind)
        values.append(
            {"arm": colour, "label": label, "value": words.score(metric, scored["estimate"]), "sub": interval}
        )
    label = "; ".join(f"{v['label']} {v['value']} ({v['sub']})" for v in values)
    return {
        "key": "score",
        "title": words("front.score"),
        "note": words(
            "front.score_note_folds" if folds.told(view) else "front.score_note",
            metric=view.metric,
            n=words.count(view.arm("mrl")["n"]),
            **folds.told(view),
        ),
        "values": values,
        "svg": intervals(
            spans,
            Guides(),
            label=label,
            text=_plain_number if metric == "auroc" else _plain_percent,
            missing=words("missing"),
            row=26 if len(spans) <= 3 else 20,
        ),
    }


def _difference(view: View) -> dict[str, Any]:
    words, data = view.words, view.data
    found, verdict, margin = data["difference"], data["verdict"]["quality"], data["margin"]
    interval = words.interval(found["low"], found["high"], "points", (0.0, -margin, margin))
    value = words.points(found["estimate"])
    level = words("front.level", level=view.level_of(view.run.comparison.get("interval_alpha") or data["alpha"]))
    shown = arms.spans(view, "difference")
    return {
        "key": "difference",
        "title": words("front.difference"),
        "note": words(
            "front.difference_note_folds" if folds.told(view) else "front.difference_note",
            metric=view.metric,
            margin=view.margin,
            method=words.get(f"method.{found.get('method')}", str(found.get("method") or "")),
            **folds.told(view),
        ),
        "values": [{"arm": "", "label": "", "value": value, "sub": f"{level} {interval}"}],
        "verdict": words(f"quality.{verdict}"),
        "means": words(f"quality.{verdict}_means", margin=view.margin),
        "tone": TONE.get(verdict, "open"),
        "svg": intervals(
            shown or [Span("", found["estimate"], found["low"], found["high"], "mrl")],
            Guides(
                reference=0.0,
                band=(-margin, margin),
                band_label=words("front.margin", margin=view.margin),
                sides=(words("front.worse"), words("front.better")),
            ),
            label=f"{value}, {level} {interval}; {words('front.margin', margin=view.margin)}",
            text=lambda v: ("+" if v > 0 else "") + _plain_number(v * 100),
            missing=words("missing"),
            row=20 if shown else 34,
        ),
    }


def _latency(view: View) -> dict[str, Any]:
    words, data = view.words, view.data
    found, verdict, row = data["latency_ratio"], data["verdict"]["cost"], view.run.decisive()
    verdict = verdict if words.has(f"cost.{verdict}_means") else "missing"
    interval = words.interval(found["low"], found["high"], "ratio", (1.0,))
    value = words.ratio(found["estimate"])
    level = words("front.level", level=view.level_of(view.run.measure.get("alpha") or data["alpha"]))
    shown = arms.spans(view, "latency_ratio")
    return {
        "key": "latency",
        "title": words("front.latency"),
        "note": words("front.latency_note", **view.how(row)),
        "values": [{"arm": "", "label": "", "value": value, "sub": f"{level} {interval}"}],
        "verdict": words(f"cost.{verdict}"),
        "means": words(f"cost.{verdict}_means"),
        "tone": TONE.get(verdict, "open"),
        "svg": intervals(
            shown or [Span("", found["estimate"], found["low"], found["high"], "mrl")],
            Guides(reference=1.0, sides=(words("front.faster"), words("front.slower")), log=True),
            label=f"{value}, {level} {interval}",
            text=_plain_number,
            missing=words("missing"),
            row=20 if shown else 34,
        ),
    }


def rarest(view: View) -> tuple[str, int] | None:
    """The class with the fewest test images."""
    rows = ((view.run.comparison.get("arms") or {}).get("baseline") or {}).get("per_class") or []
    counted = [(row["n"], row["class"]) for row in rows if known(row.get("n"))]
    return (min(counted)[1], min(counted)[0]) if counted else None


def _can(view: View) -> list[str]:
    words, found = view.words, rarest(view)
    n = words.count(view.arm("mrl")["n"])
    numbers = {**folds.told(view), "n": n, "name": found[0], "k": words.count(found[1])} if found else {}
    return [words("front.images_folds" if folds.told(view) else "front.images", **numbers)] if found else []


def _mde(view: View) -> dict[str, Any] | None:
    words, mde = view.words, view.data["mde"] or {}
    by = {float(share): value for share, value in (mde.get("by_disagreement") or {}).items()}
    if not by:
        return None
    cells = [(words.percent(share, 0), _detectable(view, share, value)) for share, value in sorted(by.items())]
    return {"say": words("front.mde", power=words.percent(mde.get("power"), 0)), "cells": cells}


def _detectable(view: View, share: float, value: Any) -> str:
    """A detectable difference in points; none where folds could not even show that all disagreements go one way."""
    if folds.told(view) and known(value) and value > share:
        return view.words("none")
    return view.words.number(value * 100, 1) if known(value) else view.words("missing")


def _observed(view: View) -> list[str]:
    words, data = view.words, view.data
    said, seen = [], data["disagreement"]
    by = {float(k): v for k, v in ((data["mde"] or {}).get("by_disagreement") or {}).items()}
    if known(seen):
        said.append(words("front.observed", share=words.percent(seen)))
        nearest = min((share for share in by if share >= seen), default=max(by, default=None))
        if nearest is not None and known(by[nearest]):
            key = "front.mde_over" if by[nearest] > data["margin"] else "front.mde_under"
            said.append(words(key, margin=view.margin))
    return [*said, *arms.observed(view), *folds.observed(view)]


def _cannot(view: View) -> list[str]:
    words, seeds = view.words, view.run.protocol.get("seeds") or [0]
    runs = words("front.one_run", seed=seeds[0]) if len(seeds) == 1 else words("front.more_runs", n=len(seeds))
    if folds.told(view):
        key = "front.last_run" if view.run.comparison.get("frozen") else "front.fold_runs"
        runs = words(key, **folds.told(view))
    where = words("front.other_machine", machine=machine(view.data["environment"]))
    return [words("front.other_data"), runs, where]


def _alerts(view: View) -> list[str]:
    words, data, said = view.words, view.data, []
    if data["protocol_changed"]:
        said.append(words("front.changed", files=words.listed(data["protocol_changed"])))
    out = {item.get("image") for item in data["bad_files"]} | set(data["skipped"])
    if out:
        said.append(words("front.skipped", n=words.count(len(out)), section=view.number("audit")))
    return said


def _more_warnings(view: View) -> str:
    left = len(warnings(view, without="skipped")) - WARNINGS
    return view.words("front.warnings_more", n=left, section=view.number("audit")) if left > 0 else ""


def money(view: View, found: Mapping[str, Any] | None) -> Cell:
    """The price of a million images: hours times the price of an hour."""
    estimate = (found or {}).get("estimate")
    price = view.price_per_hour
    return Cell(view.words.money(estimate * price if known(estimate) and known(price) else None, view.currency))


def _cost(view: View) -> Any:
    words = view.words
    arms = [view.arm(arm) for arm in ("baseline", "mrl")]
    million = [arm["million_images_hours"] for arm in arms]
    rows: list[list[str | Cell]] = [
        [words("front.cost_latency"), *(words.ms(arm["latency_ms_median"]) for arm in arms)],
        [words("front.cost_p95"), *(words.ms(arm["latency_ms_p95"]) for arm in arms)],
        [words("front.cost_million"), *(hours(words, found) for found in million)],
    ]
    if view.price_per_hour is not None:
        price = words.money(view.price_per_hour, view.currency)
        rows.append([words("front.cost_money", price=price), *(money(view, found) for found in million)])
    rows += [
        [words("front.cost_fit"), *(words.duration(arm["fit_seconds"]) for arm in arms)],
        [words("front.cost_calibration"), words("front.calibration_none"), _calibration(view)],
        [words("front.cost_memory"), *(words.unit(arm["peak_memory_mb"], "MB") for arm in arms)],
    ]
    return table("", ["", words.arm("baseline"), words.arm("mrl")], rows)


def _calibration(view: View) -> Cell:
    words, found = view.words, view.data["calibration"]
    if not found or not known(found.get("updates")):
        return Cell(words("missing"))
    return Cell(
        words.duration(found["seconds"]), sub=words("front.calibration_updates", n=words.count(found["updates"]))
    )
