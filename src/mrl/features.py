"""Features of an untouched network on disk, so that two fits of one start compute them once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mrl.run import writing


def read_features(path: Path | str, images: Sequence[str], precision: str) -> Tensor | None:
    """The features (N, F) of these images, in this order; None unless the file has all of them in this precision.

    Example:
        >>> read_features("no-such-file", ["a.png"], "no") is None
        True
    """
    if not Path(path).is_file():
        return None
    with safe_open(str(path), "pt") as file:
        about = json.loads((file.metadata() or {})["about"])
        rows = {name: i for i, name in enumerate(about["images"])}
        if about["precision"] != precision or not set(images) <= rows.keys():
            return None
        return file.get_tensor("features")[torch.tensor([rows[name] for name in images], dtype=torch.int64)]


def add_features(path: Path | str, images: Sequence[str], features: Tensor, precision: str) -> None:
    """Adds the features of these images to the file, which appears whole or not at all.

    Args:
        path: a safetensors file; one of another precision is replaced.
        images: names.
        features: (N, F), float32.
        precision: in which they were computed.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "f.safetensors"
        >>> add_features(path, ["a"], torch.ones(1, 2), "no")
        >>> add_features(path, ["b"], torch.zeros(1, 2), "no")
        >>> read_features(path, ["b", "a"], "no")
        tensor([[0., 0.],
                [1., 1.]])
    """
    names, tensor = list(images), features
    if Path(path).is_file():
        with safe_open(str(path), "pt") as file:
            about = json.loads((file.metadata() or {})["about"])
            if about["precision"] == precision:
                new = [name not in set(images) for name in about["images"]]
                names = [name for name, keep in zip(about["images"], new, strict=True) if keep] + names
                tensor = torch.cat([file.get_tensor("features")[torch.tensor(new)], features])
    with writing(path) as part:
        save_file(
            {"features": tensor.contiguous()}, part, {"about": json.dumps({"images": names, "precision": precision})}
        )
