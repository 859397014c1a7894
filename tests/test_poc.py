"""The main job on generated images: end to end, resumed after a kill, and clear about wrong input."""

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mrl.cli import main

CALIBRATION = {"min-updates": "6", "epochs": "0.1", "feature-epochs": "0.1"}
QUICK = [
    "--image-size",
    "32",
    "--min-updates",
    "30",
    "--epochs",
    "1",
    *(w for k, v in CALIBRATION.items() for w in (f"--calibration.{k}", v)),
]


def draw(folder: Path, classes=("blank", "dot", "line"), n=16, seed=0) -> Path:
    """Noise with nothing, a dark square or a bright line on it."""
    rng = np.random.default_rng(seed)
    for kind, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(n):
            a = rng.normal(120, 10, (40, 48))
            if kind == 1:
                y, x = rng.integers(2, 26, 2)
                a[y : y + 12, x : x + 12] -= 90
            if kind == 2:
                a[rng.integers(4, 36)] += 110
            Image.fromarray(a.clip(0, 255).astype(np.uint8)).save(folder / name / f"{i:02}.png")
    return folder


@pytest.fixture(scope="module", autouse=True)
def _short_measurements():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mrl.results.MEASURE_SECONDS", 4.0)
        patch.setattr("mrl.results.OTHER_SIZES", (48,))
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return draw(tmp_path_factory.mktemp("images") / "data")


def command(data: Path, out: Path, *more: str) -> list[str]:
    return ["poc", "--model", "test_vit", "--data", str(data), "--region", "2", "--out", str(out), *QUICK, *more]


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main(command(data, out)) == 0
    return out


def numbers(out: Path) -> dict:
    """What must not depend on when a run was interrupted."""
    report = json.loads((out / "report.json").read_text())
    kept = {k: report[k] for k in ("metric", "margin", "difference", "mde", "protocol_sha256")}
    kept["quality"] = report["verdict"]["quality"]
    for arm, values in report["arms"].items():
        kept[arm] = {
            k: values[k] for k in ("estimate", "low", "high", "n", "metrics", "linear_probe", "gmacs", "params_m")
        }
    return kept


def test_poc__leaves_a_whole_run(finished):
    names = {p.name for p in finished.iterdir()}
    assert names >= {
        "report.html",
        "report.json",
        "model.onnx",
        "model.parity.json",
        "protocol.yaml",
        "split.csv",
        "audit.json",
    }
    report = json.loads((finished / "report.json").read_text())
    assert report["decision"] in ("go", "no-go", "inconclusive")
    assert report["reasons"]
    assert set(report["verdict"]) == {"quality", "cost"}
    assert report["exported_arm"] == ("mrl" if report["decision"] == "go" else "baseline")
    for arm in ("baseline", "mrl"):
        assert {
            "estimate",
            "low",
            "high",
            "n",
            "metrics",
            "linear_probe",
            "latency_ms_median",
            "gmacs",
            "params_m",
        } <= set(report["arms"][arm])
        assert {"accuracy", "balanced_accuracy"} <= set(report["arms"][arm]["metrics"])
    assert set(report["difference"]) >= {"estimate", "low", "high"}
    assert report["latency_ratio"]["low"] <= report["latency_ratio"]["estimate"] <= report["latency_ratio"]["high"]
    assert len(report["protocol_sha256"]) == 64
    header, *rows = (finished / "split.csv").read_text().splitlines()
    assert header == "image,label,group,sha256,split"
    assert len(rows) == 48
    assert not list(finished.rglob("*.part"))
    assert not (finished / "arms" / "mrl" / "checkpoint").exists()


def test_poc__a_finished_run_says_where_the_report_is(finished, data, capsys):
    before = (finished / "report.html").stat().st_mtime_ns
    assert main(command(data, finished)) == 0
    assert "report.html" in capsys.readouterr().err
    assert (finished / "report.html").stat().st_mtime_ns == before


def test_poc__another_protocol_in_the_same_folder_is_refused(finished, data, capsys):
    assert main([*command(data, finished), "--margin", "0.1"]) == 1
    assert "margin: 0.03 there, 0.1 asked" in capsys.readouterr().err


