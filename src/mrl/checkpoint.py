"""The state of an unfinished fit: one safetensors file with the counters as JSON in its header; never a pickle."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mrl.errors import ConfigError
from mrl.fsdp import piece, whole
from mrl.run import plain, writing

SCHEMA = 1
FILE = "state.safetensors"


def save_checkpoint(folder: Path | str, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path:
    """Writes groups of tensors and plain data to `folder/state.safetensors`, whole or not at all.

    Args:
        folder: the checkpoint's folder, made if needed.
        tensors: group name (without a slash) -> tensor name -> tensor.
        state: counters and settings, anything that JSON has.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> _ = save_checkpoint(folder, {"model": {"a.weight": torch.ones(2)}}, {"update": 3})
        >>> load_checkpoint(folder)
        ({'model': {'a.weight': tensor([1., 1.])}}, {'update': 3})
    """
    flat = {f"{group}/{name}": _own(value) for group, part in tensors.items() for name, value in part.items()}
    header = {
        "schema": str(SCHEMA),
        "state": json.dumps(plain(state)),
        "crc": json.dumps({k: _crc(v) for k, v in flat.items()}),
    }
    path = Path(folder) / FILE
    with writing(path) as part:
        save_file(flat, part, metadata=header)
    return path


def load_checkpoint(folder: Path | str) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None:
    """Reads what `save_checkpoint` wrote, on the CPU; None where there is no checkpoint.

    Raises:
        ConfigError: the file is damaged (every tensor has a checksum) or from another version, and what to delete.
    """
    path = Path(folder) / FILE
    if not path.exists():
        return None
    advice = f"delete the folder {Path(folder)} to start this fit again from its beginning"
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        state, crc = json.loads(header["state"]), json.loads(header["crc"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ConfigError(f"{path}: the checkpoint is damaged ({error}); {advice}.") from error
    if header.get("schema") != str(SCHEMA):
        raise ConfigError(
            f"{path}: a checkpoint of schema {header.get('schema')}, this version reads {SCHEMA}; {advice}."
        )
    if crc != {k: _crc(v) for k, v in flat.items()}:
        raise ConfigError(f"{path}: the checkpoint is damaged (a checksum differs); {advice}.")
    groups: dict[str, dict[str, Tensor]] = {}
    for name, value in flat.items():
        group, _, rest = name.partition("/")
        groups.setdefault(group, {})[rest] = value
    return groups, state


def drop_checkpoint(folder: Path | str) -> None:
    """Deletes a checkpoint; nothing there is fine.

    Example:
        >>> drop_checkpoint("no/such/folder")
    """
    if Path(folder).is_dir():
        shutil.rmtree(folder)


def drop_leftovers(folder: Path | str) -> None:
    """Deletes what a killed process left half-written in a folder; only one process may write there at a time.

    Example:
        >>> drop_leftovers("no/such/folder")
    """
    for part in Path(folder).glob(".*.part"):
        shutil.rmtree(part, ignore_errors=True)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as "index.key" -> tensor; every value of torch's AdamW state is a tensor.

    Example:
        >>> w = torch.ones(1, requires_grad=True)
        >>> adam = torch.optim.AdamW([w])
        >>> w.sum().backward(); adam.step()
        >>> sorted(optimizer_tensors(adam))
        ['0.exp_avg', '0.exp_avg_sq', '0.step']
    """
    state = optimizer.state_dict()["state"]
    return whole({f"{index}.{key}": value for index, entry in state.items() for key, value in entry.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Puts tensors from `optimizer_tensors` back; groups and hyperparameters stay the optimizer's own.

    Example:
        >>> w = torch.ones(1, requires_grad=True)
        >>> adam = torch.optim.AdamW([w])
        >>> w.sum().backward(); adam.step()
        >>> again = torch.optim.AdamW([w])
        >>> load_optimizer(again, optimizer_tensors(adam))
        >>> again.state_dict()["state"] == adam.state_dict()["state"]
        True
    """
    state: dict[int, dict[str, Tensor]] = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, value in tensors.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = piece(value, parameters[int(index)])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a model's tensors on the CPU; of one in pieces all processes ask for it at once, and each gets the whole."""
    return {k: v.detach().to("cpu", copy=True).contiguous() for k, v in whole(model.state_dict()).items()}


def _own(value: Tensor) -> Tensor:
    """A contiguous copy on the CPU that shares memory with no other tensor (safetensors refuses shared ones)."""
    return value.detach().to("cpu", copy=True).contiguous()


def _crc(value: Tensor) -> int:
    return zlib.crc32(value.reshape(-1).view(torch.uint8).numpy())
