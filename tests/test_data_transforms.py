import time
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from mrl.data.images import read_image
from mrl.data.transforms import Augment, Preprocess, is_grey, make_augment
from mrl.errors import ConfigError
from pictures import draw

LEVELS = ["none", "light", "medium"]


def picture(size=48):
    return torch.from_numpy(np.stack([draw(n, size) for n in range(3)])).float() / 255


def grey(size=48):
    return (torch.from_numpy(draw(3, size).copy()).float() / 255).expand(3, -1, -1)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest"])
def test_preprocess__equals_torchvision(interpolation):
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    ours = Preprocess((20, 30), mean, std, interpolation)(picture())
    theirs = v2.Resize((20, 30), v2.InterpolationMode(interpolation), antialias=interpolation != "nearest")(picture())
    assert torch.equal(ours, v2.Normalize(mean, std)(theirs.clamp(0, 1)))


def test_resize_image__is_near_to_pillow_and_stays_in_range():
    sharp = Image.fromarray(np.kron(np.eye(8, dtype=np.uint8) * 255, np.ones((9, 9), np.uint8)))
    image = torch.from_numpy(np.asarray(sharp).copy()).float().expand(3, -1, -1) / 255
    ours = Preprocess((30, 40)).resize_image(image)
    theirs = torch.from_numpy(np.asarray(sharp.resize((40, 30), Image.Resampling.BICUBIC)).copy()).float() / 255
    assert (ours.min(), ours.max()) == (0, 1)
    assert (ours[0] - theirs).abs().max() < 0.02


def test_resize_image__one_channel_gives_exactly_the_numbers_of_three():
    preprocess, image = Preprocess((17, 23)), grey(64)
    one, three = preprocess.resize_image(image), preprocess.resize_image(image.contiguous())
    assert is_grey(one)
    assert not is_grey(three)
    assert torch.equal(one, three)
    assert torch.equal(preprocess(image), preprocess(image.contiguous()))


def test_resize_image__is_the_same_with_any_number_of_threads():
    preprocess, image, before = Preprocess((112, 112)), picture(300), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = preprocess(image)
        torch.set_num_threads(2)
        assert torch.equal(preprocess(image), one)
    finally:
        torch.set_num_threads(before)


def test_resize_image__squash_keeps_the_whole_picture():
    image = torch.zeros(3, 40, 80)
    image[:, :, :8] = 1
    assert Preprocess((10, 10)).resize_image(image)[0, 5, 0] > 0.9


def test_preprocess__antialias_and_size_change_the_numbers():
    image = picture(64)
    assert not torch.equal(Preprocess((16, 16))(image), Preprocess((16, 16), antialias=False)(image))
    assert Preprocess(16).image_size == (16, 16)


