"""Many tasks at once: one after the other here, in processes of this machine, or on Ray; a task whose worker dies is run again."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mrl.errors import ConfigError, MissingExtra, MrlError
from mrl.run import say, world

KINDS = ("local", "ray")
RETRIES = 3  # of a task, after the first try
POLL_S = 0.2
REFUSED = 3  # exit status of a worker that met a user's error
_CHILD = "from mrl.executor import child; child()"


@dataclass(frozen=True)
class Task:
    """A function with plain arguments, which may be called again where an earlier call was killed.

    Args:
        name: for the messages.
        function: module:function.
        arguments: what JSON has.
    """

    name: str
    function: str
    arguments: Mapping[str, Any]

    def call(self) -> None:
        """Runs it in this process."""
        module, _, name = self.function.partition(":")
        getattr(importlib.import_module(module), name)(**self.arguments)


@dataclass(frozen=True)
class Executor:
    """Where tasks run.

    Args:
        kind: local or ray.
        workers: tasks at a time; 1 with local runs them in this process. The cores and GPUs are divided among them.
        address: of a Ray cluster; None is RAY_ADDRESS, or a Ray of its own on this machine.

    Raises:
        ConfigError: an unknown kind, a number below 1, an address without Ray, or many workers inside a launch of torchrun.

    Example:
        >>> Executor().run([Task("a sum", "math:fsum", {})])
        Traceback (most recent call last):
        TypeError: math.fsum() takes exactly one argument (0 given)
        >>> Executor("slurm")
        Traceback (most recent call last):
        mrl.errors.ConfigError: --executor slurm: unknown; use local or ray.
    """

    kind: str = "local"
    workers: int = 1
    address: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"--executor {self.kind}: unknown; use local or ray.")
        if self.workers < 1:
            raise ConfigError(f"--workers {self.workers}: use 1 or more.")
        if self.address is not None and self.kind != "ray":
            raise ConfigError(f"--ray-address {self.address}: say --executor ray too, or leave it out.")
        if world() > 1 and not self.here:
            raise ConfigError(
                "--executor and --workers share out many fits, torchrun and accelerate launch share one fit; use one of the two."
            )

    @property
    def here(self) -> bool:
        """Whether tasks run in this process, one after the other."""
        return self.kind == "local" and self.workers == 1

    def run(self, tasks: Sequence[Task]) -> None:
        """Runs all tasks; returns when every one is done.

        Raises:
            MrlError: what a task met, or one whose worker died again and again.
            MissingExtra: Ray is not installed.
        """
        if self.here:
            for task in tasks:
                task.call()
        elif self.kind == "local":
            _local(tasks, self.workers)
        else:
            _on_ray(tasks, self.workers, self.address)


def _local(tasks: Sequence[Task], workers: int) -> None:
    waiting, running = deque((task, 0) for task in tasks), {}
    threads = max(1, _cores() // workers)
    try:
        while waiting or running:
            for slot in range(workers):
                if waiting and slot not in running:
                    task, tries = waiting.popleft()
                    running[slot] = (_start(task, slot, threads), task, tries)
            for slot, (process, task, tries) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[slot]
                said = process.stdout.read()
                process.stdin.close()
                process.stdout.close()
                if process.returncode == REFUSED:
                    raise MrlError(json.loads(said)["error"])
                if process.returncode > 0:
                    raise RuntimeError(f"{task.name}: its worker failed with status {process.returncode}, see above.")
                if process.returncode < 0:
                    if tries == RETRIES:
                        raise MrlError(_died(task))
                    say(f"{task.name}: its worker died (signal {-process.returncode}); it goes on in another")
                    waiting.append((task, tries + 1))
            time.sleep(POLL_S)
    finally:
        for process, _, _ in running.values():
            process.terminate()
        for process, _, _ in running.values():
            process.wait()
            process.stdin.close()
            process.stdout.close()


def _died(task: Task) -> str:
    return (
        f"{task.name}: its worker died {RETRIES + 1} times, often for want of memory; use fewer --workers. The same command "
        "goes on from here."
    )


def _start(task: Task, slot: int, threads: int) -> subprocess.Popen:
    """A process that waits for its task on standard input, and dies with this one."""
    import torch

    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    gpus = torch.cuda.device_count()
    if gpus > 1:
        env["CUDA_VISIBLE_DEVICES"] = gpu_of(slot, gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))
    env["PYTHONPATH"] = os.pathsep.join(_paths())
    process = subprocess.Popen(
        [sys.executable, "-c", _CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True
    )
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(json.dumps([task.name, task.function, dict(task.arguments), threads]) + "\n")
        process.stdin.flush()
    return process


def gpu_of(slot: int, gpus: int, visible: str | None) -> str:
    """The GPU of a worker, as CUDA_VISIBLE_DEVICES names it; the workers take turns.

    Args:
        slot: number of the worker, from 0.
        gpus: that this process sees.
        visible: its own CUDA_VISIBLE_DEVICES, numbers or UUIDs with commas between; None where it is not set.

    Example:
        >>> gpu_of(1, 2, None), gpu_of(2, 2, None), gpu_of(1, 2, "2,5")
        ('1', '0', '5')
    """
    names = list(map(str, range(gpus))) if visible is None else [name.strip() for name in visible.split(",")][:gpus]
    return names[slot % len(names)]


def child() -> None:
    """What a process of `_local` does: one task, read from standard input, which stays open as long as its parent lives."""
    name, function, arguments, threads = json.loads(sys.stdin.readline())

    def watch() -> None:
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    result, sys.stdout = sys.stdout, sys.stderr
    error = _work(name, function, arguments, threads)
    if error is not None:
        json.dump({"error": error}, result)
        result.flush()
    sys.stderr.flush()
    os._exit(0 if error is None else REFUSED)  # the watching thread holds standard input


def _work(
    name: str, function: str, arguments: Mapping[str, Any], threads: int, paths: Sequence[str] = ()
) -> str | None:
    """Runs a task in a worker; returns the sentence of a user's error, or None."""
    import torch

    torch.set_num_threads(threads)
    sys.path += [path for path in paths if path not in sys.path]
    try:
        Task(name, function, arguments).call()
    except MrlError as error:
        return str(error)
    return None


