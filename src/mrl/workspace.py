"""One run folder with what its verbs share: protocol, images, split and models, each read once."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mrl.arms import BASELINE, MRL, Arm, arms_of
from mrl.data import (
    Audit,
    Folds,
    ImageCache,
    ImageSet,
    ImageSource,
    Preprocess,
    SplitRow,
    load_audit,
    load_source,
    make_augment,
    read_folds,
    read_split,
    split_of,
    split_units,
    write_split,
)
from mrl.errors import ConfigError, DataError
from mrl.fit_config import FitConfig
from mrl.models import Classifier, build_model
from mrl.models.build import preprocess_of
from mrl.protocol import Protocol, load_protocol
from mrl.swap import load
from mrl.tracking import Tracking

if TYPE_CHECKING:
    from torch import nn

LAST = "last"  # the fold of a fit on all images but the frozen ones


class Workspace:
    """The run folder of `--out`.

    Args:
        out: the folder; it need not exist yet.

    Example:
        >>> Workspace("runs/demo").arm("mrl").as_posix()
        'runs/demo/arms/mrl'
    """

    repeat, fold = 0, 0
    tracker = "none"  # what the rows of the fits are copied to; no number depends on it
    alone: str | None = None  # the only arm of one hold-out that is fitted: the test images open when it is done

    def __init__(self, out: Path | str) -> None:
        self.out = Path(out)
        if self.out.is_file():
            raise ConfigError(f"--out {self.out} is a file; give a folder.")

    def file(self, name: str) -> Path:
        """A file of the run."""
        return self.out / name

    @property
    def home(self) -> Path:
        """Where the arms, models and sides are that are measured and exported: the run, or one fold of it.

        With folds that is the fit on all images but the frozen test set, where there is one, else the first fold.
        """
        if not self.file("protocol.yaml").is_file() or not self.protocol.folds:
            return self.out
        return self.out / "folds" / (LAST if self.protocol.folds["n_frozen"] else "r0f0")

    @property
    def name(self) -> str | None:
        """Of a fold, as `--fold` takes it; None of a run."""
        return None

    def arm(self, name: str) -> Path:
        """The folder of an arm."""
        return self.home / "arms" / name

    def arm_file(self, arm: str, name: str) -> Path:
        """The `plan.json` or `calibration.json` of a swapped arm: the run's own for `mrl`, else one in its folder."""
        return self.file(name if arm == MRL else f"arms/{arm}/{name}")

    @cached_property
    def arms(self) -> dict[str, Arm]:
        """All arms of the protocol, the baseline first."""
        return arms_of(self.protocol)

    def tracking(self, *name: str) -> Tracking:
        """Where the rows of a fit of this name are copied to."""
        return Tracking(self.tracker, self.out, "/".join(name))

    @property
    def seed(self) -> int:
        """Of the training."""
        return self.protocol.seed

    @property
    def refits(self) -> bool:
        """Whether a fit on the whole training side follows the one that chooses."""
        return False

    def budget(self, *sides: str, arm: str) -> FitConfig:
        """How an arm is fitted on these sides of the split."""
        return self.arms[arm].budget

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
        """The split; with folds, that of the fold at `home`."""
        return read_split(self.home / "split.csv")

    @cached_property
    def folds(self) -> Folds:
        """Which image is tested in which fold."""
        return read_folds(self.out)

    @cached_property
    def units(self) -> dict[str, str]:
        """What each image stays together with."""
        return split_units(self.audit, group_near=self.protocol.data["group_near"])

    @cached_property
    def preprocess(self) -> Preprocess:
        """What an image goes through before the run's own model, in training and afterwards."""
        return self._preprocess_of(self.protocol.model)

    @cached_property
    def _preprocesses(self) -> dict[str, Preprocess]:
        return {}

    def preprocess_for(self, arm: str) -> Preprocess:
        """The same for an arm: the size is the run's, mean, standard deviation and interpolation are its model's."""
        model = self.arms[arm].model
        if model == self.protocol.model:
            return self.preprocess
        if model not in self._preprocesses:
            self._preprocesses[model] = self._preprocess_of(model)
        return self._preprocesses[model]

    def _preprocess_of(self, model: str) -> Preprocess:
        protocol = self.protocol
        net = build_model(model, None, image_size=protocol.image_size)
        return Preprocess(tuple(protocol.image_size), bit_depth=protocol.data["bit_depth"], **preprocess_of(net))

    @cached_property
    def cache(self) -> ImageCache:
        """Resized images, shared by all sides and arms while they fit in memory."""
        return ImageCache()

    def image_set(self, *sides: str, augment: str = "none", seed: int = 0, arm: str = BASELINE) -> ImageSet:
        """The images of these sides of the split, in the order of `split.csv`, as this arm's model takes them.

        Raises:
            ConfigError: the test side, before every fit that could have used it is done.
            DataError: an image of the split that is not there any more.
        """
        if "test" in sides:
            self._opened()
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
            self.preprocess_for(arm),
            augment=None if augment == "none" else make_augment(augment, tuple(self.protocol.image_size)),
            seed=seed,
            cache=self.cache,
        )

    def _opened(self) -> None:
        """Raises ConfigError until every arm is fitted: before that nothing may look at a test image.

        Where a caller says that one arm is fitted `alone`, that one must be done, and no other begun.
        """
        arms = self.protocol.arms
        tested = (self.home / "predictions.csv").is_file()  # a fold that was tested keeps its records, not its weights
        done = [
            arm
            for arm in arms
            if (self.arm(arm) / "model").is_dir() or (tested and (self.arm(arm) / "fit.json").is_file())
        ]
        left = [arm for arm in arms if arm not in done]
        begun = [arm for arm in left if self.refits or self.arm(arm).is_dir()]
        if left and (begun or self.alone not in done):
            raise ConfigError(
                f"{self.home}: its test images stay shut until the fits are done, and arm {(begun or left)[0]} is not fitted "
                f"yet; run `mrl fit --out {self.out}` first."
            )

    def new_classifier(self, arm: str = BASELINE) -> nn.Module:
        """An arm's model, not swapped, with a fresh head for these classes: the start of baseline and mrl is the same."""
        torch.manual_seed(self.seed)
        chosen = self.arms[arm]
        backbone = build_model(chosen.model, chosen.weights, image_size=self.protocol.image_size)
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


