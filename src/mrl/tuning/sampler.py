"""Who proposes the next trial: a balanced start, then a Gaussian process, and never the same trial twice."""

from __future__ import annotations

import contextlib
import itertools
import math
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

START = 8  # trials of the balanced design; fewer where half of them is fewer
ASKS = 4  # of the Gaussian process, which takes what it proposed as running
DRAWS = 24  # proposals that may turn out to be known before chance decides
UNTOLD = ("known", "surplus")  # outcomes that say nothing about the point
DEATHS = 4  # runs of one trial that ended without a result before it is left alone
ENUMERATED = 4096  # spaces up to this size are known value by value

Params = dict[str, Any]


class Distinct(BaseSampler):
    """Proposes trials that were not tried yet: a balanced start, then a Gaussian process.

    A fit with the same settings and seed gives the same score, so a repeated trial is wasted; Optuna's samplers do repeat
    themselves in small spaces. The first `start` trials take, on every axis, the value used least so far. Then the
    engine proposes until it names a new point; what it named before counts as running. Trials that were pruned count as the
    worst value seen. docs/tune.md says how the engines compare.

    Every draw follows from the seed and the number of trials before it, so an interrupted study goes on as it would have.

    Args:
        space: every axis; all trials have all of them.
        seed: of the proposals.
        engine: "gp" (Optuna's Gaussian process, with noise), "tpe" (multivariate) or "random".
        start: trials of the balanced design.

    Example:
        >>> study = optuna.create_study(sampler=Distinct({"x": IntDistribution(0, 3)}, 0))
        >>> sorted(study.ask().suggest_int("x", 0, 3) for _ in range(4))
        [0, 1, 2, 3]
    """

    def __init__(
        self, space: Mapping[str, BaseDistribution], seed: int, engine: str = "gp", start: int = START
    ) -> None:
        self.space, self.seed, self.engine, self.start = dict(space), seed, engine, start

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All axes, whatever was tried."""
        return self.space

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> Params:
        """The values of a new trial."""
        if self.space.keys() <= trial.params.keys():  # nothing varies, or it was queued with its values
            return {}
        every = self._whole(t for t in study.get_trials(deepcopy=False) if t.number != trial.number)
        told = [t for t in every if t.state != TrialState.FAIL and t.user_attrs.get("outcome") not in UNTOLD]
        known = known_points(every)
        rng = np.random.default_rng([self.seed, len(told)])
        judged = [t for t in told if t.state == TrialState.COMPLETE]
        if len(told) < self.start or len(judged) < 2:
            return self._balanced(told, known, rng)
        for params in self._proposals(study, told, rng):
            if key_of(params) not in known:
                return params
        return self._balanced(told, known, rng)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """A random value, for an axis that is not in the space."""
        seed = int(np.random.default_rng([self.seed, trial.number]).integers(2**31))
        return RandomSampler(seed=seed).sample_independent(study, trial, param_name, param_distribution)

    def exhausted(self, trials: Sequence[FrozenTrial]) -> bool:
        """Whether every point of a finite space is known."""
        points = len(list(_points(self.space))) if _size(self.space) <= ENUMERATED else math.inf
        return len(known_points(self._whole(trials))) >= points

    def _whole(self, trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
        """Those with all their values; another worker's may be between its first and its last."""
        return [t for t in trials if t.params and self.space.keys() <= t.params.keys()]

    def _balanced(self, told: Sequence[FrozenTrial], known: Collection[tuple], rng: np.random.Generator) -> Params:
        """The least used value on every axis, ties by chance; any point that is not known where those are used up."""
        used: dict[str, dict[Any, int]] = {name: {} for name in self.space}
        for name, t in itertools.product(self.space, told):
            level = _level(self.space[name], t.params[name])
            used[name][level] = used[name].get(level, 0) + 1
        for _ in range(DRAWS):
            params = {name: _rarest(dist, used[name], rng) for name, dist in self.space.items()}
            if key_of(params) not in known:
                return params
        if _size(self.space) <= ENUMERATED:
            left = [params for params in _points(self.space) if key_of(params) not in known]
            return left[int(rng.integers(len(left)))] if left else params
        return {name: _rarest(dist, {}, rng) for name, dist in self.space.items()}

    def _proposals(
        self, study: optuna.Study, told: Sequence[FrozenTrial], rng: np.random.Generator
    ) -> Iterator[Params]:
        """What the engine proposes, one after another."""
        seed = int(rng.integers(2**31))
        if self.engine == "random":
            random = RandomSampler(seed=seed)
            for _ in range(DRAWS):
                yield {name: random.sample_independent(study, told[0], name, d) for name, d in self.space.items()}
            return
        with _quiet():
            shadow = self._shadow(study, told)
            if self.engine == "gp":
                shadow.sampler = GPSampler(seed=seed, n_startup_trials=0)
            else:
                shadow.sampler = TPESampler(seed=seed, n_startup_trials=0, multivariate=True)
            for _ in range(ASKS if self.engine == "gp" else DRAWS):
                yield shadow.ask(self.space).params

    def _shadow(self, study: optuna.Study, told: Sequence[FrozenTrial]) -> optuna.Study:
        """The study in memory, with the worst value seen for pruned trials, and waiting ones taken for running."""
        copy = optuna.create_study(directions=study.directions)
        values = np.array([t.values for t in told if t.state == TrialState.COMPLETE])
        high = np.array([d == optuna.study.StudyDirection.MAXIMIZE for d in study.directions])
        worst = np.where(high, values.min(0), values.max(0)).tolist()
        for t in told:
            more: dict[str, Any] = {"state": TrialState.RUNNING}
            if t.state.is_finished():
                more = {"values": t.values if t.state == TrialState.COMPLETE else worst}
            copy.add_trial(optuna.trial.create_trial(params=t.params, distributions=self.space, **more))
        return copy


