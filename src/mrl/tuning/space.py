"""What may vary: axes with their values, from YAML or words of the command line."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from mrl.errors import ConfigError
from mrl.tuning.fields import BUDGET, is_number, part_of, typed

RANGE = re.compile(r"(?P<low>[^.:]+(?:\.[^.:]+)?)\.\.(?P<high>[^:]+)(?::(?P<how>.+))?")
EACH = "layers.each"


@dataclass(frozen=True)
class Axis:
    """One thing that varies: a list of values, or a range.

    Args:
        name: a field of `SwapConfig` or `FitConfig`, `calibration.FIELD`, `region`, `region.PART` (the modules whose
            names begin with PART, such as a stage), `layers`, or `swap`.
        values: the choices; numbers are kept in order, so that neighbours count as alike.
        low: smallest value of a range.
        high: largest value of it.
        log: even on the logarithm.
        step: of a range of whole numbers or multiples; None is continuous, 1 for whole numbers.

    Example:
        >>> Axis("region", (1, 2, 4)).size, Axis("lr", low=1e-6, high=1e-4, log=True).size
        (3, inf)
    """

    name: str
    values: tuple[Any, ...] = ()
    low: float | int | None = None
    high: float | int | None = None
    log: bool = False
    step: float | int | None = None

    def __post_init__(self) -> None:
        """Checks names and values."""
        part_of(self.name if self.name != EACH and not self.name.startswith(EACH + ".") else "layers")
        if self.values and len(set(self.values)) < len(self.values):
            raise ConfigError(f"tune space: {self.name} has a value twice; name each once.")
        if not self.values:
            self._check_range()

    def _check_range(self) -> None:
        kind = is_number(self.name)
        if kind is None:
            raise ConfigError(f"tune space: {self.name} is not a number; list its values, such as [a, b].")
        if self.low is None or self.high is None or not self.low < self.high:
            raise ConfigError(f"tune space: {self.name}: a range needs low below high, such as 1e-6..1e-4.")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ConfigError(f"tune space: {self.name}: a log range starts above 0 and has no step.")
        if self.step is not None and self.step <= 0:
            raise ConfigError(f"tune space: {self.name}: step {self.step} must be above 0.")

    @property
    def part(self) -> str:
        """Where it belongs: plan, swap, fit or calibration."""
        return part_of("layers" if self.name.startswith("layers") else self.name)

    @property
    def ordered(self) -> bool:
        """Whether the choices are numbers, so that neighbours are alike."""
        return all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in self.values)

    @property
    def size(self) -> float:
        """How many values it has; infinite for a continuous range."""
        if self.values:
            return len(self.values)
        if self.step is None and is_number(self.name) is not int:
            return math.inf
        return math.floor((self.high - self.low) / (self.step or 1)) + 1

    def distribution(self) -> Any:
        """The same for Optuna: ordered choices become their index, others their label."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.values and self.ordered:
            return IntDistribution(0, len(self.values) - 1)
        if self.values:
            return CategoricalDistribution([label(v) for v in self.values])
        if is_number(self.name) is int:
            return IntDistribution(int(self.low), int(self.high), log=self.log, step=int(self.step or 1))
        return FloatDistribution(float(self.low), float(self.high), log=self.log, step=self.step)

    def suggest(self, trial: Any) -> Any:
        """What Optuna's trial has for this axis."""
        dist = self.distribution()
        kind = type(dist).__name__
        if kind == "CategoricalDistribution":
            return trial.suggest_categorical(self.name, dist.choices)
        suggest = trial.suggest_int if kind == "IntDistribution" else trial.suggest_float
        return suggest(self.name, dist.low, dist.high, step=dist.step, log=dist.log)

    def value(self, raw: Any) -> Any:
        """What Optuna's value of this axis means."""
        if self.values and self.ordered:
            return self.values[raw]
        if self.values:
            return next(v for v in self.values if label(v) == raw)
        return raw

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as in `tune.json`."""
        if self.values:
            return {"values": [list(v) if isinstance(v, tuple) else v for v in self.values]}
        return {"low": self.low, "high": self.high, "log": self.log, "step": self.step}


def label(value: Any) -> str:
    """A choice as text: layers as 0+1, a region as 2x4.

    Example:
        >>> label((0, 1)), label(None)
        ('0+1', 'null')
    """
    if isinstance(value, tuple):
        return "+".join(map(str, value))
    return "null" if value is None else str(value)


@dataclass(frozen=True)
class Space:
    """All axes of a search, and what is fixed beside them.

    Args:
        axes: what varies.
        fixed: name -> the one value of a field that does not vary but differs from the run's.

    Example:
        >>> space = parse_space({"region": [1, 2], "lr": {"low": 1e-6, "high": 1e-4, "log": True}, "reduce": "mean"})
        >>> [axis.name for axis in space.axes], space.fixed
        (['region', 'lr'], {'reduce': 'mean'})
        >>> [axis.name for axis in space.of("baseline").axes]
        ['lr']
    """

    axes: tuple[Axis, ...]
    fixed: Mapping[str, Any]

    def of(self, arm: str) -> Space:
        """The space of an arm: the baseline has the axes of the fit only, with the same values."""
        if arm != "baseline":
            return self
        axes = tuple(axis for axis in self.axes if axis.part == "fit")
        return Space(axes, {k: v for k, v in self.fixed.items() if part_of(k) == "fit"})

    def bound(self, n_layers: int) -> Space:
        """With `layers: each` turned into one yes or no for each of the model's layers."""
        axes: list[Axis] = []
        for axis in self.axes:
            if axis.name == EACH:
                axes += [replace(axis, name=f"{EACH}.{i}", values=(0, 1)) for i in range(n_layers)]
            else:
                axes.append(axis)
        return Space(tuple(axes), self.fixed)

    @property
    def size(self) -> float:
        """How many different trials there can be."""
        return math.prod(axis.size for axis in self.axes)

    def distributions(self) -> dict[str, Any]:
        """Every axis for Optuna, by name."""
        return {axis.name: axis.distribution() for axis in self.axes}

    def values(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Field values of a trial, fixed ones included, from Optuna's."""
        return {**self.fixed, **{axis.name: axis.value(raw[axis.name]) for axis in self.axes}}

    def warnings(self) -> list[str]:
        """What makes the comparison of the arms less fair than it could be."""
        unequal = [axis.name for axis in self.axes if axis.name in BUDGET]
        if not unequal:
            return []
        return [f"{', '.join(unequal)} are tuned for each arm, so the arms need not get the same budget of updates"]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as in `tune.json`."""
        fixed = {k: list(v) if isinstance(v, tuple) else v for k, v in self.fixed.items()}
        return {"axes": {axis.name: axis.to_dict() for axis in self.axes}, "fixed": fixed}


def parse_space(document: Mapping[str, Any]) -> Space:
    """A search space from plain data: `name: [values]`, `name: {low, high, log, step}`, or `name: value` (fixed).

    Args:
        document: what a YAML file holds; texts such as "1,2,4" and "1e-6..1e-4:log" are understood as on the command line.

    Raises:
        ConfigError: an unknown name, a value its field does not allow, or nothing that varies.

    Example:
        >>> space = parse_space({"layers": "all,last3,0+1", "weight_decay": "0..0.1:step=0.05"})
        >>> [axis.size for axis in space.axes]
        [3, 3]
    """
    axes, fixed = [], {}
    for name, told in document.items():
        found = _axis(str(name), told)
        if isinstance(found, Axis):
            axes.append(found)
        else:
            fixed[str(name)] = found[0]
    if not axes:
        raise ConfigError("tune space: nothing varies; give a field two values or more, such as region=1,2,4.")
    return Space(tuple(axes), fixed)


def read_space(words: Sequence[str]) -> Space:
    """A search space from words of the command line: YAML files and `name=values`; later ones replace earlier ones.

    Args:
        words: such as `space.yaml`, `region=1,2,4`, `lr=1e-6..1e-4:log`, `layers=all,last3,0+1`, `layers=each`.

    Raises:
        ConfigError: a file that cannot be read, or what `parse_space` refuses.

    Example:
        >>> read_space(["region=1,2,4", "lr=1e-6..1e-4:log"]).axes[1]
        Axis(name='lr', values=(), low=1e-06, high=0.0001, log=True, step=None)
    """
    document: dict[str, Any] = {}
    for word in words:
        name, sign, told = word.partition("=")
        if sign:
            document[name.replace("-", "_") if "." not in name else name] = told
            continue
        try:
            read = yaml.safe_load(Path(word).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"tune space {word}: cannot be read; give a YAML file or name=values.") from error
        if not isinstance(read, dict):
            raise ConfigError(f"tune space {word}: holds no fields; write lines such as `region: [1, 2, 4]`.")
        document |= read
    return parse_space(document)


def _axis(name: str, told: Any) -> Axis | tuple[Any]:
    """The axis, or a tuple with the one value that is fixed."""
    part_of(name)
    if name == "layers" and told in ("each", ["each"]):
        return Axis(EACH, (0, 1))
    if isinstance(told, Mapping):
        unknown = sorted(set(told) - {"low", "high", "log", "step"})
        if unknown:
            raise ConfigError(f"tune space: {name}: {unknown[0]!r} is unknown; a range has low, high, log and step.")
        return _range(name, **told)
    if isinstance(told, str):
        match = RANGE.fullmatch(told.strip())
        if match and is_number(name):
            return _range(name, match["low"], match["high"], **_how(name, match["how"]))
        told = [part.strip() for part in told.split(",")]
    values = [typed(name, v) for v in (told if isinstance(told, list) else [told])]
    if len(values) == 1:
        return (values[0],)
    if all(type(v) in (int, float) for v in values):
        values = sorted(values)
    return Axis(name, tuple(values))


def _range(name: str, low: Any = None, high: Any = None, log: bool = False, step: Any = None) -> Axis:
    if low is None or high is None or is_number(name) is None:
        return Axis(name, (), None, None)
    if not isinstance(log, bool):
        raise ConfigError(f"tune space: {name}: log {log!r}: use true or false.")
    kind = is_number(name)
    try:
        each = None if step is None else kind(step)
    except ValueError as error:
        raise ConfigError(f"tune space: {name}: step {step!r} is not a number of its kind.") from error
    return Axis(name, (), typed(name, low), typed(name, high), log, each)


def _how(name: str, text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    if text == "log":
        return {"log": True}
    if text.startswith("step="):
        return {"step": text.removeprefix("step=")}
    raise ConfigError(f"tune space: {name}: {text!r}: after the range use :log or :step=NUMBER.")
