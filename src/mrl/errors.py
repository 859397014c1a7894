"""The errors of `mrl`: every message says who, what it got, what is allowed, and what to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class MrlError(Exception):
    """Base of every error that a user can mend; the command line prints it as one sentence.

    Example:
        >>> issubclass(ConfigError, MrlError)
        True
    """


class ConfigError(MrlError, ValueError):
    """A wrong argument, flag or combination of them."""


class DataError(MrlError):
    """Images, labels or a split that cannot be used as they are."""


class SwapError(MrlError):
    """Surgery that cannot be done, or would not be the same model."""


class ParityError(MrlError):
    """An exported file that is not equal to the model it came from.

    Args:
        message: the sentence.
        facts: what was measured, where a lower precision was refused: drop, flips, and every layer with what it changes.
    """

    def __init__(self, message: str, facts: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.facts = dict(facts or {})


class MissingExtra(MrlError, ImportError):
    """An optional dependency that is not installed."""
