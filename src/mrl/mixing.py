"""Mixup and cutmix of a batch, as timm does them, with randomness that follows from a seed."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from mrl.data.imagenet import seeded


def seed_of(*parts: int) -> int:
    """A 63-bit seed from a few numbers, different for different numbers.

    Example:
        >>> seed_of(0, 1) == seed_of(0, 1), seed_of(0, 1) == seed_of(1, 0)
        (True, False)
    """
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def mix_batch(
    images: Tensor, labels: Tensor, num_classes: int, *, mixup: float, cutmix: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Mixes each image with another of its batch, and their targets alike; one of mixup and cutmix a batch.

    Of an odd batch the last image stays as it is.

    Args:
        images: a batch; not altered.
        labels: class indices.
        num_classes: K.
        mixup: alpha of the Beta distribution of the mixing ratio; 0 never blends.
        cutmix: alpha of the Beta distribution of the pasted area; 0 never pastes; with both, each has half the batches.
        seed: of the choice and the ratio.

    Shape:
        images (B, C, H, W), labels (B,) -> the images, targets (B, K) that sum to 1

    Example:
        >>> images, targets = mix_batch(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 1, 0]), 2, mixup=0.8, cutmix=1.0, seed=0)
        >>> targets.sum(1)
        tensor([1., 1., 1., 1.])
    """
    from timm.data import Mixup

    targets = nn.functional.one_hot(labels, num_classes).float()
    even = len(images) // 2 * 2
    if not even:
        return images, targets
    mix = Mixup(mixup_alpha=mixup, cutmix_alpha=cutmix, label_smoothing=0.0, num_classes=num_classes)
    with seeded(seed):
        mixed, soft = mix(images[:even].clone(), labels[:even])
    return torch.cat([mixed, images[even:]]), torch.cat([soft.to(targets), targets[even:]])
