"""The augmentation of ImageNet training, for networks from scratch: crops, RandAugment, random erasing."""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as F

IMAGENET_MEAN = (0.485, 0.456, 0.406)


@dataclass(frozen=True)
class ImageNetAugment:
    """Random resized crop, mirror, RandAugment and, after standardisation, random erasing; drawn from a seed.

    It reads the picture at its full size, so that a crop of 8 % of the area is no magnified thumbnail. The global random
    states are as they were afterwards. Colour jitter is replaced by RandAugment, as timm does where both are asked for.

    Args:
        size: (height, width) of the result.
        scale: smallest and largest share of the area that a crop keeps.
        ratio: smallest and largest width / height of a crop.
        flip: probability of mirroring left to right.
        policy: timm's name of a RandAugment policy; "" is none.
        erase: probability that a rectangle becomes noise.

    Shape:
        image (3, H, W) in [0, 1] -> (3, *size) in [0, 1]; `finish` takes a standardised image to the same.

    Example:
        >>> augment, image = ImageNetAugment((8, 8)), torch.rand(3, 20, 30)
        >>> torch.equal(augment(image, seed=1), augment(image, seed=1)), tuple(augment(image, seed=1).shape)
        (True, (3, 8, 8))
    """

    size: tuple[int, int]
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    policy: str = "rand-m9-mstd0.5-inc1"
    erase: float = 0.25

    full_size: ClassVar[bool] = True

    def __call__(self, image: Tensor, *, seed: int) -> Tensor:
        """The changed image; the same for the same seed."""
        with seeded(seed):
            box = RandomResizedCrop.get_params(image, list(self.scale), list(self.ratio))
            bicubic = InterpolationMode.BICUBIC
            x = F.resized_crop(image.contiguous(), *box, list(self.size), interpolation=bicubic, antialias=True)
            x = x.clamp(0, 1)
            if random.random() < self.flip:
                x = x.flip(-1)
            if not self.policy:
                return x
            picture = _rand_augment(self.policy, min(self.size))(F.to_pil_image(x))
            return F.to_dtype(F.to_image(picture), torch.float32, scale=True)

    def finish(self, image: Tensor, *, seed: int) -> Tensor:
        """The standardised image, a rectangle of it perhaps noise of the same mean and spread."""
        with seeded(seed):
            return RandomErasing(self.erase, mode="pixel", device="cpu")(image.clone())


@functools.cache
def _rand_augment(policy: str, side: int) -> Callable[..., object]:
    fill = tuple(round(255 * mean) for mean in IMAGENET_MEAN)
    augment = rand_augment_transform(policy, {"translate_const": int(0.45 * side), "img_mean": fill})
    for op in augment.ops:
        if "Posterize" in op.name:  # at its very strongest it keeps 0 bits, which Pillow refuses
            op.level_fn = functools.partial(_one_bit_or_more, op.level_fn)
    return augment


def _one_bit_or_more(level_fn: Callable[..., tuple[int, ...]], level: float, hparams: dict[str, object]) -> tuple[int]:
    return (max(1, level_fn(level, hparams)[0]),)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Python's, NumPy's and torch's global random states follow from `seed` inside, and are as they were after it.

    Args:
        seed: any whole number from 0.

    Example:
        >>> with seeded(3):
        ...     first = random.random(), np.random.rand(), torch.rand(1).item()
        >>> with seeded(3):
        ...     first == (random.random(), np.random.rand(), torch.rand(1).item())
        True
    """
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
