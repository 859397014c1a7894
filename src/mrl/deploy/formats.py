"""Writing one model as ONNX, OpenVINO or torch.export, in float32, fp16, bf16 or int8; nothing is proved here."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mrl import run
from mrl.deploy.onnx import PREFIX, Probabilities, one_line, plain_float, to_onnx
from mrl.deploy.runtimes import NOTES, files_of, openvino
from mrl.errors import ConfigError
from mrl.macs import image_pair

FORMATS = {"onnx": ".onnx", "openvino": ".xml", "torch-export": ".pt2"}
PRECISIONS = ("fp32", "fp16", "bf16", "int8")
NOT_OFFERED = {
    ("onnx", "bf16"): "ONNX Runtime has no bfloat16 operators on a CPU; use --format openvino or torch-export.",
    ("torch-export", "int8"): "int8 is made for ONNX Runtime and OpenVINO; use --format openvino or onnx.",
}


def check_choice(format: str, precision: str) -> None:
    """Raises ConfigError for a format or precision that is unknown, or a pair that is not offered, with what to use.

    Example:
        >>> check_choice("onnx", "bf16")
        Traceback (most recent call last):
        mrl.errors.ConfigError: --format onnx --precision bf16: ONNX Runtime has no bfloat16 operators on a CPU; use --format openvino or torch-export.
    """
    if format not in FORMATS:
        raise ConfigError(f"--format {format}: unknown; use {', '.join(FORMATS)}.")
    if precision not in PRECISIONS:
        raise ConfigError(f"--precision {precision}: unknown; use {', '.join(PRECISIONS)}.")
    if (format, precision) in NOT_OFFERED:
        raise ConfigError(f"--format {format} --precision {precision}: {NOT_OFFERED[format, precision]}")


class Lower(nn.Module):
    """A model that computes in fp16 or bf16 between float32 images and float32 probabilities.

    Args:
        model: gives logits; converted in place.
        dtype: torch.float16 or torch.bfloat16.

    Shape:
        image (B, 3, H, W) float32 -> logits (B, K) float32.

    Example:
        >>> Lower(nn.Flatten(), torch.bfloat16)(torch.zeros(1, 1, 1, 2)).dtype
        torch.float32
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model.to(dtype), dtype

    def forward(self, image: Tensor) -> Tensor:
        """Logits in float32."""
        return self.model(image.to(self.dtype)).float()


def write_format(
    model: nn.Module,
    path: Path | str,
    image_size: int | tuple[int, int],
    *,
    precision: str = "fp32",
    metadata: Mapping[str, Any] | None = None,
    calibration: Sequence[Tensor] = (),
    accuracy: Any = None,
) -> Path:
    """Writes a classifier in the format of the path's suffix; any batch size, one image size; it is not altered.

    Args:
        model: gives logits (B, K).
        path: `.onnx`, `.xml` or `.pt2`; replaced where it exists.
        image_size: pixels along a side, or (height, width).
        precision: "fp32", "fp16", "bf16" or "int8".
        metadata: travels in the file.
        calibration: preprocessed images (3, H, W) that set the ranges of int8.
        accuracy: `mrl.deploy.quantise.Accuracy`, that int8 may not lose more of than it says.

    Raises:
        ConfigError: a pair that is not offered, int8 without images, or a model that cannot be written so.
        MissingExtra: OpenVINO or NNCF is needed and not installed.
    """
    path = Path(path)
    kind = {suffix: name for name, suffix in FORMATS.items()}[path.suffix]
    check_choice(kind, precision)
    notes = {**(metadata or {}), "precision": precision, "format": kind}
    if kind == "torch-export":
        return _torch_export(lowered(model, precision), path, image_pair(image_size), notes)
    with tempfile.TemporaryDirectory() as folder:
        source = path if kind == "onnx" and precision == "fp32" else Path(folder) / "model.onnx"
        source_model = lowered(model, precision) if kind == "onnx" else plain_float(model)
        to_onnx(source_model, source, image_size, metadata=notes, as_float=False)
        if precision == "int8":
            from mrl.deploy.quantise import quantise

            quantised = quantise(source, kind, calibration, accuracy)
            _write_onnx(quantised, path, notes) if kind == "onnx" else _write_openvino(quantised, path, notes)
        elif kind == "onnx" and source != path:
            with run.writing(path) as part:
                part.write_bytes(source.read_bytes())
        elif kind == "openvino":
            _write_openvino(openvino().Core().read_model(source), path, notes)
    return path


def lowered(model: nn.Module, precision: str) -> nn.Module:
    """The model in eval mode and this precision, on the CPU; int8 starts from float32.

    Args:
        model: gives logits; it is not altered.
        precision: "fp32", "fp16", "bf16" or "int8".

    Example:
        >>> lowered(nn.Linear(1, 1), "fp32").training
        False
    """
    plain = plain_float(model)
    if precision in ("fp32", "int8"):
        return plain
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    return Lower(copy.deepcopy(plain), dtype).eval()


def _write_onnx(model: Any, path: Path, notes: Mapping[str, Any]) -> None:
    """An ONNX model with our metadata, weights inside."""
    import onnx

    del model.metadata_props[:]
    for key, value in notes.items():
        model.metadata_props.add(key=PREFIX + key, value=json.dumps(run.plain(value), ensure_ascii=False))
    model.producer_name = "mrl"
    with run.writing(path) as part:
        onnx.save(model, str(part))


def _write_openvino(model: Any, path: Path, notes: Mapping[str, Any]) -> None:
    """Graph and weights; fp16 stores its weights in half."""
    for name in list(model.get_rt_info()):
        if name not in ("nncf",):
            model.set_rt_info("", [name])
    model.set_rt_info(json.dumps(run.plain(notes), ensure_ascii=False), ["mrl", NOTES])
    model.set_friendly_name("mrl")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        openvino().save_model(model, made, compress_to_fp16=notes["precision"] == "fp16")
        for part in files_of(made)[::-1]:
            part.replace(path.with_name(part.name))


def _torch_export(model: nn.Module, path: Path, size: tuple[int, int], notes: Mapping[str, Any]) -> Path:
    image = torch.linspace(-2, 2, 3 * size[0] * size[1]).reshape(1, 3, *size).repeat(2, 1, 1, 1)
    dynamic = ({0: torch.export.Dim("batch")},)
    try:
        with torch.no_grad():
            program = torch.export.export(Probabilities(model).eval(), (image,), dynamic_shapes=dynamic)
    except Exception as error:  # torch.export raises nearly anything
        name = type(model).__name__
        raise ConfigError(f"{name} cannot be exported by torch.export: {one_line(error)}.") from error
    for node in program.graph.nodes:  # stack traces hold the paths of this machine
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node", "torch_fn"):
            node.meta.pop(key, None)
    program._example_inputs = None
    with run.writing(path) as part:
        made = part.with_suffix(".pt2")
        torch.export.save(program, made, extra_files={NOTES: json.dumps(run.plain(notes), ensure_ascii=False)})
        made.replace(part)
    return path


def stacked(images: Sequence[Tensor]) -> np.ndarray:
    """Images as one float32 array (N, 3, H, W).

    Example:
        >>> stacked([torch.zeros(3, 2, 2)]).shape
        (1, 3, 2, 2)
    """
    return torch.stack(list(images)).float().numpy()
