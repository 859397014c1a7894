"""Learning curves: nested parts that keep classes and units, equal updates, the run's own test sides."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest

from mrl.curve import SubsetSpace, curve_spaces, curve_step, space_named, summed
from mrl.data import SplitRow
from mrl.data.subsets import SHARES, nested_subsets
from mrl.errors import ConfigError, DataError
from mrl.fit_config import FitConfig, planned_updates
from mrl.fit_fixed import stop_of
from mrl.stats import nadeau_bengio
from mrl.workspace import FoldSpace, Workspace


def split(n=400, rare=20, group=4, seed=0):
    """Two classes and a rare one, in units of `group` images; a fifth is the test side, 12 % validate."""
    rng = np.random.default_rng(seed)
    rows, units = [], {}
    for i in range(0, n, group):
        side = rng.choice(["train", "val", "test"], p=[0.68, 0.12, 0.2])
        for j in range(i, i + group):
            label = "rare" if j < rare else "ab"[j % 2]
            rows.append(
                SplitRow(f"{j}.png", label, f"g{i}", "", "train" if j < rare // 2 else "val" if j < rare else side)
            )
            units[f"{j}.png"] = f"g{i}"
    return rows, units


def test_nested_subsets__each_is_inside_the_next_and_the_test_side_stays():
    rows, units = split()
    parts = nested_subsets(rows, units)
    sets = [{row.image for row in part} for part in parts.values()]
    assert all(small < large for small, large in itertools.pairwise(sets))
    assert parts[1.0] == rows
    for part in parts.values():
        assert [r for r in part if r.split == "test"] == [r for r in rows if r.split == "test"]
        assert part == [row for row in rows if row in part]


@pytest.mark.parametrize("group", [1, 4])
def test_nested_subsets__keep_units_classes_and_shares(group):
    rows, units = split(group=group)
    for share, part in nested_subsets(rows, units).items():
        kept = {row.image for row in part}
        for unit in {units[row.image] for row in rows if row.split != "test"}:
            members = {row.image for row in rows if units[row.image] == unit}
            assert members <= kept or not members & kept
        for side in ("train", "val"):
            whole = [row.label for row in rows if row.split == side]
            found = [row.label for row in part if row.split == side]
            assert set(found) == set(whole)
            for label in set(whole):
                assert abs(found.count(label) - share * whole.count(label)) <= 2 * group


def test_nested_subsets__depend_on_the_seed_and_not_on_the_order_of_rows():
    rows, units = split(group=1)
    first, again, other = (
        {r.image for r in nested_subsets(given, units, shares=(0.2,), seed=seed)[0.2]}
        for given, seed in ((rows, 0), (rows[::-1], 0), (rows, 1))
    )
    assert first == again != other


def test_nested_subsets__a_share_does_not_depend_on_the_others():
    rows, units = split()
    assert nested_subsets(rows, units, shares=(0.4,))[0.4] == nested_subsets(rows, units)[0.4]


@pytest.mark.parametrize("shares", [(), (0.0, 1.0), (0.5, 0.2), (0.5, 0.5), (0.5, 1.1)])
def test_nested_subsets__wrong_shares_are_one_sentence(shares):
    rows, units = split(40)
    with pytest.raises(ConfigError, match="rising numbers above 0"):
        nested_subsets(rows, units, shares=shares)
    with pytest.raises(DataError, match="of no unit"):
        nested_subsets(rows, {}, shares=(0.5,))


def test_budget__has_the_updates_of_the_whole(tmp_path):
    space = SubsetSpace(FoldSpace(Workspace(tmp_path), 0, 1), 0.1)
    rows, units = split(group=1)
    space.whole.__dict__["rows"] = rows
    own = {"mrl": SimpleNamespace(budget=FitConfig(epochs=3, min_updates=5, batch_size=8))}
    space.run = SimpleNamespace(protocol=SimpleNamespace(seed=0), units=units, arms=own)
    space.__dict__["arms"] = own
    n = {side: sum(row.split == side for row in rows) for side in ("train", "val")}
    inner, whole = space.budget("train", arm="mrl"), space.budget("train", "val", arm="mrl")
    assert len([r for r in space.rows if r.split == "train"]) < n["train"] / 4
    plain = FitConfig(epochs=3, min_updates=5, batch_size=8)
    few = sum(row.split == "train" for row in space.rows)
    assert planned_updates(inner, few) == planned_updates(plain, n["train"])
    assert planned_updates(whole, few) == planned_updates(plain, n["train"] + n["val"])
    best = planned_updates(inner, few) // 2  # the second fit goes as far along its schedule as in the whole
    assert stop_of(best, few, whole, few, inner) == stop_of(best, n["train"], plain, n["train"] + n["val"])


def test_curve_spaces__need_folds(tmp_path):
    run = Workspace(tmp_path)
    run.__dict__["protocol"] = SimpleNamespace(folds={}, budget={})
    with pytest.raises(ConfigError, match="needs folds"):
        curve_spaces(run)


@pytest.mark.parametrize("shares", [(0.125, 0.5), (0.121, 0.124), (0.5, 0.999), (0.004,), (0.1 + 0.2,)])
def test_curve_spaces__shares_are_whole_percents(tmp_path, shares):
    run, _ = small_run(tmp_path, 20)
    with pytest.raises(ConfigError, match="whole percents; give shares such as"):
        curve_spaces(run, shares)


def test_space_named__finds_every_share_of_whole_percents(tmp_path, monkeypatch):
    run, rows = small_run(tmp_path, 200)
    monkeypatch.setattr(FoldSpace, "rows", property(lambda self: rows))
    shares = [percent / 100 for percent in range(5, 100)]
    spaces = curve_spaces(run, shares)
    assert len({space.name for space in spaces}) == len(spaces) == 2 * len(shares)
    assert [space_named(run, space.name).share for space in spaces] == [space.share for space in spaces]


def small_run(tmp_path, n):
    """A run of two folds with `n` images on either training side, nothing fitted."""
    run = Workspace(tmp_path)
    rows, units = split(n, rare=0, group=1)
    rows = [SplitRow(r.image, r.label, r.group, r.sha256, "val" if i % 5 == 4 else "train") for i, r in enumerate(rows)]
    run.__dict__["protocol"] = SimpleNamespace(folds={"k": 2, "repeats": 1, "n_frozen": 0}, budget={}, seed=0)
    run.__dict__["units"] = units
    return run, rows


@pytest.mark.parametrize(("n", "left_out"), [(200, []), (20, [0.1, 0.2]), (8, [0.1, 0.2, 0.4])])
def test_curve_spaces__leave_out_what_is_too_small_to_calibrate(tmp_path, monkeypatch, n, left_out):
    run, rows = small_run(tmp_path, n)
    monkeypatch.setattr(FoldSpace, "rows", property(lambda self: rows))
    spaces = curve_spaces(run)
    assert [s.share for s in spaces] == [share for share in SHARES if share < 1 and share not in left_out for _ in "ab"]
    assert all(sum(row.split == "train" for row in space.rows) >= 4 for space in spaces)


def test_curve_step__only_shares_that_are_too_small(tmp_path, monkeypatch):
    run, rows = small_run(tmp_path, 20)
    monkeypatch.setattr(FoldSpace, "rows", property(lambda self: rows))
    with pytest.raises(ConfigError, match=r"--shares \[0\.1\]: a part would have fewer than 4 training images"):
        curve_step(run, shares=(0.1,))


def test_summed__is_the_corrected_interval_of_every_size():
    rng = np.random.default_rng(0)
    rows = [
        {
            "repeat": 0, "fold": fold, "share": share, "n_train": int(100 * share),
            "arms": {arm: {"score": float(rng.uniform(0.7, 0.9)), "gap": None if fold else 0.1, "updates": 7} for arm in "abc"},
        }
        for share in SHARES for fold in range(5)
    ]  # fmt: skip
    found = summed(rows, arms=["a", "b", "c"], metric="accuracy", k=5)
    at = [row for row in rows if row["share"] == 0.4]
    expected = nadeau_bengio([row["arms"]["c"]["score"] - row["arms"]["a"]["score"] for row in at], 5)
    size = found["sizes"][2]
    got = size["differences"]["c"]
    assert (got["low"], got["high"]) == pytest.approx((expected.low, expected.high))
    assert size["arms"]["a"]["gap"] == pytest.approx(0.1)
    assert size["arms"]["a"]["n_gaps"] == 1
    assert [s["share"] for s in found["sizes"]] == list(SHARES)
    json.dumps(found, allow_nan=False)
