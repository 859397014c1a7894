"""One run folder with what its verbs share: protocol, images, split and models, each read once."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mrl.data import (
    Audit,
    ImageCache,
    ImageSet,
    ImageSource,
    Preprocess,
    SplitRow,
    load_audit,
    load_source,
    make_augment,
    read_split,
)
from mrl.errors import ConfigError, DataError
from mrl.models import Classifier, build_model
from mrl.models.build import preprocess_of
from mrl.protocol import Protocol, load_protocol
from mrl.swap import load

if TYPE_CHECKING:
    from torch import nn

ARMS = ("baseline", "mrl")


class Workspace:
    """The run folder of `--out`.

    Args:
        out: the folder; it need not exist yet.

    Example:
        >>> Workspace("runs/demo").arm("mrl").as_posix()
        'runs/demo/arms/mrl'
    """

    def __init__(self, out: Path | str) -> None:
        self.out = Path(out)
        if self.out.is_file():
            raise ConfigError(f"--out {self.out} is a file; give a folder.")

    def file(self, name: str) -> Path:
        """A file of the run."""
        return self.out / name

    def arm(self, name: str) -> Path:
        """The folder of an arm."""
        return self.out / "arms" / name

    @cached_property
    def protocol(self) -> Protocol:
        """The protocol as it stands in the folder."""
        return load_protocol(self.out)

    @cached_property
    def source(self) -> ImageSource:
        """The images of the protocol."""
        data = self.protocol.data
        return load_source(data["source"], test=data["test"])

    @cached_property
    def audit(self) -> Audit:
        """The audit of these images, read back."""
        return load_audit(self.out, self.source)

    @cached_property
    def rows(self) -> list[SplitRow]:
        """The split."""
        return read_split(self.file("split.csv"))

    @cached_property
    def preprocess(self) -> Preprocess:
        """What an image goes through before the model, in training and afterwards."""
        protocol = self.protocol
        net = build_model(protocol.model, None, image_size=protocol.image_size)
        return Preprocess(tuple(protocol.image_size), bit_depth=protocol.data["bit_depth"], **preprocess_of(net))

    @cached_property
    def cache(self) -> ImageCache:
        """Resized images, shared by all sides and arms while they fit in memory."""
        return ImageCache()

    def image_set(self, *sides: str, augment: str = "none", seed: int = 0) -> ImageSet:
        """The images of these sides of the split, in the order of `split.csv`."""
        samples = {s.image: s for s in self.audit.kept}
        wanted = [row for row in self.rows if row.split in sides]
        lost = [row.image for row in wanted if row.image not in samples]
        if lost:
            raise DataError(
                f"{self.file('split.csv')} names {len(lost)} images that the data no longer has, such as {lost[0]}; use a new --out."
            )
        return ImageSet(
            [samples[row.image] for row in wanted],
            self.source.classes,
            self.preprocess,
            augment=None if augment == "none" else make_augment(augment, tuple(self.protocol.image_size)),
            seed=seed,
            cache=self.cache,
        )

    def new_classifier(self) -> nn.Module:
        """The user's model with a fresh head for these classes: the start of both arms."""
        protocol = self.protocol
        torch.manual_seed(protocol.seed)
        backbone = build_model(protocol.model, protocol.weights, image_size=protocol.image_size)
        return Classifier(backbone, len(self.source.classes), classes=self.source.classes)

    def fitted(self, arm: str) -> nn.Module:
        """The best candidate of an arm, in eval mode."""
        folder = self.arm(arm) / "model"
        if not folder.is_dir():
            raise ConfigError(f"{folder}: arm {arm} is not fitted yet; run `mrl fit --out {self.out}` first.")
        return load(folder)

    def stamp(self) -> dict[str, Any]:
        """What every result file carries: schema, hash of the protocol, environment."""
        from mrl.run import environment

        return {"schema": 1, "protocol_sha256": self.protocol.sha256(), "environment": environment()}
