"""Getting the accuracy back without labels: statistics, then each mixer learns to answer as its attention did."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from mrl.errors import ConfigError
from mrl.precision import has_bf16
from mrl.run import progress
from mrl.swap.apply import Handle
from mrl.swap.calls import Call, normalised, rows_of
from mrl.swap.modes import evaluating
from mrl.swap.neutral import collect_statistics, search_temperature

STAGES = ("stats", "layers", "features")
STATS_IMAGES = 256
TEMPERATURE_IMAGES = 32


@dataclass(frozen=True)
class CalibrateConfig:
    """How a swapped model is calibrated.

    Args:
        epochs: passes of the stage `layers` over the images.
        feature_epochs: passes of the stage `features`.
        min_updates: updates of either stage however few images there are.
        batch_size: images an update.
        lr_new: learning rate of the new parameters.
        lr_inherited: learning rate of the inherited q, k, v and output projections.
        held_out: share of the images that measures every stage and trains none.
        max_images: images used at most.
        augment: mirror half of the batches, for teacher and student alike.
        bf16: bfloat16 autocast; None is where the hardware has it.
        seed: order of the images and their flips.
    """

    epochs: float = 1.0
    feature_epochs: float = 1.5
    min_updates: int = 60
    batch_size: int = 16
    lr_new: float = 3e-3
    lr_inherited: float = 2e-4
    held_out: float = 0.1
    max_images: int = 2000
    augment: bool = True
    bf16: bool | None = None
    seed: int = 0


@dataclass
class StageReport:
    """What one stage did: held-out errors by layer, before and after, and what it cost."""

    stage: str
    updates: int
    seconds: float
    error_before: dict[str, float]
    error_after: dict[str, float]
    accepted: list[str]

    @property
    def mean_error_before(self) -> float:
        """Mean over the layers before the stage."""
        return sum(self.error_before.values()) / len(self.error_before)

    @property
    def mean_error_after(self) -> float:
        """Mean over the layers after the stage, rejected layers at their old error."""
        return sum(self.error_after.values()) / len(self.error_after)


@dataclass
class CalibrationReport:
    """All stages of a calibration."""

    stages: list[StageReport] = field(default_factory=list)
    n_images: int = 0
    n_held_out: int = 0
    config: CalibrateConfig = field(default_factory=CalibrateConfig)

    @property
    def updates(self) -> int:
        """Optimizer steps of all stages."""
        return sum(stage.updates for stage in self.stages)

    @property
    def seconds(self) -> float:
        """Wall time of all stages."""
        return sum(stage.seconds for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as in a run's `calibration.json`."""
        stages = [
            {**asdict(s), "mean_error_before": s.mean_error_before, "mean_error_after": s.mean_error_after}
            for s in self.stages
        ]
        return {
            "schema": 1,
            "stages": stages,
            "updates": self.updates,
            "seconds": self.seconds,
            "n_images": self.n_images,
            "n_held_out": self.n_held_out,
            "layers": next((s.error_after for s in reversed(self.stages) if s.stage == "layers"), {}),
            "restored": [],
            "config": asdict(self.config),
        }


def calibrate(
    handle: Handle,
    loader: Iterable[Any],
    stages: Sequence[str] = STAGES,
    config: CalibrateConfig | None = None,
) -> CalibrationReport:
    """Brings a swapped model back toward its teacher, from images without labels.

    `stats` sets the running statistics of the region norms (neutrally: the function does not change in eval) and searches
    one temperature a head. `layers` trains each mixer to give its teacher's output on the teacher's and, every second
    update, on the student's own activations: error = |ours - theirs|^2 / |theirs|^2, prefix rows and patch rows apart.
    `features` trains all mixers together to give the teacher's final features: error = mean of ((ours - theirs) / spread)^2
    with the teacher's spread of each feature, and the tokens of the last block beside it. Only the mixers change.
    Every stage is measured on held-out images; a layer that it did not improve keeps its old values.

    Args:
        handle: of `mrl.swap_`, with its originals.
        loader: batches of preprocessed images (B, 3, H, W): tensors, tuples that start with one, or {"image": tensor}.
        stages: of "stats", "layers", "features", in order.
        config: budget and rates.

    Raises:
        ConfigError: an unknown stage, fewer than 4 images, or images of several sizes.
        SwapError: the originals were discarded.

    Reference:
        LoLCATs (arXiv:2410.10254) and MiR (arXiv:2201.02620) for matching layers; held-out rejection is ours.

    Example:
        >>> import timm, mrl
        >>> net = timm.create_model("test_vit", img_size=32)
        >>> handle = mrl.swap_(net, mrl.plan(net, region=2))
        >>> report = calibrate(handle, [torch.randn(8, 3, 32, 32)], config=CalibrateConfig(min_updates=2, batch_size=4))
        >>> [stage.stage for stage in report.stages]
        ['stats', 'layers', 'features']
    """
    config = config or CalibrateConfig()
    unknown = [s for s in stages if s not in STAGES]
    if unknown:
        raise ConfigError(f"calibrate(stages={list(stages)}): unknown {unknown[0]!r}; use {', '.join(STAGES)}.")
    images = _collect(loader, config.max_images)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(config.seed))
    n_held = min(max(2, round(len(images) * config.held_out)), 256)
    held, train = images[order[:n_held]], images[order[n_held:]]
    device = next(handle.model.parameters()).device
    report = CalibrationReport(n_images=len(images), n_held_out=n_held, config=config)
    calibrator = _Calibrator(handle, config, held.to(device), train, device)
    rng = torch.random.get_rng_state()
    with evaluating(handle.model):
        for stage in stages:
            report.stages.append(calibrator.run(stage))
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
    if count < 4:
        raise ConfigError(f"calibrate: {count} images; give at least 4, better 64 to 2,000.")
    if len({tuple(t.shape[1:]) for t in found}) > 1:
        raise ConfigError("calibrate: the batches have images of several sizes; give one size.")
    return torch.cat(found)[:max_images]


