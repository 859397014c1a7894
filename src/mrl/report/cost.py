"""Sections on cost: time an image, memory and computation, training effort, the swap plan with its calibration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mrl.report.collect import ARMS
from mrl.report.figures import Guides, Span, histograms, intervals
from mrl.report.front import money
from mrl.report.next_step import pixels
from mrl.report.parts import Cell, Part, Section, View, figure, hours, name, note, quotient, side_by_side, table, text
from mrl.report.reasons import translated
from mrl.report.tuning import tuning_parts
from mrl.report.words import MINUS, known


def latency(view: View) -> Section:
    """How long an image takes: every sample of the deciding measurement, and the ratio by image size."""
    words, row = view.words, view.run.decisive()
    rows = view.run.measure.get("rows") or []
    parts: list[Part] = []
    figures = [part for part in (_samples(view, row), _by_size(view, rows)) if part]
    if figures:
        parts += [Part("legend"), side_by_side(*figures)]
    if row:
        parts.append(text(words("latency.how", **view.how(row))))
    parts.append(_all(view, rows))
    for item in view.run.measure.get("image_sizes_not_measured") or []:
        parts.append(
            text(
                words(
                    "latency.not_measured",
                    size=view.size(item.get("image_size")),
                    reason=translated(words, item.get("reason", ""))["text"],
                )
            )
        )
    return Section("latency", _say_latency(view, row), parts)


def _say_latency(view: View, row: Mapping[str, Any]) -> str:
    words, ratio, cost = view.words, view.data["latency_ratio"], view.data["verdict"]["cost"]
    if not known(ratio["estimate"]) or not row:
        return words("latency.say_missing")
    key = {"faster": "latency.say_faster", "slower": "latency.say_slower"}.get(cost, "latency.say_open")
    interval = words.interval(ratio["low"], ratio["high"], "percent")
    return words(key, size=view.size(row.get("image_size")), ratio=words.percent(ratio["estimate"]), interval=interval)


def _samples(view: View, row: Mapping[str, Any]) -> Part | None:
    words, arms = view.words, row.get("arms") or {}
    samples = {arm: (arms.get(arm) or {}).get("samples_ms") or [] for arm in ARMS}
    if not any(samples.values()):
        return None
    marks = {
        arm: {
            "median": (arms.get(arm) or {}).get("latency_ms_median"),
            "p95": (arms.get(arm) or {}).get("latency_ms_p95"),
        }
        for arm in ARMS
    }
    svg = histograms(samples, marks, words, label=words("latency.samples_label"))
    caption = words("latency.samples", **view.how(row))
    return figure(svg, caption, foot=words("latency.hist_foot"))


def _by_size(view: View, rows: Any) -> Part | None:
    words = view.words
    spans = []
    decisive = view.run.decisive()
    alike = [r for r in rows if all(r.get(key) == decisive.get(key) for key in ("backend", "batch"))]
    others = [r for r in rows if r not in alike]
    for row in [*sorted(alike, key=lambda r: pixels(r.get("image_size"))), *others]:
        ratio, how = row.get("ratio") or {}, view.how(row)
        label = f"{how['size']} px"
        if row.get("backend") != decisive.get("backend"):
            label += f", {how['backend']}"
        if row.get("batch") != decisive.get("batch"):
            label += ", " + words("latency.batch", n=how["batch"])
        spans.append(Span(label, ratio.get("estimate"), ratio.get("low"), ratio.get("high"), "mrl"))
    if not spans:
        return None
    svg = intervals(
        spans,
        Guides(reference=1.0, sides=(words("front.faster"), words("front.slower")), log=True),
        label=words("latency.ratio_label"),
        text=lambda v: f"{v:g}".replace("-", MINUS),
        missing=words("missing"),
        row=max(22.0, min(30.0, 180 / len(spans))),
    )
    return figure(svg, words("latency.ratio"))


def _all(view: View, rows: Any) -> Part:
    words = view.words
    cells: list[list[str | Cell]] = []
    for row in rows:
        arms, ratio = row.get("arms") or {}, row.get("ratio") or {}
        sub = words("latency.decides") if row.get("decides") else translated(words, str(row.get("note") or ""))["text"]
        line: list[str | Cell] = [
            view.size(row.get("image_size")),
            Cell(words("latency.where_value", **view.how(row)), sub=sub),
        ]
        for key, text_ in (("latency_ms_median", words.ms), ("latency_ms_p95", words.ms), ("latency_ms_p99", words.ms)):
            line.append(_both(arms, key, text_))
        line.append(_both(arms, "throughput_img_s", lambda v: words.number(v, 1)))
        interval = (
            words.interval(ratio.get("low"), ratio.get("high"), "ratio", (1.0,)) if known(ratio.get("low")) else ""
        )
        line.append(Cell(words.ratio(ratio.get("estimate")), sub=interval, strong=bool(row.get("decides"))))
        verdict = row.get("verdict")
        line.append(words.get(f"cost.{verdict}", words("missing")))
        cells.append(line)
    head = [words("latency.size"), words("latency.where")]
    head += [words(f"latency.{key}") for key in ("median", "p95", "p99", "throughput", "ratio_head", "verdict")]
    return table(words("latency.table"), head, cells, "rlrrrrrl", foot=words("latency.lines"))


def _both(arms: Mapping[str, Any], key: str, text_: Callable[[Any], str]) -> Cell:
    values = [text_((arms.get(arm) or {}).get(key)) for arm in ARMS]
    return Cell(values[0], sub=values[1])


def size(view: View) -> Section:
    """Parameters, multiply-adds, memory, file, hours and money of a million images."""
    words = view.words
    arms = [view.arm(arm) for arm in ARMS]
    rows: list[list[str | Cell]] = []
    for key in ("params_m", "gmacs", "peak_memory_mb", "file_mb"):
        values = [arm[key] for arm in arms]
        rows.append(
            [
                words(f"size.{key}"),
                *(words.unit(v, "") for v in values),
                words.ratio(quotient(values[1], values[0])),
            ]
        )
    million = [arm["million_images_hours"] for arm in arms]
    ratio = words.ratio(quotient((million[1] or {}).get("estimate"), (million[0] or {}).get("estimate")))
    rows.append([words("size.hours"), *(hours(words, found) for found in million), ratio])
    if view.price_per_hour is not None:
        rows.append([words("size.money"), *(money(view, found) for found in million), ratio])
    whole = (view.run.measure.get("end_to_end") or {}).get("arms") or {}
    if whole:
        found = [(whole.get(arm) or {}).get("million_images_hours") for arm in ARMS]
        ratio = words.ratio(quotient((found[1] or {}).get("estimate"), (found[0] or {}).get("estimate")))
        rows.append([words("size.end_to_end"), *(hours(words, item) for item in found), ratio])
    params = quotient(arms[1]["params_m"], arms[0]["params_m"])
    gmacs = quotient(arms[1]["gmacs"], arms[0]["gmacs"])
    if known(params) and known(gmacs):
        say = words("size.say", params=words.percent(params, 0), gmacs=words.percent(gmacs, 0))
    else:
        say = words("size.say_unknown")
    head = [words("size.what"), *(words.arm(arm) for arm in ARMS), words("size.ratio")]
    return Section("size", say, [table(words("size.caption"), head, rows, width="medium")])


def training(view: View) -> Section:
    """Time and updates of both fits, with MRL's calibration beside them."""
    words, arms = view.words, [view.arm(arm) for arm in ARMS]
    calibration = view.data["calibration"] or {}
    seconds = calibration.get("seconds")
    together = [
        arms[0]["fit_seconds"],
        arms[1]["fit_seconds"] + seconds if known(arms[1]["fit_seconds"]) and known(seconds) else None,
    ]
    nothing = words("training.nothing")
    rows: list[list[str | Cell]] = [
        [words("training.seconds"), *(words.duration(arm["fit_seconds"]) for arm in arms)],
        [words("training.calibration_seconds"), nothing, words.duration(seconds)],
        [words("training.together"), *(words.duration(value) for value in together)],
        [words("training.updates"), *(words.count(arm["updates"]) for arm in arms)],
        [words("training.calibration_updates"), nothing, words.count(calibration.get("updates"))],
        [words("training.best_update"), *(words.count(arm["best_update"]) for arm in arms)],
        [words("training.updates_to_95"), *(_reached(view, arm["updates_to_95"]) for arm in arms)],
        [words("training.epochs"), *(words.number(arm["epochs"], 0) for arm in arms)],
        [words("training.images_seen"), *(words.count(arm["images_seen"]) for arm in arms)],
        [words("training.trainable_params_m"), *(words.number(arm["trainable_params_m"], 2) for arm in arms)],
        [words("training.stopped_early"), *(_yes(view, arm["stopped_early"]) for arm in arms)],
        [words("training.precision"), *(str(arm["precision"] or words("missing")) for arm in arms)],
        [words("training.device"), *(str(arm["device"] or words("missing")) for arm in arms)],
    ]
    if any(known(arm["n_fits"]) for arm in arms):
        rows.insert(0, [words("folds.fits"), *(words.count(arm["n_fits"]) for arm in arms)])
    if known(calibration.get("updates")):
        say = words("training.say", updates=words.count(calibration["updates"]), time=words.duration(seconds))
    else:
        say = words("training.say_unknown")
    head = [words("training.what"), *(words.arm(arm) for arm in ARMS)]
    parts = [view.absent(f"arms/{arm}/fit.json") for arm in ARMS if f"arms/{arm}/fit.json" in view.data["missing"]]
    if "calibration.json" in view.data["missing"]:
        parts.append(view.absent("calibration.json"))
    return Section("training", say, [*parts, table(words("training.caption"), head, rows, width="medium")])


