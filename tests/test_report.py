import json
import math
import re
import shutil
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from mrl.decision import SENTENCES
from mrl.errors import ConfigError
from mrl.report import collect_report, report
from mrl.report.collect import read_run
from mrl.report.reasons import said
from mrl.report.thumbs import data_uri, disagreements, thumbnails
from mrl.report.words import LANGUAGES, Words, fields, table
from mrl.run import read_csv, read_json
from run_folder import build_run, replace_json

DECISIONS = ("go", "no-go", "inconclusive")
VOID = {"meta", "img", "br", "line", "rect", "circle", "path"}
ALLOWED = {
    *(
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "main",
        "header",
        "footer",
        "nav",
        "section",
        "div",
        "span",
        "p",
    ),
    *("h1", "h2", "h3", "b", "small", "strong", "br", "ul", "ol", "li", "dl", "dt", "dd", "table", "caption", "thead"),
    *("tbody", "tr", "th", "td", "figure", "figcaption", "details", "summary", "pre", "code", "bdi", "a", "img"),
    *("svg", "defs", "pattern", "g", "rect", "line", "circle", "path", "text"),
}
NOTHING = re.compile(r"\b(None|nan|NaN)\b")
JAPANESE = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]")


class Page(HTMLParser):
    """A page's elements and texts; `texts` are (text, enclosing tags, whether it is marked as English or as a name)."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.texts = [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            own = dict(attributes)
            self.open.append((tag, own.get("lang") == "en" or tag in ("bdi", "pre", "code", "style")))

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append((data.strip(), [tag for tag, _ in self.open], any(mark for _, mark in self.open)))

    def said(self, *tags):
        """The words inside elements of these tags (anywhere, where none are given), as one text."""
        return " ".join(
            t for t, inside, _ in self.texts if "style" not in inside and (not tags or set(tags) & set(inside))
        )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Finished runs of all decisions, with reports in both languages: {decision: folder}."""
    return {d: build_run(tmp_path_factory.mktemp(d.replace("-", "")), d) for d in DECISIONS}


@pytest.fixture(scope="module")
def pages(runs):
    found = {}
    for decision, out in runs.items():
        for lang in LANGUAGES:
            path = report(out, lang=lang, overwrite=True)
            found[decision, lang] = Page(path.read_text(encoding="utf-8"))
    return found


@pytest.fixture
def out(runs, tmp_path):
    """A copy of the "go" run to alter."""
    shutil.copytree(runs["go"], tmp_path / "run")
    return tmp_path / "run"


def page(out, **options):
    return Page(report(out, overwrite=True, **options).read_text(encoding="utf-8"))


def test_collect_report__has_the_keys_of_the_issue(runs):
    found = collect_report(runs["go"])
    keys = {"decision", "reasons", "verdict", "metric", "margin", "arms", "difference", "latency_ratio", "exported_arm"}
    assert keys | {"mde", "protocol_sha256", "environment"} <= set(found)
    assert set(found["verdict"]) == {"quality", "cost"}
    arm_keys = {"estimate", "low", "high", "n", "metrics", "linear_probe", "latency_ms_median", "gmacs", "params_m"}
    for arm in ("baseline", "mrl"):
        assert arm_keys | {"peak_memory_mb", "fit_seconds", "updates", "updates_to_95"} <= set(found["arms"][arm])
        assert {"accuracy", "balanced_accuracy"} <= set(found["arms"][arm]["metrics"])
    for name in ("difference", "latency_ratio"):
        assert {"estimate", "low", "high"} <= set(found[name])


