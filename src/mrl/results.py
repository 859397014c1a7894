"""The verbs after training: predictions, comparison, cost, export and report, each from the files before it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mrl.arms import BASELINE, MRL, check_arm
from mrl.compare import compare
from mrl.compare_folds import compare_folds
from mrl.data import ImageSet, Preprocess, header_of, load_source
from mrl.decision import comparisons_of, decision_of, latency_of
from mrl.deploy.formats import check_choice
from mrl.errors import ConfigError
from mrl.evaluate import evaluate_arm, write_evaluation, write_predictions
from mrl.export import Lossy, export_model, file_name
from mrl.measure import measure_arms
from mrl.models.build import preprocess_of
from mrl.report import report
from mrl.run import read_json, refuse_existing, say, write_json
from mrl.swap import load
from mrl.workspace import Workspace

PARITY_IMAGES = 256
MEASURE_SECONDS = 45.0  # that `mrl measure` takes, about
OTHER_SIZES = (224, 448, 896)  # pixels, measured beside the protocol's


def evaluate_step(space: Workspace, *, overwrite: bool = False) -> None:
    """Scores the fitted arms once on the test side; writes `predictions.csv` and `evaluation.json`."""
    path = refuse_existing(space.file("predictions.csv"), overwrite)
    found, parts = [], {}
    for arm in space.protocol.arms:
        images = space.image_set("test", arm=arm)
        say(f"predicting {len(images)} test images with {arm}")
        predictions, parts[arm] = evaluate_arm(
            space.fitted(arm),
            space.arm(arm),
            images,
            metric=space.protocol.metric,
            repeat=space.repeat,
            fold=space.fold,
        )
        found.append(predictions)
        for warning in parts[arm]["warnings"]:
            say(warning)
    write_evaluation(space.file("evaluation.json"), parts, space.stamp())
    write_predictions(path, found)


def compare_step(space: Workspace, *, overwrite: bool = False) -> dict[str, Any]:
    """Compares the stored predictions; writes `comparison.json`."""
    found = (compare_folds if space.protocol.folds else compare)(space.out, overwrite=overwrite)
    for arm, score in found["arms"].items():
        say(f"{arm}: {space.protocol.metric} {_percent(score)}")
    for one in comparisons_of(found):
        difference = one["difference"]
        ends = [difference[k] for k in ("low", "high")]
        points = "no interval" if None in ends else ", ".join(f"{100 * end:+.1f}" for end in ends)
        how = f" ({found['folds']['n_fits']} fits an arm, {one['method']})" if found.get("folds") else ""
        if found.get("comparisons"):
            how += f", {100 * (1 - one['interval_alpha']):.4g} % interval, p after Holm {one['p_adjusted']:.3f}"
        say(f"{one['arm']} - baseline: {100 * difference['estimate']:+.1f} points ({points}): {one['verdict']}{how}")
    return found


def _percent(score: dict[str, Any]) -> str:
    ends = "no interval"
    if score["low"] is not None and score["high"] is not None:
        ends = f"{100 * score['low']:.1f} to {100 * score['high']:.1f}"
    return f"{100 * score['estimate']:.1f} % ({ends}), n = {score['n']}"


def measure_step(space: Workspace, *, overwrite: bool = False) -> dict[str, Any]:
    """Measures the fitted arms side by side; writes `measure.json`."""
    path = refuse_existing(space.file("measure.json"), overwrite)
    protocol = space.protocol
    test = space.image_set("test")
    models = {arm: space.fitted(arm) for arm in protocol.arms}
    images = torch.stack([test[i]["image"] for i in range(min(len(test), 32))])
    found = measure_arms(
        models,
        image_size=tuple(protocol.image_size),
        images=images,
        seed=protocol.seed,
        other_sizes=OTHER_SIZES,
        time_budget_s=MEASURE_SECONDS * len(models) / 2,
        files=[s.path for s in test.samples[:64]],
        preprocess=space.preprocess,
    )
    write_json(path, {**space.stamp(), **found})
    for arm in [arm for arm in models if arm != BASELINE]:
        ratio, verdict = latency_of(found, arm)
        text = f"x{ratio['estimate']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"
        say(f"latency {arm} / baseline: {text}: {verdict}")
    return found


def decide_step(space: Workspace) -> dict[str, Any]:
    """The decision, from what is stored."""
    return decision_of(read_json(space.file("comparison.json")), read_json(space.file("measure.json")), space.protocol)


def export_step(
    space: Workspace,
    *,
    arm: str | None = None,
    format: str = "onnx",
    precision: str = "fp32",
    max_drop: float = 0.005,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Exports the arm that was decided for, or `arm`, proved equal on real test images; writes the file and `export.json`.

    Below float32 the proof takes every image that neither set a weight nor a range: the validation and the test side. Where the
    arm was fitted once more on all of the training side (folds), or for int8, whose accuracy control saw the validation side,
    that is the test side alone.
    """
    check_choice(format, precision)
    path = refuse_existing(space.file(file_name(format, precision)), overwrite)
    if arm is None:
        decided = decide_step(space)
        arm = decided.get("arm", MRL) if decided["decision"] == "go" else BASELINE
    protocol, chosen = space.protocol, space.arms[check_arm(arm, space.protocol.arms)]
    test = space.image_set("test", arm=arm)
    images: Any = _of_every_kind(space, arm, test) if precision == "fp32" else test
    lossy = Lossy(precision, max_drop)
    if precision != "fp32":
        judges = test if protocol.folds or precision == "int8" else space.image_set("val", "test", arm=arm)
        images, more = judges, {}
        if precision == "int8":
            train, val = space.image_set("train", arm=arm), space.image_set("val", arm=arm)
            more = {"calibration": _Items(train), "validation": _Items(val), "validation_targets": val.labels}
        lossy = Lossy(precision, max_drop, protocol.metric, judges.labels, **more)
    meta = {
        "arm": arm,
        "protocol_sha256": protocol.sha256(),
        "seed": protocol.seed,
        "model": _without_folder(chosen.model),
        "weights": _without_folder(chosen.weights),
        "data_terms": space.source.terms,
    }
    found = export_model(
        space.fitted(arm),
        path,
        preprocess=space.preprocess_for(arm),
        classes=space.source.classes,
        images=images,
        meta=meta,
        overwrite=overwrite,
        lossy=lossy,
    )
    if path.name == "model.onnx":
        write_json(space.file("export.json"), found)
    say(f"exported {arm} to {path}: {_proved(found['parity'])}")
    return found


