"""Convolutions that share their weights over quarter turns and reflections (the group p4m)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mrl.blocks.regions import LocalConv
from mrl.errors import ConfigError

ORDER = 8  # of the group D4: element s = 4 * m + r is r quarter turns, then, if m, the rows in reverse order


def p4m_product(a: int, b: int) -> int:
    """The element that does `b`, then `a`.

    Args:
        a: 0 to 7.
        b: 0 to 7.

    Example:
        >>> p4m_product(1, 3), p4m_product(4, 4), p4m_product(1, 4), p4m_product(4, 1)
        (0, 0, 7, 5)
    """
    (flip_a, turns_a), (flip_b, turns_b) = divmod(a, 4), divmod(b, 4)
    return 4 * ((flip_a + flip_b) % 2) + ((-turns_a if flip_b else turns_a) + turns_b) % 4


def p4m_inverse(element: int) -> int:
    """The element that undoes `element`.

    Example:
        >>> [p4m_product(p4m_inverse(s), s) for s in range(8)]
        [0, 0, 0, 0, 0, 0, 0, 0]
    """
    return element if element >= 4 else -element % 4


def p4m_transform(x: Tensor, element: int, *, fields: bool = True) -> Tensor:
    """What an element of the group does to a map: the plane is turned, and the orientations of a field change places.

        out[field, s] = turn(x[field, element^-1 s])

    Args:
        x: the map.
        element: 0 to 7.
        fields: whether the channels are fields of 8 orientations (channel = field * 8 + s); else only the plane turns.

    Shape:
        (..., C, H, W) -> the same, or (..., C, W, H) after an odd number of quarter turns

    Raises:
        ConfigError: channels that are not fields of 8.

    Example:
        >>> x = torch.randn(8, 3, 5)
        >>> turned = p4m_transform(x, 1)
        >>> turned.shape, torch.equal(p4m_transform(turned, p4m_inverse(1)), x)
        (torch.Size([8, 5, 3]), True)
    """
    flip, turns = divmod(element, 4)
    out = torch.rot90(x, turns, (-2, -1))
    out = out.flip(-2) if flip else out
    if not fields:
        return out
    _check_fields("p4m_transform", x.shape[-3])
    inverse = p4m_inverse(element)
    places = [p4m_product(inverse, s) for s in range(ORDER)]
    return out.unflatten(-3, (-1, ORDER))[..., places, :, :].flatten(-4, -3)


class P4MConv2d(nn.Module):
    """A convolution from fields of 8 orientations to fields of 8 orientations that commutes with the group p4m.

        out[o, h] = bias[o] + sum over fields and orientations of conv2d(x, h acting on weight[o])

    One filter a field is learned; the other seven are its turned and reflected copies. Stride 1 only: with stride 2 on
    an even size the grid itself is not symmetric, and the equality is lost.

    Args:
        in_fields: fields of the input, 8 channels each: channel = field * 8 + orientation.
        out_fields: fields of the output.
        kernel_size: odd, so that the kernel has a centre to turn around.
        padding: zeros around the map; kernel_size // 2 keeps its size.
        groups: groups of fields that do not mix; divides both numbers of fields.
        bias: whether each output field has a bias, shared by its orientations.
        device: where the weights live.
        dtype: of the weights.

    Shape:
        (B, 8 * in_fields, H, W) -> (B, 8 * out_fields, H', W')

    Raises:
        ConfigError: an even kernel, or groups that do not divide the fields.

    Reference:
        T. Cohen, M. Welling, "Group Equivariant Convolutional Networks", arXiv:1602.07576.

    Example:
        >>> conv = P4MConv2d(2, 3, 3, padding=1).double()
        >>> x = torch.randn(1, 16, 5, 7).double()
        >>> torch.allclose(conv(p4m_transform(x, 6)), p4m_transform(conv(x), 6), atol=1e-12)
        True
    """

    def __init__(
        self,
        in_fields: int,
        out_fields: int,
        kernel_size: int,
        *,
        padding: int = 0,
        groups: int = 1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ConfigError(f"P4MConv2d(kernel_size={kernel_size}): an even kernel has no centre; use 1, 3, 5 or 7.")
        if min(in_fields, out_fields, groups) < 1 or in_fields % groups or out_fields % groups:
            raise ConfigError(
                f"P4MConv2d(in_fields={in_fields}, out_fields={out_fields}, groups={groups}): the groups must divide "
                "both numbers of fields; use 1."
            )
        self.in_fields, self.out_fields, self.kernel_size = in_fields, out_fields, kernel_size
        self.padding, self.groups = padding, groups
        shape = (out_fields, in_fields // groups, ORDER, kernel_size, kernel_size)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_fields, device=device, dtype=dtype)) if bias else None
        self.places = _places(kernel_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Torch's default of a convolution that reads as many channels."""
        bound = self.weight[0].numel() ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def extra_repr(self) -> str:
        """What the constructor was told."""
        return (
            f"{self.in_fields}, {self.out_fields}, kernel_size={self.kernel_size}, padding={self.padding}, "
            f"groups={self.groups}, bias={self.bias is not None}"
        )

    def bank(self) -> tuple[Tensor, Tensor | None]:
        """Weight (8 * out_fields, 8 * in_fields / groups, k, k) and bias of the ordinary convolution that this is."""
        k = self.kernel_size
        places = torch.tensor(self.places, device=self.weight.device)  # no buffer: nothing to lose on the meta device
        copies = self.weight.flatten(2)[:, :, places]  # (out, in / groups, h, 8 * k * k)
        weight = copies.transpose(1, 2).reshape(ORDER * self.out_fields, -1, k, k)
        return weight, None if self.bias is None else self.bias.repeat_interleave(ORDER)

    def to_conv2d(self) -> nn.Conv2d:
        """The ordinary convolution that computes the same, for inference; it no longer shares its weights."""
        weight, bias = self.bank()
        conv = nn.Conv2d(
            ORDER * self.in_fields,
            ORDER * self.out_fields,
            self.kernel_size,
            padding=self.padding,
            groups=self.groups,
            bias=bias is not None,
            device=weight.device,
            dtype=weight.dtype,
        )
        with torch.no_grad():
            conv.weight.copy_(weight)
            if bias is not None:
                conv.bias.copy_(bias)
        return conv.requires_grad_(self.weight.requires_grad).train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """Convolves the map with the bank."""
        weight, bias = self.bank()
        return F.conv2d(x, weight, bias, padding=self.padding, groups=self.groups)


