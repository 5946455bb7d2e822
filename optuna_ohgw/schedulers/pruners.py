"""Schedulers as Optuna pruners: every decision follows from what the storage holds."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import optuna
from optuna.pruners import BasePruner
from optuna.samplers import TPESampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from optuna_ohgw.history import (
    DECISION,
    RESUMED,
    RESUMED_FROM,
    decisions_of,
    dropped,
    is_duplicate,
    resume,
    rising_time,
)
from optuna_ohgw.schedulers.base import Decision, Scheduler
from optuna_ohgw.schedulers.fold import DECIDED, Fold
from optuna_ohgw.schedulers.hyperband import HyperbandStopping
from optuna_ohgw.schedulers.pasha import Pasha
from optuna_ohgw.schedulers.promotion import PromotionAsha

LOCK = threading.RLock()  # threads of a process share what is folded


class SchedulerPruner(BasePruner):
    """A pruner that pauses and stops trials as a scheduler says, and queues those that go on.

    A paused trial ends as pruned. When a worker comes free, by a pause or an end, and the scheduler
    resumes a paused trial, a waiting one with its values and the attribute ``resumed_from`` is
    queued, which the next ``study.ask`` takes. Train by :func:`optuna_ohgw.epochs`, which keeps
    the checkpoints. A system attribute of the trial holds each decision: rung, value, cut-off, rank, rule.
    To TPE, the sampler that learns from pruned trials, the two would be two points: give it as
    ``OhgwSampler(TPESampler())``, which needs no warm start; a warning says so otherwise.

    Any number of processes may share the storage. The scheduler's state is folded from the
    decisions stored there, in the order of their times; memory holds no more than what was folded
    already, and is folded anew when an earlier decision turns up late.

    Args:
        scheduler: Whether the study maximises ↦ a fresh scheduler.

    Attributes:
        eager: Whether a pause queues at once whom its worker trains next; else ``queue`` does.
    """

    eager = True

    def __init__(self, scheduler: Callable[[bool], Scheduler]) -> None:
        self._make = scheduler
        self._folds: dict[int, Fold] = {}
        self._gone: dict[int, set[int]] = {}  # as of the last look

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Return whether the trial ends here, paused or stopped."""
        step = trial.last_step
        if step is None or step < 1:
            return False
        if step <= trial.system_attrs.get(RESUMED, {}).get("resource", 0):
            return False  # a resumed trial that is trained anew from its start
        decided = decisions_of(trial)
        if step in decided:
            return bool(decided[step]["ends"])
        due = decided[max(decided)].get("next", 0) if decided else 0
        with LOCK:
            return step >= due and self._decide(study, trial, step)

    def _decide(self, study: optuna.Study, trial: FrozenTrial, step: int) -> bool:
        trials = study.get_trials(deepcopy=False)
        fold = self._fold(study, trials)
        scheduler, config = fold.scheduler, fold.position(trial)
        if config is None:
            return self._stranger_ends(trial)
        if is_duplicate(trial, trials):
            return True
        if step < scheduler.until(config):
            return False
        decision = None
        for resource in fold.unreported(config, trial, step):
            decision = scheduler.report(config, resource, trial.intermediate_values[resource])
        assert decision is not None
        now = rising_time()
        fold.note((now, config, DECIDED, step))
        record = {**decision.record(), "time": now, "ends": False}
        if decision.action != "continue":
            free = self._suggest(study, fold) if self.eager else None
            if free is None:
                record["ends"] = step < scheduler.max_resource
            elif free.config == config:
                scheduler.resumed(config)
                record |= {"action": "continue", "promoted": True, "why": free.record()}
            else:
                record["ends"] = step < scheduler.max_resource
                if free.action == "resume":
                    self._resume(study, fold, free, trials)
        if record["action"] == "continue":
            record["next"] = scheduler.until(config)
        study._storage.set_trial_system_attr(trial._trial_id, f"{DECISION}{step}", record)
        return bool(record["ends"])

    def queue(self, study: optuna.Study) -> bool:
        """Queue the trial that a free worker resumes, if there is one; for runners that ask themselves.

        A pause queues it as a rule. Not where the trial's process had not yet made its checkpoint,
        or was killed.
        """
        with LOCK:
            trials = study.get_trials(deepcopy=False)
            fold = self._fold(study, trials)
            free = self._suggest(study, fold)
            if free.action == "start":
                return self._start(study, free)
            return self._resume(study, fold, free, trials)

    def unwanted(self, study: optuna.Study) -> list[int]:
        """Return the trials that are paused for good, in whose checkpoints nothing is of use any more.

        The last trial of each such configuration; less those whose checkpoints are known to be deleted.
        """
        with LOCK:
            trials = study.get_trials(deepcopy=False)
            fold = self._fold(study, trials)
            paused = [fold.latest[config] for config in fold.scheduler.unwanted()]
            new = [number for number in paused if number not in self._gone.get(study._study_id, ())]
            if new:
                gone = self._gone[study._study_id] = dropped(trials)
                new = [number for number in new if number not in gone]
        return new

    def _suggest(self, study: optuna.Study, fold: Fold) -> Decision:
        return fold.scheduler.suggest()

    def _start(self, study: optuna.Study, chosen: Decision) -> bool:
        """Queue a new configuration; here it is the sampler's to choose."""
        return False

    def _resume(self, study: optuna.Study, fold: Fold, chosen: Decision, trials: list[FrozenTrial]) -> bool:
        """Queue a paused trial, unless its process has not yet made its checkpoint."""
        assert chosen.config is not None
        source = fold.latest[chosen.config]
        if trials[source].state != TrialState.PRUNED:
            return False
        # A choice may take a second, in which another process made the same.
        later = study.get_trials(deepcopy=False)[len(trials) :]
        if any(t.user_attrs.get(RESUMED_FROM) == source for t in later):
            return False
        if isinstance(study.sampler, TPESampler) and trials[source].params:
            warnings.warn(
                "TPESampler takes a trial that was paused and resumed for two points; "
                "pass sampler=OhgwSampler(TPESampler(...)), to which it is one",
                UserWarning,
                stacklevel=2,
            )
        resume(study, trials[source], until=chosen.until, why=chosen.record())
        return True

    def _stranger_ends(self, trial: FrozenTrial) -> bool:
        """Return whether a trial ends that was not chosen from a pool, or that another already trains."""
        return True

    def _fresh(self, study: optuna.Study, trials: list[FrozenTrial]) -> Fold:
        return Fold(self._make(study.direction == StudyDirection.MAXIMIZE))

    def _fold(self, study: optuna.Study, trials: list[FrozenTrial]) -> Fold:
        fold = self._folds.get(study._study_id)
        if fold is None or not fold.update(trials):
            fold = self._fresh(study, trials)
            fold.update(trials)
            self._folds[study._study_id] = fold
        return fold


