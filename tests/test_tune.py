"""`mrl tune`: its space, its sampler, fair arms, budgets, workers that die, and no look at the test side."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import optuna
import pytest
import timm
import yaml
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

import mrl
from mrl.cli import main
from mrl.errors import ConfigError, MissingExtra
from mrl.fit_config import FitConfig
from mrl.report.reasons import translated
from mrl.report.words import Words
from mrl.request import Request
from mrl.run import write_json
from mrl.steps import begin, plan_step, swap_step
from mrl.swap import CalibrateConfig, SwapConfig
from mrl.tune import _say_result, default_words, tune
from mrl.tuned import keep_search, tuned_warnings, write_settings
from mrl.tuning import Goal, Settings, parse_space
from mrl.tuning.alive import Beats, signs_of_life
from mrl.tuning.judging import candidates, difference, measure_again
from mrl.tuning.results import tune_document
from mrl.tuning.sampler import Distinct, key_of
from mrl.tuning.search import RETRIES, fail, outcome
from mrl.tuning.space import read_space
from mrl.tuning.storage import open_storage
from mrl.workspace import Workspace
from planted import LAYERS, SPACE, Planted, planted
from test_poc import draw

TESTS = Path(__file__).parent


# --- the space -----------------------------------------------------------------------------------------------------


def test_parse_space__reads_yaml_and_words_alike(tmp_path):
    file = tmp_path / "space.yaml"
    file.write_text(
        "region: [1, 2, 4]\nregion.blocks.0: [1, 2]\nlayers: [all, last 3, [0, 1]]\nlr: {low: 1e-6, high: 1e-4, log: true}\n"
        "augment: [none, light]\nfreeze: [null, 0, 2]\nlocal_gain: 0.5\ncalibration.lr_new: [1e-3, 3e-3]\n"
    )
    words = [
        "region=1,2,4", "region.blocks.0=1,2", "layers=all,last3,0+1", "lr=1e-6..1e-4:log", "augment=none,light", "freeze=null,0,2",
        "local_gain=0.5", "calibration.lr_new=1e-3,3e-3",
    ]  # fmt: skip
    from_file, from_words = read_space([str(file)]), read_space(words)
    assert from_file == from_words
    assert {a.name: a.size for a in from_file.axes}["freeze"] == 3
    assert from_file.fixed == {"local_gain": 0.5}
    assert {a.name for a in from_file.of("baseline").axes} == {"lr", "augment", "freeze"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["regoin=1,2"], "'regoin' is not a field that can be tuned; use region"),
        (["region=0,2"], "use positions from 1"),
        (["lr=-1,2"], "FitConfig(lr=-1.0): use above 0"),
        (["lr=fast,slow"], "lr 'fast': use a number"),
        (["lr=1e-4..1e-6"], "a range needs low below high"),
        (["lr=0..1:log"], "lr"),
        (["augment=light,wild"], "use none, light, medium or imagenet"),
        (["reduce=mean,max"], "reduce"),
        (["layers=some,all"], "use all, each, first N, last N"),
        (["swap=faithful,best"], "swap 'best': unknown"),
        (["kernel_size=3,4"], "the local kernel is odd; use 1, 3, 5 or 7"),
        (["local_gain=0,nan"], "use a number"),
        (["seed=1,2"], "cannot be tuned"),
        (["calibration.seed=1,2"], "cannot be tuned"),
        (["lr=1e-5"], "nothing varies"),
        (["region=2,2"], "twice"),
        (["gone.yaml"], "cannot be read"),
    ],
)
def test_read_space__refuses_in_a_sentence(words, said):
    with pytest.raises(ConfigError, match="tune space") as caught:
        read_space(words)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings__put_every_value_where_it_belongs():
    space = parse_space(
        {
            "swap": ["cheap", "paper"],
            "group_size": [1, 4],
            "region": ["2x4", 2],
            "freeze": [0, 1],
            "calibration.batch_size": [4, 8],
        }
    )
    values = {"swap": "paper", "group_size": 4, "region": (2, 4), "freeze": 1, "calibration.batch_size": 4}
    made = Settings.of(values, "mrl", SwapConfig(), FitConfig(lr=0.5), CalibrateConfig())
    assert (made.swap.local_gain, made.swap.group_size, made.region) == (1.0, 4, (2, 4))
    assert (made.fit.freeze, made.fit.lr, made.calibration.batch_size) == (1, 0.5, 4)
    assert Settings.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    assert Settings.of({"freeze": 1}, "baseline", SwapConfig(), FitConfig(), CalibrateConfig()).to_dict().keys() == {
        "arm",
        "fit",
    }
    assert len(space.axes) == 5


def test_space__each_layer_is_a_choice_of_its_own():
    space = parse_space({"layers": "each"}).bound(3)
    assert [a.name for a in space.axes] == ["layers.each.0", "layers.each.1", "layers.each.2"]
    values = space.values({"layers.each.0": 1, "layers.each.1": 0, "layers.each.2": 1})
    made = Settings.of(values, "mrl", SwapConfig(), FitConfig(), CalibrateConfig())
    assert made.layer_indices(3) == [0, 2]


def test_space__a_tuned_budget_is_said():
    assert "epochs" in parse_space({"epochs": [1, 2]}).warnings()[0]
    assert parse_space({"lr": [1e-5, 1e-4]}).warnings() == []


@pytest.mark.parametrize(
    "wrong",
    [{"mode": "best"}, {"trials": 0}, {"judges": 1}, {"max_latency_ratio": 1.0, "max_latency_ms": 2.0}, {},
     {"mode": "pareto", "max_latency_ms": 1.0}],
)  # fmt: skip
def test_goal__refuses_what_cannot_be(wrong):
    with pytest.raises(ConfigError, match="--"):
        Goal(**wrong)


# --- the sampler ---------------------------------------------------------------------------------------------------


def tried(sampler, n, score=lambda p: p["a"], state=None):
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for _ in range(n):
        trial = study.ask(sampler.space)
        study.tell(trial, score(trial.params), state=state)
    return [t.params for t in study.trials]


@pytest.mark.parametrize("engine", ["gp", "tpe", "random"])
def test_distinct__never_repeats_and_covers_a_finite_space(engine):
    space = {
        "a": IntDistribution(0, 3),
        "b": CategoricalDistribution(["x", "y", "z"]),
        "c": FloatDistribution(0, 1, step=1.0),
    }
    params = tried(Distinct(space, 0, engine), 24)
    assert len({key_of(p) for p in params}) == 24


def test_distinct__starts_balanced():
    space = {
        "a": IntDistribution(0, 3),
        "b": CategoricalDistribution(list("stuvwxyz")),
        "lr": FloatDistribution(1e-6, 1e-2, log=True),
    }
    params = tried(Distinct(space, 3), 8)
    assert Counter(p["a"] for p in params) == dict.fromkeys(range(4), 2)
    assert len({p["b"] for p in params}) == 8
    assert sum(p["lr"] < 1e-4 for p in params) == 4


def test_distinct__draws_follow_from_the_seed():
    space = {"a": FloatDistribution(0, 1), "b": IntDistribution(0, 9)}
    assert tried(Distinct(space, 5), 12) == tried(Distinct(space, 5), 12) != tried(Distinct(space, 6), 12)


# --- the search ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["test_vit", "swin_tiny_patch4_window7_224"])
def test_default_words__make_a_space_of_all_that_the_surgery_has(model):
    names = mrl.plan(timm.create_model(model)).names
    space = read_space(default_words(names, 6)).bound(len(names))
    regions = [a.name for a in space.axes if a.name.startswith("region")]
    assert regions == (["region"] if model == "test_vit" else [f"region.layers.{i}" for i in range(4)])
    assert {"layers", "kernel_size", "group_size", "local_gain", "local_source", "lr", "freeze"} <= {
        a.name for a in space.axes
    }
    raw = {a.name: a.distribution().low if a.ordered else a.distribution().choices[0] for a in space.axes if a.values}
    made = Settings.of(space.values({**raw, "lr": 1e-5}), "mrl", SwapConfig(), FitConfig(), CalibrateConfig())
    assert (made.swap.kernel_size, made.swap.group_size, made.swap.local_source) == (3, 1, "value")


@pytest.mark.slow
def test_tune__finds_the_planted_best_in_25_trials_in_9_of_10_seeds(tmp_path):
    found = []
    for seed in range(10):
        storage, judge = optuna.storages.InMemoryStorage(), Planted(seed)
        record = tune_document(planted(tmp_path, judge, storage=storage, seed=seed, trials=25, max_latency_ratio=2.0))
        assert record["arms"]["mrl"]["outcomes"] == {"trained": 25}
        chosen = Settings.from_dict(record["settings"]["mrl"])
        found.append((chosen.region, chosen.layers) == judge.best)
    assert sum(found) >= 9, found


def test_search__prunes_over_the_budget_before_any_training(tmp_path):
    judge = Planted(1)
    search = planted(tmp_path, judge, trials=10, max_latency_ratio=1.05, keep=2, judges=2)
    record = tune_document(search)
    trained = {a[1] for a in judge.asked if a[0] == "mrl"}
    assert trained == {4, 8}  # 1 and 2 take 1.2 and 1.1 of the time
    rows = record["arms"]["mrl"]["trials"]
    over = [r for r in rows if r["outcome"] == "over budget"]
    assert over
    assert all(
        r["latency"]["ratio"] > 1.05 and r["score"] is None and "baseline's latency" in r["reason"] for r in over
    )
    assert sum(r["outcome"] == "trained" for r in rows) == 10
    searched = [t for t in judge.timed if not t[3]]
    assert len(searched) == len(set(searched))  # every architecture was timed once
    assert record["judged"][-1]["within_budget"]
    assert record["difference"]["low"] < record["difference"]["estimate"] < record["difference"]["high"]


def test_measure_again__one_worker_measures_and_the_others_wait(tmp_path):
    started, judges = threading.Barrier(2), [Planted(2), Planted(2)]
    goal = {"space": {"region": [2, 4]}, "trials": 2, "keep": 1, "judges": 2, "max_latency_ratio": 2.0}
    searches = [planted(tmp_path, judge, **goal) for judge in judges]
    found = candidates(searches[0], searches[0].run())

    def latency(judge, settings, careful=False):
        judge.timed.append(settings.arm)
        time.sleep(0.3)
        return {"ratio": float(1 + judges.index(judge)), "low": 0.0, "high": 9.0, "latency_ms_median": 1.0}

    told = [None, None]

    def work(i):
        started.wait()
        told[i] = measure_again(searches[i], found)

    for judge in judges:
        judge.timed.clear()
        judge.latency = partial(latency, judge)
    workers = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert told[0] == told[1]
    assert len(told[0]) == 2
    assert sorted(len(judge.timed) for judge in judges) == [0, 2]  # one measured both candidates
    assert measure_again(searches[0], found) == told[0]  # a finished search measures nothing


def test_search__says_that_workers_trained_while_latency_was_timed(tmp_path):
    space = {"region": [2, 4], "lr": "1e-6..1e-4:log"}
    search = planted(tmp_path, Planted(2), space=space, trials=2, keep=1, judges=2, max_latency_ratio=2.0)
    study = search.study("mrl")
    for trial in [study.ask(study.sampler.space) for _ in range(2)]:  # of two workers
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    (said,) = tune_document(search)["warnings"]
    assert "timed while others trained" in said


@pytest.mark.parametrize("gap", [0.0, 0.02])
def test_difference__equal_differences_give_no_interval(gap, capsys):
    first = [0.5, 0.25, 0.75]
    found = difference(first, [score + gap for score in first], 0.2)
    assert found["estimate"] == pytest.approx(gap)
    assert np.isnan([found["low"], found["high"]]).all()
    told = {"chosen": {}, "judged": [], "warnings": [], "difference": found}
    _say_result(told, Path("tune.json"))
    assert f"mrl - baseline: {100 * gap:+.1f} points (no interval)" in capsys.readouterr().err


def test_search__both_arms_get_as_many_trials(tmp_path):
    judge = Planted(2)
    space = {"region": [2, 4], "lr": "1e-6..1e-4:log"}
    record = tune_document(planted(tmp_path, judge, space=space, trials=6, keep=1, judges=2))
    for arm in ("baseline", "mrl"):
        assert record["arms"][arm]["outcomes"] == {"trained": 6}
        assert set(record["arms"][arm]["importance"]) == ({"lr"} if arm == "baseline" else {"region", "lr"})
        assert sum(record["arms"][arm]["importance"].values()) == pytest.approx(1)
    fresh = [(a[0], a[3]) for a in judge.asked if a[4]]
    assert sorted(fresh) == [("baseline", 1), ("baseline", 2), ("mrl", 1), ("mrl", 2)]  # the same fresh seeds for both
    assert {a[3] for a in judge.asked if not a[4]} == {0}
    assert record["warnings"] == []


def test_search__what_cannot_be_trained_is_said_and_counts_only_where_it_was_tried(tmp_path):
    space = {"region": [2, 4], "group_size": [1, 16], "lr": [1e-5, 1e-4, 1.0]}
    record = tune_document(planted(tmp_path, Planted(3), space=space, trials=6, keep=1, judges=2))
    rows = record["arms"]["mrl"]["trials"]
    counted = Counter(r["outcome"] for r in rows)
    assert counted["trained"] == 4
    assert counted["failed"] == 2
    assert counted["refused"] >= 1
    assert all("group_size=16" in r["reason"] for r in rows if r["outcome"] == "refused")
    assert all("not finite" in r["reason"] for r in rows if r["outcome"] == "failed")
    assert any("could not be trained" in w for w in record["warnings"])


def test_search__a_budget_that_nothing_keeps_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"over the latency budget .* fastest takes 0\.900"):
        planted(tmp_path, trials=4, max_latency_ratio=0.5).run()


def test_search__pareto_gives_a_front(tmp_path):
    record = tune_document(planted(tmp_path, trials=12, keep=3, judges=2))
    rows = {r["trial"]: r for r in record["arms"]["mrl"]["trials"]}
    front = [(rows[n]["score"], rows[n]["latency"]["ratio"]) for n in record["arms"]["mrl"]["front"]]
    assert front == sorted(front, reverse=True)
    for score, ratio in ((r["score"], r["latency"]["ratio"]) for r in rows.values() if r["score"] is not None):
        assert any(s >= score and q <= ratio for s, q in front)


def test_search__another_search_of_the_same_name_is_refused(tmp_path):
    planted(tmp_path, trials=1, max_latency_ratio=2.0).study("mrl")
    with pytest.raises(ConfigError, match="another goal"):
        planted(tmp_path, trials=1, max_latency_ratio=1.0).study("mrl")
    with pytest.raises(ConfigError, match="another space"):
        planted(tmp_path, space={"region": [1, 2]}, trials=1, max_latency_ratio=2.0).study("mrl")
    planted(tmp_path, trials=3, max_latency_ratio=2.0).study("mrl")  # more trials are the same search


@pytest.mark.slow
def test_search__goes_on_after_a_kill_with_the_trials_of_one_that_was_not(tmp_path):
    goal = {"trials": 5, "max_latency_ratio": 2.0, "keep": 1, "judges": 2}
    whole = planted(tmp_path / "whole", Planted(0), **goal).run()
    folder = tmp_path / "killed"
    worker = start(folder, "-", trials=5, pause=0.7)
    journal = folder / "journal.log"
    wait(lambda: journal.is_file() and journal.read_text().count('"trained"') >= 3, worker)
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
    search = planted(folder, Planted(0), **goal)
    before = search.study("mrl").trials + search.study("baseline").trials
    assert [t.state.name for t in before].count("RUNNING") == 1
    after = search.run()
    for arm in ("baseline", "mrl"):
        same = [[(t.params, t.values) for t in s[arm].trials if t.state.name == "COMPLETE"] for s in (whole, after)]
        assert sorted(map(str, same[0])) == sorted(map(str, same[1]))
    died = [t for s in after.values() for t in s.trials if outcome(t) == "died"]
    assert len(died) == 1


def start(folder, storage, *, trials, pause, name=0):
    """A worker in a process of its own; what it says is in `said-NAME` in its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, str(TESTS / "planted.py"), str(folder), storage, str(trials), str(pause), str(name)]
    with (folder / f"said-{name}").open("w") as said:
        worker = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=said)
    worker.said = folder / f"said-{name}"
    return worker


