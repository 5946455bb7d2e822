"""Several workers of a cell, one of which does something while another looks; played in one process."""

from __future__ import annotations

from typing import Any

import pytest
from cell_runs import CONFIGS, in_process, spec_of
from optuna.trial import TrialState, create_trial

from optuna_ohgw import cell_work, held, worker, workload
from optuna_ohgw.cell_study import ask, load_cell
from optuna_ohgw.cells import Ledger, cells_of, revive
from optuna_ohgw.claims import Claims
from optuna_ohgw.history import CONFIG_INDEX, INTERRUPTED, WORKER
from optuna_ohgw.opening import open_storage
from optuna_ohgw.storage import BatchedStorage

MANY = "execution={workers: 2, cells_at_once: 1, threads: 1, device: cpu}"


@pytest.fixture
def shared(tmp_path):
    """A cell for two workers, its storage, and two claims on it; the second is made when it is asked for."""
    spec = spec_of(tmp_path, "asha", MANY, "variations=[baseline]")
    with in_process(spec):
        storage = open_storage(spec.storage_url, create=False)
        first, second = Claims(storage, spec, "cpu"), Claims(storage, spec, "cpu")
        assert first.take()
        yield spec, storage, cells_of(spec)[0], first, second


def begin(storage, spec, cell, claims):
    """Begin a trial as a worker does; return its study and the trial."""
    assert claims.take()
    study = load_cell(BatchedStorage(storage, owner={WORKER: {"claim": claims.own.number}}), spec, cell)
    return study, ask(study, spec, Ledger(study, spec))


def ended(storage, spec, cell):
    trials = load_cell(storage, spec, cell).get_trials()
    whole = TrialState.COMPLETE, TrialState.PRUNED
    return sorted(t.user_attrs[CONFIG_INDEX] for t in trials if t.state in whole)


@pytest.mark.parametrize("moment", ["begun", "ended"])
def test_what_another_begins_or_ends_while_one_looks_is_not_revived(shared, monkeypatch, moment):
    spec, storage, cell, first, second = shared
    others = [begin(storage, spec, cell, second)] if moment == "ended" else []
    study = load_cell(BatchedStorage(storage), spec, cell)
    read = study.get_trials

    def meanwhile(*arguments: Any, **options: Any):
        monkeypatch.setattr(study, "get_trials", read)
        if moment == "begun":
            others.append(begin(storage, spec, cell, second))
            return read(*arguments, **options)
        found = read(*arguments, **options)
        others[0][0].tell(others[0][1].number, 0.5)
        second.release()
        return found

    monkeypatch.setattr(study, "get_trials", meanwhile)
    assert revive(study, first.alive()) == 0
    (trial,) = storage.get_all_trials(study._study_id)
    assert trial.state == (TrialState.RUNNING if moment == "begun" else TrialState.COMPLETE)


def test_a_waiting_trial_that_is_taken_meanwhile_is_seen(shared, monkeypatch):
    spec, storage, cell, *_ = shared
    study = load_cell(storage, spec, cell)
    study.add_trial(create_trial(state=TrialState.WAITING, user_attrs={CONFIG_INDEX: 0}))
    database = held.database()
    count = database.get_n_trials

    def meanwhile(*arguments: Any):
        found = count(*arguments)
        monkeypatch.setattr(database, "get_n_trials", count)
        study.ask()
        return found

    monkeypatch.setattr(database, "get_n_trials", meanwhile)
    assert not cell_work.is_searched(cell)


@pytest.mark.parametrize("state", [TrialState.PRUNED, TrialState.FAIL])
def test_a_cell_ends_with_what_its_last_worker_leaves(shared, monkeypatch, state):
    """One finds nothing. Then the other ends its trial, before it asks for the next, or is stopped in it."""
    spec, storage, cell, first, second = shared
    other, trial = begin(storage, spec, cell, second)
    honest, finished = worker.search, []

    def search(*_: Any):
        monkeypatch.setattr(worker, "search", honest)
        if state == TrialState.FAIL:
            trial.set_user_attr("reason", INTERRUPTED)
        other.tell(trial.number, state=state)
        if state == TrialState.FAIL:
            second.release()

    monkeypatch.setattr(worker, "search", search)
    monkeypatch.setattr(worker, "finish", lambda cell: bool(finished.append(cell)))
    worker._work_on(first, held.context())
    if state == TrialState.PRUNED:  # the other is still at work
        assert not finished
        worker._work_on(second, held.context())
    assert finished == [cell]
    assert ended(storage, spec, cell) == list(range(CONFIGS))


def test_a_worker_whose_trial_another_ended_goes_on(shared, monkeypatch):
    spec, storage, cell, first, _ = shared
    honest = workload.train_epoch

    def train_epoch(task, state, stop):
        monkeypatch.setattr(workload, "train_epoch", honest)
        assert revive(load_cell(storage, spec, cell)) == 1
        return honest(task, state, stop)

    monkeypatch.setattr(workload, "train_epoch", train_epoch)
    monkeypatch.setattr(worker, "finish", lambda _: True)
    worker._work_on(first, held.context())
    assert not first.errors()
    assert ended(storage, spec, cell) == list(range(CONFIGS))
