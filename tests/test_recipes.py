"""The published ImageNet recipe: what the files say, and that the one loop carries it out."""

import dataclasses
import itertools
import random
from importlib import resources

import numpy as np
import pytest
import timm
import torch
from torch import nn

from mrl import fit_loop
from mrl.cli import _arguments, _normalise, build_parser, main
from mrl.commands import fit as fit_command
from mrl.data.imagenet import ImageNetAugment, seeded
from mrl.errors import ConfigError
from mrl.fit import FitConfig, fit
from mrl.mixing import mix_batch
from mrl.optimizer import cosine
from mrl.run import read_json
from mrl.tasks import Classification
from pictures import class_folders
from test_fit import SMALL, interrupt, make_model, numbers, same_weights, sides  # noqa: F401

# name: lr, images an update, weight decay, warm-up epochs, lowest rate
PUBLISHED = {
    "mrl_13": (2.55e-4, 256, 0.05, 5, 1e-5),
    "mrl_21": (1.25e-4, 128, 0.1, 5, 2e-5),
    "mrl_tiny": (1.25e-4, 128, 0.1, 10, 1e-5),
    "mrl_small": (1.25e-4, 128, 0.1, 5, 1e-5),
    "mrl_hovernet": (1.25e-4, 128, 0.05, 5, 1e-5),
}
RECIPES = resources.files("mrl") / "recipes"


def told(*words):
    parsed = build_parser().parse_args(_normalise(["fit", *map(str, words)]))
    return _arguments(fit_command, parsed["fit"])


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipe__has_the_published_numbers(name):
    lr, batch, decay, warmup, lowest = PUBLISHED[name]
    arguments = told("--config", RECIPES / f"{name}.yaml", "--data", "d", "--out", "o")
    budget = arguments["budget"]
    assert (arguments["model"], arguments["weights"], arguments["arm"]) == (name, None, "baseline")
    assert timm.is_model(name)
    assert (budget.lr, budget.batch_size, budget.weight_decay) == (lr, batch, decay)
    assert budget.epochs * np.array([budget.warmup, budget.cooldown]) == pytest.approx([warmup, 10])
    assert budget.epochs == 300 + 10
    assert budget.lr * budget.warmup_lr == pytest.approx(1e-6)
    assert budget.lr * budget.min_lr == pytest.approx(lowest)
    assert (budget.mixup, budget.cutmix, budget.label_smoothing, budget.augment) == (0.8, 1.0, 0.1, "imagenet")
    assert (budget.start, budget.freeze, budget.layer_decay, budget.clip, budget.ema) == ("scratch", 0, 1.0, 0.0, 0.0)
    augment = ImageNetAugment((224, 224))
    assert (augment.policy, augment.erase, augment.scale) == ("rand-m9-mstd0.5-inc1", 0.25, (0.08, 1.0))


def test_recipe__every_file_is_tested_and_flags_take_precedence():
    assert {p.name for p in RECIPES.iterdir()} == {f"{name}.yaml" for name in PUBLISHED}
    changed = told("--config", RECIPES / "mrl_13.yaml", "--out", "o", "--epochs", 2, "--model", "test_mrl")
    assert (changed["budget"].epochs, changed["model"], changed["budget"].mixup) == (2.0, "test_mrl", 0.8)


def test_recipe__trains_a_network_from_scratch(tmp_path):
    data = class_folders(tmp_path / "data", {"a": 24, "b": 24, "c": 24})
    command = ["fit", "--config", str(RECIPES / "mrl_13.yaml"), "--data", str(data), "--out", str(tmp_path / "run")]
    command += ["--model", "test_mrl", "--image-size", "32", "--epochs", "1", "--min-updates", "4", "--batch-size", "9"]
    assert main(command) == 0
    record = read_json(tmp_path / "run" / "arms" / "baseline" / "fit.json")
    assert record["updates"] == 6
    assert record["linear_probe_val"] is None
    assert not record["below_linear_probe"]
    assert record["frozen_blocks"] == 0
    assert main(["evaluate", "--out", str(tmp_path / "run")]) == 1  # the other arm is not there


