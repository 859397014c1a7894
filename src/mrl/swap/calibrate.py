"""Getting the accuracy back without labels: statistics, then each mixer learns to answer as its attention did."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mrl.errors import ConfigError
from mrl.swap.apply import Handle
from mrl.swap.calibration import TRAINED, CalibrateConfig, CalibrationReport, StageReport
from mrl.swap.calibrator import STAGES, Calibrator
from mrl.swap.modes import evaluating
from mrl.swap.resume import Resume, facts_of

FEWEST = 4
"""Images, below which nothing is calibrated."""


def calibrate(
    handle: Handle,
    loader: Iterable[Any],
    stages: Sequence[str] = STAGES,
    config: CalibrateConfig | None = None,
    after_stage: Callable[[StageReport], None] | None = None,
    checkpoint: Path | str | None = None,
) -> CalibrationReport:
    """Brings a swapped model back toward its teacher, from images without labels.

    `stats` sets the running statistics of the region norms (neutrally: the function does not change in eval) and searches
    one temperature a head. `ridge` solves in closed form, on the teacher's activations, for each local convolution with its
    gain and then for each output projection, pulled toward what they were. `layers` trains each mixer to give its
    teacher's output on the teacher's and, every second update, on the student's own activations: error = |ours - theirs|^2 /
    |theirs|^2, prefix rows and patch rows apart. The last of these two ends with one pass along the residual stream
    (`mrl.swap.stream`): with the student's own inputs, every output projection, and with `scope="blocks"` the last Linear of every
    block, is solved so that the stream after it comes back to the teacher's. `features` trains the blocks together,
    through the whole network, to give the teacher's final features: error = mean of ((ours - theirs) / spread)^2 with the
    teacher's spread of each feature. The loss is the same error after whitening by the teacher's correlations, and the
    normalised error of the blocks' outputs. Nothing outside the blocks changes;
    `handle.disabled()` and `handle.restore()` still give the original values.
    Every stage, and the pass, is measured on held-out images; what it did not improve keeps its old values.

    Args:
        handle: of `mrl.swap_`, with its originals.
        loader: batches of preprocessed images (B, 3, H, W): tensors, tuples that start with one, or {"image": tensor}.
        stages: of "stats", "ridge", "layers", "features", in order.
        config: budget and rates.
        after_stage: called with the report of each stage when it is done, the model in eval mode.
        checkpoint: folder that keeps the state about once a minute and after every stage; the same call on a fresh swap of
            the same model goes on from there and gives the same weights. Delete it when the model is saved.

    Raises:
        ConfigError: an unknown stage, fewer than 4 images, images of several sizes, or a checkpoint of another calibration.
        SwapError: the originals were discarded.

    Reference:
        LoLCATs (arXiv:2410.10254) and MiR (arXiv:2201.02620) for matching layers; PRACTISE (arXiv:2202.07861) for matching
        features; the pass along the stream and held-out rejection are ours.

    Example:
        >>> import timm, mrl
        >>> net = timm.create_model("test_vit", img_size=32)
        >>> handle = mrl.swap_(net, mrl.plan(net, region=2))
        >>> report = calibrate(handle, [torch.randn(8, 3, 32, 32)], config=CalibrateConfig(min_updates=2, batch_size=4))
        >>> [stage.stage for stage in report.stages]
        ['stats', 'ridge', 'layers', 'features']
    """
    config = config or CalibrateConfig()
    unknown = [s for s in stages if s not in STAGES]
    if unknown:
        raise ConfigError(f"calibrate(stages={list(stages)}): unknown {unknown[0]!r}; use {', '.join(STAGES)}.")
    images = _collect(loader, config.max_images)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(config.seed))
    n_held = min(max(2, round(len(images) * config.held_out)), 256)
    stages = [s for s in stages if s not in TRAINED or config.updates(s, len(images) - n_held)]
    held, train = images[order[:n_held]], images[order[n_held:]]
    device = next(handle.model.parameters()).device
    resume = Resume(checkpoint, facts_of(handle.names, stages, config, images) if checkpoint is not None else {})
    closing = next((s for s in reversed(stages) if s in ("ridge", "layers")), None)
    calibrator = Calibrator(handle, config, held.to(device), train, device, resume, closing)
    report = CalibrationReport(resume.reports, len(images), n_held, config)
    rng = torch.random.get_rng_state()
    with evaluating(handle.model):
        for stage in stages[len(report.stages) :]:
            done = calibrator.run(stage)
            if after_stage is not None:
                after_stage(done)
        if config.budget is not None:
            report.restored = [name for name, error in calibrator.layer_errors().items() if error > config.budget]
            handle.restore(report.restored)
            if report.restored and handle.names and closing is not None:
                calibrator.mixers = handle.mixers()
                calibrator.follow()  # what comes after them no longer has to make up for their errors
    torch.random.set_rng_state(rng)
    return report


def _collect(loader: Iterable[Any], max_images: int) -> Tensor:
    found: list[Tensor] = []
    count = 0
    for batch in loader:
        image = batch["image"] if isinstance(batch, dict) else batch[0] if isinstance(batch, (tuple, list)) else batch
        found.append(image.detach().cpu())
        count += len(image)
        if count >= max_images:
            break
    if count < FEWEST:
        raise ConfigError(f"calibrate: {count} images; give at least {FEWEST}, better 64 to 2,000.")
    if len({tuple(t.shape[1:]) for t in found}) > 1:
        raise ConfigError("calibrate: the batches have images of several sizes; give one size.")
    return torch.cat(found)[:max_images]
