"""The names that a search space knows, and values of the right type for each."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Mapping
from types import NoneType
from typing import Any

from mrl.data import make_augment
from mrl.errors import ConfigError, MrlError
from mrl.fit_config import FitConfig
from mrl.swap import SETTINGS, CalibrateConfig, SwapConfig

PLAN = ("region", "layers", "swap")
NOT_TUNED = {
    "keep_original": "it is the surgery's business",
    "on_unsupported": "it is the surgery's business",
    "seed": "fresh seeds judge the best few; choosing one would be luck",
    "use_confidence": "it says what the labels are worth, which is a fact of the data",
}
BUDGET = ("epochs", "min_updates", "batch_size", "patience", "validations")
"""Fields of the fit that both arms should share: tuning them gives the arms different budgets."""


@functools.cache
def known_fields() -> Mapping[str, tuple[str, Any]]:
    """Every tunable name: (part, annotation), part being "swap", "fit" or "calibration".

    Example:
        >>> known_fields()["lr"], known_fields()["group_size"]
        (('fit', <class 'float'>), ('swap', <class 'int'>))
    """
    found: dict[str, tuple[str, Any]] = {}
    for part, owner, prefix in (
        ("swap", SwapConfig, ""),
        ("fit", FitConfig, ""),
        ("calibration", CalibrateConfig, "calibration."),
    ):
        hints = typing.get_type_hints(owner)
        names = (f.name for f in dataclasses.fields(owner) if f.name not in NOT_TUNED)
        found |= {prefix + name: (part, hints[name]) for name in names}
    return found


def part_of(name: str) -> str:
    """Where a name belongs: "plan", "swap", "fit" or "calibration".

    Raises:
        ConfigError: an unknown name, with those that are near or why it cannot be tuned.

    Example:
        >>> part_of("region.blocks.0"), part_of("weight_decay")
        ('plan', 'fit')
    """
    if name in PLAN or name.startswith("region."):
        return "plan"
    if name in known_fields():
        return known_fields()[name][0]
    bare = name.removeprefix("calibration.")
    if bare in NOT_TUNED:
        raise ConfigError(f"tune space: {name} cannot be tuned, because {NOT_TUNED[bare]}; leave it out.")
    import difflib

    every = [*PLAN, "region.PART", *known_fields()]
    near = difflib.get_close_matches(name, every, n=3, cutoff=0.5) or every
    raise ConfigError(f"tune space: {name!r} is not a field that can be tuned; use {', '.join(near)}.")


def typed(name: str, value: Any) -> Any:
    """The value of a field from YAML or the command line, in the field's own type, checked by the field's owner.

    Raises:
        ConfigError: a value of another type, or one that the field does not allow.

    Example:
        >>> typed("lr", "1e-5"), typed("augment", "light"), typed("freeze", "null"), typed("region", "2x4")
        (1e-05, 'light', None, (2, 4))
    """
    if part_of(name) == "plan":
        return _planned(name, value)
    part, annotation = known_fields()[name]
    bare = name.removeprefix("calibration.")
    found = _cast(name, value, annotation)
    try:
        if name == "augment":
            make_augment(found)
        {"swap": SwapConfig, "fit": FitConfig, "calibration": CalibrateConfig}[part](**{bare: found})
    except MrlError as error:
        raise ConfigError(f"tune space: {error}") from error
    return found


def is_number(name: str) -> type | None:
    """`int` or `float` where ranges make sense for this field, else None.

    Example:
        >>> is_number("lr"), is_number("augment"), is_number("freeze")
        (<class 'float'>, None, <class 'int'>)
    """
    if part_of(name) == "plan":
        return int if name.startswith("region") else None
    kinds = [kind for kind in _kinds(known_fields()[name][1]) if kind in (int, float)]
    return kinds[0] if kinds else None


def _planned(name: str, value: Any) -> Any:
    if name == "swap":
        if value not in SETTINGS:
            raise ConfigError(f"tune space: swap {value!r}: unknown; use {', '.join(SETTINGS)}.")
        return value
    if name == "layers":
        return layers_value(value)
    sides = str(value).split("x") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
    try:
        numbers = tuple(int(side) for side in sides)
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) not in (1, 2) or min(numbers) < 1 or any(isinstance(s, (bool, float)) for s in sides):
        raise ConfigError(f"tune space: {name} {value!r}: use positions from 1, such as 2, or rows x columns as 2x4.")
    return numbers[0] if len(numbers) == 1 else numbers


def layers_value(value: Any) -> str | tuple[int, ...]:
    """A set of layers: "all", "firstN", "lastN", or indices such as [0, 1, -1] or 0+1+-1.

    Raises:
        ConfigError: something else.

    Example:
        >>> layers_value("all"), layers_value("last 3"), layers_value("0+1"), layers_value([4, -1])
        ('all', 'last3', (0, 1), (4, -1))
    """
    if isinstance(value, (list, tuple)) and value and all(type(v) is int for v in value):
        return tuple(value)
    text = str(value).replace(" ", "")
    for word in ("first", "last"):
        if text.startswith(word) and text[len(word) :].isdigit() and int(text[len(word) :]) > 0:
            return word + str(int(text[len(word) :]))
    if text == "all":
        return text
    try:
        return tuple(int(part) for part in text.split("+"))
    except ValueError as error:
        raise ConfigError(
            f"tune space: layers {value!r}: use all, each, first N, last N, or indices such as [0, 1, -1] (0+1+-1)."
        ) from error


def _kinds(annotation: Any) -> list[Any]:
    """The types of an annotation: a union's members, a literal's values as they are."""
    if typing.get_origin(annotation) is typing.Literal:
        return list(typing.get_args(annotation))
    args = typing.get_args(annotation)
    return [kind for arg in args for kind in _kinds(arg)] if args else [annotation]


def _cast(name: str, value: Any, annotation: Any) -> Any:
    kinds = _kinds(annotation)
    text = str(value).strip()
    if NoneType in kinds and (value is None or text.lower() in ("null", "none")):
        return None
    if bool in kinds and (isinstance(value, bool) or text.lower() in ("true", "false")):
        return value if isinstance(value, bool) else text.lower() == "true"
    if isinstance(value, bool):
        raise ConfigError(f"tune space: {name} {value!r}: use {_allowed(kinds)}.")
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(text)
            except ValueError:
                continue
    if str in kinds or text in kinds:
        return text
    raise ConfigError(f"tune space: {name} {value!r}: use {_allowed(kinds)}.")


def _allowed(kinds: list[Any]) -> str:
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", NoneType: "null"}
    return " or ".join(words.get(kind, repr(kind)) for kind in kinds)
