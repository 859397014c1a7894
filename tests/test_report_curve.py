"""The report shows a learning curve where there is one, in both languages, with every interval it has and no claim beyond them."""

import re
import shutil
from xml.etree import ElementTree

import numpy as np
import pytest

from mrl.curve import summed
from mrl.data.subsets import SHARES
from mrl.report import LANGUAGES, collect_report, report
from mrl.report.collect import read_run
from mrl.report.curve import Point, by_images, by_size
from mrl.report.parts import SECTIONS, View
from mrl.report.words import Words
from mrl.run import read_json, write_json
from run_folder import build_run, replace_json
from test_report import JAPANESE, NOTHING, Page


def drawn(gains, *, arms=("baseline", "mrl"), metric="accuracy", folds=5, shares=SHARES, noise=0.002):
    """A learning curve with invented scores: `gains` of every other arm at every share over the baseline."""
    rng = np.random.default_rng(0)
    rows = []
    for i, share in enumerate(shares):
        for fold in range(folds):
            base = 0.7 + 0.2 * share + 0.01 * fold
            scores = {"baseline": base} | {a: base + gains[a][i] + rng.normal(0, noise) for a in arms[1:]}
            rows.append(
                {
                    "repeat": 0, "fold": fold, "share": share, "n_train": round(2000 * share) + fold % 2,
                    "arms": {a: {"score": s, "gap": None if share == 0.1 and fold else 0.1 / share, "updates": 240 + fold} for a, s in scores.items()},
                }
            )  # fmt: skip
    return summed(rows, arms=arms, metric=metric, k=5)