def wait(condition, *workers, seconds=900):
    end = time.monotonic() + seconds
    while not condition():
        for worker in workers:
            assert worker.poll() in (None, 0), worker.said.read_text()
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.05)


def test_locks__a_stopped_worker_is_not_taken_for_dead_and_a_dead_one_is_at_once(tmp_path):
    ours, theirs = (
        optuna.create_study(storage=open_storage(None, tmp_path), study_name="a", load_if_exists=True) for _ in "ab"
    )
    trial, locks = ours.ask(), signs_of_life(None, tmp_path)
    with locks.running(ours, trial):
        assert not signs_of_life(None, tmp_path, grace_s=0).dead(theirs, theirs.trials)
        (held,) = locks.folder.iterdir()
    held.touch()  # a lock that nobody holds
    assert [t.number for t in signs_of_life(None, tmp_path).dead(theirs, theirs.trials)] == [0]


@pytest.mark.parametrize("grace", [9.9, float("nan")])
def test_tune__a_grace_that_tells_nothing_is_refused(tmp_path, grace):
    with pytest.raises(ConfigError, match="too short to tell a slow worker from a dead one; give 10 s or more"):
        tune(tmp_path / "run", grace=grace)


@pytest.mark.parametrize(("grace", "beat"), [(20.0, 5.0), (120.0, 30.0), (600.0, 30.0)])
def test_signs_of_life__at_least_four_beats_fit_into_the_grace(tmp_path, grace, beat):
    alive = signs_of_life("postgresql://host/name", tmp_path, grace_s=grace)
    assert (alive.beat_s, alive.grace_s) == (beat, grace)


