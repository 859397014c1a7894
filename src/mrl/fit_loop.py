"""The loop of a fit: candidates, updates, validations and checkpoints."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mrl.checkpoint import (
    drop_checkpoint,
    load_checkpoint,
    load_optimizer,
    optimizer_tensors,
    save_checkpoint,
    snapshot,
)
from mrl.data.loading import ImageSet, collate
from mrl.data.transforms import Augment, make_augment
from mrl.ddp import check_batch, spread
from mrl.errors import ConfigError
from mrl.features import add_features, collect, read_features
from mrl.fit_config import FitConfig, FitResult, check_same, planned_updates
from mrl.fsdp import cut_, whole
from mrl.mixing import mix_batch, seed_of
from mrl.optimizer import cosine, freeze_, make_accelerator, parameter_groups, train_mode_
from mrl.ranks import equal_, gather, in_pieces, share, shares, total
from mrl.run import environment, progress, say, write_json, writing
from mrl.tasks.classification import Classification, class_weights
from mrl.tracking import Track, Tracking

RESULT, CHECKPOINT = "fit.json", "checkpoint"
BEST, START = "best.safetensors", "start.safetensors"
CHECKPOINT_SECONDS = 30.0


class Loop:
    """The state of one fit between its updates.

    Each process of a launch has one; together they make every update, on shares of its batch, and come to the same numbers
    as one process. The first of them scores, chooses and writes.

    Args:
        model: a `Classifier`, trained in place.
        train: the inner training images.
        val: the inner validation images.
        config: the budget and the recipe.
        out: folder of the arm.
        identity: arm, seed, metric, configuration and numbers of images: what a checkpoint must agree with.
        features: file that keeps the features of the starting head for another fit of the same network, or None.
        tracking: where the rows of `metrics.jsonl` are copied to.
    """

    def __init__(
        self,
        model: nn.Module,
        train: ImageSet,
        val: ImageSet | None,
        config: FitConfig,
        out: Path,
        identity: dict[str, Any],
        features: Path | None = None,
        tracking: Tracking = Tracking(),  # noqa: B008
    ) -> None:
        self.model, self.config, self.out, self.identity, self.features = model, config, out, identity, features
        self.arm, self.seed = identity["arm"], identity["seed"]
        self.accelerator = make_accelerator(config.precision, **tracking.accelerator(out))
        self.track = Track(out, tracking, self.accelerator)
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.device = self.accelerator.device
        self.came_from = next(model.parameters()).device, [p.requires_grad for p in model.parameters()]
        model.to(self.device)
        self.val, self.plain_train = val, _with_augment(train, None, self.seed)
        self.train = _with_augment(train, make_augment(config.augment, train.preprocess.image_size), self.seed)
        metric, classes = identity["metric"], len(train.classes)
        balanced = metric != "accuracy" if config.class_balance is None else config.class_balance
        weights = class_weights(train.labels, classes) if balanced else None
        self.task = Classification(classes, weights, config.label_smoothing, config.use_confidence, metric)
        self.layers = [[name for name, _ in group] for group in model.layer_groups()]
        self.frozen = freeze_(model, self.layers, config.freeze)
        self.ema = ModelEmaV3(model, decay=config.ema, use_warmup=True) if config.ema else None
        self.per_epoch = math.ceil(len(train) / config.batch_size)
        self.updates = planned_updates(config, len(train))
        self._optimize()
        self.mixes = bool(config.mixup or config.cutmix)
        judging = None if val is None else len(val)
        check_batch(self.arm, len(train) // self.per_epoch, self.world, pairs=self.mixes, judging=judging)
        self.network, self.undo = spread(model, self.device, self.arm, hold=config.holds_norms)
        self.plain = model
        self.every = math.ceil(self.updates / max(1, round(config.validations * config.epochs)))
        self.update, self.seconds, self.since = 0, 0.0, time.monotonic()
        self.candidates: list[dict[str, Any]] = []
        self.best: dict[str, Tensor] = {}
        self.waited = 0
        self.probe_strength: float | None = None
        self.seen: dict[str, list[Tensor]] = {"logits": [], "label": [], "weight": []}

    def _optimize(self) -> None:
        """AdamW and its schedule over what is trained."""
        c = self.config
        told = {"lr": c.lr, "layer_decay": c.layer_decay, "weight_decay": c.weight_decay}
        groups = parameter_groups(self.model, self.layers, **told)
        self.optimizer = self.accelerator.prepare(torch.optim.AdamW(groups, lr=c.lr))
        rates = {"min_lr": c.min_lr * c.lr, "warmup_lr": c.warmup_lr * c.lr}
        self.schedule = cosine(self.optimizer, self.updates, warmup=c.warmup, cooldown=c.cooldown, **rates)

    def _cut(self) -> None:
        """Under FSDP network, average and optimizer are in pieces from here on; the network as it came waits on the CPU."""
        if in_pieces():
            self.plain.to("cpu")
            self.model = self.network = cut_(copy.deepcopy(self.plain), self.layers, self.device)
            self.undo()  # the copy keeps its joined batch norms
            self.undo = lambda: None
            if self.ema is not None:
                cut_(self.ema.module, self.layers, self.device)
                self.ema.foreach = False
            self._optimize()

    def begin(self) -> None:
        """Continues from the checkpoint, or makes candidate 0: the linear probe, or the network as it was built."""
        if self._restored():
            say(f"{self.arm}: goes on after update {self.update} of {self.updates}")
            return
        self._started(self._probe() if self.config.start == "probe" else None)

    def _started(self, train_score: float | None = None) -> None:
        """The network with its starting head, on every process, on disk, and as candidate 0."""
        equal_(list(self.model.state_dict().values()))
        if self.ema is not None:
            self.ema.set(self.model)
        if self.accelerator.is_main_process:
            self.track.begin(-1, vars(self.config))
            with writing(self.out / START) as part:
                save_file(snapshot(self.model), part)
        if self.val is not None:
            self._validate(train_score)
        self._cut()

    def _probe(self) -> float:
        """Sets the head to the linear probe of the untouched network; returns its score on the training side."""
        say(f"{self.arm}: features of {len(self.plain_train)} images for the starting head")
        sides = [self._features(side) for side in (self.plain_train, self.val)]
        score = 0.0
        if self.accelerator.is_main_process:
            probe = self.task.start(self.model, *sides)
            self.probe_strength = probe.strength
            train_logits = nn.functional.linear(sides[0]["features"], probe.weight, probe.bias)
            score = self.task.score(train_logits, sides[0])[0]
        self.probe_strength, score = share([self.probe_strength, score])
        return score

    def _features(self, side: ImageSet) -> dict[str, Tensor]:
        """The untouched network's features of a side, from the file that keeps them where it has them all."""
        names = [sample.image for sample in side.samples]
        precision = str(self.accelerator.mixed_precision)
        kept = None if self.features is None else read_features(self.features, names, precision)
        if share(kept is not None):  # of another process the features are not asked for
            kept = torch.empty(0) if kept is None else kept
            weights = torch.tensor([sample.weight for sample in side.samples], dtype=torch.float32)
            return {"features": kept, "label": torch.tensor(side.labels, dtype=torch.int64), "weight": weights}
        found = self._collect(side, self.model.features, "features")
        if self.features is not None and self.accelerator.is_main_process:
            add_features(self.features, names, found["features"], precision)
        return found

    def run(self) -> None:
        """The updates that are left; a validation every so many, a checkpoint after each and every half minute."""
        if self.stopped_early:  # it was killed after its last validation
            return
        saved = time.monotonic()
        with progress(f"{self.arm}: fine-tuning", self.updates) as advance:
            advance(self.update)
            for batch in self._batches():
                self._step(batch)
                due = self.update % self.every == 0 or self.update == self.updates
                if due:
                    self._validate()
                if due or share(time.monotonic() - saved > CHECKPOINT_SECONDS):
                    self._save()
                    saved = time.monotonic()
                advance(1, f"best {self.identity['metric']} {self._best()['val_score']:.3f}")
                if self.stopped_early:
                    break

    def finish(self, meta: dict[str, Any]) -> FitResult:
        """Writes the best weights and the record, and removes the checkpoint."""
        self.plain.load_state_dict(self.best)
        result = self._result(meta)
        if self.accelerator.is_main_process:
            with writing(self.out / BEST) as part:
                save_file(self.best, part)
            write_json(self.out / RESULT, {**result.to_dict(), "environment": environment()})
            drop_checkpoint(self.out / CHECKPOINT)
        share()  # no process goes on before the files are there
        for sentence in result.warnings:
            say(f"{self.arm}: {sentence}")
        return result

    def close(self) -> None:
        """Gives the model back as it came: device, `requires_grad`, eval mode."""
        self.track.close()
        self.undo()
        self.network = self.model = self.plain
        device, flags = self.came_from
        for parameter, flag in zip(self.model.parameters(), flags, strict=True):
            parameter.requires_grad_(flag)
            parameter.grad = None
        self.model.to(device).eval()

    @property
    def stopped_early(self) -> bool:
        """Whether patience ran out at this validation, after the updates that are always made."""
        validated = self.candidates[-1]["update"] == self.update
        late = self.config.min_updates <= self.update < self.updates
        return validated and late and 0 < self.config.patience <= self.waited

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        """The batches of the updates that are left; this process's share of each."""
        while self.update < self.updates:
            epoch, done = divmod(self.update, self.per_epoch)
            order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed_of(self.seed, epoch)))
            whole = order.tensor_split(self.per_epoch)[done:]
            batches = [c[shares(len(c), self.world, pairs=self.mixes)[self.rank]].tolist() for c in whole]
            self.train.set_epoch(epoch)
            yield from DataLoader(self.train, batch_sampler=batches[: self.updates - self.update], collate_fn=collate)

    def _step(self, batch: dict[str, Tensor]) -> None:
        """One update."""
        torch.manual_seed(seed_of(self.seed, self.update, self.rank, 1))
        self.update += 1
        self.schedule.step_update(self.update)
        if self.mixes:
            batch = self._mixed(batch)
        batch = {k: v.to(self.device) for k, v in batch.items()}
        train_mode_(self.network, hold=self.config.holds_norms)
        with self.accelerator.autocast():
            logits = self.network(batch["image"])
        share_of_loss = self.task.loss(logits, batch, total(self.task.weights(batch).sum()))
        loss = total(share_of_loss)
        if not torch.isfinite(loss):
            raise ConfigError(
                f"{self.arm}: the loss is not finite at update {self.update}; use a lower --lr than {self.config.lr}, "
                "or --precision fp32."
            )
        self.accelerator.backward(share_of_loss * self.world)  # the processes' gradients are averaged
        if self.config.clip:
            self.accelerator.clip_grad_norm_(self.network.parameters(), self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(self.model, step=self.update)
        for key, value in (("logits", logits), ("label", batch["label"]), ("weight", batch["weight"])):
            if not self.mixes:  # a mixed image has no one label to score it by
                self.seen[key].append(value.detach().to("cpu", torch.long if key == "label" else torch.float32))
        lr = self.optimizer.param_groups[-1]["lr"]
        self._log("train", loss=float(loss), lr=lr, images_seen=self._images_seen())

    def _mixed(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch with its images mixed, and the shares of their labels as "target"."""
        seed = seed_of(self.seed, self.update, 0, 2)
        alphas = {"mixup": self.config.mixup, "cutmix": self.config.cutmix}
        images, targets = mix_batch(batch["image"], batch["label"], self.task.num_classes, seed=seed, **alphas)
        return {**batch, "image": images, "target": targets}

    def _validate(self, train_score: float | None = None) -> None:
        """Scores a candidate; without `train_score`, that is of the training batches since the last one."""
        model = self.model if self.ema is None else self.ema.module
        side = self._collect(self.val, model, "logits")
        main = self.accelerator.is_main_process
        score, loss = share(self.task.score(side["logits"], side) if main else None)
        self._gather_seen()
        if main and train_score is None and self.seen["logits"]:
            seen = {k: torch.cat(v) for k, v in self.seen.items()}
            train_score, _ = self.task.score(seen["logits"], seen)
        gain = not self.candidates or (score, -loss) > (self._best()["val_score"], -self._best()["val_loss"])
        self.candidates.append({"update": self.update, "val_score": score, "val_loss": loss})
        self.waited = 0 if gain else self.waited + 1
        if gain:
            self.best = snapshot(model)
        self.seen = {k: [] for k in self.seen}
        number = len(self.candidates) - 1
        self._log("validation", val_loss=loss, val_score=score, train_score=train_score, candidate=number, best=gain)
        note = " (best so far)" if gain else ""
        where = f"{self.arm}: update {self.update}/{self.updates}"
        say(f"{where}, inner validation {self.task.metric} {score:.4f}, loss {loss:.4f}{note}")

    def _collect(self, side: ImageSet, forward: Callable[[Tensor], Tensor], name: str) -> dict[str, Tensor]:
        self.model.eval()
        return collect(side, forward, name, self.accelerator)

    def _gather_seen(self) -> None:
        """Brings the training answers since the last validation to the first process."""
        if self.world > 1 and self.seen["logits"]:
            seen = {k: gather(torch.cat(v)) for k, v in self.seen.items()}
            self.seen = {k: [v if self.rank == 0 else v[:0]] for k, v in seen.items()}

    def _best(self) -> dict[str, Any]:
        return max(self.candidates, key=lambda c: (c["val_score"], -c["val_loss"], -c["update"]))

    def _log(self, event: str, **fields: Any) -> None:
        if self.accelerator.is_main_process:
            line = {"event": event, "update": self.update, "epoch": self.update / self.per_epoch}
            self.track.log({**line, **fields, "seconds": self._clock()})

    def _images_seen(self) -> int:
        full, rest = divmod(self.update, self.per_epoch)
        fewest, more = divmod(len(self.train), self.per_epoch)
        return full * len(self.train) + rest * fewest + min(rest, more)

    def _clock(self) -> float:
        return round(self.seconds + time.monotonic() - self.since, 3)

    def _save(self) -> None:
        self._gather_seen()
        tensors = {
            "model": whole(self.model.state_dict()),
            "ema": {} if self.ema is None else whole(self.ema.module.state_dict()),
            "optimizer": optimizer_tensors(self.optimizer),
            "best": self.best,
            "seen": {k: torch.cat(v) for k, v in self.seen.items() if v},
        }
        if not self.accelerator.is_main_process:
            return
        scaler = self.accelerator.scaler
        state = {
            "identity": self.identity,
            "update": self.update,
            "candidates": self.candidates,
            "waited": self.waited,
            "probe_strength": self.probe_strength,
            "seconds": self._clock(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        save_checkpoint(self.out / CHECKPOINT, tensors, state)

    def _restored(self) -> bool:
        """Continues from the checkpoint, if there is one; every process reads it."""
        found = load_checkpoint(self.out / CHECKPOINT)
        update = share(None if found is None else found[1]["update"])
        if update != (None if found is None else found[1]["update"]):
            raise ConfigError(
                f"{self.out / CHECKPOINT}: not the same on every process; they need one run folder that all of them see."
            )
        if found is not None:
            self._restore(*found)
        return found is not None

    def _restore(self, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        check_same(state["identity"], self.identity, self.out / CHECKPOINT)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.model.load_state_dict(tensors["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(tensors["ema"])
        self._cut()
        load_optimizer(self.optimizer, tensors.get("optimizer", {}))
        self.best = tensors.get("best", {})
        kept = "seen" in tensors
        self.seen = {k: [tensors["seen"][k][: None if self.rank == 0 else 0]] if kept else [] for k in self.seen}
        self.update, self.candidates, self.waited = state["update"], state["candidates"], state["waited"]
        self.seconds, self.probe_strength = state["seconds"], state.get("probe_strength")
        if self.accelerator.is_main_process:
            self.track.begin(self.update, vars(self.config))

    def _result(self, meta: dict[str, Any]) -> FitResult:
        best, start, probed = self._best(), self.candidates[0], self.config.start == "probe"
        tuned = max((c["val_score"] for c in self.candidates[1:]), default=start["val_score"])
        below = probed and tuned < start["val_score"]
        warnings = []
        if below:
            warnings.append(
                f"no fine-tuned candidate reached the linear probe on the inner validation side ({tuned:.4f} against "
                f"{start['val_score']:.4f}), so the probe's head on the untouched backbone was kept"
            )
        if not probed and best["update"] == 0:
            warnings.append("no candidate was better on the inner validation side than the network before training")
        reached = (c["update"] for c in self.candidates if c["val_score"] >= 0.95 * best["val_score"])
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        return FitResult(
            arm=self.arm,
            updates=self.update,
            epochs=self.update / self.per_epoch,
            best_update=best["update"],
            best_score=best["val_score"],
            candidates=self.candidates,
            metric=self.task.metric,
            linear_probe_val=start["val_score"] if probed else None,
            below_linear_probe=below,
            seconds=self._clock(),
            images_seen=self._images_seen(),
            n_train=len(self.train),
            n_val=len(self.val),
            trainable_params_m=trained / 1e6,
            frozen_blocks=self.frozen,
            config=vars(self.config).copy(),
            precision={"no": "fp32"}.get(self.accelerator.mixed_precision, self.accelerator.mixed_precision),
            device=self.device.type,
            seed=self.seed,
            stopped_early=self.stopped_early,
            updates_to_95=next(reached, None),
            warnings=warnings,
            probe_strength=self.probe_strength,
            meta=meta,
        )


def _with_augment(images: ImageSet, augment: Augment | None, seed: int) -> ImageSet:
    """The same images, sharing their cache, with another augmentation."""
    return ImageSet(images.samples, images.classes, images.preprocess, augment, seed, cache=images.cache)
