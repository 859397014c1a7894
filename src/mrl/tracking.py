"""The rows of a fit: JSON lines always, and a copy of them in MLflow or TensorBoard through accelerate."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mrl.errors import ConfigError, MissingExtra
from mrl.run import plain, writing

METRICS = "metrics.jsonl"
KINDS = ("none", "mlflow", "tensorboard")
SHOWN = ("loss", "lr", "images_seen", "val_loss", "val_score", "train_score")
FIT_TAG = "mrl.fit"


@dataclass(frozen=True)
class Tracking:
    """Where the rows of a fit are copied to; the numbers of the fit do not depend on it.

    Args:
        kind: none, mlflow or tensorboard.
        folder: of `mlflow.db`, which all fits of a run share; None is the folder of the fit. TensorBoard's files are always in
            `tensorboard/` there, which its `--logdir` finds from any folder above.
        name: of the fit among others, such as r0f3/mrl.

    Raises:
        ConfigError: an unknown kind.
        MissingExtra: it is not installed.

    Example:
        >>> Tracking("wandb")
        Traceback (most recent call last):
        mrl.errors.ConfigError: --tracker wandb: unknown; use none, mlflow or tensorboard.
    """

    kind: str = "none"
    folder: Path | None = None
    name: str = "fit"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"--tracker {self.kind}: unknown; use none, mlflow or tensorboard.")
        needed = {"mlflow": ("mlflow", "sqlalchemy", "alembic"), "tensorboard": ("tensorboard",)}.get(self.kind, ())
        absent = [name for name in needed if importlib.util.find_spec(name) is None]
        if absent:
            raise MissingExtra(
                f"--tracker {self.kind}: {', '.join(absent)} is not installed; run `pip install mrl[{self.kind}]`."
            )

    def accelerator(self, out: Path) -> dict[str, Any]:
        """What accelerate's `Accelerator` is told of it."""
        return {} if self.kind == "none" else {"log_with": self.kind, "project_dir": str(out)}


class Track:
    """The rows of one fit.

    Args:
        out: folder of the fit, which gets `metrics.jsonl`.
        tracking: where they are copied to.
        accelerator: made with `tracking.accelerator(out)`.
    """

    def __init__(self, out: Path, tracking: Tracking, accelerator: Any) -> None:
        self.path, self.tracking, self.accelerator = out / METRICS, tracking, accelerator
        self.copies = False

    def begin(self, update: int, config: Mapping[str, Any]) -> None:
        """Keeps the rows up to an update and drops those after it; the copy is made anew, so that no row is in it twice.

        Args:
            update: of the checkpoint; -1 keeps nothing.
            config: of the fit, for the tracker.
        """
        truncate(self.path, update)
        if self.tracking.kind == "none":
            return
        with _quiet():
            if self.tracking.kind == "mlflow":
                self._begin_mlflow(config)
            else:
                self._begin_tensorboard(config)
        self.copies = True
        if self.path.is_file():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                self._copy(json.loads(line))

    def log(self, line: Mapping[str, Any]) -> None:
        """Adds one row."""
        line = plain(line)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self.copies:
            self._copy(line)

    def close(self) -> None:
        """Closes the copy."""
        if self.copies:
            self.copies = False
            with _quiet():
                for tracker in self.accelerator.trackers:
                    tracker.finish()

    def _copy(self, line: Mapping[str, Any]) -> None:
        values = {k: line[k] for k in SHOWN if line.get(k) is not None}
        self.accelerator.log(values, step=line["update"])

    def _begin_tensorboard(self, config: Mapping[str, Any]) -> None:
        folder = self.path.parent / "tensorboard"
        shutil.rmtree(folder, ignore_errors=True)
        self.accelerator.init_trackers(folder.name)
        writer = self.accelerator.get_tracker("tensorboard", unwrap=True)
        writer.add_text("config", "\n".join(f"    {k}: {v}" for k, v in config.items()))

    def _begin_mlflow(self, config: Mapping[str, Any]) -> None:
        os.environ.update(MLFLOW_DISABLE_TELEMETRY="true", DO_NOT_TRACK="true")
        import mlflow

        folder, name = (self.tracking.folder or self.path.parent).resolve(), self.tracking.name
        with _one_at_a_time(folder / ".mlflow.lock"):
            mlflow.set_tracking_uri(f"sqlite:///{(folder / 'mlflow.db').as_posix()}")
            for experiment in mlflow.search_experiments(filter_string="name = 'mrl'"):
                told = {"filter_string": f"tags.`{FIT_TAG}` = '{name}'", "output_format": "list"}
                for run in mlflow.search_runs([experiment.experiment_id], **told):
                    mlflow.delete_run(run.info.run_id)
            tags = {FIT_TAG: name, "mlflow.user": "", "mlflow.source.name": "mrl"}
            about = {"run_name": name, "nested_run": True, "tags": tags, "logging_dir": str(folder / "mlflow")}
            self.accelerator.init_trackers("mrl", config=dict(config), init_kwargs={"mlflow": about})


def truncate(path: Path, update: int) -> None:
    """Drops the lines after an update, and a line that a killed process left unfinished."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n") or json.loads(line)["update"] > update:
            break
        kept.append(line)
    with writing(path) as part:
        part.write_text("".join(kept), encoding="utf-8")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the deprecations of other packages among themselves, and without MLflow's words about its tables."""
    import logging

    quiet = [logging.getLogger(name) for name in ("mlflow", "alembic")]
    levels = [logger.level for logger in quiet]
    for logger in quiet:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(quiet, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Holds a lock of the system on a file, where the system has them: only one process makes the tables."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ModuleNotFoundError:
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
