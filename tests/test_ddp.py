"""Two processes on gloo make the updates of one process: the same candidates, weights and records; and resume so."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mrl.ddp import running_norms
from mrl.fit import fit, refit
from mrl.ranks import shares
from test_fit import SHAPE, SMALL, ImageSet, make_model, make_samples

HERE = Path(__file__).parent
CONFIG = dataclasses.replace(
    SMALL, epochs=3, class_balance=True, use_confidence=True, label_smoothing=0.1, augment="light"
)
CASES = {
    "weighted": CONFIG,
    "mixed": dataclasses.replace(CONFIG, use_confidence=False, mixup=0.8, cutmix=1.0),
    "scratch": dataclasses.replace(CONFIG, start="scratch", freeze=0, clip=0.1, ema=0.0),
    "running": dataclasses.replace(CONFIG, batch_norm="train"),
}
SAME = ["weighted-test_vit", "mixed-test_vit", "scratch-test_vit", "weighted-test_mrl"]
FILES = ["best.safetensors", "fit.json", "metrics.jsonl", "start.safetensors"]
ABSOLUTE = 1e-5  # of a loss
WEIGHT = 1e-5  # of a weight after 12 updates in float32

WORKER = """
import json, sys
sys.path.insert(0, sys.argv[1])
import test_ddp
test_ddp.worker(*sys.argv[2:])
"""


def worker(folder: str, cases: str, kill: str = "0") -> None:
    """One process of a launch: the fits of some cases, one after the other, each in a folder of its own."""
    from mrl import features, fit_loop
    from mrl.errors import MrlError
    from mrl.ranks import leave_launch

    if int(kill):
        fit_loop.CHECKPOINT_SECONDS = 0.0
        step = fit_loop.Loop._step

        def stop(self, batch):
            step(self, batch)
            if self.update == int(kill) and self.rank == 1:
                time.sleep(1)  # the first process has its checkpoint
                os.kill(os.getpid(), signal.SIGKILL)

        fit_loop.Loop._step = stop
    features.BATCH = 7  # of 15 validation images the first process has a batch more
    step_once, here = fit_loop.Loop._step, [Path(folder)]

    def keep(self, batch):
        """Notes the share of weights, average and moments that this process has."""
        step_once(self, batch)
        tensors = [p for m in (self.model, self.ema and self.ema.module) if m for p in m.parameters()]
        tensors += [v for s in self.optimizer.state.values() for v in s.values() if v.ndim]
        own = sum(getattr(t, "to_local", lambda t=t: t)().numel() for t in tensors)
        (here[0] / f"share-{self.rank}").write_text(str(own / sum(t.numel() for t in tensors)))

    fit_loop.Loop._step = keep
    for name in cases.split(","):
        (case, model), here[0] = name.split("-"), Path(folder) / name
        sides = [ImageSet(make_samples(here[0], n, seed), ("a", "b"), SHAPE) for n, seed in ((26, 1), (15, 2))]
        try:
            told = {"features": here[0] / "features"}
            chosen = fit(make_model(model, drop_path_rate=0.0), *sides, CASES[case], here[0] / "out", **told)
            last = dataclasses.replace(chosen, best_update=chosen.updates)
            refit(make_model(model, drop_path_rate=0.0), sides[0], last, CASES[case], here[0] / "last", **told)
        except MrlError as error:
            print(name, error)
    leave_launch()


def launch(folder: Path, cases: str, kill: int = 0, n: int = 2, fsdp: bool = False) -> subprocess.CompletedProcess:
    """The fits in n processes of torchrun (on the CPU), or in one without it; their networks in pieces with `fsdp`."""
    folder.mkdir(exist_ok=True)
    (folder / "worker.py").write_text(WORKER, encoding="utf-8")
    run = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(n),
        "--master-port",
        "0",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "127.0.0.1:0",
    ]
    words = [
        sys.executable,
        *(run if n > 1 else []),
        str(folder / "worker.py"),
        str(HERE),
        str(folder),
        cases,
        str(kill),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    env |= {"ACCELERATE_USE_FSDP": "true"} if fsdp else {}
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=600, env=env)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The fits of one process, each in its folder, and what it said."""
    folder = tmp_path_factory.mktemp("alone")
    done = launch(folder, ",".join(SAME), n=1)
    assert done.returncode == 0, done.stderr
    (folder / "said").write_text(done.stderr)
    return folder


def same(one: Path, other: Path, absolute: float = ABSOLUTE) -> float:
    """Holds two fits to the same numbers; returns the largest difference of a weight."""
    records = [json.loads((f / "out" / "fit.json").read_text()) for f in (one, other)]
    for a, b in zip(*(r["candidates"] for r in records), strict=True):
        assert (a["update"], a["val_score"]) == (b["update"], pytest.approx(b["val_score"]))
        assert a["val_loss"] == pytest.approx(b["val_loss"], abs=absolute)
    for key in ("best_update", "updates", "images_seen", "n_train", "n_val", "probe_strength", "warnings", "config"):
        assert records[0][key] == records[1][key], key
    lines = [[json.loads(t) for t in (f / "out" / "metrics.jsonl").read_text().splitlines()] for f in (one, other)]
    for a, b in zip(*lines, strict=True):
        del a["seconds"], b["seconds"]
        assert a == pytest.approx(b, abs=absolute), a["update"]
    found = max(furthest(one / name, other / name) for name in ("out", "last"))
    assert found < WEIGHT
    return found


