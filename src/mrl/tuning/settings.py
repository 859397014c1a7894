"""What one trial is: the swap, the fit and the calibration that its values amount to."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mrl.errors import ConfigError
from mrl.fit_config import FitConfig
from mrl.run import plain, sha256_text
from mrl.swap import CalibrateConfig, SwapConfig
from mrl.tuning.fields import part_of
from mrl.tuning.space import EACH


@dataclass(frozen=True)
class Settings:
    """Everything that makes a trial what it is, but its seed.

    Args:
        swap: how attention is exchanged; None is the untouched baseline.
        region: positions a region spans.
        regions: dotted beginnings of module names -> region, for what differs from `region`.
        layers: "all", "firstN", "lastN", or indices of the modules.
        fit: of the fine-tuning.
        calibration: of the swapped model; None for the baseline.

    Example:
        >>> s = Settings.of({"region": 4, "lr": 1e-4}, "mrl", SwapConfig(), FitConfig(), CalibrateConfig())
        >>> s.region, s.fit.lr, s.swap.reduce
        (4, 0.0001, 'depthwise')
    """

    swap: SwapConfig | None
    fit: FitConfig
    region: Any = 2
    regions: Mapping[str, Any] = field(default_factory=dict)
    layers: str | tuple[int, ...] = "all"
    calibration: CalibrateConfig | None = None

    @classmethod
    def of(
        cls,
        values: Mapping[str, Any],
        arm: str,
        swap: SwapConfig,
        fit: FitConfig,
        calibration: CalibrateConfig,
        region: Any = 2,
        layers: Sequence[int] | None = None,
    ) -> Settings:
        """The settings of field values on top of the run's own.

        Args:
            values: name -> value, as `Space.values` gives them.
            arm: "baseline" or "mrl".
            swap: where SwapConfig's fields start, unless `values` name a setting.
            fit: where FitConfig's start.
            calibration: where CalibrateConfig's start.
            region: where `values` say nothing.
            layers: the same; None is all.
        """
        parts: dict[str, dict[str, Any]] = {"swap": {}, "fit": {}, "calibration": {}, "plan": {}}
        each = {name: value for name, value in values.items() if name.startswith(EACH + ".")}
        for name, value in values.items():
            if name not in each:
                parts[part_of(name)][name.removeprefix("calibration.")] = value
        fitted = dataclasses.replace(fit, **parts["fit"])
        if arm == "baseline":
            return cls(None, fitted)
        planned = parts["plan"]
        start = SwapConfig.named(planned["swap"]) if "swap" in planned else swap
        chosen = planned.get("layers", "all" if layers is None else tuple(layers))
        if each:
            chosen = tuple(int(name.rpartition(".")[2]) for name, value in each.items() if value)
        regions = {k.removeprefix("region."): v for k, v in planned.items() if k.startswith("region.")}
        return cls(
            dataclasses.replace(start, **parts["swap"]),
            fitted,
            planned.get("region", region),
            regions,
            chosen,
            dataclasses.replace(calibration, **parts["calibration"]),
        )

    @property
    def arm(self) -> str:
        """The arm it belongs to."""
        return "baseline" if self.swap is None else "mrl"

    def layer_indices(self, n: int) -> list[int] | None:
        """The indices of `layers` among n modules, for `mrl.plan`; None is all of them.

        Example:
            >>> Settings(SwapConfig(), FitConfig(), layers="last2").layer_indices(6)
            [4, 5]
        """
        if self.layers == "all":
            return None
        if isinstance(self.layers, tuple):
            return list(self.layers)
        count = min(n, int(self.layers.removeprefix("first").removeprefix("last")))
        return list(range(count)) if self.layers.startswith("first") else list(range(n - count, n))

    def regions_of(self, names: Sequence[str]) -> dict[str, Any]:
        """The region of each module, by name.

        Raises:
            ConfigError: a `region.PART` that no module's name begins with.

        Example:
            >>> s = Settings(SwapConfig(), FitConfig(), region=2, regions={"blocks.0": 4})
            >>> s.regions_of(["backbone.blocks.0.attn", "backbone.blocks.1.attn"])
            {'backbone.blocks.0.attn': 4, 'backbone.blocks.1.attn': 2}
        """
        found = dict.fromkeys(names, self.region)
        for part, region in self.regions.items():
            inside = [n for n in names if _begins(n, part)]
            if not inside:
                raise ConfigError(
                    f"tune space: region.{part}: no module's name begins with {part}; they are {', '.join(names[:12])}."
                )
            found |= dict.fromkeys(inside, region)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain data; parts that the baseline does not have are left out."""
        shown = {"arm": self.arm, "fit": dataclasses.asdict(self.fit)}
        if self.swap is not None:
            shown |= {"region": self.region, "regions": dict(self.regions), "layers": self.layers}
            hidden = ("keep_original", "on_unsupported")
            shown["swap"] = {k: v for k, v in self.swap.to_dict().items() if k not in hidden}
            shown["calibration"] = dataclasses.asdict(self.calibration or CalibrateConfig())
        return plain(shown)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Settings:
        """From what `to_dict` gave.

        Example:
            >>> s = Settings(SwapConfig(), FitConfig(), region=4, layers=(0, 1), calibration=CalibrateConfig())
            >>> Settings.from_dict(s.to_dict()) == s
            True
        """
        fit = FitConfig(**data["fit"])
        if data["arm"] == "baseline":
            return cls(None, fit)
        region, layers = data["region"], data["layers"]
        regions = {k: _pair(v) for k, v in data["regions"].items()}
        calibration = CalibrateConfig(**data["calibration"])
        layers = tuple(layers) if isinstance(layers, list) else layers
        return cls(SwapConfig(**data["swap"]), fit, _pair(region), regions, layers, calibration)


def architecture_of(rows: Sequence[Any], config: SwapConfig) -> dict[str, Any]:
    """The part of a trial that decides its latency: which modules with which regions, and how they compute.

    Args:
        rows: of the plan.
        config: of it.

    Example:
        >>> architecture_of([], SwapConfig(local_gain=0.5)) == architecture_of([], SwapConfig(local_gain=1.0))
        True
    """
    hidden = ("keep_original", "on_unsupported", "local_gain")
    computed = {k: v for k, v in config.to_dict().items() if k not in hidden}
    computed["gain"] = config.learn_local_gain is not None or config.local_gain != 0
    return {"modules": {row.name: list(row.region) for row in rows if row.action == "swap"}, "config": computed}


def digest(data: Any) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of plain data, independent of the order of its keys.

    Example:
        >>> digest({"a": 1, "b": (2,)}) == digest({"b": [2], "a": 1})
        True
    """
    return sha256_text(json.dumps(plain(data), sort_keys=True))[:16]


def _begins(name: str, part: str) -> bool:
    """Whether a module's name begins with PART, `backbone.` (which a classifier puts before it) aside."""
    return any(n == part or n.startswith(part + ".") for n in (name, name.removeprefix("backbone.")))


def _pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
