"""The arms of a comparison: the baseline, MRL, and any others of `--arms`, each compared with the baseline."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from mrl.errors import ConfigError
from mrl.fit_config import FitConfig
from mrl.models.build import weights_are_own
from mrl.protocol import Protocol
from mrl.swap import SETTINGS

BASELINE, MRL = "baseline", "mrl"
RESERVED = (BASELINE, MRL, "last", "inner", "all", "none", "difference", "neither")
FIELDS = ("name", "model", "weights", "swap", "region", "layers", "budget")


@dataclass(frozen=True)
class Arm:
    """One arm: which model, how it is swapped, and how it is fitted.

    Args:
        name: of its folder and in the report.
        model: timm name, folder of `mrl.save`, or `package.module:factory`.
        weights: where they come from; None is random, or what the folder gives.
        swap: faithful, cheap, paper or auto; none leaves the model as it is.
        region: positions a region spans.
        layers: indices of the blocks to swap; None is all.
        budget: of its fit.
    """

    name: str
    model: str
    weights: str | None
    swap: str
    region: int
    layers: list[int] | None
    budget: FitConfig

    @property
    def swapped(self) -> bool:
        """Whether its attention is exchanged."""
        return self.swap != "none"


def read_arms(path: str | Path | None) -> list[dict[str, Any]]:
    """The entries of the file of `--arms`: a YAML list, or a mapping with the list under `arms`.

    Raises:
        ConfigError: no such file, or not a list of mappings.

    Example:
        >>> read_arms(None)
        []
    """
    if path is None:
        return []
    if not Path(path).is_file():
        raise ConfigError(f"--arms {path}: not found; give a YAML file with a list of arms.")
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--arms {path}: not YAML ({str(error).splitlines()[0]}).") from error
    found = found.get("arms") if isinstance(found, dict) else found
    if not isinstance(found, list) or not found or not all(isinstance(entry, dict) for entry in found):
        raise ConfigError(f"--arms {path}: give a list of arms, such as `- {{name: region4, region: 4}}`.")
    return found


def settle(entries: Sequence[Mapping[str, Any]], own: Arm, *, seen: bool) -> dict[str, dict[str, Any]]:
    """What the entries of `--arms` mean beside the run's own MRL arm: name -> every setting, as the protocol keeps it.

    What an entry leaves out is the run's: its model with its weights, its swap, region, layers and budget. Another model
    has no weights and no swap unless the entry says so.

    Args:
        entries: of `read_arms`.
        own: the run's MRL arm.
        seen: weights of one's own are allowed: there is a test side, or the user's word.

    Raises:
        ConfigError: naming the arm, and what is allowed.

    Example:
        >>> own = Arm("mrl", "test_vit", None, "auto", 2, None, FitConfig())
        >>> found = settle([{"name": "wide", "region": 4}, {"name": "net", "model": "resnet18"}], own, seen=False)
        >>> found["wide"]["swap"], found["wide"]["region"], found["net"]["swap"]
        ('auto', 4, 'none')
    """
    arms = [_arm(entry, own) for entry in entries]
    known: dict[Any, str] = {}
    baseline = Arm(BASELINE, own.model, own.weights, "none", own.region, own.layers, own.budget)
    names: set[str] = set()
    for arm in [baseline, own, *arms]:
        key = tuple(str(v) for v in (arm.model, arm.weights, arm.swap, arm.budget))
        key += tuple(str(v) for v in (arm.region, arm.layers)) if arm.swapped else ()
        if key in known:
            raise ConfigError(f"--arms: {arm.name} is the same as {known[key]}; change one, or leave it out.")
        known[key] = arm.name
        if arm.name.lower() in names:
            raise ConfigError(f"--arms: the name {arm.name} is there twice; every arm needs its own.")
        names.add(arm.name.lower())
        if arm not in (baseline, own) and weights_are_own(arm.model, arm.weights) and not seen:
            raise ConfigError(
                f"--arms: {arm.name} has weights of your own, which may have seen these images: give images they have not "
                "seen with --test FOLDER|CSV, or say --weights-unseen."
            )
    return {arm.name: {k: v for k, v in asdict(arm).items() if k != "name"} for arm in arms}


def _arm(entry: Mapping[str, Any], own: Arm) -> Arm:
    name = entry.get("name")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,23}", name):
        raise ConfigError(
            f"--arms: name {name!r}; use 1 to 24 letters, digits, - and _, beginning with a letter or digit."
        )
    if name.lower() in RESERVED or re.fullmatch(r"r\d+f\d+", name):
        raise ConfigError(f"--arms: the name {name} has a meaning of its own; use another.")
    unknown = [str(key) for key in entry if key not in FIELDS]
    if unknown:
        raise ConfigError(f"--arms: {name} has {', '.join(unknown)}; an arm has {', '.join(FIELDS)}.")
    other = entry.get("model", own.model) != own.model
    swap = entry.get("swap", "none" if other else own.swap)
    swap = "none" if swap is None else swap
    if swap not in (*SETTINGS, "auto", "none"):
        raise ConfigError(f"--arms: {name} has swap {swap}; use {', '.join(SETTINGS)}, auto or none.")
    if swap == "none" and ({"region", "layers"} & set(entry)):
        raise ConfigError(f"--arms: {name} has a region or layers but no swap; give swap: auto, or leave them out.")
    region, layers = entry.get("region", own.region), entry.get("layers", own.layers)
    if not _whole(region) or region < 1:
        raise ConfigError(f"--arms: {name} has region {region}; use a whole number from 1, such as 2.")
    if layers is not None and not (isinstance(layers, list) and layers and all(map(_whole, layers))):
        raise ConfigError(f"--arms: {name} has layers {layers}; give a list of whole numbers, such as [6, 7, -1].")
    for key in ("model", "weights"):
        if key in entry and not isinstance(entry[key], str) and (key == "model" or entry[key] is not None):
            raise ConfigError(f"--arms: {name} has {key} {entry[key]!r}; give a text.")
    weights = entry.get("weights", None if other else own.weights)
    return Arm(name, entry.get("model", own.model), weights, swap, region, layers, _budget(name, entry, own.budget))


def _budget(name: str, entry: Mapping[str, Any], own: FitConfig) -> FitConfig:
    changes = entry.get("budget") or {}
    names = [field.name for field in fields(FitConfig)]
    unknown = [str(key) for key in changes if key not in names] if isinstance(changes, dict) else [str(changes)]
    if unknown:
        raise ConfigError(f"--arms: {name} has budget {', '.join(unknown)}; a budget has {', '.join(names)}.")
    try:
        return FitConfig(**{**asdict(own), **changes})
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"--arms: {name}: {error} (1e-4 is a text in YAML, 1.0e-4 a number).") from error


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def arms_of(protocol: Protocol) -> dict[str, Arm]:
    """All arms of a protocol, the baseline first.

    Example:
        >>> [arm.swap for arm in arms_of(Protocol(data={}, model="test_vit")).values()]
        ['none', 'auto']
    """
    told = {"model": protocol.model, "weights": protocol.weights, "region": protocol.region, "layers": protocol.layers}
    found = {
        BASELINE: Arm(BASELINE, **told, swap="none", budget=FitConfig(**protocol.budget_of(BASELINE))),
        MRL: Arm(MRL, **told, swap=protocol.swap, budget=FitConfig(**protocol.budget_of(MRL))),
    }
    for name, settings in protocol.arm_settings.items():
        kept = {k: v for k, v in settings.items() if k in FIELDS and k != "budget"}
        found[name] = Arm(name, **kept, budget=FitConfig(**settings["budget"]))
    return found


def check_arm(name: str, arms: Sequence[str]) -> str:
    """The name, if there is such an arm.

    Raises:
        ConfigError: with the names there are.

    Example:
        >>> check_arm("mrl", ["baseline", "mrl"])
        'mrl'
    """
    if name not in arms:
        raise ConfigError(f"--arm {name}: unknown; use {' or '.join(arms)}.")
    return name
