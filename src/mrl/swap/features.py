"""The teacher's final features: what a head reads, how far a student is from them, and in which directions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mrl.swap.apply import Handle
from mrl.swap.calls import first_tensor

FINAL = "final features"
WIDEST = 4096  # features that are whitened


def final_features(model: nn.Module, images: Tensor) -> Tensor:
    """What a head may read, (B, F): the model's features or output, and the mean of its patch tokens where timm shows them.

    Args:
        model: the whole model.
        images: (B, 3, H, W).

    Example:
        >>> import timm
        >>> final_features(timm.create_model("test_vit", img_size=32), torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 1064])
    """
    net = getattr(model, "backbone", model)
    if not (hasattr(net, "forward_features") and hasattr(net, "forward_head")):
        found = model.features(images) if callable(getattr(model, "features", None)) else model(images)
        return first_tensor(found).flatten(1)
    tokens = net.forward_features(images)
    parts = [net.forward_head(tokens).flatten(1)]
    if tokens.ndim == 3:
        parts.append(tokens[:, int(getattr(net, "num_prefix_tokens", 0)) :].mean(1))
    return torch.cat(parts, 1)


class Teacher:
    """The final features of a swapped model's teacher.

    Args:
        handle: of the swapped model, in eval mode.
        held: held-out images, on the model's device.
        autocast: the precision of the passes.

    Example:
        >>> import contextlib, timm, mrl
        >>> net = timm.create_model("test_vit", img_size=32).eval()
        >>> handle = mrl.swap_(net, mrl.plan(net, region=1))
        >>> Teacher(handle, torch.randn(4, 3, 32, 32), contextlib.nullcontext).error()[FINAL] < 1e-5
        True
    """

    def __init__(self, handle: Handle, held: Tensor, autocast: Callable[[], Any]) -> None:
        self.handle, self.held, self.autocast = handle, held, autocast

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """The teacher's final features, (N, F)."""
        with self.handle.disabled(), self.autocast():
            parts = images.split(32)
            return torch.cat([final_features(self.handle.model, p.to(self.held.device)).float() for p in parts])

    @functools.cached_property
    def known(self) -> Tensor:
        """The teacher's final features of the held-out images."""
        return self.features(self.held)

    @functools.cached_property
    def spread(self) -> Tensor:
        """The standard deviation of each final feature of the teacher over the held-out images."""
        return self.known.std(0).clamp(min=1e-6 + 1e-3 * float(self.known.std()))

    def loss(self, ours: Tensor, theirs: Tensor, whitening: Tensor | None = None) -> Tensor:
        """Mean squared distance in units of the spread, in the directions of `whitening` if there is one."""
        apart = (ours.float() - theirs.float()) / self.spread
        return (apart if whitening is None else apart @ whitening).square().mean()

    @torch.no_grad()
    def error(self) -> dict[str, float]:
        """The student's held-out error of the final features, in units of the teacher's spread."""
        total = 0.0
        for chunk, target in zip(self.held.split(32), self.known.split(32), strict=True):
            with self.autocast():
                found = final_features(self.handle.model, chunk)
            total += float(self.loss(found, target)) * len(chunk)
        return {FINAL: total / len(self.held)}

    @torch.no_grad()
    def whitening(self, images: Tensor) -> Tensor | None:
        """The matrix that gives the teacher's standardised features about the same variance in every direction.

        With C the correlations of its n features of F numbers: V diag(l + s)^(-1/2), C = V diag(l) V^T, s = 0.1 max(1, F / n).
        A head reads directions in which the features hardly vary, too; plain squares would not see an error there.
        None where the features are too many for it.
        """
        found = self.features(images)
        n, width = found.shape
        if width > WIDEST:
            return None
        standard = ((found - found.mean(0)) / self.spread).double()
        values, vectors = torch.linalg.eigh(standard.T @ standard / n)
        return (vectors * (values.clamp(min=0) + 0.1 * max(1.0, width / n)).rsqrt()).float()
