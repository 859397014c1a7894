"""100,000 images through `mrl predict`: memory stays flat, a kill costs nothing."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from mrl.data import Preprocess, read_image
from mrl.export import export_model

N, PICTURES, SECONDS = 100_000, 50, 600


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A model for 32 px and a folder of links to 50 pictures."""
    root = tmp_path_factory.mktemp("many")
    rng = np.random.default_rng(0)
    (root / "pictures").mkdir()
    for i in range(PICTURES):
        Image.fromarray(rng.integers(0, 255, (40, 36, 3), dtype=np.uint8)).save(root / "pictures" / f"{i}.png")
    preprocess = Preprocess((32, 32))
    torch.manual_seed(0)
    model = timm.create_model("test_mrl", num_classes=2)
    nn.init.normal_(model.get_classifier().weight, std=1.0)
    images = [preprocess(read_image(root / "pictures" / f"{i}.png")) for i in range(PICTURES)]
    export_model(model, root / "model.onnx", preprocess=preprocess, classes=["good", "bad"], images=images)
    for i in range(N):
        folder = root / "links" / f"{i // 1000:03}"
        if i % 1000 == 0:
            folder.mkdir(parents=True)
        os.link(root / "pictures" / f"{i % PICTURES}.png", folder / f"{i:06}.png")
    return root


def start(work: Path, out: str) -> subprocess.Popen:
    words = [
        sys.executable,
        "-m",
        "mrl",
        "predict",
        str(work / "model.onnx"),
        str(work / "links"),
        "--out",
        str(work / out),
    ]
    return subprocess.Popen([*words, "--batch-size", "64"], stderr=subprocess.DEVNULL)


def resident_mb(process: subprocess.Popen) -> float | None:
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmRSS")), None)


def lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="resident memory is read from /proc")
def test_predict__a_hundred_thousand_images(work):
    begin, process, seen = time.monotonic(), start(work, "whole.csv"), []
    while process.poll() is None:
        done = lines_of(work / "whole.csv.part") if len(seen) % 10 == 0 else None
        seen.append((done, resident_mb(process)))
        time.sleep(0.5)
    seconds = time.monotonic() - begin
    assert process.returncode == 0
    assert seconds < SECONDS
    warm = next(i for i, (done, _) in enumerate(seen) if done is not None and done > N // 10)
    memory = [mb for _, mb in seen[warm:-2] if mb]
    assert len(memory) > 20
    assert max(memory) <= 1.1 * memory[0]
    with (work / "whole.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == [f"{i // 1000:03}/{i:06}.png" for i in range(N)]
    assert not any(row["error"] for row in rows)

    process = start(work, "killed.csv")
    while lines_of(work / "killed.csv.part") < N // 3:
        assert process.poll() is None
        time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (work / "killed.csv").exists()
    assert start(work, "killed.csv").wait() == 0
    assert (work / "killed.csv").read_bytes() == (work / "whole.csv").read_bytes()
    print(f"{N} images in {seconds:.0f} s; resident memory {memory[0]:.0f} to {max(memory):.0f} MB")
