"""Folds by one process, two processes and two Ray workers: the same files; and whole when a worker is killed."""

import csv
import importlib.util
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import torch

from mrl import executor
from mrl.cli import main
from mrl.errors import ConfigError, DataError, MissingExtra, MrlError
from mrl.executor import Executor, Task, gpu_of, threads_each
from mrl.run import write_json
from test_folds import TINY, _small, opened  # noqa: F401
from test_poc import draw

RAY = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
TWO = [pytest.param("local", id="local"), pytest.param("ray", id="ray", marks=RAY)]


def note(folder: str, name: str, seconds: float = 0.0, refuse: str = "") -> None:
    """A task: says which process it is in, waits, and leaves a file."""
    with (Path(folder) / "tries").open("a") as file:
        file.write(f"{name} {os.getpid()} {torch.get_num_threads()}\n")
    time.sleep(seconds)
    if refuse:
        raise DataError(refuse)
    write_json(Path(folder) / f"{name}.json", {"pid": os.getpid()})


def tries(folder: Path) -> list[list[str]]:
    path = folder / "tries"
    return [line.split() for line in path.read_text().splitlines()] if path.is_file() else []


def tasks(folder: Path, names: str, **more) -> list[Task]:
    return [Task(n, "test_executor:note", {"folder": str(folder), "name": n, **more}) for n in names]


def background(folder: Path, kind: str, names: str, seconds: float) -> subprocess.Popen:
    """The tasks on two workers, driven by a process of its own."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; import test_executor as t\n"
        "t.Executor(sys.argv[3], 2).run(t.tasks(Path(sys.argv[2]), sys.argv[4], seconds=float(sys.argv[5])))"
    )
    words = [sys.executable, "-c", code, str(Path(__file__).parent), str(folder), kind, names, str(seconds)]
    return subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def until(true, limit: float = 120.0) -> None:
    end = time.monotonic() + limit
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("kind", TWO)
def test_executor__a_killed_worker_is_replaced_and_an_error_is_told(tmp_path, kind):
    driver = background(tmp_path, kind, "abc", 2.0)
    until(lambda: tries(tmp_path))
    victim = tries(tmp_path)[0]
    assert int(victim[1]) != driver.pid
    os.kill(int(victim[1]), signal.SIGKILL)
    assert driver.wait(240) == 0, driver.stderr.read()
    driver.stderr.close()
    assert sorted(p.stem for p in tmp_path.glob("*.json")) == list("abc")
    assert Counter(name for name, *_ in tries(tmp_path)) == {**dict.fromkeys("abc", 1), victim[0]: 2}
    with pytest.raises(MrlError, match="the lens is broken"):
        Executor(kind, 2).run(tasks(tmp_path, "e", refuse="the lens is broken"))


@pytest.mark.slow
def test_executor__workers_end_with_the_process_that_started_them(tmp_path):
    driver = background(tmp_path, "local", "ab", 60.0)
    until(lambda: len(tries(tmp_path)) == 2)
    driver.kill()
    driver.wait()
    driver.stderr.close()
    until(lambda: not any(psutil.pid_exists(int(pid)) for _, pid, _ in tries(tmp_path)), 10)


def test_executor__here_is_this_process(tmp_path):
    Executor().run(tasks(tmp_path, "ab"))
    assert {int(pid) for _, pid, _ in tries(tmp_path)} == {os.getpid()}


def test_executor__wrong_words(monkeypatch):
    with pytest.raises(ConfigError, match="--workers 0: use 1 or more"):
        Executor(workers=0)
    with pytest.raises(ConfigError, match="say --executor ray too"):
        Executor(address="10.0.0.1:6379")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"run `pip install mrl\[ray\]`"):
        Executor("ray").run([])
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ConfigError, match="torchrun and accelerate launch share one fit"):
        Executor("ray")


@pytest.mark.parametrize(
    ("cpus", "workers", "threads"),
    [([16, 16, 16], 1, 16), ([16, 16, 16], 2, 16), ([16, 16, 16], 3, 16), ([16, 16, 16], 6, 8), ([0, 4], 1, 4)]
    + [([2, 2], 8, 1), ([0.5], 1, 1), ([], 1, 1)],
)
def test_threads_each__one_task_fits_on_one_node(cpus, workers, threads):
    assert threads_each(cpus, workers) == threads


@pytest.mark.parametrize(
    ("gpus", "visible", "expected"),
    [(3, None, ["0", "1", "2", "0"]), (2, "4,7", ["4", "7", "4", "7"]), (2, " GPU-a, GPU-b ", ["GPU-a", "GPU-b"])]
    + [(2, "1,3,-1,0", ["1", "3", "1"])],  # CUDA sees what stands before the first that is not there
)
def test_gpu_of__workers_take_turns_among_the_gpus_that_may_be_used(gpus, visible, expected):
    assert [gpu_of(slot, gpus, visible) for slot in range(len(expected))] == expected


@pytest.mark.parametrize("visible", [None, "2,5"])
def test_start__gives_each_worker_a_gpu_of_its_own(monkeypatch, visible):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    told = []

    class Process:
        def __init__(self, *args, env, **more):
            told.append(env["CUDA_VISIBLE_DEVICES"])
            self.stdin = io.StringIO()

    monkeypatch.setattr("mrl.executor.subprocess.Popen", Process)
    for slot in range(3):
        executor._start(Task("a sum", "math:fsum", {}), slot, 1)
    assert told == (["0", "1", "0"] if visible is None else ["2", "5", "2"])


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A run of two folds, twice, as it is before anything is fitted, and after one process fitted it."""
    place = tmp_path_factory.mktemp("runs")
    data = draw(place / "data", classes=("blank", "dot"))
    opened(data, place / "fresh")
    assert main(["plan", "--out", str(place / "fresh")]) == 0  # timed once: all executors get the same plan
    shutil.copytree(place / "fresh", place / "here")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    assert main(["fit", "--out", str(place / "here")]) == 0
    assert main(["evaluate", "--out", str(place / "here")]) == 0
    torch.set_num_threads(before)
    return place


