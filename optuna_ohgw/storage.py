"""Writing trials in few transactions: what only their own process needs waits for company."""

from __future__ import annotations

import copy
import datetime
import json
import math
import time
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from optuna.distributions import (
    BaseDistribution,
    check_distribution_compatibility,
    distribution_to_json,
)
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.storages._cached_storage import _CachedStorage, _StudyInfo
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState, create_trial

from optuna_ohgw.history import CHECKPOINT
from optuna_ohgw.outages import is_outage
from optuna_ohgw.patience import Patience
from optuna_ohgw.trial_rows import (
    fresh_trial,
    insert_running,
    insert_values,
    names_of,
    update_running,
    utc,
    write_rows,
)

_SECONDS = 5.0


@dataclass
class _Own:
    """A running trial of this process: as it is here, and what the database does not have yet.

    ``pending`` holds, by table and by name or step, the columns to write; ``stored`` the names and
    steps that the database has.
    """

    trial: FrozenTrial
    stored: dict[Any, set[Any]]
    flushed: float
    pending: dict[Any, dict[Any, dict[str, Any]]] = field(default_factory=dict)

    def snapshot(self) -> FrozenTrial:
        """Return a copy that later writes do not change."""
        trial = copy.copy(self.trial)
        for name in ("params", "distributions", "user_attrs", "system_attrs", "intermediate_values"):
            setattr(trial, name, dict(getattr(trial, name)))
        return trial


