"""What a report says of a run with more than two arms: every arm against the baseline, and what multiplicity costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mrl.report.figures import Span
from mrl.report.parts import Cell, Part, View, hours, name, table, text
from mrl.report.svg import shorten
from mrl.report.words import known

LABEL = 84.0  # user units that a name may take beside a figure


def many(view: View) -> list[Mapping[str, Any]]:
    """Every arm's comparison as in `report.json`; none in a run of two arms."""
    return view.data.get("comparisons") or []


def spans(view: View, key: str) -> list[Span]:
    """A row for every arm's `difference` or `latency_ratio`; the arm decided for has MRL's colour."""
    found = []
    for one in many(view):
        ends = [(one[key] or {}).get(k) for k in ("estimate", "low", "high")]
        found.append(Span(shorten(view.name(one["arm"]), LABEL), *ends, view.colour(one["arm"])))
    return found


def reason(view: View) -> list[dict[str, Any]]:
    """A sentence on how the arms came out, before the reasons of the one decided for."""
    found = many(view)
    if not found:
        return []
    names = {
        key: [view.name(one["arm"]) for one in found if one["decision"] == key]
        for key in ("go", "no-go", "inconclusive")
    }
    said = view.words(
        "arms.reason",
        m=view.words.count(len(found)),
        arm=view.name(view.featured),
        **{
            word: view.words.listed(names[key], 4) if names[key] else view.words("none")
            for word, key in (("go", "go"), ("nogo", "no-go"), ("open", "inconclusive"))
        },
    )
    return [{"text": said, "foreign": False}]


def observed(view: View) -> list[str]:
    """For page one: at which level the smallest detectable differences were computed."""
    found = many(view)
    if not found:
        return []
    alpha = (view.data.get("mde") or {}).get("alpha")
    return [view.words("arms.mde", m=view.words.count(len(found)), level=view.level_of(alpha))] if known(alpha) else []


def parts(view: View) -> list[Part]:
    """The tables of all arms, for the section on scores."""
    words, found = view.words, many(view)
    if not found:
        return []
    level = view.level_of(view.data["alpha"])
    told = {"m": words.count(len(found)), "alpha": words.percent(view.data["alpha"], 0)}
    least = words.percent(view.data["alpha"] / len(found), 2)
    said = [text(words("arms.family", **told, least=least)), text(words("arms.below", arm=view.name(view.featured)))]
    return [_quality(view, found, level), *said, _cost(view), *_budgets(view)]


def _quality(view: View, found: list[Mapping[str, Any]], level: str) -> Part:
    words, data, metric = view.words, view.data, view.data["metric"]
    margin = data["margin"]
    base = data["all_arms"]["baseline"]
    kind = "3" if metric == "auroc" else "percent"

    def score(arm: Mapping[str, Any]) -> Cell:
        return Cell(words.score(metric, arm["estimate"]), sub=words.interval(arm["low"], arm["high"], kind))

    rows: list[list[Any]] = [[Cell(words.arm("baseline"), sub=_what(view, "baseline")), score(base), *[""] * 5]]
    for one in found:
        gap, ratio = one["difference"], one["latency_ratio"] or {}
        shown = words.interval(gap["low"], gap["high"], "points", (0.0, -margin, margin))
        times = words.interval(ratio.get("low"), ratio.get("high"), "ratio", (1.0,))
        rows.append(
            [
                Cell(view.name(one["arm"]), sub=_what(view, one["arm"]), strong=one["arm"] == view.featured),
                score(data["all_arms"][one["arm"]]),
                Cell(words.points(gap["estimate"]), sub=f"{shown} ({view.level_of(one['interval_alpha'])})"),
                Cell(words.p_value(one["p_adjusted"]), sub=words.p_value(one["p_value"])),
                words(f"quality.{one['verdict']['quality']}"),
                Cell(
                    words.ratio(ratio.get("estimate")),
                    sub=f"{times} {words.get('cost.' + str(one['verdict']['cost']), '')}",
                ),
                words(f"decision.{one['decision']}"),
            ]
        )
    head = [words(f"arms.{key}") for key in ("arm", "score", "difference", "p", "quality", "latency", "decision")]
    return table(words("arms.caption", level=level), head, rows, "lrrrlrl")


def _what(view: View, arm: str) -> str:
    """What an arm is, in a few words: its model, weights and swap."""
    words, protocol = view.words, view.run.protocol
    told = (protocol.get("arm_settings") or {}).get(arm) or protocol
    said = [str(told.get("model")), str(told.get("weights") or words("arms.random"))]
    swap = "none" if arm == "baseline" else told.get("swap")
    if swap != "none":
        layers = told.get("layers")
        where = words("arms.all_layers") if layers is None else words("unit.comma").join(map(str, layers))
        setting = words.get(f"setting.{swap}", str(swap))
        said.append(words("arms.swap", setting=setting, region=str(told.get("region")), layers=where))
    return words("unit.comma").join(said)


def _cost(view: View) -> Part:
    words = view.words
    rows = []
    for arm, found in view.data["all_arms"].items():
        more = view.run.more.get(arm) or {}
        calibration = view.run.own_calibration if arm == "mrl" else more.get("calibration")
        rows.append(
            [
                view.name(arm),
                words.ms(found["latency_ms_median"]),
                words.ms(found["latency_ms_p95"]),
                words.unit(found["params_m"], ""),
                words.unit(found["gmacs"], ""),
                words.unit(found["peak_memory_mb"], "MB"),
                hours(words, found["million_images_hours"]),
                words.duration(found["fit_seconds"]),
                words.duration(calibration["seconds"]) if calibration else words("none"),
            ]
        )
    head = [
        words("arms.arm"),
        words("latency.median"),
        words("latency.p95"),
        words("size.params_m"),
        words("size.gmacs"),
    ]
    head += [
        words("size.peak_memory_mb"),
        words("size.hours"),
        words("training.seconds"),
        words("training.calibration_seconds"),
    ]
    return table(words("arms.cost"), head, rows)


def _budgets(view: View) -> list[Part]:
    """Where an arm was fitted differently: the fields that differ."""
    words, own = view.words, view.run.protocol.get("budget") or {}
    rows = []
    for arm, told in (view.run.protocol.get("arm_settings") or {}).items():
        changed = {key: value for key, value in told["budget"].items() if value != own.get(key)}
        rows += [[name(arm), name(key), name(own.get(key)), name(value)] for key, value in changed.items()]
    if not rows:
        return [text(words("arms.same_budget"))]
    head = [words(f"arms.{key}") for key in ("arm", "field", "there", "here")]
    return [table(words("arms.budgets"), head, rows, "llll", width="medium")]
