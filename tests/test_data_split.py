from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mrl.data.audit import Audit, audit_source
from mrl.data.records import ImageRecord
from mrl.data.sources import ImageSource, Sample, load_source
from mrl.data.split import SplitRow, check_split, make_split, read_split, split_units, write_split
from mrl.errors import ConfigError, DataError
from pictures import class_folders


def audited(rows, phash=""):
    """An audit of `(label, group, pixels[, side])` rows, without files."""
    samples, files = [], {}
    for n, (label, group, pixels, *side) in enumerate(rows):
        name = f"{'test/' if side else ''}{n:05d}.png"
        samples.append(Sample(name, Path(name), label, group, side=side[0] if side else None))
        files[name] = ImageRecord(f"file{n}", str(pixels), phash if isinstance(phash, str) else phash(n), "8x8", "L", 8)
    labels = tuple(sorted({s.label for s in samples}))
    return Audit(ImageSource("made", tuple(samples), labels), files)


def plain(**counts):
    return audited([(label, None, f"{label}{n}") for label, k in counts.items() for n in range(k)])


def shares(rows):
    return Counter((row.label, row.split) for row in rows)


def test_make_split__without_groups_is_exact():
    found = shares(make_split(plain(a=200, b=60, c=17)))
    # 25 % of 277 is 69: 50 + 15 + 4; 15 % of the other 208 is 31: 22.5, 6.75 and 1.95, the largest remainders up
    assert [found[(c, "test")] for c in "abc"] == [50, 15, 4]
    assert [found[(c, "val")] for c in "abc"] == [22, 7, 2]


def test_make_split__numbers_of_elpv():
    found = shares(make_split(plain(defective=821, functional=1803)))
    assert (found[("defective", "test")], found[("functional", "test")]) == (205, 451)
    assert found[("defective", "val")] + found[("functional", "val")] == 295


def test_make_split__smallest_possible_class():
    found = shares(make_split(plain(a=40, b=3)))
    assert [found[("b", side)] for side in ("train", "val", "test")] == [1, 1, 1]


def test_make_split__is_a_function_of_the_seed_and_not_of_the_order():
    audit = plain(a=40, b=30)
    rows = make_split(audit)
    turned = Audit(replace(audit.source, samples=audit.source.samples[::-1]), dict(reversed(audit.files.items())))
    assert make_split(turned) == rows
    assert make_split(audit, seed=0) == rows
    assert make_split(audit, seed=1) != rows
    assert shares(make_split(audit, seed=1)) == shares(rows)