@pytest.mark.parametrize("decision", DECISIONS)
def test_collect_report__repeats_the_files_and_computes_nothing(runs, decision):
    out = runs[decision]
    found = collect_report(out)
    comparison, measure = read_json(out / "comparison.json"), read_json(out / "measure.json")
    assert found["decision"] == decision
    assert found["verdict"] == {"quality": comparison["verdict"], "cost": measure["verdict"]}
    assert found["difference"] == comparison["difference"]
    assert found["latency_ratio"] == measure["latency_ratio"]
    assert found["arms"]["mrl"]["estimate"] == comparison["arms"]["mrl"]["estimate"]
    assert found["arms"]["mrl"]["latency_ms_median"] == measure["rows"][0]["arms"]["mrl"]["latency_ms_median"]
    assert found["calibration"]["updates"] == 320
    assert found["exported_arm"] == ("mrl" if decision == "go" else "baseline")
    assert found["protocol_sha256"] == comparison["protocol_sha256"]
    assert found["protocol_changed"] == []
    assert found["skipped"] == read_json(out / "audit.json")["skipped"]


def test_collect_report__probe_of_evaluation_where_the_comparison_has_none(out):
    replace_json(out / "comparison.json", lambda c: [c["arms"][arm].pop("linear_probe") for arm in c["arms"]])
    (out / "evaluation.json").write_text(json.dumps({"arms": {"mrl": {"linear_probe": 0.5}}}))
    found = collect_report(out)
    assert (found["arms"]["mrl"]["linear_probe"], found["arms"]["baseline"]["linear_probe"]) == (0.5, None)


def test_report__writes_both_files_and_refuses_to_replace_them(out):
    path = report(out, overwrite=True)
    assert path == out / "report.html"
    assert read_json(out / "report.json") == collect_report(out)
    with pytest.raises(ConfigError, match=r"report\.html exists.*--overwrite"):
        report(out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lang": "de"}, "--lang de.*en, ja"),
        ({"price_per_hour": -1.0}, "--price-per-hour -1.0.*0 or more"),
        ({"price_per_hour": math.nan}, "--price-per-hour nan"),
    ],
)
def test_report__wrong_argument(out, options, message):
    with pytest.raises(ConfigError, match=message):
        report(out, overwrite=True, **options)


def test_report__no_run_folder(tmp_path):
    with pytest.raises(ConfigError, match=r"not a run folder; `mrl poc"):
        report(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["protocol.yaml", "audit.json", "split.csv", "comparison.json", "measure.json"])
def test_report__says_which_step_is_not_done(out, name):
    (out / name).unlink()
    with pytest.raises(ConfigError, match=rf"{re.escape(name)}: not found.*run `mrl \w+ --out"):
        report(out, overwrite=True)


def test_report__protocol_that_is_no_mapping(out):
    (out / "protocol.yaml").write_text("- a\n")
    with pytest.raises(ConfigError, match="not a mapping"):
        report(out, overwrite=True)


OPTIONAL = ["plan.json", "calibration.json", "export.json", "predictions.csv", "arms/baseline", "arms/mrl"]


@pytest.mark.parametrize("lang", LANGUAGES)
@pytest.mark.parametrize("names", [[name] for name in OPTIONAL] + [OPTIONAL])
def test_report__a_missing_file_is_named_and_never_a_crash(out, names, lang):
    for name in names:
        shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink()
    found = page(out, lang=lang)
    said = found.said("main")
    expected = [n for n in names if not n.startswith("arms") and n != "export.json"]
    assert all(name in said for name in expected)
    assert Words(lang)("missing") in said
    assert not NOTHING.search(said.replace("None of these", ""))


