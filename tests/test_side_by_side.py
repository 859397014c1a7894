"""`mrl measure A B`: every backend and precision that there is, honest about what it could not do, merged over machines."""

import json
import math

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import mrl
from mrl.cli import main
from mrl.data import Preprocess
from mrl.deploy.onnx import to_onnx
from mrl.errors import ConfigError
from mrl.export import export_model
from mrl.side_by_side import measure_side_by_side, merge, table
from mrl.timing import joules

QUICK = {"seconds": 0.2}


@pytest.fixture
def warm(monkeypatch):
    """Memory and cold start without a process for each; they have tests of their own."""
    monkeypatch.setattr("mrl.side_by_side.cold_start", lambda *_, **__: {"peak_memory_mb": 60.0, "cold_start_s": 0.5})


def photos(n=6, size=48):
    return nn.functional.interpolate(torch.randn(n, 3, 6, 6), (size, size), mode="bicubic")


class Slow(nn.Module):
    """A convolution, done several times."""

    def __init__(self, times):
        super().__init__()
        self.conv, self.times = nn.Conv2d(3, 3, 3, padding=1), times

    def forward(self, image):
        for _ in range(self.times):
            image = self.conv(image)
        return image.mean((2, 3))


def test_measure__the_slower_one_is_slower_and_a_copy_is_not_resolvable():
    models = {"one": Slow(1), "again": Slow(1), "forty": Slow(40)}
    found = measure_side_by_side(models, images=photos(), backends=["eager"], sizes=[48], threads=[1], seconds=1.0)
    (row,) = found["rows"]
    assert row["models"]["forty"]["verdict"] == "slower"
    assert row["models"]["forty"]["ratio"]["low"] > 2
    assert row["n_blocks"] >= 30
    again = row["models"]["again"]
    assert again["ratio"]["low"] < 1.3
    assert (again["verdict"] == "not resolvable") == (again["ratio"]["low"] <= 1 <= again["ratio"]["high"])
    assert "ratio" not in row["models"]["one"]
    for model in row["models"].values():
        assert model["latency_ms_median"] <= model["latency_ms_p95"] <= model["latency_ms_p99"]


@pytest.mark.slow
def test_measure__backends_precisions_batches_sizes_and_threads():
    model = timm.create_model("test_mrl", num_classes=2).eval()
    options = {
        "backends": ["onnxruntime", "openvino"],
        "precisions": ["fp32", "int8"],
        "batches": [1, 2],
        "sizes": [48, 64],
    }
    found = measure_side_by_side({"net": model}, images=photos(), threads=[1], **options, **QUICK)
    cases = math.prod(map(len, options.values()))
    assert len(found["rows"]) == cases
    assert found["not_measured"] == []
    for row in found["rows"]:
        net = row["models"]["net"]
        assert net["cold_start_s"] > 0.02
        assert net["peak_memory_mb"] > 20
        assert net["throughput_img_s"] > 0
    assert table(found).count("\n") == cases


def test_measure__what_cannot_be_measured_is_said(tmp_path, warm):
    model = timm.create_model("test_vit", img_size=48, num_classes=2).eval()
    path = to_onnx(model, tmp_path / "m.onnx", 48)
    options = {"backends": ["eager", "onnxruntime"], "precisions": ["fp32", "bf16"], "sizes": [48]}
    found = measure_side_by_side({"net": model, "file": path}, images=photos(), **options, **QUICK)
    reasons = {(m["case"].split(",")[0], m["model"]): m["reason"] for m in found["not_measured"]}
    assert reasons["eager fp32", "file"] == "a .onnx file does not run in eager"
    assert "no bfloat16" in reasons["onnxruntime bf16", "net"]
    assert reasons["onnxruntime bf16", "file"] == "this file is fp32, not bf16"
    assert [(r["backend"], r["precision"], sorted(r["models"])) for r in found["rows"]] == [
        ("eager", "fp32", ["net"]),
        ("eager", "bf16", ["net"]),
        ("onnxruntime", "fp32", ["file", "net"]),
    ]


def test_measure__a_file_of_another_size_costs_no_other_row(tmp_path, warm):
    model = timm.create_model("test_vit", img_size=48, num_classes=2).eval()
    told = {"preprocess": Preprocess((48, 48)), "classes": ["a", "b"], "images": photos()}
    export_model(model, tmp_path / "proved.onnx", **told)
    files = {"proved": tmp_path / "proved.onnx", "bare": to_onnx(model, tmp_path / "bare.onnx", 48)}
    found = measure_side_by_side(files, images=photos(), backends=["onnxruntime"], sizes=[48, 64], **QUICK)
    assert [(row["image_size"], sorted(row["models"])) for row in found["rows"]] == [([48, 48], ["bare", "proved"])]
    reasons = {m["model"]: m["reason"] for m in found["not_measured"]}
    assert reasons["proved"] == "this file takes 48 x 48 pixels, not 64 x 64"
    assert "invalid dimensions" in reasons["bare"]


@pytest.mark.slow
def test_measure__compiled():
    found = measure_side_by_side({"net": Slow(2)}, images=photos(), backends=["compile"], sizes=[48], **QUICK)
    assert found["rows"][0]["models"]["net"]["latency_ms_median"] > 0


