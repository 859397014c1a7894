"""The best few judged again, with fresh seeds on fresh inner splits, before anything is reported."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.distributions import IntDistribution
from optuna.trial import FrozenTrial, Trial, TrialState

from mrl.run import plain, say
from mrl.tuning.sampler import Distinct
from mrl.tuning.search import ARMS, TRAINED, Search, outcome, run_all
from mrl.tuning.settings import Settings, digest

METHOD = "corrected resampled t over repeated hold-outs (Nadeau and Bengio 2003)"


@dataclass(frozen=True)
class Candidate:
    """One of the best of an arm, as the search saw it.

    Args:
        arm: baseline or mrl.
        number: of its trial.
        settings: what it is.
        searched: its score in the search, which is flattered by having been chosen.
        latency: as measured in the search.
    """

    arm: str
    number: int
    settings: Settings
    searched: float
    latency: Mapping[str, Any]


def candidates(search: Search, studies: Mapping[str, optuna.Study]) -> list[Candidate]:
    """The best few of each arm; of a front, members from end to end."""
    found = []
    for arm in ARMS:
        done = [t for t in studies[arm].get_trials(deepcopy=False) if t.state == TrialState.COMPLETE]
        best = sorted(done, key=lambda t: (-t.values[0], t.user_attrs["latency"]["ratio"], t.number))
        if search.goal.mode == "pareto":
            best = spread([t for t in best if t.number in front(best)], search.goal.keep)
        for t in best[: search.goal.keep]:
            settings = Settings.from_dict(t.user_attrs["settings"])
            found.append(Candidate(arm, t.number, settings, t.values[0], t.user_attrs["latency"]))
    return found


def front(trials: Sequence[FrozenTrial]) -> list[int]:
    """The numbers of the trials that no other beats in quality without being slower, best quality first.

    Example:
        >>> def trial(number, score, ratio):
        ...     made = optuna.trial.create_trial(value=score, user_attrs={"latency": {"ratio": ratio}})
        ...     made.number = number
        ...     return made
        >>> front([trial(0, 0.9, 1.0), trial(1, 0.8, 0.5), trial(2, 0.7, 0.6)])
        [0, 1]
    """
    ordered = sorted(trials, key=lambda t: (-t.values[0], t.user_attrs["latency"]["ratio"], t.number))
    kept, fastest = [], math.inf
    for t in ordered:
        if t.user_attrs["latency"]["ratio"] < fastest:
            fastest = t.user_attrs["latency"]["ratio"]
            kept.append(t.number)
    return kept


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of the items, evenly from the first to the last.

    Example:
        >>> spread("abcde", 3), spread("ab", 3)
        (['a', 'c', 'e'], ['a', 'b'])
    """
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / max(1, most - 1))] for i in range(most)]


def judge_again(search: Search, found: Sequence[Candidate]) -> list[dict[str, Any]]:
    """Every candidate with every fresh seed, shared among the workers; one record a candidate.

    The seeds, and with them the inner splits, are the same for all candidates of both arms, so that they are paired.
    """
    n = search.goal.judges
    tasks = [(c, j) for c in found for j in range(n)]
    keys = [[c.arm, c.settings.to_dict()] for c in found]
    space = {"task": IntDistribution(0, len(tasks) - 1)}
    sampler = Distinct(space, search.goal.seed, "random", start=len(tasks))
    study = search.study(f"judges-{digest([keys, n])}", ["maximize"], sampler)

    def objective(trial: Trial) -> float:
        task = trial.suggest_int("task", 0, len(tasks) - 1)
        search.only(study, trial, str(task), len(tasks))
        candidate, j = tasks[task]
        score = search.scored(trial, candidate.settings, search.goal.seed + 1 + j, fresh=True)
        say(f"judged {candidate.arm} trial {candidate.number} again, seed {j + 1} of {n}: {score:.4f}")
        return score

    run_all(study, len(tasks), objective, search.alive, search.poll_s)
    scores = {t.params["task"]: t for t in study.get_trials(deepcopy=False) if outcome(t) in ("trained", "failed")}
    latencies = measure_again(search, found)
    return [
        _record(search, c, [scores.get(i * n + j) for j in range(n)], latencies[i]) for i, c in enumerate(found)
    ]  # tasks of a candidate follow each other


