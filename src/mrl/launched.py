"""A command under `torchrun` or `accelerate launch`: the first process runs it, the others make its fits with it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from mrl import steps
from mrl.curve import space_named
from mrl.errors import ConfigError, MrlError
from mrl.ranks import gives_up, join_launch, leave_launch, share
from mrl.run import leads, world
from mrl.workspace import Workspace

ALLOWED = ("fit", "curve", "poc")


def run_launched(name: str, function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Runs a command in the first process of a launch; alone it just runs it.

    Args:
        name: of the command.
        function: of the command.
        arguments: among them `out`, a folder that all processes see.

    Raises:
        ConfigError: a command that has no fit to share.

    Example:
        >>> run_launched("models", print, {"sep": " "})
        <BLANKLINE>
    """
    if world() == 1:
        function(**arguments)
        return
    if name not in ALLOWED:
        raise ConfigError(
            f"{world()} processes were started, and only `mrl fit`, `mrl curve` and `mrl poc` can share their work; start it without "
            "torchrun or accelerate launch."
        )
    join_launch()
    if not leads():
        assist(arguments["out"])
    else:
        wrong = contextlib.nullcontext()
        try:
            function(**arguments)
        except BaseException as error:  # the others may be in an update, which waits for this one
            wrong = gives_up(f"{error}")
            raise
        finally:
            with wrong, contextlib.suppress(RuntimeError):  # the others may be gone
                share(None)
    leave_launch()


def assist(out: str) -> None:
    """Takes part in the fits that the first process asks for, until it asks for no more."""
    asked = share()
    while asked is not None:
        run, wrong = Workspace(out), contextlib.nullcontext()
        run.tracker = asked["tracker"]
        try:
            steps.train_step(space_named(run, asked["fold"]), asked["arm"])
        except MrlError as error:  # the first process meets and tells it too, or waits for this one for ever
            wrong = gives_up(f"{error}")
        with wrong:
            asked = share()