GAINS = {"mrl": (0.03, 0.03, 0.0, 0.0, -0.03)}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run, to copy."""
    return build_run(tmp_path_factory.mktemp("curve"), n_test=60)


@pytest.fixture
def out(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


def put(out, found):
    sha = read_json(out / "comparison.json")["protocol_sha256"]
    return write_json(out / "curve.json", {"schema": 1, "protocol_sha256": sha, **found})


def html_of(out, lang="en"):
    return report(out, lang=lang, overwrite=True).read_text(encoding="utf-8")


def section_of(html):
    return Page(re.search(r'<section class="part" id="curve">.*?</section>', html, re.DOTALL).group())


@pytest.mark.parametrize("lang", LANGUAGES)
def test_report__without_a_curve_there_is_no_section_and_nothing_is_missing(out, lang):
    html = html_of(out, lang)
    assert 'id="curve"' not in html
    assert "curve.json" not in html
    found = read_json(out / "report.json")
    assert "curve" not in found
    assert "curve.json" not in found["missing"]


@pytest.mark.parametrize("lang", LANGUAGES)
def test_report__shows_scores_differences_gaps_and_their_scope(out, lang):
    found = drawn(GAINS)
    put(out, found)
    words, page = Words(lang), section_of(html_of(out, lang))
    said = page.said()
    for size in found["sizes"]:
        assert words.count(size["n_train"]) in said
        for arm in ("baseline", "mrl"):
            score = size["arms"][arm]
            assert words.percent(score["estimate"]) in said
            assert words.interval(score["low"], score["high"], "percent") in said
            assert words.points(score["gap"]) in said
        gap = size["differences"]["mrl"]
        assert words.points(gap["estimate"]) in said
        assert words.interval(gap["low"], gap["high"], "points", (0.0,)) in said
    assert words("curve.scope", folds="5") in said
    assert words("curve.of_folds", n="1", total="5") in said  # gaps at 10 %: one fold has one
    assert words.between("240", "244") in said
    assert not NOTHING.search(said.replace("None of these", ""))
    if lang == "ja":
        assert all(JAPANESE.search(text) for text, inside, _ in page.texts if "svg" not in inside and len(text) > 40)


@pytest.mark.parametrize(
    ("gains", "key", "above", "below"),
    [
        ((0.03, 0.03, 0.0, 0.0, -0.03), "both", "10\u202f%, 20\u202f%", "100\u202f%"),
        ((0.03, 0.0, 0.0, 0.0, 0.0), "above", "10\u202f%", ""),
        ((0.0, 0.0, -0.03, -0.03, 0.0), "below", "", "40\u202f%, 70\u202f%"),
        ((0.0,) * 5, "none", "", ""),
    ],
)
def test_say__names_the_sizes_whose_interval_excludes_0_and_no_others(out, gains, key, above, below):
    found = drawn({"mrl": gains})
    for size in found["sizes"]:
        gap = size["differences"]["mrl"]
        shown = f"{round(100 * size['share'])}\u202f%"
        assert (gap["low"] > 0) == (shown in above.split(", "))
        assert (gap["high"] < 0) == (shown in below.split(", "))
    put(out, found)
    for lang in LANGUAGES:
        words = Words(lang)
        names = {"arm": words.arm("mrl"), "first": words.arm("baseline"), "m": "5"}
        comma = words("unit.comma")
        expected = words(f"curve.{key}", **names, above=above.replace(", ", comma), below=below.replace(", ", comma))
        assert expected in section_of(html_of(out, lang)).said("p")


@pytest.mark.parametrize("lang", LANGUAGES)
def test_say__sizes_without_an_interval_claim_nothing(out, lang):
    put(out, drawn(GAINS, folds=4))  # one fold of five is not there
    words, said = Words(lang), section_of(html_of(out, lang)).said()
    assert words("curve.unknown", arm=words.arm("mrl"), first=words.arm("baseline")) in said
    assert not NOTHING.search(said.replace("None of these", ""))


@pytest.mark.parametrize("lang", LANGUAGES)
def test_report__more_arms_than_two_each_have_a_line_a_sentence_and_a_name(out, lang):
    arms = ("baseline", "mrl", "region4", "scratch")
    gains = {"mrl": (0.0,) * 5, "region4": (0.03,) * 5, "scratch": (-0.05,) * 5}
    found = drawn(gains, arms=arms)
    put(out, found)
    html = html_of(out, lang)
    page, words = section_of(html), Words(lang)
    said = page.said()
    every = words.listed([f"{round(100 * s)}\u202f%" for s in SHARES])
    names = {"first": words.arm("baseline"), "m": "5", "above": every, "below": every}
    assert words("curve.none", arm=words.arm("mrl"), **names) in said
    assert words("curve.above", arm="region4", **names) in said
    assert words("curve.below", arm="scratch", **names) in said
    for size in found["sizes"]:
        for arm in arms[1:]:
            assert words.points(size["differences"][arm]["estimate"]) in said
    drawings = re.findall(r"<svg.*?</svg>", html.split('id="curve">')[1].split("</section>")[0], re.DOTALL)
    assert len(drawings) == 2
    root = ElementTree.fromstring(drawings[0])
    assert sum("curve" in (e.get("class") or "").split() for e in root.iter()) == 4
    labels = [float(e.get("y")) for e in root.iter() if e.text in map(words.arm, arms) and e.get("class")]
    assert len(labels) == 4
    assert min(np.diff(sorted(labels))) >= 13  # no name stands on another


def test_report__an_arm_decided_for_has_the_first_sentence_and_its_own_colour(out):
    put(out, drawn({"mrl": (0.0,) * 5, "region4": (0.03,) * 5}, arms=("baseline", "mrl", "region4")))
    files = read_run(out)
    view = View(files, collect_report(out), Words())
    assert by_images(view).say.startswith("MRL minus Baseline")
    featured = View(type(files)(**{**vars(files), "featured": "region4"}), view.data, Words().of_arm("region4"))
    found = by_images(featured)
    assert found.say.startswith("region4 minus Baseline")
    assert found.parts[0].content["text"].startswith("MRL minus Baseline")


def test_report_json__has_the_curve_but_for_its_rows(out):
    found = drawn(GAINS)
    put(out, found)
    html_of(out)
    shown = read_json(out / "report.json")["curve"]
    assert shown == {key: found[key] for key in ("metric", "alpha", "k", "n_folds", "scope", "sizes")}


def test_report__a_curve_of_another_protocol_is_named(out):
    path = put(out, drawn(GAINS))
    replace_json(path, lambda c: c.update(protocol_sha256="0" * 64))
    html = html_of(out)
    assert read_json(out / "report.json")["protocol_changed"] == ["curve.json"]
    assert "written (curve.json)" in Page(html).said("p")


def test_report__numbers_of_sections_follow_the_page(out):
    before = View(read_run(out), {}, Words())
    put(out, drawn(GAINS))
    after = View(read_run(out), {}, Words())
    assert (before.number("disagree"), after.number("disagree")) == (7, 8)
    assert after.sections == list(SECTIONS)
    html = html_of(out)
    heads = re.findall(r'<section class="part" id="(\w+)"><h2><span class="no">(\d+)', html)
    assert heads == [(key, str(i)) for i, key in enumerate(SECTIONS, 1)]


@pytest.mark.parametrize("lang", LANGUAGES)
def test_report__names_the_shares_that_were_too_small(out, lang):
    put(out, {**drawn({"mrl": (0.01, 0.02)}, shares=(0.4, 1.0)), "left_out": [0.1, 0.125]})
    words = Words(lang)
    shares = words.listed(["10\u202f%", "12.5\u202f%"])
    assert words("curve.left_out", shares=shares) in section_of(html_of(out, lang)).said()
    assert read_json(out / "report.json")["curve"]["left_out"] == [0.1, 0.125]


def test_report__auroc_and_one_size_only(out):
    found = drawn({"mrl": (0.01,)}, metric="auroc", shares=(1.0,))
    put(out, found)
    said = section_of(html_of(out)).said()
    assert Words().score("auroc", found["sizes"][0]["arms"]["mrl"]["estimate"]) in said
    assert "AUROC" in said


def test_by_size__draws_what_is_there():
    points = [Point(10, 0.7, None, None, "one"), Point(1000, None, None, None, "two"), Point(1010, 0.9, 0.8, 1.0, "x")]
    svg = by_size([("MRL", "mrl", points), ("none", "", points[1:2])], label="l", x_label="n", text=str, missing="gone")
    assert svg.count("<circle") == 2
    assert svg.count("whisker m") == 3
    assert "none" not in svg
    assert "gone" in by_size([("none", "", points[1:2])], label="l", x_label="n", text=str, missing="gone")
    wide = [("a", "mrl", [Point(10, 0.9, -0.4, 2.2, "")])]
    ticks = re.findall(r'end" class="tick">([\d.-]+)<', by_size(wide, label="", x_label="n", text=str, missing=""))
    assert (ticks[0], ticks[-1]) == ("0.0", "1.0")  # a score has no place beyond
    crowded = by_size([("a", "", [Point(n, 0.5, None, None, "") for n in (1000, 1001, 5000)])], label="", x_label="n", text=str, missing="")  # fmt: skip
    ticks = re.findall(r'class="tick">([\d,]+)<', crowded)
    assert ticks == ["5,000", "1,001"]  # a number that would stand on another is left out
