"""Schedulers as Optuna pruners: every decision follows from what the storage holds."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import optuna
from optuna.pruners import BasePruner
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from optuna_ohgw.history import DECISION, RESUMED, RESUMED_FROM, decisions_of, resume
from optuna_ohgw.schedulers.base import Scheduler
from optuna_ohgw.schedulers.hyperband import HyperbandStopping
from optuna_ohgw.schedulers.pasha import Pasha
from optuna_ohgw.schedulers.promotion import PromotionAsha

_STARTED, _DECIDED, _RESUMED = 0, 1, 2


class SchedulerPruner(BasePruner):
    """A pruner that pauses and stops trials as a scheduler says, and queues those that go on.

    A paused trial ends as pruned. When a worker comes free, by a pause or an end, and the scheduler
    resumes a paused trial, a waiting one with its values and the attribute ``resumed_from`` is
    queued, which the next ``study.ask`` takes. Train by :func:`optuna_ohgw.epochs`, which keeps
    the checkpoints. A system attribute of the trial holds each decision: rung, value, cut-off, rank, rule.

    Any number of processes may share the storage. The scheduler's state is folded from the
    decisions stored there, in the order of their times; memory holds no more than what was folded
    already, and is folded anew when an earlier decision turns up late.

    Args:
        scheduler: Whether the study maximises ↦ a fresh scheduler.
    """

    def __init__(self, scheduler: Callable[[bool], Scheduler]) -> None:
        self._make = scheduler
        self._folds: dict[int, _Fold] = {}

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
        if decided and step < decided[max(decided)].get("next", 0):
            return False
        trials = study.get_trials(deepcopy=False)
        fold = self._fold(study, trials)
        scheduler, config = fold.scheduler, fold.position(trial)
        if step < scheduler.until(config):
            return False
        decision = None
        for resource in fold.unreported(config, trial, step):
            decision = scheduler.report(config, resource, trial.intermediate_values[resource])
        assert decision is not None
        now = time.time()
        fold.note((now, config, _DECIDED, step))
        record = {**decision.record(), "time": now, "ends": False}
        if decision.action != "continue":
            free = scheduler.suggest()
            if free.config == config:
                scheduler.resumed(config)
                record |= {"action": "continue", "promoted": True}
            else:
                record["ends"] = step < scheduler.max_resource
                if free.config is not None:
                    self._resume(study, fold, free.config, trials)
        if record["action"] == "continue":
            record["next"] = scheduler.until(config)
        study._storage.set_trial_system_attr(trial._trial_id, f"{DECISION}{step}", record)
        return bool(record["ends"])

    def _resume(self, study: optuna.Study, fold: _Fold, config: int, trials: list[FrozenTrial]) -> None:
        """Queue a paused trial, unless its process has not yet made its checkpoint."""
        source = fold.latest[config]
        if trials[source].state == TrialState.PRUNED:
            resume(study, trials[source])

    def _fold(self, study: optuna.Study, trials: list[FrozenTrial]) -> _Fold:
        fold = self._folds.get(study._study_id)
        if fold is None or not fold.update(trials):
            fold = _Fold(self._make(study.direction == StudyDirection.MAXIMIZE))
            fold.update(trials)
            self._folds[study._study_id] = fold
        return fold


_Event = tuple[float, int, int, int]


class _Fold:
    """A scheduler with the events that it has seen.

    Attributes:
        latest: Number of the last trial of each configuration.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.latest: dict[int, int] = {}
        self._seen: set[tuple[int, int, int]] = set()
        self._reported: dict[int, int] = {}
        self._positions: dict[int, int] = {}
        self._roots = 0
        self._resumed_by: dict[int, int] = {}  # the first by number; others are duplicates
        self._last = 0.0
        self._closed = 0  # trials below this number are finished and seen whole

    def position(self, trial: FrozenTrial) -> int:
        """Return the position of a trial's configuration among all that were started."""
        return self._positions[trial.number]

    def unreported(self, config: int, trial: FrozenTrial, step: int) -> list[int]:
        """Return the resources of a trial up to a step that the scheduler has not seen; they count now."""
        last = self._reported.get(config, 0)
        self._reported[config] = step
        return sorted(s for s in trial.intermediate_values if last < s <= step)

    def note(self, event: _Event) -> None:
        """Take note of an event that was folded."""
        self._seen.add(event[1:])
        self._last = max(self._last, event[0])

    def update(self, trials: list[FrozenTrial]) -> bool:
        """Fold what is new; return False if something new comes before what is folded."""
        fresh: list[tuple[_Event, FrozenTrial]] = []
        for trial in trials[self._closed :]:
            self._place(trial)
            fresh += [(e, trial) for e in self._events(trial) if e[1:] not in self._seen]
        while self._closed < len(trials) and trials[self._closed].state.is_finished():
            self._closed += 1
        fresh.sort(key=lambda pair: pair[0])
        if any(event[0] < self._last and event[2] != _STARTED for event, _ in fresh):
            return False
        for event, trial in fresh:
            if event[1:] not in self._seen:
                self._apply(event, trial)
                self.note(event)
        return True

    def _place(self, trial: FrozenTrial) -> None:
        if trial.number not in self._positions:
            source = trial.user_attrs.get(RESUMED_FROM)
            self._positions[trial.number] = self._roots if source is None else self._positions[source]
            self._roots += source is None
            if source is not None:
                self._resumed_by.setdefault(source, trial.number)

    def _events(self, trial: FrozenTrial) -> list[_Event]:
        config, events = self._positions[trial.number], list[_Event]()
        if trial.user_attrs.get(RESUMED_FROM) is None:
            events.append((0.0, config, _STARTED, 0))
        decided = decisions_of(trial)
        for resource, record in decided.items():
            # A storage reads values and attributes one after the other: what is decided on may lack.
            if resource in trial.intermediate_values:
                events.append((record["time"], config, _DECIDED, resource))
        source = trial.user_attrs.get(RESUMED_FROM)
        if source is not None and self._resumed_by[source] == trial.number:
            resumed = trial.system_attrs[RESUMED]
            # Not before the pause, whatever the clocks of two machines say.
            pause = decided[resumed["resource"]]["time"]
            events.append((max(resumed["time"], pause), config, _RESUMED, source))
        return events

    def _apply(self, event: _Event, trial: FrozenTrial) -> None:
        _, config, kind, what = event
        if kind == _STARTED:
            self.scheduler.started(config)
            self.latest[config] = trial.number
        elif kind == _RESUMED:
            self.scheduler.resumed(config)
            self.latest[config] = trial.number
        else:
            for resource in self.unreported(config, trial, what):
                self.scheduler.report(config, resource, trial.intermediate_values[resource])
            if trial.system_attrs[f"{DECISION}{what}"].get("promoted"):
                self.scheduler.resumed(config)


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
