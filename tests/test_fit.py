"""The fit on tiny models and generated images: exact resume, candidates, freezing, every field of the configuration."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from mrl import fit_loop, tracking
from mrl.data import ImageSet, Preprocess, Sample
from mrl.errors import ConfigError
from mrl.fit import FitConfig, FitResult, fit
from mrl.models import Classifier
from mrl.tasks import Classification

SMALL = FitConfig(epochs=2, min_updates=6, batch_size=8, lr=1e-3, ema=0.9, precision="fp32", freeze=1)
SHAPE = Preprocess((32, 32), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def make_samples(folder: Path, n: int, seed: int = 0) -> list[Sample]:
    """Noise with a bright square, left in class a and right in class b; every third image is of class b."""
    random = np.random.default_rng(seed)
    folder.mkdir(exist_ok=True)
    samples = []
    for i in range(n):
        label = "b" if i % 3 == 0 else "a"
        pixels = random.integers(0, 160, (32, 32), dtype=np.uint8)
        column = 20 if label == "b" else 4
        pixels[12:20, column : column + 8] += 70
        path = folder / f"{seed}_{i}.png"
        Image.fromarray(pixels).save(path)
        samples.append(Sample(path.name, path, label, weight=0.3 if i % 4 == 0 else 1.0))
    return samples


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    return [ImageSet(make_samples(folder, n, seed), ("a", "b"), SHAPE) for n, seed in ((26, 1), (15, 2))]


def make_model(name="test_vit", **kwargs):
    torch.manual_seed(3)
    if name != "test_mrl":
        kwargs["img_size"] = 32
    return Classifier(timm.create_model(name, num_classes=0, **kwargs), 2, classes=("a", "b"))


def run(sides, out, config=SMALL, model=None, **kwargs):
    model = model or make_model(drop_path_rate=0.2)
    return fit(model, *sides, config, out, **kwargs)


def numbers(out):
    """Everything a fit wrote that must not depend on when it was interrupted."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    record = json.loads((out / "fit.json").read_text())
    for entry in [*lines, record]:
        del entry["seconds"]
    return lines, record


def same_weights(one, other):
    one, other = load_file(one), load_file(other)
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.fixture(scope="module")
def undisturbed(sides, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    run(sides, out)
    return out


def test_fit__record_and_files(undisturbed, sides):
    assert sorted(p.name for p in undisturbed.iterdir()) == [
        "best.safetensors",
        "fit.json",
        "metrics.jsonl",
        "start.safetensors",
    ]
    lines, record = numbers(undisturbed)
    validations = [line for line in lines if line["event"] == "validation"]
    assert [line["update"] for line in lines if line["event"] == "train"] == list(range(1, 9))
    assert [line["update"] for line in validations] == [0, 2, 4, 6, 8]
    assert [line["candidate"] for line in validations] == [0, 1, 2, 3, 4]
    assert record["candidates"] == [
        {"update": v["update"], "val_score": v["val_score"], "val_loss": v["val_loss"]} for v in validations
    ]
    assert record["linear_probe_val"] == validations[0]["val_score"]
    assert record["best_score"] == max(v["val_score"] for v in validations)
    assert record["updates"] == 8
    assert record["images_seen"] == 2 * 26
    assert record["epochs"] == 2
    assert (record["n_train"], record["n_val"]) == (26, 15)
    assert (record["precision"], record["device"]) == ("fp32", "cpu")
    assert {"schema", "arm", "environment", "trainable_params_m", "updates_to_95"} <= record.keys()
    assert validations[0]["train_score"] > 0.5


def test_fit__best_candidate_is_kept(sides, tmp_path):
    model = make_model()
    result = run(sides, tmp_path, model=model)
    best = load_file(tmp_path / "best.safetensors")
    assert not model.training
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(v, best[k]) for k, v in model.state_dict().items())
    with torch.no_grad():
        logits = torch.cat([model(sides[1][i]["image"][None]) for i in range(15)])
    labels = torch.tensor([sides[1][i]["label"] for i in range(15)])
    assert (logits.argmax(1) == labels).float().mean().item() == pytest.approx(result.best_score)
    lowest = min(c["val_loss"] for c in result.candidates if c["val_score"] == result.best_score)
    kept = next(c for c in result.candidates if c["update"] == result.best_update)
    assert (kept["val_score"], kept["val_loss"]) == (result.best_score, lowest)


def test_fit__candidate_0_is_the_linear_probe(sides, tmp_path):
    model = make_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    run(sides, tmp_path, model=model)
    start = load_file(tmp_path / "start.safetensors")
    assert all(torch.equal(start[k], before[k]) for k in before if not k.startswith("head"))
    assert not torch.equal(start["head.weight"], before["head.weight"])


