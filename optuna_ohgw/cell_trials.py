"""All cells of a study read at once, as far as it takes to tell how far they are."""

from __future__ import annotations

import datetime
import json
from collections import defaultdict
from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState

from optuna_ohgw.cells import cells_of
from optuna_ohgw.history import (
    CHECKPOINT,
    CURVE,
    DECISION,
    DROPPED,
    FINAL,
    LOST,
    RECORD,
    RESUMED_FROM,
    RETRY_OF,
    SURPLUS,
    WORKER,
)
from optuna_ohgw.opening import shown_url
from optuna_ohgw.patience import Patience
from optuna_ohgw.spec import StudySpec

_KEYS = ("reason", CHECKPOINT, LOST, RESUMED_FROM, RETRY_OF, SURPLUS, WORKER)
_PATIENCE_S = 10.0


@dataclass(frozen=True)
class CellTrials:
    """What was read of a cell: its result, if it is at its end, and its trials by number.

    Of a database a trial has its state, times and reports, and of its attributes those by which a
    :class:`~optuna_ohgw.cells.Ledger` counts; no parameters and no values.
    """

    final: dict[str, Any] | None
    trials: list[FrozenTrial]

    def get_trials(
        self,
        deepcopy: bool = False,
        states: Container[TrialState] | None = None,
    ) -> list[FrozenTrial]:
        """Return the trials, which are not to be changed."""
        return self.trials if states is None else [t for t in self.trials if t.state in states]


def read_cells(storage: BaseStorage, spec: StudySpec) -> dict[str, CellTrials]:
    """Return the cells that are there by the names of their Optuna studies, in the order of the spec.

    Cost: five statements to a database, whatever the number of cells; a call for each to Optuna's proxy.

    Raises:
        StorageLost: If a database does not answer for ten seconds.
    """
    if isinstance(storage, RDBStorage):
        patience = Patience(_PATIENCE_S, shown_url(spec.storage_url))
        found = patience.call(lambda: _read(storage, spec))
    else:
        wanted = {cell.name for cell in cells_of(spec)}
        found = {
            study.study_name: CellTrials(
                study.user_attrs.get(FINAL), storage.get_all_trials(study._study_id, deepcopy=False)
            )
            for study in storage.get_all_studies()
            if study.study_name in wanted
        }
    return {cell.name: found[cell.name] for cell in cells_of(spec) if cell.name in found}


def _read(storage: RDBStorage, spec: StudySpec) -> dict[str, CellTrials]:
    """Read trials before what belongs to them, so that no trial lacks what it had when it was read."""
    prefix = models.StudyModel.study_name.startswith(f"{spec.name}/", autoescape=True)
    studies = sa.select(models.StudyModel.study_id).where(prefix)
    trials = sa.select(models.TrialModel.trial_id).where(models.TrialModel.study_id.in_(studies))
    study, end = models.StudyModel, models.StudyUserAttributeModel
    own_end = (end.study_id == study.study_id) & (end.key == FINAL)
    named = sa.select(study.study_id, study.study_name, end.value_json).outerjoin(end, own_end).where(prefix)
    with storage.engine.connect() as connection:
        cells = connection.execute(named).all()
        known, by_study = {}, defaultdict[int, list[FrozenTrial]](list)
        for study_id, trial in _bare(connection, studies):
            known[trial._trial_id] = trial
            by_study[study_id].append(trial)
        _add_reports(connection, trials, known)
        _add_attributes(connection, trials, known, _needed(spec))
    return {
        name: CellTrials(None if final is None else json.loads(final), by_study[study_id])
        for study_id, name, final in cells
    }


def _needed(spec: StudySpec) -> tuple[str, ...]:
    if spec.budget.mbu:
        return (*_KEYS, CURVE, RECORD, "batches_per_epoch")
    return (*_KEYS, CURVE) if spec.budget.device_hours or spec.epochs_in_all else _KEYS


def _bare(connection: sa.Connection, studies: sa.Select[Any]) -> Iterable[tuple[int, FrozenTrial]]:
    table: Any = models.TrialModel.__table__
    names = ("study_id", "trial_id", "number", "state", "datetime_start", "datetime_complete")
    rows = sa.select(*(table.c[name] for name in names)).where(table.c.study_id.in_(studies))
    for study_id, trial_id, number, state, start, end in connection.execute(rows.order_by(table.c.number)):
        times = _local(start), _local(end)
        yield study_id, FrozenTrial(number, state, None, *times, {}, {}, {}, {}, {}, trial_id)


def _add_reports(connection: sa.Connection, trials: sa.Select[Any], known: dict[int, FrozenTrial]) -> None:
    table = models.TrialIntermediateValueModel
    kinds, finite = table.TrialIntermediateValueType, table.TrialIntermediateValueType.FINITE.name
    # As text: to make an enumeration's member of it takes longer than to read the row.
    kind_text = sa.type_coerce(table.intermediate_value_type, sa.String)
    rows = sa.select(table.trial_id, table.step, table.intermediate_value, kind_text)
    for trial_id, step, value, kind in connection.execute(rows.where(table.trial_id.in_(trials))).all():
        if kind != finite:
            value = table.stored_repr_to_intermediate_value(value, kinds[kind])  # noqa: PLW2901
        if trial_id in known:
            known[trial_id].intermediate_values[step] = value


def _add_attributes(
    connection: sa.Connection, trials: sa.Select[Any], known: dict[int, FrozenTrial], keys: Iterable[str]
) -> None:
    user: Any = models.TrialUserAttributeModel
    system: Any = models.TrialSystemAttributeModel
    decided = system.key.startswith(DECISION) | (system.key == DROPPED)
    for table, wanted, where in ((user, user.key.in_(keys), "user_attrs"), (system, decided, "system_attrs")):
        rows = sa.select(table.trial_id, table.key, table.value_json)
        for trial_id, key, text in connection.execute(rows.where(wanted, table.trial_id.in_(trials))):
            if trial_id in known:
                getattr(known[trial_id], where)[key] = json.loads(text)


def _local(utc: datetime.datetime | None) -> datetime.datetime | None:
    """Return a time of Optuna's columns as its trials have it."""
    return (
        None if utc is None else utc.replace(tzinfo=datetime.timezone.utc).astimezone().replace(tzinfo=None)
    )