SCRATCH = dataclasses.replace(
    SMALL, start="scratch", mixup=0.8, cutmix=1.0, label_smoothing=0.1, augment="imagenet", freeze=0, batch_size=7
)


@pytest.fixture(scope="module")
def from_scratch(sides, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("scratch")
    fit(make_model("test_mrl"), *sides, SCRATCH, out)
    return out


@pytest.mark.parametrize("at", [3, 6])
def test_scratch__resumes_exactly(sides, from_scratch, tmp_path, monkeypatch, at):  # noqa: F811
    monkeypatch.setattr(fit_loop, "CHECKPOINT_SECONDS", 0.0)
    interrupt(monkeypatch, at, lambda: fit(make_model("test_mrl"), *sides, SCRATCH, tmp_path))
    fit(make_model("test_mrl"), *sides, SCRATCH, tmp_path)
    assert numbers(tmp_path) == numbers(from_scratch)
    assert same_weights(tmp_path / "best.safetensors", from_scratch / "best.safetensors")


def test_scratch__starts_from_the_network_as_it_is_built(sides, from_scratch):  # noqa: F811
    from safetensors.torch import load_file

    start, built = load_file(from_scratch / "start.safetensors"), make_model("test_mrl").state_dict()
    assert all(torch.equal(start[k], v) for k, v in built.items())
    lines, record = numbers(from_scratch)
    validations = [line for line in lines if line["event"] == "validation"]
    assert validations[0]["update"] == 0
    assert all(line["train_score"] is None for line in validations)
    assert record["linear_probe_val"] is None


def test_scratch__without_a_gain_says_so(sides, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(Classification, "score", lambda self, logits, side: (0.5, float(len(calls.append(1) or calls))))
    calls = []
    result = fit(make_model("test_mrl"), *sides, SCRATCH, tmp_path)
    assert result.warnings == ["no candidate was better on the inner validation side than the network before training"]


# Mixing


@pytest.mark.parametrize("n", [1, 2, 7, 8])
@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mix_batch__targets_are_the_shares(n, mixup, cutmix):
    labels = torch.arange(n) % 3
    images = nn.functional.one_hot(labels, 3).float()[:, :, None, None].expand(-1, -1, 10, 12).contiguous()
    before = images.clone()
    mixed, targets = mix_batch(images, labels, 3, mixup=mixup, cutmix=cutmix, seed=5)
    assert torch.equal(images, before)
    torch.testing.assert_close(targets.sum(1), torch.ones(n))
    torch.testing.assert_close(mixed.mean((2, 3)), targets, atol=1e-5, rtol=1e-5)
    again = mix_batch(images, labels, 3, mixup=mixup, cutmix=cutmix, seed=5)
    assert torch.equal(again[0], mixed)
    assert torch.equal(again[1], targets)
    if n > 1:
        assert not torch.equal(mix_batch(images, labels, 3, mixup=mixup, cutmix=cutmix, seed=6)[1], targets)


def test_loss__of_mixed_targets():
    logits, target = torch.randn(5, 3), torch.rand(5, 3).softmax(1)
    batch = {"label": torch.tensor([0, 1, 2, 0, 1]), "weight": torch.ones(5), "target": target}
    smoothed = 0.9 * target + 0.1 / 3
    expected = -(smoothed * logits.log_softmax(1)).sum(1)
    torch.testing.assert_close(Classification(3, label_smoothing=0.1).loss(logits, batch), expected.mean())
    weights = target @ torch.tensor([1.0, 2.0, 3.0])
    weighted = Classification(3, (1.0, 2.0, 3.0), label_smoothing=0.0).loss(logits, batch)
    plain = -(target * torch.tensor([1.0, 1.0, 1.0]) * logits.log_softmax(1)).sum(1)
    torch.testing.assert_close(weighted, (weights * plain).sum() / weights.sum())


def test_fit_config__confidence_and_mixing_exclude_each_other():
    with pytest.raises(ConfigError, match=r"FitConfig\(use_confidence=True\): use false with mixup or cutmix"):
        FitConfig(use_confidence=True, cutmix=1.0)


# Augmentation


def test_imagenet_augment__is_seeded_and_leaves_the_random_states():
    augment, image = ImageNetAugment((24, 16)), torch.rand(3, 40, 50)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    first = augment(image, seed=2**62 + 1)
    assert torch.equal(augment(image, seed=2**62 + 1), first)
    assert len({augment(image, seed=s).sum().item() for s in range(8)}) == 8
    finished = [augment.finish(torch.zeros(3, 24, 16), seed=s) for s in range(40)]
    erased = [bool(x.any()) for x in finished]
    assert 2 <= sum(erased) <= 20
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])
    assert first.shape == (3, 24, 16)
    assert 0 <= first.min() <= first.max() <= 1