class LocalGroupConv(nn.Module):
    """The local mixing with group convolutions: a k x k convolution, then a 3 x 3 p4m convolution in each field.

    Only the second one commutes with turns and reflections; a network of them is not equivariant.

    Args:
        dim: channels, a multiple of 8: channel = field * 8 + orientation.
        kernel_size: of the first convolution, odd.
        group_size: channels that the first convolution mixes together.
        device: where the weights live.
        dtype: of the weights.

    Shape:
        (B, H, W, C) -> (B, H, W, C)

    Raises:
        ConfigError: channels that are not fields of 8, or what `LocalConv` refuses.

    Example:
        >>> LocalGroupConv(16)(torch.randn(1, 3, 5, 16)).shape
        torch.Size([1, 3, 5, 16])
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int = 3,
        group_size: int = 1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_fields("LocalGroupConv", dim)
        fields, options = dim // ORDER, {"device": device, "dtype": dtype}
        self.conv = LocalConv(dim, kernel_size, group_size, **options)
        self.p4m = P4MConv2d(fields, fields, 3, padding=1, groups=fields, **options)

    def forward(self, x: Tensor) -> Tensor:
        """Mixes each position with its neighbours, twice."""
        return self.p4m(self.conv(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def _check_fields(who: str, channels: int) -> None:
    if channels % ORDER or channels < ORDER:
        near = max(ORDER, round(channels / ORDER) * ORDER)
        raise ConfigError(f"{who}: {channels} channels are not fields of 8 orientations; use {near} channels.")


def _places(kernel_size: int) -> list[list[int]]:
    """For each element h, where each entry of "h acting on a filter" is found in the filter: 8 lists of 8 * k * k."""
    area = kernel_size * kernel_size
    numbers = torch.arange(ORDER * area, device="cpu").view(ORDER, kernel_size, kernel_size)
    return [p4m_transform(numbers, element).flatten().tolist() for element in range(ORDER)]
