"""Studies with thousands of finished trials in SQLite, decided on by the pruner that is measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import sqlalchemy as sa
from optuna.distributions import FloatDistribution, distribution_to_json
from optuna.pruners import BasePruner
from optuna.samplers import RandomSampler
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState, create_trial

from optuna_ohgw.opening import open_database
from optuna_ohgw.trial_rows import utc

EPOCHS = 27
_NAME = "decisions"
_X = FloatDistribution(0.0, 1.0)
_FALL, _NOISE = 0.3, 0.05


class Curves:
    """Learning curves by the parameter of a trial, the same for the same seed and order."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def parameter(self) -> float:
        """Return the parameter of a new trial."""
        return float(self._rng.random())

    def value(self, x: float, epoch: int) -> float:
        """Return a loss that falls with the epochs, with noise."""
        return x + _FALL / epoch + _NOISE * float(self._rng.normal())


def history(pruner: BasePruner, size: int) -> list[FrozenTrial]:
    """Return so many finished trials, each trained until the pruner ended it, one after the other."""
    study = optuna.create_study(sampler=RandomSampler(seed=0), pruner=pruner)
    curves = Curves(0)
    for _ in range(size):
        trial = study.ask()
        x, state = trial.suggest_float("x", _X.low, _X.high), TrialState.COMPLETE
        begun = study.get_trials(deepcopy=False)[trial.number].last_step or 0
        for epoch in range(begun + 1, EPOCHS + 1):
            value = curves.value(x, epoch)
            trial.report(value, epoch)
            if trial.should_prune():
                state = TrialState.PRUNED
                break
        study.tell(trial, value if state == TrialState.COMPLETE else None, state)
    return study.get_trials(deepcopy=False)[:size]


def write_history(file: Path, trials: Sequence[FrozenTrial]) -> None:
    """Write a study of these trials, in one transaction; one by one thousands would take a minute."""
    storage = open_database(f"sqlite:///{file}", create=True)
    study = optuna.create_study(storage=storage, study_name=_NAME)
    with storage.engine.begin() as connection:
        for model, rows in _rows(study._study_id, trials).items():
            if rows:
                connection.execute(sa.insert(model), rows)


def open_history(file: Path) -> optuna.Study:
    """Return the study of a file, as a process that has just begun sees it."""
    storage = open_database(f"sqlite:///{file}", create=False)
    return optuna.load_study(study_name=_NAME, storage=storage, sampler=RandomSampler(seed=0))


def add_running(study: optuna.Study, x: float, values: dict[int, float]) -> FrozenTrial:
    """Return a new running trial that has reported these values."""
    made = create_trial(
        state=TrialState.RUNNING, params={"x": x}, distributions={"x": _X}, intermediate_values=values
    )
    return study._storage.get_trial(study._storage.create_new_trial(study._study_id, template_trial=made))


def end(study: optuna.Study, trial: FrozenTrial) -> None:
    """End a running trial, and all that wait, so that the next decision finds none of them."""
    study._storage.set_trial_state_values(trial._trial_id, TrialState.PRUNED)
    for waiting in study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        study._storage.set_trial_state_values(waiting._trial_id, TrialState.RUNNING)
        study._storage.set_trial_state_values(waiting._trial_id, TrialState.FAIL)


def _rows(study_id: int, trials: Sequence[FrozenTrial]) -> dict[Any, list[dict[str, Any]]]:
    rows: dict[Any, list[dict[str, Any]]] = {}
    for trial in trials:
        own = {"trial_id": trial.number + 1}
        about = {"number": trial.number, "study_id": study_id, "state": trial.state}
        ran = (utc(moment) if moment else None for moment in (trial.datetime_start, trial.datetime_complete))
        times = dict(zip(("datetime_start", "datetime_complete"), ran, strict=True))
        rows.setdefault(models.TrialModel, []).append({**own, **about, **times})
        written = {
            models.TrialParamModel: [
                {"param_name": n, "param_value": v, "distribution_json": distribution_to_json(_X)}
                for n, v in trial.params.items()
            ],
            models.TrialValueModel: [
                {"objective": i, "value": v, "value_type": models.TrialValueModel.TrialValueType.FINITE}
                for i, v in enumerate(trial.values or ())
            ],
            models.TrialIntermediateValueModel: [
                {"step": step, "intermediate_value": value, "intermediate_value_type": _FINITE}
                for step, value in trial.intermediate_values.items()
            ],
            models.TrialUserAttributeModel: _attributes(trial.user_attrs),
            models.TrialSystemAttributeModel: _attributes(trial.system_attrs),
        }
        for model, found in written.items():
            rows.setdefault(model, []).extend({**own, **row} for row in found)
    return rows


_FINITE = models.TrialIntermediateValueModel.TrialIntermediateValueType.FINITE


def _attributes(found: dict[str, Any]) -> list[dict[str, str]]:
    return [{"key": key, "value_json": json.dumps(value)} for key, value in found.items()]
