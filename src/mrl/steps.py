"""The verbs on a run folder: each reads the files of the verbs before it and writes its own."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mrl.checkpoint import drop_checkpoint
from mrl.data import (
    Folds,
    changed_files,
    load_audit,
    make_folds,
    make_loader,
    make_split,
    write_folds,
    write_split,
)
from mrl.data.audit import audit as audit_images
from mrl.errors import ConfigError, DataError
from mrl.fit import FitConfig, fit, refit
from mrl.models import build_model
from mrl.protocol import Protocol, was_changed, write_protocol
from mrl.ranks import share
from mrl.request import Request, make_protocol, pair_of, say_mde
from mrl.run import read_json, refuse_existing, say, world, write_json
from mrl.swap import CalibrateConfig, Handle, Plan, SwapConfig, calibrate, load, plan, save, swap_
from mrl.swap.plan import WORTH
from mrl.workspace import ARMS, Workspace

FOLD_PRESETS = ("standard", "full")
FEATURES, INNER = "features.safetensors", "inner"  # in the folder of an arm of a fold
UNFINISHED = "calibrated.unfinished"  # state of a calibration, in the folder of its arm


def begin(space: Workspace, request: Request, *, overwrite: bool = False) -> Workspace:
    """Audit, protocol and split of a request: made where they are missing, checked against the request where they are there.

    Raises:
        ConfigError: the folder holds a run of another protocol, with what differs.
        DataError: images or labels that cannot be used, or that changed since the audit.
    """
    if space.file("audit.json").is_file() and not overwrite:
        audit = load_audit(space.out, request.data, request.test)
        changed = changed_files(audit)
        if changed:
            raise DataError(
                f"{len(changed)} images changed since the audit, such as {changed[0]}; use a new --out, or put them back."
            )
    else:
        audit = audit_images(
            request.data,
            space.out,
            test=request.test,
            on_bad=request.on_bad,
            bit_depth=request.bit_depth,
            overwrite=overwrite,
        )
    dealt = {"preset": request.preset, "seed": request.seed, "group_near": request.group_near}
    split = make_folds(audit, **dealt) if request.preset in FOLD_PRESETS else make_split(audit, **dealt)
    protocol = make_protocol(request, audit, split)
    if space.file("protocol.yaml").is_file() and not overwrite:
        _same_protocol(space, protocol)
    else:
        write_protocol(space.out, protocol)
        say_mde(protocol)
    made = "folds.json" if isinstance(split, Folds) else "split.csv"
    if not space.file(made).is_file() or overwrite:
        if isinstance(split, Folds):
            write_folds(space.out, split)
        else:
            write_split(space.file("split.csv"), split)
    space.__dict__.update(source=audit.source, audit=audit, protocol=protocol)
    return space


def _same_protocol(space: Workspace, asked: Protocol) -> None:
    if was_changed(space.out):
        raise ConfigError(
            f"{space.file('protocol.yaml')} was changed after it was written; put it back, or use a new --out."
        )
    there = space.protocol
    if there.sha256() != asked.sha256():
        a, b = there.to_dict(), asked.to_dict()
        differing = [k for k in a if a[k] != b[k]]
        shown = "; ".join(f"{k}: {a[k]} there, {b[k]} asked" for k in differing[:2])
        raise ConfigError(
            f"--out {space.out} holds a run of another protocol ({shown}); choose another --out, or say --overwrite."
        )


def open_run(space: Workspace, given: dict[str, Any], *, overwrite: bool = False, swaps: bool = True) -> Workspace:
    """A run folder for a single verb: its own protocol, which flags that were given must not contradict, or a new one.

    Args:
        space: the run folder.
        given: flags of the verb by name; None was not given.
        overwrite: make a new protocol and split.
        swaps: the verb will swap the model, so it has to have something to swap.

    Raises:
        ConfigError: no protocol and no --model and --data to make one, or a flag that contradicts the protocol.
    """
    given = {k: v for k, v in given.items() if v is not None and v is not False}
    if isinstance(given.get("image_size"), list):
        given["image_size"] = tuple(given["image_size"])
    if not space.file("protocol.yaml").is_file() or overwrite:
        missing = [f"--{name}" for name in ("model", "data") if name not in given]
        if missing:
            raise ConfigError(f"{space.out} has no protocol yet: give {' and '.join(missing)}, or run `mrl poc`.")
        request = Request(**given)
        request.check()
        if swaps:
            check_model(request)
        return begin(space, request, overwrite=overwrite)
    protocol = space.protocol
    there = {
        "model": protocol.model, "data": protocol.data["source"], "weights": protocol.weights, "test": protocol.data["test"],
        "weights_unseen": protocol.weights_unseen, "image_size": tuple(protocol.image_size), "region": protocol.region, "swap": protocol.swap,
        "layers": protocol.layers, "preset": protocol.preset, "seed": protocol.seed, "on_bad": protocol.data["on_bad"],
        "group_near": protocol.data["group_near"],
    }  # fmt: skip
    for name, value in given.items():
        if name in ("budget", "calibration"):
            if asdict(value) not in (getattr(protocol, name), asdict(type(value)())):
                raise ConfigError(
                    f"{space.file('protocol.yaml')} has another {name}; leave those flags out, or use a new --out."
                )
        elif (pair_of(value) if name == "image_size" else value) != there[name]:
            flag = name.replace("_", "-")
            raise ConfigError(
                f"--{flag} {value}: the protocol of {space.out} says {there[name]}; leave the flag out, or use a new --out."
            )
    return space


def check_model(request: Request) -> None:
    """Builds the model without its weights and plans the swap, so that a wrong name or region fails before any work."""
    net = build_model(request.model, None, image_size=pair_of(request.image_size))
    plan(net, region=request.region, layers=request.layers)


def resolve_swap(
    model: torch.nn.Module, setting: str, region: int, layers: list[int] | None, images: torch.Tensor
) -> tuple[Plan, str]:
    """The timed plan of a setting; "auto" takes faithful where it is predicted to be faster than the original, else cheap."""
    common = {"region": region, "layers": layers, "example_inputs": images}
    first = plan(model, config=SwapConfig.named("faithful" if setting == "auto" else setting), **common)
    if setting != "auto":
        return first, setting
    if first.predicted_latency_ratio < WORTH:
        return first, "faithful"
    return plan(model, config=SwapConfig.named("cheap"), **common), "cheap"


def write_plan(
    path: Path, found: Plan, setting: str, size: tuple[int, int], stamp: dict | None = None, *, overwrite: bool = False
) -> dict[str, Any]:
    """Writes a plan with its setting as `plan.json`; returns the document."""
    refuse_existing(path, overwrite)
    document = {
        **(stamp or {}),
        **found.to_dict(),
        "setting": setting,
        "auto_below": WORTH,
        "image_size": list(size),
    }
    write_json(path, document)
    return document


def plan_step(space: Workspace, model: torch.nn.Module, *, overwrite: bool = False) -> Plan:
    """Plans the swap of the protocol, resolves "auto", writes `plan.json`.

    It times the blocks on a real training image. With folds every image is tested once, so it takes noise instead, once
    for all folds: one architecture is compared, and no image takes part in its choice.
    """
    refuse_existing(space.file("plan.json"), overwrite)
    protocol = space.protocol
    if protocol.folds:
        noise = torch.Generator().manual_seed(protocol.seed)
        image = torch.randn(1, 3, *protocol.image_size, generator=noise)
    else:
        image = space.image_set("train")[0]["image"][None]
    found, setting = resolve_swap(model, protocol.swap, protocol.region, protocol.layers, image)
    write_plan(space.file("plan.json"), found, setting, protocol.image_size, space.stamp(), overwrite=overwrite)
    ratio = found.predicted_latency_ratio
    say(
        f"swap: {len(found.names)} modules, {setting}; predicted time of the blocks x{ratio:.2f} of the original at {protocol.image_size[0]} px."
    )
    return found


def swap_step(space: Workspace, model: torch.nn.Module) -> Handle:
    """Swaps as `plan.json` says, without planning again."""
    stored = read_json(space.file("plan.json"))
    names = [row["name"] for row in stored["rows"] if row["action"] == "swap"]
    config = SwapConfig(**stored["config"])
    return swap_(model, plan(model, region=space.protocol.region, target=names, config=config))


def calibrate_step(space: Workspace, handle: Handle, folder: Path) -> dict[str, Any]:
    """Calibrates on the inner training images only; writes the model to `folder` and `calibration.json`."""
    images = space.image_set("train")
    config = CalibrateConfig(**{**space.protocol.calibration, "seed": space.seed})
    say(
        f"calibrating {len(handle.names)} mixers on {min(len(images), config.max_images)} training images, without labels"
    )
    unfinished = folder.with_name(UNFINISHED)
    loader = make_loader(images, 64, shuffle_seed=config.seed)
    report = calibrate(handle, loader, config=config, checkpoint=unfinished)
    save(handle.model, folder, overwrite=True)
    document = {**space.stamp(), "setting": read_json(space.file("plan.json"))["setting"], **report.to_dict()}
    write_json(space.file("calibration.json"), document)
    drop_checkpoint(unfinished)
    say(f"calibrated: {report.summary()} on held-out images, {report.updates} updates, {report.seconds:.0f} s.")
    return document


def swapped_start(space: Workspace) -> torch.nn.Module:
    """The swapped and calibrated start of the arm, made now or read back."""
    calibrated = space.arm("mrl") / "calibrated"
    if calibrated.is_dir() and space.file("calibration.json").is_file():
        return load(calibrated)
    model = space.new_classifier().eval()
    if not space.file("plan.json").is_file():
        plan_step(space, model)
    calibrate_step(space, swap_step(space, model), calibrated)
    return load(calibrated)


def fit_step(space: Workspace, arm: str, *, overwrite: bool = False) -> dict[str, Any]:
    """Fits one arm of the protocol and keeps its best candidate; resumes where a killed fit stopped.

    In a fold it fits twice. The first, on the inner part of the fold's training side, chooses the strength of the probe
    and the update that is kept, on the fold's inner validation side; the second, on the whole training side, runs as far
    and chooses nothing. Every fold chooses anew inside its own training side: one choice for all folds would have been
    made on images that other folds test. Both arms have the same candidates, seeds and start.
    """
    if arm not in ARMS:
        raise ConfigError(f"--arm {arm}: unknown; use {' or '.join(ARMS)}.")
    folder = space.arm(arm)
    refuse_existing(folder / "model", overwrite)
    if overwrite and folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    begun = _start(space, arm), space.image_set("train"), space.image_set("val")  # these write calibration and split
    if world() > 1:
        share({"fold": space.out.name if space.refits else None, "arm": arm, "tracker": space.tracking().kind})
    model = train_step(space, arm, begun[0])
    about = {
        **space.stamp(),
        "arm": arm,
        "preprocess": space.preprocess.to_dict(),
        "classes": list(space.source.classes),
        "seed": space.seed,
    }
    save(model, folder / "model", meta=about)
    if space.refits:
        (folder / FEATURES).unlink(missing_ok=True)
        for name in ("best.safetensors", "start.safetensors"):
            (folder / INNER / name).unlink(missing_ok=True)
    return read_json(folder / "fit.json")


def train_step(space: Workspace, arm: str, model: torch.nn.Module | None = None) -> torch.nn.Module:
    """The updates of `fit_step`, which all processes of a launch make together; returns the fitted model.

    Args:
        space: the run or the fold, with its split and the start of the arm on disk.
        arm: to fit.
        model: what the fit begins from, where it was built already.
    """
    protocol, config, folder = space.protocol, FitConfig(**space.protocol.budget), space.arm(arm)
    model = _start(space, arm) if model is None else model
    train = space.image_set("train", augment=config.augment, seed=space.seed)
    val = space.image_set("val")
    meta = {"protocol_sha256": protocol.sha256()}
    told = {"seed": space.seed, "arm": arm, "metric": protocol.metric}
    say(f"fitting {arm}: {len(train)} training and {len(val)} validation images")
    if not space.refits:
        fit(model, train, val, config, folder, **told, meta=meta, tracking=space.tracking(arm))
        return model
    kept, tracking = folder / FEATURES, space.tracking(arm, INNER)
    chosen = fit(model, train, val, config, folder / INNER, **told, features=kept, meta=meta, tracking=tracking)
    model = _start(space, arm)
    whole = space.image_set("train", "val", augment=config.augment, seed=space.seed)
    say(f"fitting {arm} on all {len(whole)} images of the training side, as far as update {chosen.best_update} was")
    refit(model, whole, chosen, config, folder, meta=meta, features=kept, tracking=space.tracking(arm))
    return model


def _start(space: Workspace, arm: str) -> torch.nn.Module:
    """What an arm's fit begins from; the same every time it is asked for."""
    return space.new_classifier() if arm == "baseline" else swapped_start(space)