def test_predict__uses_the_exported_file_alone(finished, data, tmp_path):
    out = tmp_path / "x.csv"
    folder = shutil.copytree(data / "dot", tmp_path / "dot")
    (folder / "broken.png").write_bytes(b"not an image")
    assert main(["predict", str(finished / "model.onnx"), str(folder), "--out", str(out)]) == 0
    header, *rows = out.read_text().splitlines()
    assert header == "image,prediction,p_blank,p_dot,p_line,error"
    assert len(rows) == 17
    assert sum(bool(r.split(",")[-1]) for r in rows) == 1
    assert main(["predict", str(finished / "model.onnx"), str(folder), "--out", str(out)]) == 1


def test_verbs__refuse_only_where_their_own_output_exists(finished, tmp_path, capsys):
    out = shutil.copytree(finished, tmp_path / "run")
    for verb in ("evaluate", "compare", "measure", "export", "report", "fit", "split"):
        assert main([verb, "--out", str(out)]) == 1, verb
        assert "--overwrite" in capsys.readouterr().err
    (out / "report.html").unlink()
    (out / "report.json").unlink()
    assert main(["report", "--out", str(out), "--lang", "ja"]) == 0
    assert 'lang="ja"' in (out / "report.html").read_text(encoding="utf-8")
    (out / "comparison.json").unlink()
    assert main(["compare", "--out", str(out)]) == 0
    assert json.loads((out / "comparison.json").read_text()) == json.loads((finished / "comparison.json").read_text())
    assert main(["export", "--out", str(out), "--arm", "mrl", "--overwrite"]) == 0
    assert json.loads((out / "export.json").read_text())["arm"] == "mrl"
    assert main(["fit", "--out", str(out), "--region", "4"]) == 1
    assert "--region 4: the protocol" in capsys.readouterr().err


@pytest.mark.slow
def test_poc__killed_in_the_middle_of_an_arm_gives_the_same_numbers(finished, data, tmp_path):
    out = tmp_path / "run"
    words = [sys.executable, "-m", "mrl", *command(data, out)]
    first = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    log = out / "arms" / "mrl" / "metrics.jsonl"
    end = time.monotonic() + 200
    while time.monotonic() < end and not (log.is_file() and '"update": 17' in log.read_text()):
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert log.is_file()
    assert not (out / "arms" / "mrl" / "fit.json").exists(), "the kill came too late to test anything"
    assert main(command(data, out)) == 0
    assert numbers(out) == numbers(finished)
    assert (out / "predictions.csv").read_text() == (finished / "predictions.csv").read_text()


