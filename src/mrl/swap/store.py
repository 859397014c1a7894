"""Saving and loading models, swapped or not: plain JSON and safetensors, never a pickle."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from mrl.errors import ConfigError, SwapError
from mrl.models.build import build_from_recipe
from mrl.run import environment, refuse_existing, writing
from mrl.swap.adapters import adapters
from mrl.swap.apply import parent_of, put, swap_
from mrl.swap.config import SwapConfig
from mrl.swap.core import Shift
from mrl.swap.plan import Plan, find_sites, plan_row
from mrl.swap.recipe import recipe_of

SCHEMA = 1
MODEL_FILE, WEIGHTS_FILE = "model.json", "model.safetensors"


def save(
    model: nn.Module,
    folder: Path | str,
    *,
    recipe: dict[str, Any] | None = None,
    meta: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a model, with its swap, to a folder: `model.json` (how to build it) and `model.safetensors` (all tensors).

    Args:
        model: from timm, from a factory, or a `Classifier`; swapped or not.
        folder: where to; made whole or not at all.
        recipe: how to build the unswapped architecture, for models that do not show it:
            `{"kind": "factory", "name": "package.module:function", "kwargs": {...}}`.
        meta: plain data to keep beside the model, such as its preprocessing.
        overwrite: replace a folder that is there.

    Returns:
        The folder.

    Raises:
        SwapError: the architecture cannot be described, or the description would not give this model.
        ConfigError: the folder exists.

    Reference:
        Format: schema 1, documented in `docs/swap.md`.

    Example:
        >>> import tempfile, timm
        >>> net = timm.create_model("test_vit", img_size=32)
        >>> folder = save(net, tempfile.mkdtemp() + "/net")
        >>> sorted(p.name for p in folder.iterdir())
        ['model.json', 'model.safetensors']
    """
    folder = refuse_existing(folder, overwrite)
    if hasattr(model, "_orig_mod"):
        raise SwapError("this model is compiled: save model._orig_mod.")
    swap = _swap_of(model)
    if recipe is None:
        recipe = _recipe_without_swap(model, swap)
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
    document = {
        "schema": SCHEMA,
        "recipe": recipe,
        "swap": swap,
        "untouched_sha256": _fingerprint(tensors, swap),
        "environment": environment(),
        "meta": meta or {},
    }
    with writing(folder) as part:
        part.mkdir()
        (part / MODEL_FILE).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        save_file(tensors, part / WEIGHTS_FILE, metadata={"schema": str(SCHEMA)})
    return folder


def load(folder: Path | str, *, base: nn.Module | None = None) -> nn.Module:
    """Reads a model that `mrl.save` wrote, in eval mode: builds its base, swaps as stored, loads every tensor strictly.

    Args:
        folder: the model's folder.
        base: the unswapped architecture, for a model whose recipe cannot be run here; it is changed in place.

    Raises:
        ConfigError: no such folder, a damaged file, or a schema from a newer version.
        SwapError: the base is not the model that was saved, with every key that is missing or left over.

    Example:
        >>> import tempfile, timm, torch
        >>> net = timm.create_model("test_vit", img_size=32).eval()
        >>> again = load(save(net, tempfile.mkdtemp() + "/net"))
        >>> x = torch.randn(1, 3, 32, 32)
        >>> torch.equal(net(x), again(x))
        True
    """
    document, tensors = _read(Path(folder))
    model = base if base is not None else build_from_recipe(document["recipe"])
    if document["swap"]:
        _apply(model, document["swap"])
    own = model.state_dict()
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    shapes = [
        f"{k} {tuple(tensors[k].shape)} for {tuple(own[k].shape)}"
        for k in own.keys() & tensors.keys()
        if own[k].shape != tensors[k].shape
    ]
    if missing or extra or shapes:
        parts = [
            f"{what}: {', '.join(keys)}"
            for what, keys in (("missing", missing), ("left over", extra), ("of another shape", shapes))
            if keys
        ]
        raise SwapError(f"{folder} does not fit the model that its recipe builds; {'; '.join(parts)}.")
    model.load_state_dict(tensors, strict=True, assign=True)
    model.mrl_recipe = document["recipe"]
    model.mrl_meta = document["meta"]
    return model.eval()


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    path = folder / MODEL_FILE
    if not path.is_file():
        raise ConfigError(f"{folder}: no {MODEL_FILE} there; give a folder that mrl.save wrote.")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        # Copies, because a tensor inside a mapped file may not be aligned, and then the same weights can round differently.
        tensors = {k: v.clone() for k, v in load_file(folder / WEIGHTS_FILE).items()}
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError, FileNotFoundError) as error:
        raise ConfigError(f"{folder}: the saved model is damaged ({error}); save it again.") from error
    if document.get("schema", 0) > SCHEMA:
        raise ConfigError(
            f"{folder}: written by a newer mrl (schema {document['schema']}, this one reads {SCHEMA}); update mrl."
        )
    return document, tensors


def _swap_of(model: nn.Module) -> dict[str, Any] | None:
    """The swap as the modules themselves remember it, under the names they have now; None for an untouched model."""
    rows = [(name, module.mrl_row) for name, module in model.named_modules() if hasattr(module, "mrl_row")]
    if not rows:
        return None
    if any(isinstance(module, Shift) for module in model.modules()):
        raise SwapError("mrl.save: this model is folded for inference; save it before handle.fold_().")
    config = rows[0][1]["config"]
    if any(row["config"] != config for _, row in rows):
        raise SwapError(
            "mrl.save: parts of this model were swapped with different SwapConfigs; save the parts one by one."
        )
    return {
        "config": config,
        "rows": [{"name": name, "adapter": row["adapter"], "region": row["region"]} for name, row in rows],
    }


def _recipe_without_swap(model: nn.Module, swap: dict[str, Any] | None) -> dict[str, Any]:
    """The recipe of the model with stand-ins of the original classes in the places of its mixers."""
    if swap is None or getattr(model, "mrl_recipe", None) is not None:
        return recipe_of(model)
    mixers = {row["name"]: model.get_submodule(row["name"]) for row in swap["rows"]}
    try:
        for row in swap["rows"]:
            adapter = adapters()[row["adapter"]]
            put(model, row["name"], adapter.stand_in(mixers[row["name"]]))
            adapter.leave(parent_of(model, row["name"]))
        return recipe_of(model)
    finally:
        for name, mixer in mixers.items():
            put(model, name, mixer)
            adapters()[mixer.mrl_row["adapter"]].enter(parent_of(model, name))


def _apply(model: nn.Module, swap: dict[str, Any]) -> None:
    """The stored swap on a fresh base, by exact names, without matching patterns again."""
    sites = find_sites(model)
    rows = {row["name"]: row for row in swap["rows"]}
    absent = [n for n in rows if n not in sites or sites[n].reason]
    if absent:
        raise SwapError(
            f"the saved swap names {', '.join(absent)}, which this base does not have; give the model it was made from."
        )
    config = SwapConfig(**{**swap["config"], "keep_original": False})
    planned = [plan_row(sites[n], tuple(row["region"]), True, config) for n, row in rows.items()]
    swap_(model, Plan(planned, config, None, {n: sites[n] for n in rows}))


def _fingerprint(tensors: dict[str, torch.Tensor], swap: dict[str, Any] | None) -> str:
    """SHA-256 over the names and bytes of every tensor outside the swapped modules."""
    swapped = tuple(row["name"] + "." for row in swap["rows"]) if swap else ()
    digest = hashlib.sha256()
    for name in sorted(k for k in tensors if not k.startswith(swapped)):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
