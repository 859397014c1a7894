"""A server under many clients, and a hundred thousand images: each in processes of their own, as users run them."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch import nn

from mrl.data import ImageSet, Preprocess, load_source, read_image
from mrl.export import export_model
from mrl.models import Classifier
from mrl.models.build import build_model, preprocess_of

SEED, CLIENTS, SECONDS, SIZE = 0, 32, 60.0, 112
IMAGES, PICTURES = 100_000, 50


def one_client(port: int, bodies: Sequence[bytes], end: float, first: int) -> tuple[list[float], list[str]]:
    """Asks again and again over one connection until `end`: latencies in ms, and everything that was not an answer."""
    times, wrong, turn = [], [], first
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    while time.monotonic() < end:
        start = time.perf_counter()
        try:
            connection.request("POST", "/predict", bodies[turn % len(bodies)])
            answer = connection.getresponse()
            data = answer.read()
            if answer.status != 200 or "prediction" not in json.loads(data):
                wrong.append(f"{answer.status} {data[:80]!r}")
        except (OSError, http.client.HTTPException, ValueError) as error:
            wrong.append(f"{type(error).__name__} {error}")
            connection.close()
        times.append((time.perf_counter() - start) * 1e3)
        turn += 1
    connection.close()
    return times, wrong


def under_load(port: int, bodies: Sequence[bytes], clients: int, seconds: float) -> dict[str, Any]:
    """So many clients at once, for so long."""
    start = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        found = list(pool.map(lambda i: one_client(port, bodies, start + seconds, i), range(clients)))
    took = time.monotonic() - start
    times = np.concatenate([times for times, _ in found])
    wrong = [each for _, part in found for each in part]
    p50, p95, p99 = (float(p) for p in np.percentile(times, [50, 95, 99]))
    return {
        "clients": clients,
        "seconds": took,
        "n_answers": len(times),
        "n_errors": len(wrong),
        "errors": wrong[:5],
        "throughput_img_s": (len(times) - len(wrong)) / took,
        "latency_ms_p50": p50,
        "latency_ms_p95": p95,
        "latency_ms_p99": p99,
        "latency_ms_max": float(times.max()),
    }


def load_test(clients: int = CLIENTS, seconds: float = SECONDS) -> dict[str, Any]:
    """`mrl serve` with mrl_13 at 112 px (not trained; its cost is the same) on image files of ELPV."""
    torch.manual_seed(SEED)
    source = load_source("elpv")
    model = Classifier(build_model("mrl_13", image_size=SIZE), 2, classes=source.classes).eval()
    preprocess = Preprocess((SIZE, SIZE), **preprocess_of(model))
    samples = source.samples[:: len(source.samples) // 16][:16]
    images = ImageSet(samples, source.classes, preprocess)
    bodies = [Path(sample.path).read_bytes() for sample in samples]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        shown = [images[row]["image"] for row in range(len(images))]
        export_model(model, path, preprocess=preprocess, classes=source.classes, images=shown)
        port = free_port()
        words = [sys.executable, "-m", "mrl", "serve", str(path), "--port", str(port)]
        process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
        try:
            wait_for(port, process)
            under_load(port, bodies, 2, 1.0)
            found = under_load(port, bodies, clients, seconds)
        finally:
            process.terminate()
            process.wait()
    about = {
        "model": "mrl_13",
        "format": "onnx",
        "precision": "fp32",
        "image_size": SIZE,
        "threads": torch.get_num_threads(),
    }
    return {
        **about,
        "body_kb_mean": float(np.mean([len(body) for body in bodies]) / 1e3),
        **found,
        "held": not found["n_errors"],
    }


def free_port() -> int:
    """A port of loopback that nobody has at this moment."""
    with socket.create_server(("127.0.0.1", 0)) as one:
        return one.getsockname()[1]


def wait_for(port: int, process: subprocess.Popen, seconds: float = 120.0) -> None:
    """Until the server says that it is ready."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            raise SystemExit(f"deploy: mrl serve ended with {process.returncode} before it was ready.")
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/v2/health/ready")
            if connection.getresponse().status == 200:
                return
        except OSError:
            time.sleep(0.2)
        finally:
            connection.close()
    raise SystemExit(f"deploy: mrl serve was not ready after {seconds:.0f} s.")


def make_links(root: Path, n: int = IMAGES) -> Path:
    """A folder of n links to 50 pictures, a thousand in a folder, and `model.onnx` for 32 px beside it."""
    rng = np.random.default_rng(SEED)
    (root / "pictures").mkdir()
    for i in range(PICTURES):
        Image.fromarray(rng.integers(0, 255, (40, 36, 3), dtype=np.uint8)).save(root / "pictures" / f"{i}.png")
    preprocess = Preprocess((32, 32))
    torch.manual_seed(SEED)
    model = timm.create_model("test_mrl", num_classes=2)
    nn.init.normal_(model.get_classifier().weight, std=1.0)
    images = [preprocess(read_image(root / "pictures" / f"{i}.png")) for i in range(PICTURES)]
    export_model(model, root / "model.onnx", preprocess=preprocess, classes=["good", "bad"], images=images)
    for i in range(n):
        folder = root / "links" / f"{i // 1000:03}"
        if i % 1000 == 0:
            folder.mkdir(parents=True)
        os.link(root / "pictures" / f"{i % PICTURES}.png", folder / f"{i:06}.png")
    return root


def start_predict(work: Path, out: str) -> subprocess.Popen:
    """`mrl predict` on the links, in a process of its own."""
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
    """Resident memory of a process in MB of 1e6 bytes; None when it has ended."""
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmRSS")), None)


def lines_of(path: Path) -> int:
    """Lines of a file; 0 where there is none."""
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def watched(work: Path, out: str, n: int) -> tuple[int, float, list[float]]:
    """Exit status, seconds, and resident memory twice a second from a tenth of the images on."""
    begin, process, seen = time.monotonic(), start_predict(work, out), []
    while process.poll() is None:
        done = lines_of(work / f"{out}.part") if len(seen) % 10 == 0 else None
        seen.append((done, resident_mb(process)))
        time.sleep(0.5)
    warm = next((i for i, (done, _) in enumerate(seen) if done is not None and done > n // 10), len(seen))
    return process.returncode, time.monotonic() - begin, [mb for _, mb in seen[warm:-2] if mb]


def predict_many(n: int = IMAGES) -> dict[str, Any]:
    """`mrl predict` on n links: time, and resident memory from a tenth of the images on."""
    with tempfile.TemporaryDirectory() as folder:
        work = make_links(Path(folder), n)
        status, seconds, memory = watched(work, "whole.csv", n)
        rows = lines_of(work / "whole.csv") - 1
    if status != 0 or not memory:
        raise SystemExit(f"deploy: mrl predict ended with {status}, or there is no /proc to read its memory from.")
    facts = {"model": "test_mrl", "image_size": 32, "n_images": n, "n_rows": rows, "predict_seconds": seconds}
    growth = max(memory) / memory[0]
    return {
        **facts,
        "images_per_s": n / seconds,
        "memory_mb_first": memory[0],
        "memory_mb_most": max(memory),
        "growth": growth,
    }