def _without_numbers(value):
    """The same structure with every float and count gone, as after a step that measured nothing."""
    if isinstance(value, dict):
        return {k: _without_numbers(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_numbers(v) for v in value]
    return None if isinstance(value, (int, float)) and not isinstance(value, bool) else value


@pytest.mark.parametrize("lang", LANGUAGES)
def test_report__numbers_that_were_not_measured(out, lang):
    for name in (
        "measure.json",
        "calibration.json",
        "plan.json",
        "export.json",
        "arms/mrl/fit.json",
        "arms/baseline/fit.json",
    ):
        path = out / name
        path.write_text(json.dumps(_without_numbers(read_json(path))))

    def empty(c):
        for key in ("secondary", "disagreement", "more_images"):
            c[key] = _without_numbers(c[key])
        for arm in c["arms"].values():
            for key in ("metrics", "intervals", "per_class", "linear_probe", "low", "high"):
                arm[key] = _without_numbers(arm[key])
        c["difference"] |= {"low": math.nan, "high": math.nan}
        c["verdict"] = "inconclusive"

    replace_json(out / "comparison.json", empty)
    found = page(out, lang=lang)
    said = found.said()
    assert said.count(Words(lang)("missing")) > 20
    assert not NOTHING.search(re.sub("None of these|sha256: .*", "", said, flags=re.DOTALL))
    assert Words(lang)("decision.inconclusive") in said


def test_report__a_verdict_on_time_that_is_missing(out):
    replace_json(
        out / "measure.json", lambda m: m.update(rows=[], verdict=None, latency_ratio=None, million_images_hours=None)
    )
    found = page(out)
    assert read_json(out / "report.json")["latency_ratio"] == {"estimate": None, "low": None, "high": None}
    assert "there is no timing on which to decide" in found.said()


HOSTILE = ('<b>"bold"&', "<svg onload='x'>", "good`x`{y}%s")


@pytest.mark.parametrize("lang", LANGUAGES)
def test_report__names_of_others_are_escaped(tmp_path, lang):
    out = build_run(tmp_path, "no-go", classes=HOSTILE, n_test=60)
    replace_json(out / "audit.json", lambda a: a["warnings"].append("<script>alert(1)</script> `code`"))
    found = page(out, lang=lang, currency="<i>", price_per_hour=2.0)
    assert {tag for tag, _ in found.elements} <= ALLOWED
    handlers = [(tag, name) for tag, own in found.elements for name in own if name.startswith("on")]
    assert handlers == []
    said = found.said()
    assert all(name in said for name in HOSTILE[:2])
    assert "<script>alert(1)</script>" in said
    assert "<i>" in said


@pytest.mark.parametrize("classes", [("割れ", "良品", "傷・汚れ"), ("ügly", "ok✓", "Ελλάδα")])
def test_report__names_in_other_scripts(tmp_path, classes):
    out = build_run(tmp_path, classes=classes, n_test=60)
    found = page(out, lang="ja")
    assert all(name in found.said() for name in classes)
    assert any(tag == "img" for tag, _ in found.elements)


def test_report__is_self_contained(runs):
    html = report(runs["go"], overwrite=True, price_per_hour=2.5, currency="€").read_text(encoding="utf-8")
    found = Page(html)
    assert {tag for tag, _ in found.elements} <= ALLOWED  # no script, link, iframe, object, form
    policy = next(own["content"] for tag, own in found.elements if own.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert "script" not in policy
    for tag, own in found.elements:
        assert own.get("src", "data:").startswith("data:"), tag
        assert own.get("href", "#").startswith("#"), tag
    assert "url(http" not in html
    assert "@import" not in html
    assert "//" not in re.sub(r"data:image/jpeg;base64,[A-Za-z0-9+/=]*", "", html).replace("</", "")
    assert len(html) < 8e6


def test_report__anchors_lead_somewhere(pages):
    for found in pages.values():
        ids = [own["id"] for _, own in found.elements if "id" in own]
        assert len(ids) == len(set(ids))
        assert all(own["href"][1:] in ids for tag, own in found.elements if tag == "a")


def test_report__accessible(pages):
    for (_, lang), found in pages.items():
        elements = found.elements
        assert next(own for tag, own in elements if tag == "html")["lang"] == lang
        assert [tag for tag, _ in elements].count("h1") == [tag for tag, _ in elements].count("main") == 1
        assert all(own.get("alt") for tag, own in elements if tag == "img")
        assert all(own.get("aria-label") or own.get("aria-hidden") for tag, own in elements if tag == "svg")
        assert all(own.get("scope") for tag, own in elements if tag == "th")


@pytest.mark.parametrize("lang", LANGUAGES)
@pytest.mark.parametrize("decision", DECISIONS)
def test_front__decision_and_three_numbers_with_intervals(runs, pages, decision, lang):
    words, said = Words(lang), pages[decision, lang].said("main")
    data = collect_report(runs[decision])
    assert words(f"decision.{decision}") in pages[decision, lang].said("strong")
    assert words(f"decision.{decision}_action") in pages[decision, lang].said("h1")
    others = [words(f"decision.{d}_action") for d in DECISIONS if d != decision]
    assert not any(other in said for other in others)
    for arm in ("baseline", "mrl"):
        numbers = data["arms"][arm]
        assert words.percent(numbers["estimate"]) in said
        assert words.interval(numbers["low"], numbers["high"], "percent") in said
    assert words.points(data["difference"]["estimate"]) in said
    assert words(f"quality.{data['verdict']['quality']}") in said
    assert words.ratio(data["latency_ratio"]["estimate"]) in said
    assert words(f"cost.{data['verdict']['cost']}") in said
    assert [f"{100 * x:.1f}" in said for x in data["mde"]["by_disagreement"].values()] == [True] * 3
    assert "240" in said


def test_front__next_step_follows_the_decision_and_the_measurements(pages):
    go, no_go, open_ = (pages[d, "en"].said("ol") for d in DECISIONS)
    assert "Shadow run" in go
    assert "model.onnx (the MRL arm" in go
    assert "arms/baseline/model" in go
    assert "model.onnx is the Baseline arm" in no_go
    assert "81\u202f% of the baseline's time at 448 px" in no_go  # the smallest at which MRL is faster
    assert re.search(r"label about \d+ more test images", open_)
    assert "Measure the time again" in open_


def test_front__no_size_at_which_mrl_is_faster(runs, tmp_path):
    shutil.copytree(runs["no-go"], tmp_path / "run")
    slow = {"estimate": 1.1, "low": 1.05, "high": 1.2}
    replace_json(tmp_path / "run" / "measure.json", lambda m: [row.update(ratio=slow) for row in m["rows"]])
    assert "at none of the sizes measured (112, 224, 448, 896) was it clearly faster" in page(tmp_path / "run").said(
        "ol"
    )


def test_front__better_and_slower_asks_for_a_price_of_quality(out):
    up = {"estimate": 0.04, "low": 0.01, "high": 0.07}
    replace_json(out / "comparison.json", lambda c: c.update(difference=up, verdict="superior"))
    replace_json(
        out / "measure.json",
        lambda m: m.update(verdict="slower", latency_ratio={"estimate": 1.3, "low": 1.2, "high": 1.4}),
    )
    assert "--max-slowdown" in page(out).said("ol")


def test_front__calibration_stands_beside_the_fit(pages):
    said = pages["go", "en"].said("table")
    assert "Calibration before it none needed 44 s 320 updates" in said


def test_front__price(out):
    hours = read_json(out / "measure.json")["million_images_hours"]
    said = page(out, price_per_hour=1.5, currency="€").said("table")
    for arm in ("baseline", "mrl"):
        assert f"€{1.5 * hours[arm]['estimate']:.2f}" in said
    assert "€" not in page(out).said()


def test_front__interval_is_not_rounded_across_what_it_is_compared_with(out):
    replace_json(
        out / "comparison.json",
        lambda c: c.update(difference={"estimate": 0.02, "low": 0.0004, "high": 0.04}, verdict="superior"),
    )
    assert "+0.04 to +4.00" in page(out).said("div")


def test_audit__every_bad_file_is_listed_and_page_one_says_so(runs, pages):
    audit = read_json(runs["go"] / "audit.json")
    said = pages["go", "en"].said()
    for item in audit["bad"]:
        assert item["image"] in said
        assert item["reason"] in said
    for conflict in audit["conflicts"]:
        assert all(image in said for image in conflict["images"])
    assert "4 files could not be used" in pages["go", "en"].said("p")


def test_audit__nothing_bad(tmp_path):
    said = page(build_run(tmp_path, bad=False, n_test=60)).said()
    assert "could not be used and were left out" not in said
    assert "Files that could not be used: all" not in said


def test_protocol__a_change_is_visible(out):
    text = (out / "protocol.yaml").read_text().replace("margin: 0.06", "margin: 0.07")
    (out / "protocol.yaml").write_text(text)
    replace_json(out / "measure.json", lambda m: m.update(protocol_sha256="0" * 64))
    said = page(out).said("p")
    assert "The protocol was changed after results were written (protocol.yaml, measure.json)" in said
    assert read_json(out / "report.json")["protocol_changed"] == ["protocol.yaml", "measure.json"]


def test_scores__below_the_linear_probe(runs, pages):
    assert (
        collect_report(runs["no-go"])["arms"]["mrl"]["linear_probe"]
        > collect_report(runs["no-go"])["arms"]["mrl"]["estimate"]
    )
    assert "MRL ends below its own linear probe" in pages["no-go", "en"].said("p")
    assert "MRL ends below" not in pages["go", "en"].said("p")


def test_scores__the_probe_itself_was_kept(out):
    replace_json(out / "arms" / "mrl" / "fit.json", lambda f: f.update(below_linear_probe=True))
    assert "No fine-tuned candidate of MRL reached its linear probe" in page(out).said("p")


@pytest.mark.parametrize("n", [2, 14, 70])
def test_report__any_number_of_classes(tmp_path, n):
    out = build_run(tmp_path, classes=tuple(f"class {i:02d}" for i in range(n)), n_test=max(60, 2 * n))
    found = page(out)
    said = found.said()
    assert ("0.962" in said) == (n == 2)  # AUROC and DeLong
    assert ("class 13" in said) == (n > 13)
    assert ("truth ↓ / answer →" in said) == (n == 2)


def test_figures__are_well_formed(pages, runs):
    for lang in LANGUAGES:
        html = report(runs["go"], lang=lang, overwrite=True).read_text(encoding="utf-8")
        drawings = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
        assert len(drawings) > 8
        for drawing in drawings:
            root = ElementTree.fromstring(drawing)
            assert all(
                math.isfinite(float(v)) for e in root.iter() for k, v in e.items() if k in ("x", "y", "cx", "cy", "x1")
            )


def test_languages__same_keys_and_braces():
    en, ja = table("en"), table("ja")
    assert en.keys() == ja.keys()
    assert {k: fields(v) for k, v in en.items()} == {k: fields(v) for k, v in ja.items()}


def test_languages__japanese_is_japanese():
    same = {k for k, v in table("ja").items() if not JAPANESE.search(v)}
    allowed = {
        k
        for k in same
        if k.split(".")[0] in ("backend", "environment", "unit", "arm", "metric", "glossary", "decision")
    }
    rest = same - allowed
    assert {table("ja")[k] for k in rest} <= {"GMACs", "protocol.yaml", "{name}", "{x}（p = {p}）"}
    english = {
        k: v
        for k, v in table("ja").items()
        if re.search(r"([A-Za-z]+ ){3,}[A-Za-z]+", v.replace("Mixing Regionally and Locally", ""))
    }
    assert english == {}


@pytest.mark.parametrize("decision", DECISIONS)
def test_languages__no_english_sentence_remains_in_the_japanese_page(pages, decision):
    found = pages[decision, "ja"]
    for text, inside, marked in found.texts:
        if {"h1", "h2", "h3"} & set(inside):
            assert JAPANESE.search(text) or re.fullmatch(r"\d+", text), text
        if not marked and "style" not in inside and "svg" not in inside:
            plain = text.replace("Mixing Regionally and Locally", "").replace("Example CPU at 2.5 GHz", "")
            plain = plain.replace("12 bytes are missing", "")
            assert not re.search(r"([A-Za-z]{2,} ){3,}[A-Za-z]{2,}", plain), text
    assert not any(tag == "li" and own.get("lang") == "en" for tag, own in found.elements)


def test_reasons__every_sentence_of_the_decision_is_translated():
    for lang in LANGUAGES:
        texts = table(lang)
        for key, sentence in SENTENCES.items():
            assert fields(texts[f"reason.{key}"]) <= fields(sentence) | {"metric"}, key
        assert {k.removeprefix("reason.") for k in texts if k.startswith("reason.")} == set(SENTENCES)


def _warnings_of_the_code():
    """Warnings as the code writes them today, from small cases."""
    from mrl.compare import compare_predictions
    from mrl.data.elpv import WARNING

    def rows(n, wrong):
        for i in range(n):
            for arm in ("baseline", "mrl"):
                right = (i % 7 != 0) if arm == "baseline" else i not in wrong
                p = 0.8 if (i % 2 == 0) == right else 0.2
                yield {"image": str(i), "target": "ab"[i % 2], "arm": arm, "p_a": p, "p_b": 1 - p}

    found = [WARNING]
    for n, wrong in ((12, ()), (40, (1, 2, 3)), (60, tuple(range(0, 60, 2)))):
        probes = {"baseline": 0.99, "mrl": 0.99}
        data = list(rows(n, wrong))
        found += compare_predictions(data, metric="accuracy", margin=0.03, n_resamples=100, linear_probes=probes)[
            "warnings"
        ]
    return found


def _audit_sentences(folder):
    """Warnings and reasons of an audit that finds everything there is to find."""
    from mrl.data import audit_source, load_source

    rng = np.random.default_rng(0)
    for label in ("crack", "good"):
        (folder / label).mkdir(parents=True)
        for n in range(4):
            Image.fromarray(rng.integers(0, 255, (32, 32), dtype=np.uint8)).save(folder / label / f"{n}.png")
    (folder / "empty").mkdir()
    (folder / "good" / "list.txt").write_text("not an image by name")
    (folder / "good" / "text.png").write_text("not an image")
    (folder / "good" / "none.png").write_bytes(b"")
    (folder / "good" / "cut.png").write_bytes((folder / "good" / "0.png").read_bytes()[:-60])
    shutil.copy(folder / "good" / "1.png", folder / "good" / "copy.png")
    shutil.copy(folder / "good" / "2.png", folder / "crack" / "other.png")
    found = audit_source(load_source(folder), on_bad="skip")
    return [*found.warnings, *(bad.reason for bad in found.bad)]


def test_warnings__known_ones_are_said_in_japanese(tmp_path):
    words, found = Words("ja"), _warnings_of_the_code() + _audit_sentences(tmp_path / "images")
    assert len(found) >= 14
    for text in found:
        translated = said(words, text)
        assert not translated["foreign"], text
        assert JAPANESE.search(translated["text"])


def test_warnings__unknown_ones_stay_english_and_marked(out):
    replace_json(out / "audit.json", lambda a: a.update(warnings=["Nobody has a table for this one."]))
    found = page(out, lang="ja")
    assert ("li", {"lang": "en"}) in found.elements
    assert "Nobody has a table for this one." in found.said()


def test_warnings__page_one_has_the_first_and_says_where_the_others_are(out):
    replace_json(out / "audit.json", lambda a: a.update(warnings=[f"Warning number {i}." for i in range(9)]))
    assert "7 more in section 1" in page(out).said("li")


def test_disagreements__largest_difference_in_confidence_first():
    def row(image, arm, p):
        return {"image": image, "target": "a", "arm": arm, "repeat": "0", "p_a": str(p), "p_b": str(1 - p)}

    rows = [row("x", "baseline", 0.6), row("x", "mrl", 0.4), row("y", "baseline", 0.1), row("y", "mrl", 0.9)]
    rows += [row("same", "baseline", 0.9), row("same", "mrl", 0.6), row("lone", "mrl", 0.2)]
    rows += [row("x", "mrl", 0.99)]  # a second repeat of an image changes nothing
    found = disagreements(rows)
    assert [item.image for item in found] == ["y", "x"]
    assert [item.kind for item in found] == ["mrl", "baseline"]
    assert found[0].answers == {"baseline": ("b", 0.9), "mrl": ("a", 0.9)}


def test_thumbnails__files_are_read_and_never_written(out, runs):
    data = runs["go"].parent / "data"
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in data.rglob("*.png")}
    found = page(out)
    shown = [own["src"] for tag, own in found.elements if tag == "img"]
    assert len(shown) == 24
    assert all(uri.startswith("data:image/jpeg;base64,") for uri in shown)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in data.rglob("*.png")} == before


