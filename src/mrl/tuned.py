"""Settings that `mrl tune` chose, on their way into the main job: each arm's own, and which images chose them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mrl.errors import ConfigError, MrlError
from mrl.fit_config import FitConfig
from mrl.run import plain, read_json, sha256_text, write_json
from mrl.swap import CalibrateConfig, Plan, SwapConfig, plan

SETTINGS_FILE, SEARCH_FILE = "settings.json", "tune.json"
KIND = "settings of mrl tune"
DIGITS = 16  # of an image's hash
SAME = ("model", "weights", "weights_sha256", "image_size", "classes")
BUDGET = ("epochs", "min_updates", "batch_size")


def write_settings(path: Path, document: Mapping[str, Any], pixels: Iterable[str]) -> Path:
    """Writes the file that `mrl poc --settings` takes, with its own hash and those of the images that chose.

    Args:
        path: of the file.
        document: `SAME` facts, `search`, and `arms` with what each is.
        pixels: hashes of the pictures of the training side.
    """
    seen = sorted({one[:DIGITS] for one in pixels})
    found = plain({"schema": 1, "kind": KIND, **document, "seen": {"n": len(seen), "pixels": " ".join(seen)}})
    return write_json(path, {"sha256": _hash(found), **found})


def settings_path(path: Path | str) -> Path:
    """The file of settings that `--settings` means: itself, or the one in the run folder of the search.

    Example:
        >>> settings_path("mine/tune/settings.json").as_posix()
        'mine/tune/settings.json'
    """
    path = Path(path)
    if not path.is_dir():
        return path
    inside = path / "tune" / SETTINGS_FILE
    return inside if inside.is_file() else path / SETTINGS_FILE


def keep_search(path: Path | str, out: Path | str) -> bool:
    """Copies the record of the search, `tune.json` beside its settings, into a run that uses them, for its report.

    A record that is in the run already stays, and one of another search than the settings' is not taken.

    Args:
        path: of `--settings`.
        out: folder of the run.

    Returns:
        Whether it was copied.
    """
    told, there = settings_path(path), Path(out) / "tune" / SEARCH_FILE
    beside = told.with_name(SEARCH_FILE)
    if there.exists() or not beside.is_file():
        return False
    found, search = read_json(beside), read_settings(told)["search"]
    if any(found.get(name) != search.get(name) for name in ("study", "protocol_sha256")):
        return False
    write_json(there, found)
    return True


def read_settings(path: Path | str) -> dict[str, Any]:
    """Reads settings: the file, or the run folder of the search.

    Raises:
        ConfigError: no such file, one of another kind, or one that was changed.

    Example:
        >>> import tempfile
        >>> arms = {"baseline": {"fit": {}}, "mrl": {"fit": {}, "calibration": {}, "swap": {}, "regions": {"a": [2, 2]}}}
        >>> file = write_settings(Path(tempfile.mkdtemp()) / "settings.json", {"arms": arms}, ["ab" * 32])
        >>> read_settings(file)["seen"]
        {'n': 1, 'pixels': 'abababababababab'}
    """
    path = settings_path(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["kind"] != KIND or found["schema"] > 1:
            raise KeyError("kind")
        told = found.pop("sha256")
        for arm in found["arms"].values():
            FitConfig(**arm["fit"])
        SwapConfig(**found["arms"]["mrl"]["swap"])
        CalibrateConfig(**found["arms"]["mrl"]["calibration"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, MrlError) as error:
        raise ConfigError(
            f"--settings {path}: not settings that mrl tune wrote; give its tune/{SETTINGS_FILE}, or its run folder."
        ) from error
    if told != _hash(found):
        raise ConfigError(
            f"--settings {path}: was changed after mrl tune wrote it; search again, or give flags instead."
        )
    return {"sha256": told, **found}


def tuned_part(
    found: Mapping[str, Any], facts: Mapping[str, Any], tested: Mapping[str, str], frozen: Mapping[str, str]
) -> dict[str, Any]:
    """What a protocol keeps of settings: each arm's own, and how many test images took part in their choice.

    Args:
        found: the settings as read.
        facts: `SAME` of the run.
        tested: image -> hash of its picture, for every image that is tested.
        frozen: the same for a frozen test set.

    Raises:
        ConfigError: the settings are of another model, size, or task.
    """
    for name in SAME:
        ours = plain(facts[name])
        if found[name] != ours:
            flag = "classes of --data" if name == "classes" else f"--{name.split('_sha')[0].replace('_', '-')}"
            raise ConfigError(
                f"--settings were chosen for another {name.replace('_', ' ')} ({found[name]}, here {ours}); give the {flag} of the search."
            )
    seen = set(found["seen"]["pixels"].split())

    def count(images: Mapping[str, str]) -> int:
        return sum(pixels[:DIGITS] in seen for pixels in images.values())

    on = {"n_images": found["seen"]["n"], "n_test": len(tested), "n_test_seen": count(tested)}
    if frozen:
        on |= {"n_frozen": len(frozen), "n_frozen_seen": count(frozen)}
    return plain({"sha256": found["sha256"], "search": found["search"], "tuned_on": on, "arms": found["arms"]})


def tuned_plan(model: nn.Module, part: Mapping[str, Any], images: Tensor) -> Plan:
    """The timed plan of the settings in a protocol.

    Args:
        model: the classifier.
        part: the protocol's `tuned`.
        images: one batch.

    Raises:
        SwapError: the model has no such modules.
    """
    arm = part["arms"]["mrl"]
    regions = {name: tuple(region) for name, region in arm["regions"].items()}
    return plan(model, region=regions, target=list(regions), example_inputs=images, config=SwapConfig(**arm["swap"]))


def tuned_warnings(part: Mapping[str, Any]) -> list[str]:
    """What a reader must know of settings that came from a search.

    Example:
        >>> tuned_warnings({"tuned_on": {"n_test": 9, "n_test_seen": 9}, "arms": {}})[0]
        'The settings come from a search (mrl tune) that saw 9 of the 9 test images: the scores of both arms are optimistic.'
    """
    if not part:
        return []
    on, said = part["tuned_on"], []
    if on["n_test_seen"]:
        said.append(
            f"The settings come from a search (mrl tune) that saw {on['n_test_seen']} of the {on['n_test']} test images: "
            "the scores of both arms are optimistic."
        )
    fits = [arm["fit"] for arm in part["arms"].values()]
    unequal = [name for name in BUDGET if len({fit[name] for fit in fits}) > 1]
    if unequal:
        said.append(f"The settings of mrl tune give the arms different budgets: {', '.join(unequal)}.")
    return said


def fit_of(part: Mapping[str, Any], arm: str = "baseline") -> FitConfig:
    """An arm's fit among settings."""
    return FitConfig(**part["arms"][arm]["fit"])


def calibration_of(part: Mapping[str, Any], at_most: int | None = None) -> CalibrateConfig:
    """The swapped arm's calibration among settings, on `at_most` images where the search left their number alone."""
    config = CalibrateConfig(**part["arms"]["mrl"]["calibration"])
    if at_most is None or config.max_images != CalibrateConfig().max_images:
        return config
    return dataclasses.replace(config, max_images=at_most)


def _hash(document: Mapping[str, Any]) -> str:
    return sha256_text(json.dumps(document, sort_keys=True, ensure_ascii=True))