def test_preprocess__record_round_trip_through_json():
    import json

    preprocess = Preprocess((20, 30), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", "squash", False, 12)
    assert Preprocess.from_dict(json.loads(json.dumps(preprocess.to_dict()))) == preprocess
    with pytest.raises(ConfigError, match="preprocessing record"):
        Preprocess.from_dict({"image_size": [4, 4], "crop": 1})


@pytest.mark.parametrize(
    "options",
    [
        {"image_size": (0, 3)},
        {"image_size": (3,)},
        {"mean": (0.5,)},
        {"std": (0.5, 0.0, 0.5)},
        {"interpolation": "lanczos"},
        {"resize": "crop"},
    ],
)
def test_preprocess__wrong_fields(options):
    with pytest.raises(ConfigError, match=f"Preprocess\\({next(iter(options))}="):
        Preprocess(**{"image_size": (8, 8), **options})


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("image", [picture(), grey(), picture()[:, :30]], ids=["rgb", "grey", "wide"])
def test_augment__same_seed_same_image_and_nothing_global(level, image):
    augment, before, state = make_augment(level), image.clone(), torch.get_rng_state()
    first = augment(image, seed=7)
    torch.rand(3)
    assert torch.equal(augment(image, seed=7), first)
    torch.set_rng_state(state)
    augment(image, seed=8)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(image, before)
    assert first.shape == image.shape
    assert is_grey(first) == is_grey(image)
    assert 0 <= first.min() <= first.max() <= 1


@pytest.mark.parametrize("level", ["light", "medium"])
def test_augment__other_seeds_other_images(level):
    augment = make_augment(level)
    images = [augment(picture(), seed=seed) for seed in range(8)]
    assert all(not torch.equal(a, b) for i, a in enumerate(images) for b in images[:i])


def test_augment__light_never_turns_a_picture():
    image = torch.zeros(3, 40, 40)
    image[:, :10] = 1  # a bright top stays on top
    for seed in range(40):
        changed = make_augment("light")(image, seed=seed)
        assert changed[:, 1].mean() > changed[:, -2].mean() + 0.5


def test_augment__medium_turns_it_all_ways():
    image = torch.zeros(3, 40, 40)
    image[:, :10] = 1
    edges = {}
    for seed in range(60):
        x = make_augment("medium")(image, seed=seed)[0]
        sides = {"top": x[1], "bottom": x[-2], "left": x[:, 1], "right": x[:, -2]}
        edges[max(sides, key=lambda name: sides[name].mean())] = True
    assert set(edges) == {"top", "bottom", "left", "right"}


NONE = Augment(crop_scale=1.0, flip=0.0, contrast=0.0, brightness=0.0)
STRONG = {"crop_scale": 0.5, "flip": 1.0, "vflip": 1.0, "quarter_turns": True, "degrees": 30.0}
STRONG |= {"contrast": 0.5, "brightness": 0.3, "blur": 1.0, "noise": 0.2}


@pytest.mark.parametrize("name", [f.name for f in fields(Augment)])
def test_augment__every_field_changes_the_image(name):
    changed = replace(NONE, **{name: STRONG[name]})
    assert any(not torch.equal(changed(picture(), seed=seed), picture()) for seed in range(6))
    assert torch.equal(NONE(picture(), seed=0), picture())


def test_augment__mirrors_and_turns_are_exact():
    image = picture()
    assert torch.equal(replace(NONE, flip=1.0)(image, seed=0), image.flip(-1))
    assert torch.equal(replace(NONE, vflip=1.0)(image, seed=0), image.flip(-2))


def test_augment__tilt_is_a_rotation_about_the_centre():
    image = torch.zeros(3, 41, 61)
    image[:, 18:23, 28:33] = 1
    tilted = NONE._tilt(image, 0.0, 0.0, 0.0)
    assert torch.allclose(tilted, image, atol=1e-4)
    line = torch.zeros(3, 61, 101)
    line[:, 30, 10:91] = 1
    turned = replace(NONE, degrees=30.0)._tilt(line, 1.0, 0.0, 0.0)
    rows, columns = torch.nonzero(turned[0] > 0.4, as_tuple=True)
    slope = np.polyfit(columns.numpy(), rows.numpy(), 1)[0]
    assert abs(abs(np.degrees(np.arctan(slope))) - 30) < 1


def test_make_augment__unknown_level():
    with pytest.raises(ConfigError, match="--augment heavy: unknown; use none, light, medium or imagenet"):
        make_augment("heavy")


def test_make_augment__light_is_fast():
    augment, image = make_augment("light"), picture(112)
    best = min(_seconds(lambda: [augment(image, seed=seed) for seed in range(32)]) for _ in range(5))
    assert best < 0.2  # about 12 ms on one free core


def test_augment__works_on_what_read_image_gives(tmp_path):
    Image.fromarray(draw(0, 40)).save(tmp_path / "a.png")
    image = Preprocess((24, 24)).resize_image(read_image(tmp_path / "a.png"))
    assert is_grey(make_augment("medium")(image, seed=0))


def _seconds(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