@pytest.mark.slow
def test_poc__bad_files_are_all_named_or_skipped_and_reported(data, tmp_path, capsys):
    bad = shutil.copytree(data, tmp_path / "bad")
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(
        bad / "dot" / "cut.jpg", quality=95
    )
    whole = (bad / "dot" / "cut.jpg").read_bytes()
    (bad / "dot" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    shutil.copy(bad / "line" / "03.png", bad / "blank" / "copy.png")
    (bad / "blank" / "notes.png").write_text("remember to label these")
    wide = (np.random.default_rng(2).random((40, 48)) * 65535).astype(np.uint16)
    Image.fromarray(wide).save(bad / "blank" / "wide.png")
    before = {p: p.read_bytes() for p in bad.rglob("*") if p.is_file()}
    assert main(command(bad, tmp_path / "run")) == 1
    said = capsys.readouterr().err
    for name in ("dot/cut.jpg", "blank/copy.png", "line/03.png", "blank/notes.png"):
        assert name in said
    assert "wide.png" not in said
    assert "--on-bad skip" in said
    assert main(command(bad, tmp_path / "run", "--on-bad", "skip")) == 0
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    audit = json.loads((tmp_path / "run" / "audit.json").read_text())
    for name in ("dot/cut.jpg", "blank/copy.png", "line/03.png", "blank/notes.png"):
        assert name in page
        assert name in audit["skipped"]
    assert audit["bit_depths"]["16"] == 1
    assert before == {p: p.read_bytes() for p in bad.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--model": "vit_smal_patch14_dinov2"}, "vit_small_patch14_dinov2"),
        ({"--region": "0"}, "--region 0"),
        ({"--swap": "fast"}, "faithful, cheap, paper or auto"),
        ({"--preset": "slow"}, "quick"),
        ({"--data": "EMPTY"}, "EMPTY"),
        ({"--data": "ONE_CLASS"}, "one class"),
        ({"--data": "ONE_IMAGE"}, "b has 1"),
        ({"--out": "FULL"}, "is not a run"),
        ({"--out": "FILE"}, "is a file"),
        ({"--weights": "BROKEN"}, "BROKEN"),
        ({"--weights": "missing.safetensors", "--weights-unseen": "true"}, "missing.safetensors"),
        ({"--image-size": "30"}, "30"),
        ({"--arm": "both"}, "baseline or mrl"),
        ({"--lang": "fr"}, "en or ja"),
    ],
    ids=lambda v: " ".join(f"{k} {w}" for k, w in v.items()) if isinstance(v, dict) else "",
)
def test_poc__wrong_input_is_one_sentence(change, message, data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    draw(tmp_path / "ONE_CLASS", classes=("only",))
    one = draw(tmp_path / "ONE_IMAGE", classes=("a", "b"))
    for extra in sorted((one / "b").iterdir())[1:]:
        extra.unlink()
    (tmp_path / "FULL").mkdir()
    (tmp_path / "FULL" / "thesis.txt").write_text("mine")
    (tmp_path / "FILE").write_text("mine")
    (tmp_path / "BROKEN.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{broken}")
    if change.get("--weights") == "BROKEN":
        change = {"--weights": "BROKEN.safetensors", "--weights-unseen": "true"}
    words = command(data, tmp_path / "run")
    for flag, value in change.items():
        words = [w for i, w in enumerate(words) if w != flag and (i == 0 or words[i - 1] != flag)] + [flag, value]
    assert main(words) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mrl poc:")]
    assert len(said) == 1
    assert message in said[0]
    assert (tmp_path / "FULL" / "thesis.txt").read_text() == "mine"


@pytest.mark.slow
def test_poc__weights_of_ones_own_need_a_test_side_or_a_word(data, tmp_path, capsys):
    import timm

    import mrl

    folder = mrl.save(timm.create_model("test_vit", img_size=32), tmp_path / "net")
    words = command(data, tmp_path / "run")
    words[words.index("test_vit")] = str(folder)
    assert main(words) == 1
    assert "--test" in capsys.readouterr().err
    test = draw(tmp_path / "test", n=6, seed=7)
    assert main([*words, "--test", str(test)]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["arms"]["mrl"]["n"] == 18


def test_commands__plan_swap_models_and_audit_stand_alone(data, tmp_path, capsys):
    import mrl

    assert main(["plan", "--model", "test_vit", "--image-size", "32", "--region", "2", "--layers", "0", "-1"]) == 0
    shown = capsys.readouterr().out
    assert "blocks.0.attn" in shown
    assert "predicted time" in shown
    assert (
        main(
            [
                "swap",
                "--model",
                "test_vit",
                "--image-size",
                "32",
                "--region",
                "2",
                "--swap",
                "cheap",
                "--out",
                str(tmp_path / "s"),
            ]
        )
        == 0
    )
    with pytest.raises(mrl.SwapError, match="already swapped"):
        mrl.plan(mrl.load(tmp_path / "s" / "swapped"))
    capsys.readouterr()
    assert main(["models", "mrl_*"]) == 0
    names = capsys.readouterr().out.split()
    assert names[:5] == ["mrl_13", "mrl_21", "mrl_tiny", "mrl_small", "mrl_hovernet"]
    assert all("_common_qkv" in name for name in names[5:])
    assert len(names) == 11
    assert main(["audit", "--data", str(data), "--out", str(tmp_path / "a")]) == 0
    assert json.loads((tmp_path / "a" / "audit.json").read_text())["n_kept"] == 48
    words = ["--model", "test_vit", "--data", str(data), "--image-size", "32", "--out", str(tmp_path / "a")]
    assert main(["split", *words]) == 0
    assert (tmp_path / "a" / "protocol.yaml").is_file()
    assert main(["calibrate", "--out", str(tmp_path / "a")]) == 0
    assert (tmp_path / "a" / "calibration.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["0", "0.02"])
def test_poc__layers_over_the_budget_go_back_and_the_run_says_so(budget, data, tmp_path):
    """0 restores every layer, so both arms start as one model; 0.02 restores some; the file that is exported is whole."""
    import mrl

    out = tmp_path / "run"
    assert main([*command(data, out), "--calibration.budget", budget]) == 0
    calibration = json.loads((out / "calibration.json").read_text())
    swapped = [n for n, m in mrl.load(out / "arms/mrl/calibrated").named_modules() if hasattr(m, "mrl_row")]
    planned = [r["name"] for r in json.loads((out / "plan.json").read_text())["rows"] if r["action"] == "swap"]
    assert len(swapped) + len(calibration["restored"]) == len(planned)
    assert bool(swapped) == (budget != "0")
    page = (out / "report.html").read_text(encoding="utf-8")
    assert all(name in page for name in calibration["restored"])
    assert (out / "model.onnx").is_file()  # only written when it is equal to the model


@pytest.mark.parametrize(
    ("format", "precision", "name"),
    [("openvino", "fp32", "model-openvino-fp32.xml"), ("torch-export", "fp32", "model-torch-export-fp32.pt2")],
)
def test_export__other_formats_of_a_run_predict_the_same(format, precision, name, finished, data, tmp_path):
    out = shutil.copytree(finished, tmp_path / "run")
    words = ["export", str(out), "--arm", json.loads((out / "export.json").read_text())["arm"], "--format", format]
    assert main([*words, "--precision", precision]) == 0
    rows = []
    for i, file in enumerate((out / "model.onnx", out / name)):
        assert (
            main(["predict", str(file), str(data / "dot"), str(data / "line"), "--out", str(tmp_path / f"{i}.csv")])
            == 0
        )
        with (tmp_path / f"{i}.csv").open(newline="") as table:
            rows.append(list(csv.DictReader(table)))
    for one, other in zip(*rows, strict=True):
        assert one["prediction"] == other["prediction"]
        assert float(one["p_dot"]) == pytest.approx(float(other["p_dot"]), abs=1e-4)
    assert main([*words, "--precision", precision]) == 1  # it exists


def test_export__a_precision_that_cannot_be_shown_is_refused(finished, tmp_path, capsys):
    """A dozen test images cannot show half a point, whatever the file does."""
    out = shutil.copytree(finished, tmp_path / "run")
    before = sorted(p.name for p in out.iterdir())
    assert main(["export", str(out), "--format", "openvino", "--precision", "fp16"]) == 1
    assert "images would be needed" in capsys.readouterr().err
    assert sorted(p.name for p in out.iterdir()) == before


@pytest.mark.slow
def test_export__a_saved_model(finished, data, tmp_path, capsys):
    folder = shutil.copytree(finished / "arms" / "mrl" / "model", tmp_path / "net")
    assert main(["export", str(folder)]) == 1
    assert "--data is missing" in capsys.readouterr().err
    assert main(["export", str(folder), "--data", str(data)]) == 0
    assert main(["export", str(folder), "--data", str(data), "--precision", "fp16", "--max-drop", "0.2"]) == 0
    proof = json.loads((folder / "model-onnx-fp16.parity.json").read_text())
    assert (proof["n_images"], proof["metric"]) == (48, "accuracy")
    assert main(["predict", str(folder / "model-onnx-fp16.onnx"), str(data), "--out", str(tmp_path / "a.csv")]) == 0
    assert main(["export", str(finished), "--data", str(data)]) == 1
    assert "a run has its own" in capsys.readouterr().err