def test_fit__killed_after_stopping_early(sides, tmp_path, monkeypatch):
    monkeypatch.setattr(Classification, "score", lambda self, logits, batch: (0.5, 1.0))
    config = dataclasses.replace(SMALL, epochs=3, min_updates=3, patience=2)

    def stop(self, meta):
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(fit_loop.Loop, "finish", stop)
        with pytest.raises(Stop):
            run(sides, tmp_path, config)
    result = run(sides, tmp_path, config)
    assert (result.updates, result.stopped_early) == (4, True)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4 + 3


class Stop(BaseException):
    """Ends a process between two updates, as far as the fit can tell."""


def interrupt(monkeypatch, at, start):
    """Runs `start()` until just after update `at`."""
    step = fit_loop.Loop._step

    def stop(self, batch):
        step(self, batch)
        if self.update == at:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(fit_loop.Loop, "_step", stop)
        with pytest.raises(Stop):
            start()


@pytest.mark.parametrize(("at", "every"), [(1, 1e9), (4, 0.0), (5, 0.0), (5, 1e9), (8, 0.0)])
def test_fit__exact_resume(sides, undisturbed, tmp_path, monkeypatch, at, every):
    monkeypatch.setattr(fit_loop, "CHECKPOINT_SECONDS", every)
    interrupt(monkeypatch, at, lambda: run(sides, tmp_path))
    assert not (tmp_path / "fit.json").exists()
    run(sides, tmp_path)
    assert numbers(tmp_path) == numbers(undisturbed)
    assert same_weights(tmp_path / "best.safetensors", undisturbed / "best.safetensors")
    assert same_weights(tmp_path / "start.safetensors", undisturbed / "start.safetensors")
    assert not (tmp_path / "checkpoint").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(int(sys.argv[4]))
import test_fit as t
from mrl import fit_loop, tracking
step = fit_loop.Loop._step
def stop(self, batch):
    step(self, batch)
    if self.update == 5:
        os.kill(os.getpid(), signal.SIGKILL)
