"""The verbs on a run folder: each reads the files of the verbs before it and writes its own."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from mrl.arms import MRL, check_arm
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
from mrl.errors import ConfigError, DataError, MrlError
from mrl.fit import FitConfig, fit, refit
from mrl.models import build_model
from mrl.protocol import Protocol, was_changed, write_protocol
from mrl.ranks import share
from mrl.request import Request, make_protocol, pair_of, say_mde
from mrl.run import read_json, refuse_existing, say, world, write_json
from mrl.swap import CalibrateConfig, Handle, Plan, SwapConfig, calibrate, load, plan, save, swap_
from mrl.swap.plan import WORTH
from mrl.tuned import tuned_plan
from mrl.workspace import Workspace

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
        # The effects follow from the rest, and an earlier version counted them otherwise.
        protocol = replace(protocol, mde=space.protocol.mde)
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
        a, b = ({"tuned": (p.pop("tuned", None) or {}).get("sha256", "none")[:12], **p} for p in (a, b))
        differing = [k for k in {**a, **b} if a.get(k) != b.get(k)]
        shown = "; ".join(f"{k}: {a.get(k, 'none')} there, {b.get(k, 'none')} asked" for k in differing[:2])
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
        elif name == "arms":
            there_are = Request(**{**there, "budget": FitConfig(**protocol.budget), "arms": value}).more_arms()
            if list(there_are) != protocol.arms[2:]:
                raise ConfigError(f"--arms: the protocol of {space.out} has {protocol.arms}; use a new --out.")
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
    for name, arm in request.more_arms().items():
        try:
            net = build_model(arm["model"], arm["weights"], image_size=pair_of(request.image_size))
            if arm["swap"] != "none":
                plan(net, region=arm["region"], layers=arm["layers"])
        except MrlError as error:
            raise ConfigError(f"--arms: {name}: {error}") from error


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


def plan_step(space: Workspace, model: torch.nn.Module, arm: str = MRL, *, overwrite: bool = False) -> Plan:
    """Plans the swap of an arm, resolves "auto", writes `plan.json`.

    It times the blocks on a real training image. With folds every image is tested once, so it takes noise instead, once
    for all folds: one architecture is compared, and no image takes part in its choice.
    """
    path = refuse_existing(space.arm_file(arm, "plan.json"), overwrite)
    protocol, chosen = space.protocol, space.arms[arm]
    if protocol.folds:
        noise = torch.Generator().manual_seed(protocol.seed)
        image = torch.randn(1, 3, *protocol.image_size, generator=noise)
    else:
        image = space.image_set("train", arm=arm)[0]["image"][None]
    if protocol.tuned:
        found, setting = tuned_plan(model, protocol.tuned, image), "tuned"
    else:
        found, setting = resolve_swap(model, chosen.swap, chosen.region, chosen.layers, image)
    write_plan(path, found, setting, protocol.image_size, space.stamp(), overwrite=overwrite)
    ratio = found.predicted_latency_ratio
    say(
        f"swap: {len(found.names)} modules, {setting}; predicted time of the blocks x{ratio:.2f} of the original at {protocol.image_size[0]} px."
    )
    return found


def swap_step(space: Workspace, model: torch.nn.Module, arm: str = MRL) -> Handle:
    """Swaps as the arm's `plan.json` says, without planning again."""
    stored = read_json(space.arm_file(arm, "plan.json"))
    regions = {row["name"]: tuple(row["region"]) for row in stored["rows"] if row["action"] == "swap"}
    config = SwapConfig(**stored["config"])
    return swap_(model, plan(model, region=regions, target=list(regions), config=config))