def measure_again(search: Search, found: Sequence[Candidate]) -> list[dict[str, Any]]:
    """Every candidate's latency, measured with care by one worker while the others wait: its numbers are everybody's."""
    keys = [[c.arm, c.number, c.settings.to_dict()] for c in found]
    study = search.study(f"latencies-{digest(keys)}", ["maximize"], Distinct({}, search.goal.seed, "random", start=1))

    def objective(trial: Trial) -> float:
        search.only(study, trial, "latencies", 1)
        for c in found:
            name = f"latency:{c.arm}-{c.number}"
            if name not in study.user_attrs:  # a worker that died may have measured some
                study.set_user_attr(name, plain(search.judge.latency(c.settings, careful=True)))
        trial.set_user_attr("outcome", TRAINED)
        return 0.0

    run_all(study, 1, objective, search.alive, search.poll_s)
    measured = study.user_attrs
    return [measured[f"latency:{c.arm}-{c.number}"] for c in found]


def _record(
    search: Search, c: Candidate, trials: Sequence[FrozenTrial | None], latency: Mapping[str, Any]
) -> dict[str, Any]:
    """A candidate's scores over the fresh seeds, and its latency as it was measured again."""
    scores = [t.values[0] if t is not None and t.state == TrialState.COMPLETE else None for t in trials]
    reasons = [t.user_attrs.get("reason") for t in trials if t is not None and t.state != TrialState.COMPLETE]
    whole = None not in scores
    return {
        "arm": c.arm,
        "trial": c.number,
        "settings": c.settings.to_dict(),
        "searched_score": c.searched,
        "scores": scores,
        "mean": float(np.mean(scores)) if whole else None,
        "sd": float(np.std(scores, ddof=1)) if whole else None,
        "latency": dict(latency),
        "searched_latency": dict(c.latency),
        "within_budget": c.arm == "baseline" or search.goal.within(latency),
        "reason": reasons[0] if reasons else None,
    }


def choose(judged: Sequence[Mapping[str, Any]], arm: str) -> Mapping[str, Any] | None:
    """The candidate of an arm with the highest mean over the fresh seeds, of those within the budget; None without one.

    Example:
        >>> rows = [{"arm": "mrl", "mean": m, "within_budget": w} for m, w in ((0.9, False), (0.8, True), (None, True))]
        >>> choose(rows, "mrl")["mean"]
        0.8
    """
    fine = [row for row in judged if row["arm"] == arm and row["within_budget"] and row["mean"] is not None]
    return max(fine, key=lambda row: row["mean"], default=None)


def difference(
    first: Sequence[float], second: Sequence[float], val_per_train: float, alpha: float = 0.05
) -> dict[str, Any]:
    """Mean of second - first over paired fresh seeds, with the interval that pays for overlapping training sets.

    t = mean(d) / (sd(d) * sqrt(1/J + n_val/n_train)), J - 1 degrees of freedom. Where all differences are equal, the ends
    are NaN: no spread is no certainty.

    Args:
        first: scores of one arm.
        second: of the other, seed by seed.
        val_per_train: validation images a training image.
        alpha: 1 - confidence.

    Example:
        >>> d = difference([0.8, 0.9, 0.8], [0.82, 0.93, 0.81], 0.2)
        >>> f"{d['estimate']:.3f} ({d['low']:.3f} to {d['high']:.3f})"
        '0.020 (-0.011 to 0.051)'
    """
    from scipy.stats import t as student

    d = np.asarray(second, float) - np.asarray(first, float)
    mean, sd = float(d.mean()), float(d.std(ddof=1))
    half = float(student.ppf(1 - alpha / 2, len(d) - 1)) * sd * math.sqrt(1 / len(d) + val_per_train)
    if not sd > 1e-15 * max(1.0, abs(mean)):
        half = math.nan
    return {"estimate": mean, "low": mean - half, "high": mean + half, "n": len(d), "method": METHOD}
