"""What a fresh process needs to answer once: seconds from its start, and memory at its peak."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

_START = """
import sys, json, time
path, image, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
import numpy
pixels = numpy.load(image)
"""
_BODY = {
    ".onnx": """
import onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, {"image": pixels})
""",
    ".xml": """
import openvino
settings = {"INFERENCE_PRECISION_HINT": sys.argv[4], "INFERENCE_NUM_THREADS": threads}
openvino.Core().compile_model(path, "CPU", settings)([pixels])
""",
    ".pt2": """
import torch
torch.set_num_threads(threads)
with torch.inference_mode():
    torch.export.load(path).module()(torch.from_numpy(pixels))
""",
    "": """
import torch, mrl
from mrl.deploy.formats import lowered
torch.set_num_threads(threads)
model = lowered(mrl.load(path), sys.argv[4])
model = torch.compile(model, dynamic=False) if sys.argv[5] == "compile" else model
with torch.inference_mode():
    model(torch.from_numpy(pixels))
""",
}
_END = """
peak = None
try:
    with open("/proc/self/status") as file:
        peak = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
except OSError:
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(json.dumps(peak))
"""


def cold_start(
    model_file: Path | str, image_file: Path | str, *, threads: int, precision: str = "f32", backend: str = "eager"
) -> dict[str, float | None]:
    """Seconds from starting a process to its first answer, and its peak resident memory in MB of 1e6 bytes.

    Args:
        model_file: `.onnx`, `.xml` or `.pt2`, or a folder of `mrl.save`.
        image_file: a `.npy` file with its input.
        threads: of the runtime.
        precision: the hint for OpenVINO; of a folder "fp32", "fp16" or "bf16".
        backend: of a folder "eager" or "compile".

    Returns:
        cold_start_s and peak_memory_mb; both None where the file does not run, memory None where the system does not tell.

    Example:
        >>> cold_start("no.onnx", "no.npy", threads=1)
        {'cold_start_s': None, 'peak_memory_mb': None}
    """
    code = _START + _BODY[Path(model_file).suffix] + _END
    command = [sys.executable, "-c", code, str(model_file), str(image_file), str(threads), precision, backend]
    begin = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    seconds = time.monotonic() - begin
    if done.returncode:
        return {"cold_start_s": None, "peak_memory_mb": None}
    peak = json.loads(done.stdout.strip().splitlines()[-1])
    return {"cold_start_s": seconds, "peak_memory_mb": None if peak is None else peak / 1e6}
