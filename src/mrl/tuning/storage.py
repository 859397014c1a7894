"""Where trials are kept: a journal file on one machine, a database for many; both find the trials of the dead."""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from mrl.errors import ConfigError, MissingExtra

HEARTBEAT_S, GRACE_S = 30, 120  # a database trial without a beat for so long is dead
RETRIES = 3
DRIVERS = {"postgresql": "postgresql+pg8000", "postgres": "postgresql+pg8000"}


def require_optuna() -> Any:
    """Optuna, quiet.

    Raises:
        MissingExtra: it is not installed.

    Example:
        >>> require_optuna().__name__
        'optuna'
    """
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise MissingExtra("mrl tune: Optuna is not installed; run `pip install mrl[tune]`.") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


@contextlib.contextmanager
def experimental() -> Iterator[None]:
    """Without Optuna's warnings that a part of it is new."""
    optuna = require_optuna()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


def open_storage(storage: str | None, folder: Path, *, heartbeat_s: int = HEARTBEAT_S, grace_s: int = GRACE_S) -> Any:
    """The storage of a search.

    Args:
        storage: None is `journal.log` in the folder; a path is that journal file; a URL is a database of SQLAlchemy's.
            PostgreSQL is spoken to by pg8000; its password may stand in PGPASSWORD instead of the URL.
        folder: of the search.
        heartbeat_s: seconds between the beats of a running trial, in a database.
        grace_s: seconds without a beat after which it is dead.

    Raises:
        ConfigError: a database that cannot be reached, in a sentence without its password.
        MissingExtra: Optuna or the database's driver is not installed.

    Example:
        >>> import tempfile
        >>> type(open_storage(None, Path(tempfile.mkdtemp()))).__name__
        'LockedJournal'
    """
    require_optuna()
    if storage is not None and "://" in storage:
        with experimental():
            return _database(storage, heartbeat_s, grace_s)
    try:
        from mrl.tuning.journal import LockedJournal
    except ModuleNotFoundError as error:
        raise ConfigError(
            "mrl tune: this system has no file locks of its kind; give --storage sqlite:///trials.db."
        ) from error
    return LockedJournal(folder / "journal.log" if storage is None else Path(storage), retry)


def retry(study: Any, dead: Any) -> None:
    """Queues a dead worker's trial again with the same values, up to 3 times; what it noted of itself is forgotten."""
    history = [*dead.system_attrs.get("retry_history", []), dead.number]
    if not dead.params or len(history) > RETRIES:
        return
    trial = require_optuna().trial
    study.add_trial(
        trial.create_trial(
            state=trial.TrialState.WAITING,
            params=dead.params,
            distributions=dead.distributions,
            system_attrs={"failed_trial": history[0], "retry_history": history},
        )
    )


def _database(storage: str, heartbeat_s: int, grace_s: int) -> Any:
    optuna = require_optuna()
    try:
        from sqlalchemy.engine import make_url
        from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError
    except ModuleNotFoundError as error:
        raise MissingExtra("--storage: SQLAlchemy is not installed; run `pip install mrl[tune]`.") from error
    try:
        url = make_url(storage)
    except ArgumentError as error:
        raise ConfigError(
            "--storage: not a URL of a database; give one such as postgresql://user@host/database, or a path of a journal file."
        ) from error
    url = url.set(drivername=DRIVERS.get(url.drivername, url.drivername))
    if url.password is None and url.username and os.environ.get("PGPASSWORD") and url.drivername.startswith("postgres"):
        url = url.set(password=os.environ["PGPASSWORD"])
    shown = url.render_as_string(hide_password=True)
    try:
        return optuna.storages.RDBStorage(
            url.render_as_string(hide_password=False),
            engine_kwargs={"pool_pre_ping": True},
            heartbeat_interval=heartbeat_s,
            grace_period=grace_s,
            heartbeat_stale_trial_callback=retry,
        )
    except (ImportError, NoSuchModuleError) as error:
        raise MissingExtra(
            f"--storage {shown}: its driver is not installed ({_first_line(error)}); run `pip install mrl[tune]`, which "
            "brings pg8000 for PostgreSQL."
        ) from error
    except (SQLAlchemyError, OSError) as error:
        raise ConfigError(
            f"--storage {shown}: the database cannot be used ({_first_line(error)}); check that it runs and that the user may create tables."
        ) from error


def close_storage(storage: Any) -> None:
    """Closes the connections of a database; a journal has none.

    Example:
        >>> import tempfile
        >>> close_storage(open_storage(None, Path(tempfile.mkdtemp())))
    """
    engine = getattr(storage, "engine", None)
    if engine is not None:
        storage.remove_session()
        engine.dispose()


def reap(study: Any, grace_s: int = GRACE_S) -> None:
    """Fails the running trials of dead workers, and queues each again, up to 3 times.

    Besides those without a heartbeat: a worker that died between taking a trial and its first beat leaves a trial that
    never said it started.

    Args:
        study: of Optuna.
        grace_s: seconds that a trial may take to say that it started.
    """
    optuna = require_optuna()
    with experimental():
        optuna.storages.fail_stale_trials(study)
        running = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,))
        late = datetime.now() - timedelta(seconds=grace_s)
        for trial in running:
            if "started" not in trial.user_attrs and trial.datetime_start is not None and trial.datetime_start < late:
                with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
                    study.tell(trial.number, state=optuna.trial.TrialState.FAIL)


def _first_line(error: BaseException) -> str:
    """What an error says, without anything that looks like a password in a URL."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return re.sub(r"//[^/@\s]*@", "//***@", text)[:200]
