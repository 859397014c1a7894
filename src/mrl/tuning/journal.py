"""A journal file whose running trials hold a file lock, so that what a dead process left behind is known at once."""

from __future__ import annotations

import fcntl
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from optuna.storages import JournalStorage
from optuna.storages._heartbeat import BaseHeartbeat
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

INTERVAL = 10  # seconds between looks of Optuna's heartbeat thread; the lock itself needs no beat


class LockedJournal(JournalStorage, BaseHeartbeat):
    """Optuna's journal in a file, with a heartbeat: the lock that a process holds on a file of each trial it runs.

    The system lets go of the lock when the process ends, however it ends, so nobody waits for a grace period, and a
    process that was only stopped or suspended is never taken for dead. For workers on one machine.

    Args:
        path: the journal; a folder beside it, `<path>.alive`, holds the lock files.
        stale: what Optuna calls with the study and every dead trial, after it failed it.

    Example:
        >>> import optuna, tempfile
        >>> journal = LockedJournal(Path(tempfile.mkdtemp()) / "journal.log")
        >>> study = optuna.create_study(storage=journal)
        >>> study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
        >>> [trial.state.name for trial in study.trials]
        ['COMPLETE', 'COMPLETE']
    """

    def __init__(self, path: Path, stale: Callable[[Any, FrozenTrial], None] | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._alive = path.with_name(path.name + ".alive")
        self._alive.mkdir(exist_ok=True)
        self._held: dict[int, TextIO] = {}
        self._stale = stale
        super().__init__(JournalFileBackend(str(path)))

    def record_heartbeat(self, trial_id: int) -> None:
        """Takes the trial's lock, if this process does not hold it yet."""
        if trial_id in self._held:
            return
        path = self._alive / str(trial_id)
        unlocked = path.with_suffix(f".{uuid.uuid4().hex}")
        file = unlocked.open("w")
        fcntl.flock(file, fcntl.LOCK_EX)
        unlocked.replace(path)  # it gets its name when it is locked, so nobody ever sees it free while we live
        self._held[trial_id] = file

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        """As Optuna's; a trial that is finished lets go of its lock."""
        done = super().set_trial_state_values(trial_id, state, values)
        if state.is_finished():
            file = self._held.pop(trial_id, None)
            (self._alive / str(trial_id)).unlink(missing_ok=True)
            if file is not None:
                file.close()
        return done

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        running = self.get_all_trials(study_id, deepcopy=False, states=(TrialState.RUNNING,))
        return [trial._trial_id for trial in running if self._dead(trial._trial_id)]

    def _dead(self, trial_id: int) -> bool:
        """Whether the trial's lock file is there and nobody holds it."""
        try:
            with (self._alive / str(trial_id)).open("r") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return trial_id not in self._held
        except (FileNotFoundError, BlockingIOError):
            return False

    def get_heartbeat_interval(self) -> int:
        """Seconds between two calls of `record_heartbeat`."""
        return INTERVAL

    def get_heartbeat_stale_trial_callback(self) -> Callable[[Any, FrozenTrial], None] | None:
        """What is called for a dead trial."""
        return self._stale
