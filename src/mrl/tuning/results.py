"""What a finished search says: trials, importance, front, the best few judged again, and what was chosen."""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import optuna
from optuna.trial import TrialState

from mrl.tuning.judging import candidates, choose, difference, front, judge_again
from mrl.tuning.search import ARMS, Search, outcome
from mrl.tuning.storage import experimental

LEAST = 5  # trained trials below which importance means nothing
NOTE = (
    "Scores are those of inner validation images. What the search saw is flattered by the choice; the means over fresh seeds "
    "are less so, but the best of a few was still chosen by them. Only `mrl poc` on the test side judges the arms."
)


def tune_document(search: Search) -> dict[str, Any]:
    """Runs a search to its end and puts everything into one record, as in `tune.json`.

    Args:
        search: opened by this worker; others may work on it too.
    """
    studies = search.run()
    judged = judge_again(search, candidates(search, studies))
    chosen = {arm: choose(judged, arm) for arm in ARMS}
    arms = {arm: arm_document(search, arm, study) for arm, study in studies.items()}
    gap = None
    if all(chosen.values()):
        scores = [chosen[arm]["scores"] for arm in ARMS]
        gap = {**difference(*scores, search.judge.val_per_train), "arms": "mrl - baseline"}
    return {
        "schema": 1,
        "kind": "tune",
        "study": search.name,
        "goal": asdict(search.goal),
        "space": search.space.to_dict(),
        "sampler": f"balanced start, then {search.engine}, no trial twice",
        "optuna": optuna.__version__,
        "arms": arms,
        "judged": judged,
        "chosen": {arm: None if row is None else row["trial"] for arm, row in chosen.items()},
        "settings": {arm: None if row is None else row["settings"] for arm, row in chosen.items()},
        "difference": gap,
        "warnings": [*search.space.warnings(), *_warnings(search, studies, arms, chosen)],
        "note": NOTE,
    }


def arm_document(search: Search, arm: str, study: optuna.Study) -> dict[str, Any]:
    """The trials of an arm with what became of each, the importance of its axes, and its front."""
    trials = study.get_trials(deepcopy=False)
    done = [t for t in trials if t.state == TrialState.COMPLETE]
    importance, why = importance_of(study, len(search.space.of(arm).axes))
    return {
        "outcomes": dict(sorted(Counter(outcome(t) for t in trials).items())),
        "importance": importance,
        "no_importance": why,
        "front": front(done),
        "trials": [_row(search, arm, t) for t in trials],
    }


def importance_of(study: optuna.Study, n_axes: int) -> tuple[dict[str, float] | None, str | None]:
    """How much of the variance of the quality each axis explains (fANOVA), or None and the reason."""
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if not n_axes or len(done) < LEAST:
        return None, "nothing varies" if not n_axes else f"only {len(done)} trained trials; {LEAST} are needed"
    if len({t.values[0] for t in done}) < 2:
        return None, "all trained trials have the same score"
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    with experimental(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = optuna.importance.get_param_importances(study, evaluator=evaluator, target=lambda t: t.values[0])
    return {name: float(value) for name, value in found.items()}, None


def _row(search: Search, arm: str, t: Any) -> dict[str, Any]:
    space = search.space.of(arm)
    told = all(axis.name in t.params for axis in space.axes)
    values = {axis.name: axis.value(t.params[axis.name]) for axis in space.axes} if told else {}
    return {
        "trial": t.number,
        "outcome": outcome(t),
        "values": values,
        "score": t.values[0] if t.state == TrialState.COMPLETE else None,
        "latency": t.user_attrs.get("latency"),
        "architecture": t.user_attrs.get("architecture"),
        "seconds": t.user_attrs.get("seconds"),
        "reason": t.user_attrs.get("reason"),
        "retry_of": t.system_attrs.get("failed_trial"),
    }


def at_once(studies: Iterable[optuna.Study]) -> bool:
    """Whether trials ran at the same time, each in a worker of its own; those of workers that died are not looked at.

    Example:
        >>> study = optuna.create_study()
        >>> first, second = study.ask(), study.ask()
        >>> told = [study.tell(trial, 0.0) for trial in (first, second)]
        >>> at_once([study]), at_once([optuna.create_study()])
        (True, False)
    """
    ended = [t for s in studies for t in s.get_trials(deepcopy=False) if t.state.is_finished()]
    spans = sorted((t.datetime_start, t.datetime_complete) for t in ended if t.state != TrialState.FAIL)
    return any(later < end for (_, end), (later, _) in itertools.pairwise(spans))


def _warnings(
    search: Search, studies: Mapping[str, optuna.Study], arms: Mapping[str, Any], chosen: Mapping[str, Any]
) -> Sequence[str]:
    said = []
    if at_once(studies.values()):
        said.append(
            "several workers: latencies of the search were timed while others trained; those of the best were measured "
            "again when no worker trained"
        )
    trained = {arm: sum(arms[arm]["outcomes"].get(k, 0) for k in ("trained", "failed")) for arm in ARMS}
    for arm, n in trained.items():
        if n < search.goal.trials:
            said.append(
                f"{arm}: {n} of {search.goal.trials} trials, because the space holds no more that are within the budget"
                if search.space.of(arm).axes
                else f"{arm}: one trial, because nothing of the fit varies in this space"
            )
        failed = arms[arm]["outcomes"].get("failed", 0)
        if failed:
            said.append(f"{arm}: {failed} trials could not be trained to the end, such as for the first reason given")
    if chosen["mrl"] is None:
        said.append(
            "mrl: none of the best was within the latency budget when it was measured again, or could be trained"
        )
    return said
