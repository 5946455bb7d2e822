"""All cells read at once. Oracle: what Optuna's own storage reads of the same trials."""

from __future__ import annotations

import math

import pytest
import sqlalchemy as sa
from optuna.storages import RDBStorage
from optuna.storages._cached_storage import _CachedStorage
from optuna.trial import TrialState, create_trial
from planted import grown_storage, planted_spec

from optuna_ohgw.cell_trials import read_cells
from optuna_ohgw.cells import Ledger, cells_of
from optuna_ohgw.history import CHECKPOINT, DECISION, DROPPED, checkpoint_bytes, paused_at, superseded

BUDGETS = ({"trials": 8}, {"epochs": 50}, {"mbu": 900.0}, {"device_hours": 0.01}, {"wall_hours": 0.01})
MADE = {"epoch": 1, "wall": 0.0, "artifact": "a", "bytes": 7, "previous": None}


def planted_on(storage, **budget):
    spec = planted_spec(seeds=(0, 1), budget=budget)
    grown_storage(spec, storage, trials=3)
    study_id = storage.get_study_id_from_name(cells_of(spec)[1].name)
    odd = {2: math.nan, 3: math.inf, 5: -math.inf}
    attributes = {
        "reason": "interrupted",
        "lost_s": 1.5,
        "retry_of": 2,
        CHECKPOINT: MADE,
        "worker": {"claim": 4},
    }
    system = {f"{DECISION}5": {"action": "pause"}, DROPPED: [1], "other": 1}
    for state in (TrialState.FAIL, TrialState.PRUNED, TrialState.RUNNING):
        trial = create_trial(state=state, intermediate_values=odd, user_attrs=attributes, system_attrs=system)
        storage.create_new_trial(study_id, trial)
    storage.create_new_trial(study_id, create_trial(state=TrialState.WAITING, user_attrs={"resumed_from": 7}))
    storage.delete_study(storage.get_study_id_from_name(cells_of(spec)[3].name))
    return spec


@pytest.fixture(scope="module", params=BUDGETS, ids=lambda budget: next(iter(budget)))
def both(request, tmp_path_factory):
    """A database, and a storage of another kind that holds the same."""
    database = RDBStorage(f"sqlite:///{tmp_path_factory.mktemp('cells')}/study.db")
    yield planted_on(database, **request.param), database, _CachedStorage(database)
    database.engine.dispose()


def test_what_tells_how_far_a_cell_is_agrees_with_optunas_reading(both):
    spec, database, _ = both
    found = read_cells(database, spec)
    there = {s.study_name: s for s in database.get_all_studies()}
    assert set(found) == {c.name for c in cells_of(spec)[:3]} == set(there)
    for name, cell in found.items():
        trials = database.get_all_trials(there[name]._study_id)
        assert cell.final == there[name].user_attrs.get("final")
        assert superseded(cell.get_trials()) == superseded(trials)
        for own, trial in zip(cell.get_trials(), trials, strict=True):
            for field in ("number", "_trial_id", "state", "datetime_start", "datetime_complete", "last_step"):
                assert getattr(own, field) == getattr(trial, field)
            assert own.user_attrs.items() <= trial.user_attrs.items()
            assert all(
                own.user_attrs.get(k) == trial.user_attrs.get(k) for k in ("reason", "worker", "lost_s")
            )
            assert paused_at(own, 5) == paused_at(trial, 5)
            assert repr(own.intermediate_values) == repr(trial.intermediate_values)


def test_databases_and_other_storages_give_the_same_cells(both):
    spec, database, other = both
    for one, two in zip(read_cells(database, spec).values(), read_cells(other, spec).values(), strict=True):
        shares = [Ledger(cell, spec).share_done() for cell in (one, two)]
        assert shares[0] == pytest.approx(shares[1], rel=1e-4)  # a running trial's time goes on
        assert checkpoint_bytes(one) == checkpoint_bytes(two)
        assert len(one.get_trials(states=(TrialState.PRUNED,))) == len(
            two.get_trials(states=(TrialState.PRUNED,))
        )


def test_a_database_that_is_locked_for_a_moment_is_waited_for(both, monkeypatch):
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda _: None)
    spec, database, _ = both
    expected, left = {name: len(cell.trials) for name, cell in read_cells(database, spec).items()}, [3]

    def fail(*event):
        left[0] -= 1
        if left[0] == 0:
            raise sa.exc.OperationalError("", {}, Exception("database is locked"))

    sa.event.listen(database.engine, "before_cursor_execute", fail)
    assert {name: len(cell.trials) for name, cell in read_cells(database, spec).items()} == expected
    assert left[0] < 0


@pytest.mark.parametrize("seeds", [1, 5])
def test_the_number_of_statements_does_not_grow_with_the_cells(tmp_path, seeds):
    database = RDBStorage(f"sqlite:///{tmp_path}/study.db")
    spec = planted_spec(seeds=range(seeds))
    grown_storage(spec, database, trials=2)
    told = []
    sa.event.listen(database.engine, "before_cursor_execute", lambda *event: told.append(event[2]))
    assert len(read_cells(database, spec)) == 2 * seeds
    assert len(told) == 5
    database.engine.dispose()


def test_a_name_that_begins_like_another_is_told_apart(tmp_path):
    database = RDBStorage(f"sqlite:///{tmp_path}/study.db")
    names = ("a_b", "axb", "a_b2")
    for name in names:
        grown_storage(planted_spec(name=name, seeds=(0,)), database, trials=1)
    for name in names:
        spec = planted_spec(name=name, seeds=(0,))
        assert set(read_cells(database, spec)) == {c.name for c in cells_of(spec)}
    database.engine.dispose()
