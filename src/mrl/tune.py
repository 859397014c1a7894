"""`mrl tune`: a search over any field of the swap and the fit, fair to the baseline, on the training side of a run."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from mrl.errors import ConfigError
from mrl.executor import Executor, Task
from mrl.fit import FitConfig
from mrl.run import plain, read_json, say, write_json
from mrl.swap import CalibrateConfig, SwapConfig
from mrl.tuned import SETTINGS_FILE, write_settings
from mrl.tuning.goal import Goal
from mrl.tuning.settings import Settings
from mrl.tuning.space import Space, read_space
from mrl.tuning.storage import close_storage, open_storage, require_optuna
from mrl.workspace import Workspace

FOLDER, RESULT = "tune", "tune.json"
LEAST_GRACE_S = 10.0


def default_words(names: Sequence[str], n_blocks: int) -> list[str]:
    """The search space where none is given, for a model with these swappable modules and so many blocks.

    Example:
        >>> default_words([f"blocks.{i}.attn" for i in range(12)], 12)[:2]
        ['region=2,3,4', 'layers=all,last8,last4']
        >>> default_words(["layers.0.blocks.0.attn", "layers.1.blocks.0.attn"], 2)[:2]
        ['region.layers.0=1,2,4', 'region.layers.1=1,2,4']
    """
    n = len(names)
    layers = dict.fromkeys(f"last{k}" for k in (round(n * 2 / 3), round(n / 3)) if 0 < k < n)
    freeze = dict.fromkeys(str(k) for k in (0, n_blocks // 3, n_blocks * 2 // 3))
    return [
        *([f"region.{stage}=1,2,4" for stage in stages_of(names)] or ["region=2,3,4"]),
        f"layers={','.join(['all', *layers])}",
        "swap=faithful,cheap",
        "kernel_size=3,5",
        "group_size=1,4",
        "local_gain=0,0.5",
        "local_source=value,input",
        "lr=1e-6..1e-4:log",
        "weight_decay=0,0.05,0.1",
        "augment=none,light,medium",
        f"freeze={','.join(freeze)}",
    ]


def stages_of(names: Sequence[str]) -> list[str]:
    """The stages of a pyramid: what its modules' names share up to the first of two numbers; none for one stage.

    Example:
        >>> stages_of(["backbone.stages.2.blocks.0.attn", "backbone.stages.2.blocks.1.attn", "backbone.stages.3.blocks.0.attn"])
        ['stages.2', 'stages.3']
        >>> stages_of(["blocks.0.attn", "blocks.1.attn"])
        []
    """
    found: dict[str, None] = {}
    for name in names:
        parts = name.removeprefix("backbone.").split(".")
        numbers = [i for i, part in enumerate(parts) if part.isdigit()]
        if len(numbers) < 2:
            return []
        found[".".join(parts[: numbers[0] + 1])] = None
    return list(found) if len(found) > 1 else []


def tune(
    out: Path | str,
    words: Sequence[str] = (),
    goal: Goal | None = None,
    *,
    storage: str | None = None,
    study: str | None = None,
    backend: str = "onnxruntime",
    seconds: float = 6.0,
    grace: float = 120.0,
    executor: Executor | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Searches on the training side of a run, judges the best few again, and writes `tune/tune.json` and `tune/settings.json`.

    Both arms get the same number of trained trials; the baseline has the axes of the fit. A killed search goes on where it
    stopped when the call is repeated, and several processes with the same storage share one search.

    Args:
        out: a run folder with audit, protocol and split.
        words: the search space: YAML files and `name=values`, see `mrl.tuning.space.read_space`; empty takes a default.
        goal: mode, budget and number of trials; None is quality at no more than the baseline's latency.
        storage: None for a journal file in the run folder, a path of one, or the URL of a database.
        study: name in the storage; None is made of the protocol's hash.
        backend: that latency is measured in: onnxruntime or eager.
        seconds: about how long one architecture is timed.
        grace: seconds of silence, 10 or more, after which a worker that shares a database is taken for dead.
        executor: None, or where several workers share this search; one that dies is replaced, and its trial is made again.
        overwrite: forget the search of this name that is there, and start again.

    Returns:
        The record that `tune.json` holds.

    Raises:
        ConfigError: a space, a budget, a grace or a storage that cannot be, or nothing that could be trained.
        MissingExtra: Optuna or the driver of the database is not installed.
    """
    require_optuna()
    if not grace >= LEAST_GRACE_S:
        raise ConfigError(
            f"tune: a grace of {grace} s is too short to tell a slow worker from a dead one; give {LEAST_GRACE_S:.0f} s or more."
        )
    from mrl.tuning.alive import signs_of_life
    from mrl.tuning.images import TrainingSide
    from mrl.tuning.results import tune_document
    from mrl.tuning.search import Search

    space, folder = Workspace(out), Path(out) / FOLDER
    goal = goal or Goal(max_latency_ratio=1.0, seed=space.protocol.seed)
    judge = TrainingSide(space, folder, backend, seconds)
    bound = _bound(words, judge)
    name = study or f"mrl-{space.protocol.sha256()[:12]}"
    kept, done = open_storage(storage, folder), folder / RESULT
    try:
        if overwrite:
            forget(kept, name, folder)
        if done.is_file() and _same(read_json(done), goal, bound, name, backend):
            say(f"tune: finished already, see {done}; say --overwrite to search again, or give more --trials.")
            return read_json(done)
        if executor is not None and not executor.here:
            told = {"storage": storage, "study": study, "backend": backend, "seconds": seconds, "grace": grace}
            _shared(executor, {"out": str(space.out.resolve()), "words": list(words), "goal": asdict(goal), **told})
            return read_json(done)
        say(f"tune: {goal.trials} trials for each arm, {len(bound.axes)} axes, study {name}")
        identity = {"protocol_sha256": space.protocol.sha256(), "backend": backend}
        alive = signs_of_life(storage, folder, grace_s=grace)
        search = Search(judge, bound, partial(settings_of, space), goal, kept, name, identity, alive=alive)
        found = tune_document(search)
    finally:
        close_storage(kept)
    write_json(done, {**space.stamp(), "backend": backend, **found})
    if all(found["settings"].values()):
        say(f"for the main job: mrl poc --settings {_write_settings(space, judge, found, folder / SETTINGS_FILE)}")
    judge.clear()
    _say_result(found, done)
    return read_json(done)


