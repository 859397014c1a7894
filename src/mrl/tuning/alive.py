"""Which running trials are alive: signs that a worker gives while it has a trial, and the watch of the others for them."""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from mrl.tuning.settings import digest

try:
    import fcntl
except ModuleNotFoundError:  # not on this system: beats then
    fcntl = None

BEAT = "beat"
BEAT_S, GRACE_S = 30.0, 120.0


class Beats:
    """A count in the trial's own attributes, raised by a thread while the trial runs; for any storage and any machine.

    A trial is dead when its count stood still for `grace_s` seconds of the watcher's own clock, so clocks of machines need
    not agree, and a worker that died before its first beat is found alike.

    Args:
        beat_s: seconds between two beats.
        grace_s: seconds without one after which a trial is dead.

    Example:
        >>> beats, study = Beats(grace_s=0.005), optuna.create_study()
        >>> trial = study.ask()
        >>> with beats.running(study, trial):
        ...     beats.dead(study, study.get_trials())
        []
        >>> beats.dead(study, study.get_trials())  # the last beat is new to this watcher
        []
        >>> time.sleep(0.01)
        >>> [t.number for t in beats.dead(study, study.get_trials())]
        [0]
    """

    def __init__(self, beat_s: float = BEAT_S, grace_s: float = GRACE_S) -> None:
        self.beat_s, self.grace_s = beat_s, grace_s
        self._seen: dict[tuple[str, int], tuple[Any, float]] = {}
        self._mine: set[tuple[str, int]] = set()

    @contextlib.contextmanager
    def running(self, study: optuna.Study, trial: Trial) -> Iterator[None]:
        """Gives signs of life for a trial of this worker."""
        ours, stop = (study.study_name, trial.number), threading.Event()
        thread = threading.Thread(target=self._beat, args=(trial, stop), daemon=True)
        self._mine.add(ours)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            self._mine.discard(ours)

    def dead(self, study: optuna.Study, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """The running trials whose workers are gone, as far as this watcher has seen."""
        return [trial for trial in trials if trial.state == TrialState.RUNNING and self._still(study, trial)]

    def _beat(self, trial: Trial, stop: threading.Event) -> None:
        count = 0
        while True:
            with contextlib.suppress(optuna.exceptions.StorageInternalError):  # the next beat may get through
                try:
                    trial.set_user_attr(BEAT, count)
                except optuna.exceptions.UpdateFinishedTrialError:  # taken for dead, or told a moment ago
                    break
            if stop.wait(self.beat_s):
                break
            count += 1
        trial.storage.remove_session()

    def _still(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        key, sign, now = (study.study_name, trial.number), trial.user_attrs.get(BEAT), time.monotonic()
        if key in self._mine:
            return False
        if key not in self._seen or self._seen[key][0] != sign:
            self._seen[key] = (sign, now)
        return now - self._seen[key][1] > self.grace_s


class Locks(Beats):
    """A lock on a file of each running trial, for workers on one machine.

    The system lets go of the lock when the process ends, however it ends, so the dead are known at once, and a worker that
    is only stopped or suspended is never taken for dead. Only one that died between taking a trial and its lock is found by
    the time that passes.

    Args:
        folder: of the lock files.
        grace_s: seconds that a worker may take to lock a trial that it took.

    Example:
        >>> import tempfile
        >>> locks, study = Locks(Path(tempfile.mkdtemp())), optuna.create_study()
        >>> trial = study.ask()
        >>> with locks.running(study, trial):
        ...     locks.dead(study, study.get_trials())
        []
    """

    def __init__(self, folder: Path, grace_s: float = GRACE_S) -> None:
        super().__init__(grace_s=grace_s)
        self.folder = folder

    @contextlib.contextmanager
    def running(self, study: optuna.Study, trial: Trial) -> Iterator[None]:
        """Holds the trial's lock."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(study, trial)
        unlocked = path.with_suffix(f".{uuid.uuid4().hex}")
        with unlocked.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            unlocked.replace(path)  # it gets its name when it is locked, so nobody ever sees it free while we live
            try:
                yield
            finally:
                path.unlink(missing_ok=True)

    def _still(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        try:
            with self._path(study, trial).open("r") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return True
        except FileNotFoundError:
            return super()._still(study, trial)
        except BlockingIOError:
            return False

    def _path(self, study: optuna.Study, trial: Trial | FrozenTrial) -> Path:
        """Of this trial alone: a study that was deleted and made again counts from 0 again."""
        return self.folder / digest([study.study_name, trial.number, str(trial.datetime_start)])


def signs_of_life(storage: str | None, folder: Path, *, beat_s: float | None = None, grace_s: float = GRACE_S) -> Beats:
    """What workers of a storage give and watch: locks beside a journal file, beats in a database.

    Args:
        storage: as `open_storage` takes it.
        folder: of the search.
        beat_s: seconds between two beats; None is 30, or a quarter of a shorter `grace_s`.
        grace_s: seconds without one after which a trial is dead.

    Example:
        >>> type(signs_of_life("postgresql://host/name", Path("run"))).__name__
        'Beats'
    """
    if fcntl is None or (storage is not None and "://" in storage):
        return Beats(min(BEAT_S, grace_s / 4) if beat_s is None else beat_s, grace_s)
    journal = folder / "journal.log" if storage is None else Path(storage)
    return Locks(journal.with_name(journal.name + ".alive"), grace_s)
