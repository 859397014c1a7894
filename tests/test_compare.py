import json
import time
from types import SimpleNamespace

import numpy as np
import pytest

from mrl.compare import compare, compare_predictions, decision_of
from mrl.decision import SENTENCES
from mrl.errors import ConfigError, DataError
from mrl.pairs import join_groups, pair_predictions
from mrl.protocol import Protocol, write_protocol
from mrl.run import write_csv, write_json
from mrl.stats import mcnemar_exact, newcombe_paired, wilson

FAST = {"metric": "accuracy", "margin": 0.03, "n_resamples": 500}


def make_rows(n=200, k=2, noise=0.8, shift=0.0, seed=0, bias=0.0):
    """Predictions of two arms whose logits are alike but for `noise`; `shift` makes mrl better."""
    rng = np.random.default_rng(seed)
    target = rng.integers(k, size=n)
    logits = rng.normal(size=(n, k))
    logits[np.arange(n), target] += 1.5
    other = logits + noise * rng.normal(size=(n, k))
    other[np.arange(n), target] += shift
    rows = []
    for arm, values in (("baseline", logits), ("mrl", other)):
        p = np.exp(values) / np.exp(values).sum(1, keepdims=True)
        for i in range(n):
            head = {"image": f"i{i:04}.png", "target": f"c{target[i]}", "arm": arm}
            head |= {"repeat": "0", "fold": "0", "seed": "0"}
            rows.append({**head, **{f"p_c{j}": repr(float(p[i, j])) for j in range(k)}})
    return rows


def make_answers(cells, n_classes=2):
    """Predictions from counts (both right, b, c, both wrong); targets alternate within each cell."""
    rows = []
    kinds = [kind for kind, count in zip(((1, 1), (1, 0), (0, 1), (0, 0)), cells, strict=True) for _ in range(count)]
    for i, kind in enumerate(kinds):
        target = i % n_classes
        for arm, right in zip(("baseline", "mrl"), kind, strict=True):
            answer = target if right else (target + 1) % n_classes
            p = {f"p_c{j}": 0.7 if j == answer else 0.3 / (n_classes - 1) for j in range(n_classes)}
            rows.append(
                {"image": f"i{i:04}", "target": f"c{target}", "arm": arm, "repeat": 0, "fold": 0, "seed": 0, **p}
            )
    return rows


# pair_predictions


def test_pair_predictions__order_does_not_matter():
    rows = make_rows(40)
    pairs, shuffled = pair_predictions(rows), pair_predictions(list(np.random.default_rng(0).permutation(rows)))
    assert pairs.images == shuffled.images
    assert np.array_equal(pairs.probabilities["mrl"], shuffled.probabilities["mrl"])
    assert pairs.n_units == pairs.n == 40


def broken(change):
    rows = make_rows(30)
    change(rows)
    return rows


def _drop_column(rows):
    for row in rows:
        del row["p_c1"]


def _set(index, **values):
    return lambda rows: rows[index].update(values)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda rows: rows.clear(), "no rows"),
        (lambda rows: rows.pop(), "i0029.png scored by one arm only"),
        (lambda rows: rows.append(dict(rows[3])), r"i0003.png \(baseline\) more than once"),
        (_set(0, target="c0 "), "different targets for i0000.png"),
        (lambda rows: [row.update(target="x") for row in rows[::30]], "i0000.png has no column"),
        (_set(5, p_c0="0.7", p_c1="0.4"), "arm baseline for i0005.png"),
        (_set(35, p_c0="nan"), "arm mrl for i0005.png"),
        (_set(35, p_c0="1.5", p_c1="-0.5"), "arm mrl for i0005.png"),
        (_set(5, p_c0="high"), "not a number"),
        (_set(5, p_c2="0.0"), "row 7"),
        (_set(5, p_c1=None), "row 7"),
        (_drop_column, "p_<class>"),
        (lambda rows: [row.update(arm="other") for row in rows[30:]], r"arms \['baseline', 'other'\]"),
        (_set(5, fold="1"), "hold-outs"),
    ],
)
def test_pair_predictions__refuses(change, says):
    with pytest.raises(DataError, match=says):
        pair_predictions(broken(change))