def export_saved(
    folder: Path | str,
    *,
    data: str,
    image_size: int | None = None,
    format: str = "onnx",
    precision: str = "fp32",
    max_drop: float = 0.005,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Exports a folder of `mrl.save` beside its weights, proved on labelled images of `data`.

    The folder's own preprocessing and classes are used where a fit wrote them; else the model's own mean, standard deviation and
    interpolation, and the classes of `data`. For int8 every fourth image judges, and the others set the ranges. Below float32 the
    images of `data` have to be ones that the model was not trained on: it is nearly sure of those, and the drop looks too small.

    Args:
        folder: of `mrl.save`.
        data: folder of class folders, CSV, or elpv.
        image_size: pixels, of a model that does not say its own; None is the model's own.
        format: "onnx", "openvino" or "torch-export".
        precision: "fp32", "fp16", "bf16" or "int8".
        max_drop: of the accuracy, as a share.
        overwrite: replace a file that is there.

    Raises:
        ConfigError: no image size to be found, another one than the model was fitted at, or a file that is there.
        DataError: labels that are not the model's classes.
        ParityError: not equal, or a drop that may be larger than `max_drop`.
    """
    check_choice(format, precision)
    path = refuse_existing(Path(folder) / file_name(format, precision), overwrite)
    model, source = load(folder), load_source(data)
    meta = model.mrl_meta
    if meta.get("preprocess"):
        preprocess, classes = Preprocess.from_dict(meta["preprocess"]), tuple(meta["classes"])
        if image_size is not None and preprocess.image_size != (image_size, image_size):
            fixed = " x ".join(map(str, preprocess.image_size))
            raise ConfigError(f"--image-size {image_size}: {folder} was fitted at {fixed} pixels; leave the flag out.")
    else:
        own = getattr(getattr(getattr(model, "backbone", model), "patch_embed", None), "img_size", None)
        size = (image_size, image_size) if image_size is not None else own
        if size is None:
            raise ConfigError(f"{folder}: does not say its image size; give --image-size.")
        preprocess, classes = Preprocess(tuple(size), **preprocess_of(model)), source.classes
    images = ImageSet(source.samples, classes, preprocess)
    judges, lossy = images, Lossy(precision, max_drop, targets=images.labels)
    if precision == "int8":
        judges = ImageSet(source.samples[::4], classes, preprocess)
        others = ImageSet([s for i, s in enumerate(source.samples) if i % 4], classes, preprocess)
        half = ImageSet(others.samples[::2], classes, preprocess)
        lossy = Lossy(
            precision, max_drop, targets=judges.labels, calibration=_Items(others), validation=_Items(half),
            validation_targets=half.labels,
        )  # fmt: skip
    kinds = [header_of(sample.path) for sample in judges.samples] if precision == "fp32" else []
    shown: Any = [judges[i]["image"] for i in _varied(kinds, PARITY_IMAGES)] if precision == "fp32" else judges
    more = {"preprocess": preprocess, "classes": classes, "images": shown, "overwrite": overwrite, "lossy": lossy}
    found = export_model(model, path, meta={"data_terms": source.terms}, **more)
    say(f"exported {folder} to {path}: {_proved(found['parity'])}")
    return found


def _proved(parity: dict[str, Any]) -> str:
    if parity.get("drop") is None:
        return f"equal on {parity['n_images']} images (largest difference {parity['max_abs_diff']:.1e})."
    drop, metric = parity["drop"], parity["metric"].replace("_", " ")
    return (
        f"{parity['flips']} of {parity['n_images']} decisions changed; {metric} drops by {100 * drop['estimate']:.2f} points, "
        f"with 95 % confidence by less than {100 * drop['high']:.2f}."
    )


def _of_every_kind(space: Workspace, arm: str, test: ImageSet) -> list[torch.Tensor]:
    """Test images for the proof in float32, which estimates nothing: evenly spread, and one of every size and mode of the data set.

    A kind that the test side does not have is shown by an image of another side.
    """

    def kinds(images: ImageSet) -> list[tuple[str, str]]:
        files = [space.audit.files[sample.image] for sample in images.samples]
        return [(file.size, file.mode) for file in files]

    rest, tested = space.image_set("train", "val", arm=arm), kinds(test)
    found, images = set(tested), [test[i]["image"] for i in _varied(tested, PARITY_IMAGES)]
    for i, kind in enumerate(kinds(rest)):
        if kind not in found:
            found.add(kind)
            images.append(rest[i]["image"])
    return images


def _without_folder(name: str | None) -> str | None:
    """A timm name or `package.module:factory` as it is; of a path the last part, since a file tells nothing of this machine."""
    if name is None or not (Path(name).is_absolute() or name.startswith((".", "~")) or Path(name).exists()):
        return name
    return Path(name).name


class _Items(Sequence):
    """The images of a set without their labels."""

    def __init__(self, images: ImageSet) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> torch.Tensor:
        return self.images[row]["image"]


def _varied(kinds: Sequence[Any], most: int) -> list[int]:
    """Indices of one of every kind (size and mode of the file), however many, and evenly over all up to `most`.

    Example:
        >>> _varied(["L", "L", "L", "L", "RGB"], 2), _varied(["L", "RGB", "1"], 2)
        ([0, 4], [0, 1, 2])
    """
    first: dict[Any, int] = {}
    for index, kind in enumerate(kinds):
        first.setdefault(kind, index)
    rows = dict.fromkeys([*first.values(), *_spread(len(kinds), most)])
    return sorted(list(rows)[: max(most, len(first))])


def _spread(n: int, most: int) -> list[int]:
    """At most `most` indices, evenly over n."""
    return [i * n // min(n, most) for i in range(min(n, most))]


def report_step(space: Workspace, *, lang: str = "en", price_per_hour: float | None = None, currency: str = "") -> Path:
    """Writes `report.json` and `report.html` and prints the decision."""
    path = report(space.out, lang=lang, price_per_hour=price_per_hour, currency=currency, overwrite=True)
    found = read_json(space.file("report.json"))
    say(f"decision: {found['decision'].upper()}")
    for reason in found["reasons"]:
        say(f"  {reason}")
    return path
