"""Sections on quality: scores, learning curves, confusion, recall, disagreements, secondary statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mrl.report import arms, folds
from mrl.report.collect import ARMS
from mrl.report.figures import Curve, Guides, Span, curves, heat, intervals
from mrl.report.parts import Cell, Part, Section, View, figure, folded, name, note, side_by_side, table, text
from mrl.report.thumbs import disagreements_of, thumbnails
from mrl.report.words import known

METRICS = ("accuracy", "balanced_accuracy", "macro_f1", "auroc", "ece")
PICTURES = 24
SMALL_MATRIX, LARGE_MATRIX, RECALL_ROWS = 10, 60, 24


def scores(view: View) -> Section:
    """All metrics of both arms, and what a linear probe reaches."""
    words = view.words
    head = [words("scores.metric"), *(words.arm(arm) for arm in ARMS)]
    names = [*METRICS, *(m for m in view.arm("mrl")["metrics"] if m not in METRICS)]
    rows: list[list[str | Cell]] = []
    for metric in names:
        if not any(metric in view.arm(arm)["metrics"] for arm in ARMS):
            continue
        first = Cell(words.metric(metric), sub=words("scores.primary") if metric == view.data["metric"] else "")
        rows.append([first, *(_score(view, arm, metric) for arm in ARMS)])
    primary = view.data["metric"]
    probes = {arm: view.arm(arm)["linear_probe"] for arm in ARMS}
    rows.append([words("scores.probe", metric=view.metric), *(words.score(primary, probes[arm]) for arm in ARMS)])
    for key, field in (("probe_val", "linear_probe_val"), ("best_val", "best_val_score")):
        rows.append([words(f"scores.{key}"), *(words.score(primary, view.arm(arm)[field]) for arm in ARMS)])
    reached = {arm: view.arm(arm)["estimate"] for arm in ARMS}
    below = [arm for arm in ARMS if known(probes[arm]) and known(reached[arm]) and reached[arm] < probes[arm]]
    kept = [arm for arm in ARMS if view.arm(arm)["below_linear_probe"]]
    said = [
        words(key, arm=words("unit.comma").join(map(words.arm, arms)))
        for key, arms in (("scores.say_below", below), ("scores.say_kept", kept))
        if arms
    ]
    if not said:
        said = [words("scores.say_over" if all(known(p) for p in probes.values()) else "scores.say_unknown")]
    say, parts = said[0], [*(note(line) for line in said[1:]), *arms.parts(view)]
    parts += [
        table(_scores_caption(view), head, rows, width="medium"),
        text(words("scores.probe_note")),
    ]
    if "evaluation.json" in view.data["missing"] and not any(known(p) for p in probes.values()):
        parts.append(view.absent("evaluation.json"))
    return Section("scores", say, parts)


def _scores_caption(view: View) -> str:
    key = "folds.scores_caption" if folds.told(view) else "scores.caption"
    return view.words(key, level=view.level, **folds.told(view))


def _score(view: View, arm: str, metric: str) -> Cell:
    words = view.words
    interval = view.arm(arm)["intervals"].get(metric) or {}
    if metric == view.data["metric"] and not interval:
        interval = view.arm(arm)
    kind = "3" if metric == "auroc" else "percent"
    sub = words.interval(interval.get("low"), interval.get("high"), kind) if known(interval.get("low")) else ""
    return Cell(
        words.score(metric, view.arm(arm)["metrics"].get(metric)), sub=sub, strong=metric == view.data["metric"]
    )


def learning(view: View) -> Section:
    """Training loss and inner validation score by update, calibration marked."""
    words, data = view.words, view.data
    absent = [f"arms/{arm}/metrics.jsonl" for arm in ARMS if not view.run.metrics.get(arm)]
    best = {arm: view.arm(arm)["best_update"] for arm in ARMS}
    if all(known(value) for value in best.values()):
        say = words("curves.say", **{arm: words.count(value) for arm, value in best.items()})
    else:
        say = words("curves.say_unknown")
    parts = [view.absent(file) for file in absent]
    calibration = data["calibration"] or {}
    before = None
    if known(calibration.get("updates")):
        before = (words("curves.calibration"), words("curves.calibration_mrl", n=words.count(calibration["updates"])))
    if len(absent) < len(ARMS):
        foot = words("curves.ring" if before else "curves.ring_plain")
        parts.append(Part("legend"))
        parts.append(side_by_side(_loss(view, before), _validation(view, before)))
        parts.append(text(foot))
    return Section("curves", say, parts)


def _events(view: View, arm: str, event: str, value: str) -> list[tuple[float, float]]:
    events = view.run.metrics.get(arm) or []
    return [(row["update"], row[value]) for row in events if row.get("event") == event and known(row.get(value))]


def _loss(view: View, before: tuple[str, str] | None) -> Part:
    words = view.words
    lines = [Curve(words.arm(arm), arm, _events(view, arm, "train", "loss")) for arm in ARMS]
    svg = curves(
        lines,
        label=words("curves.label_loss"),
        x_label=words("curves.update"),
        text=lambda v: f"{round(v, 3):g}",
        missing=words("missing"),
        before=before,
    )
    return figure(svg, words("curves.loss"))


def _validation(view: View, before: tuple[str, str] | None) -> Part:
    words, metric = view.words, view.data["metric"]
    lines, levels = [], []
    for arm in ARMS:
        points = _events(view, arm, "validation", "val_score")
        update, score = view.arm(arm)["best_update"], view.arm(arm)["best_val_score"]
        ring = (update, score) if known(update) and known(score) else None
        lines.append(Curve(words.arm(arm), arm, points, ring, dots=True))
        probe = view.arm(arm)["linear_probe_val"]
        if known(probe):
            levels.append((words("curves.probe", arm=words.arm(arm), x=words.score(metric, probe)), arm, probe))
    svg = curves(
        lines,
        label=words("curves.label_val"),
        x_label=words("curves.update"),
        text=(lambda v: f"{round(v, 4):g}") if metric == "auroc" else (lambda v: f"{round(v * 100, 1):g} %"),
        missing=words("missing"),
        levels=levels,
        before=before,
    )
    return figure(svg, words("curves.val", metric=view.metric))


def confusion(view: View) -> Section:
    """Confusion matrices of both arms: numbers where they fit, shades where they do not, and the worst mistakes."""
    words = view.words
    matrices = {arm: _matrix(view, arm) for arm in ARMS}
    mistakes = [
        (n, arm, labels[i], labels[j], sum(row))
        for arm, (labels, counts) in matrices.items()
        for i, row in enumerate(counts)
        for j, n in enumerate(row)
        if i != j and n
    ]
    mistakes.sort(key=lambda item: (-item[0], item[1], item[2], item[3]))
    if not any(labels for labels, _ in matrices.values()):
        return Section("confusion", words("missing"), [])
    if not mistakes:
        say = words("confusion.say_none")
    else:
        n, arm, truth, answer, total = mistakes[0]
        say = words(
            "confusion.say", arm=words.arm(arm), truth=truth, answer=answer, n=words.count(n), total=words.count(total)
        )
    classes = max(len(labels) for labels, _ in matrices.values())
    parts = [
        side_by_side(*(_confusion(view, arm, *matrices[arm]) for arm in ARMS if matrices[arm][0])),
        text(words("confusion.how")),
        *folds.one_repeat(view),
    ]
    if classes > LARGE_MATRIX:
        parts = []
    if classes > 4 and mistakes:
        rows = [
            [words.arm(arm), name(t), name(a), words("unit.of", n=words.count(n), total=words.count(total))]
            for n, arm, t, a, total in mistakes
        ]
        head = ["", words("confusion.truth"), words("confusion.answer"), words("confusion.n")]
        parts.append(table(words("confusion.most"), head, rows[:12], "lllr", width="narrow"))
    return Section("confusion", say, parts)


def _matrix(view: View, arm: str) -> tuple[Sequence[str], Sequence[Sequence[int]]]:
    found = ((view.run.comparison.get("arms") or {}).get(arm) or {}).get("confusion") or {}
    return found.get("labels") or [], found.get("counts") or []


def _confusion(view: View, arm: str, labels: Sequence[str], counts: Sequence[Sequence[int]]) -> Part:
    words = view.words
    right, n = sum(counts[i][i] for i in range(len(labels))), sum(map(sum, counts))
    caption = words("confusion.caption", arm=words.arm(arm), right=words.count(right), n=words.count(n))
    if len(labels) > SMALL_MATRIX:
        return figure(heat(labels, counts, words, label=words("confusion.label", arm=words.arm(arm))), caption)
    rows = []
    for i, row in enumerate(counts):
        total = sum(row)
        cells = [
            {
                "n": words.count(k),
                "share": words.percent(k / total, 0) if total else "",
                "level": k / total if total else 0,
                "right": i == j,
            }
            for j, k in enumerate(row)
        ]
        rows.append({"label": labels[i], "cells": cells})
    return Part("matrix", {"caption": caption, "labels": labels, "rows": rows, "arm": arm})


def recall(view: View) -> Section:
    """Recall of each class with intervals."""
    words = view.words
    by = {
        arm: {
            row["class"]: row for row in ((view.run.comparison.get("arms") or {}).get(arm) or {}).get("per_class") or []
        }
        for arm in ARMS
    }
    classes = list(dict.fromkeys(c for arm in ARMS for c in by[arm]))
    if not classes:
        return Section("recall", words("missing"), [])
    lowest = {
        arm: min((r for r in by[arm].values() if known(r.get("recall"))), key=lambda r: r["recall"], default=None)
        for arm in ARMS
    }
    if all(lowest.values()):
        say = words(
            "recall.say",
            **{arm: words.percent(lowest[arm]["recall"]) for arm in ARMS},
            **{f"{arm}_name": lowest[arm]["class"] for arm in ARMS},
        )
    else:
        say = words("recall.how")
    shown = sorted(classes, key=lambda c: -_gap(by, c))[:RECALL_ROWS] if len(classes) > RECALL_ROWS else classes
    spans = [_recall_span(view, by, arm, c) for c in shown for arm in ARMS]
    level = words("recall.caption", level=view.level)
    svg = intervals(
        spans,
        Guides(group=len(ARMS)),
        label=words("recall.label"),
        text=lambda v: f"{v * 100:.0f} %",
        missing=words("missing"),
        width=560,
        row=17,
    )
    rows = [
        [name(c), words.count(_of(by, c, "n")), *(_recall_cell(view, by[arm].get(c) or {}) for arm in ARMS)]
        for c in classes
    ]
    data = table("", [words("audit.class"), words("audit.images"), *(words.arm(arm) for arm in ARMS)], rows)
    foot = words("recall.shown", n=len(shown)) if len(shown) < len(classes) else ""
    parts = [
        Part("legend"),
        figure(svg, level, more=data, foot=foot),
        text(words("recall.how")),
        *folds.one_repeat(view),
    ]
    return Section("recall", say, parts)


def _of(by: Mapping[str, Mapping[str, Any]], label: str, key: str) -> Any:
    return next((by[arm][label].get(key) for arm in ARMS if label in by[arm]), None)


def _gap(by: Mapping[str, Mapping[str, Any]], label: str) -> float:
    values = [(by[arm].get(label) or {}).get("recall") for arm in ARMS]
    return abs(values[0] - values[1]) if all(known(v) for v in values) else 0.0


def _recall_span(view: View, by: Mapping[str, Mapping[str, Any]], arm: str, label: str) -> Span:
    row = by[arm].get(label) or {}
    shown = f"{label} (n = {view.words.count(_of(by, label, 'n'))})" if arm == "baseline" else ""
    return Span(shown, row.get("recall"), row.get("low"), row.get("high"), arm)


def _recall_cell(view: View, row: Mapping[str, Any]) -> Cell:
    words = view.words
    sub = words.interval(row.get("low"), row.get("high"), "percent") if known(row.get("low")) else ""
    return Cell(words.percent(row.get("recall")), sub=sub)


def disagree(view: View) -> Section:
    """The images to which the arms give different answers, as pictures."""
    words = view.words
    if "predictions.csv" in view.data["missing"]:
        return Section("disagree", words("missing"), [view.absent("predictions.csv")])
    found = disagreements_of(view.run)
    if not found:
        return Section("disagree", words("disagree.say_none"), [])
    kinds = [item.kind for item in found]
    say = words(
        "disagree.say",
        n=words.count(len(found)),
        total=words.count(view.arm("mrl")["n"]),
        **{kind: words.count(kinds.count(kind)) for kind in ("mrl", "baseline", "neither")},
    )
    shown = found[:PICTURES]
    pictures = thumbnails(view.run, [item.image for item in shown])
    items = []
    for item in shown:
        picture = pictures[item.image]
        reason = picture["reason"]
        items.append(
            {
                "uri": picture["uri"],
                "reason": ""
                if not reason
                else words.get(f"disagree.{reason}", words("disagree.no_picture", reason=reason)),
                "image": item.image,
                "target": item.target,
                "kind": item.kind,
                "said": words(f"disagree.{item.kind}"),
                "alt": words("disagree.alt", image=item.image, truth=item.target),
                "answers": [
                    (arm, words.arm(arm), label, words.percent(p, 0)) for arm, (label, p) in item.answers.items()
                ],
            }
        )
    parts = [
        text(words("disagree.shown", n=words.count(len(shown)))),
        *folds.one_repeat(view),
        Part("thumbs", {"items": items}),
    ]
    if view.run.audit.get("terms"):
        parts.append(text(words("disagree.terms", terms=view.run.audit["terms"])))
    return Section("disagree", say, parts)


def statistics(view: View) -> Section:
    """Tests beside the primary one."""
    words, found = view.words, view.run.comparison.get("secondary") or {}
    mcnemar, flips = found.get("mcnemar") or {}, view.run.comparison.get("flips") or {}
    if known(mcnemar.get("p_value")):
        say = words(
            "statistics.say",
            b=words.count(mcnemar["b"]),
            c=words.count(mcnemar["c"]),
            p=words.p_value(mcnemar["p_value"]),
        )
    else:
        say = words("statistics.say_unknown")
    result = words(
        "statistics.mcnemar_result",
        b=words.count(mcnemar.get("b")),
        c=words.count(mcnemar.get("c")),
        p=words.p_value(mcnemar.get("p_value")),
    )
    rows: list[list[str | Cell]] = [[words("statistics.mcnemar"), result, "", words("statistics.mcnemar_read")]]
    rows.append(
        _difference(view, words("statistics.newcombe"), found.get("newcombe"), words("statistics.newcombe_read"))
    )
    for metric in METRICS:
        if metric in found:
            read = (
                words("statistics.ece_read")
                if metric == "ece"
                else words("statistics.metric_read", metric=words.metric(metric))
            )
            rows.append(
                _difference(view, words.metric(metric), found[metric], read, "3" if metric == "auroc" else "points")
            )
    rows.append(_delong(view, found.get("delong")))
    lists = {key: flips.get(name_) or [] for key, name_ in (("worse", "right_to_wrong"), ("better", "wrong_to_right"))}
    counted = words("statistics.flips_result", **{key: words.count(len(items)) for key, items in lists.items()})
    rows.append([words("statistics.flips"), counted, "", words("statistics.flips_read")])
    head = [words(f"statistics.{key}") for key in ("test", "result", "interval", "read")]
    parts = folds.primary(view) if folds.told(view) else []
    parts.append(text(words("folds.note" if folds.told(view) else "statistics.note")))
    parts.append(table(words("statistics.caption"), head, rows, "llrl"))
    for key, items in lists.items():
        if items:
            parts.append(
                folded(words(f"statistics.{key}", n=words.count(len(items))), Part("names", {"items": items[:500]}))
            )
    holm = found.get("holm") or []
    if holm:
        cells = [
            [name(row["class"]), words.p_value(row.get("p_value")), words.p_value(row.get("adjusted"))] for row in holm
        ]
        head = [words("audit.class"), words("statistics.p"), words("statistics.adjusted")]
        parts.append(table(words("statistics.holm"), head, cells, width="narrow"))
    return Section("statistics", say, parts)


def _difference(
    view: View, title: str, found: Mapping[str, Any] | None, read: str, kind: str = "points"
) -> list[str | Cell]:
    words, found = view.words, found or {}
    estimate = found.get("estimate", found.get("difference"))
    method = words.get(f"method.{found.get('method')}", str(found.get("method") or ""))
    value = words.number(estimate, 3, True) if kind == "3" else words.points(estimate)
    return [Cell(title, sub=method), value, words.interval(found.get("low"), found.get("high"), kind), read]


def _delong(view: View, found: Mapping[str, Any] | None) -> list[str | Cell]:
    words = view.words
    if not found:
        return [words("statistics.delong"), words("statistics.delong_none"), "", words("statistics.delong_read")]
    estimate = found.get("difference", found.get("estimate"))
    result = words("statistics.delong_result", x=words.number(estimate, 3, True), p=words.p_value(found.get("p_value")))
    return [
        words("statistics.delong"),
        result,
        words.interval(found.get("low"), found.get("high"), "3"),
        words("statistics.delong_read"),
    ]
