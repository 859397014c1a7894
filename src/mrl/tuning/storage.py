"""Where trials are kept: a journal file on one machine, a database for many."""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mrl.errors import ConfigError, MissingExtra

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


def open_storage(storage: str | None, folder: Path) -> Any:
    """The storage of a search.

    Args:
        storage: None is `journal.log` in the folder; a path is that journal file; a URL is a database of SQLAlchemy's.
            PostgreSQL is spoken to by pg8000; its password may stand in PGPASSWORD instead of the URL.
        folder: of the search.

    Raises:
        ConfigError: a database that cannot be reached, in a sentence without its password.
        MissingExtra: Optuna or the database's driver is not installed.

    Example:
        >>> import tempfile
        >>> type(open_storage(None, Path(tempfile.mkdtemp()))).__name__
        'JournalStorage'
    """
    optuna = require_optuna()
    if storage is not None and "://" in storage:
        return _database(storage)
    path = folder / "journal.log" if storage is None else Path(storage)
    path.parent.mkdir(parents=True, exist_ok=True)
    return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))


def _database(storage: str) -> Any:
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
        shown_to_nobody = url.render_as_string(hide_password=False)
        return optuna.storages.RDBStorage(shown_to_nobody, engine_kwargs={"pool_pre_ping": True})
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


def _first_line(error: BaseException) -> str:
    """What an error says, without anything that looks like a password in a URL."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return re.sub(r"//[^/@\s]*@", "//***@", text)[:200]
