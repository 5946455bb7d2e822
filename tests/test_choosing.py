"""Oracle: a chooser whose choices are known, so that every event after them is known."""

import math

import numpy as np
import pytest

from optuna_ohgw.schedulers.choosing import Choice, Chooser
from optuna_ohgw.simulation import simulate


class Backwards(Chooser):
    """Starts the last candidate first, then sends each of them two units further."""

    name = "backwards"

    def choose(self):
        if self.fresh:
            return Choice(self.fresh[-1], 1, None, "fresh")
        if self.paused:
            config = max(self.paused, key=lambda c: (-self.courses[c].resource, c))
            return Choice(config, min(self.courses[config].resource + 2, self.max_resource), 1.5, "paused")
        return None


def test_a_replay_follows_the_choices():
    curves = np.arange(12.0).reshape(3, 4)
    replay = simulate(Backwards(4, np.zeros((3, 2))), curves, [0, 1, 2])
    assert replay.configs == [2, 1, 0, 2, 2, 1, 1, 0, 0, 2, 1, 0]
    assert replay.resources == [1, 1, 1, 2, 3, 2, 3, 2, 3, 4, 4, 4]
    assert replay.started == [2, 1, 0]
    assert replay.final_resources() == {0: 4, 1: 4, 2: 4}


def test_a_replay_ends_where_the_budget_does():
    assert simulate(Backwards(4, np.zeros((3, 2))), np.zeros((3, 4)), [0, 1, 2], max_slices=5).slices == 5


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_diverged_candidate_is_never_resumed(bad):
    curves = np.ones((2, 4))
    curves[1, 1:] = bad
    replay = simulate(Backwards(4, np.zeros((2, 1))), curves, [0, 1])
    assert replay.final_resources() == {1: 2, 0: 4}


def test_the_choice_is_kept_until_something_happens():
    calls = []

    class Counting(Backwards):
        def choose(self):
            calls.append(1)
            return super().choose()

    scheduler = Counting(4, np.zeros((2, 1)))
    assert scheduler.suggest() == scheduler.suggest()
    assert len(calls) == 1
    scheduler.started(1)
    assert scheduler.suggest().config == 0
    assert len(calls) == 2


def test_what_was_not_suggested_needs_to_be_sent_somewhere():
    scheduler = Backwards(4, np.zeros((2, 1)))
    with pytest.raises(ValueError, match="was not suggested"):
        scheduler.started(0)
    scheduler.started(0, 3)
    assert scheduler.until(0) == 3
    with pytest.raises(ValueError, match="started before"):
        scheduler.started(0, 3)
    with pytest.raises(ValueError, match="not paused"):
        scheduler.resumed(0, 4)


def test_a_repeated_report_adds_nothing():
    scheduler = Backwards(4, np.zeros((1, 1)), maximize=True)
    scheduler.started(0, 2)
    assert scheduler.report(0, 1, 0.5).action == "continue"
    assert scheduler.report(0, 1, 0.9) == scheduler.report(0, 1, math.nan) == scheduler.report(0, 1, 0.5)
    assert scheduler.courses[0].losses == [-0.5]
    paused = scheduler.report(0, 2, 0.6)
    assert paused.action == "pause"
    scheduler.resumed(0, 4)
    assert scheduler.report(0, 2, 0.1) == paused
    assert scheduler.courses[0].running


def test_candidates_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="shape"):
        Backwards(4, np.zeros(3))