def test_pair_predictions__many_names_are_cut():
    rows = make_rows(30)[:45]
    with pytest.raises(DataError, match="and 10 more"):
        pair_predictions(rows)


def test_pair_predictions__groups():
    pairs = pair_predictions(
        make_rows(6), {"i0000.png": "a", "i0003.png": "a", "i0004.png": None, "elsewhere.png": "a"}
    )
    assert pairs.grouped
    assert pairs.n_units == 5
    assert pairs.unit[0] == pairs.unit[3]


def test_pair_predictions__a_group_named_like_an_image_is_not_that_image():
    assert pair_predictions(make_rows(3), {"i0000.png": "i0001.png"}).n_units == 3


def test_join_groups__through_others():
    joined = join_groups([["a", "b"], ["c", "d"], ["e"], ["d", "b"]])
    assert joined["a"] == joined["b"] == joined["c"] == joined["d"] != joined["e"]


# compare_predictions


def test_compare_predictions__layout():
    result = compare_predictions(make_rows(), **FAST)
    assert {"schema", "metric", "margin", "alpha", "method", "n", "n_groups", "arms", "difference", "verdict"} <= set(
        result
    )
    assert {"more_images", "secondary", "flips", "disagreement", "warnings", "scope"} <= set(result)
    arm = result["arms"]["mrl"]
    assert set(arm["metrics"]) == set(arm["intervals"]) == {"accuracy", "balanced_accuracy", "macro_f1", "auroc", "ece"}
    assert sum(map(sum, arm["confusion"]["counts"])) == result["n"] == result["n_groups"] == 200
    assert result["difference"]["method"] == result["method"] == "bca"
    assert [row["class"] for row in result["secondary"]["holm"]] == ["c0", "c1"]
    json.dumps(result, allow_nan=False)


def test_compare_predictions__numbers_agree_with_each_other():
    result = compare_predictions(make_rows(shift=0.3), **FAST)
    base, mrl = (result["arms"][arm] for arm in ("baseline", "mrl"))
    secondary, n = result["secondary"], result["n"]
    b, c = secondary["mcnemar"]["b"], secondary["mcnemar"]["c"]
    assert result["difference"]["estimate"] == pytest.approx(mrl["estimate"] - base["estimate"])
    assert result["difference"]["estimate"] == pytest.approx((c - b) / n)
    assert (len(result["flips"]["right_to_wrong"]), len(result["flips"]["wrong_to_right"])) == (b, c)
    assert result["disagreement"] == pytest.approx((b + c) / n)
    assert secondary["mcnemar"]["p_value"] == mcnemar_exact(b, c).p_value
    both = round(base["estimate"] * n) - b
    closed = newcombe_paired(both, b, c, n - both - b - c)
    assert (secondary["newcombe"]["low"], secondary["newcombe"]["high"]) == pytest.approx((closed.low, closed.high))
    assert base["low"] == wilson(round(base["estimate"] * n), n).low
    assert base["interval_method"] == "wilson"
    assert secondary["delong"]["difference"] == pytest.approx(secondary["auroc"]["estimate"])
    row = mrl["per_class"][1]
    counts = mrl["confusion"]["counts"][1]
    assert (row["n"], row["recall"]) == (sum(counts), pytest.approx(counts[1] / sum(counts)))


def test_compare_predictions__swapped_arms_mirror():
    rows = make_rows(300, shift=0.5)
    swapped = [{**row, "arm": {"mrl": "baseline", "baseline": "mrl"}[row["arm"]]} for row in rows]
    one, other = compare_predictions(rows, **FAST), compare_predictions(swapped, **FAST)
    assert one["difference"]["estimate"] == pytest.approx(-other["difference"]["estimate"])
    assert one["difference"]["low"] == pytest.approx(-other["difference"]["high"], abs=0.01)
    assert one["flips"]["right_to_wrong"] == other["flips"]["wrong_to_right"]


def test_compare_predictions__reproducible():
    assert compare_predictions(make_rows(), **FAST) == compare_predictions(make_rows(), **FAST)