def test_beats__a_slow_worker_is_alive_and_a_silent_one_is_not(tmp_path):
    study = optuna.create_study(storage=open_storage(None, tmp_path))
    trial, ours, theirs = study.ask(), Beats(beat_s=0.02), Beats(grace_s=0.3)
    with ours.running(study, trial):
        for _ in range(8):
            assert not theirs.dead(study, study.trials)
            time.sleep(0.1)
    assert not theirs.dead(study, study.trials)  # its last beat is seen
    time.sleep(0.4)
    assert [t.number for t in theirs.dead(study, study.trials)] == [0]


DEATHS = {"before any value": 0, "between its values": 1, "with all values": 2}


@pytest.mark.parametrize("values", DEATHS.values(), ids=DEATHS)
@pytest.mark.parametrize("arm", ["mrl", "baseline"])
def test_search__a_trial_is_repeated_wherever_its_worker_died(tmp_path, arm, values):
    search = planted(tmp_path, trials=4, max_latency_ratio=2.0)
    search = dataclasses.replace(search, alive=Beats(grace_s=0), poll_s=0.01)
    study = search.study(arm)
    late, dead = study.ask(), study.ask()  # two workers took a place; the second dies
    for axis in search.space.of(arm).axes[:values]:
        axis.suggest(dead)
    study.tell(late, state=optuna.trial.TrialState.PRUNED)
    search.alive.dead(study, study.trials)  # a first look
    time.sleep(0.01)
    studies = search.run()
    account(studies["mrl"].trials, 4)
    account(studies["baseline"].trials, 1)
    (again,) = [t for t in studies[arm].trials if t.system_attrs.get("failed_trial") == dead.number]
    assert again.state.name == "COMPLETE"
    if values == 2:
        assert again.params == dead.params


