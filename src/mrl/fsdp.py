"""One network in pieces on the processes of a launch: torch's `fully_shard` (FSDP2), which trains it as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from posixpath import commonpath

import torch
from torch import Tensor, nn

from mrl.run import world


def cut_(model: nn.Module, layers: Sequence[Sequence[str]], device: torch.device) -> nn.Module:
    """Leaves each process its piece of every parameter, in place; what is called comes together block by block.

    Alone the model stays as it is. Its forward pass is a collective call from then on: all processes make as many.

    Args:
        model: equal on all processes.
        layers: parameter names of the embeddings, of each block, and last of the final norm and the head.
        device: of this process, where its pieces go.

    Example:
        >>> net = nn.Linear(1, 1)
        >>> cut_(net, [["weight"], ["bias"]], torch.device("cpu")) is net
        True
    """
    if world() == 1:
        return model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world(),))
    for block in blocks_of(model, layers):
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def blocks_of(model: nn.Module, layers: Sequence[Sequence[str]]) -> list[nn.Module]:
    """The module of each block between embeddings and head that has all of its parameters, and only those.

    Example:
        >>> net = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.Linear(1, 1)), nn.Linear(1, 1))
        >>> layers = [["0.weight", "0.bias"], ["1.0.weight", "1.0.bias"], ["2.weight", "2.bias"]]
        >>> blocks_of(net, layers) == [net[1][0]]
        True
    """
    found: list[nn.Module] = []
    for names in layers[1:-1]:
        place = commonpath([name.replace(".", "/") for name in names]).split("/")
        if len(names) == 1:
            place = place[:-1]
        if not any(place):  # they share no module below the network itself
            continue
        module = model.get_submodule(".".join(place))
        called = type(module).forward is not nn.Module.forward and not isinstance(module, nn.ModuleList | nn.ModuleDict)
        if called and sum(1 for _ in module.parameters()) == len(names):
            found.append(module)
    return found


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, with pieces joined on the CPU of every process; all processes call it with the same names.

    Example:
        >>> whole({"a": torch.ones(2)})
        {'a': tensor([1., 1.])}
    """
    if world() == 1:
        return dict(tensors)
    from torch.distributed.tensor import DTensor

    return {k: v.full_tensor().cpu() if isinstance(v, DTensor) else v for k, v in tensors.items()}


def piece(value: Tensor, like: Tensor) -> Tensor:
    """This process's piece of a whole tensor, cut as `like` is; as it is where that is in one piece or has another shape.

    Args:
        value: the same on every process.
        like: of the same shape, for instance the parameter whose moment `value` is.

    Example:
        >>> piece(torch.ones(2), torch.zeros(2))
        tensor([1., 1.])
    """
    if world() == 1 or value.shape != like.shape:
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
