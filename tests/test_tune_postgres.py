"""Two workers on a real PostgreSQL, one of them killed: every trial is accounted for."""

import json
import os
import signal
from collections import Counter

import optuna
import pytest

from mrl.tuning.search import outcome
from mrl.tuning.storage import close_storage, open_storage
from postgres import binaries, cluster
from test_tune import account, start, wait

NEEDED = pytest.mark.skipif(binaries() is None, reason="PostgreSQL's initdb and postgres are not installed")
TRIALS = 6


@NEEDED
@pytest.mark.slow
def test_search__two_workers_on_postgresql_finish_when_one_is_killed(tmp_path):
    with cluster() as url:
        folders = [tmp_path / "a", tmp_path / "b"]
        victim, survivor = (start(f, url, trials=TRIALS, pause=1.5, name="x") for f in folders)
        storage = open_storage(url, tmp_path)
        workers = (victim, survivor)

        def outcomes():
            names = optuna.get_all_study_names(storage)
            return Counter(outcome(t) for n in names for t in optuna.load_study(study_name=n, storage=storage).trials)

        def both_stopped_in_a_trial():
            if outcomes()["trained"] < 3 or outcomes()["running"] < 2:
                return False
            for worker in workers:
                os.kill(worker.pid, signal.SIGSTOP)
            if outcomes()["running"] == 2:
                return True
            for worker in workers:
                os.kill(worker.pid, signal.SIGCONT)
            return False

        wait(both_stopped_in_a_trial, *workers)
        os.kill(victim.pid, signal.SIGKILL)
        os.kill(survivor.pid, signal.SIGCONT)
        victim.wait()
        wait(lambda: survivor.poll() is not None, survivor)
        assert survivor.returncode == 0, survivor.said.read_text()
        record = json.loads((folders[1] / "done-x.json").read_text())
        assert not (folders[0] / "done-x.json").exists()
        names = optuna.get_all_study_names(storage)
        assert len(names) == 4  # both arms, the judges, and the latencies of the best
        died = []
        for name in names:
            trials = optuna.load_study(study_name=name, storage=storage).trials
            died += account(trials, 6 if "judges" in name else TRIALS if name.endswith("mrl") else 1)
            assert all(outcome(t) in ("known", "surplus") for t in trials if t.state.name == "PRUNED")
        assert len(died) == 1
        close_storage(storage)
        assert record["arms"]["mrl"]["outcomes"]["trained"] == TRIALS
        assert len({str(r["values"]) for r in record["arms"]["mrl"]["trials"] if r["outcome"] == "trained"}) == TRIALS