@pytest.mark.parametrize(
    ("cells", "margin", "verdict"),
    [
        ((700, 20, 70, 210), 0.03, "superior"),
        ((800, 20, 22, 158), 0.03, "equivalent"),
        ((800, 60, 66, 74), 0.025, "non-inferior"),
        ((700, 100, 20, 180), 0.03, "inferior"),
        ((80, 10, 10, 0), 0.03, "inconclusive"),
    ],
)
def test_compare_predictions__verdicts(cells, margin, verdict):
    result = compare_predictions(make_answers(cells), metric="accuracy", margin=margin, n_resamples=2000)
    assert result["verdict"] == verdict
    assert (result["more_images"] is not None) == (verdict == "inconclusive")


def test_compare_predictions__no_disagreement_is_not_certainty():
    result = compare_predictions(make_answers((45, 0, 0, 5)), **FAST)
    assert result["method"] == "newcombe"
    assert result["difference"]["low"] < -0.03
    assert result["difference"]["high"] > 0.03
    assert result["verdict"] == "inconclusive"
    assert result["more_images"] > 0
    assert any("too few for a bootstrap" in text for text in result["warnings"])
    assert result["secondary"]["accuracy"] == {"estimate": 0, "low": None, "high": None, "method": "degenerate"}
    assert result["secondary"]["delong"]["p_value"] is None


def test_compare_predictions__few_one_sided_disagreements_are_not_superior():
    # 4 against 0: McNemar's p is 0.125, but the bootstrap's interval lies above zero.
    result = compare_predictions(make_answers((560, 0, 4, 92)), **FAST)
    assert result["secondary"]["accuracy"]["low"] > 0
    assert result["verdict"] == "equivalent"


def test_compare_predictions__balanced_accuracy_falls_back_by_class():
    result = compare_predictions(make_answers((90, 2, 3, 5)), **{**FAST, "metric": "balanced_accuracy"})
    assert result["method"] == "newcombe_combined"
    assert result["difference"]["low"] < 0 < result["difference"]["high"]


def test_compare_predictions__perfect_arms_keep_a_width():
    result = compare_predictions(make_answers((60, 0, 0, 0)), **{**FAST, "metric": "balanced_accuracy"})
    arm = result["arms"]["mrl"]
    assert (arm["estimate"], arm["interval_method"]) == (1.0, "wilson_combined")
    assert arm["low"] < 0.96
    assert arm["intervals"]["auroc"]["low"] is None
    assert result["difference"]["low"] < -0.01


@pytest.mark.parametrize("metric", ["macro_f1", "auroc"])
def test_compare_predictions__same_predictions_give_no_interval(metric):
    result = compare_predictions(make_answers((90, 0, 0, 10)), **{**FAST, "metric": metric})
    assert result["difference"]["low"] is None
    assert result["verdict"] == "inconclusive"
    assert result["more_images"] is None
    assert any("No interval" in text for text in result["warnings"])


def test_compare_predictions__groups_widen_the_interval():
    # Every image ten times: ten times the images, no more knowledge.
    rows = make_rows(120)
    copies = [{**row, "image": f"{row['image']}#{i}"} for row in rows for i in range(10)]
    groups = {row["image"]: row["image"].split("#")[0] for row in copies}
    once, grouped, ignored = (
        compare_predictions(r, **{**FAST, "n_resamples": 3000}, groups=g)
        for r, g in ((rows, None), (copies, groups), (copies, None))
    )
    widths = [r["difference"]["high"] - r["difference"]["low"] for r in (once, grouped, ignored)]
    assert widths[1] == pytest.approx(widths[0], rel=0.1)
    assert widths[2] < 0.5 * widths[1]
    assert grouped["n_groups"] == 120
    assert grouped["unit"] == "group"
    assert grouped["secondary"]["delong"] is None
    assert grouped["secondary"]["mcnemar"]["p_value"] == once["secondary"]["mcnemar"]["p_value"]
    for key in ("low", "high"):
        assert grouped["secondary"]["newcombe"][key] == pytest.approx(once["secondary"]["newcombe"][key])
        assert grouped["arms"]["mrl"]["per_class"][0][key] == pytest.approx(once["arms"]["mrl"]["per_class"][0][key])
    assert grouped["arms"]["mrl"]["interval_method"] == "bca"


