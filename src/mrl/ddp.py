"""One network on all processes of a launch: torch's DistributedDataParallel, and what must hold for it and FSDP."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mrl.errors import ConfigError
from mrl.ranks import equal_, in_pieces
from mrl.run import world


def check_batch(who: str, fewest: int, processes: int, *, pairs: bool, judging: int | None = None) -> None:
    """Raises ConfigError where a process would have no image of a batch, or of the validation side.

    Args:
        who: for the message.
        fewest: images of the smallest batch.
        processes: that share it.
        pairs: the images are mixed in pairs, which stay together.
        judging: images of the validation side; None where there is none.

    Example:
        >>> check_batch("mrl", 1, 1, pairs=True)
        >>> check_batch("mrl", 3, 2, pairs=True)
        Traceback (most recent call last):
        mrl.errors.ConfigError: mrl: 2 processes cannot share a batch of 3 images in pairs; use a larger --batch-size, or ...
    """
    if processes > 1 and (fewest // 2 if pairs else fewest) < processes:
        raise ConfigError(
            f"{who}: {processes} processes cannot share a batch of {fewest} images{' in pairs' if pairs else ''}; use a larger "
            "--batch-size, or fewer processes."
        )
    if judging is not None and judging < processes:
        raise ConfigError(
            f"{who}: {processes} processes cannot share {judging} validation images; use fewer processes."
        )


def check_pieces(model: nn.Module, who: str) -> None:
    """Raises ConfigError for parameters that torch's `fully_shard` cannot cut: without a dimension, strided, or used twice.

    Example:
        >>> check_pieces(nn.Linear(1, 1), "mrl")
        >>> net = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
        >>> net[1].weight = net[0].weight
        >>> check_pieces(net, "mrl")
        Traceback (most recent call last):
        mrl.errors.ConfigError: mrl: FSDP cannot cut 1.weight, which is 0.weight too; use DDP.
    """
    seen: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        reason = None
        if id(parameter) in seen:
            reason = f"is {seen[id(parameter)]} too"
        elif parameter.ndim == 0:
            reason = "has no dimension"
        elif not parameter.is_contiguous():
            reason = "is not contiguous in memory"
        if reason is not None:
            raise ConfigError(f"{who}: FSDP cannot cut {name}, which {reason}; use DDP.")
        seen[id(parameter)] = name


def running_norms(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Parent, name and module of each batch norm that is not frozen: it takes its statistics from the batch in training.

    Example:
        >>> net = nn.Sequential(nn.BatchNorm2d(1), nn.BatchNorm2d(1).requires_grad_(False), nn.LayerNorm(1))
        >>> [name for _, name, _ in running_norms(net)]
        ['0']
    """
    for parent in model.modules():
        for name, child in parent.named_children():
            parameters = list(child.parameters())
            frozen = parameters and not any(p.requires_grad for p in parameters)
            if isinstance(child, _BatchNorm) and not frozen:
                yield parent, name, child


def spread(
    model: nn.Module, device: torch.device, who: str, *, hold: bool = False
) -> tuple[nn.Module, Callable[[], None]]:
    """The network whose gradients are those of all processes, and a function that leaves the model as it was.

    Alone that is the model itself, and so it is where `mrl.fsdp` will cut it. On GPUs batch norms that are neither frozen
    nor held count the images of all processes (SyncBatchNorm) until the function is called.

    Args:
        model: on the device, with what is trained marked; every process begins with the first one's tensors.
        device: of this process.
        who: for the message.
        hold: batch norms keep their running statistics (`train_mode_`).

    Raises:
        ConfigError: batch norms that are neither frozen nor held, on processors.

    Example:
        >>> net = nn.Linear(1, 1)
        >>> spread(net, torch.device("cpu"), "mrl")[0] is net
        True
    """
    if world() == 1:
        return model, lambda: None
    if in_pieces():
        check_pieces(model, who)
    norms = [] if hold else list(running_norms(model))
    if norms and device.type == "cpu":
        raise ConfigError(
            f"{who}: {len(norms)} BatchNorm layers take their statistics from each batch, and only GPUs can join those of "
            f"{world()} processes (SyncBatchNorm); hold them (--batch-norm hold), "
            "freeze these blocks (--freeze), or use one process."
        )
    every = [(p, n, m) for p in model.modules() for n, m in p.named_children() if norms and isinstance(m, _BatchNorm)]
    if norms:
        from timm.layers import convert_sync_batchnorm

        convert_sync_batchnorm(model)

    def undo() -> None:
        for parent, name, child in every:
            setattr(parent, name, child.train(model.training))

    if in_pieces():
        equal_([*model.parameters(), *model.buffers()])
        return model, undo
    where = None if device.type == "cpu" else [device]
    return nn.parallel.DistributedDataParallel(model, device_ids=where, static_graph=True), undo
