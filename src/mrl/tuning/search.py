"""The search: two arms with equal numbers of trials, latency before training, and workers that may die."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from mrl.errors import ConfigError, MrlError
from mrl.run import plain, say
from mrl.tuning.alive import Beats
from mrl.tuning.goal import Goal
from mrl.tuning.sampler import Distinct
from mrl.tuning.settings import Settings, digest
from mrl.tuning.space import Space

ARMS = ("baseline", "mrl")
POLL_S = 5.0
RETRIES = 3  # of a trial whose worker died
TRAINED, FAILED, OVER, REFUSED, KNOWN, SURPLUS = "trained", "failed", "over budget", "refused", "known", "surplus"
WASTED = 20  # proposals for each trial that may come to nothing before it gives up
IDENTITY = "identity"
LIVE = (TrialState.RUNNING, TrialState.WAITING)


class Judge(Protocol):
    """What a search knows of models: their architecture, what they cost, how good they are.

    `val_per_train` is the size of the inner validation side as a share of the training images.
    """

    val_per_train: float

    def architecture(self, settings: Settings) -> dict[str, Any]:
        """The part of the settings that decides the latency, as plain data; MrlError for what cannot be."""

    def latency(self, settings: Settings, *, careful: bool = False) -> dict[str, Any]:
        """`ratio` (to the baseline, with `low` and `high`) and `latency_ms_median`, measured."""

    def quality(self, settings: Settings, *, seed: int, fresh: bool = False) -> float:
        """The score on the inner validation side; `fresh` draws that side again by the seed."""


@dataclass(frozen=True)
class Search:
    """A search in a storage: one study an arm, shared by all workers that open it with the same name.

    Args:
        judge: of models.
        space: bound to the model's layers.
        start: arm and values -> settings.
        goal: what is searched for.
        storage: of Optuna.
        name: of the studies.
        identity: further facts that all workers must share, such as the protocol's hash.
        engine: of the sampler.
        alive: the signs of life of running trials that workers give and watch.
        poll_s: seconds between looks at what other workers do.
    """

    judge: Judge
    space: Space
    start: Callable[[Mapping[str, Any], str], Settings]
    goal: Goal
    storage: Any
    name: str
    identity: Mapping[str, Any]
    engine: str = "gp"
    alive: Beats = field(default_factory=Beats)
    poll_s: float = POLL_S

    def study(self, arm: str, directions: Sequence[str] | None = None, sampler: Any = None) -> optuna.Study:
        """The study of an arm, made if it is not there.

        Raises:
            ConfigError: it is there, of another search.
        """
        pareto = self.goal.mode == "pareto"
        study = optuna.create_study(
            storage=self.storage,
            study_name=f"{self.name}-{arm}",
            directions=directions or (["maximize", "minimize"] if pareto else ["maximize"]),
            sampler=sampler or self.sampler(arm),
            load_if_exists=True,
        )
        ours = plain({**self.identity, "goal": self.goal.identity(), "space": self.space.to_dict()})
        theirs = study.user_attrs.get(IDENTITY)
        if theirs is None:
            study.set_user_attr(IDENTITY, ours)
        elif theirs != ours:
            differ = ", ".join(k for k in ours if theirs.get(k) != ours[k]) or "version"
            raise ConfigError(
                f"mrl tune: study {self.name} belongs to a search with another {differ}; repeat its arguments, or give another --study."
            )
        return study

    def sampler(self, arm: str) -> Distinct:
        """Who proposes the trials of an arm."""
        start = max(2, min(8, self.goal.trials // 2))
        return Distinct(self.space.of(arm).distributions(), self.goal.seed, self.engine, start)

    def run(self) -> dict[str, optuna.Study]:
        """Works until both arms have their trials and no other worker runs one; returns the studies.

        Raises:
            ConfigError: no trial of an arm could be trained, or nearly every proposal came to nothing.
        """
        studies = {arm: self.study(arm) for arm in ARMS}
        waits = False
        while True:
            arm = self._next(studies)
            if arm is not None:
                one_trial(studies[arm], lambda trial, arm=arm: self._trial(studies[arm], arm, trial), self.alive)
                continue
            if not any(_count(s.get_trials(deepcopy=False), live=True) for s in studies.values()):
                break
            if not waits:
                say("nothing is left to start; waiting for trials that other workers run")
                waits = True
            time.sleep(self.poll_s)
        for arm, study in studies.items():
            self._check(arm, study)
        return studies

    def _next(self, studies: Mapping[str, optuna.Study]) -> str | None:
        """The arm that is behind, of those that still need trials."""
        needed = {}
        for arm, study in studies.items():
            reap(study, self.alive)
            trials = study.get_trials(deepcopy=False)
            waiting = any(t.state == TrialState.WAITING for t in trials)
            spent = len([t for t in trials if counts(t)])
            running = _count(trials, live=True)
            wasted = sum(outcome(t) in (OVER, REFUSED, KNOWN) for t in trials)
            hopeless = wasted > WASTED * self.goal.trials
            open_slot = spent + running < self.goal.trials and not hopeless
            if waiting or (open_slot and not self.sampler(arm).exhausted(trials) and not self._single(arm, trials)):
                needed[arm] = spent + running
        return min(needed, key=needed.get) if needed else None

    def _single(self, arm: str, trials: Sequence[FrozenTrial]) -> bool:
        """Whether the arm has nothing that varies, and its one trial was proposed."""
        mine = [t for t in trials if t.state != TrialState.FAIL and outcome(t) not in (KNOWN, SURPLUS)]
        return not self.space.of(arm).axes and bool(mine)

    def _check(self, arm: str, study: optuna.Study) -> None:
        trials = study.get_trials(deepcopy=False)
        if any(t.state == TrialState.COMPLETE for t in trials):
            return
        reasons = [t.user_attrs["reason"] for t in trials if t.user_attrs.get("reason")]
        over = sum(outcome(t) == OVER for t in trials)
        if over:
            fastest = min(t.user_attrs["latency"]["ratio"] for t in trials if "latency" in t.user_attrs)
            raise ConfigError(
                f"mrl tune: {over} of {len(trials)} proposals are over the latency budget and none could be trained; the "
                f"fastest takes {fastest:.3f} of the baseline's time: raise the budget, or widen the space."
            )
        why = reasons[0] if reasons else "no reason was noted"
        raise ConfigError(f"mrl tune: no trial of {arm} could be trained; the first reason: {why}")

    def _trial(self, study: optuna.Study, arm: str, trial: Trial) -> float | tuple[float, float]:
        """One trial: what it is, whether it is new, what it costs, and only then how good it is."""
        space = self.space.of(arm)
        raw = {axis.name: axis.suggest(trial) for axis in space.axes}
        try:
            settings = self.start(space.values(raw), arm)
            architecture = self.judge.architecture(settings)
        except MrlError as error:
            raise _stop(trial, REFUSED, str(error)) from error
        key = digest({"settings": _decisive(settings, architecture)})
        trial.set_user_attr("settings", settings.to_dict())
        trial.set_user_attr("architecture", digest(architecture))
        self.only(study, trial, key, self.goal.trials)
        try:
            latency = self.latency(study, settings, architecture)
        except MrlError as error:
            raise _stop(trial, REFUSED, str(error)) from error
        trial.set_user_attr("latency", latency)
        if arm == "mrl" and not self.goal.within(latency):
            raise _stop(trial, OVER, f"{latency['ratio']:.3f} of the baseline's latency")
        score = self.scored(trial, settings, self.goal.seed)
        say(f"{arm} trial {trial.number}: {score:.4f}, latency x{latency['ratio']:.3f}")
        return (score, latency["ratio"]) if self.goal.mode == "pareto" else score

    def scored(self, trial: Trial, settings: Settings, seed: int, *, fresh: bool = False) -> float:
        """The quality of a trial, with how long it took; a fit that cannot be ends the trial, and counts as one."""
        start = time.monotonic()
        try:
            score = self.judge.quality(settings, seed=seed, fresh=fresh)
        except MrlError as error:
            raise _stop(trial, FAILED, str(error)) from error
        trial.set_user_attr("seconds", round(time.monotonic() - start, 3))
        trial.set_user_attr("outcome", TRAINED)
        return score

    @staticmethod
    def only(study: optuna.Study, trial: Trial, key: str, most: int) -> None:
        """Stops a trial that another worker has or had, or that is more than `most`."""
        trial.set_user_attr("key", key)
        earlier = [t for t in study.get_trials(deepcopy=False) if t.number < trial.number]
        mine = [t for t in earlier if counts(t) or t.state in LIVE]
        if any(t.user_attrs.get("key") == key for t in mine):
            raise _stop(trial, KNOWN, "the same model and fit as an earlier trial")
        if len(mine) >= most:
            raise _stop(trial, SURPLUS, "another worker had taken the last one")

    def latency(self, study: optuna.Study, settings: Settings, architecture: Mapping[str, Any]) -> dict[str, Any]:
        """The latency of an architecture, measured once by the first worker that needs it and kept in the study."""
        name = f"latency:{digest(architecture)}"
        known = study.user_attrs.get(name)
        if known is None:
            known = plain(self.judge.latency(settings))
            study.set_user_attr(name, known)
        return known


def counts(trial: FrozenTrial) -> bool:
    """Whether a trial was trained, well or not, and so is one of the arm's."""
    return trial.state == TrialState.COMPLETE or outcome(trial) == FAILED


