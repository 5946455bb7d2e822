"""The oracle is Optuna's own storage after the same operations."""

from __future__ import annotations

import datetime
import math
import random
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.pruners import SuccessiveHalvingPruner
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import FrozenTrial, TrialState

from optuna_ohgw import storage as module
from optuna_ohgw.storage import BatchedStorage

NAME = "study"


def url(folder: Path, name: str = "study") -> str:
    return f"sqlite:///{folder / name}.db"


def batched(folder: Path, *, sole: bool) -> BatchedStorage:
    return BatchedStorage(RDBStorage(url(folder)), sole=sole)


def study_on(storage: BaseStorage, pruner: Any = None) -> optuna.Study:
    sampler = optuna.samplers.RandomSampler(seed=0)
    return optuna.create_study(
        storage=storage, study_name=NAME, sampler=sampler, pruner=pruner, load_if_exists=True
    )


def stored(folder: Path, name: str = "study") -> list[FrozenTrial]:
    """Return the trials as a process sees them that opens the database now."""
    return optuna.load_study(study_name=NAME, storage=RDBStorage(url(folder, name))).get_trials()


def view(trials: list[FrozenTrial]) -> list[Any]:
    """Return what two storages must agree on; not a number is text, to be equal to itself."""
    return [
        (
            t.number,
            t.state,
            str(t.values),
            t.params,
            t.distributions,
            {step: str(value) for step, value in t.intermediate_values.items()},
            t.user_attrs,
            t.system_attrs,
            t.datetime_complete is None,
        )
        for t in trials
    ]


def operate(study: optuna.Study, seed: int) -> list[Any]:
    """Run trials with random operations; return what the study showed on the way."""
    draws, seen, storage = random.Random(seed), [], study._storage
    study.enqueue_trial({"x": 0.25}, user_attrs={"queued": 1})
    for _ in range(12):
        trial = study.ask()
        identifier = trial._trial_id
        for _ in range(draws.randrange(25)):
            key, step = f"k{draws.randrange(4)}", draws.randrange(6)
            match draws.randrange(8):
                case 0:
                    trial.suggest_float("x", 0.0, 1.0)
                case 1:
                    trial.suggest_int("n", 1, 9, log=True)
                case 2:
                    trial.suggest_categorical("c", ["a", None, 2.5])
                case 3:
                    value = draws.choice([0.5, 1e300, math.inf, -math.inf, math.nan])
                    storage.set_trial_intermediate_value(identifier, step, value)
                case 4:
                    trial.set_user_attr(key, {"v": [draws.random(), None]})
                case 5:
                    storage.set_trial_system_attr(identifier, key, draws.random())
                case 6:
                    seen.append(view(study.get_trials()))
                case 7:
                    seen.append(view([storage.get_trial(identifier)]))
        state = draws.choice([TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL])
        study.tell(trial.number, draws.random() if state == TrialState.COMPLETE else None, state)
        if state == TrialState.COMPLETE:
            seen.append(study.best_value)
    study.ask().suggest_float("x", 0.0, 1.0)  # is left running
    seen.append(view(study.get_trials()))
    return seen


@pytest.mark.parametrize("sole", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_shows_and_stores_what_optunas_own_does(tmp_path: Path, sole: bool, seed: int) -> None:
    plain = operate(study_on(RDBStorage(url(tmp_path, "plain"))), seed)
    storage = batched(tmp_path, sole=sole)
    assert operate(study_on(storage), seed) == plain
    storage.flush()
    assert view(stored(tmp_path)) == view(stored(tmp_path, "plain"))
    before = view(stored(tmp_path))
    storage.flush()
    assert view(stored(tmp_path)) == before


def commits(storage: BatchedStorage) -> list[Any]:
    """Return a list that grows with each transaction that writes."""
    engine, written, seen = storage._backend.engine, set(), []

    @sa.event.listens_for(engine, "before_cursor_execute")
    def note(connection: Any, cursor: Any, statement: str, *others: Any) -> None:
        if statement.startswith(("INSERT", "UPDATE")):
            written.add(connection)

    @sa.event.listens_for(engine, "commit")
    def count(connection: Any) -> None:
        if connection in written:
            written.remove(connection)
            seen.append(connection)

    return seen


@pytest.mark.parametrize(("sole", "expected"), [(True, 2), (False, 5)])
def test_a_trial_takes_two_transactions_and_one_a_rung_if_others_decide_by_it(
    tmp_path: Path, sole: bool, expected: int
) -> None:
    storage = batched(tmp_path, sole=sole)
    study = study_on(storage, SuccessiveHalvingPruner(min_resource=1, reduction_factor=2, bootstrap_count=0))
    seen = commits(storage)
    for _ in range(2):
        study.get_trials()
        before = len(seen)
        trial = study.ask()
        trial.suggest_float("x", 0.0, 1.0)
        for step in range(1, 8):
            trial.report(0.5, step)
            trial.set_user_attr("curve", [0.5] * step)
            assert not trial.should_prune()
        study.tell(trial, 0.5)
        assert len(seen) - before == expected


def test_another_process_sees_a_rung_and_all_before_it(tmp_path: Path) -> None:
    storage = batched(tmp_path, sole=False)
    pruner = SuccessiveHalvingPruner(min_resource=2, reduction_factor=2, bootstrap_count=0)
    study = study_on(storage, pruner)
    other = study_on(batched(tmp_path, sole=False), pruner)
    trial = study.ask()
    trial.set_user_attr("note", "early")
    trial.report(0.5, 1)
    trial.should_prune()
    assert other.trials[0].intermediate_values == {}
    trial.report(0.6, 2)
    trial.should_prune()
    (seen,) = other.trials
    assert seen.intermediate_values == {1: 0.5, 2: 0.6}
    assert seen.user_attrs == {"note": "early"}
    assert "completed_rung_0" in seen.system_attrs


def test_what_waits_is_written_after_five_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: clock)
    trial = study_on(batched(tmp_path, sole=True)).ask()
    trial.report(0.5, 1)
    assert stored(tmp_path)[0].intermediate_values == {}
    clock += 5.1
    trial.report(0.6, 2)
    assert stored(tmp_path)[0].intermediate_values == {1: 0.5, 2: 0.6}
    trial.report(0.7, 3)
    assert 3 not in stored(tmp_path)[0].intermediate_values


