"""ONNX files that were proved equal to the model they came from, on real images; what is not equal is not written."""

from __future__ import annotations

import contextlib
import copy
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mrl import run
from mrl.errors import ConfigError, ParityError
from mrl.macs import image_pair, twin

OPSET = 20
PREFIX = "mrl."
PARITY_BATCHES = (1, 8)
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
    program = _traced(Probabilities(plain_float(model)).eval(), image)
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
        raise ConfigError(f"{name} does not take images of {size} pixels: {_one_line(error)}.") from error
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
        raise ConfigError(f"{name} cannot be exported to ONNX: {_one_line(error.__cause__ or error)}.") from error


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
    """Takes out the exporter's notes: stack traces hold the paths of this machine."""
    graph = model.graph
    graph.metadata_props.clear()
    values = [*graph.inputs, *graph.initializers.values()]
    for node in graph.all_nodes():
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
        raise ConfigError(f"{Path(path).name} cannot be opened by ONNX Runtime: {_one_line(error)}.") from error


def export_model(
    model: nn.Module,
    path: Path | str,
    *,
    preprocess: Any,
    classes: Sequence[str],
    images: Any,
    tolerance: float = 1e-4,
    meta: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Exports a classifier to ONNX and proves it equal on real images; otherwise writes nothing.

    Every image is given to the model (torch, float32, eval) and to the file (ONNX Runtime), in batches of 8 with an odd
    tail, and up to 32 of them one by one. Probabilities must agree within `tolerance`, and the decisions (the most
    probable class) must be the same. Where the model's two best classes are closer than 2 * `tolerance` to each other,
    either of them counts as the same decision; such images are counted as ties.

    Args:
        model: gives logits (B, K); it is not altered.
        path: of the ONNX file; `<stem>.parity.json` is written beside it.
        preprocess: what images go through first (`mrl.data.Preprocess`, or its dictionary); travels in the file.
        classes: names in the order of the outputs.
        images: real images, preprocessed: a tensor (N, 3, H, W), or items that are (3, H, W) or have it under "image".
        tolerance: the largest difference of a probability.
        meta: more metadata, for example arm, seeds, protocol_sha256, terms; also copied into the answer.
        overwrite: replace a file that exists; without success the old one stays.

    Returns:
        What `export.json` holds: file, sha256, opset, parity, preprocess, classes, environment and `meta`.

    Raises:
        ConfigError: the file exists, there are no real images, or the model cannot be exported.
        ParityError: the file is not equal to the model.
    """
    path = run.refuse_existing(path, overwrite)
    settings = preprocess if isinstance(preprocess, Mapping) else preprocess.to_dict()
    if not len(images):
        raise ConfigError("export_model: no images; equality is proved on real test images, give at least one.")
    first = take_images(images, [0])
    outputs = torch_probabilities(plain_float(model), first).shape[-1]
    if outputs != len(classes):
        raise ConfigError(f"export_model: the model has {outputs} outputs, but there are {len(classes)} classes.")
    environment = run.environment()
    notes = {
        "schema": 1,
        "version": environment["mrl"],
        "preprocess": settings,
        "classes": list(classes),
        "input": "image: (B, 3, H, W) float32 after preprocess",
        "output": "probabilities: (B, K) float32 after softmax, in the order of classes",
        "libraries": {name: environment["libraries"].get(name) for name in ("torch", "timm", "onnx", "onnxruntime")},
        **(meta or {}),
    }
    with run.writing(path) as part:
        to_onnx(model, part, tuple(first.shape[-2:]), metadata=notes)
        parity = check_parity(part, model, images, tolerance=tolerance)
        digest = run.sha256_file(part)
        parity_path(path).unlink(missing_ok=True)
    proof = {"schema": 1, "file": path.name, "sha256": digest, **parity}
    run.write_json(parity_path(path), proof)
    facts = {"schema": 1, "file": path.name, "sha256": digest, "opset": OPSET, "file_mb": path.stat().st_size / 1e6}
    named = {"preprocess": settings, "classes": list(classes), "parity": parity, "environment": environment}
    return {**(meta or {}), **facts, **named}


def parity_path(path: Path | str) -> Path:
    """Where the proof of an ONNX file lies.

    Example:
        >>> parity_path("runs/a/model.onnx").as_posix()
        'runs/a/model.parity.json'
    """
    return Path(path).with_suffix(".parity.json")


def check_parity(path: Path | str, model: nn.Module, images: Any, *, tolerance: float = 1e-4) -> dict[str, Any]:
    """Compares an ONNX file with its model on every image: batches of 8, an odd tail, and up to 32 images one by one.

    Args:
        path: of the ONNX file.
        model: what the file should equal; it runs in eval mode and float32, as evaluation runs it.
        images: as for `export_model`.
        tolerance: the largest difference of a probability.

    Returns:
        n_images, n_answers, max_abs_diff, tolerance, same_decisions, ties, batches.

    Raises:
        ConfigError: every image is one flat colour.
        ParityError: a difference above the tolerance, another decision, or a value that is not finite.
    """
    session, plain, n = open_session(path), plain_float(model), len(images)
    rows = [i % n for i in range(max(n, 8))]  # fewer than 8 images fill one batch of 8 by repeating
    if len(rows) % 8 == 0:
        rows += [i % n for i in range(3)]  # always an odd tail
    groups = [rows[i : i + 8] for i in range(0, len(rows), 8)]
    groups += [[int(i)] for i in np.unique(np.linspace(0, n - 1, min(n, 32)).astype(int))]
    found, expected, flat = [], [], True
    for group in groups:
        batch = take_images(images, group)
        flat = flat and bool((batch.flatten(1).amax(1) == batch.flatten(1).amin(1)).all())
        expected.append(torch_probabilities(plain, batch).numpy())
        found.append(session.run(None, {"image": batch.numpy()})[0])
    if flat:
        raise ConfigError(f"{Path(path).name}: every image is one flat colour; equality is proved on real test images.")
    return {"n_images": n, **_judge(np.concatenate(found), np.concatenate(expected), tolerance)}


def _judge(found: np.ndarray, expected: np.ndarray, tolerance: float) -> dict[str, Any]:
    if found.shape != expected.shape or not (np.isfinite(found).all() and np.isfinite(expected).all()):
        raise ParityError(
            f"the exported file gave values that are not finite, or shape {found.shape} instead of {expected.shape}; "
            "nothing was written: keep using the torch model."
        )
    largest = float(np.abs(found.astype(np.float64) - expected).max())
    chosen = expected[np.arange(len(found)), found.argmax(1)]
    other = found.argmax(1) != expected.argmax(1)
    tied = other & (expected.max(1) - chosen <= 2 * tolerance)
    wrong = int((other & ~tied).sum())
    if largest > tolerance or wrong:
        raise ParityError(
            f"the exported file is not the model: probabilities differ by {largest:.2g} (allowed: {tolerance:.2g}) "
            f"and {wrong} of {len(found)} decisions changed; nothing was written: keep using the torch model."
        )
    answers = {"n_answers": len(found), "max_abs_diff": largest, "tolerance": tolerance}
    return {**answers, "same_decisions": True, "ties": int(tied.sum()), "batches": list(PARITY_BATCHES)}


def take_images(images: Any, rows: Sequence[int]) -> Tensor:
    """Some images as (n, 3, H, W) float32 on the CPU, from a tensor, or from items that are or have one ("image").

    Raises:
        ConfigError: the images are not (3, H, W).

    Example:
        >>> take_images([{"image": torch.zeros(3, 4, 4)}], [0, 0]).shape
        torch.Size([2, 3, 4, 4])
    """
    items = [images[row] for row in rows]
    tensors = [torch.as_tensor(item["image"] if isinstance(item, Mapping) else item) for item in items]
    if tensors[0].ndim != 3:
        raise ConfigError(f"images of shape {tuple(tensors[0].shape)}; give (3, H, W) each, resized and normalised.")
    return torch.stack(tensors).detach().to("cpu", torch.float32).contiguous()


@torch.no_grad()
def torch_probabilities(plain: nn.Module, images: Tensor) -> Tensor:
    """The reference: not the exported wrapper, but softmax in float64 of what the model itself gives.

    Example:
        >>> torch_probabilities(nn.Flatten(), torch.zeros(1, 2, 1, 1)).tolist()
        [[0.5, 0.5]]
    """
    return torch.softmax(plain(images).double(), -1)


def _one_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")