fit_loop.Loop._step = stop
folder = Path(sys.argv[2])
sides = [t.ImageSet(t.make_samples(folder, n, seed), ("a", "b"), t.SHAPE) for n, seed in ((26, 1), (15, 2))]
t.run(sides, Path(sys.argv[3]))
"""


def test_fit__killed_process(sides, undisturbed, tmp_path):
    here = str(Path(__file__).parent)
    threads = str(torch.get_num_threads())
    command = [sys.executable, "-c", KILLED, here, str(tmp_path / "images"), str(tmp_path / "out"), threads]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    assert (tmp_path / "out" / "checkpoint" / "state.safetensors").is_file()
    (tmp_path / "out" / ".best.safetensors.abc.part").mkdir()
    run(sides, tmp_path / "out")
    assert numbers(tmp_path / "out") == numbers(undisturbed)
    assert same_weights(tmp_path / "out" / "best.safetensors", undisturbed / "best.safetensors")
    assert not list((tmp_path / "out").glob(".*"))


def test_fit__half_written_line_and_lines_after_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"update": 0}\n{"update": 1}\n{"update": 2}\n{"upd')
    tracking.truncate(path, 1)
    assert path.read_text() == '{"update": 0}\n{"update": 1}\n'


def stopped(sides, out, monkeypatch, at=5):
    """A folder with an unfinished fit."""
    step = fit_loop.Loop._step

    def stop(self, batch):
        step(self, batch)
        if self.update == at:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(fit_loop.Loop, "_step", stop)
        with pytest.raises(Stop):
            run(sides, out)
    return out


@pytest.mark.parametrize("damage", ["truncated", "flipped", "garbage", "empty"])
def test_fit__damaged_checkpoint(sides, tmp_path, monkeypatch, damage):
    path = stopped(sides, tmp_path, monkeypatch) / "checkpoint" / "state.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[-1000] ^= 1
    path.write_bytes({"truncated": data[: len(data) // 2], "garbage": b"x" * 100, "empty": b""}.get(damage, data))
    with pytest.raises(ConfigError, match=r"checkpoint is damaged.*delete the folder .*checkpoint to start"):
        run(sides, tmp_path)


def test_fit__checkpoint_of_another_fit(sides, tmp_path, monkeypatch):
    stopped(sides, tmp_path, monkeypatch)
    with pytest.raises(ConfigError, match=r"belongs to a fit with another config; choose another --out"):
        run(sides, tmp_path, dataclasses.replace(SMALL, lr=2e-3))
    result = run(sides, tmp_path, dataclasses.replace(SMALL, lr=2e-3), resume=False)
    assert result.config["lr"] == 2e-3
    updates = [json.loads(line)["update"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert updates == sorted(updates)


def test_fit__finished(sides, undisturbed, monkeypatch):
    monkeypatch.setattr(fit_loop.Loop, "run", None)
    model = make_model()
    again = run(sides, undisturbed, model=model)
    assert again == FitResult.from_dict(
        {k: v for k, v in json.loads((undisturbed / "fit.json").read_text()).items() if k != "environment"}
    )
    best = load_file(undisturbed / "best.safetensors")
    assert all(torch.equal(v, best[k]) for k, v in model.state_dict().items())
    with pytest.raises(ConfigError, match="another seed"):
        run(sides, undisturbed, seed=9)


def test_fit__meta_is_in_the_record(sides, tmp_path):
    run(sides, tmp_path, dataclasses.replace(SMALL, epochs=0.1, min_updates=1), meta={"protocol_sha256": "abc"})
    assert json.loads((tmp_path / "fit.json").read_text())["protocol_sha256"] == "abc"
    assert run(sides, tmp_path, dataclasses.replace(SMALL, epochs=0.1, min_updates=1)).meta == {
        "protocol_sha256": "abc"
    }


def test_fit__min_updates(sides, tmp_path):
    result = run(sides, tmp_path, dataclasses.replace(SMALL, epochs=1, min_updates=11))
    assert result.updates == 11
    assert result.epochs == 11 / 4
    assert [c["update"] for c in result.candidates] == [0, 6, 11]


def test_fit__early_stopping(sides, tmp_path, monkeypatch):
    scores = iter([0.5, 0.5, 0.6, 0.6, 0.4, 0.4, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5])
    side = len(sides[1])

    def score(self, logits, batch):
        return (next(scores), 1.0) if len(logits) == side else (0.5, 1.0)

    monkeypatch.setattr(Classification, "score", score)
    config = dataclasses.replace(SMALL, epochs=6, min_updates=4, patience=2)
    result = run(sides, tmp_path, config)
    # scores at updates 0, 2, 4, 6, 8: 0.5 0.5 0.6 0.6 0.4
    assert result.stopped_early
    assert result.updates == 8
    assert (result.best_update, result.best_score) == (4, 0.6)
    assert result.updates_to_95 == 4


def test_fit__no_early_stopping_before_min_updates(sides, tmp_path, monkeypatch):
    monkeypatch.setattr(Classification, "score", lambda self, logits, batch: (0.5, 1.0))
    result = run(sides, tmp_path, dataclasses.replace(SMALL, epochs=3, min_updates=9, patience=1))
    assert result.updates == 10
    assert result.stopped_early
    assert result.best_update == 0


def test_fit__worse_than_its_start_says_so(sides, tmp_path, monkeypatch):
    scores = iter([0.9, 0.9, *[0.5] * 20])
    monkeypatch.setattr(Classification, "score", lambda self, logits, batch: (next(scores), 1.0))
    result = run(sides, tmp_path)
    assert result.below_linear_probe
    assert result.best_update == 0
    assert "no fine-tuned candidate reached the linear probe" in result.warnings[0]
    assert same_weights(tmp_path / "best.safetensors", tmp_path / "start.safetensors")


@pytest.mark.parametrize("freeze", [0, 2, None])
def test_fit__frozen_blocks_have_no_graph(sides, tmp_path, monkeypatch, freeze):
    model = make_model()
    graph = {}
    for i, block in enumerate(model.backbone.blocks):
        block.register_forward_hook(lambda _, __, output, i=i: graph.update({i: graph.get(i, output.requires_grad)}))
    gradients = {}
    step = fit_loop.Loop._step

    def look(self, batch):
        graph.clear()
        step(self, batch)
        frozen = [n for n, p in self.model.named_parameters() if not p.requires_grad]
        gradients.update(frozen=frozen, with_grad=[n for n, p in self.model.named_parameters() if p.grad is not None])

    monkeypatch.setattr(fit_loop.Loop, "_step", look)
    result = run(sides, tmp_path, dataclasses.replace(SMALL, freeze=freeze, min_updates=1, epochs=0.1), model=model)
    blocks = len(model.backbone.blocks)
    count = blocks // 3 if freeze is None else freeze
    assert result.frozen_blocks == count
    assert [i for i in range(blocks) if graph[i]] == list(range(count, blocks))
    frozen = set(gradients["frozen"])
    assert any("patch_embed" in n for n in frozen) == any("pos_embed" in n for n in frozen) == (count > 0)
    assert {int(n.split("blocks.")[1].split(".")[0]) for n in frozen if "blocks." in n} == set(range(count))
    assert all(p.grad is None for p in model.parameters())


def test_fit__too_many_frozen_blocks(sides, tmp_path):
    with pytest.raises(ConfigError, match="freeze=99: this model has"):
        run(sides, tmp_path, dataclasses.replace(SMALL, freeze=99))


@pytest.mark.parametrize(
    ("told", "moves"), [({}, False), ({"batch_norm": "train"}, True), ({"start": "scratch"}, True)]
)
def test_fit__batch_norm(sides, tmp_path, monkeypatch, told, moves):
    """Held and frozen statistics stay, the others are followed; gain and bias train in any case."""
    rising = iter(range(99))  # so the last candidate is the best
    monkeypatch.setattr(Classification, "score", lambda self, *_: (float(next(rising)), 0.5))
    model = make_model("test_mrl")
    config = dataclasses.replace(SMALL, freeze=1, epochs=1, min_updates=4, **told)
    run(sides, tmp_path, config, model=model)
    start, best = load_file(tmp_path / "start.safetensors"), load_file(tmp_path / "best.safetensors")
    frozen = {name for name, _ in model.layer_groups()[1]}
    means = [k for k in start if k.endswith("running_mean")]
    inside = {k for k in means if k.replace("running_mean", "weight") in frozen}
    assert inside
    assert all(torch.equal(start[k], best[k]) for k in inside)
    outside = [k for k in means if k not in inside]
    assert outside
    assert all(torch.equal(start[k], best[k]) is not moves for k in outside)
    assert all(not torch.equal(start[k], best[k]) for k in (m.replace("running_mean", "weight") for m in outside))


def test_fit__starts_to_train_at_the_loss_of_the_trained_network(sides, tmp_path):
    """With the statistics of a batch in place of its own, a network with batch norms begins somewhere else."""
    config = dataclasses.replace(SMALL, epochs=1, min_updates=1, batch_size=26, augment="none", class_balance=False)
    losses = {}
    for norms in ("auto", "train"):
        told = dataclasses.replace(config, batch_norm=norms)
        model = make_model("test_mrl", drop_path_rate=0.0)
        for name, statistics in model.named_buffers():
            if name.endswith("running_var"):  # those of other images than these
                statistics.fill_(0.01)
        fit(model, sides[0], sides[0], told, tmp_path / norms)
        lines = numbers(tmp_path / norms)[0]
        losses[norms] = [next(x for x in lines if key in x)[key] for key in ("val_loss", "loss")]
    assert losses["auto"][1] == pytest.approx(losses["auto"][0], abs=1e-5)
    assert abs(losses["train"][1] - losses["train"][0]) > 5e-4


def test_fit__average_is_what_is_validated(sides, tmp_path, monkeypatch):
    seen = []
    collect = fit_loop.Loop._collect

    def look(self, side, forward, name):
        seen.append(forward)
        return collect(self, side, forward, name)

    monkeypatch.setattr(fit_loop.Loop, "_collect", look)
    model = make_model()
    run(sides, tmp_path / "ema", model=model)
    assert all(forward is not model for forward in seen[2:])
    seen.clear()
    run(sides, tmp_path / "plain", dataclasses.replace(SMALL, ema=0.0), model=model)
    assert all(forward is model for forward in seen[2:])


OTHER = {
    "epochs": 3.0,
    "min_updates": 9,
    "batch_size": 6,
    "lr": 2e-3,
    "layer_decay": 0.5,
    "weight_decay": 0.5,
    "warmup": 0.6,
    "min_lr": 0.5,
    "ema": 0.0,
    "clip": 0.01,
    "precision": "bf16",
    "class_balance": True,
    "label_smoothing": 0.2,
    "freeze": 0,
    "patience": 1,
    "validations": 1,
    "augment": "medium",
    "use_confidence": True,
    "start": "scratch",
    "mixup": 0.8,
    "cutmix": 1.0,
    "warmup_lr": 0.5,
    "cooldown": 0.5,
    "batch_norm": "train",
}


def test_fit__every_field_is_tested():
    assert OTHER.keys() == {f.name for f in dataclasses.fields(FitConfig)}


@pytest.mark.parametrize("name", OTHER)
def test_fit__every_field_changes_something(sides, undisturbed, tmp_path, name):
    model = make_model(drop_path_rate=0.2)
    config = dataclasses.replace(SMALL, **{name: OTHER[name]})
    if name == "warmup_lr":  # with a rise of one update, nothing is seen of where it began
        config = dataclasses.replace(config, warmup=0.5)
        fit(make_model(drop_path_rate=0.2), *sides, dataclasses.replace(config, warmup_lr=0.0), tmp_path / "from_0")
        undisturbed = tmp_path / "from_0"
    if name == "batch_norm":  # of a network that has any
        model = make_model("test_mrl")
        run(sides, tmp_path / "held", model=make_model("test_mrl"))
        undisturbed = tmp_path / "held"
    if name == "patience":  # a validation side that the start already fits cannot be gained on
        config = dataclasses.replace(config, epochs=20, min_updates=1, validations=1)
        assert fit(model, *sides, config, tmp_path).updates < 80
        return
    fit(model, *sides, config, tmp_path / "here")
    here, there = numbers(tmp_path / "here")[0], numbers(undisturbed)[0]
    keys = ("event", "update", "loss", "val_loss", "val_score")
    assert [[line.get(k) for k in keys] for line in here] != [[line.get(k) for k in keys] for line in there]


WRONG = {
    "epochs": 0,
    "min_updates": 0,
    "batch_size": 1,
    "lr": 0.0,
    "layer_decay": 0.0,
    "weight_decay": -1.0,
    "warmup": 1.0,
    "min_lr": 2.0,
    "ema": 1.0,
    "clip": -1.0,
    "precision": "int8",
    "label_smoothing": 1.0,
    "freeze": -1,
    "patience": -1,
    "validations": 0,
    "start": "middle",
    "mixup": -0.1,
    "cutmix": -1.0,
    "warmup_lr": 1.5,
    "cooldown": 0.9,
    "batch_norm": "frozen",
}


@pytest.mark.parametrize("name", WRONG)
def test_fit_config__out_of_range(name):
    with pytest.raises(ConfigError, match=rf"FitConfig\({name}=.*: use "):
        FitConfig(**{name: WRONG[name]})


def test_fit__seed_and_precision_are_in_the_numbers(sides, undisturbed, tmp_path):
    run(sides, tmp_path / "seed", seed=1)
    losses = [[line.get("loss") for line in numbers(out)[0]] for out in (tmp_path / "seed", undisturbed)]
    assert losses[0] != losses[1]
    result = run(sides, tmp_path / "bf16", dataclasses.replace(SMALL, precision="bf16"))
    assert result.precision == "bf16"


def test_fit__the_callers_random_state_stays(sides, tmp_path):
    model = make_model()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(sides, tmp_path, dataclasses.replace(SMALL, epochs=0.1, min_updates=1), model=model)
    assert torch.equal(torch.rand(3), expected)


def test_fit__the_image_sets_stay(sides, undisturbed):
    assert all(side.augment is None for side in sides)


def test_fit__loss_that_is_not_finite(sides, tmp_path, monkeypatch):
    monkeypatch.setattr(Classification, "loss", lambda self, logits, batch, *_: logits.sum() * float("nan"))
    monkeypatch.setattr(Classification, "score", lambda self, logits, batch: (0.5, 1.0))
    with pytest.raises(ConfigError, match=r"loss is not finite at update 1; use a lower --lr than 0.001"):
        run(sides, tmp_path)


def test_fit__each_epoch_shows_each_image_once(sides, tmp_path, monkeypatch):
    shown = []
    step = fit_loop.Loop._step

    def look(self, batch):
        shown.append(batch["index"].tolist())
        step(self, batch)

    monkeypatch.setattr(fit_loop.Loop, "_step", look)
    run(sides, tmp_path)
    assert [len(batch) for batch in shown] == [7, 7, 6, 6] * 2
    for epoch in (shown[:4], shown[4:]):
        assert sorted(index for batch in epoch for index in batch) == list(range(26))
    assert shown[:4] != shown[4:]


def test_fit__learns(sides, tmp_path):
    config = dataclasses.replace(SMALL, epochs=10, lr=3e-3, freeze=0, augment="none", layer_decay=1.0, validations=1)
    result = run(sides, tmp_path, config, model=make_model())
    first, last = result.candidates[0], result.candidates[-1]
    lines = [line for line in numbers(tmp_path)[0] if line["event"] == "train"]
    assert np.mean([line["loss"] for line in lines[-8:]]) < np.mean([line["loss"] for line in lines[:8]])
    assert last["update"] == 40
    assert result.best_score >= first["val_score"]


def test_fit__no_pickle(sides, tmp_path, monkeypatch):
    stopped(sides, tmp_path, monkeypatch)
    for path in (tmp_path / "checkpoint").iterdir():
        assert path.suffix == ".safetensors"
        load_file(path)
