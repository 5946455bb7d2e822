"""Paused and resumed trials: one configuration is one logical trial."""

from __future__ import annotations

import time
from collections.abc import Container
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

RESUMED_FROM = "resumed_from"
# System attributes: a trial's decisions by resource; when and after what resource it was resumed.
DECISION, RESUMED = "ohgw:decision:", "ohgw:resumed"


def decisions_of(trial: FrozenTrial) -> dict[int, dict[str, Any]]:
    """Return the decisions on a trial by resource, those before it was resumed included."""
    start = len(DECISION)
    found = {int(k[start:]): v for k, v in trial.system_attrs.items() if k.startswith(DECISION)}
    return dict(sorted(found.items()))


def paused_at(trial: FrozenTrial, resource: int) -> bool:
    """Return whether a scheduler paused a trial there."""
    return bool(trial.system_attrs.get(f"{DECISION}{resource}", {}).get("action") == "pause")


def is_duplicate(trial: FrozenTrial, trials: list[FrozenTrial]) -> bool:
    """Return whether an earlier trial goes on from the same one.

    Two processes may queue the same trial at once. Numbers are given in one order that all
    processes see, so the lowest goes on and every other knows that it is not the one.
    """
    source = trial.user_attrs.get(RESUMED_FROM)
    return source is not None and any(
        t.user_attrs.get(RESUMED_FROM) == source for t in trials[: trial.number]
    )


def resume(study: optuna.Study, trial: FrozenTrial) -> None:
    """Queue a paused trial to go on: a waiting trial with its values, linked by ``resumed_from``."""
    note = {RESUMED: {"time": time.time(), "resource": trial.last_step}}
    study.add_trial(
        create_trial(
            state=TrialState.WAITING,
            params=trial.params,
            distributions=trial.distributions,
            intermediate_values=trial.intermediate_values,
            user_attrs={**trial.user_attrs, RESUMED_FROM: trial.number},
            system_attrs={**trial.system_attrs, **note},
        )
    )


def superseded(trials: list[FrozenTrial]) -> set[int]:
    """Return the numbers of trials that are no logical trial: resumed since, or a duplicate."""
    numbers: set[int] = set()
    sources: set[int] = set()
    for trial in trials:
        source = trial.user_attrs.get(RESUMED_FROM)
        if source is None:
            continue
        if source in sources:
            numbers.add(trial.number)
        elif trial.state != TrialState.WAITING:
            numbers.add(source)
        sources.add(source)
    return numbers


class LogicalStudy(optuna.Study):
    """A view of a study in which a resumed trial stands for what it goes on from."""

    def __init__(self, study: optuna.Study) -> None:
        self.__dict__.update(study.__dict__)

    def get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """Return the logical trials."""
        trials = super().get_trials(deepcopy=deepcopy)
        gone = superseded(trials)
        return [t for t in trials if t.number not in gone and (states is None or t.state in states)]


def logical(study: optuna.Study) -> optuna.Study:
    """Return a study as its logical trials; itself where nothing was ever resumed."""
    trials = study.get_trials(deepcopy=False)
    return LogicalStudy(study) if any(RESUMED_FROM in t.user_attrs for t in trials) else study