def test_compare_predictions__several_classes():
    result = compare_predictions(make_rows(150, k=4), **FAST)
    assert result["secondary"]["delong"] is None
    assert result["arms"]["mrl"]["metrics"]["auroc"] > 0.5
    assert all(row["adjusted"] >= row["p_value"] for row in result["secondary"]["holm"])


def test_compare_predictions__class_without_test_images():
    rows = [row for row in make_rows(150, k=3) if row["target"] != "c2"]
    result = compare_predictions(rows, **FAST)
    assert result["arms"]["mrl"]["metrics"]["auroc"] is None
    assert result["arms"]["mrl"]["per_class"][2] == {"class": "c2", "n": 0, "recall": None, "low": 0, "high": 1}
    assert any("c2 (0)" in text for text in result["warnings"])


def test_compare_predictions__warns_of_arms_that_know_nothing():
    result = compare_predictions(make_answers((50, 50, 50, 50)), **FAST)
    assert sum("always giving the same answer" in text for text in result["warnings"]) == 2


def test_compare_predictions__warns_below_the_linear_probe():
    result = compare_predictions(make_rows(), **FAST, linear_probes={"baseline": 0.99, "mrl": 0.1})
    assert [text.split()[1] for text in result["warnings"] if "linear probe" in text] == ["baseline"]
    assert result["arms"]["mrl"]["linear_probe"] == 0.1


def test_compare_predictions__warns_where_interval_and_exact_test_differ():
    result = compare_predictions(make_answers((560, 7, 18, 92)), **{**FAST, "n_resamples": 4000})
    p, superior = result["secondary"]["mcnemar"]["p_value"], result["verdict"] == "superior"
    assert p == pytest.approx(0.0433, abs=1e-4)
    assert superior
    assert not any("borderline" in text for text in result["warnings"])
    result = compare_predictions(make_answers((560, 8, 19, 92)), **{**FAST, "n_resamples": 4000})
    assert result["verdict"] == "superior"
    assert result["secondary"]["mcnemar"]["p_value"] > 0.05
    assert any("borderline" in text for text in result["warnings"])


def test_compare_predictions__refuses():
    with pytest.raises(ConfigError, match="ece"):
        compare_predictions(make_rows(), metric="ece", margin=0.03)
    with pytest.raises(DataError, match="one group"):
        compare_predictions(make_rows(5), **FAST, groups={f"i{i:04}.png": "lot" for i in range(5)})


def test_compare_predictions__fast_enough():
    start = time.process_time()
    compare_predictions(make_rows(656), metric="accuracy", margin=0.03, n_resamples=10_000)
    assert time.process_time() - start < 10


# compare


@pytest.fixture
def out(tmp_path):
    rows = make_rows(60)
    write_csv(tmp_path / "predictions.csv", list(rows[0]), [list(row.values()) for row in rows])
    split = [(row["image"], row["target"], "", f"hash{i}", "test") for i, row in enumerate(rows[:60])]
    split.append(("train.png", "c0", "", "hash0", "train"))
    write_csv(tmp_path / "split.csv", ["image", "label", "group", "sha256", "split"], split)
    write_protocol(tmp_path, Protocol(data={"n": 61}, model="test_vit", margin=0.05))
    return tmp_path


def test_compare__writes_the_file(out):
    result = compare(out)
    written = json.loads((out / "comparison.json").read_text())
    assert written == json.loads(json.dumps(result))
    assert written["margin"] == 0.05
    assert written["n_groups"] == 60
    assert len(written["protocol_sha256"]) == 64
    assert "python" in written["environment"]


def test_compare__refuses_to_overwrite(out):
    compare(out)
    with pytest.raises(ConfigError, match="--overwrite"):
        compare(out)
    compare(out, overwrite=True)


def test_compare__groups_hashes_and_duplicates_are_units(out):
    text = (out / "split.csv").read_text().replace("hash1,", "hash0,")  # image 1 is a copy of image 0's file
    for i in (1, 2):
        text = text.replace(f",,hash{i},", f",lot,hash{i},")
    lines = [
        line.replace(",,hash0,", ",lot,hash0,") if line.startswith("i0001") else line for line in text.splitlines()
    ]
    (out / "split.csv").write_text("\n".join(lines) + "\n")
    write_json(
        out / "audit.json", {"exact_duplicates": [["i0002.png", "i0005.png", "train.png"], ["i0007.png", "i0008.png"]]}
    )
    # {0, 1} by hash, {1, 2} by lot, {2, 5} by pixels: one unit of four; {7, 8} another.
    assert compare(out)["n_groups"] == 60 - 3 - 1


