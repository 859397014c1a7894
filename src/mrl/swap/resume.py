"""A calibration that was killed goes on where it stopped."""

from __future__ import annotations

import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mrl.checkpoint import load_checkpoint, save_checkpoint
from mrl.errors import ConfigError
from mrl.run import plain
from mrl.swap.calibration import CalibrateConfig, StageReport

SAVE_SECONDS = 60.0


class Resume:
    """The checkpoint of one calibration, or nothing to write to.

    Args:
        folder: where the state is kept; None keeps none.
        facts: what has to be the same for the state to be used (`facts_of`).

    Raises:
        ConfigError: the folder holds the state of another calibration, or a damaged one.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> first = Resume(folder, {"seed": 0})
        >>> first.save({"now": {"w": torch.ones(1)}}, [], {"stage": "layers", "update": 3})
        >>> Resume(folder, {"seed": 0}).inside
        {'stage': 'layers', 'update': 3}
    """

    def __init__(self, folder: Path | str | None, facts: dict[str, Any]) -> None:
        self.folder, self.facts = folder, plain(facts)
        self.tensors: dict[str, dict[str, Tensor]] = {}
        self.reports: list[StageReport] = []
        self.inside: dict[str, Any] | None = None
        self._last = time.monotonic()
        found = load_checkpoint(folder) if folder is not None else None
        if found is None:
            return
        self.tensors, state = found
        different = [k for k, v in self.facts.items() if state["facts"].get(k) != v]
        if different:
            raise ConfigError(
                f"{folder}: the state of another calibration is there ({', '.join(different)} differ); "
                "delete that folder, or give another one."
            )
        self.reports = [StageReport(**report) for report in state["reports"]]
        self.inside = state["inside"]

    def due(self) -> bool:
        """Whether it is time to write again."""
        return self.folder is not None and time.monotonic() - self._last >= SAVE_SECONDS

    def save(
        self,
        tensors: Mapping[str, Mapping[str, Tensor]],
        reports: Sequence[StageReport],
        inside: dict[str, Any] | None = None,
    ) -> None:
        """Writes the state: what is done, and how far the stage at hand is."""
        if self.folder is not None:
            state = {"facts": self.facts, "reports": [asdict(r) for r in reports], "inside": inside}
            save_checkpoint(self.folder, tensors, state)
            self._last = time.monotonic()


def facts_of(names: Sequence[str], stages: Sequence[str], config: CalibrateConfig, images: Tensor) -> dict[str, Any]:
    """What tells one calibration from another: its mixers, stages and settings, and a checksum of its images.

    Example:
        >>> facts_of(["a"], ["stats"], CalibrateConfig(), torch.zeros(1, 3, 2, 2))["images"]
        'float32 [1, 3, 2, 2] crc f288b395'
    """
    crc = zlib.crc32(images.contiguous().view(torch.uint8).numpy()) if len(images) else 0
    shown = f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)} crc {crc:08x}"
    return {"mixers": list(names), "stages": list(stages), "config": asdict(config), "images": shown}