def test_search__a_trial_that_kills_every_worker_is_left_alone(tmp_path):
    study = planted(tmp_path, trials=4, max_latency_ratio=2.0).study("mrl")
    for _ in range(RETRIES + 1):
        trial = study.ask(study.sampler.space)
        fail(study, trial.number)
        fail(study, trial.number)  # of another worker, which saw the same
    assert [t.state.name for t in study.trials] == ["FAIL"] * (RETRIES + 1)
    assert len({key_of(t.params) for t in study.trials}) == 1
    assert key_of(study.ask(study.sampler.space).params) != key_of(study.trials[0].params)


def test_search__an_interrupted_trial_is_queued_again(tmp_path):
    search = planted(tmp_path, trials=4, max_latency_ratio=2.0)
    judge, asked = search.judge, []

    def quality(settings, **told):
        asked.append(settings)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return Planted.quality(judge, settings, **told)

    judge.quality = quality
    with pytest.raises(KeyboardInterrupt):
        search.run()
    studies = search.run()
    account(studies["mrl"].trials, 4)
    assert asked[3] == asked[2]


def account(trials, asked):
    """Every trial is accounted for: as many complete ones as were asked, each dead one repeated, none left; returns the dead."""
    states = Counter(t.state.name for t in trials)
    assert [t.number for t in trials] == list(range(len(trials)))
    assert states["COMPLETE"] == asked, states
    assert set(states) <= {"COMPLETE", "PRUNED", "FAIL"}, states
    dead = [t for t in trials if t.state.name == "FAIL"]
    for one in dead:
        (again,) = [t for t in trials if t.system_attrs.get("retry_history", [None])[-1] == one.number]
        assert not set(one.params) - set(again.params)
        assert again.state.name in ("COMPLETE", "FAIL") or outcome(again) in ("known", "surplus")
    return dead