def test_alone_a_study_is_read_again_after_five_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: clock)
    study = study_on(batched(tmp_path, sole=True))
    study.ask()
    assert len(study.trials) == 1
    study_on(RDBStorage(url(tmp_path))).enqueue_trial({"x": 0.5})
    assert len(study.trials) == 1
    clock += 5.1
    assert [t.state for t in study.trials] == [TrialState.RUNNING, TrialState.WAITING]


def test_a_trial_that_ended_takes_no_more(tmp_path: Path) -> None:
    study = study_on(batched(tmp_path, sole=True))
    trial = study.ask()
    study.tell(trial, 0.5)
    for write in (
        lambda: trial.report(0.1, 9),
        lambda: trial.set_user_attr("k", 1),
        lambda: trial.storage.set_trial_param(trial._trial_id, "x", 0.1, FloatDistribution(0, 1)),
        lambda: trial.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL),
    ):
        with pytest.raises(UpdateFinishedTrialError):
            write()
    assert stored(tmp_path)[0].user_attrs == {}


def test_a_trial_that_another_process_ended_keeps_its_end(tmp_path: Path) -> None:
    study = study_on(batched(tmp_path, sole=False))
    trial = study.ask()
    trial.report(0.5, 1)
    study_on(RDBStorage(url(tmp_path))).tell(0, state=TrialState.FAIL)
    storage = study._storage
    with pytest.raises(UpdateFinishedTrialError):
        study.tell(trial, 0.7)
    assert storage.get_trial(trial._trial_id).state == TrialState.FAIL  # as it is, not as it ran here
    storage.flush()  # nothing of it waits
    (kept,) = stored(tmp_path)
    assert (kept.state, kept.values, kept.intermediate_values) == (TrialState.FAIL, None, {})


def test_a_parameter_keeps_its_first_value_and_its_kind(tmp_path: Path) -> None:
    study = study_on(batched(tmp_path, sole=True))
    first = study.ask()
    x = first.suggest_float("x", 0.0, 1.0)
    c = first.suggest_categorical("c", ["a", "b"])
    identifier, storage = first._trial_id, study._storage
    storage.set_trial_param(identifier, "x", 0.123, FloatDistribution(0.0, 1.0))
    assert storage.get_trial(identifier).params == {"x": x, "c": c}
    second = study.ask()
    with pytest.raises(ValueError, match="distribution kind"):
        storage.set_trial_param(second._trial_id, "x", 1, IntDistribution(0, 1))
    with pytest.raises(ValueError, match="dynamic value space"):
        storage.set_trial_param(second._trial_id, "c", 0, CategoricalDistribution(["a"]))
    assert storage.get_trial(second._trial_id).params == {}


def test_a_kind_that_another_process_gave_is_known(tmp_path: Path) -> None:
    study_on(RDBStorage(url(tmp_path))).ask().suggest_int("x", 0, 1)
    storage = batched(tmp_path, sole=False)
    trial = study_on(storage).ask()
    study_on(storage).get_trials()
    with pytest.raises(ValueError, match="distribution kind"):
        storage.set_trial_param(trial._trial_id, "x", 0.5, FloatDistribution(0, 1))


