"""Timing several things side by side, so that the machine's moods hit all of them alike."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

Call = Callable[[int], object]
Blocks = dict[str, list[list[float]]]

MIN_BLOCKS = 5
MAX_CALLS = 1000  # of each arm in a row: the whole sample is kept in the results


@contextlib.contextmanager
def no_gc() -> Iterator[None]:
    """Python's garbage collector is off inside, and as it was before after it."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def timed_ms(call: Call, index: int) -> float:
    """The wall time of `call(index)` in milliseconds."""
    start = time.perf_counter_ns()
    call(index)
    return (time.perf_counter_ns() - start) / 1e6


def warm_up(call: Call, *, seconds: float = 2.0, spread: float = 0.1) -> float:
    """Calls until the time is stable; returns the median of the last calls in milliseconds.

    Stable: the last 3 calls lie within `spread` of each other. It stops at `seconds`, but not before the second call,
    and the first one, which also sets things up, counts for nothing.

    Example:
        >>> warm_up(lambda i: time.sleep(0.002)) >= 2
        True
    """
    times: list[float] = []
    start = time.monotonic()
    while True:
        times.append(timed_ms(call, len(times)))
        last = times[-3:]
        if len(times) >= 5 and max(last) <= (1 + spread) * min(last):
            break
        if len(times) >= 2 and time.monotonic() - start > seconds:
            break
    return float(np.median(times[1:][-3:]))


def schedule(latencies_ms: Mapping[str, float], *, seconds: float, min_blocks: int) -> tuple[int, int]:
    """How many blocks, and calls of each arm in a block, fit into about `seconds`: (blocks, calls).

    A block takes at least 25 ms where calls are short, so that the change between arms is a small part of it.
    The number of blocks is even, so that each order of the arms occurs equally often, unless it is `min_blocks`.

    Example:
        >>> schedule({"a": 10.0, "b": 5.0}, seconds=9.0, min_blocks=30)
        (120, 5)
        >>> schedule({"a": 1000.0, "b": 500.0}, seconds=3.0, min_blocks=5)
        (5, 1)
    """
    fastest, total = min(latencies_ms.values()), sum(latencies_ms.values())
    calls = int(min(10, max(1, round(25 / max(fastest, 1e-3)))))
    blocks = int(seconds * 1e3 / max(total * calls, 1e-6))
    blocks = min(blocks, MAX_CALLS // calls) // 2 * 2
    return max(blocks, min_blocks), calls


def interleave(calls: Mapping[str, Call], *, blocks: int, calls_per_block: int) -> Blocks:
    """Times every arm in each block, in the order A B, B A, A B, ...: milliseconds, a list a block and arm.

    Args:
        calls: one function an arm; it gets the number of the call, the same numbers for every arm.
        blocks: rounds through all the arms.
        calls_per_block: consecutive calls of an arm in a block.

    Example:
        >>> order = []
        >>> calls = {"a": lambda i: order.append("a"), "b": lambda i: order.append("b")}
        >>> times = interleave(calls, blocks=2, calls_per_block=1)
        >>> order, len(times["a"])
        (['a', 'b', 'b', 'a'], 2)
    """
    times: Blocks = {arm: [] for arm in calls}
    with no_gc():
        for block in range(blocks):
            arms = list(calls) if block % 2 == 0 else list(reversed(calls))
            for arm in arms:
                first = block * calls_per_block
                times[arm].append([timed_ms(calls[arm], first + i) for i in range(calls_per_block)])
    return times


def summary(blocks: Sequence[Sequence[float]], batch: int) -> dict[str, object]:
    """Median, tail and throughput of one arm, and the whole sample in the order it was taken, in milliseconds.

    Example:
        >>> row = summary([[10.0, 20.0], [30.0, 40.0]], batch=2)
        >>> row["latency_ms_median"], row["throughput_img_s"]
        (25.0, 80.0)
    """
    flat = np.asarray([t for block in blocks for t in block], dtype=np.float64)
    return {
        "latency_ms_median": float(np.median(flat)),
        "latency_ms_p95": float(np.percentile(flat, 95)),
        "latency_ms_p99": float(np.percentile(flat, 99)),
        "latency_ms_mean": float(flat.mean()),
        "throughput_img_s": float(batch * len(flat) / flat.sum() * 1e3),
        "n_calls": len(flat),
        "samples_ms": [round(float(t), 4) for t in flat],
    }


@contextlib.contextmanager
def joules() -> Iterator[Callable[[], float | None]]:
    """Gives a function that says, after the block, the energy its processors took in J, or None where the machine does not tell.

    Reads the counters of Linux's powercap (Intel and AMD), which count everything that ran on the package meanwhile.

    Example:
        >>> with joules() as spent:
        ...     pass
        >>> spent() is None or spent() >= 0
        True
    """
    counters = _energy_uj()
    result: list[float | None] = [None]
    yield lambda: result[0]
    after = _energy_uj()
    if counters and after.keys() == counters.keys():
        parts = [(after[k][0] - counters[k][0]) % (after[k][1] + 1) for k in after]
        result[0] = sum(parts) / 1e6


def _energy_uj() -> dict[str, tuple[int, int]]:
    """Microjoules so far and where the counter starts again, by package; empty where they cannot be read."""
    found = {}
    for zone in sorted(Path("/sys/class/powercap").glob("intel-rapl:?")):
        try:
            found[zone.name] = tuple(int((zone / n).read_text()) for n in ("energy_uj", "max_energy_range_uj"))
        except (OSError, ValueError):
            return {}
    return found


def mean_interval(
    blocks: Sequence[Sequence[float]], *, seed: int, alpha: float = 0.05, resamples: int = 2000
) -> tuple[float, float, float]:
    """The mean of all calls with its percentile bootstrap interval over blocks: (estimate, low, high).

    The mean, not the median: the time that a million images take is the sum of their times, tail included.

    Example:
        >>> mean_interval([[1.0, 1.0], [1.0, 1.0]], seed=0)
        (1.0, 1.0, 1.0)
    """
    means = np.asarray([float(np.mean(block)) for block in blocks])
    picks = np.random.default_rng(seed).integers(0, len(means), (resamples, len(means)))
    low, high = np.quantile(means[picks].mean(1), [alpha / 2, 1 - alpha / 2])
    return float(means.mean()), float(low), float(high)
