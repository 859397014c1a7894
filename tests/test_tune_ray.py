"""A search by two Ray workers on a real PostgreSQL, one of them killed: every trial is accounted for."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections import Counter

import optuna
import psutil
import pytest

from mrl.tuning.search import outcome
from mrl.tuning.storage import close_storage, open_storage
from postgres import binaries, cluster
from test_folds import opened
from test_poc import draw
from test_tune import account, wait

NEEDED = pytest.mark.skipif(
    binaries() is None or importlib.util.find_spec("ray") is None,
    reason="PostgreSQL's initdb and postgres, or ray, are not installed",
)
TRIALS = 3
ASKED = [
    "region=2,3,4",
    "lr=1e-5,3e-5,1e-4",
    "--trials",
    str(TRIALS),
    "--mode",
    "pareto",
    "--keep",
    "1",
    "--judges",
    "2",
]


@NEEDED
@pytest.mark.slow
def test_tune__two_ray_workers_on_postgresql_finish_when_one_is_killed(tmp_path):
    data, out = draw(tmp_path / "data", classes=("blank", "dot")), tmp_path / "run"
    opened(data, out, "quick", min_updates=20)
    with cluster() as url:
        words = [sys.executable, "-m", "mrl", "tune", "--out", str(out), *ASKED, "--seconds", "0.3", "--grace", "20"]
        words += ["--storage", url, "--executor", "ray", "--workers", "2"]
        said = (tmp_path / "said").open("w")
        driver = subprocess.Popen(words, stderr=said, stdout=said, env={**os.environ, "OMP_NUM_THREADS": "1"})
        driver.said = tmp_path / "said"
        storage = open_storage(url, tmp_path)

        def trials():
            names = optuna.get_all_study_names(storage)
            return [t for n in names for t in optuna.load_study(study_name=n, storage=storage).trials]

        wait(lambda: Counter(map(outcome, trials()))["running"] == 2, driver)
        workers = [p for p in psutil.Process(driver.pid).children(recursive=True) if p.name().startswith("ray::_work")]
        assert len(workers) == 2
        os.kill(workers[0].pid, signal.SIGKILL)
        wait(lambda: driver.poll() is not None, driver)
        said.close()
        assert driver.returncode == 0, driver.said.read_text()
        died = 0
        for name in optuna.get_all_study_names(storage):
            found = optuna.load_study(study_name=name, storage=storage).trials
            died += len(account(found, sum(t.state.name == "COMPLETE" for t in found)))
        close_storage(storage)
        assert died == 1
        record = json.loads((out / "tune" / "tune.json").read_text())
        assert [record["arms"][arm]["outcomes"]["trained"] for arm in ("baseline", "mrl")] == [TRIALS, TRIALS]
        assert (out / "tune" / "settings.json").is_file()
