"""Storages of any size, filled with copies of real trials and cells."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from optuna.storages import RDBStorage
from optuna.storages._rdb import models

from optuna_ohgw.cells import Cell
from optuna_ohgw.history import RETRY_OF

_OF_STUDY: tuple[Any, ...] = (
    models.StudyDirectionModel,
    models.StudyUserAttributeModel,
    models.StudySystemAttributeModel,
)
_OF_TRIAL: tuple[Any, ...] = (
    models.TrialParamModel,
    models.TrialValueModel,
    models.TrialIntermediateValueModel,
    models.TrialUserAttributeModel,
    models.TrialSystemAttributeModel,
)
_TRIALS: Any = models.TrialModel.__table__
_STUDIES: Any = models.StudyModel.__table__


def newest(storage: RDBStorage) -> tuple[int, int]:
    """Return the highest ids of studies and of trials."""
    with storage.engine.begin() as connection:
        return _highest(connection, _STUDIES.c.study_id), _highest(connection, _TRIALS.c.trial_id)


def forget(storage: RDBStorage, study_id: int, trial_id: int) -> None:
    """Delete the studies and trials with higher ids than these, with all that belongs to them."""
    with storage.engine.begin() as connection:
        for model in (*_OF_TRIAL, models.TrialModel):
            column = model.__table__.c.trial_id
            connection.execute(sa.delete(model.__table__).where(column > trial_id))
        for model in (*_OF_STUDY, models.StudyModel):
            column = model.__table__.c.study_id
            connection.execute(sa.delete(model.__table__).where(column > study_id))


def fill_cell(storage: RDBStorage, study_id: int, size: int) -> None:
    """Copy a study's trials, over and over in their order, until it holds ``size`` of them.

    The copies count as retries of the first ones, so that the next trial's configuration does not
    depend on their number; and all values become 0, so that the pruner keeps whatever is better.
    """
    with storage.engine.begin() as connection:
        ids = sa.select(_TRIALS.c.trial_id).where(_TRIALS.c.study_id == study_id)
        count = len(connection.execute(ids).all())
        _set_to_zero(connection, ids)
        for first in range(count, size, count):
            _copy_trials(connection, study_id, study_id, first=first, count=min(count, size - first))
        attributes = models.TrialUserAttributeModel.__table__
        number = sa.cast(_TRIALS.c.number % count, sa.String)
        copies = ids.where(_TRIALS.c.number >= count).add_columns(sa.literal(RETRY_OF), number)
        connection.execute(sa.insert(attributes).from_select(["trial_id", "key", "value_json"], copies))


def fill_storage(storage: RDBStorage, study_id: int, cells: list[Cell]) -> None:
    """Copy a study and its trials once for each of the cells, under their names."""
    with storage.engine.begin() as connection:
        for cell in cells:
            row = sa.insert(_STUDIES).values(study_name=cell.name)
            copy = connection.execute(row).inserted_primary_key[0]  # type: ignore[index]
            for model in _OF_STUDY:
                table = model.__table__
                _copy(connection, table, table.c.study_id == study_id, study_id=sa.literal(copy))
            attributes: Any = models.StudyUserAttributeModel.__table__
            for key, text in (("seed", str(cell.seed)), ("variation", f'"{cell.variation}"')):
                own = sa.update(attributes).where(attributes.c.study_id == copy, attributes.c.key == key)
                connection.execute(own.values(value_json=text))
            _copy_trials(connection, study_id, copy)


def _copy_trials(
    connection: sa.Connection, source: int, target: int, *, first: int = 0, count: int | None = None
) -> None:
    """Copy a study's first trials, all unless a count is given, to numbers from ``first``."""
    wanted = _TRIALS.c.study_id == source
    if count is not None:
        wanted &= _TRIALS.c.number < count
    ids = sa.select(_TRIALS.c.trial_id).where(wanted)
    start = connection.execute(sa.select(sa.func.min(_TRIALS.c.trial_id)).where(wanted)).scalar_one()
    shift = _highest(connection, _TRIALS.c.trial_id) + 1 - start
    number, study = _TRIALS.c.number + first, sa.literal(target)
    _copy(connection, _TRIALS, wanted, trial_id=_TRIALS.c.trial_id + shift, number=number, study_id=study)
    for model in _OF_TRIAL:
        table = model.__table__
        _copy(connection, table, table.c.trial_id.in_(ids), trial_id=table.c.trial_id + shift)


def _copy(connection: sa.Connection, table: Any, wanted: Any, **changed: Any) -> None:
    """Insert rows of a table once more, with columns changed and a primary key of their own."""
    columns = [c for c in table.columns if c.name in changed or not c.primary_key]
    rows = sa.select(*(changed.get(c.name, c) for c in columns)).where(wanted)
    connection.execute(sa.insert(table).from_select([c.name for c in columns], rows))


def _set_to_zero(connection: sa.Connection, ids: Any) -> None:
    for model, column in (
        (models.TrialValueModel, "value"),
        (models.TrialIntermediateValueModel, "intermediate_value"),
    ):
        table: Any = model.__table__
        connection.execute(sa.update(table).where(table.c.trial_id.in_(ids)).values({column: 0.0}))
    rungs: Any = models.TrialSystemAttributeModel.__table__
    reached = sa.update(rungs).where(rungs.c.trial_id.in_(ids), rungs.c.key.startswith("completed_rung_"))
    connection.execute(reached.values(value_json="0.0"))


def _highest(connection: sa.Connection, column: Any) -> int:
    return int(connection.execute(sa.select(sa.func.coalesce(sa.func.max(column), 0))).scalar_one())
