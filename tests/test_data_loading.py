import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from mrl.data.images import read_image
from mrl.data.loading import ImageCache, ImageSet, make_loader
from mrl.data.sources import Sample, load_source
from mrl.data.transforms import Preprocess, make_augment
from mrl.errors import ConfigError, DataError
from pictures import class_folders, wide_png

PREPROCESS = Preprocess((12, 10))


@pytest.fixture
def source(tmp_path):
    root = class_folders(tmp_path, {"crack": 4, "good": 5})
    wide = np.random.default_rng(0).integers(0, 65536, (9, 8, 3)).astype(np.uint16)
    (root / "good" / "wide.png").write_bytes(wide_png(wide))
    return load_source(root)


def make(source, **options):
    return ImageSet(source.samples, source.classes, PREPROCESS, **options)


def epoch(images, **options):
    return [batch["index"].tolist() for batch in make_loader(images, 3, **options)]


@pytest.mark.parametrize("cache_mb", [0, 0.001, 10])
def test_image_set__exactly_the_numbers_of_predict(source, cache_mb):
    images = make(source, cache_mb=cache_mb)
    for _ in range(2):
        for i, sample in enumerate(source.samples):
            item = images[i]
            assert torch.equal(item["image"], PREPROCESS(read_image(sample.path)))
            assert (item["label"], item["index"], item["weight"]) == (source.classes.index(sample.label), i, 1.0)
            assert item["image"].dtype == torch.float32
    assert images.cache.used_bytes <= cache_mb * 1e6


def test_image_set__keeps_grey_as_one_channel(source):
    images = make(source)
    list(make_loader(images, 4))
    assert images.cache.used_bytes == (9 * 1 + 1 * 3) * 12 * 10 * 4


def test_image_set__reads_each_file_once_while_it_fits(source, monkeypatch):
    import mrl.data.loading as loading

    reads = []
    monkeypatch.setattr(
        loading, "read_image", lambda path, **options: reads.append(path) or read_image(path, **options)
    )
    images = make(source)
    other = make(source, cache=images.cache, augment=make_augment("light"))
    for _ in range(2):
        list(make_loader(images, 4))
        list(make_loader(other, 4))
    assert len(reads) == len(source.samples)


def test_image_set__augmentation_depends_on_seed_epoch_and_index_only(source):
    def images_of(seed, epoch, order):
        images = make(source, augment=make_augment("light"), seed=seed)
        images.set_epoch(epoch)
        return {i: images[i]["image"] for i in order}

    first = images_of(0, 2, range(10))
    again = images_of(0, 2, reversed(range(10)))
    assert all(torch.equal(first[i], again[i]) for i in range(10))
    for seed, number in ((0, 3), (1, 2)):
        other = images_of(seed, number, range(10))
        assert not any(torch.equal(first[i], other[i]) for i in range(10))


def test_image_set__augmentation_leaves_the_cache_alone(source):
    images = make(source, augment=make_augment("medium"))
    before = images.resized(0).clone()
    for number in range(5):
        images.set_epoch(number)
        images[0]
    assert torch.equal(images.resized(0), before)


def test_image_set__bit_depth_is_that_of_the_preprocessing(tmp_path):
    for label, value in (("a", 4095), ("b", 2048)):
        (tmp_path / label).mkdir()
        for n in range(3):
            Image.fromarray(np.full((4, 4), value - n, np.uint16)).save(tmp_path / label / f"{n}.png")
    found = load_source(tmp_path)
    images = ImageSet(found.samples, found.classes, Preprocess((4, 4), bit_depth=12))
    assert images.resized(0).max() == 1


def test_image_set__wrong_label_and_index(source):
    with pytest.raises(DataError, match=r"x.png: label dirt is not one of crack, good"):
        ImageSet([Sample("x.png", source.samples[0].path, "dirt")], source.classes, PREPROCESS)
    with pytest.raises(IndexError):
        make(source)[10]


def test_make_loader__batches(source):
    batch = next(iter(make_loader(make(source), 4)))
    assert {name: (tuple(v.shape), v.dtype) for name, v in batch.items()} == {
        "image": ((4, 3, 12, 10), torch.float32),
        "label": ((4,), torch.int64),
        "weight": ((4,), torch.float32),
        "index": ((4,), torch.int64),
    }
    assert batch["index"].tolist() == [0, 1, 2, 3]


def test_make_loader__order_depends_on_seed_and_epoch_only(source):
    def orders(seed, numbers):
        images = make(source)
        loader, found = make_loader(images, 3, shuffle_seed=seed), []
        for number in numbers:
            images.set_epoch(number)
            found.append([i for batch in loader for i in batch["index"].tolist()])
        return found

    zero, one, two = orders(0, [0, 1, 2])
    torch.rand(5)
    assert orders(0, [2, 0]) == [two, zero]
    assert sorted(one) == list(range(10))
    assert len({tuple(order) for order in (zero, one, two, orders(1, [0])[0])}) == 4


def test_make_loader__drop_last_and_no_shuffle(source):
    assert [len(b) for b in epoch(make(source))] == [3, 3, 3, 1]
    assert [len(b) for b in epoch(make(source), drop_last=True)] == [3, 3, 3]
    assert [i for batch in epoch(make(source)) for i in batch] == list(range(10))
    with pytest.raises(ConfigError, match="batch size 0"):
        make_loader(make(source), 0)


def test_make_loader__leaves_the_global_random_state_alone(source):
    images, state = make(source, augment=make_augment("medium")), torch.get_rng_state()
    list(make_loader(images, 3, shuffle_seed=0))
    assert torch.equal(torch.get_rng_state(), state)


def test_make_loader__workers_give_the_same_batches(source):
    def batches(workers):
        images = make(source, augment=make_augment("light"))
        images.set_epoch(4)
        return list(make_loader(images, 4, shuffle_seed=0, workers=workers))

    for one, other in zip(batches(0), batches(1), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_image_cache__limit_and_pickle():
    cache = ImageCache(cache_mb=0.001)
    for n in range(5):
        cache.put(n, torch.full((3, 5, 5), float(n)))
    assert cache.used_bytes == 900
    assert cache.get(2).eq(2).all()
    assert cache.get(3) is None
    again = pickle.loads(pickle.dumps(cache))
    again.put(0, torch.zeros(3, 5, 5))
    assert again.used_bytes == 900
    assert again.get(1).eq(1).all()
