"""From a decoded image to what a model sees, and the random changes of training."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from mrl.data.imagenet import ImageNetAugment
from mrl.errors import ConfigError

Level = Literal["none", "light", "medium", "imagenet"]
INTERPOLATIONS = ("bicubic", "bilinear", "nearest")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocess:
    """Resizes the whole picture, then standardises: the same numbers in training, evaluation and prediction.

    x = (clamp(resize(image), 0, 1) - mean) / std

    Args:
        image_size: (height, width) that the model sees.
        mean: of each channel, as a share of white.
        std: of each channel.
        interpolation: "bicubic", "bilinear" or "nearest".
        resize: "squash": the whole picture, stretched to `image_size`; nothing is cut off.
        antialias: smooth before shrinking.
        bit_depth: as for `read_image`; kept here because whoever reads the images needs it.

    Shape:
        image (3, H, W) in [0, 1] -> (3, *image_size).

    Raises:
        ConfigError: a field has a value that is not allowed.

    Example:
        >>> preprocess = Preprocess((4, 6))
        >>> tuple(preprocess(torch.rand(3, 9, 9)).shape)
        (3, 4, 6)
        >>> Preprocess.from_dict(preprocess.to_dict()) == preprocess
        True
    """

    image_size: tuple[int, int]
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    interpolation: str = "bicubic"
    resize: str = "squash"
    antialias: bool = True
    bit_depth: int | None = None

    def __post_init__(self) -> None:
        size = (self.image_size, self.image_size) if isinstance(self.image_size, int) else tuple(self.image_size)
        if len(size) != 2 or any(int(n) != n or n < 1 for n in size):
            raise ConfigError(
                f"Preprocess(image_size={self.image_size}): must be two sides of 1 or more, such as (112, 112)."
            )
        object.__setattr__(self, "image_size", tuple(int(n) for n in size))
        for name in ("mean", "std"):
            values = tuple(float(v) for v in getattr(self, name))
            if len(values) != 3 or (name == "std" and min(values) <= 0):
                raise ConfigError(
                    f"Preprocess({name}={values}): must be three numbers{', above 0' if name == 'std' else ''}."
                )
            object.__setattr__(self, name, values)
        if self.interpolation not in INTERPOLATIONS:
            raise ConfigError(f"Preprocess(interpolation={self.interpolation!r}): use {', '.join(INTERPOLATIONS)}.")
        if self.resize != "squash":
            raise ConfigError(f"Preprocess(resize={self.resize!r}): use squash (the whole picture, stretched).")

    def resize_image(self, image: Tensor) -> Tensor:
        """`image` at `image_size`, still in [0, 1]; a grey image (one channel seen three times) stays one."""
        grey = is_grey(image)
        pixels = (image[:1] if grey else image).contiguous()
        mode, smooth = InterpolationMode(self.interpolation), self.antialias and self.interpolation != "nearest"
        pixels = F.resize(pixels, list(self.image_size), interpolation=mode, antialias=smooth).clamp(0, 1)
        return pixels.expand(3, -1, -1) if grey else pixels

    def normalize(self, image: Tensor) -> Tensor:
        """(image - mean) / std, channel by channel; also on a batch."""
        mean, std = (image.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (image - mean) / std

    def __call__(self, image: Tensor) -> Tensor:
        """`normalize(resize_image(image))`."""
        return self.normalize(self.resize_image(image))

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Preprocess:
        """From what `to_dict` gave.

        Raises:
            ConfigError: a field is missing or unknown.
        """
        try:
            return cls(**data)
        except TypeError as error:
            raise ConfigError(f"preprocessing record: {error}; it was written by another version of mrl.") from error


@dataclass(frozen=True)
class Augment:
    """Random changes that keep the label, drawn from a seed; probabilities and ranges are fields.

    The order is: mirror, upside down, quarter turns, crop and resize, small rotation and shift, contrast and
    brightness, blur, noise. The global random state is neither read nor changed.

    Args:
        crop_scale: the smallest share of the area a random crop keeps; 1 never crops.
        flip: probability of mirroring left to right.
        vflip: probability of turning upside down.
        quarter_turns: whether to turn by 0, 90, 180 or 270 degrees (0 or 180 where the sides differ).
        degrees: the largest small rotation; shifts go up to 5 % of a side with it.
        contrast: the largest relative change of contrast.
        brightness: the largest change of brightness, as a share of white.
        blur: probability of a slight blur.
        noise: the largest standard deviation of added noise, which half of the images get.

    Shape:
        image (3, H, W) in [0, 1] -> the same; a grey image (one channel seen three times) stays one.

    Example:
        >>> image, augment = torch.rand(3, 8, 8), make_augment("light")
        >>> bool((augment(image, seed=1) == augment(image, seed=1)).all())
        True
    """

    crop_scale: float = 0.9
    flip: float = 0.5
    vflip: float = 0.0
    quarter_turns: bool = False
    degrees: float = 0.0
    contrast: float = 0.1
    brightness: float = 0.05
    blur: float = 0.0
    noise: float = 0.0

    full_size: ClassVar[bool] = False  # works on the resized picture

    def finish(self, image: Tensor, *, seed: int) -> Tensor:
        """What is left to do on the standardised image: nothing."""
        return image

    def __call__(self, image: Tensor, *, seed: int) -> Tensor:
        """The changed image; the same for the same seed."""
        draw = torch.Generator().manual_seed(seed)
        u = torch.rand(16, generator=draw).tolist()
        grey = is_grey(image)
        x = image[:1] if grey else image
        if u[0] < self.flip:
            x = x.flip(-1)
        if u[1] < self.vflip:
            x = x.flip(-2)
        if self.quarter_turns:
            x = torch.rot90(x, int(4 * u[2]) if x.shape[-1] == x.shape[-2] else 2 * int(2 * u[2]), (-2, -1))
        if self.crop_scale < 1:
            x = self._crop(x, *u[3:7])
        if self.degrees:
            x = self._tilt(x, *(2 * v - 1 for v in u[7:10]))
        factor, shift = 1 + self.contrast * (2 * u[10] - 1), self.brightness * (2 * u[11] - 1)
        x = x * factor + (float(x.mean()) * (1 - factor) + shift)
        if u[12] < self.blur:
            x = F.gaussian_blur(x, [3, 3], [0.3 + 0.7 * u[13]])
        if self.noise and u[14] < 0.5:
            x = x + torch.randn(x.shape, generator=draw) * (self.noise * u[15])
        x = x.clamp(0, 1)
        return x.expand(3, -1, -1) if grey else x

    def _crop(self, x: Tensor, area: float, shape: float, top: float, left: float) -> Tensor:
        """A crop of `crop_scale` to 1 of the area, of nearly the same shape, resized to the whole."""
        height, width = x.shape[-2:]
        side = (self.crop_scale + (1 - self.crop_scale) * area) ** 0.5
        stretch = (0.9 + 0.2 * shape) ** 0.5
        h, w = (max(1, min(n, round(n * side * s))) for n, s in ((height, stretch), (width, 1 / stretch)))
        corner = [int(top * (height - h + 1)), int(left * (width - w + 1))]
        return F.resized_crop(x.contiguous(), *corner, h, w, [height, width], antialias=False)

    def _tilt(self, x: Tensor, angle: float, right: float, down: float) -> Tensor:
        """A small rotation and shift; what comes in from outside is the mirrored edge."""
        height, width = x.shape[-2:]
        turn = math.radians(self.degrees * angle)
        cos, sin, ratio = math.cos(turn), math.sin(turn), height / width
        matrix = torch.tensor([[[cos, sin * ratio, 0.1 * right], [-sin / ratio, cos, 0.1 * down]]], dtype=x.dtype)
        grid = functional.affine_grid(matrix, [1, x.shape[0], height, width], align_corners=False)
        return functional.grid_sample(x[None], grid, padding_mode="reflection", align_corners=False)[0]


def make_augment(level: Level = "light", size: tuple[int, int] = (224, 224)) -> Augment | ImageNetAugment:
    """The augmentation of this level.

    Args:
        level: "light" (mirror, crop of 90 to 100 % of the area, slight contrast and brightness) keeps what inspection
            and medical images need: orientation and detail; "medium" adds upside down, quarter turns, small rotations
            and shifts, blur and noise; "none" changes nothing; "imagenet" is the strong one of ImageNet training.
        size: (height, width) of the model's images, which "imagenet" crops to.

    Raises:
        ConfigError: an unknown level.

    Example:
        >>> image = torch.rand(3, 4, 4)
        >>> bool((make_augment("none")(image, seed=0) == image).all())
        True
    """
    if level == "none":
        return Augment(crop_scale=1.0, flip=0.0, contrast=0.0, brightness=0.0)
    if level == "light":
        return Augment()
    if level == "medium":
        return Augment(0.7, 0.5, 0.5, True, 10.0, 0.2, 0.1, 0.2, 0.03)
    if level == "imagenet":
        return ImageNetAugment(tuple(size))
    raise ConfigError(f"--augment {level}: unknown; use none, light, medium or imagenet.")


def is_grey(image: Tensor) -> bool:
    """Whether `image` (3, H, W) is one channel seen three times, without a copy, as `read_image` gives it.

    Example:
        >>> is_grey(torch.rand(1, 2, 2).expand(3, -1, -1)), is_grey(torch.rand(3, 2, 2))
        (True, False)
    """
    return image.shape[0] == 3 and image.stride(0) == 0
