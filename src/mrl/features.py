"""What a network says of each image of a side; features on disk, so that two fits of one start compute them once."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mrl.data.loading import ImageSet, make_loader
from mrl.ranks import gather, in_pieces
from mrl.run import writing

BATCH = 64


def collect(side: ImageSet, forward: Callable[[Tensor], Tensor], name: str, accelerator: Any) -> dict[str, Tensor]:
    """What `forward` gives for each image of a side, on the CPU, with label and weight; in the accelerator's precision.

    The processes share the side; every one gets all of it, in the side's order.

    Args:
        side: N images, at least as many as there are processes.
        forward: of a network in eval mode: images (B, C, H, W) to (B, ...).
        name: of what it gives.
        accelerator: accelerate's, of the fit.

    Returns:
        `name`, "label" and "weight", N rows each.

    Example:
        >>> import tempfile
        >>> from accelerate import Accelerator
        >>> from PIL import Image
        >>> from mrl.data import Preprocess, Sample
        >>> path = Path(tempfile.mkdtemp()) / "a.png"
        >>> Image.new("RGB", (8, 8)).save(path)
        >>> side = ImageSet([Sample("a.png", path, "crack")], ["crack", "good"], Preprocess((8, 8)))
        >>> found = collect(side, lambda images: images.mean((2, 3)), "features", Accelerator())
        >>> found["features"].shape, found["label"], found["weight"]
        (torch.Size([1, 3]), tensor([0]), tensor([1.]))
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    parts: dict[str, list[Tensor]] = {name: [], "index": [], "label": [], "weight": []}
    mine = side
    if world > 1:
        mine = ImageSet(side.samples[rank::world], side.classes, side.preprocess, cache=side.cache)

    def answer(images: Tensor) -> Tensor:
        with torch.no_grad(), accelerator.autocast():
            return forward(images.to(accelerator.device)).float().cpu()

    for batch in make_loader(mine, BATCH):
        parts[name].append(answer(batch["image"]))
        parts["index"].append(batch["index"] * world + rank)
        parts["label"].append(batch["label"])
        parts["weight"].append(batch["weight"])
    if in_pieces() and len(parts["index"]) < math.ceil(math.ceil(len(side) / world) / BATCH):
        answer(batch["image"][:1])  # others have one batch more, and a network in pieces answers only where all ask
    whole = {k: gather(torch.cat(v)) for k, v in parts.items()}
    order = whole.pop("index").argsort()
    return {k: v[order] for k, v in whole.items()}


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
