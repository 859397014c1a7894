"""Repeated folds: whole, stratified, disjoint by group and picture, a function of the seed, and guarded by a hash."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from mrl.data.audit import Audit
from mrl.data.folds import FROZEN_FROM, Folds, check_folds, make_folds, read_folds, split_of, write_folds
from mrl.data.split import split_units
from mrl.errors import ConfigError, DataError
from test_data_split import audited, plain


def table(found, repeat):
    return Counter((row.label, row.folds[repeat]) for row in found.rows if not row.frozen)


@pytest.mark.parametrize(("preset", "repeats"), [("standard", 2), ("full", 5)])
def test_make_folds__every_image_is_tested_once_a_repeat_and_shares_are_even(preset, repeats):
    found = make_folds(plain(a=83, b=51, c=17), preset=preset)
    assert (found.k, found.repeats, len(found.cells)) == (5, repeats, 5 * repeats)
    for repeat in range(repeats):
        counts = table(found, repeat)
        for label, n in (("a", 83), ("b", 51), ("c", 17)):
            assert all(abs(counts[label, fold] - n / 5) < 1.01 for fold in range(5)), counts
    assert len({tuple(row.folds[r] for row in found.rows) for r in range(repeats)}) == repeats  # no repeat twice


def test_make_folds__is_a_function_of_the_seed_and_not_of_the_order():
    audit = plain(a=40, b=30)
    turned = Audit(replace(audit.source, samples=audit.source.samples[::-1]), dict(reversed(audit.files.items())))
    assert make_folds(turned) == make_folds(audit)
    assert make_folds(audit, seed=1).rows != make_folds(audit).rows


@pytest.mark.parametrize("seed", range(3))
def test_make_folds__groups_copies_and_what_they_link_stay_together(seed):
    rng = np.random.default_rng(seed)
    rows = [
        ("bad" if g % 3 == 0 else "good", f"g{g}", f"{g}-{n}") for g in range(40) for n in range(rng.integers(1, 9))
    ]
    rows += [("good", None, "1-0"), ("good", None, "alone"), ("good", None, "alone")]  # a copy of group g1, two copies
    audit = audited(rows)
    found, units = make_folds(audit, seed=seed), split_units(audited(rows))
    places = {}
    for row in found.rows:
        places.setdefault(units[row.image], set()).add(row.folds)
    assert all(len(p) == 1 for p in places.values())
    assert {row.folds for row in found.rows if row.group == "g1"} == {
        row.folds for row in found.rows if row.image == f"{len(rows) - 3:05d}.png"
    }


def test_make_folds__near_duplicates_only_when_asked():
    rows = [(label, None, f"{label}{n}") for label in "ab" for n in range(30)]
    codes = [int(c) for c in np.random.default_rng(0).integers(0, 2**63, 30)]
    audit = audited(rows, phash=lambda n: f"{codes[n // 2] ^ (n % 2):016x}")
    together = {row.image: row.folds for row in make_folds(audit, group_near=True).rows}
    assert all(together[a] == together[b] for a, b, _ in audit.near)
    apart = {row.image: row.folds for row in make_folds(audit).rows}
    assert any(apart[a] != apart[b] for a, b, _ in audit.near)


def test_make_folds__full_freezes_a_fifth_from_a_thousand_images_on():
    found = make_folds(plain(a=700, b=FROZEN_FROM - 700), preset="full")
    assert found.n_frozen == 200
    frozen = Counter(row.label for row in found.rows if row.frozen)
    assert frozen == {"a": 140, "b": 60}
    assert make_folds(plain(a=700, b=FROZEN_FROM - 701), preset="full").n_frozen == 0
    assert make_folds(plain(a=700, b=FROZEN_FROM - 700)).n_frozen == 0


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [("a", None, f"a{n}") for n in range(20)] + [("b", None, n) for n in range(4)],
            "b has 4, and each class needs at least 5",
        ),
        ([("a", None, f"a{n}") for n in range(20)] + [("b", f"g{n % 4}", n) for n in range(40)], "b has 4"),
        ([("a", f"g{n % 5}", f"a{n}") for n in range(50)] + [("b", None, "same") for n in range(50)], "b has 1"),
    ],
)
def test_make_folds__too_few_units(rows, message):
    with pytest.raises(DataError, match=message):
        make_folds(audited(rows))


def test_make_folds__groups_that_cannot_be_dealt():
    # six groups, each without one of six classes: every two share a class, so no two fit into one of five folds
    rows = [(f"c{c}", f"g{g}", f"{g}{c}") for g in range(6) for c in range(6) if c != g]
    with pytest.raises(DataError, match="no deal into 5 folds found that has every class in every fold"):
        make_folds(audited(rows))
    assert make_folds(audited([r for r in rows if r[1] != "g5" and r[0] == "c5"] + [("d", None, n) for n in range(9)]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "quick"}, "--preset quick: has no folds"),
        ({"preset": "fast"}, "--preset fast"),
        ({"seed": -1}, "--seed -1"),
    ],
)
def test_make_folds__wrong_options(options, message):
    with pytest.raises(ConfigError, match=message):
        make_folds(plain(a=9, b=9), **options)


def test_make_folds__images_of_test_belong_to_quick():
    rows = [(label, None, f"{label}{n}") for label in "ab" for n in range(9)] + [("a", None, "t", "test")]
    with pytest.raises(ConfigError, match="--test goes with --preset quick"):
        make_folds(audited(rows))


def test_check_folds__finds_what_is_wrong():
    audit = audited([("a", "g", "1"), ("a", "g", "2")] + [(c, None, f"{c}{n}") for c in "ab" for n in range(20)])
    good = make_folds(audit)
    row = good.rows[0]
    moved = tuple((f + 1) % 5 for f in row.folds)
    for rows, message in (
        (good.rows[1:], "1 images are missing"),
        ((*good.rows, row), "twice"),
        ((replace(row, label="b"), *good.rows[1:]), "the line of 00000.png"),
        ((replace(row, sha256="0"), *good.rows[1:]), "the line of 00000.png"),
        ((replace(row, folds=(9, 9)), *good.rows[1:]), "the line of 00000.png"),
        ((replace(row, folds=(1,)), *good.rows[1:]), "the line of 00000.png"),
        ((replace(row, folds=moved), *good.rows[1:]), "00000.png and 00001.png belong together"),
        ((replace(row, folds=()), *good.rows[1:]), "00000.png and 00001.png belong together"),
        (tuple(replace(r, folds=(0, r.folds[1])) if r.label == "b" else r for r in good.rows), "has no image of b"),
    ):
        with pytest.raises(DataError, match=message):
            check_folds(Folds(rows, 5, 2, 0), audit)


def test_split_of__sides_of_a_fold():
    audit = audited([("ab"[g % 2], f"g{g}", f"{g}-{n}") for g in range(40) for n in range(3)])
    found, units = make_folds(audit), split_units(audit)
    tested = Counter()
    for repeat, fold in found.cells:
        rows = split_of(found, repeat, fold, units=units)
        sides = {}
        for row in rows:
            sides.setdefault(row.group, set()).add(row.split)
        assert all(len(s) == 1 for s in sides.values())
        assert {(r.label, r.split) for r in rows} == {(c, s) for c in "ab" for s in ("train", "val", "test")}
        tested.update((repeat, r.image) for r in rows if r.split == "test")
        n_val, n_train = (sum(r.split == s for r in rows) for s in ("val", "train"))
        assert abs(n_val / (n_val + n_train) - 0.15) < 0.04
    assert set(tested.values()) == {1}
    assert len(tested) == 240
    assert split_of(found, 0, 1, units=units) == split_of(found, 0, 1, units=units)
    assert {r.image for r in split_of(found, 0, 1, units=units, val_fraction=0.5) if r.split == "val"} != {
        r.image for r in split_of(found, 0, 1, units=units) if r.split == "val"
    }


def test_split_of__frozen_images_are_in_no_fold_and_test_the_last_fit():
    audit = plain(a=600, b=500)
    found, units = make_folds(audit, preset="full"), split_units(audit)
    frozen = {r.image for r in found.rows if r.frozen}
    assert all(not frozen & {r.image for r in split_of(found, r_, f, units=units)} for r_, f in found.cells[:6])
    last = split_of(found, 5, -1, units=units)
    assert {r.image for r in last if r.split == "test"} == frozen
    assert len(last) == 1100


def test_write_folds__reads_back_and_a_changed_table_is_refused(tmp_path):
    found = make_folds(plain(a=600, b=500), preset="full")
    write_folds(tmp_path, found)
    assert read_folds(tmp_path) == found
    assert (
        (tmp_path / "split.csv")
        .read_text()
        .splitlines()[0]
        .startswith("image,label,group,sha256,split,fold_r0,fold_r1")
    )
    text = (tmp_path / "split.csv").read_text()
    (tmp_path / "split.csv").write_text(text.replace("folds,0,", "folds,1,", 1))
    with pytest.raises(DataError, match="was changed after it was written"):
        read_folds(tmp_path)


def test_split_of__large_groups_get_a_larger_inner_side():
    audit = audited([("ab"[g % 2], f"g{g}", f"{g}-{n}") for g in range(14) for n in range(3)])
    found, units = make_folds(audit), split_units(audit)
    for repeat, fold in found.cells:
        rows = split_of(found, repeat, fold, units=units, val_fraction=0.05)
        assert {(r.label, r.split) for r in rows} == {(c, s) for c in "ab" for s in ("train", "val", "test")}