def _on_ray(tasks: Sequence[Task], workers: int, address: str | None) -> None:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ModuleNotFoundError as error:
        raise MissingExtra("--executor ray: Ray is not installed; run `pip install mrl[ray]`.") from error
    ours = not ray.is_initialized()
    if ours:
        address = address or os.environ.get("RAY_ADDRESS")
        alone = {"include_dashboard": False, "num_cpus": max(workers, _cores())}
        try:
            ray.init(address=address or "local", logging_level="warning", **({} if address else alone))
        except ConnectionError as error:
            raise ConfigError(f"--ray-address {address}: no Ray answers there; start it with `ray start`.") from error
    try:
        _through_ray(ray, tasks, workers)
    finally:
        if ours:
            ray.shutdown()


def _through_ray(ray: Any, tasks: Sequence[Task], workers: int) -> None:
    there = ray.cluster_resources()
    threads = threads_each([node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]], workers)
    gpus = min(1.0, there.get("GPU", 0.0) / workers)
    remote = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=RETRIES)(_work)
    waiting, running = deque(tasks), {}
    while waiting or running:
        while waiting and len(running) < workers:
            task = waiting.popleft()
            running[remote.remote(task.name, task.function, dict(task.arguments), threads, _paths())] = task
        for ref in ray.wait(list(running))[0]:
            task = running.pop(ref)
            try:
                error = ray.get(ref)
            except (
                ray.exceptions.WorkerCrashedError,
                ray.exceptions.NodeDiedError,
                ray.exceptions.OutOfMemoryError,
            ) as dead:
                raise MrlError(_died(task)) from dead
            if error is not None:
                raise MrlError(error)


def threads_each(cpus: Sequence[float], workers: int) -> int:
    """Threads of one task on a cluster: its share of all CPUs, but no more than the largest node has, where it must fit.

    Args:
        cpus: of each node.
        workers: tasks at a time.

    Example:
        >>> threads_each([4, 4], workers=1), threads_each([4, 4], workers=4), threads_each([2], workers=8)
        (4, 2, 1)
    """
    return max(1, min(int(sum(cpus)) // workers, int(max(cpus, default=1))))


def _paths() -> list[str]:
    """Where this process finds modules, for a worker to find the same."""
    return [path or os.getcwd() for path in sys.path]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
