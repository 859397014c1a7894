"""One exported file, ready to answer: the same preprocessing as in training, batches, threads, and a reason for every image without an answer."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mrl.data import Preprocess, read_image
from mrl.data.images import Decoded, decode
from mrl.deploy.parity import check_proof
from mrl.deploy.runtimes import Runtime, open_runtime
from mrl.errors import ConfigError, DataError

AHEAD = 2  # batches that are read while one is computed


@dataclass(frozen=True)
class Answer:
    """What the model says of one image, or why it says nothing.

    Args:
        prediction: name of the most probable class; None where there is an error.
        probabilities: of each class, in the order of `Predictor.classes`; None where there is an error.
        error: the reason, or "".
    """

    prediction: str | None
    probabilities: np.ndarray | None = field(repr=False, default=None)
    error: str = ""


def check_batch(batch_size: int) -> int:
    """The batch size.

    Raises:
        ConfigError: not a whole number of at least 1.

    Example:
        >>> check_batch(32)
        32
    """
    if isinstance(batch_size, bool) or batch_size != int(batch_size) or batch_size < 1:
        raise ConfigError(f"--batch-size {batch_size}: must be a whole number of at least 1.")
    return int(batch_size)


class Predictor:
    """A file of `mrl export`, opened and checked; several threads may use one.

    Args:
        path: `.onnx`, `.xml` (OpenVINO) or `.pt2` (torch.export), with its `.parity.json` beside it.
        unproved: open it without a proof that fits, with a warning.
        threads: for the work of one call; None takes torch's number.

    Raises:
        ConfigError: not there, not a model file, or not one of `mrl export`.
        ParityError: no proof beside it, or changed since it was proved equal.
        MissingExtra: an OpenVINO file, and OpenVINO is not installed.

    Example:
        >>> import tempfile, timm
        >>> from mrl.export import export_model
        >>> net = timm.create_model("test_mrl", num_classes=2)
        >>> photo = np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8)
        >>> preprocess = Preprocess((32, 32))
        >>> path = tempfile.mkdtemp() + "/model.onnx"
        >>> image = preprocess(torch.from_numpy(photo).permute(2, 0, 1) / 255)
        >>> _ = export_model(net, path, preprocess=preprocess, classes=["good", "bad"], images=[image])
        >>> model = Predictor(path)
        >>> answer = model(photo)
        >>> answer.prediction in model.classes, answer.probabilities.shape
        (True, (2,))
        >>> model("gone.png").error
        'gone.png: cannot be read (No such file or directory); check the path and its rights.'
    """

    def __init__(self, path: Path | str, *, unproved: bool = False, threads: int | None = None) -> None:
        path = Path(path)
        if not path.is_file():
            raise ConfigError(f"{path}: not found; give the model.onnx that `mrl export` (or `mrl poc`) wrote.")
        self.proof = check_proof(path, unproved=unproved)
        self.runtime: Runtime = open_runtime(path, threads=threads)
        self.metadata: Mapping[str, Any] = self.runtime.metadata
        try:
            self.classes = tuple(str(name) for name in self.metadata["classes"])
            self.preprocess = Preprocess.from_dict(self.metadata["preprocess"])
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{path}: was not written by `mrl export` (it does not say its classes and preprocessing), "
                "so images cannot be prepared as in training; export the model with `mrl export`."
            ) from error

    def __call__(self, image: Any) -> Answer:
        """The answer for one image: a path, the bytes of a file, or an array (H, W) or (H, W, 3) of uint8 or uint16."""
        return next(self.stream([image], batch_size=1, ahead=0))

    def predict(self, images: Iterable[Any], batch_size: int = 32) -> list[Answer]:
        """The answers for several images, in their order."""
        return list(self.stream(images, batch_size=batch_size))

    def stream(self, images: Iterable[Any], batch_size: int = 32, ahead: int = AHEAD) -> Iterator[Answer]:
        """Answers one after another, from images that come one after another; memory does not grow with their number.

        Args:
            images: anything that `__call__` takes.
            batch_size: images in a pass; the last one may be smaller.
            ahead: batches that are read on all cores while one is computed; 0 answers as soon as a batch is there.

        Raises:
            ConfigError: a batch size below 1.
        """
        batch_size = check_batch(batch_size)
        waiting: deque[list[Future]] = deque()
        source = iter(images)
        with ThreadPoolExecutor(
            max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2)
        ) as pool:
            while part := list(itertools.islice(source, batch_size)):
                waiting.append([pool.submit(self.prepare, image) for image in part])
                if len(waiting) > ahead:
                    yield from self._answers([future.result() for future in waiting.popleft()])
            while waiting:
                yield from self._answers([future.result() for future in waiting.popleft()])

    def prepare(self, image: Any) -> Tensor | str:
        """An image as the model wants it, (3, H, W), or why it cannot be had."""
        try:
            return self.preprocess(self._read(image))
        except (DataError, OSError) as error:
            return str(error)

    def probabilities(self, images: Tensor) -> np.ndarray:
        """Prepared images (B, 3, H, W) -> (B, K)."""
        return self.runtime(images)

    def _read(self, image: Any) -> Tensor:
        depth = self.preprocess.bit_depth
        if isinstance(image, (str, Path)):
            return read_image(image, bit_depth=depth)
        if isinstance(image, (bytes, bytearray, memoryview)):
            return decode(bytes(image), bit_depth=depth, count=False).tensor()
        array = np.asarray(image)
        grey, colour = array.ndim == 2, array.ndim == 3 and array.shape[-1] == 3
        if not (grey or colour) or array.dtype not in (np.uint8, np.uint16) or 0 in array.shape:
            raise DataError(
                f"an array of shape {array.shape} and {array.dtype}; give (H, W) or (H, W, 3) of uint8 or uint16"
            )
        bits = 8 * array.dtype.itemsize
        used = depth if depth is not None and depth <= bits else bits
        if int(array.max()) >= 2**used:
            raise DataError(f"has a value of {int(array.max())}, above the {2**used - 1} of {used} bits")
        return Decoded(array, float(2**used - 1), "L" if grey else "RGB", bits).tensor()

    def _answers(self, prepared: list[Tensor | str]) -> Iterator[Answer]:
        good = [image for image in prepared if isinstance(image, Tensor)]
        found = iter(self.probabilities(torch.stack(good)) if good else ())
        for image in prepared:
            if isinstance(image, str):
                yield Answer(None, None, image)
                continue
            values = next(found)
            if np.isfinite(values).all():
                yield Answer(self.classes[int(values.argmax())], values)
            else:
                yield Answer(None, None, "the answer is not finite")