def _reached(view: View, update: Any) -> str:
    return view.words("training.at_start") if update == 0 else view.words.count(update)


def _yes(view: View, value: Any) -> str:
    return view.words("missing") if value is None else view.words("yes" if value else "no")


def plan(view: View) -> Section:
    """Which blocks were swapped, at what predicted cost, and what calibration did."""
    words, found = view.words, view.run.plan
    if view.featured != "mrl" and view.run.protocol["arm_settings"][view.featured]["swap"] == "none":
        return Section("plan", words("arms.not_swapped", arm=view.featured), [])
    if not found:
        return Section("plan", words("missing"), [view.absent("plan.json")])
    rows = found.get("rows") or []
    swapped = [row for row in rows if row.get("action") == "swap"]
    setting = str(found.get("setting") or view.run.protocol.get("swap") or "")
    say = words(
        "plan.say",
        n=len(swapped),
        total=len(rows),
        setting=words.get(f"setting.{setting}", setting),
        ratio=words.percent(found.get("predicted_latency_ratio"), 0),
    )
    cells = [_plan_row(view, row) for row in rows]
    keys = ("name", "class", "region", "tokens", "gmacs", "params", "ratio", "action")
    table_ = table(words("plan.caption"), [words(f"plan.{key}") for key in keys], cells, "llrrrrrl")
    return Section("plan", say, [table_, *_calibration(view), *tuning_parts(view)])


