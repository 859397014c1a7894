"""The loop of a fit in which nothing is chosen any more: so many updates, no validation."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from torch import nn

from mrl import fit_loop
from mrl.checkpoint import snapshot
from mrl.data.loading import ImageSet
from mrl.fit_config import FitConfig, FitResult, planned_updates
from mrl.fit_loop import Loop
from mrl.ranks import share
from mrl.run import progress, say
from mrl.tracking import Tracking


def stop_of(best_update: int, n_inner: int, config: FitConfig, n_train: int, inner: FitConfig | None = None) -> int:
    """The update at which a fit on all training images stands where one on the inner ones stood at `best_update`.

    The same share of the schedule: where `min_updates` does not lengthen it, the same number of epochs.

    Args:
        best_update: of the candidate that the inner fit kept; 0 is the starting head.
        n_inner: its training images.
        config: the budget of both.
        n_train: training images now.
        inner: the budget of the inner fit, where its `min_updates` was another.

    Example:
        >>> stop_of(0, 1000, FitConfig(), 1200), stop_of(60, 1000, FitConfig(), 1200)
        (0, 60)
    """
    if best_update == 0:
        return 0
    return max(1, round(best_update / planned_updates(inner or config, n_inner) * planned_updates(config, n_train)))


class FixedLoop(Loop):
    """A fit up to a fixed update of its schedule.

    Args:
        model: a `Classifier`, trained in place.
        train: the whole training side.
        chosen: the inner fit's record.
        config: the budget.
        out: folder of the fit.
        identity: what a checkpoint must agree with.
        features: file with the features of the starting head.
        tracking: where the rows of `metrics.jsonl` are copied to.
    """

    def __init__(
        self,
        model: nn.Module,
        train: ImageSet,
        chosen: FitResult,
        config: FitConfig,
        out: Path,
        identity: dict[str, Any],
        features: Path | None,
        tracking: Tracking = Tracking(),  # noqa: B008
    ) -> None:
        super().__init__(model, train, None, config, out, identity, features, tracking)
        self.chosen = chosen
        self.stop = stop_of(chosen.best_update, chosen.n_train, config, len(train), FitConfig(**chosen.config))

    def begin(self) -> None:
        """Continues from the checkpoint, or sets the starting head at the strength that was chosen."""
        if self._restored():
            say(f"{self.arm}: goes on after update {self.update} of {self.stop}")
            return
        if self.config.start == "probe":
            side = self._features(self.plain_train)
            if self.accelerator.is_main_process:
                self.task.start(self.model, side, side, strengths=(self.chosen.probe_strength,))
            self.probe_strength = self.chosen.probe_strength
        self._started()

    def run(self) -> None:
        """The updates up to the fixed one, with a checkpoint every half minute."""
        saved = time.monotonic()
        if self.update < self.stop:
            with progress(f"{self.arm}: fit on all training images", self.stop) as advance:
                advance(self.update)
                for batch in self._batches():
                    self._step(batch)
                    self.seen = {k: [] for k in self.seen}
                    if share(time.monotonic() - saved > fit_loop.CHECKPOINT_SECONDS):
                        self._save()
                        saved = time.monotonic()
                    advance(1)
                    if self.update >= self.stop:
                        break
        self.best = snapshot(self.model if self.ema is None or self.stop == 0 else self.ema.module)

    def _result(self, meta: dict[str, Any]) -> FitResult:
        inner = self.chosen
        chose = {k: getattr(inner, k) for k in ("best_update", "updates", "n_train", "n_val", "seconds")}
        return dataclasses.replace(
            inner,
            updates=self.update,
            epochs=self.update / self.per_epoch,
            best_update=self.update,
            seconds=inner.seconds + self._clock(),
            images_seen=inner.images_seen + self._images_seen(),
            n_train=len(self.train),
            n_val=0,
            probe_strength=self.probe_strength,
            meta={**meta, "inner": chose},
        )