def test_thumbnails__a_file_that_is_gone_or_changed_is_not_shown(tmp_path):
    out = build_run(tmp_path, n_test=60)
    names = [row["image"] for row in read_csv(out / "split.csv") if row["split"] == "test"][:3]
    (tmp_path / "data" / names[0]).unlink()
    (tmp_path / "data" / names[1]).write_bytes((tmp_path / "data" / names[2]).read_bytes())
    found = thumbnails(read_run(out), names)
    assert [found[name]["reason"] for name in names] == ["gone", "changed", ""]
    assert [found[name]["uri"] is None for name in names] == [True, True, False]


def test_thumbnails__source_that_is_gone(out):
    text = yaml.safe_load((out / "protocol.yaml").read_text())
    text["data"]["source"] = "/nowhere/at/all"
    (out / "protocol.yaml").write_text(yaml.safe_dump(text))
    found = page(out)
    assert not any(tag == "img" for tag, _ in found.elements)
    assert "No picture:" in found.said()


@pytest.mark.parametrize("shape", [(3, 300, 200), (3, 1, 500), (3, 4, 4)])
def test_data_uri__small_whatever_the_shape(shape):
    uri = data_uri(torch.rand(shape))
    assert uri.startswith("data:image/jpeg;base64,")
    assert len(uri) < 60_000


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda w: w.percent(0.8667), "86.7\u202f%"),
        (lambda w: w.points(-0.0004), "0.0\u00a0points"),
        (lambda w: w.points(0.012), "+1.2\u00a0points"),
        (lambda w: w.ratio(0.72), "0.72\u202f×"),
        (lambda w: w.ms(9.1234), "9.12\u202fms"),
        (lambda w: w.ms(1089.4), "1,089\u202fms"),
        (lambda w: w.duration(3.21), "3.2 s"),
        (lambda w: w.duration(59.6), "1 min 00 s"),
        (lambda w: w.duration(41.0), "41 s"),
        (lambda w: w.duration(3599.9), "1 h 00 min"),
        (lambda w: w.duration(3750), "1 h 02 min"),
        (lambda w: w.money(3.041, "€"), "€3.04"),
        (lambda w: w.money(1234.4, "JPY"), "JPY\u202f1,234"),
        (lambda w: w.p_value(0.0002), "<\u00a00.001"),
        (lambda w: w.number(math.inf), "not measured"),
        (lambda w: w.interval(None, 1.0, "percent"), "not measured"),
        (lambda w: w.interval(0.9996, 1.0, "ratio", (1.0,)), "0.9996 to 1.0000\u202f×"),
        (lambda w: w.listed(list("abc"), 2), "a, b and 1 more"),
    ],
)
def test_words__numbers(call, text):
    assert call(Words("en")) == text
