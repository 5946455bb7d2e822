"""Oracle: closed forms of queues, a clock that is driven by hand."""

from __future__ import annotations

import time

import optuna
import pytest

from optuna_ohgw import suggest, warmstart
from optuna_ohgw.bench.scale import simulated, sleepers_share
from optuna_ohgw.bench.workers import clock_on
from optuna_ohgw.sampler import OhgwSampler


def test_without_contention_speed_is_the_number_of_workers():
    one, many = simulated((1, 8), 1.0, 0.0)
    assert one.trials_an_hour == pytest.approx(3600, rel=1e-3)
    assert many.speed_up == pytest.approx(8, rel=0.01)
    assert many.waiting == 0


def test_a_storage_that_is_always_at_work_bounds_the_speed():
    """Of many workers the storage serves one after the other: one trial each storage_s."""
    (many,) = simulated((64,), 1.0, 0.1)
    assert many.trials_an_hour == pytest.approx(3600 / 0.1, rel=0.02)
    # Each trial takes 64 × 0.1 s, of which 1.1 s are its own.
    assert many.waiting == pytest.approx(1 - 1.1 / 6.4, rel=0.05)


def test_two_workers_that_need_each_half_of_the_storage_do_not_wait():
    (two,) = simulated((2,), 1.0, 1.0)
    assert two.speed_up == pytest.approx(2, rel=0.01)


def test_the_clock_counts_what_is_nested_once_and_training_not_at_all(monkeypatch):
    slow = optuna.storages.InMemoryStorage
    plain = slow.create_new_trial

    def create_new_trial(self, *arguments, **options):
        time.sleep(0.05)
        return plain(self, *arguments, **options)

    monkeypatch.setattr(slow, "create_new_trial", create_new_trial)
    study = optuna.create_study()
    with clock_on() as spent:
        trial = study.ask()
        time.sleep(0.2)
        trial.report(1.0, 1)
        study.tell(trial, 1.0)
    assert 0.05 <= spent[0] < 0.15
    before = spent[0]
    study.ask()
    assert spent[0] == before  # it is taken off at the end


def test_the_clock_leaves_out_a_warm_start(monkeypatch):
    def slow(*arguments, **options):
        time.sleep(0.2)
        return plain(*arguments, **options)

    plain = warmstart.warm_start
    monkeypatch.setattr(warmstart, "warm_start", slow)
    study = optuna.create_study(sampler=OhgwSampler(optuna.samplers.RandomSampler(seed=0)))
    trial, space = study.ask(), {"lr": optuna.distributions.FloatDistribution(1e-3, 1, log=True)}
    with clock_on() as spent:
        suggest.ohgw_suggest(trial, space, lambda psi: psi["lr"] ** 2)
    assert 0 < spent[0] < 0.1


def test_sleeping_workers_sleep_most_of_their_time(tmp_path):
    share = sleepers_share(f"sqlite:///{tmp_path / 'study.db'}", 0.1, trials=1, count=2)
    assert 0 < share < 0.5
