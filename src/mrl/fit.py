"""Fine-tunes any model of any task in one loop, and can be killed at any moment without changing its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from mrl.checkpoint import drop_checkpoint, drop_leftovers
from mrl.data.loading import ImageSet
from mrl.fit_config import FitConfig, FitResult, check_same
from mrl.fit_fixed import FixedLoop, stop_of
from mrl.fit_loop import BEST, CHECKPOINT, RESULT, START, Loop
from mrl.ranks import share
from mrl.run import leads, plain, read_json
from mrl.tracking import METRICS, Tracking

__all__ = ["FitConfig", "FitResult", "fit", "refit"]


def fit(
    model: nn.Module,
    train: ImageSet,
    val: ImageSet,
    config: FitConfig,
    out: Path | str,
    *,
    seed: int = 0,
    arm: str = "model",
    metric: str = "accuracy",
    resume: bool = True,
    meta: Mapping[str, Any] | None = None,
    features: Path | str | None = None,
    tracking: Tracking = Tracking(),  # noqa: B008
) -> FitResult:
    """Fine-tunes a classifier from its linear probe on; the model holds the best weights afterwards, in eval mode.

    Update 0 is the linear probe: a softmax regression on the features of the untouched backbone, set as the head. Then
    AdamW with layer-wise learning rates on a cosine. Every candidate is scored on `val`; the best score wins, then the
    lower loss. All randomness is a function of the seed, the epoch and the update, so a fit that was killed and is
    started again with the same arguments ends with the numbers of one that was not.

    Under `torchrun` or `accelerate launch` every process calls it with the same arguments; they share each batch and come to the
    numbers of one process, but for dropout and rounding. The first one writes, into a folder that all of them see.

    Args:
        model: a `Classifier`: `features`, `set_head`, `layer_groups`; trained in place.
        train: the inner training images, an `ImageSet`; its own augmentation is replaced by the configuration's.
        val: the inner validation images; nothing else chooses.
        config: the budget and the recipe.
        out: folder of the arm, which gets `fit.json`, `metrics.jsonl`, `best.safetensors`, `start.safetensors`, and
            `checkpoint/` on the way.
        seed: of order, augmentation and dropout.
        arm: name for the record and the messages.
        metric: what the candidates are compared by.
        resume: continue an unfinished fit, return a finished one; off starts again.
        meta: plain data to put into `fit.json`, such as the protocol's hash.
        features: file that keeps the features of the starting head, for `refit`; None keeps none.
        tracking: where the rows of `metrics.jsonl` are copied to.

    Raises:
        ConfigError: a damaged checkpoint, one of another fit, or a loss that is not finite; with what to do.

    Example:
        >>> FitConfig(epochs=2, freeze=4).layer_decay
        0.75
    """
    out = _ready(out, resume)
    identity = plain({"arm": arm, "seed": seed, "metric": metric, "config": vars(config), "n": [len(train), len(val)]})
    if share((out / RESULT).is_file()):
        return _finished(model, out, identity)
    with torch.random.fork_rng():
        loop = Loop(model, train, val, config, out, identity, None if features is None else Path(features), tracking)
        return _through(loop, meta)


def refit(
    model: nn.Module,
    train: ImageSet,
    chosen: FitResult,
    config: FitConfig,
    out: Path | str,
    *,
    meta: Mapping[str, Any] | None = None,
    features: Path | str | None = None,
    tracking: Tracking = Tracking(),  # noqa: B008
) -> FitResult:
    """Fits once more on the whole training side, up to the candidate that `fit` chose on an inner part of it.

    Nothing is chosen any more: the starting head has the L2 strength that won, the schedule is that of `config` on these
    images, and it stops at the same share of the schedule at which the chosen candidate stood (0 keeps the starting
    head). There is no validation side; the averaged weights at that update are the result.

    Args:
        model: the same start as the inner fit had, trained in place.
        train: the whole training side: inner training and inner validation images.
        chosen: what `fit` gave.
        config: the same budget.
        out: folder of the fit: `fit.json`, `metrics.jsonl`, `best.safetensors`, `start.safetensors`.
        meta: plain data to put into `fit.json`.
        features: the file that the inner fit kept its features in; those that it lacks are computed.
        tracking: where the rows of `metrics.jsonl` are copied to.

    Returns:
        The record: effort counts both fits; scores and candidates are the inner fit's.

    Raises:
        ConfigError: a checkpoint of another fit, or a loss that is not finite.

    Example:
        >>> stop_of(60, 1785, FitConfig(), 2100)  # of 120 planned updates there, of 132 here
        66
    """
    out = _ready(out, resume=True)
    identity = plain(
        {
            "arm": chosen.arm,
            "seed": chosen.seed,
            "metric": chosen.metric,
            "config": vars(config),
            "n": [len(train), 0],
            "stop": stop_of(chosen.best_update, chosen.n_train, config, len(train), FitConfig(**chosen.config)),
            "strength": chosen.probe_strength,
        }
    )
    if share((out / RESULT).is_file()):
        return _finished(model, out, {k: v for k, v in identity.items() if k not in ("stop", "strength")})
    with torch.random.fork_rng():
        loop = FixedLoop(
            model, train, chosen, config, out, identity, None if features is None else Path(features), tracking
        )
        return _through(loop, meta)


def _ready(out: Path | str, resume: bool) -> Path:
    """The folder of a fit, made and tidied by the first process of a launch before the others look."""
    out = Path(out)
    if leads():
        out.mkdir(parents=True, exist_ok=True)
        drop_leftovers(out)
        if not resume:
            _clear(out)
    share()
    return out


def _through(loop: Loop, meta: Mapping[str, Any] | None) -> FitResult:
    """Runs a loop from its start, or from its checkpoint, to its record."""
    try:
        loop.begin()
        loop.run()
        return loop.finish(dict(meta or {}))
    finally:
        loop.close()


def _finished(model: nn.Module, out: Path, identity: Mapping[str, Any]) -> FitResult:
    """The record of a finished fit, with its best weights in the model."""
    data = read_json(out / RESULT)
    stored = {**{k: data[k] for k in ("arm", "seed", "metric", "config")}, "n": [data["n_train"], data["n_val"]]}
    check_same(stored, identity, out / RESULT)
    if leads():
        drop_checkpoint(out / CHECKPOINT)
    model.load_state_dict(load_file(out / BEST))
    model.eval()
    return FitResult.from_dict({k: v for k, v in data.items() if k != "environment"})


def _clear(out: Path) -> None:
    drop_checkpoint(out / CHECKPOINT)
    for name in (RESULT, METRICS, BEST, START):
        (out / name).unlink(missing_ok=True)