def test_compare__reads_linear_probes_and_warns_of_another_protocol(out):
    write_json(out / "evaluation.json", {"protocol_sha256": "0", "arms": {"mrl": {"linear_probe": 0.5}}})
    result = compare(out)
    assert result["arms"]["mrl"]["linear_probe"] == 0.5
    assert result["arms"]["baseline"]["linear_probe"] is None
    assert any("another protocol" in text for text in result["warnings"])


def test_compare__warns_of_a_changed_protocol(out):
    text = (out / "protocol.yaml").read_text()
    (out / "protocol.yaml").write_text(text.replace("margin: 0.05", "margin: 0.2"))
    result = compare(out)
    assert result["margin"] == 0.2
    assert any("was changed" in text for text in result["warnings"])


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [("i0003.png,c", "other.png,c", "lacks 0 images|other.png"), ("hash3,test", "hash3,train", "1 others")],
)
def test_compare__refuses_another_test_side(out, old, new, says):
    text = (out / "split.csv").read_text()
    assert old in text
    (out / "split.csv").write_text(text.replace(old, new))
    with pytest.raises(DataError, match=says):
        compare(out)
    assert not (out / "comparison.json").exists()


def test_compare__refuses_missing_predictions_and_other_labels(out):
    rows = make_rows(60)
    kept = [row for row in rows if row["image"] != "i0003.png"]
    write_csv(out / "predictions.csv", list(rows[0]), [list(row.values()) for row in kept])
    with pytest.raises(DataError, match="lacks 1 images"):
        compare(out)
    turned = [{**row, "target": {"c0": "c1", "c1": "c0"}[row["target"]]} for row in rows]
    write_csv(out / "predictions.csv", list(rows[0]), [list(row.values()) for row in turned])
    with pytest.raises(DataError, match="other targets than split"):
        compare(out)


def test_compare__names_the_missing_file(out):
    (out / "predictions.csv").unlink()
    with pytest.raises(ConfigError, match=r"predictions.csv: not found"):
        compare(out)


# decision_of

COMPARISON = {
    "metric": "accuracy",
    "margin": 0.03,
    "alpha": 0.05,
    "n": 656,
    "verdict": "equivalent",
    "arms": {"baseline": {"estimate": 0.8613}, "mrl": {"estimate": 0.8629}},
    "difference": {"estimate": 0.0016, "low": -0.012, "high": 0.0168},
    "more_images": None,
}
MEASURE = {
    "verdict": "faster",
    "latency_ratio": {"estimate": 0.8, "low": 0.78, "high": 0.83},
    "rows": [
        {"backend": "eager", "batch": 8, "image_size": 224, "decides": False},
        {"backend": "onnxruntime", "batch": 1, "image_size": 112, "decides": True},
    ],
}


def decided(comparison=None, measure=None, max_slowdown=1.0):
    protocol = SimpleNamespace(max_slowdown=max_slowdown)
    return decision_of({**COMPARISON, **(comparison or {})}, {**MEASURE, **(measure or {})}, protocol)


def interval(estimate, low, high):
    return {"estimate": estimate, "low": low, "high": high}


def test_decision_of__go_with_all_numbers():
    found = decided()
    assert found["decision"] == "go"
    assert found["reasons"] == [
        "On 656 test images the accuracy is 86.3 % with MRL and 86.1 % without: a difference of +0.2 points "
        "(95 % interval -1.2 to +1.7).",
        "The whole interval lies within the margin of 3 points that was fixed before training: the two are equivalent.",
        "One image takes 0.80 times as long with MRL as without (95 % interval 0.78 to 0.83; ONNX Runtime, batch 1, "
        "112 px): faster.",
        "Go: the quality holds (equivalent) and it is faster.",
    ]


def test_decision_of__keys_fill_the_sentences():
    found = decided()
    assert found["reasons"] == [SENTENCES[item["key"]].format(**item["params"]) for item in found["reason_keys"]]
    json.dumps(found)