def furthest(one: Path, other: Path) -> float:
    """The largest difference of a weight; the biases of the keys, which the softmax cancels and Adam moves by rounding, apart."""
    weights = [load_file(f / "best.safetensors") for f in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    found = {k: (weights[0][k] - weights[1][k]).abs() for k in weights[0]}
    for name in (k for k in found if k.endswith("qkv.bias")):
        found[name] = found[name].view(3, -1)[[0, 2]]
    name = max(found, key=lambda k: found[k].max())
    print(name, found[name].max().item())
    return found[name].max().item()


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
def test_ddp__two_processes_are_one(alone, tmp_path, fsdp):
    """Each process has all of the network, or a piece of about a half; what is learned and written is that of one process."""
    two = launch(tmp_path, ",".join([*SAME, "running-test_mrl"]), fsdp=fsdp)
    assert two.returncode == 0, two.stderr
    for case in SAME:
        one, folder = alone / case, tmp_path / case
        print(case, same(one, folder))
        assert [sorted(p.name for p in (f / "out").iterdir()) for f in (one, folder)] == [FILES, FILES]
        kept = [float((folder / f"share-{rank}").read_text()) for rank in range(2)]
        assert kept == (pytest.approx([0.5, 0.5], abs=0.05) if fsdp else [1, 1]), case
    said = (alone / "said").read_text()
    assert two.stderr.count("inner validation accuracy") == said.count("inner validation accuracy") > 3 * len(SAME)
    refused = "BatchNorm layers take their statistics from each batch, and only GPUs can join those of 2 processes"
    assert refused in two.stdout
    assert not (tmp_path / "running-test_mrl/out/fit.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("first", ["whole", "pieces"])
def test_ddp__goes_on_after_a_process_was_killed_and_in_another_number_of_processes(alone, tmp_path, first):
    """One process, two and two in pieces go on from the checkpoint of a launch, and one process from that of pieces."""
    case = "weighted-test_vit"
    assert launch(tmp_path, case, kill=7, fsdp=first == "pieces").returncode != 0
    assert (tmp_path / case / "out/checkpoint/state.safetensors").is_file()
    assert not (tmp_path / case / "out/fit.json").exists()
    endings = {"alone": {"n": 1}} if first == "pieces" else {"alone": {"n": 1}, "two": {}, "pieces": {"fsdp": True}}
    for name, more in endings.items():
        shutil.copytree(tmp_path / case, tmp_path / name / case)
        done = launch(tmp_path / name, case, **more)
        assert done.returncode == 0, done.stderr
        assert "goes on after update" in done.stderr
        same(alone / case, tmp_path / name / case)


def test_shares__are_the_batch_once_and_keep_partners_together():
    for n in range(4, 20):
        for world in (1, 2, 3):
            for pairs in (False, True):
                found = shares(n, world, pairs=pairs)
                assert sorted(i for share in found for i in share) == list(range(n))
            for share in shares(n, world, pairs=True):
                even = len(share) // 2 * 2
                partners = {frozenset((share[i], share[even - 1 - i])) for i in range(even)}
                assert partners <= {frozenset((i, n // 2 * 2 - 1 - i)) for i in range(n // 2 * 2)}


def test_shares__losses_and_gradients_add_up_to_those_of_the_batch():
    from mrl.tasks import Classification

    task = Classification(3, (0.5, 1.0, 2.5), 0.1, use_confidence=True)
    net = nn.Linear(4, 3).double()
    x, batch = torch.randn(7, 4).double(), {"label": torch.arange(7) % 3, "weight": torch.rand(7)}
    whole = task.loss(net(x), batch)
    (expected,) = torch.autograd.grad(whole, net.weight)
    weight = task.weights(batch).sum()
    parts = []
    for share in shares(7, 2, pairs=False):
        loss = task.loss(net(x[share]), {k: v[share] for k, v in batch.items()}, weight)
        parts.append((loss, *torch.autograd.grad(loss, net.weight)))
    assert sum(p[0] for p in parts).item() == pytest.approx(whole.item(), abs=1e-6)
    assert torch.allclose(sum(p[1] for p in parts), expected, atol=1e-6)


def test_running_norms__of_a_network_with_batch_norm():
    model = make_model("test_mrl")
    norms = list(running_norms(model))
    assert norms
    assert all(getattr(parent, name) is child for parent, name, child in norms)
    assert not list(running_norms(model.requires_grad_(False)))


@pytest.mark.slow
def test_ddp__mrl_fit_under_torchrun_writes_what_one_process_does(tmp_path):
    from mrl.cli import main
    from test_folds import opened
    from test_poc import draw

    data, words = draw(tmp_path / "data", classes=("blank", "dot")), []
    opened(data, tmp_path / "one", "quick")  # the mixers' batch norms hold their statistics
    assert main(["plan", "--out", str(tmp_path / "one")]) == 0
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert main(["fit", "--out", str(tmp_path / "one")]) == 0
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "mrl"]
    done = subprocess.run(
        [*words, "fit", "--out", str(tmp_path / "two")], capture_output=True, text=True, check=False, env=env
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("fitting mrl: ") == 1
    files = [
        sorted(p.relative_to(o).as_posix() for p in o.rglob("*") if p.is_file())
        for o in (tmp_path / "one", tmp_path / "two")
    ]
    assert files[0] == files[1]
    for arm in ("baseline", "mrl"):
        one, two = (json.loads((tmp_path / o / "arms" / arm / "fit.json").read_text()) for o in ("one", "two"))
        assert [c["update"] for c in one["candidates"]] == [c["update"] for c in two["candidates"]]
        losses = [[c["val_loss"] for c in found["candidates"]] for found in (one, two)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    refused = subprocess.run(
        [*words, "audit", "--data", str(data), "--out", str(tmp_path / "x")],
        capture_output=True,
        text=True,
        check=False,
        env=env,
    )
    assert refused.returncode != 0
    assert refused.stderr.count("only `mrl fit`, `mrl curve` and `mrl poc` can share their work") == 1
