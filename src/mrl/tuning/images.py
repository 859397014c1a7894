"""The judge of real models: the training side of a run, and nothing of its test side."""

from __future__ import annotations

import copy
import dataclasses
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mrl.checkpoint import drop_checkpoint
from mrl.data import ImageSet, make_loader
from mrl.data.holdout import Unit, hold_out
from mrl.data.split import split_units
from mrl.errors import ConfigError
from mrl.fit import fit
from mrl.measure import BACKENDS, POOL, Bench, Row
from mrl.models import Classifier, build_model
from mrl.optimizer import freeze_
from mrl.run import read_json, write_json
from mrl.swap import Handle, Plan, calibrate, load, plan, save, swap_
from mrl.tuning.settings import Settings, architecture_of, digest
from mrl.workspace import Workspace

BLOCKS, CAREFUL_BLOCKS = 30, 60


class TrainingSide:
    """Builds, measures and fits the settings of trials on the training side of a run.

    The images are those of `train` and `val` in `split.csv`, taken once; a trial has no way to the test side. A trial of the
    search fits on `train` and is scored on `val`; a fresh judgement divides both again by its seed, groups kept together.

    Args:
        space: a run folder with audit, protocol and split.
        folder: of the search, for what fits leave on the way.
        backend: that latency is measured in: onnxruntime (which decides in `mrl poc`) or eager.
        seconds: about how long one architecture is timed.

    Raises:
        ConfigError: an unknown backend.
    """

    def __init__(self, space: Workspace, folder: Path, backend: str = "onnxruntime", seconds: float = 6.0) -> None:
        if backend not in BACKENDS:
            raise ConfigError(f"--backend {backend}: unknown; use {' or '.join(BACKENDS)}.")
        self.protocol, self.folder, self.backend, self.seconds = space.protocol, folder, backend, seconds
        self.train, self.val = space.image_set("train"), space.image_set("val")
        self.val_per_train = len(self.val) / len(self.train)
        ours = {s.image for side in (self.train, self.val) for s in side.samples}
        keys = split_units(space.audit, group_near=bool(self.protocol.data["group_near"]))
        self.units = {image: unit for image, unit in keys.items() if image in ours}
        self.new_classifier = space.new_classifier
        backbone = build_model(self.protocol.model, None, image_size=self.protocol.image_size)
        self.skeleton = Classifier(backbone, len(self.train.classes)).eval()
        self._session: Any = None

    @property
    def names(self) -> list[str]:
        """The modules that can be swapped, in the model's order."""
        return plan(self.skeleton).names

    def architecture(self, settings: Settings) -> dict[str, Any]:
        """Which modules with which regions and how they compute; what cannot be is refused here, before any work.

        Raises:
            SwapError: no such layers or regions, or channels that do not divide.
            ConfigError: more frozen blocks than there are.
        """
        model = copy.deepcopy(self.skeleton)
        freeze_(model, [[name for name, _ in group] for group in model.layer_groups()], settings.fit.freeze)
        if settings.swap is None:
            return {"original": True}
        handle = self._swapped(model, settings)
        return architecture_of(handle.plan.rows, handle.plan.config)

    def latency(self, settings: Settings, *, careful: bool = False) -> dict[str, Any]:
        """Time of one image beside the baseline's, interleaved, on real training images; weights do not matter.

        Args:
            settings: of the trial; the baseline's own is 1 by definition, and its milliseconds are measured.
            careful: twice the blocks and the time, for what is reported.
        """
        models: dict[str, nn.Module] = {"baseline": self.skeleton}
        if settings.swap is not None:
            models["mrl"] = self._swapped(copy.deepcopy(self.skeleton), settings).model
        picks = np.unique(np.linspace(0, len(self.train) - 1, POOL).astype(int))
        pool = torch.stack([self.train[int(i)]["image"] for i in picks])
        size, blocks = tuple(self.protocol.image_size), CAREFUL_BLOCKS if careful else BLOCKS
        row = Row(self.backend, 1, size, self.seconds * (2 if careful else 1), min_blocks=blocks, decides=True)
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(models, size, pool, Path(folder), self.protocol.seed)
            if self._session is not None:
                bench.sessions["baseline"] = self._session
            found = bench.measure(row)
            self._session = bench.sessions.get("baseline")
        ratio = found["ratio"] or {"estimate": 1.0, "low": 1.0, "high": 1.0}
        arm = found["arms"][settings.arm]
        return {
            "ratio": ratio["estimate"],
            "low": ratio["low"],
            "high": ratio["high"],
            "latency_ms_median": arm["latency_ms_median"],
            **{name: found[name] for name in ("backend", "batch", "threads", "n_blocks")},
        }

    def quality(self, settings: Settings, *, seed: int, fresh: bool = False) -> float:
        """The best score on the inner validation side; an interrupted fit of the same trial goes on where it stopped."""
        key = digest({"settings": settings.to_dict(), "seed": seed, "fresh": fresh})
        folder = self.folder / "trials" / key
        if (folder / "result.json").is_file():
            return read_json(folder / "result.json")["score"]
        train, val = self._sides(seed) if fresh else (self.train, self.val)
        model = self._start(settings, train, seed, fresh, folder)
        facts = {"seed": seed, "arm": settings.arm, "metric": self.protocol.metric}
        result = fit(model, train, val, settings.fit, folder, **facts)
        record = {"score": result.best_score, "best_update": result.best_update, "updates": result.updates}
        sides = {"linear_probe": result.linear_probe_val, "n_train": len(train), "n_val": len(val)}
        write_json(folder / "result.json", {**record, **sides, **facts, "settings": settings.to_dict()})
        for name in ("best.safetensors", "start.safetensors"):
            (folder / name).unlink(missing_ok=True)
        return result.best_score

    def clear(self) -> None:
        """Removes the calibrated models that trials shared."""
        shutil.rmtree(self.folder / "starts", ignore_errors=True)

    def _sides(self, seed: int) -> tuple[ImageSet, ImageSet]:
        """The training side divided again, in the same shares, by a seed."""
        samples = [*self.train.samples, *self.val.samples]
        classes = {name: i for i, name in enumerate(self.train.classes)}
        together: dict[str, list[Any]] = defaultdict(list)
        for sample in sorted(samples, key=lambda s: s.image):
            together[self.units[sample.image]].append(sample)
        units = []
        for members in together.values():
            counts = np.bincount([classes[s.label] for s in members], minlength=len(classes)).tolist()
            units.append(Unit(tuple(s.image for s in members), tuple(counts), tuple(classes)))
        share = len(self.val) / len(samples)
        rng = np.random.default_rng([seed, 0x7E57])
        drawn = hold_out(units, share, rng, leave=1, sides="training and inner validation")
        held = {image for unit in drawn for image in unit.images}
        return self._set(s for s in samples if s.image not in held), self._set(s for s in samples if s.image in held)

    def _set(self, samples: Iterable[Any]) -> ImageSet:
        ordered = sorted(samples, key=lambda s: s.image)
        return ImageSet(ordered, self.train.classes, self.train.preprocess, cache=self.train.cache)

    def _start(self, settings: Settings, train: ImageSet, seed: int, fresh: bool, folder: Path) -> nn.Module:
        """The model before its fit: the user's own, or swapped and calibrated; trials that share it share a file."""
        if settings.swap is None:
            return self.new_classifier()
        told = {k: v for k, v in settings.to_dict().items() if k != "fit"}
        kept = self.folder / "starts" / digest({"start": told, "seed": seed, "fresh": fresh})
        if not (kept / "model.json").is_file():
            handle = self._swapped(self.new_classifier().eval(), settings)
            config = dataclasses.replace(settings.calibration, seed=seed)
            unfinished = folder / "calibration"
            calibrate(handle, make_loader(train, 64, shuffle_seed=seed), config=config, checkpoint=unfinished)
            save(handle.model, kept, overwrite=True)
            drop_checkpoint(unfinished)
        return load(kept)

    def _swapped(self, model: nn.Module, settings: Settings) -> Handle:
        return swap_(model, self._plan(model, settings))

    def _plan(self, model: nn.Module, settings: Settings) -> Plan:
        if not settings.layers:
            raise ConfigError("tune space: no layer is swapped in this trial; one or more are needed.")
        names = self.names
        chosen = {"target": names, "layers": settings.layer_indices(len(names))}
        return plan(model, region=settings.regions_of(names), config=settings.swap, **chosen)
