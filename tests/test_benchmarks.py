"""The benchmarks' own parts; `make bench` runs them for real."""

import json
from pathlib import Path

import pytest
import timm
import torch

import bench
import literal
import recovery
import table
from mrl.blocks import RegionalLocalMixer
from mrl.timing import timed_ms
from subjects import NotRunError, as_call, build
from test_blocks import randomized

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ["mrl_13", "mrl_hovernet_common_qkv"])
def test_literal__equals_ours(name):
    ours = randomized(timm.create_model(name, num_classes=7)).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(0.2)
    qkv = "common" if "common" in name else "separate"
    written = literal.Network(name.removesuffix("_common_qkv"), qkv, num_classes=7).eval()
    written.load_state_dict(literal.from_ours(ours.state_dict()))
    x = torch.randn(1, 3, 64, 128)
    with torch.inference_mode():
        torch.testing.assert_close(written(x), ours(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("qkv", ["separate", "common"])
def test_literal__mixer_trains_as_ours(qkv):
    ours = RegionalLocalMixer(12, 3, 2, 4, qkv=qkv, scale=12**-0.5).double()
    written = literal.Mixer(12, 3, 2, 4, qkv).double()
    names = {f"mixer.{k}": v for k, v in ours.state_dict().items()}
    state = literal.from_ours({f"stages.0.blocks.0.{k}": v for k, v in names.items()})
    written.load_state_dict(
        {k.removeprefix("stages.0.0.mixer.").removeprefix("stages.0.blocks.0.mixer."): v for k, v in state.items()}
    )
    x = torch.randn(2, 4, 6, 12).double().requires_grad_()
    flat = x.detach().flatten(1, 2).requires_grad_()
    y, z = ours(x), written(flat, 4)
    torch.testing.assert_close(y.flatten(1, 2), z)
    (y**3).sum().backward()
    (z**3).sum().backward()
    torch.testing.assert_close(x.grad.flatten(1, 2), flat.grad)


def test_vit_with_mixers__keeps_the_projections():
    from subjects import vit_with_mixers

    model, vit = vit_with_mixers(64, name="test_vit"), timm.create_model("test_vit", img_size=64)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 1000)
    ours, theirs = model.blocks[0].attn.mixer, vit.blocks[0].attn
    shapes = {k: v.shape for k, v in theirs.state_dict().items()}
    assert ours.proj.weight.shape == shapes["proj.weight"]
    assert torch.cat([ours.q_proj.weight, ours.k_proj.weight, ours.v_proj.weight]).shape == shapes["qkv.weight"]
    assert ours.reduce == "mean"


def test_timed__rows_have_ratios_and_shares():
    plan = bench.Plan(quick=True)
    x = torch.randn(64, 64)
    arms = {
        "one": (lambda i: x @ x, {"gmacs": 64**3 / 1e9, "gemm_gflops": 100.0}),
        "two": (lambda i: (x @ x, x @ x), {}),
    }
    one, two = bench.timed(plan, arms, "one")
    assert one["latency_ratio"]["estimate"] == 1
    assert two["latency_ratio"]["low"] <= two["latency_ratio"]["estimate"] <= two["latency_ratio"]["high"]
    assert one["share_of_gemm_rate"] == pytest.approx(2 * 64**3 / (one["latency_ms_median"] / 1e3) / 100e9)
    assert "share_of_gemm_rate" not in two
    assert one["n_calls"] == 4


def test_saved_bytes__counts_a_storage_once_and_no_parameter():
    linear = torch.nn.Linear(4, 4)
    x = torch.randn(3, 4)
    assert bench.saved_bytes(lambda: linear(x), linear.parameters()) == x.numel() * 4
    assert bench.saved_bytes(lambda: linear(x) + linear(x[:2]).sum(), linear.parameters()) == x.numel() * 4


def test_as_call__says_what_is_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(NotRunError, match=r'not run: needs OpenVINO; install "mrl\[openvino\]"'):
        as_call(torch.nn.Identity(), torch.ones(1, 3, 4, 4), "openvino", "fp32")


@pytest.mark.parametrize(("runtime", "precision"), [("eager", "fp32"), ("eager", "bf16"), ("onnxruntime", "fp32")])
def test_as_call__runs(runtime, precision):
    call = as_call(build("test_mrl", 32, "folded"), torch.randn(2, 3, 32, 32), runtime, precision)
    assert timed_ms(call, 0) > 0


def test_table__is_made_from_the_files(tmp_path):
    environment = {"cpu": "A CPU", "gpu": None, "threads": 2, "os": "Linux", "libraries": {"torch": "2.15"}}
    ratio = {"estimate": 0.5, "low": 0.4, "high": 0.8}
    same = {"estimate": 1.0, "low": 1.0, "high": 1.0}
    base = {"subject": "literal", "network": "literal", "batch": 1, "group": "eager fp32", "yardstick": "literal"}
    base |= {"latency_ms_median": 20.0, "latency_ms_p95": 21.0, "latency_ratio": same}
    rows = [
        base,
        {
            **base,
            "subject": "b",
            "network": "mrl_13",
            "form": "folded",
            "latency_ratio": ratio,
            "share_of_gemm_rate": 0.51,
        },
        {"subject": "c", "network": "mrl_13", "batch": 1, "group": "openvino fp32", "not_run": "not run: no"},
    ]
    result = {"suite": "networks", "date": "2026-11-24", "environment": environment, "rows": rows}
    (tmp_path / "a-cpu").mkdir()
    (tmp_path / "a-cpu" / "networks.json").write_text(json.dumps(result))
    page = table.write_table(tmp_path, tmp_path / "docs" / "page.md").read_text()
    assert "| literal | 20.0 | 21.0 | 1 * |  |" in page
    assert "| mrl_13, folded | 20.0 | 21.0 | 2.00 x (1.25 to 2.50) | 51 % |" in page
    assert "| mrl_13 | not run: no |" in page
    assert "## A CPU, 2 threads" in page


def test_docs__the_recovery_table_is_made_from_its_file():
    files = sorted((ROOT / "benchmarks" / "results").glob("*/recovery.json"))
    text = (ROOT / "docs" / "swap.md").read_text(encoding="utf-8")
    assert files
    for path in files:
        for arm in json.loads(path.read_text())["arms"]:
            assert recovery.table(arm) in text
            teacher, last = arm["rows"][0]["unchanged_head"], arm["rows"][-1]
            lost = last["unchanged_head"]["accuracy_difference"]["estimate"]
            assert lost == pytest.approx(
                last["unchanged_head"]["accuracy"]["estimate"] - teacher["accuracy"]["estimate"]
            )


def test_package__does_not_import_the_benchmarks():
    from pathlib import Path

    import mrl

    for path in Path(mrl.__file__).parent.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not any(f"import {name}" in text or f"from {name}" in text for name in ("literal", "bench", "subjects"))


@pytest.mark.slow
def test_bench__quick_run_of_everything(tmp_path):
    bench.main(["--quick", "--out", str(tmp_path)])
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert set(found) == set(bench.SUITES)
    for name, result in found.items():
        assert result["quick"]
        assert all("not_run" in row or row["latency_ms_median"] > 0 for row in result["rows"])
        assert table.section(name, result)


@pytest.mark.parametrize("form", ["plain", "folded"])
@pytest.mark.parametrize("name", ["mrl_hovernet_common_qkv_p4m", "mrl_13"])
def test_openvino__agrees_with_torch(name, form):
    openvino = pytest.importorskip("openvino")
    from mrl.deploy.onnx import to_onnx
    from subjects import FILES

    model = randomized_small(name)
    model = model.fold_() if form == "folded" else model
    x = torch.randn(2, 3, 64, 96)
    core = openvino.Core()
    graph = core.read_model(to_onnx(model, f"{FILES.name}/agrees.onnx", (64, 96)))
    compiled = core.compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    with torch.inference_mode():
        expected = model(x).softmax(-1)
    torch.testing.assert_close(torch.from_numpy(compiled({0: x.numpy()})[0]), expected, atol=1e-5, rtol=1e-4)


def randomized_small(name):
    model = randomized(
        timm.create_model(name, num_classes=5, depths=(1, 1, 1) if name == "mrl_13" else (1, 1, 1, 1))
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.2)
    return model
