"""Split images as a data set whose every number follows from (seed, epoch, index)."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mrl.data.imagenet import ImageNetAugment
from mrl.data.images import read_image
from mrl.data.sources import Sample
from mrl.data.transforms import Augment, Preprocess, is_grey
from mrl.errors import ConfigError, DataError

ORDER = 1  # a stream of its own, apart from the augmentation's


class ImageCache:
    """Resized images in memory, up to a limit; later ones are decoded again each time.

    They are kept as float32, a grey image as one channel: exactly the numbers of `Preprocess.resize_image`. Image sets
    with the same preprocessing can share one.

    Args:
        cache_mb: the limit in MB; 0 keeps nothing.

    Example:
        >>> cache = ImageCache(cache_mb=1)
        >>> cache.put("a", torch.rand(1, 4, 4).expand(3, -1, -1))
        >>> cache.used_bytes, tuple(cache.get("a").shape)
        (64, (3, 4, 4))
    """

    def __init__(self, cache_mb: float = 2048) -> None:
        self.limit_bytes = int(cache_mb * 1e6)
        self.used_bytes = 0
        self._images: dict[Any, Tensor] = {}
        self._lock = threading.Lock()

    def get(self, key: Any) -> Tensor | None:
        """The image, (3, H, W), or None."""
        found = self._images.get(key)
        return None if found is None else found.expand(3, -1, -1)

    def put(self, key: Any, image: Tensor) -> None:
        """Keeps the image if there is room."""
        kept = (image[:1] if is_grey(image) else image).contiguous()
        size = kept.numel() * kept.element_size()
        with self._lock:
            if key not in self._images and self.used_bytes + size <= self.limit_bytes:
                self._images[key] = kept
                self.used_bytes += size

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()


class ImageSet(Dataset[dict[str, Any]]):
    """Images of one side of a split, ready for a model.

    `image_set[i]` is {"image": (3, H, W) float32, standardised, "label": index of the class, "weight": the sample's,
    "index": i}. The augmentation of image i in epoch e depends on (seed, e, i) only, so a resumed run repeats it.

    Args:
        samples: the images.
        classes: the labels, in the order of the model's outputs.
        preprocess: what every image goes through.
        augment: random changes after resizing (or, where it says `full_size`, instead of it), or None.
        seed: of the augmentation.
        cache_mb: how much memory the resized images may take; later ones are decoded each time.
        cache: a cache to share instead.

    Raises:
        DataError: a sample's label is not among the classes.

    Example:
        >>> from pathlib import Path
        >>> ImageSet([Sample("a.png", Path("a.png"), "cat")], ["crack", "good"], Preprocess((8, 8)))
        Traceback (most recent call last):
        mrl.errors.DataError: a.png: label cat is not one of crack, good; use the labels of the training data.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        classes: Sequence[str],
        preprocess: Preprocess,
        augment: Augment | ImageNetAugment | None = None,
        seed: int = 0,
        cache_mb: float = 2048,
        cache: ImageCache | None = None,
    ) -> None:
        self.samples = tuple(samples)
        self.classes = tuple(classes)
        index = {label: i for i, label in enumerate(self.classes)}
        for sample in self.samples:
            if sample.label not in index:
                known = ", ".join(self.classes)
                raise DataError(
                    f"{sample.image}: label {sample.label} is not one of {known}; use the labels of the training data."
                )
        self.labels = tuple(index[sample.label] for sample in self.samples)
        self.preprocess, self.augment, self.seed, self.epoch = preprocess, augment, seed, 0
        self.cache = ImageCache(cache_mb) if cache is None else cache

    def __len__(self) -> int:
        return len(self.samples)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch that the augmentation and the order of a loader belong to."""
        self.epoch = epoch

    def resized(self, index: int) -> Tensor:
        """(3, H, W) in [0, 1], before augmentation and standardisation; from the cache where it is there."""
        sample = self.samples[index]
        key = (sample.path, self.preprocess)
        image = self.cache.get(key)
        if image is None:
            image = self.preprocess.resize_image(read_image(sample.path, bit_depth=self.preprocess.bit_depth))
            self.cache.put(key, image)
        return image

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self.samples):
            raise IndexError(f"image {index} of {len(self.samples)}")
        sample, seed = self.samples[index], _seed(self.seed, self.epoch, index)
        if self.augment is None:
            image = self.preprocess.normalize(self.resized(index))
        else:
            whole = self.augment.full_size
            image = read_image(sample.path, bit_depth=self.preprocess.bit_depth) if whole else self.resized(index)
            image = self.preprocess.normalize(self.augment(image, seed=seed))
            image = self.augment.finish(image, seed=seed + 1)
        return {
            "image": image,
            "label": self.labels[index],
            "weight": sample.weight,
            "index": index,
        }


class EpochSampler(Sampler[int]):
    """The order of an image set: as it is, or shuffled by (seed, the set's epoch).

    Example:
        >>> images = ImageSet([], ["a", "b"], Preprocess((8, 8)))
        >>> list(EpochSampler(images, 0))
        []
    """

    def __init__(self, image_set: ImageSet, shuffle_seed: int | None) -> None:
        self.image_set, self.shuffle_seed = image_set, shuffle_seed

    def __len__(self) -> int:
        return len(self.image_set)

    def __iter__(self) -> Iterator[int]:
        if self.shuffle_seed is None:
            return iter(range(len(self)))
        seed = np.random.SeedSequence([self.shuffle_seed, self.image_set.epoch, ORDER, 0])
        return iter(np.random.default_rng(seed).permutation(len(self)).tolist())


def make_loader(
    image_set: ImageSet, batch_size: int, *, shuffle_seed: int | None = None, drop_last: bool = False, workers: int = 0
) -> DataLoader:
    """Batches of an image set: {"image" (B, 3, H, W), "label" (B,) int64, "weight" (B,) float32, "index" (B,) int64}.

    The order depends on (`shuffle_seed`, the set's epoch) only; call `image_set.set_epoch(e)` before each epoch. The
    global random state is neither read nor changed.

    Args:
        image_set: the images.
        batch_size: images a batch.
        shuffle_seed: shuffle by this seed; None keeps the order.
        drop_last: leave out the last batch where it is smaller.
        workers: processes that decode; each has a cache of its own, so with few cores 0 is best.

    Raises:
        ConfigError: a batch size below 1.
    """
    if batch_size < 1:
        raise ConfigError(f"batch size {batch_size}: must be 1 or more.")
    return DataLoader(
        image_set,
        batch_size,
        sampler=EpochSampler(image_set, shuffle_seed),
        drop_last=drop_last,
        num_workers=workers,
        collate_fn=collate,
        generator=torch.Generator().manual_seed(0),
    )


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Stacks items of an `ImageSet` into one batch."""
    kinds = {"label": torch.int64, "weight": torch.float32, "index": torch.int64}
    batch = {name: torch.tensor([item[name] for item in items], dtype=kind) for name, kind in kinds.items()}
    return {"image": torch.stack([item["image"] for item in items]), **batch}


def _seed(seed: int, epoch: int, index: int) -> int:
    return int(np.random.SeedSequence([seed, epoch, index]).generate_state(1, np.uint64)[0] >> 1)