def test_open_storage__says_what_is_wrong_without_the_password(tmp_path):
    with pytest.raises(ConfigError, match="cannot be used") as caught:
        open_storage("postgresql://me:secret@127.0.0.1:9/none", tmp_path)
    assert "secret" not in str(caught.value)
    with pytest.raises(ConfigError, match="not a URL"):
        open_storage("://", tmp_path)
    with pytest.raises(MissingExtra, match="pg8000"):
        open_storage("postgresql+nothing://me@host/none", tmp_path)


def test_require_optuna__says_what_to_install(monkeypatch):
    from mrl.tuning.storage import require_optuna

    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingExtra, match=r"pip install mrl\[tune\]"):
        require_optuna()


# --- real models on a run ------------------------------------------------------------------------------------------

RUN = [
    "--model", "test_vit", "--image-size", "32", "--backend", "eager", "--seconds", "0.2", "--trials", "2", "--keep", "1", "--judges", "2",
    "calibration.min_updates=2", "calibration.epochs=0.01", "calibration.feature_epochs=0.01", "epochs=0.1", "min_updates=4",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("tune") / "data")


@pytest.fixture(scope="module")
def tuned(data, tmp_path_factory):
    """A finished search whose test images were gone before it began."""
    out = tmp_path_factory.mktemp("tune") / "run"
    split = ["split", "--model", "test_vit", "--image-size", "32", "--data", str(data), "--out", str(out)]
    assert main(split) == 0
    lines = [line.split(",") for line in (out / "split.csv").read_text().splitlines()[1:]]
    tests = [data / line[0] for line in lines if line[4] == "test"]
    kept = {path: path.read_bytes() for path in tests}
    for path in tests:
        path.write_bytes(b"not to be looked at")
    words = [
        "tune",
        "--out",
        str(out),
        *RUN,
        "region=2,4",
        "layers=last2,0+1",
        "lr=1e-5..1e-3:log",
        "--max-latency-ratio",
        "50",
    ]
    try:
        assert main(words) == 0
    finally:
        for path, content in kept.items():
            path.write_bytes(content)
    return out, words


