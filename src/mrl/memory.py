"""Memory: the peak of a process that runs a model, and what this machine has left."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from mrl.macs import Cost

_CHILD = """
import sys
import numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.inter_op_num_threads = int(sys.argv[3]), 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
for _ in range(2):
    session.run(None, {"image": numpy.load(sys.argv[2])})
peak = None
try:
    with open("/proc/self/status") as file:
        peak = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
except OSError:
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(peak)
"""


def peak_memory_mb(model_file: Path | str, image_file: Path | str) -> float | None:
    """The peak resident memory of a fresh process that loads an ONNX file and runs it, in MB of 1e6 bytes.

    On Linux it is the process's own high-water mark: what `getrusage` says of a child includes the parent's peak.

    Args:
        model_file: the ONNX file.
        image_file: a `.npy` file with its input.

    Returns:
        None where the system does not tell, or the file does not run.

    Example:
        >>> peak_memory_mb("no.onnx", "no.npy") is None
        True
    """
    command = [sys.executable, "-c", _CHILD, str(model_file), str(image_file), str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    return int(done.stdout) / 1e6 if done.returncode == 0 else None


def memory_left_mb() -> float | None:
    """Memory that can still be taken on this machine, in MB of 1e6 bytes; None where the system does not tell.

    Example:
        >>> (memory_left_mb() or 1) > 0
        True
    """
    info = Path("/proc/meminfo")
    if not info.is_file():
        return None
    left = next((int(line.split()[1]) * 1024 for line in info.read_text().splitlines() if "MemAvailable" in line), None)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if left is not None and limit.is_file() and used.is_file() and limit.read_text().strip().isdigit():
        left = min(left, int(limit.read_text()) - int(used.read_text()))
    return None if left is None else left / 1e6


def needed_mb(cost: Cost, batch: int = 1) -> float:
    """A rough guess of what running a model takes, in MB of 1e6 bytes.

    About four of the largest tensors at once, and the float32 weights three times while ONNX Runtime loads them.

    Args:
        cost: of one image.
        batch: images at once.

    Example:
        >>> needed_mb(Cost(params_m=1.0, gmacs=1.0, largest_tensor_mb=2.0), batch=2)
        28.0
    """
    return 4 * batch * cost.largest_tensor_mb + 12 * cost.params_m