def outcome(trial: FrozenTrial) -> str:
    """What became of a trial: trained, failed, over budget, refused, known, surplus, died, or still running or waiting."""
    if trial.state == TrialState.FAIL:
        return "died"
    return trial.user_attrs.get("outcome", trial.state.name.lower())


def one_trial(study: optuna.Study, objective: Callable[[Trial], Any], alive: Beats) -> None:
    """Runs one trial; where others took this worker for dead meanwhile, the trial is theirs, and nothing is lost but time.

    A trial that an error or an interruption ends is queued again, as one of a dead worker is.
    """
    trial = study.ask()
    with alive.running(study, trial):
        try:
            told = study.tell(trial, objective(trial), skip_if_finished=True)
        except optuna.TrialPruned:
            told = study.tell(trial, state=TrialState.PRUNED, skip_if_finished=True)
        except optuna.exceptions.UpdateFinishedTrialError:
            told = study.tell(trial, skip_if_finished=True)
        except BaseException:
            fail(study, trial.number)
            raise
    if told.state == TrialState.FAIL:
        say(f"trial {trial.number}: this worker was silent for too long and was taken for dead; the trial is run again")


def reap(study: optuna.Study, alive: Beats) -> None:
    """Fails the running trials of dead workers, and queues each again."""
    for trial in alive.dead(study, study.get_trials(deepcopy=False)):
        fail(study, trial.number)