def known_points(trials: Sequence[FrozenTrial]) -> set[tuple]:
    """The points that were tried, are running or wait; those whose runs died too often too."""
    untried = [t for t in trials if t.state == TrialState.FAIL or t.user_attrs.get("outcome") == "surplus"]
    known = {key_of(t.params) for t in trials if t.params and t not in untried}
    died: dict[tuple, int] = {}
    for t in trials:
        if t.state == TrialState.FAIL and t.params:
            died[key_of(t.params)] = died.get(key_of(t.params), 0) + 1
    return known | {point for point, times in died.items() if times >= DEATHS}


def key_of(params: Mapping[str, Any]) -> tuple:
    """A point as something that can be looked up.

    Example:
        >>> key_of({"b": 1, "a": "x"}) == key_of({"a": "x", "b": 1})
        True
    """
    return tuple(sorted(params.items()))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Optuna's notes on experimental parts and on every study it makes."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)


def _levels(dist: BaseDistribution) -> int:
    """How many values, or parts of a range, the balanced design tells apart."""
    if isinstance(dist, CategoricalDistribution):
        return len(dist.choices)
    if isinstance(dist, IntDistribution):
        return min(START, (dist.high - dist.low) // dist.step + 1)
    return START


def _level(dist: BaseDistribution, value: Any) -> int:
    if isinstance(dist, CategoricalDistribution):
        return list(dist.choices).index(value)
    low, high = (math.log(dist.low), math.log(dist.high)) if dist.log else (dist.low, dist.high)
    share = 0.0 if high == low else ((math.log(value) if dist.log else value) - low) / (high - low)
    if isinstance(dist, IntDistribution) and _levels(dist) < START:
        return (value - dist.low) // dist.step
    return min(_levels(dist) - 1, int(share * _levels(dist)))


def _rarest(dist: BaseDistribution, used: Mapping[int, int], rng: np.random.Generator) -> Any:
    """A value of one of the levels used least."""
    counts = np.array([used.get(level, 0) for level in range(_levels(dist))])
    level = int(rng.choice(np.flatnonzero(counts == counts.min())))
    if isinstance(dist, CategoricalDistribution):
        return dist.choices[level]
    if isinstance(dist, IntDistribution) and _levels(dist) < START:
        return dist.low + level * dist.step
    share = (level + rng.random()) / _levels(dist)
    low, high = (math.log(dist.low), math.log(dist.high)) if dist.log else (dist.low, dist.high)
    value = math.exp(low + share * (high - low)) if dist.log else low + share * (high - low)
    if dist.step is not None and not dist.log:
        value = dist.low + round((value - dist.low) / dist.step) * dist.step
    value = min(max(value, dist.low), dist.high)
    return round(value) if isinstance(dist, IntDistribution) else float(value)


def _size(space: Mapping[str, BaseDistribution]) -> float:
    if any(isinstance(d, FloatDistribution) and d.step is None and d.low < d.high for d in space.values()):
        return math.inf
    return math.prod(len(_values(d)) for d in space.values())


def _values(dist: BaseDistribution) -> Sequence[Any]:
    if isinstance(dist, CategoricalDistribution):
        return dist.choices
    if isinstance(dist, IntDistribution):
        return range(dist.low, dist.high + 1, dist.step)
    if dist.step is None:
        return [dist.low]
    return [dist.low + i * dist.step for i in range(round((dist.high - dist.low) / dist.step) + 1)]


def _points(space: Mapping[str, BaseDistribution]) -> Iterator[Params]:
    for values in itertools.product(*(_values(d) for d in space.values())):
        yield dict(zip(space, values, strict=True))
