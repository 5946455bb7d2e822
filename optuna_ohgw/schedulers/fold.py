"""A scheduler with what a storage holds folded into it, the same in every process."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from optuna_ohgw.history import (
    DECISION,
    RESUMED,
    RESUMED_FROM,
    SENT,
    decisions_of,
    is_interrupted,
    retry_of,
)
from optuna_ohgw.schedulers.base import Scheduler
from optuna_ohgw.schedulers.choosing import Chooser

_STARTED, DECIDED, _RESUMED, _ENDED = 0, 1, 2, 3
Event = tuple[float, int, int, int]


class Fold:
    """A scheduler with the events that it has seen.

    A configuration whose trial ended without a decision, since it failed, diverged or was pruned by
    its user, reports NaN where it would have been decided on next.

    Args:
        scheduler: A fresh one.
        others: Candidates by number of trial, where they are not those that its note says.

    Attributes:
        latest: Number of the last trial of each configuration.
    """

    def __init__(self, scheduler: Scheduler, others: Mapping[int, int] | None = None) -> None:
        self._others = others or {}
        self.scheduler = scheduler
        self.latest: dict[int, int] = {}
        self._seen: set[tuple[int, int, int]] = set()
        self._reported: dict[int, int] = {}
        self._positions: dict[int, int] = {}
        self._roots = 0
        self._chosen: set[int] = set()
        self._ends: set[int] = set()  # trials that were folded as given up
        self._repeated: set[int] = set()  # trials that others repeat
        self._resumed_by: dict[int, int] = {}  # the first by number; others are duplicates
        self._last = 0.0
        self._count = 0  # trials placed
        self._open: list[int] = []  # those among them that may have more to tell

    def position(self, trial: FrozenTrial) -> int | None:
        """Return the position of a trial's configuration among all that were started, or in the pool.

        None for one that was not chosen from the pool, or that an earlier trial already trains.
        """
        return self._positions.get(trial.number)

    def unreported(self, config: int, trial: FrozenTrial, step: int) -> list[int]:
        """Return the resources of a trial up to a step that the scheduler has not seen; they count now."""
        last = self._reported.get(config, 0)
        self._reported[config] = step
        return sorted(s for s in trial.intermediate_values if last < s <= step)

    def note(self, event: Event) -> None:
        """Take note of an event that was folded."""
        self._seen.add(event[1:])
        if event[2] == _ENDED:
            self._ends.add(event[3])
        self._last = max(self._last, event[0])

    def update(self, trials: list[FrozenTrial]) -> bool:
        """Fold what is new; return False if something new comes before what is folded."""
        fresh: list[tuple[Event, FrozenTrial]] = []
        current = [*(trials[number] for number in self._open), *trials[self._count :]]
        for trial in current:
            self._place(trial)
        for trial in current:
            fresh += [(e, trial) for e in self._events(trial) if e[1:] not in self._seen]
        self._count, self._open = len(trials), [t.number for t in current if not t.state.is_finished()]
        fresh.sort(key=lambda pair: pair[0])
        if any(0 < event[0] < self._last for event, _ in fresh):
            return False
        if self._ends & self._repeated:
            return False  # folded as given up, before its retry was queued
        for event, trial in fresh:
            if event[1:] not in self._seen:
                self._apply(event, trial)
                self.note(event)
        return True

    def _place(self, trial: FrozenTrial) -> None:
        if trial.number not in self._positions:
            source, first = trial.user_attrs.get(RESUMED_FROM), retry_of(trial)
            same = source if source is not None else first
            config = self._root(trial) if same is None else self._positions.get(same)
            if config is None:
                return
            self._positions[trial.number] = config
            if source is not None:
                self._resumed_by.setdefault(source, trial.number)
            if first is not None:
                self._repeated.add(first)
                self._note_trial(trial)

    def _root(self, trial: FrozenTrial) -> int | None:
        """Return the position of a trial that begins a configuration; None if it is not chosen yet."""
        if not isinstance(self.scheduler, Chooser):
            self._roots += 1
            return self._roots - 1
        sent = trial.system_attrs.get(SENT, {})
        config = self._others.get(trial.number, sent.get("config"))
        if config is None or config in self._chosen:
            return None
        self._chosen.add(config)
        return int(config)

    def _note_trial(self, trial: FrozenTrial) -> None:
        config = self._positions[trial.number]
        self.latest[config] = max(self.latest.get(config, -1), trial.number)

    def _events(self, trial: FrozenTrial) -> list[Event]:
        config, events = self._positions.get(trial.number), list[Event]()
        if config is None:
            return events
        if trial.user_attrs.get(RESUMED_FROM) is None and retry_of(trial) is None:
            # The order of the starts matters where they are chosen, and nowhere else.
            sent = trial.system_attrs.get(SENT, {}) if isinstance(self.scheduler, Chooser) else {}
            events.append((sent.get("time", 0.0), config, _STARTED, 0))
        decided = decisions_of(trial)
        for resource, record in decided.items():
            # A storage reads values and attributes one after the other: what is decided on may lack.
            if resource in trial.intermediate_values:
                events.append((record["time"], config, DECIDED, resource))
        source = trial.user_attrs.get(RESUMED_FROM)
        if source is not None and self._resumed_by[source] == trial.number:
            resumed = trial.system_attrs[RESUMED]
            # Not before the pause, whatever the clocks of two machines say.
            pause = decided[resumed["resource"]]["time"]
            events.append((max(resumed["time"], pause), config, _RESUMED, source))
        if self._gave_up(trial, decided) and trial.datetime_complete is not None:
            events.append((trial.datetime_complete.timestamp(), config, _ENDED, trial.number))
        return events

    def _gave_up(self, trial: FrozenTrial, decided: dict[int, dict[str, Any]]) -> bool:
        """Return whether a trial may have ended without a decision: failed, diverged, pruned by its user."""
        if trial.state == TrialState.COMPLETE:
            # Reported, or not, without asking.
            return isinstance(self.scheduler, Chooser)
        if trial.state not in (TrialState.PRUNED, TrialState.FAIL) or is_interrupted(trial):
            return False
        if trial.number in self._repeated:
            return False
        source = trial.user_attrs.get(RESUMED_FROM)
        again = retry_of(trial) is not None
        if source is not None and not again and self._resumed_by[source] != trial.number:
            return False
        before = trial.system_attrs.get(RESUMED, {}).get("resource", 0)
        own = [record for resource, record in decided.items() if resource > before]
        return not (own and own[-1]["ends"])

    def _apply(self, event: Event, trial: FrozenTrial) -> None:
        _, config, kind, what = event
        if kind == _STARTED:
            self._launch(self.scheduler.started, config, trial.system_attrs.get(SENT, {}).get("until"))
            self._note_trial(trial)
        elif kind == _RESUMED:
            self._launch(self.scheduler.resumed, config, trial.system_attrs[RESUMED].get("until"))
            self._note_trial(trial)
        elif kind == _ENDED:
            self._end(config, trial)
        else:
            for resource in self.unreported(config, trial, what):
                self.scheduler.report(config, resource, trial.intermediate_values[resource])
            record = trial.system_attrs[f"{DECISION}{what}"]
            if record.get("promoted"):
                self._launch(self.scheduler.resumed, config, record.get("next"))

    def _end(self, config: int, trial: FrozenTrial) -> None:
        until, value = self.scheduler.until(config), math.nan
        if trial.state == TrialState.COMPLETE:
            until, step = self.scheduler.max_resource, trial.last_step or 0
            for resource in self.unreported(config, trial, step):
                self.scheduler.report(config, resource, trial.intermediate_values[resource])
            # One that reported nothing counts with its final value, one that ended early with its last.
            value = trial.intermediate_values[step] if step else float(trial.value or 0.0)
        if self._reported.get(config, 0) < until:
            self._reported[config] = until
            self.scheduler.report(config, until, value)

    def _launch(self, take_note: Callable[..., None], config: int, until: int | None) -> None:
        if isinstance(self.scheduler, Chooser):
            take_note(config, until)
        else:
            take_note(config)