def calibrate_step(space: Workspace, handle: Handle, folder: Path, arm: str = MRL) -> dict[str, Any]:
    """Calibrates on the inner training images only; writes the model to `folder` and the arm's `calibration.json`."""
    images = space.image_set("train", arm=arm)
    config = CalibrateConfig(**{**space.protocol.calibration, "seed": space.seed})
    say(
        f"calibrating {len(handle.names)} mixers on {min(len(images), config.max_images)} training images, without labels"
    )
    unfinished = folder.with_name(UNFINISHED)
    loader = make_loader(images, 64, shuffle_seed=config.seed)
    report = calibrate(handle, loader, config=config, checkpoint=unfinished)
    save(handle.model, folder, overwrite=True)
    setting = read_json(space.arm_file(arm, "plan.json"))["setting"]
    document = {**space.stamp(), "setting": setting, **report.to_dict()}
    write_json(space.arm_file(arm, "calibration.json"), document)
    drop_checkpoint(unfinished)
    say(f"calibrated: {report.summary()} on held-out images, {report.updates} updates, {report.seconds:.0f} s.")
    return document


def swapped_start(space: Workspace, arm: str = MRL) -> torch.nn.Module:
    """The swapped and calibrated start of an arm, made now or read back."""
    calibrated = space.arm(arm) / "calibrated"
    if calibrated.is_dir() and space.arm_file(arm, "calibration.json").is_file():
        return load(calibrated)
    model = space.new_classifier(arm).eval()
    if not space.arm_file(arm, "plan.json").is_file():
        plan_step(space, model, arm)
    calibrate_step(space, swap_step(space, model, arm), calibrated, arm)
    return load(calibrated)


def fit_step(space: Workspace, arm: str, *, overwrite: bool = False) -> dict[str, Any]:
    """Fits one arm of the protocol and keeps its best candidate; resumes where a killed fit stopped.

    In a fold it fits twice. The first, on the inner part of the fold's training side, chooses the strength of the probe
    and the update that is kept, on the fold's inner validation side; the second, on the whole training side, runs as far
    and chooses nothing. Every fold chooses anew inside its own training side: one choice for all folds would have been
    made on images that other folds test. All arms have the same seeds and, where theirs do not differ, the same budget.
    """
    check_arm(arm, space.protocol.arms)
    folder = space.arm(arm)
    refuse_existing(folder / "model", overwrite)
    if overwrite and folder.exists():
        for path in [path for path in folder.iterdir() if path.name != "plan.json"]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    begun = _start(space, arm), space.image_set("train", arm=arm), space.image_set("val", arm=arm)
    if world() > 1:  # calibration and split are on disk now
        share({"fold": space.name, "arm": arm, "tracker": space.tracking().kind})
    model = train_step(space, arm, begun[0])
    about = {
        **space.stamp(),
        "arm": arm,
        "preprocess": space.preprocess_for(arm).to_dict(),
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
    protocol, config, folder = space.protocol, space.budget("train", arm=arm), space.arm(arm)
    model = _start(space, arm) if model is None else model
    train = space.image_set("train", augment=config.augment, seed=space.seed, arm=arm)
    val = space.image_set("val", arm=arm)
    meta = {"protocol_sha256": protocol.sha256()}
    told = {"seed": space.seed, "arm": arm, "metric": protocol.metric}
    say(f"fitting {arm}: {len(train)} training and {len(val)} validation images")
    if not space.refits:
        fit(model, train, val, config, folder, **told, meta=meta, tracking=space.tracking(arm))
        return model
    kept, tracking = folder / FEATURES, space.tracking(arm, INNER)
    chosen = fit(model, train, val, config, folder / INNER, **told, features=kept, meta=meta, tracking=tracking)
    model = _start(space, arm)
    whole = space.image_set("train", "val", augment=config.augment, seed=space.seed, arm=arm)
    say(f"fitting {arm} on all {len(whole)} images of the training side, as far as update {chosen.best_update} was")
    config = space.budget("train", "val", arm=arm)
    refit(model, whole, chosen, config, folder, meta=meta, features=kept, tracking=space.tracking(arm))
    return model


def _start(space: Workspace, arm: str) -> torch.nn.Module:
    """What an arm's fit begins from; the same every time it is asked for."""
    return swapped_start(space, arm) if space.arms[arm].swapped else space.new_classifier(arm)