def fail(study: optuna.Study, number: int) -> None:
    """Fails a running trial and queues it again, up to 3 times; of several workers that try, one does.

    The new trial has the values of the dead one, or draws them where it died before it had them all; what the dead one noted
    of itself is forgotten. Where its place has been taken meanwhile, it ends as known or surplus.
    """
    try:
        dead = study.tell(number, state=TrialState.FAIL)
    except (ValueError, optuna.exceptions.UpdateFinishedTrialError):  # it is finished: somebody else was first
        return
    history = [*dead.system_attrs.get("retry_history", []), number]
    if len(history) > RETRIES:
        return
    whole = study.sampler.space.keys() <= dead.params.keys()
    study.add_trial(
        optuna.trial.create_trial(
            state=TrialState.WAITING,
            params=dead.params if whole else {},
            distributions=dead.distributions if whole else {},
            system_attrs={"failed_trial": history[0], "retry_history": history},
        )
    )


def run_all(
    study: optuna.Study, n: int, objective: Callable[[Trial], float], alive: Beats, poll_s: float = POLL_S
) -> None:
    """Runs trials until n of them are done, by this worker or others."""
    while True:
        reap(study, alive)
        trials = study.get_trials(deepcopy=False)
        live, done = _count(trials, live=True), sum(counts(t) for t in trials)
        if done + live < n or any(t.state == TrialState.WAITING for t in trials):
            one_trial(study, objective, alive)
        elif live:
            time.sleep(poll_s)
        else:
            return


def _stop(trial: Trial, what: str, reason: str) -> optuna.TrialPruned:
    trial.set_user_attr("outcome", what)
    trial.set_user_attr("reason", reason)
    if what not in (KNOWN, SURPLUS):
        say(f"trial {trial.number}: {what}: {reason}")
    return optuna.TrialPruned(reason)


def _decisive(settings: Settings, architecture: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with their modules instead of how those were named, so that equal models are equal."""
    told = settings.to_dict()
    if settings.swap is not None:
        told = {k: v for k, v in told.items() if k not in ("region", "regions", "layers")}
    return {**told, "architecture": architecture}


def _count(trials: Sequence[FrozenTrial], *, live: bool) -> int:
    return sum((t.state in LIVE) == live for t in trials)