class BatchedStorage(_CachedStorage):
    """An Optuna storage that writes a running trial's news together.

    Parameters, reports and user attributes of a trial that this process runs are kept in memory
    and written in one transaction: with its end, with a checkpoint, with a system attribute (by
    which the pruners of other processes decide), or 5 s after the last time. The process that runs
    a trial sees its writes at once; another sees them late, and a killed process loses up to 5 s of
    a trial that has to be trained again anyway. This is within what Optuna's own cached storage
    promises.

    For one thread. Cost of a trial of a sole process: one transaction to make it and one to end it,
    instead of some 25 and one an epoch; else one more for each system attribute.

    Args:
        backend: The database.
        sole: Whether no other process runs trials of the studies used here. They are then read
            every 5 s (a trial that a user queued, say); nor is a system attribute written at once.
        owner: User attributes of every trial that runs here, written in the transaction that makes or
            takes it, so that no running trial is ever without.
        patience: How long writes wait for a database that does not answer; None: not at all.
    """

    def __init__(
        self,
        backend: RDBStorage,
        *,
        sole: bool = False,
        owner: Mapping[str, Any] | None = None,
        patience: Patience | None = None,
    ) -> None:
        super().__init__(backend)
        self._sole, self._owner = sole, dict(owner or {})
        self._call = Patience.once if patience is None else patience.call
        self._patient = patience is not None
        self._read: dict[int, float] = {}
        self._own: dict[int, _Own] = {}

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """Make a trial; one that runs is this process's own."""
        # A patient backend marks what it makes; alone, a trial is known without.
        marked = self._patient and not self._sole
        if template_trial is None and (self._owner or marked):
            template_trial = create_trial(state=TrialState.RUNNING, user_attrs=self._owner)
        trial = None if template_trial is not None else self._insert_once(study_id)
        if trial is not None:
            with self._lock:
                self._studies.setdefault(study_id, _StudyInfo())
                self._add_trials_to_cache(study_id, [trial])
        else:
            trial_id = super().create_new_trial(study_id, template_trial)
            number = self._trial_id_to_study_id_and_number[trial_id][1]
            trial = self._studies[study_id].trials[number]
        if trial.state == TrialState.RUNNING:
            self._adopt(trial)
        return trial._trial_id

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        """Set the state, and write all that waits before it, in the same transaction.

        Of processes that take the same waiting trial one gets it, on SQLite too, where Optuna's own
        storage may give it to several.
        """
        own = self._own.get(trial_id)
        if state == TrialState.RUNNING:
            taken = self._call(lambda: self._take(trial_id), lambda: self._take_again(trial_id))
            if taken:
                self._adopt(self._backend.get_trial(trial_id))
            self._read.clear()
            return taken
        if own is None:
            self._read.clear()
            return super().set_trial_state_values(trial_id, state, values)
        now = datetime.datetime.now()
        self._write(own, {"state": state, "datetime_complete": utc(now)}, values)
        del self._own[trial_id]
        own.trial.state, own.trial.datetime_complete = state, now
        own.trial.values = None if values is None else list(values)
        if self._sole:
            study_id, number = self._trial_id_to_study_id_and_number[trial_id]
            study = self._studies[study_id]
            study.trials[number] = own.trial
            study.unfinished_trial_ids.discard(trial_id)
        return True

    def set_trial_param(
        self,
        trial_id: int,
        param_name: str,
        param_value_internal: float,
        distribution: BaseDistribution,
    ) -> None:
        """Keep a parameter; checked against those of the study's other trials."""
        own = self._own.get(trial_id)
        if own is None:
            super().set_trial_param(trial_id, param_name, param_value_internal, distribution)
            return
        study = self._studies[self._trial_id_to_study_id_and_number[trial_id][0]]
        if param_name not in study.param_distribution:
            known = (t.distributions.get(param_name) for t in study.trials.values())
            study.param_distribution[param_name] = next((d for d in known if d), distribution)
        check_distribution_compatibility(study.param_distribution[param_name], distribution)
        if param_name in own.trial.params:
            return
        own.trial.params[param_name] = distribution.to_external_repr(param_value_internal)
        own.trial.distributions[param_name] = distribution
        row = {"param_value": param_value_internal, "distribution_json": distribution_to_json(distribution)}
        self._keep(own, models.TrialParamModel, param_name, row)

    def set_trial_intermediate_value(self, trial_id: int, step: int, intermediate_value: float) -> None:
        """Keep a report."""
        own = self._own.get(trial_id)
        if own is None:
            super().set_trial_intermediate_value(trial_id, step, intermediate_value)
            return
        own.trial.intermediate_values[step] = intermediate_value
        table = models.TrialIntermediateValueModel
        value, kind = table.intermediate_value_to_stored_repr(intermediate_value)
        self._keep(own, table, step, {"intermediate_value": value, "intermediate_value_type": kind})

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Keep an attribute."""
        own = self._own.get(trial_id)
        if own is None:
            super().set_trial_user_attr(trial_id, key, value)
            return
        text = json.dumps(value)
        own.trial.user_attrs[key] = json.loads(text)
        # A checkpoint that nobody knows of is none.
        self._keep(own, models.TrialUserAttributeModel, key, {"value_json": text}, now=key == CHECKPOINT)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Keep an attribute, or write it and all that waits, where others may decide by it."""
        own = self._own.get(trial_id)
        if own is None:
            super().set_trial_system_attr(trial_id, key, value)
            return
        text = json.dumps(value)
        own.trial.system_attrs[key] = json.loads(text)
        self._keep(own, models.TrialSystemAttributeModel, key, {"value_json": text}, now=not self._sole)

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """Return a trial; this process's own with all its writes."""
        own = self._own.get(trial_id)
        return own.snapshot() if own is not None else super().get_trial(trial_id)

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """Return the trials of a study by number; this process's own with all their writes."""
        trials = super().get_all_trials(study_id, deepcopy=False, states=states)
        if self._own:
            trials = [self._own[t._trial_id].snapshot() if t._trial_id in self._own else t for t in trials]
        return copy.deepcopy(trials) if deepcopy else trials

    def flush(self) -> None:
        """Write all that waits."""
        for own in list(self._own.values()):
            if own.pending:
                self._write(own, {}, None)

    def _read_trials_from_remote_storage(self, study_id: int) -> None:
        now = time.monotonic()
        if not self._sole or now - self._read.get(study_id, -math.inf) > _SECONDS:
            super()._read_trials_from_remote_storage(study_id)
            self._read[study_id] = now

    def _insert_once(self, study_id: int) -> FrozenTrial | None:
        now = datetime.datetime.now()
        return self._call(
            lambda: self._insert(study_id, now),
            lambda: self._inserted(study_id, now) or self._insert(study_id, now),
        )

    def _inserted(self, study_id: int, now: datetime.datetime) -> FrozenTrial | None:
        """Return the trial that a first try made, whose answer was lost, if it did.

        No other process runs trials: one that is not known here was made by it. MySQL keeps whole seconds.
        """
        model, second = models.TrialModel, datetime.timedelta(seconds=1)
        column = sa.inspect(model).local_table.c.datetime_start
        started = column.between(utc(now) - second, utc(now) + second)
        mine = model.study_id == study_id, model.state == TrialState.RUNNING, started
        with self._backend.engine.connect() as connection:
            rows = connection.execute(sa.select(model.trial_id, model.number).where(*mine)).all()
        fresh = (row for row in rows if row.trial_id not in self._trial_id_to_study_id_and_number)
        return next((fresh_trial(row.trial_id, row.number, now) for row in fresh), None)

    def _insert(self, study_id: int, now: datetime.datetime) -> FrozenTrial | None:
        """Make a running trial; None where the database refuses: Optuna's way tries again, or says why."""
        try:
            with self._backend.engine.begin() as connection:
                return insert_running(connection, study_id, now)
        except sa.exc.SQLAlchemyError as error:
            if self._patient and is_outage(error):
                raise
            return None

    def _take(self, trial_id: int) -> bool:
        model = models.TrialModel
        waiting = sa.update(model).where(model.trial_id == trial_id, model.state == TrialState.WAITING)
        running = {"state": TrialState.RUNNING, "datetime_start": utc(datetime.datetime.now())}
        try:
            with self._backend.engine.begin() as connection:
                taken = bool(connection.execute(waiting.values(**running)).rowcount)
                if taken and self._owner:
                    self._write_owner(connection, trial_id)
                return taken
        except sa.exc.SQLAlchemyError as error:
            raise StorageInternalError(f"trial id {trial_id} could not be taken: {error}") from error

    def _take_again(self, trial_id: int) -> bool:
        """Take a waiting trial unless the first try did."""
        trial = self._backend.get_trial(trial_id)
        mine = self._sole or (bool(self._owner) and self._owner.items() <= trial.user_attrs.items())
        return (trial.state == TrialState.RUNNING and mine) or self._take(trial_id)

    def _write_owner(self, connection: sa.Connection, trial_id: int) -> None:
        table = models.TrialUserAttributeModel
        own = table.trial_id == trial_id, table.key.in_(self._owner)
        connection.execute(sa.delete(table).where(*own))
        rows = [{"trial_id": trial_id, "key": k, "value_json": json.dumps(v)} for k, v in self._owner.items()]
        connection.execute(sa.insert(table), rows)

    def _adopt(self, trial: FrozenTrial) -> None:
        # A copy: the cache's object is handed out, this one is written to.
        own = copy.deepcopy(trial)
        self._own[trial._trial_id] = _Own(own, names_of(own), time.monotonic())

    def _keep(self, own: _Own, table: Any, name: Any, row: dict[str, Any], *, now: bool = False) -> None:
        own.pending.setdefault(table, {})[name] = row
        if now or time.monotonic() - own.flushed > _SECONDS:
            self._write(own, {}, None)

    def _write(self, own: _Own, ending: dict[str, Any], values: Sequence[float] | None) -> None:
        """Write what waits, the new state and the values in one transaction, once."""
        self._call(
            lambda: self._write_now(own, ending, values), lambda: self._write_again(own, ending, values)
        )
        for table, rows in own.pending.items():
            own.stored[table] |= set(rows)
        own.pending, own.flushed = {}, time.monotonic()

    def _write_again(self, own: _Own, ending: dict[str, Any], values: Sequence[float] | None) -> None:
        """Write unless the first try did, whose answer was lost."""
        there = self._backend.get_trial(own.trial._trial_id)
        if there.state.is_finished() and there.state == ending.get("state"):
            return
        for table, names in names_of(there).items():
            own.stored[table] |= names
        self._write_now(own, ending, values)

    def _write_now(self, own: _Own, ending: dict[str, Any], values: Sequence[float] | None) -> None:
        trial_id = own.trial._trial_id
        try:
            with self._backend.engine.begin() as connection:
                # Also the check that the trial is not over, and its lock: one statement for both.
                if not update_running(connection, trial_id, ending):
                    self._own.pop(trial_id, None)  # another process ended it
                    raise UpdateFinishedTrialError(
                        f"Trial#{own.trial.number} has already finished and can not be updated."
                    )
                for table, rows in own.pending.items():
                    write_rows(connection, trial_id, table, rows, own.stored[table])
                if values is not None:
                    insert_values(connection, trial_id, values)
        except sa.exc.SQLAlchemyError as error:
            raise StorageInternalError(f"trial {own.trial.number} could not be written: {error}") from error