def test_imagenet_augment__each_part_does_something():
    image = torch.rand(3, 40, 50)
    off = {"scale": (1.0, 1.0), "ratio": (1.25, 1.25), "flip": 0.0, "policy": "", "erase": 0.0}
    plain = ImageNetAugment((40, 50), **off)
    torch.testing.assert_close(plain(image, seed=0), image, atol=1e-5, rtol=0)
    assert torch.equal(plain.finish(image, seed=0), image)
    flipped = dataclasses.replace(plain, flip=1.0)(image, seed=0)
    torch.testing.assert_close(flipped, image.flip(-1), atol=1e-5, rtol=0)
    for change in ({"scale": (0.1, 0.2)}, {"policy": "rand-m9-mstd0.5-inc1"}, {"ratio": (0.5, 0.6)}):
        changed = [dataclasses.replace(plain, **change)(image, seed=seed) for seed in range(4)]
        assert max((x - image).abs().max() for x in changed) > 0.05


def test_imagenet_augment__reads_the_picture_at_full_size(sides, monkeypatch):  # noqa: F811
    from mrl.data import loading

    read = []
    monkeypatch.setattr(loading, "read_image", lambda path, **kw: read.append(path) or torch.rand(3, 64, 64))
    train = loading.ImageSet(sides[0].samples, sides[0].classes, sides[0].preprocess, ImageNetAugment((32, 32)))
    assert train[3]["image"].shape == (3, 32, 32)
    assert read == [sides[0].samples[3].path]


def test_seeded__restores_after_an_error():
    state = random.getstate()
    with pytest.raises(KeyError), seeded(1):
        raise KeyError
    assert random.getstate() == state


# Schedule


def test_cosine__rises_from_warmup_lr_and_stays_cool():
    adam = torch.optim.AdamW([torch.ones(1, requires_grad=True)], lr=1.0)
    schedule = cosine(adam, 100, warmup=0.1, min_lr=0.05, warmup_lr=0.02, cooldown=0.2)
    rates = []
    for update in range(1, 101):
        schedule.step_update(update)
        rates.append(adam.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(0.02 + 0.098)
    assert max(rates) == rates[9] == pytest.approx(1.0)
    assert rates[-20:] == pytest.approx([0.05] * 20)
    assert all(a > b for a, b in itertools.pairwise(rates[9:81]))


def test_imagenet_augment__strongest_posterize_keeps_a_bit():
    from mrl.data.imagenet import _rand_augment

    ops = {op.name: op for op in _rand_augment("rand-m9-mstd0.5-inc1", 32).ops}
    assert ops["PosterizeIncreasing"].level_fn(10.0, {}) == (1,)
    assert ops["PosterizeIncreasing"].level_fn(5.0, {}) == (2,)