@pytest.mark.parametrize(
    ("comparison", "says"),
    [
        ({"verdict": "superior", "difference": interval(0.02, 0.0004, 0.04)}, "+0.04 to +4.00"),
        ({"verdict": "equivalent", "difference": interval(-0.015, -0.02, -0.01)}, "worse by less than"),
        ({"verdict": "non-inferior", "difference": interval(0.0, -0.0297, 0.04)}, "-2.97 to +4.00"),
        ({"verdict": "inferior", "difference": interval(-0.05, -0.08, -0.04)}, "below a loss of 3 points"),
        ({"verdict": "inferior", "difference": interval(-0.03, -0.05, -0.01)}, "is not ruled out: MRL is inferior"),
        ({"margin": 0.025}, "margin of 2.5 points"),
        ({"alpha": 0.1}, "(90 % interval"),
        ({"metric": "balanced_accuracy"}, "the balanced accuracy is"),
    ],
)
def test_decision_of__quality_sentences(comparison, says):
    assert says in " ".join(decided(comparison)["reasons"])


def test_decision_of__latency_has_its_own_level():
    found = decided({"alpha": 0.1})
    assert "(90 % interval" in found["reasons"][0]
    assert "(95 % interval" in found["reasons"][2]
    assert "(90 % interval" in decided(measure={"alpha": 0.1})["reasons"][2]


def test_decision_of__inconclusive_says_how_many_more():
    found = decided({"verdict": "inconclusive", "difference": interval(0.0, -0.05, 0.05), "more_images": 1234})
    assert found["decision"] == "inconclusive"
    assert "at least about 1,300 more test images" in " ".join(found["reasons"])


def test_decision_of__no_interval_concludes_nothing():
    found = decided({"verdict": "inconclusive", "difference": interval(0.0, None, None)})
    assert found["decision"] == "inconclusive"
    assert "nothing is concluded about quality" in found["reasons"][0]


@pytest.mark.parametrize(
    ("ratio", "verdict", "says"),
    [
        (interval(0.99, 0.985, 0.998), "faster", "0.985 to 0.998"),
        (interval(1.1, 1.05, 1.2), "slower", "): slower."),
        (interval(1.0, 0.9, 1.1), "not resolvable", "does not tell faster from slower"),
        (None, None, "No latency ratio was measured"),
        (interval(None, None, None), "not resolvable", "No latency ratio was measured"),
    ],
)
def test_decision_of__latency_sentences(ratio, verdict, says):
    assert says in " ".join(decided(measure={"latency_ratio": ratio, "verdict": verdict})["reasons"])


@pytest.mark.parametrize(("high", "decision"), [(1.19, "go"), (1.204, "inconclusive")])
def test_decision_of__max_slowdown(high, decision):
    superior = {"verdict": "superior", "difference": interval(0.03, 0.01, 0.05)}
    slower = {"verdict": "slower", "latency_ratio": interval(1.1, 1.05, high)}
    found = decided(superior, slower, max_slowdown=1.2)
    assert found["decision"] == decision
    assert "1.2" in found["reasons"][-1]
    assert decided(superior, slower)["decision"] == "inconclusive"


def test_decision_of__every_rule_has_its_sentence():
    for quality in ("superior", "equivalent", "non-inferior", "inferior", "inconclusive"):
        for cost, ratio in (("faster", (0.8, 0.9)), ("slower", (1.1, 1.2)), ("not resolvable", (0.9, 1.1))):
            found = decided({"verdict": quality}, {"verdict": cost, "latency_ratio": interval(1.0, *ratio)})
            word = {"go": "Go:", "no-go": "No-go:", "inconclusive": "Inconclusive:"}[found["decision"]]
            assert found["reasons"][-1].startswith(word)


def test_decision_of__from_a_real_comparison():
    comparison = compare_predictions(make_rows(300), **FAST)
    found = decision_of(comparison, MEASURE, Protocol(data={}, model="test_vit"))
    assert found["decision"] in ("go", "no-go", "inconclusive")
    assert len(found["reasons"]) == len(found["reason_keys"]) >= 4
    assert not any("nan" in text for text in found["reasons"])