def table(out: Path) -> list[dict[str, str]]:
    with (out / "predictions.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
@pytest.mark.parametrize("kind", TWO)
def test_fit__by_two_workers_gives_the_files_of_one_process(fitted, tmp_path, kind, monkeypatch):
    monkeypatch.setattr("mrl.executor._cores", lambda: 2)
    out = shutil.copytree(fitted / "fresh", tmp_path / "run")
    assert main(["fit", "--out", str(out), "--executor", kind, "--workers", "2"]) == 0
    assert main(["evaluate", "--out", str(out)]) == 0
    assert (out / "predictions.csv").read_bytes() == (fitted / "here" / "predictions.csv").read_bytes()
    assert {p.relative_to(out) for p in out.rglob("*") if p.is_file()} == {
        p.relative_to(fitted / "here") for p in (fitted / "here").rglob("*") if p.is_file()
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", TWO)
def test_fit__finishes_whole_when_a_worker_is_killed(fitted, tmp_path, kind):
    out = shutil.copytree(fitted / "fresh", tmp_path / "run")
    words = [sys.executable, "-m", "mrl", "fit", "--out", str(out), "--executor", kind, "--workers", "2"]
    driver = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    until(lambda: list(out.glob("folds/*/arms/*/inner/metrics.jsonl")) or driver.poll() is not None)
    workers = [p for p in psutil.Process(driver.pid).children(recursive=True) if _works(p)]
    assert workers
    workers[0].kill()
    _, said = driver.communicate(timeout=400)
    assert driver.returncode == 0, said
    assert main(["evaluate", "--out", str(out)]) == 0
    assert table(out) == table(fitted / "here")


def _works(process: psutil.Process) -> bool:
    """Whether a process has a fold in hand."""
    words = " ".join(process.cmdline())
    return "mrl.executor" in words or words.startswith("ray::_work")


@pytest.mark.slow
def test_poc__by_two_workers_is_whole(tmp_path, monkeypatch):
    data = draw(tmp_path / "data", classes=("blank", "dot"))
    out = tmp_path / "run"
    words = ["poc", "--data", str(data), "--out", str(out), *TINY, "--preset", "quick", "--workers", "2"]
    assert main([*words, "--tracker", "tensorboard"]) == 0
    assert (out / "report.html").is_file()
    assert len(list(out.rglob("events.out.tfevents.*"))) == 2
    assert "tracker" not in (out / "protocol.yaml").read_text()
    assert main(words) == 0  # finished already
