"""Latency side by side, on real images, with everything that goes into the verdict kept."""

import gc
import json
import time

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from mrl import measure
from mrl.data import Preprocess
from mrl.deploy.onnx import to_onnx
from mrl.errors import ConfigError
from mrl.macs import Cost
from mrl.memory import needed_mb, peak_memory_mb
from mrl.run import plain
from mrl.timing import interleave, schedule, summary, warm_up


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def network(layers: int) -> nn.Module:
    """Takes any size; costs in proportion to its layers."""
    convolutions = [nn.Conv2d(16, 16, 3, padding=1) for _ in range(layers)]
    return nn.Sequential(nn.Conv2d(3, 16, 3), *convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2))


def photos(n: int, size: int = 24) -> torch.Tensor:
    coarse = torch.randn(n, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    return nn.functional.interpolate(coarse, (size, size), mode="bicubic")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(rng.integers(0, 255, (40, 30, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def result(files):
    small, large = network(1).train(), network(12)
    return measure.measure_arms(
        {"mrl": large, "baseline": small},
        image_size=24,
        images=[{"image": image} for image in photos(6)],
        other_sizes=(24, 40),
        time_budget_s=2,
        files=files,
        preprocess=Preprocess((24, 24), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    ), (small, large)


def test_measure_arms__rows(result):
    rows = result[0]["rows"]
    seen = [(r["backend"], r["batch"], r["image_size"]) for r in rows]
    small = [("onnxruntime", 1, 24), ("eager", 1, 24), ("onnxruntime", 8, 24), ("eager", 8, 24)]
    assert seen == [*small, ("onnxruntime", 1, 40)]
    assert [r["decides"] for r in rows] == [True, False, False, False, False]
    assert rows[0]["n_blocks"] >= 30
    assert all(r["n_blocks"] >= 5 and r["precision"] == "fp32" and r["threads"] == 1 for r in rows)


def test_measure_arms__the_whole_sample_is_kept(result):
    for row in result[0]["rows"]:
        for arm in row["arms"].values():
            sample = arm["samples_ms"]
            assert len(sample) == row["n_blocks"] * row["calls_per_block"] == arm["n_calls"]
            assert arm["latency_ms_median"] == pytest.approx(np.median(sample), rel=1e-2, abs=1e-4)
            assert arm["latency_ms_median"] <= arm["latency_ms_p95"] <= arm["latency_ms_p99"]


def test_measure_arms__ratio_is_mrl_over_baseline(result):
    found = result[0]
    assert list(found["rows"][0]["arms"]) == ["baseline", "mrl"]
    assert found["latency_ratio"]["low"] > 1
    assert found["verdict"] == "slower"
    assert found["latency_ratio"] == found["rows"][0]["ratio"]


def test_measure_arms__hours_of_a_million_images(result):
    found = result[0]
    for arm, hours in found["million_images_hours"].items():
        assert hours["estimate"] == pytest.approx(found["rows"][0]["arms"][arm]["latency_ms_mean"] / 3.6)
        assert hours["low"] <= hours["estimate"] <= hours["high"]


def test_measure_arms__from_file_to_answer(result):
    found = result[0]["end_to_end"]
    assert found["n_images"] == 6
    assert found["read_ms_median"] > 0
    assert set(found["arms"]) == {"baseline", "mrl"}
    for arm in found["arms"].values():
        assert arm["million_images_hours"]["estimate"] > 0


def test_measure_arms__paper_costs(result):
    found, (small, large) = result[0]["arms"], result[1]
    assert found["baseline"]["params_m"] * 1e6 == pytest.approx(sum(p.numel() for p in small.parameters()))
    assert found["mrl"]["gmacs"] > 5 * found["baseline"]["gmacs"]
    assert found["mrl"]["file_mb"] > found["baseline"]["file_mb"]
    assert 20 < found["mrl"]["peak_memory_mb"] < 500
    assert [m.training for m in (small, large)] == [True, True]


def test_measure_arms__is_json(result):
    text = json.dumps(plain(result[0]))
    assert json.loads(text)["environment"]["threads"] == 1


def test_measure_models__one_model_has_no_ratio():
    found = measure.measure_models(
        {"only": network(1)},
        image_size=(16, 24),
        images=photos(2),
        backends=("eager",),
        batches=(1,),
        other_sizes=(),
        time_budget_s=1,
    )
    (row,) = found["rows"]
    assert (row["backend"], row["image_size"], row["decides"]) == ("eager", [16, 24], True)
    assert (row["ratio"], row["verdict"], found["latency_ratio"], found["verdict"]) == (None,) * 4
    assert set(found["million_images_hours"]) == {"only"}


class Sleeps(nn.Module):
    """Slow in eager mode only: the exporter does not see the pause."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network(1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_exporting() and image.device.type == "cpu":
            time.sleep(0.2)
        return self.inner(image)


def test_measure_models__too_slow_or_impossible_is_said():
    def resize(model: nn.Module, size: int) -> nn.Module | None:
        return None if size == 32 else measure.at_image_size(model, size)

    found = measure.measure_models(
        {"only": Sleeps()},
        image_size=24,
        images=photos(3),
        batches=(1,),
        other_sizes=(32, 2),
        resize=resize,
        time_budget_s=1,
    )
    assert [row["backend"] for row in found["rows"]] == ["onnxruntime"]
    assert found["rows_not_measured"][0]["backend"] == "eager"
    assert "time budget allows" in found["rows_not_measured"][0]["reason"]
    assert [item["image_size"] for item in found["image_sizes_not_measured"]] == [32, 2]
    assert "cannot take images of 32 x 32" in found["image_sizes_not_measured"][0]["reason"]
    assert "does not take images of 2 x 2" in found["image_sizes_not_measured"][1]["reason"]


def test_measure_models__no_memory_is_said(monkeypatch):
    monkeypatch.setattr(measure, "memory_left_mb", lambda: 0.001)
    options = {"image_size": 24, "images": photos(2), "backends": ("eager",), "other_sizes": (), "time_budget_s": 1}
    found = measure.measure_models({"only": network(1)}, batches=(1, 2), **options)
    assert "MB of memory" in found["rows_not_measured"][0]["reason"]


@pytest.mark.parametrize(
    ("models", "options", "words"),
    [
        ("", {}, "0 models"),
        ("a", {"images": torch.zeros(2, 3, 24, 24)}, "one flat colour"),
        ("a", {"images": []}, "at least one"),
        ("a", {"backends": ("tensorrt",)}, "choose from eager, onnxruntime"),
        ("a", {"batches": (0,)}, "whole numbers of at least 1"),
        ("a", {"files": ["a.png"]}, "files need preprocess"),
        ("a", {"image_size": 0}, "image_size=0"),
    ],
)
def test_measure_models__wrong_arguments(models, options, words):
    with pytest.raises(ConfigError, match=words):
        measure.measure_models({m: network(1) for m in models}, **{"image_size": 24, "images": photos(2), **options})


def test_measure_arms__other_names():
    with pytest.raises(ConfigError, match="give 'baseline' and 'mrl'"):
        measure.measure_arms({"a": network(1), "b": network(1)}, image_size=24, images=photos(2))


def test_at_image_size__original_stays():
    model = timm.create_model("test_vit", img_size=32, num_classes=3).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    larger = measure.at_image_size(model, (48, 64))
    images = photos(2, 32)
    assert larger(nn.functional.interpolate(images, (48, 64))).shape == (2, 3)
    assert model(images).shape == (2, 3)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert larger.head.weight is model.head.weight
    assert torch.equal(measure.at_image_size(model, 32)(images), model(images))


def test_at_image_size__cannot():
    with pytest.raises(ConfigError, match="40 x 40"):
        measure.at_image_size(timm.create_model("test_vit", img_size=32), 40)


def test_peak_memory_mb__not_the_parents(tmp_path):
    ballast = torch.ones(150_000_000)  # 600 MB, which a child started with vfork would report as its own
    np.save(tmp_path / "image.npy", photos(1).numpy())
    peak = peak_memory_mb(to_onnx(network(1), tmp_path / "a.onnx", 24), tmp_path / "image.npy")
    assert 20 < peak < 300
    assert len(ballast) > 0


def test_needed_mb__grows_with_the_batch():
    assert needed_mb(Cost(10.0, 1.0, 100.0), 8) == 4 * 8 * 100 + 120


def test_interleave__order_and_garbage_collection():
    order, states = [], []

    def call(arm: str):
        def run(i: int) -> None:
            order.append((arm, i))
            states.append(gc.isenabled())

        return run

    times = interleave({"a": call("a"), "b": call("b")}, blocks=3, calls_per_block=2)
    a0, b0, a1, b1 = [("a", 0), ("a", 1)], [("b", 0), ("b", 1)], [("a", 2), ("a", 3)], [("b", 2), ("b", 3)]
    assert order == [*a0, *b0, *b1, *a1, ("a", 4), ("a", 5), ("b", 4), ("b", 5)]
    assert not any(states)
    assert gc.isenabled()
    assert [len(block) for block in times["b"]] == [2, 2, 2]


def test_schedule__never_below_the_least():
    assert schedule({"a": 5000.0, "b": 5000.0}, seconds=1, min_blocks=30) == (30, 1)
    blocks, calls = schedule({"a": 0.1}, seconds=100, min_blocks=30)
    assert blocks * calls <= 1000


def test_warm_up__stops_when_stable_or_late():
    calls = []
    warm_up(lambda i: calls.append(time.sleep(0.01)), seconds=5)
    assert 5 <= len(calls) < 50
    slow = []
    warm_up(lambda i: slow.append(time.sleep(0.05)), seconds=0)
    assert len(slow) == 2


def test_summary__tail_and_throughput():
    row = summary([[1.0] * 50, [1.0] * 45 + [3.0] * 5], batch=4)
    assert row["latency_ms_median"] == 1
    assert row["latency_ms_p99"] == 3
    assert row["throughput_img_s"] == pytest.approx(4 * 100 / 110 * 1000)
