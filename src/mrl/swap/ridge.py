"""The output projection in closed form: the least change with which a mixer answers as its attention did."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

STRENGTHS = (1e-1, 1e-2, 1e-3)
ROWS = 8192  # products are summed in float32 over this many tokens, in float64 beyond
OUTPUTS = ("proj", "out_proj", "o_proj")


def output_projection(mixer: nn.Module) -> nn.Linear | None:
    """The plain Linear that a mixer ends with, or None (none of its own, or one that LoRA or quantisation wraps).

    Example:
        >>> output_projection(nn.ModuleDict({"proj": nn.Linear(2, 2)}))
        Linear(in_features=2, out_features=2, bias=True)
    """
    found = next((getattr(mixer, n) for n in OUTPUTS if isinstance(getattr(mixer, n, None), nn.Module)), None)
    return found if type(found) is nn.Linear or type(found).__name__ == "NonDynamicallyQuantizableLinear" else None


class Ridge:
    """Sums over tokens for min ||Y W^T + b - T||^2 + strength * |Y|^2 * ||W - W0||^2, where W0 is the inherited projection.

    Args:
        linear: the projection; its values now are W0.

    Example:
        >>> linear, y = nn.Linear(3, 2), torch.randn(50, 3)
        >>> sums = Ridge(linear)
        >>> sums.add(y, 2 * linear(y).detach())
        >>> weight, bias = sums.solve(1e-6)
        >>> torch.allclose(weight, 2 * linear.weight, atol=1e-3)
        True
    """

    def __init__(self, linear: nn.Linear) -> None:
        self.linear = linear
        size = linear.in_features + 1
        self.gram = torch.zeros(size, size, dtype=torch.float64)
        self.cross = torch.zeros(size, linear.out_features, dtype=torch.float64)

    def add(self, y: Tensor, target: Tensor, weight: float = 1.0) -> None:
        """Counts tokens.

        Args:
            y: what goes into the projection, (..., C_in).
            target: what should come out, (..., C_out).
            weight: how much each of these tokens counts.
        """
        w0, b0 = (None if t is None else t.detach().float() for t in (self.linear.weight, self.linear.bias))
        for part, goal in zip(y.flatten(0, -2).split(ROWS), target.flatten(0, -2).split(ROWS), strict=True):
            part, goal = part.float(), goal.float()
            residual = goal - nn.functional.linear(part, w0, b0)
            part = torch.cat([part, part.new_ones(len(part), 1)], 1)
            self.gram += weight * (part.T @ part).double().cpu()
            self.cross += weight * (part.T @ residual).double().cpu()

    def solve(self, strength: float) -> tuple[Tensor, Tensor | None]:
        """The weight and bias for one strength."""
        size = len(self.gram) - 1
        pull = strength * self.gram.diagonal()[:size].mean() * torch.ones(size + 1, dtype=torch.float64)
        pull[-1] = 1e-9 * self.gram[-1, -1] if self.linear.bias is not None else 1e12 * self.gram.diagonal().max()
        change = torch.linalg.solve(self.gram + torch.diag(pull), self.cross).to(self.linear.weight)
        bias = None if self.linear.bias is None else self.linear.bias.detach() + change[-1]
        return self.linear.weight.detach() + change[:-1].T, bias


@torch.no_grad()
def fit_projections(
    sums: dict[str, Ridge], errors: Callable[[], dict[str, float]], strengths: Iterable[float] = STRENGTHS
) -> None:
    """Sets every projection to the strength with the lowest held-out error, or leaves it where none helps.

    Args:
        sums: what was counted, by mixer.
        errors: held-out error of every mixer with the values set now.
        strengths: the candidates.
    """
    best = errors()
    chosen = {name: values_of(s.linear) for name, s in sums.items()}
    solved = {strength: {name: s.solve(strength) for name, s in sums.items()} for strength in strengths}
    for found in solved.values():
        for name, values in found.items():
            put_linear(sums[name].linear, values)
        for name, error in errors().items():
            if name in found and error < best[name]:
                best[name], chosen[name] = error, found[name]
    for name, values in chosen.items():
        put_linear(sums[name].linear, values)


def values_of(linear: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Copies of a Linear's weight and bias.

    Example:
        >>> [tuple(t.shape) for t in values_of(nn.Linear(3, 2))]
        [(2, 3), (2,)]
    """
    bias = linear.bias
    return linear.weight.detach().clone(), None if bias is None else bias.detach().clone()


@torch.no_grad()
def put_linear(linear: nn.Linear, values: tuple[Tensor, Tensor | None]) -> None:
    """Sets a Linear's weight and bias, in place.

    Example:
        >>> linear = nn.Linear(1, 1)
        >>> put_linear(linear, (torch.ones(1, 1), torch.zeros(1)))
        >>> float(linear(torch.ones(1)).detach())
        1.0
    """
    linear.weight.copy_(values[0])
    if linear.bias is not None:
        linear.bias.copy_(values[1])