def test_a_queued_trial_is_taken_by_one(tmp_path: Path) -> None:
    one, two = (study_on(batched(tmp_path, sole=False)) for _ in range(2))
    one.enqueue_trial({"x": 0.25}, user_attrs={"why": "asked"})
    first, second = one.ask(), two.ask()
    assert (first.number, second.number) == (0, 1)
    assert first.suggest_float("x", 0.0, 1.0) == 0.25
    one.tell(first, 1.0)
    two.tell(second, 2.0)
    kept = stored(tmp_path)
    assert kept[0].params == {"x": 0.25}
    assert kept[0].user_attrs == {"why": "asked"}
    assert kept[0].system_attrs["fixed_params"] == {"x": 0.25}


def test_a_process_that_is_gone_loses_what_waited_alone(tmp_path: Path) -> None:
    study = study_on(batched(tmp_path, sole=True))
    done = study.ask()
    done.report(0.5, 1)
    study.tell(done, 0.5)
    lost = study.ask()
    lost.report(0.5, 1)
    del study, lost
    first, second = stored(tmp_path)
    assert first.state == TrialState.COMPLETE
    assert (second.state, second.intermediate_values) == (TrialState.RUNNING, {})


def test_what_was_shown_does_not_change_nor_does_changing_it(tmp_path: Path) -> None:
    study = study_on(batched(tmp_path, sole=True))
    trial = study.ask()
    trial.report(0.5, 1)
    shown = [study._storage.get_trial(trial._trial_id), study.get_trials(deepcopy=False)[0], study.trials[0]]
    trial.report(0.6, 2)
    trial.set_user_attr("k", 1)
    for frozen in shown:
        assert frozen.intermediate_values == {1: 0.5}
        frozen.intermediate_values[9] = 0.0
        frozen.user_attrs["other"] = 1
    assert study.trials[0].intermediate_values == {1: 0.5, 2: 0.6}
    assert study.trials[0].user_attrs == {"k": 1}


def test_what_could_not_be_written_waits_for_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = batched(tmp_path, sole=True)
    study = study_on(storage)
    trial = study.ask()
    trial.report(0.5, 1)
    trial.set_user_attr("k", 1)
    write_rows = module.write_rows

    def fail_halfway(*arguments: Any) -> None:
        write_rows(*arguments)
        raise sa.exc.OperationalError("insert", {}, Exception("disk full"))

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_rows", fail_halfway)
        with pytest.raises(StorageInternalError, match=r"trial 0 could not be written.*disk full"):
            study.tell(trial, 0.5)
    assert stored(tmp_path)[0].intermediate_values == {}
    assert stored(tmp_path)[0].state == TrialState.RUNNING
    study.tell(trial, 0.5)
    (kept,) = stored(tmp_path)
    assert (kept.state, kept.value, kept.intermediate_values, kept.user_attrs) == (
        TrialState.COMPLETE,
        0.5,
        {1: 0.5},
        {"k": 1},
    )


def test_a_new_trial_that_the_database_refuses_at_first_is_made_by_optuna(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_on(batched(tmp_path, sole=True))
    study.ask()
    with monkeypatch.context() as broken:
        broken.setattr("optuna_ohgw.trial_rows._NUMBER", sa.text("UPDATE nowhere SET number = :number"))
        assert study.ask().number == 1
    assert study.ask().number == 2
    assert [t.number for t in stored(tmp_path)] == [0, 1, 2]
    with pytest.raises(KeyError):
        study._storage.create_new_trial(1000)


def test_an_end_is_stored_in_utc_and_shown_in_local_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "Asia/Kolkata")
    time.tzset()
    try:
        before = datetime.datetime.now()
        study = study_on(batched(tmp_path, sole=True))
        study.tell(study.ask(), 0.5)
        after = datetime.datetime.now()
        for (trial,) in (study.trials, stored(tmp_path)):
            assert before <= trial.datetime_start <= trial.datetime_complete <= after
    finally:
        monkeypatch.undo()
        time.tzset()


def test_a_waiting_trial_is_taken_once_however_late_its_state_was_read(tmp_path: Path) -> None:
    one, two = (batched(tmp_path, sole=False) for _ in range(2))
    study_on(one).enqueue_trial({"x": 0.25})
    (waiting,) = study_on(one).trials
    assert [s.get_trial(waiting._trial_id).state for s in (one, two)] == [TrialState.WAITING] * 2
    taken = [s.set_trial_state_values(waiting._trial_id, TrialState.RUNNING) for s in (one, two)]
    assert taken == [True, False]
    before = datetime.datetime.now() - datetime.timedelta(minutes=1)
    assert before < stored(tmp_path)[0].datetime_start <= datetime.datetime.now()
