"""One ONNX file from one model: traced, simplified, and without a word of the machine it was made on."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mrl import run
from mrl.errors import ConfigError
from mrl.macs import image_pair, twin

OPSET = 20
PREFIX = "mrl."
LARGEST_FILE = 2**31 - 2**20  # protobuf's limit of one file, with room for the metadata


class Probabilities(nn.Module):
    """The graph that is exported: softmax(model(image)).

    Args:
        model: gives logits.

    Shape:
        image (B, 3, H, W) -> probabilities (B, K)

    Example:
        >>> Probabilities(nn.Flatten())(torch.zeros(1, 2, 1, 1)).tolist()
        [[0.5, 0.5]]
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        """Probabilities of each class."""
        return torch.softmax(self.model(image), dim=-1)


def plain_float(model: nn.Module) -> nn.Module:
    """The model in eval mode, float32, on the CPU; `model` itself stays as it is, and lends its tensors where it can.

    Example:
        >>> model = nn.Linear(2, 2).bfloat16()
        >>> plain_float(model).weight.dtype, model.weight.dtype
        (torch.float32, torch.bfloat16)
    """
    tensors = [*model.parameters(), *model.buffers()]
    ready = all(t.device.type == "cpu" and (t.dtype == torch.float32 or not t.is_floating_point()) for t in tensors)
    if ready:
        return twin(model)
    return copy.deepcopy(model).eval().float().cpu()


def to_onnx(
    model: nn.Module,
    path: Path | str,
    image_size: int | tuple[int, int],
    *,
    batch: int = 2,
    metadata: Mapping[str, Any] | None = None,
    as_float: bool = True,
) -> Path:
    """Writes a model as one optimised ONNX file, any batch size, one image size; nothing is proved here.

    Input "image" (B, 3, H, W) float32, resized and normalised; output "probabilities" (B, K) float32, after softmax.
    The file holds its weights, and no path of this machine (the exporter's stack traces are taken out).

    Args:
        model: gives logits (B, K); it is not altered, and exported in eval mode and float32.
        path: of the file; replaced where it exists.
        image_size: pixels along a side, or (height, width).
        batch: of the example that is traced, 2 or more; the file takes any.
        metadata: written as JSON under "mrl.<key>".
        as_float: in float32; else the model is in eval mode and computes as it will, between float32 images and logits.

    Raises:
        ConfigError: the model cannot be traced, does not give (B, K), or is larger than one ONNX file can be.

    Example:
        >>> import tempfile
        >>> model = nn.Sequential(nn.Conv2d(3, 2, 4), nn.Flatten())
        >>> to_onnx(model, Path(tempfile.mkdtemp()) / "a.onnx", 4).name
        'a.onnx'
    """
    height, width = image_pair(image_size)
    weight = sum(t.numel() * 4 for t in (*model.parameters(), *model.buffers()))
    if weight > LARGEST_FILE:
        raise ConfigError(f"{type(model).__name__} weighs {weight / 1e9:.1f} GB; one ONNX file holds 2 GB at most.")
    image = torch.linspace(-2, 2, 3 * height * width).reshape(1, 3, height, width).repeat(max(batch, 2), 1, 1, 1)
    program = _traced(Probabilities(plain_float(model) if as_float else model).eval(), image)
    _simplify(program.model)
    _forget_origin(program.model)
    program.model.producer_name = "mrl"
    for key, value in (metadata or {}).items():
        program.model.metadata_props[PREFIX + key] = json.dumps(run.plain(value), ensure_ascii=False)
    with run.writing(path) as part:
        program.save(str(part), external_data=False)
    return Path(path)


def _traced(model: nn.Module, image: Tensor) -> Any:
    name = type(model.model).__name__
    try:
        with torch.no_grad():
            shape = tuple(model(image).shape)
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        size = f"{image.shape[-2]} x {image.shape[-1]}"
        raise ConfigError(f"{name} does not take images of {size} pixels: {one_line(error)}.") from error
    if len(shape) != 2 or shape[0] != len(image):
        raise ConfigError(f"{name} gives {shape} for {len(image)} images; export needs logits (B, K).")
    dynamic = ({0: torch.export.Dim("batch")},)
    names = {"input_names": ["image"], "output_names": ["probabilities"]}
    chatter = io.StringIO()
    try:
        with contextlib.redirect_stdout(chatter), torch.no_grad():
            options = {"dynamo": True, "optimize": False, "verbose": False, "opset_version": OPSET}
            return torch.onnx.export(model, (image,), dynamic_shapes=dynamic, **options, **names)
    except torch.onnx.errors.OnnxExporterError as error:
        raise ConfigError(f"{name} cannot be exported to ONNX: {one_line(error.__cause__ or error)}.") from error


def _simplify(model: Any) -> None:
    """The exporter's optimiser, in an order that is three times as fast: constants and unused nodes go before rules are tried.

    The exporter tries every rule on every node that its lowering made, most of them constants (ViT-S swapped: 6,100 nodes
    and 20 s against 2 s); the resulting latency is the same.
    """
    import onnx_ir.passes.common as common
    from onnx_ir.passes import Sequential
    from onnxscript import optimizer, rewriter

    common.InlinePass()(model)
    for _ in range(2):
        optimizer.fold_constants(model, onnx_shape_inference=True)
        optimizer.remove_unused_nodes(model)
    tidy = (
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )
    Sequential(*tidy)(model)
    rewriter.rewrite(model)
    optimizer.fold_constants(model, onnx_shape_inference=True)
    Sequential(*tidy)(model)


def _forget_origin(model: Any) -> None:
    """Takes out the exporter's notes (stack traces hold the paths of this machine), and names every node by its module."""
    graph = model.graph
    graph.metadata_props.clear()
    values = [*graph.inputs, *graph.initializers.values()]
    for index, node in enumerate(graph.all_nodes()):
        scopes = re.findall(r"'model\.([^']+)'", node.metadata_props.get("pkg.torch.onnx.name_scopes", ""))
        node.name = f"{scopes[-1] if scopes else 'graph'}/{node.op_type}_{index}"
        node.metadata_props.clear()
        node.doc_string = None
        values += node.outputs
    for value in values:
        value.metadata_props.clear()
        value.doc_string = None


def open_session(path: Path | str, *, threads: int | None = None) -> Any:
    """An ONNX Runtime session on the CPU, all graph optimisations on, in float32.

    Its threads stop spinning when a call ends, so that sessions in one process do not take each other's processor.

    Args:
        path: of the ONNX file.
        threads: for the work inside an operator; None takes torch's number.

    Raises:
        ConfigError: not an ONNX file, or one that this ONNX Runtime does not know.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base but this
        raise ConfigError(f"{Path(path).name} cannot be opened by ONNX Runtime: {one_line(error)}.") from error


def one_line(error: BaseException) -> str:
    r"""The first line of an error's text, without its last full stop.

    Example:
        >>> one_line(ValueError("too bad.\nmore"))
        'too bad'
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")