class PromotionPruner(SchedulerPruner):
    """ASHA by promotion (Li et al. 2020), see :class:`optuna_ohgw.schedulers.promotion.PromotionAsha`."""

    def __init__(self, max_resource: int, *, min_resource: int = 1, reduction_factor: int = 3) -> None:
        options: dict[str, Any] = {"min_resource": min_resource, "reduction_factor": reduction_factor}
        super().__init__(lambda up: PromotionAsha(max_resource, maximize=up, **options))


class PashaPruner(SchedulerPruner):
    """PASHA (Bohdal et al. 2023), see :class:`optuna_ohgw.schedulers.pasha.Pasha`; report every epoch."""

    def __init__(self, max_resource: int, *, min_resource: int = 1, reduction_factor: int = 3) -> None:
        options: dict[str, Any] = {"min_resource": min_resource, "reduction_factor": reduction_factor}
        super().__init__(lambda up: Pasha(max_resource, maximize=up, **options))


class PairedHyperbandPruner(SchedulerPruner):
    """Asynchronous Hyperband that stops, with brackets by the position of a trial in its study.

    Studies of one seed have the same brackets, whatever their names, and need no filtering sampler.
    See :class:`optuna_ohgw.schedulers.hyperband.HyperbandStopping`.
    """

    def __init__(self, max_resource: int, *, min_resource: int = 1, reduction_factor: int = 3) -> None:
        options: dict[str, Any] = {"min_resource": min_resource, "reduction_factor": reduction_factor}
        super().__init__(lambda up: HyperbandStopping(max_resource, maximize=up, **options))
