"""The benchmark on little data runs end to end, resumes, and `docs/small_data.md` has what its files say."""

import json
import re
from pathlib import Path

import pytest
import torch

import small_data_table
from mrl.blocks import RegionalLocalMixer
from mrl.models.build import build_model
from mrl.run import read_json
from small_data import run
from small_data.networks import NETWORKS, network
from test_poc import draw

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "small_data"
TINY = ["--updates", "4", "--folds", "2", "--threads", "1"]


@pytest.fixture
def small(monkeypatch):
    """The benchmark at a size for tests."""
    for name, value in {"SIZE": 32, "BATCH": 8, "VALIDATIONS": 2, "SHARES": (0.5, 1.0), "RATES": (1e-3,)}.items():
        monkeypatch.setattr(run, name, value)
    monkeypatch.setattr(run, "network", lambda name: build_model("test_mrl"))  # its own take seconds each
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_run__fits_tests_and_sums_up_and_goes_on_without_fitting_again(tmp_path, small, monkeypatch):
    images = draw(tmp_path / "data", classes=("blank", "dot"))
    args = ["--images", str(images), "--out", str(tmp_path), *TINY]
    run.main(args)
    (path,) = tmp_path.glob("*.json")
    found = read_json(path)
    assert set(found["cost"]) == set(found["about"]) == set(run.NETWORKS)
    assert [size["share"] for size in found["accuracy"]["sizes"]] == [0.5, 1.0]
    assert {len(row["arms"]) for row in found["accuracy"]["rows"]} == {3}
    assert found["accuracy"]["sizes"][0]["updates"] == found["accuracy"]["sizes"][1]["updates"] == [4]
    assert found["accuracy"]["sizes"][0]["n_train"] < found["accuracy"]["sizes"][1]["n_train"]
    lines = path.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 3 + 2 * 2 * 3  # rates, then shares, folds and networks
    assert {row["score"] is None for row in rows if row["choosing"]} == {True}
    tested = {(r["share"], r["network"]): r["n_test"] for r in rows if not r["choosing"] and r["fold"] == 0}
    assert len(set(tested.values())) == 1
    monkeypatch.setattr(run, "one_fit", lambda job: pytest.fail(f"fitted again: {job}"))
    run.main(args)
    again = read_json(path)
    assert again["accuracy"] == found["accuracy"]
    section = small_data_table.section(tmp_path)
    assert section.count("(no interval)") == 3 * 2 + 2 * 2  # two folds of five
    assert "2 of 5 folds" in section


@pytest.mark.parametrize("name", NETWORKS)
def test_network__each_trains_every_parameter(name):
    """Of `mrl_13` and its halves; what they lack is not there."""
    net = network(name)
    net(torch.randn(2, 3, 32, 32)).square().mean().backward()
    assert [key for key, p in net.named_parameters() if p.grad is None] == []
    attention = [m for m in net.modules() if isinstance(m, RegionalLocalMixer)]
    assert len(attention) == (0 if name == "convolution" else 13)
    found = {(m.region_size[0], m.local.kernel_size[0], m.local_gain) for m in attention}
    assert found == {"mrl": {(4, 3, 1.0), (2, 3, 1.0)}, "attention": {(1, 1, 0.0)}, "convolution": set()}[name]


def test_whole__a_size_whose_fits_are_not_all_there_is_in_no_table():
    lines = (RESULTS / "nvidia-h200.jsonl").read_text(encoding="utf-8").splitlines()
    rows, rates = [json.loads(line) for line in lines], dict.fromkeys(run.NETWORKS, 3e-4)
    assert 0.1 in {row["share"] for row in rows}
    assert {row["share"] for row in run.whole(rows, rates, 5)} == {0.2, 0.7, 1.0}


def test_docs__the_tables_are_made_from_the_files(tmp_path):
    page = ROOT / "docs" / "small_data.md"
    text = page.read_text(encoding="utf-8")
    begin, end = small_data_table.BEGIN, small_data_table.END
    shown = re.search(f"{re.escape(begin)}.*{re.escape(end)}", text, re.DOTALL).group()
    assert shown == small_data_table.section(RESULTS)
    copy = tmp_path / "page.md"
    copy.write_text(f"before\n{begin}\nold\n{end}\nafter\n", encoding="utf-8")
    assert small_data_table.write_section(RESULTS, copy).read_text(encoding="utf-8") == f"before\n{shown}\nafter\n"


def test_docs__what_the_page_says_in_words_is_in_the_files():
    """Of every number that its prose takes from the results."""
    found = read_json(RESULTS / "nvidia-h200.json")
    gaps = [gap for size in found["accuracy"]["sizes"] for gap in size["differences"].values()]
    assert max(abs(gap["estimate"]) for gap in gaps) < 0.02
    assert all(gap["low"] < 0 < gap["high"] for gap in gaps)
    widths = sorted(round(100 * (gap["high"] - gap["low"]), 1) for gap in gaps)
    assert (widths[0], widths[-1]) == (3.1, 11.3)
    arms = [arm for size in found["accuracy"]["sizes"] for arm in size["arms"].values()]
    shares = [round(100 * 0.687 / arm["estimate"]) for arm in arms]
    assert (min(shares), max(shares)) == (84, 88)
    own = [round(100 * size["arms"]["mrl"]["gap"], 1) for size in found["accuracy"]["sizes"]]
    assert (own[0], own[-1]) == (4.0, 0.3)
    assert max(arm["gap"] for arm in arms) == found["accuracy"]["sizes"][0]["arms"]["mrl"]["gap"]
    assert set(found["settings"]["rates"].values()) == {min(found["settings"]["rates_tried"])}
    for share in ("0.2", "0.7", "1"):
        medians = {name: speed[share]["median"] for name, speed in found["updates_to_95"].items()}
        assert sorted(medians, key=medians.get) == ["convolution", "mrl", "attention"]
    assert found["cost"]["attention"]["gmacs"] / found["cost"]["mrl"]["gmacs"] == pytest.approx(1.1, abs=0.01)


def test_seen__says_which_intervals_exclude_0():
    found = read_json(RESULTS / "nvidia-h200.json")
    assert small_data_table.seen(found) == "None of the 6 intervals of a difference to mrl excludes 0."
    first, second, _ = found["accuracy"]["sizes"]
    first["differences"]["attention"].update(low=0.001)
    second["differences"]["convolution"].update(high=-0.001)
    assert small_data_table.seen(found) == (
        "2 of the 6 intervals of a difference to mrl exclude 0: attention is above mrl with 418 images; "
        "convolution is below mrl with 1,468 images."
    )
