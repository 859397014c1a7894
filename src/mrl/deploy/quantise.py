"""int8 by NNCF, with its accuracy control: layers that cost too much go back to float32."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mrl.deploy.runtimes import openvino
from mrl.errors import ConfigError, MissingExtra

MOST_IMAGES = 300  # that set the ranges of the activations


@dataclass
class Accuracy:
    """What int8 is held to while it is made, and what had to go back to float32 for it.

    Args:
        images: of the validation side, preprocessed (3, H, W).
        score: probabilities (N, K) of these images -> a score from 0 to 1.
        max_drop: of the score, absolute.
        returned: names of the layers that went back to float32, worst first, filled in.
    """

    images: Sequence[Tensor]
    score: Callable[[np.ndarray], float]
    max_drop: float
    returned: list[str] = field(default_factory=list)


def nncf() -> Any:
    """The module `nncf`, with its telemetry replaced by nothing before it can start.

    Raises:
        MissingExtra: it is not installed.
    """
    os.environ["NNCF_CI"] = "1"  # its telemetry object becomes a stub
    try:
        import nncf
    except ModuleNotFoundError as error:
        raise MissingExtra("--precision int8: NNCF is not installed; run `pip install mrl[openvino]`.") from error
    nncf.set_log_level(logging.ERROR)
    return nncf


def quantise(source: Path, kind: str, images: Sequence[Tensor], accuracy: Accuracy | None = None) -> Any:
    """An int8 model of the backend `kind` ("onnx" or "openvino") from an ONNX file in float32.

    The weights use half of the range of int8. A processor without VNNI adds two products of 8 bits in 16, which overflow with
    the whole range: a file would then answer otherwise there than where it was proved.

    Args:
        source: the float32 file, input "image".
        kind: whose graph comes back.
        images: preprocessed training images (3, H, W); up to 300 set the ranges of the activations.
        accuracy: what it may lose; None quantises every operation whatever it costs.

    Raises:
        ConfigError: no images.
        MissingExtra: NNCF, or OpenVINO, is not installed.
    """
    if not len(images):
        raise ConfigError("--precision int8 needs training images that set the ranges; give at least one, better 300.")
    library = nncf()
    if kind == "onnx":
        import onnx

        model = onnx.load(str(source))
        wrap: Callable[[Tensor], Any] = lambda image: {"image": image[None].numpy()}  # noqa: E731
    else:
        model = openvino().Core().read_model(source)
        wrap = lambda image: image[None].numpy()  # noqa: E731
    picked = np.unique(np.linspace(0, len(images) - 1, MOST_IMAGES).astype(int))
    data = library.Dataset([images[int(i)] for i in picked], wrap)
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix

    anywhere = AdvancedQuantizationParameters(overflow_fix=OverflowFix.ENABLE)
    common = {"model_type": library.ModelType.TRANSFORMER, "subset_size": len(picked)}
    if accuracy is None:
        return library.quantize(model, data, advanced_parameters=anywhere, **common)

    def validate(ready: Any, items: Iterable[Any]) -> tuple[float, None]:
        answer = _caller(ready)
        return accuracy.score(np.concatenate([answer(wrap(item)) for item in items])), None

    with _listening(accuracy.returned):
        return library.quantize_with_accuracy_control(
            model,
            data,
            library.Dataset(list(accuracy.images), wrap),
            validate,
            max_drop=accuracy.max_drop,
            drop_type=library.DropType.ABSOLUTE,
            advanced_quantization_parameters=anywhere,
            **common,
        )


def _caller(ready: Any) -> Callable[[Any], np.ndarray]:
    """Whatever NNCF hands to a validation function, as item -> probabilities."""
    if hasattr(ready, "create_infer_request"):  # of OpenVINO
        request = ready.create_infer_request()
        return lambda item: np.array(request.infer([item])[ready.output(0)])
    if hasattr(ready, "SerializeToString"):  # an ONNX graph
        import onnxruntime as ort

        ready = ort.InferenceSession(ready.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda item: np.asarray(ready.run(None, item)[0])


class _listening:
    """Collects the names that NNCF logs as returned to float32."""

    def __init__(self, names: list[str]) -> None:
        self.names, self.logger = names, logging.getLogger("nncf")

    def __enter__(self) -> None:
        self.handler = logging.Handler()
        self.handler.emit = self._take  # type: ignore[method-assign]
        self.level = self.logger.level
        self.logger.addHandler(self.handler)
        self.logger.setLevel(logging.INFO)
        self.others = [h for h in self.logger.handlers if h is not self.handler]
        self.levels = [h.level for h in self.others]
        for other in self.others:
            other.setLevel(logging.ERROR)

    def _take(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text.startswith("Reverted "):
            found = (line.strip().split("/")[0] for line in text.splitlines()[1:])
            self.names += [name for name in found if name not in self.names]

    def __exit__(self, *error: object) -> None:
        self.logger.removeHandler(self.handler)
        self.logger.setLevel(self.level)
        for other, level in zip(self.others, self.levels, strict=True):
            other.setLevel(level)
