"""The time left. Oracle: tables of what was planted, worked out by hand."""

from __future__ import annotations

import datetime

import pytest
from optuna.trial import TrialState, create_trial
from planted import planted_spec

from optuna_ohgw.history import CHECKPOINT, RESUMED_FROM
from optuna_ohgw.pace import eta_s, share_begun, worker_seconds

NOW = datetime.datetime(2026, 7, 1, 12)


def trial(number, state, epochs=0, begin=None, end=None, **attributes):
    """Return a trial that began and ended so many seconds before now."""
    value = 0.5 if state == TrialState.COMPLETE else None
    made = create_trial(
        state=state,
        value=value,
        intermediate_values=dict.fromkeys(range(1, epochs + 1), 0.5),
        user_attrs=attributes,
    )
    made.number = number
    made.datetime_start, made.datetime_complete = (
        None if s is None else NOW - datetime.timedelta(seconds=s) for s in (begin, end)
    )
    return made


@pytest.mark.parametrize(
    ("used", "worker_s", "rests", "live", "at_once", "expected"),
    [
        (1.0, 100.0, [1.0], 1, 1, 100.0),
        (1.0, 100.0, [1.0, 1.0], 2, 1, 100.0),
        (0.5, 100.0, [0.5, 0.0], 4, 4, 25.0),
        (1.0, 100.0, [1.0, 0.1], 4, 1, 100.0),  # the longest cell has one worker at a time
        (1.0, 100.0, [1.0, 1.0, 1.0], 2, 2, 150.0),
        (1.0, 100.0, [1.0], 2, 8, 50.0),
        (1.0, 100.0, [1.0], 0, 1, None),  # nobody works
        (0.0, 100.0, [1.0], 1, 1, None),  # nothing was done yet
        (1.0, 0.0, [1.0], 1, 1, None),
        (1.0, 100.0, [0.0], 1, 1, 0.0),
        (0.0, 0.0, [], 1, 1, 0.0),
    ],
)
def test_the_time_left_goes_by_what_a_worker_does_in_a_second(used, worker_s, rests, live, at_once, expected):
    found = eta_s(used, worker_s, rests, live=live, at_once=at_once)
    assert found == (expected if expected is None else pytest.approx(expected))


def test_workers_seconds_are_those_of_their_trials():
    made = {"epoch": 1, "wall": (NOW - datetime.timedelta(seconds=400)).timestamp()}
    trials = [
        trial(0, TrialState.COMPLETE, 9, 1000, 900),
        trial(1, TrialState.PRUNED, 3, 1000, 970),
        trial(2, TrialState.RUNNING, 3, 50),
        trial(3, TrialState.WAITING),
        trial(4, TrialState.FAIL, 3, 500, 0, reason="interrupted", **{CHECKPOINT: made}),  # kept: 100 s
        trial(5, TrialState.FAIL, 3, 500, 0, reason="interrupted"),  # all in vain, and who knows until when
        trial(6, TrialState.FAIL, 3, 10, 3, reason="ValueError"),
        trial(7, TrialState.RUNNING, 0, -5),  # by a clock that is ahead
    ]
    assert worker_seconds(trials, NOW) == pytest.approx(100 + 30 + 50 + 100 + 7)


@pytest.mark.parametrize(
    ("budget", "share", "running", "expected"),
    [
        # share: what is used by what has ended, or of epochs by all
        ({"trials": 10}, 0.2, [], 0.2),
        ({"trials": 10}, 0.2, [3], 0.25),  # half of what an ended trial took
        ({"trials": 10}, 0.2, [3, 0, 60], 0.35),  # none is more than a trial
        ({"trials": 2}, 1.0, [3], 1.0),
        ({"trials": 10, "epochs": 20}, 0.75, [3], 0.75),
        ({"epochs": 20}, 0.75, [3], 0.75),
    ],
)
def test_running_trials_count_in_part(budget, share, running, expected):
    spec = planted_spec(budget=budget)
    trials = [trial(0, TrialState.COMPLETE, 9), trial(1, TrialState.PRUNED, 3)]
    trials += [trial(2 + i, TrialState.RUNNING, epochs) for i, epochs in enumerate(running)]
    assert share_begun(trials, spec, share) == pytest.approx(expected)


def test_without_an_ended_trial_a_running_one_has_all_epochs_before_it():
    spec = planted_spec(budget={"trials": 2}, epochs=27)
    assert share_begun([trial(0, TrialState.RUNNING, 9)], spec, 0.0) == pytest.approx(1 / 6)


def test_a_resumed_trial_is_one():
    spec = planted_spec(budget={"trials": 4}, epochs=27)
    trials = [
        trial(0, TrialState.PRUNED, 6),
        trial(1, TrialState.PRUNED, 3),
        trial(2, TrialState.RUNNING, 3, **{RESUMED_FROM: 1}),
    ]
    assert share_begun(trials, spec, 0.25) == pytest.approx((1 + 0.5) / 4)
