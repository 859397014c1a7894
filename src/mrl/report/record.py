"""Sections that record what was used: data audit, split, protocol, environment, glossary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mrl.report import folds
from mrl.report.figures import share
from mrl.report.parts import Cell, Part, Section, View, capped, folded, machine, name, note, side_by_side, table, text
from mrl.report.reasons import said_cell, warnings
from mrl.report.words import known

SIDES = ("train", "val", "test")
GLOSSARY = (
    "arm",
    "mrl",
    "interval",
    "margin",
    "equivalent",
    "mde",
    "accuracy",
    "f1",
    "ece",
    "calibration",
    "probe",
    "latency",
    "gmacs",
    "shadow",
)


def audit(view: View) -> Section:
    """What was found in the data: counts, kinds, bad files, duplicates, conflicts."""
    words, found = view.words, view.run.audit
    bad, exact = found.get("bad") or [], found.get("exact_duplicates") or []
    near, conflicts = found.get("near_duplicates") or [], found.get("conflicts") or []
    say = words(
        "audit.say",
        kept=words.count(found.get("n_kept")),
        files=words.count(found.get("n_files")),
        classes=words.count(len(found.get("classes") or [])),
        bad=words.count(len(bad)),
        exact=words.count(len(exact)),
        conflicts=words.count(len(conflicts)),
    )
    rows: list[list[str | Cell]] = [
        [words("audit.files"), words.count(found.get("n_files"))],
        [words("audit.kept"), words.count(found.get("n_kept"))],
        [words("audit.bad"), words.count(len(bad))],
        [words("audit.exact"), words.count(len(exact))],
        [words("audit.near"), words.count(found.get("n_near_duplicates", len(near)))],
        [words("audit.conflicts"), words.count(len(conflicts))],
        [
            words("audit.groups"),
            words.count(found["n_groups"]) if known(found.get("n_groups")) else words("audit.no_groups"),
        ],
        [words("audit.on_bad"), words.get(f"audit.on_bad_{found.get('on_bad')}", str(found.get("on_bad") or "error"))],
    ]
    facts = table(words("audit.fact"), [words("audit.item"), words("audit.number")], rows)
    parts = [Part("warnings", {"items": warnings(view)})] if view.data["warnings"] else []
    parts += [
        side_by_side(facts, _classes(view)),
        _kinds(view),
        *_bad(view),
        *_same(view),
        text(words("audit.untouched")),
    ]
    if found.get("terms"):
        parts.append(text(words("audit.terms", terms=found["terms"])))
    return Section("audit", say, parts)


def _classes(view: View) -> Part:
    words, counts = view.words, view.run.audit.get("class_counts") or {}
    total, largest = sum(counts.values()) or 1, max(counts.values(), default=1) or 1
    shown, foot = capped(words, sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])), 40, "audit.json")
    rows = [[name(c), words.count(n), Cell(words.percent(n / total), bar=share(n / largest))] for c, n in shown]
    return table(
        words("audit.class_caption"), [words(f"audit.{k}") for k in ("class", "images", "share")], rows, foot=foot
    )


def _kinds(view: View) -> Part:
    words, found = view.words, view.run.audit
    tables = [(words("audit.sizes"), found.get("sizes")), (words("audit.modes"), found.get("modes"))]
    tables += [(words("audit.bits"), found.get("bit_depths"))]
    tables += [(words("audit.meta", name=key), counts) for key, counts in (found.get("meta_counts") or {}).items()]
    parts = []
    for title, counts in tables:
        if counts:
            shown, foot = capped(words, sorted(counts.items(), key=lambda pair: -pair[1]), 8, "audit.json")
            rows = [[name(key), words.count(n)] for key, n in shown]
            parts.append(table("", [title, words("audit.images")], rows, foot=foot))
    return side_by_side(*parts)


def _bad(view: View) -> list[Part]:
    words, found = view.words, view.run.audit
    parts = []
    if found.get("bad"):
        shown, foot = capped(words, found["bad"], 200, "audit.json")
        rows = [
            [
                name(item["image"]),
                said_cell(words, item.get("reason")),
                words.get(f"audit.action_{item.get('action')}", str(item.get("action"))),
            ]
            for item in shown
        ]
        head = [words(f"audit.{key}") for key in ("file", "reason", "action")]
        parts.append(table(words("audit.bad_caption"), head, rows, "lll", foot=foot))
    if found.get("conflicts"):
        shown, foot = capped(words, found["conflicts"], 100, "audit.json")
        rows = [[Part("names", {"items": item["images"]}), Part("names", {"items": item["labels"]})] for item in shown]
        head = [words("audit.file"), words("audit.labels")]
        if set(view.data["skipped"]) & {image for item in found["conflicts"] for image in item["images"]}:
            head.append(words("audit.action"))
            skipped = set(view.data["skipped"])
            rows = [
                [*row, words("audit.action_conflict_skipped") if set(item["images"]) <= skipped else ""]
                for row, item in zip(rows, shown, strict=True)
            ]
        parts.append(table(words("audit.conflict_caption"), head, rows, "lll", foot=foot))
    if view.data["skipped"]:
        shown, foot = capped(words, view.data["skipped"], 200, "audit.json")
        title = f"{words('audit.skipped_caption')} ({words.count(len(view.data['skipped']))})"
        parts.append(folded(title, Part("names", {"items": shown}), text(foot)))
    return parts


def _same(view: View) -> list[Part]:
    words, found = view.words, view.run.audit
    parts = []
    if found.get("exact_duplicates"):
        shown, foot = capped(words, found["exact_duplicates"], 50, "audit.json")
        rows = [[Part("names", {"items": images})] for images in shown]
        title = f"{words('audit.exact_caption')}{words('unit.colon')}{words.count(len(found['exact_duplicates']))}"
        parts.append(folded(title, table("", [words("audit.file")], rows, foot=foot)))
    if found.get("near_duplicates"):
        shown, foot = capped(words, found["near_duplicates"], 50, "audit.json")
        rows = [[name(item["a"]), name(item["b"]), words.count(item.get("distance"))] for item in shown]
        head = [words("audit.file"), words("audit.file"), words("audit.distance")]
        title = f"{words('audit.near_caption')}{words('unit.colon')}{words.count(found.get('n_near_duplicates', len(found['near_duplicates'])))}"
        parts.append(folded(title, table("", head, rows, "llr", foot=foot)))
    return parts


def split(view: View) -> Section:
    """Who trains, who chooses, who tests."""
    if folds.told(view):
        return folds.split(view)
    words = view.words
    counts = Counter((row["label"], row["split"]) for row in view.run.split)
    sides = Counter(row["split"] for row in view.run.split)
    classes = sorted({label for label, _ in counts})
    shown, foot = capped(words, classes, 60, "split.csv")
    rows: list[list[str | Cell]] = [[name(c), *(words.count(counts[c, side]) for side in SIDES)] for c in shown]
    rows.append(
        [Cell(words("split.total"), strong=True), *(Cell(words.count(sides[side]), strong=True) for side in SIDES)]
    )
    head = [words("audit.class"), *(words(f"split.{side}") for side in SIDES)]
    say = words("split.say", **{side: words.count(sides[side]) for side in SIDES})
    seed = (view.run.protocol.get("seeds") or [0])[0]
    parts = [table(words("split.caption"), head, rows, foot=foot, width="narrow"), text(words("split.rule", seed=seed))]
    if (view.run.protocol.get("data") or {}).get("test"):
        parts.append(text(words("split.own_test")))
    return Section("split", say, parts)


def protocol(view: View) -> Section:
    """What was fixed before training, and whether it still is."""
    words, data = view.words, view.data
    changed = data["protocol_changed"]
    say = words("protocol.say_changed", files=words.listed(changed)) if changed else words("protocol.say_same")
    rows: list[list[str | Cell]] = [
        [words("protocol.primary"), view.metric],
        [words("protocol.margin"), view.margin],
        [words("protocol.alpha"), words.number(data["alpha"], 3).rstrip("0")],
        [words("protocol.hash"), name(data["protocol_sha256"] or "?")],
    ]
    decision = view.run.protocol.get("decision") or {}
    slowdown = decision.get("max_slowdown")
    rule = [words("protocol.rule_go"), words("protocol.rule_nogo"), words("protocol.rule_open")]
    if known(slowdown) and slowdown > 1:
        rule.insert(1, words("protocol.rule_slowdown", x=words.ratio(slowdown)))
    parts = [note(say)] if changed else []
    parts += [
        table(words("protocol.caption"), [words("environment.what"), words("environment.value")], rows, "ll"),
        Part("list", {"title": words("protocol.rule"), "items": rule}),
        folded(words("protocol.file"), Part("pre", {"text": view.run.protocol_text})),
    ]
    return Section("protocol", say, parts)


def environment(view: View) -> Section:
    """The machine and the versions."""
    words, found = view.words, view.data["environment"]
    keys = ("mrl", "python", "os", "cpu", "gpu", "threads")
    rows: list[list[str | Cell]] = [[words(f"environment.{key}"), str(found.get(key) or words("none"))] for key in keys]
    rows += [[library, version] for library, version in (found.get("libraries") or {}).items()]
    parts = [
        table(
            words("environment.caption"),
            [words("environment.what"), words("environment.value")],
            rows,
            "ll",
            width="narrow",
        )
    ]
    trained = {machine(fit["environment"]) for fit in view.run.fits.values() if fit.get("environment")}
    elsewhere = sorted(trained - {machine(found)})
    if elsewhere:
        parts.insert(0, note(words("environment.fit_elsewhere", machine=words.listed(elsewhere))))
    return Section("environment", words("environment.say"), parts)


def glossary(view: View) -> Section:
    """The terms in plain words."""
    words = view.words
    items: Sequence[Mapping[str, Any]] = [
        {"term": words(f"glossary.{key}"), "text": words(f"glossary.{key}_text")} for key in GLOSSARY
    ]
    return Section("glossary", words("glossary.say"), [Part("terms", {"items": items})])