def _plan_row(view: View, row: Mapping[str, Any]) -> list[str | Cell]:
    words, region = view.words, row.get("region")
    sides = region if isinstance(region, list) else [region]

    def change(key: str) -> str:
        before, after = row.get(f"{key}_before"), row.get(f"{key}_after")
        if not known(before) and not known(after):
            return words("missing")
        return f"{words.unit(before, '')} → {words.unit(after, '')}"

    action = Cell(
        words.get(f"plan.{row.get('action')}", str(row.get("action"))),
        sub=translated(words, str(row.get("reason") or ""))["text"],
    )
    return [
        name(row.get("name", "")),
        name(row.get("class", "")),
        " × ".join(words.count(side) for side in sides),
        change("tokens"),
        change("gmacs"),
        change("params_m"),
        words.ratio(row.get("predicted_latency_ratio")),
        action,
    ]


def _accepted(view: View, stage: Mapping[str, Any]) -> str:
    names = stage.get("accepted")
    if isinstance(names, list):
        return view.words("unit.of", n=len(names), total=len(stage.get("error_after") or names))
    return _yes(view, names)


def _calibration(view: View) -> list[Part]:
    words, found = view.words, view.run.calibration
    if not found:
        return [view.absent("calibration.json")]
    rows = []
    for stage in found.get("stages") or []:
        key = str(stage.get("stage"))
        rows.append(
            [
                words.get(f"plan.stage_{key}", key),
                words.count(stage.get("updates")),
                words.duration(stage.get("seconds")),
                words.unit(stage.get("mean_error_before"), ""),
                words.unit(stage.get("mean_error_after"), ""),
                _accepted(view, stage),
            ]
        )
        if known(stage.get("stream_after")):
            ends = [words.unit(stage[key], "") for key in ("stream_before", "stream_after")]
            rows.append(
                [words("plan.stage_stream"), "", "", *ends, _yes(view, stage["stream_after"] < stage["stream_before"])]
            )
    head = [words(f"plan.{key}") for key in ("stage", "updates", "time", "before", "after", "accepted")]
    foot = words("plan.images", n=words.count(found.get("n_images")))
    parts = [table(words("plan.calibration"), head, rows, foot=foot), text(words("plan.error_note"))]
    if known(found.get("n_calibrations")):
        most = (found.get("config") or {}).get("max_images")
        told = {"n": words.count(found["n_calibrations"]), "images": words.count(most)}
        parts.insert(1, text(words("folds.calibration", **told)))
    if found.get("restored"):
        parts.append(note(words("plan.restored", names=words.listed(list(found["restored"]), 20))))
    return parts
