"""Oracle: tables of who may work on what; two workers are two objects with identities of their own."""

from __future__ import annotations

import multiprocessing
import threading
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from cell_runs import in_process, spec_of
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState, create_trial

from optuna_ohgw import claims as module
from optuna_ohgw import worker
from optuna_ohgw.cells import cells_of, create_cell
from optuna_ohgw.claims import BEAT, CELL, Claims, Pulse
from optuna_ohgw.history import CONFIG_INDEX, FINAL, WORKER
from optuna_ohgw.identity import identity, is_here, lives
from optuna_ohgw.opening import open_storage
from optuna_ohgw.storage import BatchedStorage

ELSEWHERE = {"host": "elsewhere", "boot": "b", "pids": "p", "pid": 1, "born": 0.0}


@pytest.fixture
def study(tmp_path):
    def make(*overrides):
        spec = spec_of(tmp_path, "asha", "seeds=[3,4]", "variations=[baseline]", *overrides)
        tmp_path.mkdir(exist_ok=True)
        storage = open_storage(spec.storage_url, create=True)
        for cell in cells_of(spec):
            create_cell(storage, spec, cell, {})
        return spec, storage

    return make


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def claim(number: int = 0, beat: int = 0, **who: Any) -> FrozenTrial:
    trial = create_trial(state=TrialState.RUNNING, user_attrs={CELL: "c", BEAT: beat, **(who or ELSEWHERE)})
    trial.number = number
    return trial


class TestPulse:
    @pytest.mark.parametrize(
        ("looks", "expected"),
        [
            # (seconds, beat) of each look at a worker of another machine
            ([(0, 0)], "unknown"),
            ([(0, 5), (10, 5)], "unknown"),
            ([(0, 5), (10, 6)], "alive"),
            ([(0, 5), (10, 6), (30, 6), (60, 6), (70, 6)], "alive"),
            ([(0, 5), (10, 6), (30, 6), (60, 6), (71, 6)], "dead"),
            ([(0, 5), (20, 5), (40, 5), (60, 5)], "unknown"),
            ([(0, 5), (20, 5), (40, 5), (61, 5)], "dead"),
            ([(0, 5), (20, 5), (40, 5), (59, 6), (80, 6)], "alive"),
            # It was not watched for an hour: the time counts anew.
            ([(0, 5), (20, 5), (3620, 5)], "unknown"),
            ([(0, 5), (20, 5), (3620, 5), (3640, 5), (3660, 5), (3681, 5)], "dead"),
        ],
    )
    def test_a_worker_elsewhere_lives_while_its_beat_changes(self, looks, expected) -> None:
        clock = Clock()
        pulse = Pulse(60, clock)
        for seconds, beat in looks:
            clock.now = float(seconds)
            found = pulse.of([claim(beat=beat)])
        assert found == {0: expected}

    def test_a_worker_here_lives_while_its_process_does(self) -> None:
        other = multiprocessing.get_context("spawn").Process(target=str)
        other.start()
        other.join()
        here = identity()
        gone = {**here, "pid": other.pid}
        reborn = {**here, "born": here["born"] - 1}
        claims = [claim(0, **here), claim(1, **gone), claim(2, **reborn)]
        assert Pulse().of(claims) == {0: "alive", 1: "dead", 2: "dead"}

    def test_a_claim_that_ended_is_none(self) -> None:
        ended = claim(**identity())
        ended.state = TrialState.COMPLETE
        assert Pulse().of([ended]) == {0: "dead"}


def test_identity() -> None:
    assert is_here(identity())
    assert lives(identity())
    for name in ("host", "boot", "pids"):
        assert not is_here({**identity(), name: "another"})
    assert not is_here({})


def test_workers_take_one_cell_each_in_order(study) -> None:
    spec, storage = study()
    first, second, third = (Claims(storage, spec, "cpu") for _ in range(3))
    assert first.take().cell.seed == 3
    assert second.take().cell.seed == 4
    assert third.take() is None
    assert not third.may_need_me()  # both are full, and of who lives
    first.release()
    assert third.may_need_me()
    assert third.take().cell.seed == 3


def test_a_cell_takes_so_many_workers_and_no_more(study) -> None:
    spec, storage = study("execution.workers=2", "budget.trials=5")
    workers = [Claims(storage, spec, "cpu") for _ in range(5)]
    taken = [w.take() for w in workers]
    assert [t.cell.seed for t in taken if t] == [3, 3, 4, 4]
    assert taken[4] is None
    assert not workers[0].is_sole()
    assert not workers[1].is_sole()
    workers[0].release()
    assert workers[1].is_sole()


@pytest.mark.parametrize("workers", [(1, 3), (3, 1)])
def test_runs_that_differ_in_the_workers_of_a_cell_keep_to_the_fewest(study, workers) -> None:
    spec, storage = study("seeds=[3]", f"execution.workers={workers[0]}")
    other, _ = study("seeds=[3]", f"execution.workers={workers[1]}")
    first, second = Claims(storage, spec, "cpu"), Claims(storage, other, "cpu")
    assert first.take() is not None
    assert second.take() is None
    assert not second.may_need_me()
    first.release()
    assert second.take() is not None
    assert first.take() is None