def test_tune__searches_without_a_look_at_the_test_side(tuned):
    out, _ = tuned
    record = json.loads((out / "tune" / "tune.json").read_text())
    assert record["arms"]["mrl"]["outcomes"] == {"trained": 2}
    assert record["arms"]["baseline"]["outcomes"] == {"trained": 2}
    assert record["settings"]["mrl"]["layers"] in ("last2", [0, 1])
    assert record["protocol_sha256"]
    for row in record["judged"]:
        assert len(row["scores"]) == 2
        assert row["mean"] == pytest.approx(sum(row["scores"]) / 2)
    n_train_and_val = sum(line.rsplit(",", 1)[1] != "test" for line in (out / "split.csv").read_text().splitlines()[1:])
    for file in (out / "tune" / "trials").glob("*/result.json"):
        result = json.loads(file.read_text())
        assert result["n_train"] + result["n_val"] == n_train_and_val
    assert not list((out / "tune").rglob("*.safetensors"))
    assert len(list((out / "tune" / "trials").iterdir())) == 2 * 2 + 2 * 2


def test_plan_step__swaps_the_modules_of_the_settings(tuned, data, tmp_path):
    told = json.loads((tuned[0] / "tune" / "settings.json").read_text())["arms"]["mrl"]
    request = Request("test_vit", str(data), image_size=32, settings=str(tuned[0]))
    space = begin(Workspace(tmp_path / "run"), request)
    assert space.protocol.tuned["tuned_on"]["n_test_seen"] == 0
    plan_step(space, space.new_classifier().eval())
    handle = swap_step(space, space.new_classifier().eval())
    assert {row.name: list(row.region) for row in handle.plan.rows if row.action == "swap"} == told["regions"]
    assert len(told["regions"]) == 2  # of six: the layers of the search
    for arm in ("baseline", "mrl"):
        assert space.protocol.budget_of(arm)["lr"] == space.protocol.tuned["arms"][arm]["fit"]["lr"]


