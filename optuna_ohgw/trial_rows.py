"""The rows of a trial in Optuna's tables, and the statements that write them."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence, Set
from typing import Any

import sqlalchemy as sa
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState

# By what the rows of a table differ within a trial.
_KEYS: dict[Any, str] = {
    models.TrialParamModel: "param_name",
    models.TrialIntermediateValueModel: "step",
    models.TrialUserAttributeModel: "key",
    models.TrialSystemAttributeModel: "key",
}

# Made once: to build a statement takes longer than SQLite takes to execute it.
_TRIAL: sa.BindParameter[int] = sa.bindparam("trial")
_STUDY: sa.BindParameter[int] = sa.bindparam("study")
_INSERT: dict[Any, sa.Insert] = {
    table: sa.insert(table) for table in (models.TrialModel, models.TrialValueModel, *_KEYS)
}
_LOCK = sa.select(models.StudyModel.study_id).where(models.StudyModel.study_id == _STUDY).with_for_update()
_BEFORE = sa.select(sa.func.count(models.TrialModel.trial_id)).where(
    models.TrialModel.study_id == _STUDY, models.TrialModel.trial_id < _TRIAL
)
_NUMBER = sa.update(models.TrialModel).where(models.TrialModel.trial_id == _TRIAL)
_RUNNING = _NUMBER.where(models.TrialModel.state == TrialState.RUNNING)


def insert_running(connection: sa.Connection, study_id: int, now: datetime.datetime) -> FrozenTrial:
    """Make a running trial by Optuna's own steps, in half its time: without objects of a session."""
    connection.execute(_LOCK, {"study": study_id}).one()
    row = {"study_id": study_id, "state": TrialState.RUNNING, "datetime_start": utc(now)}
    made = connection.execute(_INSERT[models.TrialModel], row).inserted_primary_key
    assert made is not None
    trial_id = int(made[0])
    before = connection.execute(_BEFORE, {"study": study_id, "trial": trial_id}).scalar_one()
    connection.execute(_NUMBER, {"trial": trial_id, "number": before})
    return fresh_trial(trial_id, before, now)


def fresh_trial(trial_id: int, number: int, now: datetime.datetime) -> FrozenTrial:
    """Return a running trial that has nothing yet."""
    return FrozenTrial(number, TrialState.RUNNING, None, now, None, {}, {}, {}, {}, {}, trial_id)


def update_running(connection: sa.Connection, trial_id: int, ending: Mapping[str, Any]) -> bool:
    """Lock a running trial, with new values of its columns; return whether it runs at all."""
    news = {"trial": trial_id, "state": TrialState.RUNNING, **ending}
    return bool(connection.execute(_RUNNING, news).rowcount)


def insert_values(connection: sa.Connection, trial_id: int, values: Sequence[float]) -> None:
    """Write the values of a trial that ends."""
    stored = enumerate(map(models.TrialValueModel.value_to_stored_repr, values))
    rows = [
        {"trial_id": trial_id, "objective": i, "value": value, "value_type": kind}
        for i, (value, kind) in stored
    ]
    connection.execute(_INSERT[models.TrialValueModel], rows)


def write_rows(
    connection: sa.Connection,
    trial_id: int,
    table: Any,
    rows: Mapping[Any, dict[str, Any]],
    stored: Set[Any],
) -> None:
    """Insert what a trial has of one table by name or step, or update what is ``stored`` already."""
    name = _KEYS[table]
    fresh = [{"trial_id": trial_id, name: key, **row} for key, row in rows.items() if key not in stored]
    if fresh:
        connection.execute(_INSERT[table], fresh)
    for key in stored & set(rows):
        known = sa.update(table).where(table.trial_id == trial_id, getattr(table, name) == key)
        connection.execute(known.values(**rows[key]))


def names_of(trial: FrozenTrial) -> dict[Any, set[Any]]:
    """Return by table the names and steps of what a trial has."""
    return {
        models.TrialParamModel: set(trial.params),
        models.TrialIntermediateValueModel: set(trial.intermediate_values),
        models.TrialUserAttributeModel: set(trial.user_attrs),
        models.TrialSystemAttributeModel: set(trial.system_attrs),
    }


def utc(local: datetime.datetime) -> datetime.datetime:
    """Return a local time as Optuna's columns hold it."""
    return local.astimezone(datetime.timezone.utc).replace(tzinfo=None)
