"""What a fit trains and how fast: freezing, parameter groups, the schedule and the number format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mrl.errors import ConfigError
from mrl.precision import has_bf16
from mrl.ranks import in_pieces, join_launch

NEVER_DECAYED = ("cls_token", "pos_embed", "reg_token", "dist_token")


def freeze_(model: nn.Module, layers: Sequence[Sequence[str]], blocks: int | None) -> int:
    """Stops the gradients of the embeddings and the first blocks; returns how many blocks are frozen.

    Nothing that is frozen needs a graph, so its forward pass costs no more than inference.

    Args:
        model: changed in place: `requires_grad` of its parameters.
        layers: parameter names of the embeddings, of each block, and last of the final norm and the head.
        blocks: how many blocks; 0 freezes nothing, not even the embeddings; None freezes a third of them.

    Raises:
        ConfigError: more blocks than there are, or a negative number.

    Example:
        >>> net = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1))
        >>> freeze_(net, [["0.weight", "0.bias"], ["1.weight", "1.bias"], ["2.weight", "2.bias"]], 1)
        1
        >>> [name for name, p in net.named_parameters() if p.requires_grad]
        ['2.weight', '2.bias']
    """
    there = len(layers) - 2
    count = there // 3 if blocks is None else blocks
    if not 0 <= count <= there:
        raise ConfigError(f"freeze={count}: this model has {there} blocks; use 0 (trains everything) to {there}.")
    frozen = {name for layer in layers[: count + 1] for name in layer} if count else set()
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    return count


def train_mode_(model: nn.Module, *, hold: bool = False) -> nn.Module:
    """`model.train()`, but what is frozen as a whole stays in eval mode, its batch norms and drop paths too.

    Args:
        model: changed in place.
        hold: every batch norm stays in eval mode and keeps its running statistics, while gain and bias may train.

    Example:
        >>> net = nn.Sequential(nn.BatchNorm1d(1).requires_grad_(False), nn.BatchNorm1d(1))
        >>> [m.training for m in train_mode_(net)]
        [False, True]
        >>> [m.training for m in train_mode_(net, hold=True)]
        [False, False]
    """
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        frozen = parameters and not any(p.requires_grad for p in parameters)
        if frozen or (hold and isinstance(module, _BatchNorm)):
            module.eval()
    return model


def parameter_groups(
    model: nn.Module, layers: Sequence[Sequence[str]], *, lr: float, layer_decay: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Groups for AdamW: layer l of L learns at lr * layer_decay ** (L - 1 - l).

    Biases, norms, tokens and position embeddings have no weight decay. A parameter that no layer names belongs to the
    last one, with the head.

    Args:
        model: its trainable parameters are grouped.
        layers: parameter names, from the embeddings to the head.
        lr: peak learning rate of the last layer.
        layer_decay: 1 trains every layer alike; near 0 trains the head only.
        weight_decay: of weights with two or more dimensions.

    Returns:
        Groups with `lr`, `lr_scale` (timm's schedulers multiply by it) and `weight_decay`, first layer first.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> layers = [["0.weight", "0.bias"], ["1.weight", "1.bias"]]
        >>> groups = parameter_groups(net, layers, lr=1.0, layer_decay=0.5, weight_decay=0.1)
        >>> [(g["lr_scale"], g["weight_decay"]) for g in groups]
        [(0.5, 0.1), (0.5, 0.0), (1.0, 0.1), (1.0, 0.0)]
    """
    last = len(layers) - 1
    layer_of = {name: index for index, layer in enumerate(layers) for name in layer}
    groups: dict[tuple[int, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = layer_of.get(name, last)
        plain = parameter.ndim <= 1 or name.rpartition(".")[2] in NEVER_DECAYED
        decay = 0.0 if plain else weight_decay
        group = groups.setdefault(
            (layer, decay), {"params": [], "lr": lr, "lr_scale": layer_decay ** (last - layer), "weight_decay": decay}
        )
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups, key=lambda k: (k[0], -k[1]))]


def cosine(
    optimizer: torch.optim.Optimizer,
    updates: int,
    *,
    warmup: float,
    min_lr: float,
    warmup_lr: float = 0.0,
    cooldown: float = 0.0,
) -> Any:
    """Timm's cosine schedule over `updates` updates; call `step_update(update)`, 1-based, before each.

    Linear from `warmup_lr` to the peak over the first `warmup * updates` updates, then half a cosine down to `min_lr`,
    which the last `cooldown * updates` updates keep.

    Args:
        optimizer: with groups from `parameter_groups`.
        updates: of the whole fit.
        warmup: share of the updates, 0 to below 1.
        min_lr: learning rate at the end, before `lr_scale`.
        warmup_lr: learning rate before the first update, before `lr_scale`.
        cooldown: share of the updates, 0 to below 1.

    Example:
        >>> adam = torch.optim.AdamW([torch.ones(1, requires_grad=True)], lr=1.0)
        >>> schedule = cosine(adam, 10, warmup=0.2, min_lr=0.0)
        >>> for update in (1, 2, 10):
        ...     schedule.step_update(update)
        ...     print(round(adam.param_groups[0]["lr"], 2))
        0.5
        1.0
        0.03
    """
    from timm.scheduler import CosineLRScheduler

    rising = round(warmup * updates)
    return CosineLRScheduler(
        optimizer,
        t_initial=updates + 1 - rising - round(cooldown * updates),
        lr_min=min_lr,
        warmup_t=rising,
        warmup_lr_init=warmup_lr,
        warmup_prefix=True,
        t_in_epochs=False,
    )


def pick_precision(precision: str, device: torch.device, capabilities: Mapping[str, Any] | None = None) -> str:
    """What "auto" means here: bf16 where the hardware multiplies it, fp16 on other GPUs, else fp32.

    Args:
        precision: "auto", "fp32", "bf16" or "fp16".
        device: where the model trains.
        capabilities: of the CPU; None asks torch.

    Raises:
        ConfigError: an unknown name, or fp16 without a GPU.

    Example:
        >>> pick_precision("auto", torch.device("cpu"), {"avx512_bf16": True})
        'bf16'
        >>> pick_precision("auto", torch.device("cpu"), {})
        'fp32'
    """
    if precision not in ("auto", "fp32", "bf16", "fp16"):
        raise ConfigError(f"precision {precision!r}: choose auto, fp32, bf16 or fp16.")
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError("precision 'fp16' needs a GPU; choose auto, bf16 or fp32 on a processor.")
    if precision != "auto":
        return precision
    if has_bf16(device, capabilities):
        return "bf16"
    return "fp16" if device.type == "cuda" else "fp32"


def make_accelerator(precision: str, **told: Any) -> Any:
    """A fresh accelerator: one process may fit several times, in different precisions.

    Raises:
        ConfigError: fp16 of a network in pieces: its loss scaling is not shared.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    state = join_launch()
    chosen = pick_precision(precision, state.device)
    if chosen == "fp16" and in_pieces():
        raise ConfigError("--precision fp16 and FSDP do not go together; use bf16 or fp32.")
    AcceleratorState._reset_state()
    return Accelerator(
        cpu=state.num_processes > 1 and state.device.type == "cpu",
        mixed_precision={"fp32": "no"}.get(chosen, chosen),
        **told,
    )