@pytest.mark.parametrize("named", [".", "tune/settings.json"])
def test_keep_search__copies_the_record_beside_the_settings(tmp_path, named):
    searched = tmp_path / "searched"
    search = {"study": "mrl-1", "protocol_sha256": "ab"}
    arms = {"baseline": {"fit": {}}, "mrl": {"fit": {}, "calibration": {}, "swap": {}, "regions": {}}}
    write_settings(searched / "tune" / "settings.json", {"search": search, "arms": arms}, ["ab" * 32])
    kept = tmp_path / "run" / "tune" / "tune.json"
    assert not keep_search(searched / named, tmp_path / "run")  # no record beside it
    write_json(searched / "tune" / "tune.json", {**search, "study": "another"})
    assert not keep_search(searched / named, tmp_path / "run")
    write_json(searched / "tune" / "tune.json", search)
    assert keep_search(searched / named, tmp_path / "run")
    assert json.loads(kept.read_text()) == search
    write_json(kept, {"study": "the run's own"})
    assert not keep_search(searched / named, tmp_path / "run")
    assert json.loads(kept.read_text()) == {"study": "the run's own"}
    assert not keep_search(searched / named, searched)


@pytest.mark.slow
def test_poc__takes_what_the_search_chose_and_tests_on_images_that_it_did_not_see(tuned, data, tmp_path, monkeypatch):
    monkeypatch.setattr("mrl.results.MEASURE_SECONDS", 2.0)
    monkeypatch.setattr("mrl.results.OTHER_SIZES", (48,))
    searched, out = tuned[0], tmp_path / "run"
    asked = ["poc", "--model", "test_vit", "--data", str(data), "--image-size", "32", "--out", str(out)]
    assert main([*asked, "--settings", str(searched)]) == 0
    settings = json.loads((searched / "tune" / "settings.json").read_text())
    chosen = json.loads((searched / "tune" / "tune.json").read_text())["settings"]
    protocol = yaml.safe_load((out / "protocol.yaml").read_text())
    assert protocol["tuned"]["sha256"] == settings["sha256"]
    assert protocol["tuned"]["search"]["trials"] == {"baseline": 2, "mrl": 2}
    assert protocol["tuned"]["tuned_on"] == {
        "n_images": settings["seen"]["n"],
        "n_test": protocol["data"]["n_test"],
        "n_test_seen": 0,
    }
    for arm in ("baseline", "mrl"):
        fit = json.loads((out / "arms" / arm / "fit.json").read_text())
        assert protocol["tuned"]["arms"][arm]["fit"] == chosen[arm]["fit"]
        assert fit["config"] == chosen[arm]["fit"]
    planned = json.loads((out / "plan.json").read_text())
    made = {row["name"]: row["region"] for row in planned["rows"] if row["action"] == "swap"}
    assert made == settings["arms"]["mrl"]["regions"]
    assert len(made) == 2  # of six: the layers of the search
    assert planned["setting"] == "tuned"
    assert planned["config"]["kernel_size"] == chosen["mrl"]["swap"]["kernel_size"]
    report = json.loads((out / "report.json").read_text())
    assert not [w for w in report["warnings"] if "mrl tune" in w]
    assert json.loads((out / "tune" / "tune.json").read_text())["settings"] == chosen
    said = Words("en")("tune.importance")
    assert said in (out / "report.html").read_text(encoding="utf-8")


def test_poc__says_how_many_test_images_the_search_saw(tuned, data, tmp_path):
    searched = tuned[0]
    told = {"model": "test_vit", "data": str(data), "image_size": 32, "settings": str(searched)}
    for more in ({"seed": 5}, {"preset": "standard"}):
        space = begin(Workspace(tmp_path / str(more)), Request(**told, **more))
        part = space.protocol.tuned
        assert 0 < part["tuned_on"]["n_test_seen"] <= part["tuned_on"]["n_test"]
        (said,) = tuned_warnings(part)
        assert f"saw {part['tuned_on']['n_test_seen']} of the {part['tuned_on']['n_test']} test images" in said
        assert translated(Words("ja"), said)["key"] == "warning.tuned_seen"
    with pytest.raises(ConfigError, match=r"another protocol \(tuned: \w{12} there, none asked"):
        begin(Workspace(tmp_path / str({"seed": 5})), Request("test_vit", str(data), image_size=32, seed=5))
    part["arms"]["mrl"]["fit"]["epochs"] = 9
    assert translated(Words("ja"), tuned_warnings(part)[1])["key"] == "warning.tuned_budget"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--region", "4", "--lr", "1e-3"], "--settings and --region, flags of the fit were both given"),
        (["--image-size", "48"], "chosen for another image size"),
        (["--settings", "nowhere"], "not settings that mrl tune wrote"),
        (["--settings", "changed.json"], "was changed after mrl tune wrote it"),
        (["--out", "SEARCHED", "--overwrite"], "--overwrite would delete the settings"),
    ],
)
def test_poc__settings_that_do_not_fit_are_one_sentence(tuned, data, tmp_path, monkeypatch, capsys, more, said):
    searched = tuned[0].resolve()
    monkeypatch.chdir(tmp_path)
    text = (searched / "tune" / "settings.json").read_text()
    Path("changed.json").write_text(text.replace('"seen": {', '"seen": {"more": 1,'))
    words = [
        "poc",
        "--model",
        "test_vit",
        "--data",
        str(data),
        "--image-size",
        "32",
        "--out",
        "run",
        "--settings",
        str(searched),
    ]
    assert main([*words, *(str(searched) if w == "SEARCHED" else w for w in more)]) == 1
    found = capsys.readouterr().err.strip().splitlines()
    assert said in found[-1]
    assert (searched / "tune" / "settings.json").read_text() == text