def _shared(executor: Executor, told: dict[str, Any]) -> None:
    """As many workers as the executor has, all on this search; each writes the same result."""
    words = [str(Path(word).resolve()) if Path(word).is_file() else word for word in told["words"]]
    if told["storage"] is not None and "://" not in told["storage"]:
        told["storage"] = str(Path(told["storage"]).resolve())
    told["words"] = words
    executor.run([Task(f"search {i + 1}", "mrl.tune:tune_task", told) for i in range(executor.workers)])


def tune_task(out: str, words: Sequence[str], goal: dict[str, Any], **options: Any) -> None:
    """A worker of a shared search."""
    tune(out, words, Goal(**goal), **options)


def _bound(words: Sequence[str], judge: Any) -> Space:
    """The space of the words, or a default one, for the model's layers."""
    names, n_blocks = judge.names, len(judge.skeleton.layer_groups()) - 2
    return read_space(list(words) or default_words(names, n_blocks)).bound(len(names))


def _write_settings(space: Workspace, judge: Any, found: dict[str, Any], path: Path) -> Path:
    """What `mrl poc --settings` takes: the chosen of both arms with their modules by name, and the images that chose."""
    protocol, pixels = space.protocol, space.audit.pixels
    modules = judge.architecture(Settings.from_dict(found["settings"]["mrl"]))["modules"]
    arms = {
        arm: {k: told[k] for k in ("fit", "calibration", "swap") if k in told}
        for arm, told in found["settings"].items()
    }
    arms["mrl"]["regions"] = modules
    trained = {
        arm: sum(part["outcomes"].get(k, 0) for k in ("trained", "failed")) for arm, part in found["arms"].items()
    }
    document = {
        "model": protocol.model,
        "weights": protocol.weights,
        "weights_sha256": protocol.weights_sha256,
        "image_size": protocol.image_size,
        "classes": protocol.data["classes"],
        "search": {"study": found["study"], "protocol_sha256": protocol.sha256(), "trials": trained},
        "arms": arms,
    }
    return write_settings(path, document, (pixels[s.image] for side in (judge.train, judge.val) for s in side.samples))


def settings_of(space: Workspace, values: dict[str, Any], arm: str) -> Settings:
    """The settings of a trial on top of the run's protocol."""
    protocol = space.protocol
    return Settings.of(
        values,
        arm,
        SwapConfig.named("faithful" if protocol.swap == "auto" else protocol.swap),
        FitConfig(**protocol.budget),
        CalibrateConfig(**protocol.calibration),
        protocol.region,
        protocol.layers,
    )


def forget(storage: Any, name: str, folder: Path) -> None:
    """Deletes the studies of a search, and what its trials left in the folder."""
    optuna = require_optuna()
    for found in optuna.get_all_study_names(storage):
        if found.startswith(f"{name}-"):
            optuna.delete_study(study_name=found, storage=storage)
    for part in ("trials", "starts"):
        shutil.rmtree(folder / part, ignore_errors=True)
    for name in (RESULT, SETTINGS_FILE):
        (folder / name).unlink(missing_ok=True)


def _same(found: dict[str, Any], goal: Goal, space: Space, name: str, backend: str) -> bool:
    """Whether a record is that of this search; one of an earlier version does not say its backend, the study does."""
    asked = {"goal": plain(vars(goal)), "space": plain(space.to_dict()), "study": name, "backend": backend}
    return {"backend": backend, **{k: found[k] for k in asked if k in found}} == asked


def _say_result(found: dict[str, Any], path: Path) -> None:
    for arm, number in found["chosen"].items():
        row = next((r for r in found["judged"] if r["arm"] == arm and r["trial"] == number), None)
        if row is None:
            say(f"{arm}: nothing to choose")
            continue
        mean, ratio = row["mean"], row["latency"]["ratio"]
        say(f"{arm}: trial {number}, {100 * mean:.1f} % over fresh seeds, {ratio:.3f} of the baseline's latency")
    gap = found["difference"]
    if gap is not None:
        ends = [gap[k] for k in ("low", "high")]
        points = "no interval" if not all(map(math.isfinite, ends)) else ", ".join(f"{100 * end:+.1f}" for end in ends)
        say(
            f"mrl - baseline: {100 * gap['estimate']:+.1f} points ({points}) on inner validation images, not on the test side"
        )
    for warning in found["warnings"]:
        say(warning)
    say(f"wrote {path}")


def read_tuned(out: Path | str, arm: str = "mrl") -> Settings:
    """The settings that a finished search chose for an arm.

    Args:
        out: the run folder.
        arm: mrl or baseline.

    Raises:
        ConfigError: no search there, or it could choose nothing.
    """
    found = read_json(Path(out) / FOLDER / RESULT)
    if found["settings"].get(arm) is None:
        raise ConfigError(f"{Path(out) / FOLDER / RESULT}: the search chose nothing for {arm}; see its warnings.")
    return Settings.from_dict(found["settings"][arm])
