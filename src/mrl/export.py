"""Files that were proved equal to the model they came from, on real images; what is not equal is not written."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from mrl import run, scores
from mrl.deploy.formats import FORMATS, check_choice, write_format
from mrl.deploy.onnx import OPSET, plain_float
from mrl.deploy.parity import check_parity, parity_path, take_images, torch_probabilities
from mrl.deploy.quantise import Accuracy
from mrl.deploy.runtimes import SUFFIXES, files_of
from mrl.errors import ConfigError

LIBRARIES = {"onnx": ("onnx", "onnxruntime"), "openvino": ("onnx", "openvino"), "torch-export": ()}
METRICS = {"accuracy": scores.accuracy, "balanced_accuracy": scores.balanced_accuracy}


@dataclass(frozen=True)
class Lossy:
    """What a precision below float32 may cost, and the labelled images that judge and make it.

    Args:
        precision: "fp32" (nothing here matters then), "fp16", "bf16" or "int8".
        max_drop: of the metric, as a share: 0.005 is half a point; its one-sided 95 % bound counts.
        metric: "accuracy" or "balanced_accuracy".
        targets: class index of every image that equality is proved on; None takes the model's decisions.
        calibration: preprocessed training images (3, H, W) that set the ranges of int8.
        validation: preprocessed images of the validation side, for the accuracy control of int8.
        validation_targets: their class indices.
    """

    precision: str = "fp32"
    max_drop: float = 0.005
    metric: str = "accuracy"
    targets: Sequence[int] | None = None
    calibration: Sequence[Tensor] = field(default=(), repr=False)
    validation: Sequence[Tensor] = field(default=(), repr=False)
    validation_targets: Sequence[int] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.max_drop < 1:
            raise ConfigError(
                f"--max-drop {self.max_drop}: give a share between 0 and 1, such as 0.005 (half a point)."
            )
        if self.metric not in METRICS:
            raise ConfigError(f"Lossy(metric={self.metric!r}): use {' or '.join(METRICS)}.")


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
    lossy: Lossy | None = None,
) -> dict[str, Any]:
    """Exports a classifier to a file and proves it equal on real images; otherwise writes nothing.

    Every image is given to the model (torch, float32, eval) and to the file (as `mrl predict` runs it), in batches of 8
    with an odd tail, and up to 32 of them one by one. In float32 the probabilities must agree within `tolerance`, and the
    decisions (the most probable class) must be the same. Where the model's two best classes are closer than 2 * `tolerance`
    to each other, either of them counts as the same decision; such images are counted as ties. In other precisions the
    metric may drop by `lossy.max_drop` at most, with its one-sided 95 % bound.

    Args:
        model: gives logits (B, K); it is not altered.
        path: of the file, `.onnx`, `.xml` (OpenVINO) or `.pt2` (torch.export); `<stem>.parity.json` is written beside it.
        preprocess: what images go through first (`mrl.data.Preprocess`, or its dictionary); travels in the file.
        classes: names in the order of the outputs.
        images: real images, preprocessed: a tensor (N, 3, H, W), or items that are (3, H, W) or have it under "image".
        tolerance: the largest difference of a probability.
        meta: more metadata, for example arm, seeds, protocol_sha256, terms; also copied into the answer.
        overwrite: replace a file that exists; without success the old one stays.
        lossy: precision below float32 and what it may cost; None is float32.

    Returns:
        What `export.json` holds: file, sha256, opset, parity, preprocess, classes, environment and `meta`.

    Raises:
        ConfigError: the file exists, there are no real images, or the model cannot be exported.
        ParityError: the file is not equal to the model.
        MissingExtra: OpenVINO or NNCF is needed and not installed.

    Example:
        >>> import tempfile
        >>> from mrl.data import Preprocess
        >>> net = nn.Sequential(nn.Conv2d(3, 2, 4), nn.Flatten())
        >>> facts = export_model(
        ...     net, tempfile.mkdtemp() + "/a.onnx", preprocess=Preprocess((4, 4)), classes=["no", "yes"],
        ...     images=np.random.default_rng(0).random((9, 3, 4, 4)),
        ... )
        >>> facts["parity"]["same_decisions"], facts["precision"]
        (True, 'fp32')
    """
    lossy = lossy or Lossy()
    path = run.refuse_existing(path, overwrite)
    kind = SUFFIXES.get(path.suffix)
    if kind is None:
        raise ConfigError(f"{path}: the name of an export ends in {', '.join(SUFFIXES)}.")
    check_choice(kind, lossy.precision)
    _refuse_other_proof(path)
    settings = preprocess if isinstance(preprocess, Mapping) else preprocess.to_dict()
    if not len(images):
        raise ConfigError("export_model: no images; equality is proved on real test images, give at least one.")
    first = take_images(images, [0])
    outputs = torch_probabilities(plain_float(model), first).shape[-1]
    if outputs != len(classes):
        raise ConfigError(f"export_model: the model has {outputs} outputs, but there are {len(classes)} classes.")
    environment = run.environment()
    used = ("torch", "timm", *LIBRARIES[kind], *(("nncf",) if lossy.precision == "int8" else ()))
    notes = {**_notes(environment, used), "preprocess": settings, "classes": list(classes), **(meta or {})}
    control = _control(lossy)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}.") as folder:
        made = Path(folder) / path.name
        size = tuple(first.shape[-2:])
        more = {"precision": lossy.precision, "metadata": notes, "calibration": lossy.calibration, "accuracy": control}
        write_format(model, made, size, **more)
        judged = {"precision": lossy.precision, "max_drop": lossy.max_drop, "metric": lossy.metric}
        returned = control.returned if control else []
        judged |= {"hurt": returned, "calibration": lossy.calibration}
        parity = check_parity(made, model, images, tolerance=tolerance, targets=lossy.targets, **judged)
        digests = {part.name: run.sha256_file(part) for part in files_of(made)}
        parity_path(path).unlink(missing_ok=True)
        for part in reversed(files_of(made)):  # the graph last: it is what says that the file is there
            part.replace(path.with_name(part.name))
    named = {"format": kind, "precision": lossy.precision, "sha256": digests[path.name], "files": digests}
    if returned:
        named["returned_to_fp32"] = returned
    run.write_json(parity_path(path), {"schema": 1, "file": path.name, **named, **parity})
    size_mb = sum(part.stat().st_size for part in files_of(path)) / 1e6
    facts = {"schema": 1, "file": path.name, **named, "opset": OPSET if kind == "onnx" else None, "file_mb": size_mb}
    return {
        **(meta or {}),
        **facts,
        "preprocess": settings,
        "classes": list(classes),
        "parity": parity,
        "environment": environment,
    }


def _refuse_other_proof(path: Path) -> None:
    """Raises ConfigError where the proof would take the place of another file's: `a.onnx` and `a.xml` have one name for it."""
    proof = parity_path(path)
    try:
        other = run.read_json(proof).get("file", path.name) if proof.is_file() else path.name
    except (ValueError, AttributeError):
        return  # damaged, so the proof of nothing
    if other != path.name and path.with_name(other).is_file():
        raise ConfigError(f"{proof}: is the proof of {other}, which would be lost; give {path.name} another name.")


def _notes(environment: Mapping[str, Any], libraries: Sequence[str]) -> dict[str, Any]:
    """What every file says of itself."""
    return {
        "schema": 1,
        "version": environment["mrl"],
        "input": "image: (B, 3, H, W) float32 after preprocess",
        "output": "probabilities: (B, K) float32 after softmax, in the order of classes",
        "libraries": {name: environment["libraries"].get(name) for name in libraries},
    }


def _control(lossy: Lossy) -> Accuracy | None:
    """The accuracy control of int8, where there is a validation side to hold it to."""
    if lossy.precision != "int8" or not len(lossy.validation):
        return None
    target = np.asarray(lossy.validation_targets)
    score = METRICS[lossy.metric]
    return Accuracy(lossy.validation, lambda p: float(score(target, p.argmax(1))), lossy.max_drop)


def file_name(format: str, precision: str) -> str:
    """How an export is called in its run folder: `model.onnx`, and by format and precision where it is another.

    Example:
        >>> file_name("onnx", "fp32"), file_name("openvino", "int8")
        ('model.onnx', 'model-openvino-int8.xml')
    """
    plain = (format, precision) == ("onnx", "fp32")
    return "model.onnx" if plain else f"model-{format}-{precision}{FORMATS[format]}"
