"""The processes of one launch (`torchrun`, `accelerate launch`) that make every update of one fit together."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from mrl.errors import ConfigError
from mrl.run import leads, world

WAIT = timedelta(days=30)  # the first process calibrates, measures and reports while the others wait
GIVE_UP_S = 60.0  # after an error of its own a process waits so long for the others
_group: list[Any] = []
_pieces: list[bool] = []


def join_launch() -> Any:
    """Joins the processes of this launch, once; returns accelerate's `PartialState`.

    GPUs speak by NCCL, processors by gloo.

    That accelerate is set to FSDP is noted for `in_pieces`, and kept from accelerate: the fit cuts its network itself.

    Raises:
        ConfigError: a launch of a kind that a fit cannot use.

    Example:
        >>> join_launch().num_processes
        1
    """
    from accelerate.state import PartialState

    asked = os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if world() == 1:
        return PartialState()
    if asked:
        _pieces.append(True)
    for name in ("DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise ConfigError(
                f"accelerate is set to {name}: a fit shares its batch (DDP) or its network too (FSDP); use one of these."
            )
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=WAIT)
    if state.num_processes != world():
        raise ConfigError(
            f"this launch has {world()} processes and accelerate sees {state.num_processes}; start it with `torchrun` or `accelerate launch`."
        )
    if not _group:
        _group.append(torch.distributed.new_group(backend="gloo", timeout=WAIT))
    return state


def in_pieces() -> bool:
    """Whether this launch is set to FSDP: `accelerate launch --use_fsdp`, or ACCELERATE_USE_FSDP=true with `torchrun`.

    Example:
        >>> in_pieces()
        False
    """
    return bool(_pieces)


def leave_launch() -> None:
    """Ends the connections to the other processes; alone it does nothing.

    Example:
        >>> leave_launch()
    """
    if world() > 1 and torch.distributed.is_initialized():
        _group.clear()
        _pieces.clear()
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def gives_up(why: str, seconds: float = GIVE_UP_S) -> Iterator[None]:
    """Ends this process the hard way where what is inside takes longer: an error of one process leaves the others waiting.

    `torchrun` and `accelerate launch` end the others when one ends so.

    Args:
        why: printed then.
        seconds: that it may take.

    Example:
        >>> with gives_up("the disk is full"):
        ...     share(1)
        1
    """

    def end() -> None:
        sys.stderr.write(
            f"{why} The other processes are still waiting; this one ends them.\n"
        )  # `say` is the first one's
        sys.stderr.flush()
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def share(value: Any = None) -> Any:
    """What the first process gives, for all of them; each waits for it.

    Args:
        value: of the first process: numbers, texts, lists and dictionaries of them; that of the others is not looked at.

    Example:
        >>> share({"update": 3})
        {'update': 3}
    """
    if world() == 1:
        return value
    join_launch()
    box = [value if leads() else None]
    torch.distributed.broadcast_object_list(box, src=0, group=_group[0])
    return box[0]


def total(value: Tensor) -> Tensor:
    """The sum over all processes, without a gradient, on the tensor's device.

    Example:
        >>> total(torch.tensor(2.0))
        tensor(2.)
    """
    value = value.detach().clone()
    if world() > 1:
        torch.distributed.all_reduce(value)
    return value


def gather(rows: Tensor) -> Tensor:
    """The rows of all processes, those of the first first; each may have another number of them, all the same columns.

    Args:
        rows: on the CPU.

    Shape:
        rows (n_of_this_process, ...) -> (n_of_all, ...)

    Example:
        >>> gather(torch.ones(2, 3)).shape
        torch.Size([2, 3])
    """
    if world() == 1:
        return rows
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(world())]
    torch.distributed.all_gather(counts, torch.tensor([len(rows)]), group=_group[0])
    most = max(int(n) for n in counts)
    padded = torch.cat([rows, rows.new_zeros(most - len(rows), *rows.shape[1:])])
    parts = [torch.empty_like(padded) for _ in counts]
    torch.distributed.all_gather(parts, padded.contiguous(), group=_group[0])
    return torch.cat([part[: int(n)] for part, n in zip(parts, counts, strict=True)])


def equal_(tensors: list[Tensor]) -> None:
    """Gives every process the first one's tensors, in place.

    Example:
        >>> equal_([torch.ones(1)])
    """
    if world() > 1:
        for tensor in tensors:
            torch.distributed.broadcast(tensor, 0)


def shares(n: int, world: int, *, pairs: bool) -> list[list[int]]:
    """The places of a batch of n images that each process takes; together they are the batch, each place once.

    Args:
        n: images of the batch.
        world: processes.
        pairs: the batch is mixed, from both ends inwards, and the last image of an odd batch has no partner: partners go to
            one process, in such an order that they meet there too.

    Example:
        >>> shares(5, 2, pairs=False), shares(7, 2, pairs=True)
        ([[0, 2, 4], [1, 3]], [[0, 2, 3, 5], [1, 4, 6]])
    """
    if not pairs:
        return [list(range(n))[rank::world] for rank in range(world)]
    half = n // 2
    found = []
    for rank in range(world):
        first = list(range(half))[rank::world]
        found.append(first + [2 * half - 1 - i for i in reversed(first)])
    if n % 2:
        min(reversed(found), key=len).append(n - 1)
    return found