def test_make_split__exact_copies_stay_together():
    audit = audited([("a", None, n // 2) for n in range(60)] + [("b", None, f"b{n}") for n in range(60)])
    for seed in range(5):
        side = {row.image: row.split for row in make_split(audit, seed=seed)}
        assert all(side[f"{2 * n:05d}.png"] == side[f"{2 * n + 1:05d}.png"] for n in range(30))
        assert 28 <= sum(s == "test" for s in side.values()) <= 32


@pytest.mark.parametrize("seed", range(5))
def test_make_split__groups_stay_together_and_shares_are_close(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 21, 44)  # 44 modules, as behind ELPV, each with its own share of defects
    rows = []
    for group, size in enumerate(sizes):
        share = rng.beta(1, 2)
        rows += [("bad" if rng.random() < share else "good", f"m{group}", f"{group}-{n}") for n in range(size)]
    found = make_split(audited(rows), seed=seed)
    sides = {}
    for row in found:
        sides.setdefault(row.group, set()).add(row.split)
    assert all(len(s) == 1 for s in sides.values())
    counts, total = shares(found), Counter(row.label for row in found)
    rest = {c: total[c] - counts[(c, "test")] for c in total}
    for label in ("bad", "good"):
        assert abs(counts[(label, "test")] / total[label] - 0.25) < 0.02
        assert abs(counts[(label, "val")] / rest[label] - 0.15) < 0.02
    assert abs(sum(row.split == "test" for row in found) / len(found) - 0.25) < 0.01


def test_make_split__groups_of_every_size_can_be_tested_on():
    rows = [(label, f"{label}{n // 10}", f"{label}{n}") for label in "ab" for n in range(200)]
    drawn = {row.group for seed in range(12) for row in make_split(audited(rows), seed=seed) if row.split == "test"}
    assert len(drawn) > 30


def test_make_split__groups_and_copies_are_linked():
    # group g1 and g2 share a picture, and g2 has a copy outside any group
    rows = [("a", "g1", "p"), ("a", "g2", "p"), ("a", "g2", "q"), ("a", None, "q")]
    rows += [(label, None, f"{label}{n}") for label in "ab" for n in range(20)]
    units = split_units(audited(rows))
    assert {units[f"{n:05d}.png"] for n in range(4)} == {"00000.png"}
    assert len(set(units.values())) == 41


def test_make_split__near_duplicates_are_grouped_only_when_asked():
    rows = [(label, None, f"{label}{n}") for label in "ab" for n in range(30)]
    codes = [int(c) for c in np.random.default_rng(0).integers(0, 2**63, 30)]
    audit = audited(rows, phash=lambda n: f"{codes[n // 2] ^ (n % 2):016x}")
    assert len(audit.near) == 30
    apart = [{row.image: row.split for row in make_split(audit, seed=seed, group_near=True)} for seed in range(4)]
    assert all(side[a] == side[b] for side in apart for a, b, _ in audit.near)
    side = {row.image: row.split for row in make_split(audit)}
    assert any(side[a] != side[b] for a, b, _ in audit.near)


def test_make_split__test_images_are_the_test_side():
    rows = [(label, None, f"{label}{n}") for label in "ab" for n in range(20)]
    rows += [(label, None, f"held{label}{n}", "test") for label in "ab" for n in range(5)]
    found = make_split(audited(rows))
    assert {row.image for row in found if row.split == "test"} == {
        row.image for row in found if row.image.startswith("test/")
    }
    assert shares(found)[("a", "val")] == 3


def test_make_split__near_duplicate_of_a_test_image_with_group_near():
    rows = [(label, None, f"{label}{n}") for label in "ab" for n in range(4)] + [
        (c, None, f"h{c}", "test") for c in "ab"
    ]
    codes = {n: int(c) for n, c in enumerate(np.random.default_rng(0).integers(0, 2**63, 10))}
    codes[8] = codes[0] ^ 1
    with pytest.raises(DataError, match=r"00000.png belongs together with test/00008.png of --test"):
        make_split(audited(rows, phash=lambda n: f"{codes[n]:016x}"), group_near=True)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [("a", "g1", n) for n in range(9)] + [("b", None, f"b{n}") for n in range(9)],
            r"a has 1, and each class needs at least 3",
        ),
        (
            [("a", f"g{n % 2}", n) for n in range(9)] + [("b", None, f"b{n}") for n in range(9)],
            r"a has 2, .* add images of other groups",
        ),
        ([(c, "one", f"{c}{n}") for c in "ab" for n in range(9)], r"a has 1, b has 1"),
    ],
)
def test_make_split__too_few_groups(rows, message):
    with pytest.raises(DataError, match=message):
        make_split(audited(rows))


def test_make_split__groups_that_cannot_be_divided():
    # each class in 3 groups, but every two groups together hold a class that is then missing elsewhere
    rows = []
    for n, labels in enumerate(["ab", "bc", "ca", "abc"]):
        rows += [(c, f"g{n}", f"{n}{c}{i}") for c in labels for i in range(5)]
    with pytest.raises(DataError, match="no division found that has every class on each side"):
        make_split(audited(rows))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "standard"}, "--preset standard: is no hold-out; `make_folds` deals its folds, or use quick"),
        ({"preset": "full"}, "--preset full: is no hold-out"),
        ({"preset": "fast"}, "--preset fast: unknown; use quick, standard or full"),
        ({"seed": -1}, "--seed -1"),
        ({"test_fraction": 0}, "test_fraction 0"),
        ({"val_fraction": 1.0}, "val_fraction 1.0"),
    ],
)
def test_make_split__wrong_options(options, message):
    with pytest.raises(ConfigError, match=message):
        make_split(plain(a=9, b=9), **options)