@pytest.mark.parametrize("workers", [(1, 3), (3, 1), (3, 3)])
def test_of_two_that_claim_at_once_the_earlier_has_it(study, monkeypatch, workers) -> None:
    """The second claims before the first has looked who else did; three would have room for both."""
    (spec, storage), (other, _) = (study("seeds=[3]", f"execution.workers={n}") for n in workers)
    first, second = Claims(storage, spec, "cpu"), Claims(storage, other, "cpu")
    create, taken = storage.create_new_trial, []

    def meanwhile(study_id, template):
        trial_id = create(study_id, template)
        monkeypatch.setattr(storage, "create_new_trial", create)
        taken.append(second.take())
        return trial_id

    monkeypatch.setattr(storage, "create_new_trial", meanwhile)
    taken.append(first.take())
    assert [t is not None for t in taken] == [workers == (3, 3), True]
    assert taken[1].number == 0
    states = [t.state for t in storage.get_all_trials(storage.get_study_id_from_name("digits/workers"))]
    assert states == [TrialState.RUNNING, *([TrialState.RUNNING] if workers == (3, 3) else [])]


def test_the_claim_of_a_dead_worker_is_ended_and_its_trials_are_free(study, monkeypatch) -> None:
    spec, storage = study("seeds=[3]", "execution.workers=2")
    monkeypatch.setattr(module, "identity", lambda: {**identity(), "born": 0.0})
    dead = Claims(storage, spec, "cpu")
    claimed = dead.take()
    monkeypatch.undo()
    living = Claims(storage, spec, "cpu")
    number = living.take().number
    assert living.is_sole()
    alive = living.alive()
    owners = {"dead": claimed.number, "own": number, "none": None}
    trials = {who: create_trial(value=0, user_attrs={WORKER: {"claim": n}}) for who, n in owners.items()}
    assert not any(alive(trial) for trial in trials.values())
    other = Claims(storage, spec, "cpu")
    other.take()
    assert other.alive()(trials["own"])
    assert storage.get_trial(claimed.trial_id).state == TrialState.FAIL
    assert not dead.beat()
    dead.release()  # says nothing: it lost it


def test_a_cell_that_is_over_or_was_given_up_needs_nobody(study) -> None:
    spec, storage = study()
    worker, other = Claims(storage, spec, "cpu"), Claims(storage, spec, "cpu")
    cell = worker.take().cell
    worker.release(error="3 of 3 trials failed")
    assert worker.errors() == other.errors() == {cell.label: "3 of 3 trials failed"}
    second = other.take().cell
    assert second != cell
    storage.set_study_user_attr(storage.get_study_id_from_name(second.name), FINAL, {"trial": 0})
    other.release(done=True)
    assert worker.take() is None
    assert not worker.may_need_me()
    later = Claims(storage, spec, "cpu")  # the next run tries again what was given up
    assert later.errors() == {}
    assert later.take().cell == cell


def test_a_cell_in_which_nothing_was_found_is_left_alone_until_it_changes(study) -> None:
    spec, storage = study("seeds=[3]", "execution.workers=2", "budget.trials=2")
    first, second = Claims(storage, spec, "cpu"), Claims(storage, spec, "cpu")
    cell = first.take().cell
    study_ = optuna.load_study(study_name=cell.name, storage=storage)
    trials = [study_.ask(), study_.ask()]
    assert second.take() is None  # all were started
    assert second.may_need_me()
    study_.add_trial(create_trial(state=TrialState.WAITING))
    assert second.take().cell == cell
    second.release()
    assert second.take() is None
    study_.tell(trials[0], 0.5)
    assert second.take().cell == cell


def test_optuna_can_summarise_a_storage_with_ended_claims(study) -> None:
    spec, storage = study()
    one = Claims(storage, spec, "cpu")
    for _ in range(2):
        assert one.take() is not None
        one.release(done=False)
    names = {s.study_name: s.n_trials for s in optuna.get_all_study_summaries(storage)}
    assert names[f"{spec.name}/workers"] == 2


def test_a_trial_that_runs_never_lacks_its_owner(study) -> None:
    spec, storage = study()
    owner = {WORKER: {"claim": 7}}
    batched = BatchedStorage(storage, owner=owner)
    study_ = optuna.load_study(study_name=cells_of(spec)[0].name, storage=batched)
    study_.add_trial(create_trial(state=TrialState.WAITING, user_attrs={WORKER: {"claim": 1}, "kept": 1}))
    for number in (0, 1):  # taken, and made
        trial = study_.ask()
        seen = storage.get_all_trials(study_._study_id)[number]
        assert (seen.state, seen.user_attrs[WORKER]) == (TrialState.RUNNING, {"claim": 7})
        assert trial.user_attrs[WORKER] == {"claim": 7}
        assert ("kept" in seen.user_attrs) is (number == 0)


def test_a_worker_that_waits_does_not_read_ended_trials_again(study, monkeypatch) -> None:
    spec, storage = study("seeds=[3]", "execution.workers=2", "budget.trials=31")
    study_id = storage.get_study_id_from_name(cells_of(spec)[0].name)
    for index in range(31):
        state = TrialState.RUNNING if index == 30 else TrialState.PRUNED
        storage.create_new_trial(study_id, create_trial(state=state, user_attrs={CONFIG_INDEX: index}))
    assert Claims(storage, spec, "cpu").take()
    made, stop, loaded = [], threading.Event(), []
    monkeypatch.setattr(worker, "Claims", lambda *given: made.append(Claims(*given)))
    stop.set()
    with in_process(spec, stop):
        worker.serve(spec, 0, 30, stop)
        assert made[0].take() is None

        def note(*_: Any) -> None:
            loaded.append(1)

        sa.event.listen(models.TrialModel, "load", note)
        try:
            assert made[0].take() is None
            assert made[0].may_need_me()
        finally:
            sa.event.remove(models.TrialModel, "load", note)
    assert len(loaded) < 10
