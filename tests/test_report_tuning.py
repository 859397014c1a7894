"""The report tells of the search where there was one, in both languages, and says nothing where there was none."""

import json

import pytest

from mrl.report import LANGUAGES, report
from mrl.report.tuning import scatter
from mrl.run import write_json
from run_folder import build_run


def searched():
    """A finished search with invented numbers."""
    latency = {"ratio": 0.81, "low": 0.8, "high": 0.83}

    def arm(name, ratio):
        rows = [
            {
                "trial": i,
                "outcome": "trained",
                "values": {"lr": 1e-5},
                "score": 0.9 + i / 100,
                "latency": {**latency, "ratio": ratio + i / 20},
            }
            for i in range(3)
        ]
        rows.append({"trial": 3, "outcome": "over budget", "values": {}, "score": None, "latency": latency})
        return {
            "outcomes": {"trained": 3, "over budget": 1},
            "importance": {"lr": 0.7, "<b>": 0.3},
            "front": [0, 1],
            "trials": rows,
        }

    judged = [
        {"arm": name, "trial": 2, "searched_score": 0.92, "mean": 0.9123, "sd": 0.004, "latency": latency}
        for name in ("baseline", "mrl")
    ]
    return {
        "arms": {"baseline": arm("baseline", 1.0), "mrl": arm("mrl", 0.8)},
        "judged": judged,
        "chosen": {"baseline": None, "mrl": 2},
        "difference": {"estimate": 0.012, "low": -0.01, "high": 0.034, "n": 3},
    }


@pytest.mark.parametrize("lang", LANGUAGES)
def test_report__tells_of_the_search(tmp_path, lang):
    out = build_run(tmp_path)
    before = report(out, lang=lang).read_text(encoding="utf-8")
    assert "mrl tune" not in before
    write_json(out / "tune" / "tune.json", searched())
    page = report(out, lang=lang, overwrite=True).read_text(encoding="utf-8")
    for shown in ("mrl tune", "91.2", "+1.2", "&lt;b&gt;", "70"):
        assert shown in page.split('id="plan"')[1], shown


def test_report__a_difference_without_an_interval_says_so(tmp_path):
    out = build_run(tmp_path)
    found = searched()
    found["difference"] |= {"low": None, "high": None}
    write_json(out / "tune" / "tune.json", found)
    said = report(out).read_text(encoding="utf-8").split('id="plan"')[1]
    assert "+1.2\N{NO-BREAK SPACE}points each time, so there is no interval" in said
    assert "corrected resampled t)" not in said


def test_report__a_search_without_a_choice_is_no_crash(tmp_path):
    out = build_run(tmp_path)
    found = searched()
    found["difference"], found["judged"], found["chosen"]["mrl"] = None, [], None
    found["arms"]["mrl"] |= {"importance": None, "front": [], "trials": []}
    write_json(out / "tune" / "tune.json", json.loads(json.dumps(found)))
    assert "mrl tune" in report(out).read_text(encoding="utf-8")


def test_scatter__marks_arms_and_joins_the_front():
    points = [
        ("mrl", 0.8, 0.9, True, "a"),
        ("mrl", 0.9, 0.92, True, "b"),
        ("mrl", 1.0, 0.9, False, "c"),
        ("baseline", 1.0, 0.91, False, "d"),
    ]
    svg = scatter(points, label="l", x_label="x", text=str, missing="none")
    assert svg.count("<circle") == 3
    assert svg.count('class="curve m"') == 1
    assert svg.split('<path d="M')[1].split('"')[0].count(",") == 2
    assert "none" in scatter([], label="l", x_label="x", text=str, missing="none")
