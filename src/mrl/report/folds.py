"""What a report says of a run of folds: how images were dealt, what each fit scored, the test and its chances."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mrl.report.parts import Cell, Part, Section, View, capped, name, side_by_side, table, text
from mrl.report.words import known


def told(view: View) -> dict[str, str]:
    """The numbers that the sentences on folds have in common, as text; empty for one hold-out.

    Example:
        >>> from mrl.report.collect import RunFiles
        >>> from pathlib import Path
        >>> from mrl.report.words import Words
        >>> run = RunFiles(Path(), {}, "", {}, [], {"folds": {"k": 5, "repeats": 2, "n_fits": 10, "rows": []}}, {})
        >>> told(View(run, {}, Words("en")))["fits"]
        '10'
    """
    words, found = view.words, view.run.comparison.get("folds")
    if not found:
        return {}
    counts = {"fits": found["n_fits"], "k": found["k"], "repeats": found["repeats"]}
    return {key: words.count(value) for key, value in counts.items()} | {
        "share": words.percent((found["k"] - 1) / found["k"], 0),
        "home": view.home.rstrip("/"),
    }


def split(view: View) -> Section:
    """How the images were dealt into folds."""
    words, rows = view.words, view.run.split
    numbers = told(view)
    frozen = [row for row in rows if row["split"] == "test"]
    dealt = [row for row in rows if row["split"] != "test"]
    classes = sorted({row["label"] for row in rows})
    shown, foot = capped(words, classes, 60, "split.csv")
    sides = {"in_folds": dealt, "frozen": frozen} if frozen else {"in_folds": dealt}
    counts = [
        [name(c), *(words.count(sum(row["label"] == c for row in side)) for side in sides.values())] for c in shown
    ]
    counts.append(
        [Cell(words("split.total"), strong=True), *(Cell(words.count(len(s)), strong=True) for s in sides.values())]
    )
    head = [words("audit.class"), *(words(f"folds.{key}") for key in sides)]
    say = words("folds.split_say", n=words.count(len(dealt)), **numbers)
    seed = (view.run.protocol.get("seeds") or [0])[0]
    parts = [
        side_by_side(table(words("folds.split_caption"), head, counts, foot=foot, width="narrow"), _sizes(view)),
        text(words("folds.rule", seed=seed)),
    ]
    return Section("split", say, parts)


def _sizes(view: View) -> Part:
    words, found = view.words, view.run.comparison["folds"]
    by = {(row["repeat"], row["fold"]): row["n"] for row in found["rows"]}
    head = [words("folds.repeat"), *(f"{words('folds.fold')} {fold + 1}" for fold in range(found["k"]))]
    rows = [
        [words.count(r + 1), *(words.count(by.get((r, f))) for f in range(found["k"]))] for r in range(found["repeats"])
    ]
    return table(words("folds.sizes_caption"), head, rows, width="narrow")


def chances(view: View) -> dict[str, str]:
    """The three chances of the Bayesian test, as percent."""
    words, bayes = view.words, view.run.comparison.get("bayes") or {}
    return {key: words.percent(bayes.get(f"p_{key}")) for key in ("worse", "equivalent", "better")}


def observed(view: View) -> list[str]:
    """Sentences for page one: the chances, and what the frozen test set says."""
    words, said = view.words, []
    if known((view.run.comparison.get("bayes") or {}).get("p_equivalent")):
        said.append(words("front.bayes", **chances(view)))
    frozen = view.run.comparison.get("frozen")
    if frozen:
        difference = frozen["difference"]
        said.append(
            words(
                "front.frozen",
                n=words.count(frozen["n"]),
                estimate=words.points(difference["estimate"]),
                low=words.points(difference["low"]),
                high=words.points(difference["high"]),
                verdict=words(f"quality.{frozen['verdict']}"),
            )
        )
    return said


def primary(view: View) -> list[Part]:
    """The primary test with its chances, and every fit's score."""
    words, data = view.words, view.data
    numbers, test, bayes = told(view), view.run.comparison.get("test") or {}, view.run.comparison.get("bayes") or {}
    margin = data["margin"]
    p = words.p_value(test.get("p_value"))
    result = words("folds.test_result", t=words.number(test.get("t"), 2, True), df=words.count(test.get("df")), p=p)
    widened = str(data["difference"].get("method", "")).endswith("widened")
    difference = data["difference"]
    shown = words.interval(difference["low"], difference["high"], "points", (0.0, -margin, margin))
    read = words("folds.test_read_widened" if widened else "folds.test_read")
    method = words.get(f"method.{difference.get('method')}", str(difference.get("method") or ""))
    rows: list[list[str | Cell]] = [
        [Cell(words("folds.test", **numbers), sub=method, strong=True), result, shown, read],
        [
            words("folds.bayes"),
            words("folds.bayes_result", **chances(view)) if known(bayes.get("p_better")) else words("missing"),
            "",
            words("folds.bayes_read", margin=view.margin),
        ],
    ]
    if view.run.comparison.get("frozen"):
        rows.append(_frozen(view, view.run.comparison["frozen"]))
    head = [words(f"statistics.{key}") for key in ("test", "result", "interval", "read")]
    return [table(words("folds.test_caption"), head, rows, "llrl"), _each(view)]


def _frozen(view: View, found: Mapping[str, Any]) -> list[str | Cell]:
    words, difference = view.words, found["difference"]
    method = words.get(f"method.{difference.get('method')}", str(difference.get("method") or ""))
    title = Cell(words("folds.frozen_test", n=words.count(found["n"])), sub=method)
    interval = words.interval(difference["low"], difference["high"], "points")
    return [title, words.points(difference["estimate"]), interval, words("folds.frozen_read")]


def _each(view: View) -> Part:
    words, found = view.words, view.run.comparison["folds"]
    metric = view.data["metric"]
    rows = [
        [
            words.count(row["repeat"] + 1),
            words.count(row["fold"] + 1),
            words.count(row["n"]),
            *(words.score(metric, row[arm]) for arm in ("baseline", "mrl")),
            words.points(row["difference"]) if metric != "auroc" else words.number(row["difference"], 3, True),
        ]
        for row in found["rows"]
    ]
    head = [words(f"folds.{key}") for key in ("repeat", "fold", "images")]
    head += [words.arm("baseline"), words.arm("mrl"), words("folds.difference")]
    return table(words("folds.each_caption", metric=view.metric), head, rows, "rrrrrr", width="medium")


def one_repeat(view: View) -> list[Part]:
    """The note that counts are of the first repeat, where there are several fits."""
    return [text(view.words("folds.one_repeat"))] if told(view) else []