@pytest.mark.parametrize("backend", ["eager", pytest.param("compile", marks=pytest.mark.slow)])
def test_measure__memory_and_cold_start_of_a_model_in_pytorch(backend):
    models = {"net": timm.create_model("test_vit", img_size=48, num_classes=2).eval(), "mine": Slow(1)}
    found = measure_side_by_side(models, images=photos(), backends=[backend], sizes=[48], threads=[1], **QUICK)
    net, mine = (found["rows"][0]["models"][name] for name in models)
    assert net["cold_start_s"] > 0.02
    assert net["peak_memory_mb"] > 50
    assert (mine["cold_start_s"], mine["peak_memory_mb"]) == (None, None)
    assert mine["latency_ms_median"] > 0
    (missing,) = found["not_measured"]
    assert missing["model"] == "mine"
    assert missing["reason"].startswith("no memory and cold start of a fresh process: ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backends": ["tensorrt"]}, "--backend tensorrt: use eager"),
        ({"precisions": ["fp8"]}, "--precision fp8: use fp32"),
        ({"batches": [0]}, "--batch"),
        ({"images": torch.zeros(2, 3, 48, 48)}, "flat colour"),
        ({"backends": ["eager"], "precisions": ["int8"]}, "nothing could be measured: int8 is made for"),
    ],
)
def test_measure__wrong_options(options, message):
    with pytest.raises(ConfigError, match=message):
        measure_side_by_side({"net": Slow(1)}, **{"images": photos(), "sizes": [48], **QUICK, **options})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name in ("good", "bad"):
        (root / name).mkdir()
        for i in range(4):
            Image.fromarray(rng.integers(0, 255, (50, 40, 3), dtype=np.uint8)).save(root / name / f"{i}.png")
    return root


def test_command__measures_folders_and_files_and_merges(data, tmp_path, capsys):
    model = timm.create_model("test_vit", img_size=48, num_classes=2).eval()
    folder = mrl.save(model, tmp_path / "net")
    given = {"preprocess": Preprocess((48, 48)), "classes": ["good", "bad"], "images": photos()}
    export_model(model, tmp_path / "net.onnx", **given)
    words = ["measure", str(folder), str(tmp_path / "net.onnx"), "--data", str(data), "--image-size", "48"]
    words += ["--seconds", "0.2", "--backend", "onnxruntime"]
    for name in ("a", "b"):
        assert main([*words, "--out", str(tmp_path / name)]) == 0
    shown = capsys.readouterr().out
    assert "against the first" in shown
    assert "net.onnx" in shown
    assert main([*words, "--out", str(tmp_path / "a")]) == 1
    assert "--overwrite" in capsys.readouterr().err
    page = (tmp_path / "a" / "measure.html").read_text()
    assert "<svg" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    files = [str(tmp_path / name / "measure.json") for name in ("a", "b")]
    assert main(["measure", *files, "--merge", "--out", str(tmp_path / "both")]) == 0
    both = json.loads((tmp_path / "both" / "measure.json").read_text())
    assert [row["machine"].endswith("(2)") for row in both["rows"]] == [False, True]
    assert len(both["machines"]) == 2
    for words, message in (
        (["measure", str(folder), "--out", str(tmp_path / "c")], "--data is missing"),
        (["measure", str(tmp_path / "gone.onnx"), "--data", str(data), "--out", str(tmp_path / "c")], "not found"),
        (["measure", str(folder), str(folder), "--data", str(data), "--image-size", "48", "--out", str(tmp_path / "c")], "given twice"),
        (["measure", str(folder), "--backend", "tensorrt", "--data", str(data), "--out", str(tmp_path / "c")], "--backend tensorrt"),
    ):  # fmt: skip
        assert main(words) == 1
        assert message in capsys.readouterr().err


def test_merge__needs_results_of_measure(tmp_path):
    (tmp_path / "a.json").write_text('{"schema": 1}')
    with pytest.raises(ConfigError, match="two or more"):
        merge([tmp_path / "a.json"])
    with pytest.raises(ConfigError, match="was not written by"):
        merge([tmp_path / "a.json"] * 2)
    whole = {"kind": "side_by_side", "rows": [], "models": ["a"], "not_measured": [], "environment": {"cpu": "A"}}
    wrong = {"[]": "was not written by", "{": "is not JSON", '{"kind": "side_by_side"}': "was not written by"}
    wrong['{"kind": "merged", "rows": []}'] = "is merged already"
    wrong[json.dumps({**whole, "environment": None})] = "was not written by"
    for text, message in wrong.items():
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(ConfigError, match=message):
            merge([tmp_path / "a.json"] * 2)
    for name, cpu in (("a", "A"), ("b", "A"), ("c", "C")):
        (tmp_path / f"{name}.json").write_text(json.dumps({**whole, "environment": {"cpu": cpu}}))
    with pytest.raises(ConfigError, match=r"b\.json: is the same result as .*a\.json; give each once"):
        merge([tmp_path / "a.json", tmp_path / "b.json"])
    assert [m["machine"] for m in merge([tmp_path / "a.json", tmp_path / "c.json"])["machines"]] == ["A", "C"]


def test_joules__reads_counters_that_wrap(tmp_path, monkeypatch):
    values = iter([{"intel-rapl:0": (900, 999)}, {"intel-rapl:0": (400, 999)}])
    monkeypatch.setattr("mrl.timing._energy_uj", lambda: next(values))
    with joules() as spent:
        pass
    assert spent() == pytest.approx(500e-6)
