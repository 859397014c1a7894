"""The second fit on the whole training side: nothing chosen, the same share of the schedule, exact resume, cached features."""

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mrl import fit_loop
from mrl.data import ImageSet
from mrl.features import add_features, read_features
from mrl.fit import FitConfig, fit, refit
from mrl.fit_fixed import stop_of
from mrl.tasks import Classification
from test_fit import SHAPE, SMALL, make_model, make_samples, same_weights


class Stop(Exception):
    pass


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    train, val = make_samples(folder, 26, 1), make_samples(folder, 15, 2)
    return [ImageSet(side, ("a", "b"), SHAPE) for side in (train, val, [*train, *val])]


@pytest.fixture(scope="module")
def inner(sides, tmp_path_factory):
    out = tmp_path_factory.mktemp("inner")
    result = fit(make_model(), *sides[:2], SMALL, out, features=out / "features.safetensors")
    return result, out / "features.safetensors"


def chosen_at(inner, update):
    return dataclasses.replace(inner[0], best_update=update)


def again(sides, inner, out, update=4, config=SMALL, **kwargs):
    model = make_model()
    return refit(model, sides[2], chosen_at(inner, update), config, out, features=inner[1], **kwargs), model


def test_refit__stops_at_the_same_share_of_the_schedule(sides, inner, tmp_path):
    result, model = again(sides, inner, tmp_path)
    # 26 images: 4 updates an epoch, 8 in all; 41 images: 6 an epoch, 12 in all
    assert result.updates == result.best_update == 6 == stop_of(4, 26, SMALL, 41)
    assert result.epochs == 1
    assert (result.n_train, result.n_val) == (41, 0)
    assert result.images_seen == inner[0].images_seen + 41
    assert result.meta["inner"]["best_update"] == 4
    assert result.probe_strength == inner[0].probe_strength
    best = load_file(tmp_path / "best.safetensors")
    assert all(torch.equal(v, best[k]) for k, v in model.state_dict().items())
    events = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [e["event"] for e in events] == ["train"] * 6
    assert all(p.requires_grad for p in model.parameters())


def test_refit__the_starting_head_is_the_probe_of_all_training_images(sides, inner, tmp_path):
    result, model = again(sides, inner, tmp_path, update=0)
    start = load_file(tmp_path / "start.safetensors")
    assert result.updates == 0
    assert all(torch.equal(v, start[k]) for k, v in model.state_dict().items())
    before = make_model().state_dict()
    assert all(torch.equal(start[k], before[k]) for k in before if not k.startswith("head"))
    assert not same_weights(tmp_path / "start.safetensors", Path(inner[1]).parent / "start.safetensors")


def test_refit__is_the_inner_fit_where_the_images_are_the_same(sides, tmp_path, monkeypatch):
    """On the inner images alone, up to their chosen candidate, it repeats what the inner fit did."""
    scores = itertools.count()
    monkeypatch.setattr(Classification, "score", lambda self, logits, batch: (next(scores), 1.0))  # the last one wins
    config = dataclasses.replace(SMALL, epochs=1, min_updates=4, validations=1)
    chosen = fit(make_model(), *sides[:2], config, tmp_path / "one")
    assert chosen.best_update == 4
    refit(make_model(), sides[0], chosen, config, tmp_path / "two")
    for name in ("start", "best"):
        one, two = (load_file(tmp_path / k / f"{name}.safetensors") for k in ("one", "two"))
        assert all(torch.allclose(one[k], two[k], atol=1e-4) for k in one), name


def test_refit__killed_and_resumed_gives_the_same_weights(sides, inner, tmp_path, monkeypatch):
    undisturbed = tmp_path / "undisturbed"
    again(sides, inner, undisturbed)
    monkeypatch.setattr(fit_loop, "CHECKPOINT_SECONDS", 0.0)
    step = fit_loop.Loop._step

    def stop(self, batch):
        if self.update == 3:
            raise Stop
        step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(fit_loop.Loop, "_step", stop)
        with pytest.raises(Stop):
            again(sides, inner, tmp_path / "killed")
    result, _ = again(sides, inner, tmp_path / "killed")
    assert result.updates == 6
    assert same_weights(undisturbed / "best.safetensors", tmp_path / "killed" / "best.safetensors")
    assert not (tmp_path / "killed" / "checkpoint").exists()
    finished, model = again(sides, inner, tmp_path / "killed")
    assert finished == result
    best = load_file(tmp_path / "killed" / "best.safetensors")
    assert all(torch.equal(v, best[k]) for k, v in model.state_dict().items())


def test_refit__takes_the_features_that_the_inner_fit_kept(sides, inner, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(fit_loop.Loop, "_collect", None)  # any forward pass would fail
        again(sides, inner, tmp_path / "kept", update=0)
    refit(make_model(), sides[2], chosen_at(inner, 0), SMALL, tmp_path / "fresh")
    kept, fresh = (load_file(tmp_path / k / "best.safetensors") for k in ("kept", "fresh"))
    assert all(torch.allclose(kept[k], fresh[k], atol=1e-4) for k in kept)


def test_refit__from_scratch_needs_no_probe(sides, tmp_path):
    config = dataclasses.replace(SMALL, start="scratch")
    chosen = fit(make_model(), *sides[:2], config, tmp_path / "inner")
    result = refit(make_model(), sides[2], dataclasses.replace(chosen, best_update=8), config, tmp_path / "outer")
    assert (result.updates, result.probe_strength) == (12, None)


def test_features__another_precision_or_a_missing_image_is_computed_again(tmp_path):
    path = tmp_path / "f.safetensors"
    add_features(path, ["a", "b"], torch.tensor([[1.0], [2.0]]), "no")
    add_features(path, ["b", "c"], torch.tensor([[3.0], [4.0]]), "no")
    assert read_features(path, ["c", "b", "a"], "no").tolist() == [[4.0], [3.0], [1.0]]
    assert read_features(path, ["a"], "bf16") is None
    assert read_features(path, ["a", "x"], "no") is None
    add_features(path, ["a"], torch.tensor([[9.0]]), "bf16")
    assert read_features(path, ["b"], "no") is None
    assert read_features(path, ["a"], "bf16").tolist() == [[9.0]]


def test_stop_of__follows_min_updates():
    assert stop_of(60, 100, FitConfig(min_updates=120), 120) == 60
    assert stop_of(1, 10_000, FitConfig(), 100) == 1