def test_make_split__every_argument_changes_the_split():
    audit = plain(a=40, b=40)
    first = make_split(audit)
    assert sum(row.split == "test" for row in make_split(audit, test_fraction=0.5)) == 40
    assert sum(row.split == "val" for row in make_split(audit, val_fraction=0.5)) == 30
    assert sum(row.split == "test" for row in first) == 20


def test_make_split__many_groups_and_single_images():
    rows = [("ab"[n % 3 == 0], f"g{n // 10}", n) for n in range(10_000)] + [("a", None, f"x{n}") for n in range(10_000)]
    found = make_split(audited(rows))
    assert sum(row.split == "test" for row in found) == 5_000


def test_write_split__columns_and_order(tmp_path):
    audit = audit_source(load_source(class_folders(tmp_path / "data", {"a": 5, "b": 5})))
    rows = make_split(audit)
    path = write_split(tmp_path / "split.csv", rows)
    assert path.read_text().splitlines()[0] == "image,label,group,sha256,split"
    assert path.read_text().splitlines()[1].startswith(f"a/000.png,a,,{audit.sha256['a/000.png']},")
    assert read_split(path) == rows


@pytest.mark.parametrize("text", ["", "image,label\na,b\n", "image,label,group,sha256,split\na,b,,0,other\n"])
def test_read_split__what_is_no_split(tmp_path, text):
    (tmp_path / "split.csv").write_text(text)
    with pytest.raises(DataError, match=r"split.csv: (is not a split|a is on side 'other')"):
        read_split(tmp_path / "split.csv")


def test_read_split__is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="not found"):
        read_split(tmp_path / "split.csv")


def test_check_split__finds_what_is_wrong():
    rows = [("a", "g", "1"), ("a", "g", "2")] + [(label, None, f"{label}{n}") for label in "ab" for n in range(20)]
    audit = audited([*rows, ("a", None, "held", "test"), ("b", None, "held2", "test")])
    good = make_split(audit)
    check_split(good, audit)

    def changed(image, **fields):
        return [replace(row, **fields) if row.image == image else row for row in good]

    first = next(row for row in good if row.image == "00000.png")
    other = {"train": "val", "val": "train"}[first.split]
    one_side = [replace(row, split="train") if row.split == "val" else row for row in good]
    for wrong, message in (
        (good[1:], r"of its images 1 missing \(00000.png, \.\.\.\)"),
        ([*good, good[0]], "1 twice"),
        ([*good, SplitRow("x.png", "a", "", "0", "train")], "1 unknown"),
        (changed("00003.png", label="b"), "the line of 00003.png is not that of the audit"),
        (changed("00003.png", sha256="0"), "the line of 00003.png"),
        (changed("00003.png", split="other"), "the line of 00003.png"),
        (changed("test/00042.png", split="train"), "test/00042.png is an image of --test and stands in train"),
        (changed("00000.png", split=other), "00000.png and 00001.png belong together and stand on different sides"),
        (one_side, "the val side has no image of a, b"),
    ):
        with pytest.raises(DataError, match=message):
            check_split(wrong, audit)


@pytest.mark.real
def test_make_split__elpv():
    source = load_source("elpv")
    files = {s.image: ImageRecord("0", s.image, "", "300x300", "L", 8) for s in source.samples}  # it has no copies
    rows = make_split(Audit(source, files))
    found = shares(rows)
    assert (found[("defective", "test")], found[("functional", "test")]) == (205, 451)
    assert sum(row.split == "val" for row in rows) == 295
