"""Searches over invented numbers, for tests of `mrl tune`: a planted surface in place of models."""

import hashlib
import sys
import time
from dataclasses import dataclass, field

import numpy as np

from mrl.errors import ConfigError
from mrl.fit_config import FitConfig
from mrl.swap import CalibrateConfig, SwapConfig
from mrl.tuning import Goal, Settings, parse_space
from mrl.tuning.alive import Beats, signs_of_life
from mrl.tuning.search import Search
from mrl.tuning.storage import open_storage

REGIONS = (1, 2, 4, 8)
LAYERS = ("all", "last3", "first3", (0, 2, 4), (1, 3, 5), (2, 3), (0, 5), "last1")
SPACE = {"region": list(REGIONS), "layers": list(LAYERS)}


def surface(seed, interaction=0.01, gap=0.02):
    """(4, 8) accuracies: an effect of each region and layer set (2 points), a part of each pair, the best `gap` above all."""
    rng = np.random.default_rng([seed, 1])
    table = 0.8 + rng.normal(0, 0.02, (4, 1)) + rng.normal(0, 0.02, (1, 8)) + rng.normal(0, interaction, (4, 8))
    best = np.unravel_index(table.argmax(), table.shape)
    table[best] = max(table[best], np.sort(table.ravel())[-2] + gap)
    return table, (REGIONS[best[0]], LAYERS[best[1]])


@dataclass
class Planted:
    """A judge whose quality is a planted surface with noise; it remembers what it was asked."""

    seed: int = 0
    noise: float = 0.01
    fast: float = 1.0
    pause_s: float = 0.0
    val_per_train: float = 0.2
    asked: list = field(default_factory=list)
    timed: list = field(default_factory=list)

    def __post_init__(self):
        self.table, self.best = surface(self.seed)

    def architecture(self, settings):
        if settings.swap is None:
            return {"original": True}
        if settings.swap.group_size > 8:
            raise ConfigError("group_size=16: 8 channels are not a multiple of 16.")
        return {"region": settings.region, "layers": settings.layers, "reduce": settings.swap.reduce}

    def latency(self, settings, *, careful=False):
        self.timed.append((settings.arm, settings.region, settings.layers, careful))
        ratio = 1.0 if settings.swap is None else self.fast * (1.2 - 0.1 * REGIONS.index(settings.region))
        return {"ratio": ratio, "low": ratio, "high": ratio, "latency_ms_median": 10 * ratio}

    def quality(self, settings, *, seed, fresh=False):
        self.asked.append((settings.arm, settings.region, settings.layers, seed, fresh))
        time.sleep(self.pause_s)
        if settings.fit.lr > 0.1:
            raise ConfigError("mrl: the loss is not finite at update 3; use a lower --lr.")
        text = repr((self.seed, settings.to_dict(), seed, fresh)).encode()
        draw = np.random.default_rng(int.from_bytes(hashlib.sha256(text).digest()[:8], "big"))
        if settings.swap is None:
            return 0.8 + draw.normal(0, self.noise)
        i, j = REGIONS.index(settings.region), LAYERS.index(settings.layers)
        return float(self.table[i, j] + draw.normal(0, self.noise))


def settings_of(values, arm):
    return Settings.of(values, arm, SwapConfig(), FitConfig(), CalibrateConfig())


def planted(folder, judge=None, space=SPACE, storage=None, **goal):
    """A search of a planted surface with a journal in the folder, or another storage."""
    told = {"trials": 25, "mode": "pareto", "seed": 0, **goal}
    if told.get("max_latency_ratio"):
        told["mode"] = "constrained"
    alive, told_storage = Beats(), storage
    if storage is None or isinstance(storage, str):
        storage = open_storage(told_storage, folder)
        alive = signs_of_life(told_storage, folder, beat_s=2, grace_s=20)
    judge, axes = judge or Planted(told["seed"]), parse_space(space)
    identity = {"surface": 1}
    return Search(judge, axes, settings_of, Goal(**told), storage, "planted", identity, alive=alive, poll_s=0.2)


if __name__ == "__main__":  # a worker of its own: python planted.py FOLDER STORAGE TRIALS PAUSE
    from pathlib import Path

    from mrl.run import write_json
    from mrl.tuning.results import tune_document

    folder, storage, trials, pause = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
    search = planted(
        folder, Planted(0, pause_s=pause), storage=None if storage == "-" else storage,
        trials=trials, keep=2, judges=2, max_latency_ratio=2.0,
    )  # fmt: skip
    write_json(folder / f"done-{sys.argv[5]}.json", tune_document(search))