class FoldSpace(Workspace):
    """One fold of a run: a folder of its own, `folds/r<repeat>f<fold>`, with its split, arms and predictions.

    Protocol, audit, plans and images are the run's. The training seed differs from fold to fold and is the same for all
    arms.

    Args:
        run: the run.
        repeat: which repeat.
        fold: which fold of it; -1 trains on all images but the frozen ones and tests on those.

    Example:
        >>> FoldSpace(Workspace("runs/mine"), 1, 3).out.as_posix()
        'runs/mine/folds/r1f3'
    """

    SHARED = ("plan.json", "protocol.yaml", "audit.json")

    def __init__(self, run: Workspace, repeat: int, fold: int) -> None:
        super().__init__(run.out / "folds" / (LAST if fold < 0 else f"r{repeat}f{fold}"))
        self.run, self.repeat, self.fold = run, repeat, fold

    def file(self, name: str) -> Path:
        """A file of the fold, or of the run where all folds share it."""
        return self.run.file(name) if Path(name).name in self.SHARED else self.out / name

    @property
    def home(self) -> Path:
        """The fold's folder."""
        return self.out

    @property
    def seed(self) -> int:
        """Of the training in this fold."""
        return self.run.seed + 1 + self.repeat * self.run.protocol.folds["k"] + max(self.fold, 0)

    def tracking(self, *name: str) -> Tracking:
        """As the run's, in its one store."""
        return self.run.tracking(self.name, *name)

    @property
    def name(self) -> str:
        """As `--fold` takes it."""
        return self.out.name

    @property
    def refits(self) -> bool:
        """Always: the inner side of a fold only chooses."""
        return True

    @cached_property
    def rows(self) -> list[SplitRow]:
        """The fold's split, made from the manifest; what is on disk must agree with it."""
        path, run = self.out / "split.csv", self.run
        told = {"val_fraction": run.protocol.val_fraction, "units": run.units}
        rows = split_of(run.folds, self.repeat, self.fold, **told)
        if path.is_file() and read_split(path) != rows:
            raise DataError(
                f"{path} is not what the run's split.csv says; delete the folder {self.out} to fit it again."
            )
        if not path.is_file():
            write_split(path, rows)
        return rows

    protocol = property(lambda self: self.run.protocol)
    source = property(lambda self: self.run.source)
    audit = property(lambda self: self.run.audit)
    preprocess = property(lambda self: self.run.preprocess)
    _preprocesses = property(lambda self: self.run._preprocesses)
    cache = property(lambda self: self.run.cache)


def spaces_of(run: Workspace) -> list[Workspace]:
    """What a run has to fit: itself with one hold-out; else its folds, and the fit for the frozen test set last.

    Example:
        >>> spaces_of(Workspace("no-such-run"))
        Traceback (most recent call last):
        mrl.errors.ConfigError: no-such-run/protocol.yaml: no protocol yet; ...
    """
    folds = run.protocol.folds
    if not folds:
        return [run]
    found: list[Workspace] = [
        FoldSpace(run, repeat, fold) for repeat in range(folds["repeats"]) for fold in range(folds["k"])
    ]
    return [*found, FoldSpace(run, folds["repeats"], -1)] if folds["n_frozen"] else found