class _Calibrator:
    """The state that the stages share: held-out activations of the teacher, and the mixers."""

    def __init__(
        self, handle: Handle, config: CalibrateConfig, held: Tensor, train: Tensor, device: torch.device
    ) -> None:
        self.handle, self.config, self.train, self.device = handle, config, train, device
        self.mixers = handle.mixers()
        self.held = held
        bf16 = config.bf16 if config.bf16 is not None else has_bf16(device)
        self.autocast = lambda: torch.autocast(device.type, torch.bfloat16, enabled=bf16)

    def run(self, stage: str) -> StageReport:
        """One stage, measured on the held-out images before and after; what lost keeps its old values."""
        start = time.monotonic()
        measure = self.feature_error if stage == "features" else self.errors
        before = measure()
        old = {name: {k: v.clone() for k, v in m.state_dict().items()} for name, m in self.mixers.items()}
        updates = getattr(self, f"_{stage}")()
        after = measure()
        accepted = [n for n in after if after[n] <= before[n] or stage == "stats"]
        lost = (
            self.mixers
            if stage == "features" and not accepted
            else self.mixers.keys() - set(accepted)
            if stage == "layers"
            else ()
        )
        for name in lost:
            self.mixers[name].load_state_dict(old[name])
        after = {n: after[n] if n in accepted else before[n] for n in after}
        return StageReport(stage, updates, time.monotonic() - start, before, after, accepted)

    @torch.no_grad()
    def errors(self) -> dict[str, float]:
        """Held-out normalised error of every mixer on the teacher's activations."""
        total = dict.fromkeys(self.mixers, 0.0)
        chunks = self.held.split(32)
        for chunk in chunks:
            for name, seen in self._teacher(chunk).items():
                total[name] += float(self._error(name, seen.run(self.mixers[name]), seen.output)) * len(chunk)
        return {name: value / len(self.held) for name, value in total.items()}

    def _error(self, name: str, ours: Any, theirs: Any) -> Tensor:
        """Normalised squared error; prefix rows, where they are not exact by construction, count as a part of their own."""
        ours, theirs = (rows_of(self.mixers[name], output) for output in (ours, theirs))
        prefix = self.mixers[name].mrl.num_prefix_tokens
        exact = self.mixers[name].mrl.config.prefix == "exact"
        ours, theirs = ours.float(), theirs.float()
        parts = [normalised(ours[:, prefix:], theirs[:, prefix:])]
        if prefix and not exact:
            parts.append(normalised(ours[:, :prefix], theirs[:, :prefix]))
        return sum(parts) / len(parts)

    @torch.no_grad()
    def _teacher(self, images: Tensor) -> dict[str, Call]:
        """Calls of the original attention modules and what they answered."""
        with self.handle.disabled(), self._recording() as seen, self.autocast():
            self.handle.model(images)
        return seen

    @torch.no_grad()
    def _student(self, images: Tensor) -> dict[str, Call]:
        """Calls of the mixers in the swapped model."""
        with self._recording() as seen, self.autocast():
            self.handle.model(images)
        return seen

    @contextlib.contextmanager
    def _recording(self) -> Iterator[dict[str, Call]]:
        seen: dict[str, Call] = {}
        hooks = []
        for name in self.mixers:

            def keep(module: nn.Module, args: tuple, kwargs: dict, output: Any, name: str = name) -> None:
                seen[name] = Call(*tree_map_only(Tensor, Tensor.detach, (args, kwargs)), output)

            hooks.append(self.handle.model.get_submodule(name).register_forward_hook(keep, with_kwargs=True))
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def _stats(self) -> int:
        """Running statistics of the norms from one pass on the student's activations, then a temperature a head."""

        def look() -> None:
            with self.autocast():
                for batch in self.train[:STATS_IMAGES].split(64):
                    self.handle.model(batch.to(self.device))

        collect_statistics(list(self.mixers.values()), look)
        recorded = self._teacher(self.train[:TEMPERATURE_IMAGES].to(self.device))
        for name, seen in recorded.items():
            search_temperature(
                self.mixers[name].mrl,
                lambda seen=seen, name=name: self._error(name, seen.run(self.mixers[name]), seen.output),
            )
        return 0

    def _layers(self) -> int:
        """AdamW on every mixer at once; the layers do not see each other."""
        return self._train(
            "layers", self.config.epochs, lambda images, update: self._match_layers(images, own=update % 2 == 1)
        )

    def _features(self) -> int:
        """AdamW on all mixers through the whole network."""
        self.spread = self._teacher_spread()
        return self._train("features", self.config.feature_epochs, lambda images, update: self._match_features(images))

    def _train(self, stage: str, epochs: float, step: Callable[[Tensor, int], float]) -> int:
        config, n = self.config, len(self.train)
        per_epoch = max(1, n // config.batch_size)
        updates = max(config.min_updates, round(epochs * per_epoch))
        optimizer, flags = self._optimizer()
        warm = max(1, round(0.1 * updates))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda u: min((u + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * (u - warm) / (updates - warm + 1)))
        )
        generator = torch.Generator().manual_seed(config.seed)
        order = torch.cat([torch.randperm(n, generator=generator) for _ in range(updates * config.batch_size // n + 1)])
        with progress(f"calibrating {stage}", updates) as advance:
            for update in range(updates):
                picked = order[update * config.batch_size :][: config.batch_size]
                images = self._augmented(self.train[picked], generator).to(self.device)
                loss = step(images, update)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                schedule.step()
                advance(note=f"error {loss:.3f}")
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        return updates

    def _optimizer(self) -> tuple[torch.optim.Optimizer, list[tuple[nn.Parameter, bool]]]:
        new, inherited, flags = [], [], []
        for mixer in self.mixers.values():
            for name, parameter in mixer.named_parameters():
                flags.append((parameter, parameter.requires_grad))
                if parameter.is_floating_point():
                    parameter.requires_grad_(True)
                    (new if name.startswith("mrl.") else inherited).append(parameter)
        groups = [
            {"params": new, "lr": self.config.lr_new, "weight_decay": 0.0},
            {"params": inherited, "lr": self.config.lr_inherited, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, betas=(0.9, 0.95)), flags

    def _match_features(self, images: Tensor) -> float:
        with torch.no_grad(), self.handle.disabled(), self._last_block() as theirs, self.autocast():
            target = self._final(images)
        with self._last_block() as ours, self.autocast():
            found = self._final(images)
        loss = self._feature_loss(found, target) + normalised(ours[0].float(), theirs[0].float())
        loss.backward()
        return float(loss.detach())

    def _feature_loss(self, ours: Tensor, theirs: Tensor) -> Tensor:
        return ((ours.float() - theirs.float()) / self.spread).square().mean()

    def _final(self, images: Tensor) -> Tensor:
        """The features that a head reads: (B, F), or the model's output where it shows none."""
        model = self.handle.model
        found = model.features(images) if hasattr(model, "features") and callable(model.features) else model(images)
        return found.flatten(1)

    @contextlib.contextmanager
    def _last_block(self) -> Iterator[list[Tensor]]:
        """The output of the block around the last mixer."""
        block = self.handle.model.get_submodule(list(self.mixers)[-1].rpartition(".")[0])
        seen: list[Tensor] = []
        hook = block.register_forward_hook(lambda module, args, output: seen.append(output))
        try:
            yield seen
        finally:
            hook.remove()

    @torch.no_grad()
    def _teacher_spread(self) -> Tensor:
        """The standard deviation of each final feature of the teacher over the held-out images."""
        with self.handle.disabled(), self.autocast():
            found = torch.cat([self._final(chunk).float() for chunk in self.held.split(32)])
        return found.std(0).clamp(min=1e-6 + 1e-3 * float(found.std()))

    @torch.no_grad()
    def feature_error(self) -> dict[str, float]:
        """Held-out error of the final features, in units of the teacher's spread."""
        self.spread = self._teacher_spread()
        total = 0.0
        for chunk in self.held.split(32):
            with self.handle.disabled(), self.autocast():
                target = self._final(chunk)
            with self.autocast():
                total += float(self._feature_loss(self._final(chunk), target)) * len(chunk)
        return {"final features": total / len(self.held)}

    def _match_layers(self, images: Tensor, own: bool) -> float:
        """Gradients of all layers on one batch: on the teacher's activations, or on the student's with the teacher's module."""
        calls = self._student(images) if own else self._teacher(images)
        total = 0.0
        for name, call in calls.items():
            target = self.teacher_output(name, call) if own else call.output
            with self.autocast():
                ours = call.run(self.mixers[name])
            loss = self._error(name, ours, target)
            loss.backward()
            total += float(loss.detach())
        return total / len(calls)

    @torch.no_grad()
    def teacher_output(self, name: str, call: Call) -> Any:
        """What the original attention makes of these tokens."""
        with self.handle.disabled(), self.autocast():
            return call.run(self.handle.model.get_submodule(name))

    def _augmented(self, images: Tensor, generator: torch.Generator) -> Tensor:
        if not self.config.augment:
            return images
        return images.flip(-1) if torch.rand((), generator=generator) < 0.5 else images
