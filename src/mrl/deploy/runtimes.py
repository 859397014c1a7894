"""Opening and running an exported file: ONNX Runtime, OpenVINO or torch.export; one call, safe in threads."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from mrl.deploy.archive import check_archive
from mrl.deploy.onnx import PREFIX, one_line, open_session
from mrl.errors import ConfigError, MissingExtra

SUFFIXES = {".onnx": "onnx", ".xml": "openvino", ".pt2": "torch-export"}
NOTES = "mrl.json"
PRECISION_HINTS = {"bf16": "bf16"}  # of OpenVINO; everything else is computed in float32, int8 files in what they say


class Run(Protocol):
    """What calls a file."""

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """(B, 3, H, W) float32 -> (B, K) float32."""


@dataclass(frozen=True)
class Runtime:
    """An exported file, ready to answer; several threads may call it.

    Args:
        format: "onnx", "openvino" or "torch-export".
        run: images (B, 3, H, W) float32 -> probabilities (B, K).
        metadata: what `mrl export` wrote into the file.
    """

    format: str
    run: Run
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, images: np.ndarray | torch.Tensor) -> np.ndarray:
        """(B, 3, H, W) -> (B, K)."""
        array = images.numpy() if isinstance(images, torch.Tensor) else images
        return self.run(np.ascontiguousarray(array, dtype=np.float32))


def files_of(path: Path | str) -> list[Path]:
    """Every file that an export of this name consists of: OpenVINO keeps its weights beside the graph.

    Example:
        >>> [p.name for p in files_of("a/model.xml")]
        ['model.xml', 'model.bin']
    """
    path = Path(path)
    return [path, path.with_suffix(".bin")] if path.suffix.lower() == ".xml" else [path]


def open_runtime(path: Path | str, *, threads: int | None = None) -> Runtime:
    """Opens a file of `mrl export` by its suffix; what computes it needs to be installed, nothing else.

    Args:
        path: `.onnx`, `.xml` (OpenVINO, with its `.bin` beside it) or `.pt2` (torch.export).
        threads: for the work of one call; None takes torch's number. Of a `.pt2` file it is set for all of torch in this
            process, which has no other way.

    Raises:
        ConfigError: not such a file, one that this runtime cannot read, or fewer than 1 thread.
        MissingExtra: an OpenVINO file, and OpenVINO is not installed.

    Example:
        >>> open_runtime("model.h5")
        Traceback (most recent call last):
        mrl.errors.ConfigError: model.h5: give a .onnx, .xml (OpenVINO) or .pt2 (torch.export) file of `mrl export`.
    """
    path = Path(path)
    kind = SUFFIXES.get(path.suffix.lower())
    if kind is None:
        raise ConfigError(f"{path}: give a .onnx, .xml (OpenVINO) or .pt2 (torch.export) file of `mrl export`.")
    if threads is not None and threads < 1:
        raise ConfigError(f"--threads {threads}: must be a whole number of at least 1.")
    if not path.is_file():
        raise ConfigError(f"{path}: not found; give a file that `mrl export` (or `mrl poc`) wrote.")
    return {"onnx": _onnx, "openvino": _openvino, "torch-export": _torch_export}[kind](path, threads)


def _onnx(path: Path, threads: int | None) -> Runtime:
    session = open_session(path, threads=threads)
    notes = session.get_modelmeta().custom_metadata_map
    metadata = {key.removeprefix(PREFIX): _json(text) for key, text in notes.items() if key.startswith(PREFIX)}
    return Runtime("onnx", lambda images: session.run(None, {"image": images})[0], metadata)


def openvino() -> Any:
    """The module `openvino`.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        import openvino as ov
    except ModuleNotFoundError as error:
        raise MissingExtra("OpenVINO is not installed; run `pip install mrl[openvino]`.") from error
    return ov


def _openvino(path: Path, threads: int | None) -> Runtime:
    ov = openvino()
    if not path.with_suffix(".bin").is_file():
        raise ConfigError(f"{path}: its weights, {path.with_suffix('.bin').name}, are not beside it; copy both files.")
    try:
        model = ov.Core().read_model(path)
    except RuntimeError as error:
        raise ConfigError(f"{path.name} cannot be opened by OpenVINO: {one_line(error)}.") from error
    notes = model.get_rt_info(["mrl", NOTES]).astype(str) if model.has_rt_info(["mrl", NOTES]) else "{}"
    metadata = _json(notes)
    metadata = metadata if isinstance(metadata, dict) else {}
    return Runtime("openvino", compile_openvino(model, metadata.get("precision", "fp32"), threads), metadata)


def compile_openvino(model: Any, precision: str = "fp32", threads: int | None = None) -> Run:
    """An OpenVINO model on the CPU with the precision said, not chosen by the plugin; every thread has its own request.

    It is compiled when it is first needed: for single images with the batch of 1 written into the graph, which is up to 1.4
    times faster (mrl_13 in int8), and once more for any other batch, where there are such calls.

    Args:
        model: of `openvino.Core().read_model`.
        precision: "bf16" computes in bfloat16; anything else in float32, int8 layers in int8.
        threads: None takes torch's number.

    Raises:
        ConfigError: at the first call, where OpenVINO cannot compile it.
    """
    settings = {
        "INFERENCE_PRECISION_HINT": PRECISION_HINTS.get(precision, "f32"),
        "INFERENCE_NUM_THREADS": threads or torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    core, compiled, lock, local = openvino().Core(), {}, threading.Lock(), threading.local()

    def request(single: bool) -> Any:
        own = local.__dict__.setdefault("requests", {})
        if single not in own:
            with lock:
                if single not in compiled:
                    try:
                        compiled[single] = core.compile_model(_of_one(model) if single else model, "CPU", settings)
                    except RuntimeError as error:
                        raise ConfigError(f"OpenVINO cannot compile the model: {one_line(error)}.") from error
            own[single] = compiled[single].create_infer_request()
        return own[single]

    def run(images: np.ndarray) -> np.ndarray:
        return np.array(request(len(images) == 1).infer([images])[0], dtype=np.float32)

    return run


def _of_one(model: Any) -> Any:
    """The model for a batch of 1; as it is, where that cannot be written into its graph."""
    fixed = model.clone()
    try:
        fixed.reshape([1, *list(model.input(0).partial_shape)[1:]])
    except RuntimeError:
        return model
    return fixed


def _torch_export(path: Path, threads: int | None) -> Runtime:
    check_archive(path)
    extra = {NOTES: ""}
    try:
        program = torch.export.load(path, extra_files=extra)
    except (RuntimeError, ValueError, KeyError) as error:
        raise ConfigError(f"{path.name} cannot be opened by torch.export: {one_line(error)}.") from error
    if threads is not None:
        torch.set_num_threads(threads)
    module = program.module()
    metadata = _json(extra[NOTES] or "{}")

    @torch.inference_mode()
    def run(images: np.ndarray) -> np.ndarray:
        return module(torch.from_numpy(images)).numpy()

    return Runtime("torch-export", run, metadata if isinstance(metadata, dict) else {})


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None
