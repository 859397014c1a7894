"""The rows of a fit in TensorBoard and MLflow, read back: the same as in metrics.jsonl, also after a kill."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest

from mrl.errors import ConfigError, MissingExtra
from mrl.fit import fit
from mrl.tracking import SHOWN, Tracking
from test_fit import SMALL, interrupt, make_model, sides  # noqa: F401

SHORT = dataclasses.replace(SMALL, epochs=1, min_updates=4)


def rows(out: Path) -> dict[str, dict[int, float]]:
    """Values by name and update, from `metrics.jsonl`."""
    found: dict[str, dict[int, float]] = {name: {} for name in SHOWN}
    for text in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        for name in SHOWN:
            if line.get(name) is not None:
                assert line["update"] not in found[name], "a row is there twice"
                found[name][line["update"]] = line[name]
    return found


def from_tensorboard(out: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    found = {}
    for name in events.Tags()["scalars"]:
        steps = [event.step for event in events.Scalars(name)]
        assert len(set(steps)) == len(steps), "a row is there twice"
        found[name] = {event.step: event.value for event in events.Scalars(name)}
    return found


def from_mlflow(folder: Path, name: str) -> tuple[dict[str, dict[int, float]], dict[str, str], int]:
    """The values, the parameters, and how many runs are there."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("mrl").experiment_id])
    (run,) = (r for r in runs if r.info.run_name == name)
    assert run.info.status == "FINISHED"
    assert run.data.tags["mlflow.user"] == ""
    found = {}
    for key in run.data.metrics:
        history = client.get_metric_history(run.info.run_id, key)
        assert len({m.step for m in history}) == len(history), "a row is there twice"
        found[key] = {m.step: m.value for m in history}
    return found, run.data.params, len(runs)


def test_metrics__a_row_an_update_and_a_validation(sides, tmp_path):  # noqa: F811
    result = fit(make_model(), *sides, SHORT, tmp_path)
    found = rows(tmp_path)
    assert list(found["loss"]) == list(found["lr"]) == [1, 2, 3, 4]
    assert found["images_seen"] == {1: 7, 2: 14, 3: 20, 4: 26}
    assert list(found["val_score"]) == [c["update"] for c in result.candidates]
    assert result.images_seen == 26


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard__has_the_rows_once_after_a_kill(sides, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("mrl.fit_loop.CHECKPOINT_SECONDS", 1e9)
    tracking = Tracking("tensorboard")
    interrupt(monkeypatch, 3, lambda: fit(make_model(), *sides, SHORT, tmp_path, tracking=tracking))
    fit(make_model(), *sides, SHORT, tmp_path, tracking=tracking)
    found, expected = from_tensorboard(tmp_path), rows(tmp_path)
    assert found.keys() == {name for name in SHOWN if expected[name]}
    assert all(found[name] == pytest.approx(expected[name], rel=1e-6) for name in found)
    assert sorted(p.name for p in tmp_path.iterdir())[-2:] == ["start.safetensors", "tensorboard"]


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow is not installed")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of MLflow's tables, where this test reads them
def test_mlflow__has_the_rows_once_after_a_kill_and_the_fits_share_a_store(sides, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("mrl.fit_loop.CHECKPOINT_SECONDS", 1e9)
    one, other = (Tracking("mlflow", tmp_path, name) for name in ("one", "other"))
    interrupt(monkeypatch, 3, lambda: fit(make_model(), *sides, SHORT, tmp_path / "a", tracking=one))
    fit(make_model(), *sides, SHORT, tmp_path / "a", tracking=one)
    fit(make_model(), *sides, SHORT, tmp_path / "b", seed=1, tracking=other)
    for name, out in (("one", tmp_path / "a"), ("other", tmp_path / "b")):
        (found, params, n), expected = from_mlflow(tmp_path, name), rows(out)
        assert n == 2
        assert found == {key: values for key, values in expected.items() if values}
        assert params["lr"] == str(SHORT.lr)


def test_tracker__does_not_change_the_numbers(sides, tmp_path):  # noqa: F811
    plain = fit(make_model(), *sides, SHORT, tmp_path / "a")
    tracked = fit(make_model(), *sides, SHORT, tmp_path / "b", tracking=Tracking("tensorboard"))
    assert dataclasses.replace(plain, seconds=0) == dataclasses.replace(tracked, seconds=0)


def test_tracker__that_is_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"--tracker tensorboard: .* run `pip install mrl\[tensorboard\]`"):
        Tracking("tensorboard")
    with pytest.raises(MissingExtra, match=r"run `pip install mrl\[mlflow\]`"):
        Tracking("mlflow")
    with pytest.raises(ConfigError, match="use none, mlflow or tensorboard"):
        Tracking("wandb")