def test_tune__a_finished_search_says_so(tuned, capsys):
    out, words = tuned
    before = (out / "tune" / "tune.json").stat().st_mtime_ns
    assert main(words) == 0
    assert "finished already" in capsys.readouterr().err
    assert (out / "tune" / "tune.json").stat().st_mtime_ns == before


def test_tune__a_finished_search_in_another_backend_is_another(tuned, capsys):
    out, words = tuned
    assert json.loads((out / "tune" / "tune.json").read_text())["backend"] == "eager"
    assert main(["onnxruntime" if word == "eager" else word for word in words]) == 1
    assert "belongs to a search with another backend" in capsys.readouterr().err


def test_training_side__fresh_splits_keep_groups_together_and_differ(tuned):
    from mrl.tuning.images import TrainingSide

    out, _ = tuned
    side = TrainingSide(Workspace(out), out / "tune", "eager", 0.1)
    samples = sorted((*side.train.samples, *side.val.samples), key=lambda s: s.image)
    ours = {s.image for s in samples}
    side.units = {s.image: samples[i - i % 2].image for i, s in enumerate(samples)}  # neighbours belong together
    drawn = []
    for seed in (1, 2):
        train, val = side._sides(seed)
        names = [{s.image for s in part.samples} for part in (train, val)]
        assert not names[0] & names[1]
        assert names[0] | names[1] == ours
        assert abs(len(names[1]) - len(side.val)) <= 3
        assert not {side.units[n] for n in names[0]} & {side.units[n] for n in names[1]}
        assert {s.label for s in val.samples} == set(val.classes)
        drawn.append(names[1])
    assert drawn[0] != drawn[1]


def test_training_side__architectures_that_are_equal_are_one(tuned):
    from mrl.tuning.images import TrainingSide

    out, _ = tuned
    side = TrainingSide(Workspace(out), out / "tune", "eager", 0.1)

    def architecture(**values):
        return side.architecture(Settings.of(values, "mrl", SwapConfig(), FitConfig(), CalibrateConfig()))

    assert architecture(region=2, layers="all") == architecture(
        region=4, layers=tuple(range(6)), **{"region.blocks": 2}
    )
    assert architecture(region=2) != architecture(region=4)
    assert architecture(region=2) != architecture(region=2, reduce="mean")
    for other in ({"kernel_size": 5}, {"group_size": 4}, {"local_source": "input"}):
        assert architecture(region=2) != architecture(region=2, **other)  # each has its own latency
    assert architecture(local_gain=0.5) == architecture(local_gain=1.0)
    assert architecture(region=2, lr=1e-3) == architecture(region=2, lr=1e-5)
    for wrong, said in (
        ({"layers": (9,)}, "use indices"),
        ({"region.stages.3": 2}, "no module's name begins with"),
        ({"freeze": 99}, "freeze=99"),
        ({"group_size": 7}, "not a multiple"),
    ):
        with pytest.raises(Exception, match=said):
            architecture(**wrong)


def test_tune__a_wrong_word_fails_before_any_work(tuned, capsys):
    out, _ = tuned
    assert main(["tune", "--out", str(out), "regions=1,2"]) == 1
    assert "use region" in capsys.readouterr().err


def test_planted__the_space_of_the_contract_has_32_points():
    assert parse_space(SPACE).size == 32 == 4 * len(LAYERS)
