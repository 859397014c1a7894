"""The stages of a calibration."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from mrl.checkpoint import load_optimizer, optimizer_tensors
from mrl.precision import has_bf16
from mrl.run import progress
from mrl.swap.apply import Handle
from mrl.swap.calibration import CalibrateConfig, StageReport
from mrl.swap.calls import Call, first_tensor, normalised, rows_of
from mrl.swap.features import FINAL, Teacher, final_features
from mrl.swap.neutral import collect_statistics, search_temperature
from mrl.swap.resume import Resume
from mrl.swap.ridge import Ridge, fit_projections, output_projection
from mrl.swap.stream import follow_stream
from mrl.swap.taps import POSITIONS, fit_taps

STAGES = ("stats", "ridge", "layers", "features")
RIDGE_IMAGES = 256
STATS_IMAGES = 256
TEMPERATURE_IMAGES = 32


class Calibrator:
    """The state that the stages share: held-out activations of the teacher, and the mixers."""

    def __init__(
        self,
        handle: Handle,
        config: CalibrateConfig,
        held: Tensor,
        train: Tensor,
        device: torch.device,
        resume: Resume,
        closing: str | None = None,
    ) -> None:
        self.handle, self.config, self.train, self.device = handle, config, train, device
        self.mixers = handle.mixers()
        self.held, self.closing = held, closing
        bf16 = config.bf16 if config.bf16 is not None else has_bf16(device)
        # without autocast's cache of weights, which knows neither the originals' turn nor values set inside a pass
        self.autocast = lambda: torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False)
        self.teacher = Teacher(handle, held, self.autocast)
        self.resume = resume
        if resume.tensors:
            if config.scope == "blocks":
                handle.keep_blocks()
            self._put(resume.tensors["now"])

    def run(self, stage: str) -> StageReport:
        """One stage, measured on the held-out images before and after; what lost keeps its old values."""
        inside, tensors = self.resume.inside, self.resume.tensors
        self.resume.inside, self.resume.tensors = None, {}
        measure = self.teacher.error if stage == "features" else self.errors
        if inside is None:
            inside = {"stage": stage, "update": 0, "seconds": 0.0, "before": measure()}
            tensors = {"old": self._values(), "optimizer": {}}
        before, old, start = inside["before"], tensors["old"], time.monotonic() - inside["seconds"]
        self.inside, self.old, self.optimizer_state, self.start = inside, old, tensors["optimizer"], start
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
        inside_mixer = tuple(f"{name}." for name in self.mixers)
        kept_out = tuple(f"{name}." for name in lost)
        self._put({k: v for k, v in old.items() if lost and (k.startswith(kept_out) or not k.startswith(inside_mixer))})
        after = {n: after[n] if n in accepted else before[n] for n in after}
        stream = self.follow() if stage == self.closing else (None, None)
        seconds = time.monotonic() - start
        self.resume.reports.append(StageReport(stage, updates, seconds, before, after, accepted, *stream))
        self.resume.save({"now": self._values()}, self.resume.reports)
        return self.resume.reports[-1]

    def follow(self) -> tuple[float, float]:
        """The pass along the stream, undone where it does not help; the error of the final features before and after."""
        blocks = self.config.scope == "blocks"
        old, before = self._values(), self.teacher.error()[FINAL]
        follow_stream(self.handle, self.train, self.held, blocks=blocks, autocast=self.autocast)
        after = self.teacher.error()[FINAL]
        if not after <= before:
            self._put(old)
        return before, min(after, before)

    def _values(self) -> dict[str, Tensor]:
        """Copies of every tensor that a calibration may change, by its name in the model."""
        found = {f"{name}.{k}": v for name, m in self.mixers.items() for k, v in m.state_dict().items()}
        if self.config.scope == "blocks":
            found |= {n: p for n, p in self.handle.block_parameters().items() if p.is_floating_point()}
        return {name: value.detach().clone() for name, value in found.items()}

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        """Copies tensors back into the model, in place."""
        own = self.handle.model.state_dict(keep_vars=True)
        for name, value in values.items():
            own[name].copy_(value)

    @torch.no_grad()
    def errors(self) -> dict[str, float]:
        """Held-out normalised error of every mixer on the teacher's activations."""
        total = dict.fromkeys(self.mixers, 0.0)
        chunks = self.held.split(32)
        for chunk in chunks:
            for name, seen in self._teacher(chunk).items():
                total[name] += float(self._error(name, seen.run(self.mixers[name]), seen.output)) * len(chunk)
        return {name: value / len(self.held) for name, value in total.items()}

    def layer_errors(self) -> dict[str, float]:
        """Errors as the last stage that matched layers left them; measured now where none ran."""
        known = [r for r in self.resume.reports if r.stage != "features"]
        return known[-1].error_after if known else self.errors()

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
    def _recording(self, names: Iterable[str] | None = None) -> Iterator[dict[str, Call]]:
        """The calls of these modules, by name; None is the mixers, or their originals."""
        seen: dict[str, Call] = {}
        hooks = []
        for name in self.mixers if names is None else names:

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

    @torch.no_grad()
    def _ridge(self) -> int:
        """Closed form on the teacher's activations: the local convolution and its gain, then every output projection."""
        self._fit_taps()
        linears = {name: output_projection(mixer) for name, mixer in self.mixers.items()}
        sums = {name: Ridge(linear) for name, linear in linears.items() if linear is not None}
        for chunk in self.train[:RIDGE_IMAGES].split(32):
            for name, call in self._teacher(chunk.to(self.device)).items():
                if name in sums:
                    seen: list[Tensor] = []
                    hook = linears[name].register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0]))
                    with self.autocast():
                        call.run(self.mixers[name])
                    hook.remove()
                    sums[name].add(rows_of(self.mixers[name], seen[0]), rows_of(self.mixers[name], call.output))
        fit_projections(sums, self.errors)
        return 0

    def _fit_taps(self) -> None:
        """The local convolutions, each kept where the held-out error of its mixer falls."""
        calls: dict[str, list[Call]] = {name: [] for name in self.mixers}
        positions = 0
        for chunk in self.train[:RIDGE_IMAGES].split(8):
            if positions >= POSITIONS:
                break
            for name, call in self._teacher(chunk.to(self.device)).items():
                calls[name].append(call)
                most = rows_of(self.mixers[name], call.output).shape[:2].numel()
            positions += most
        old, before = self._values(), self.errors()
        with progress("calibrating local convolutions", len(calls)) as advance:
            for name, mixer in self.mixers.items():
                fit_taps(mixer, calls.pop(name), self.autocast)
                advance()
        worse = tuple(f"{name}." for name, error in self.errors().items() if not error <= before[name])
        self._put({k: v for k, v in old.items() if worse and k.startswith(worse)})

    def _layers(self) -> int:
        """AdamW on every mixer at once; the layers do not see each other."""
        return self._train("layers", lambda images, update: self._match_layers(images, own=update % 2 == 1))

    def _features(self) -> int:
        """AdamW on all mixers through the whole network."""
        self.whitening = self.teacher.whitening(self.train)
        if self.config.scope == "blocks":
            self.handle.keep_blocks()
        return self._train("features", lambda images, update: self._match_features(images))

    def _train(self, stage: str, step: Callable[[Tensor, int], float]) -> int:
        config, n = self.config, len(self.train)
        updates = config.updates(stage, n)
        optimizer, flags = self._optimizer(stage)
        load_optimizer(optimizer, self.optimizer_state)
        warm = max(1, round(0.1 * updates))
        rates = [group["lr"] for group in optimizer.param_groups]
        generator = torch.Generator().manual_seed(config.seed)
        order = torch.cat([torch.randperm(n, generator=generator) for _ in range(updates * config.batch_size // n + 1)])
        try:
            with progress(f"calibrating {stage}", updates) as advance:
                for update in range(updates):
                    turn = self._turn(generator)
                    if update < self.inside["update"]:  # done before the run was killed
                        advance()
                        continue
                    decay = 0.5 + 0.5 * math.cos(math.pi * (update - warm) / (updates - warm + 1))
                    for group, rate in zip(optimizer.param_groups, rates, strict=True):
                        group["lr"] = rate * min((update + 1) / warm, decay)
                    picked = order[update * config.batch_size :][: config.batch_size]
                    loss = step(self._augmented(self.train[picked], *turn).to(self.device), update)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                    advance(note=f"error {loss:.3f}")
                    if self.resume.due():
                        self.inside |= {"update": update + 1, "seconds": time.monotonic() - self.start}
                        parts = {"now": self._values(), "old": self.old, "optimizer": optimizer_tensors(optimizer)}
                        self.resume.save(parts, self.resume.reports, self.inside)
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
        return updates

    def _around(self) -> list[nn.Parameter]:
        """The parameters of the blocks around the mixers that are not the mixers' own."""
        if self.config.scope == "mixers":
            return []
        own = {id(p) for mixer in self.mixers.values() for p in mixer.parameters()}
        return [p for p in self.handle.block_parameters().values() if id(p) not in own and p.is_floating_point()]

    def _optimizer(self, stage: str) -> tuple[torch.optim.Optimizer, list[tuple[nn.Parameter, bool]]]:
        new, inherited = [], []
        for mixer in self.mixers.values():
            for name, parameter in mixer.named_parameters():
                if parameter.is_floating_point():
                    (new if name.startswith("mrl.") else inherited).append(parameter)
        rates = (self.config.lr_new, self.config.lr_inherited)
        if stage == "features":
            inherited += self._around()
            rates = (10 * self.config.lr_features, self.config.lr_features)
        flags = [(p, p.requires_grad) for p in (*new, *inherited)]
        for parameter, _ in flags:
            parameter.requires_grad_(True)
        groups = [
            {"params": params, "lr": lr, "weight_decay": 0.0}
            for params, lr in zip((new, inherited), rates, strict=True)
        ]
        return torch.optim.AdamW(groups, betas=(0.9, 0.95)), flags

    def _match_features(self, images: Tensor) -> float:
        """Gradients of the final features' error and of the mixers' and blocks' on one batch."""
        names = dict.fromkeys(name.rpartition(".")[0] for name in self.mixers)
        with torch.no_grad(), self.handle.disabled(), self._recording(names) as theirs, self.autocast():
            target = final_features(self.handle.model, images)
        with self._recording(names) as ours, self.autocast():
            found = final_features(self.handle.model, images)
        blocks = [normalised(*(first_tensor(seen[n].output).float() for seen in (ours, theirs))) for n in theirs]
        loss = self.teacher.loss(found, target, self.whitening) + sum(blocks) / len(blocks)
        loss.backward()
        return float(loss.detach())

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

    def _turn(self, generator: torch.Generator) -> tuple[int, int]:
        """Whether to mirror a batch, and by how many quarter turns to rotate it."""
        if not self.config.augment:
            return 0, 0
        flip, turns = (int(torch.randint(n, (), generator=generator)) for n in (2, 4))
        return flip, turns

    @staticmethod
    def _augmented(images: Tensor, flip: int, turns: int) -> Tensor:
        if images.shape[-1] != images.shape[-2]:
            turns -= turns % 2
        return torch.rot90(images.flip(-1) if flip else images, turns, (-2, -1))
