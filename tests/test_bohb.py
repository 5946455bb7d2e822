"""Oracles: Hyperband's own schedule, planted effects, the same events told to another object."""

import math
from collections import Counter

import numpy as np
import pytest

from optuna_ohgw.schedulers.bohb import Bohb
from optuna_ohgw.schedulers.density import RANDOM_FRACTION
from optuna_ohgw.schedulers.synchronous import HyperbandSynchronous
from optuna_ohgw.simulation import simulate


def pool(n=200, d=1, seed=0):
    return np.random.default_rng(seed).random((n, d))


def curves_of(candidates, resource=9):
    """Loss falls with training and grows with the distance from 0.7."""
    distance = np.abs(candidates - 0.7).sum(axis=1)
    return distance[:, None] + 1 / np.arange(1, resource + 1)


def drive(scheduler, value_of, steps, running=3):
    """Return the events of so many steps: a free worker is served, then the first one running reports."""
    events, active = [], []
    for _ in range(steps):
        decision = scheduler.suggest()
        if len(active) < running and decision.config is not None:
            active.append([decision.config, decision.resource])
            if decision.action == "start":
                scheduler.started(decision.config)
            else:
                scheduler.resumed(decision.config)
            events.append((decision.action, decision.config))
            continue
        if not active:
            break
        config, resource = active.pop(0)
        value = value_of(config, resource + 1)
        answer = scheduler.report(config, resource + 1, value)
        events.append(("report", config, resource + 1, value))
        if answer.action == "continue":
            active.append([config, resource + 1])
    return events


def tell(scheduler, events):
    for kind, config, *rest in events:
        if kind == "report":
            scheduler.report(config, *rest)
        elif kind == "start":
            scheduler.started(config, 1)
        else:
            scheduler.resumed(config, 1)


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("options", [{}, {"min_resource": 2}, {"reduction_factor": 2}])
def test_the_schedule_is_hyperbands(workers, options):
    candidates = pool(300, 2)
    curves = curves_of(candidates)
    given = {"workers": workers, "max_slices": 200}
    own = simulate(Bohb(9, candidates, **options), curves, range(300), **given)
    theirs = simulate(HyperbandSynchronous(9, **options), curves, range(300), **given)
    assert own.resources == theirs.resources
    assert own.times == theirs.times
    assert Counter(own.final_resources().values()) == Counter(theirs.final_resources().values())
    assert len(set(own.started)) == len(own.started)


def test_a_resume_says_what_hyperband_says():
    scheduler = Bohb(9, pool())
    other = HyperbandSynchronous(9)
    for position in range(9):
        decision = scheduler.suggest()
        assert (decision.action, decision.until, decision.bracket) == ("start", 1, 0)
        scheduler.started(decision.config)
        other.started(position)
        assert scheduler.until(decision.config) == 1
        loss = float(abs(position - 4))
        answer, theirs = scheduler.report(decision.config, 1, loss), other.report(position, 1, loss)
        assert answer.action == theirs.action == "pause"
        assert (answer.rung, answer.rank, answer.of) == (theirs.rung, theirs.rank, theirs.of)
    decision, theirs = scheduler.suggest(), other.suggest()
    fifth = list(scheduler.courses)[4]
    assert (decision.action, decision.config, theirs.config) == ("resume", fifth, 4)
    for field in ("rule", "resource", "until", "rung", "rank", "of", "bracket", "value"):
        assert getattr(decision, field) == getattr(theirs, field)
    scheduler.resumed(fifth)
    assert scheduler.until(fifth) == 3
    assert scheduler.courses[fifth].running


def test_the_choice_follows_from_the_events():
    candidates = pool(60, 2)
    curves = curves_of(candidates)

    def value_of(config, resource):
        return math.nan if config % 7 == 0 and resource == 2 else curves[config, resource - 1]

    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first = Bohb(9, candidates, seed=5)
    events = drive(first, value_of, 150)
    assert drive(Bohb(9, candidates, seed=5), value_of, 150) == events
    for length in (0, 20, 61, 110, len(events)):
        second = Bohb(9, candidates, seed=5)
        drive(second, value_of, length)
        third = Bohb(9, candidates, seed=5)  # told, and never asked before
        tell(third, events[:length])
        assert third.suggest() == second.suggest()
    assert drive(Bohb(9, candidates, seed=6), value_of, 150) != events
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002


def test_a_suggestion_changes_nothing():
    scheduler = Bohb(9, pool())
    first = scheduler.suggest()
    assert all(scheduler.suggest() == first for _ in range(3))


def test_minimise_and_maximise_mirror():
    candidates = pool(60, 2)
    curves = curves_of(candidates)
    down = simulate(Bohb(9, candidates), curves, range(60), workers=3)
    up = simulate(Bohb(9, candidates, maximize=True), -curves, range(60), workers=3)
    assert up.configs == down.configs
    assert up.resources == down.resources


@pytest.mark.parametrize("seed", range(5))
def test_a_planted_effect_is_found(seed):
    """With the same slices later starts are far nearer to the optimum than random ones."""
    candidates = pool(400, seed=seed)
    curves = curves_of(candidates)
    distances = np.abs(candidates[:, 0] - 0.7)
    given = {"workers": 4, "max_slices": 150}
    own = simulate(Bohb(9, candidates, seed=seed), curves, range(400), **given)
    theirs = simulate(HyperbandSynchronous(9), curves, range(400), **given)
    assert np.median(distances[own.started[20:]]) < 0.5 * np.median(distances[theirs.started[20:]])


def test_better_is_returned_for_the_same_slices():
    """Of 2000 candidates in two dimensions, over ten seeds; by luck the ratio would be 1."""
    ranks = []
    for seed in range(10):
        candidates = pool(2000, 2, seed)
        curves = curves_of(candidates)
        for scheduler in (Bohb(9, candidates, seed=seed), HyperbandSynchronous(9)):
            row = simulate(scheduler, curves, range(2000), workers=4, max_slices=400).returned()
            ranks.append(np.mean(curves[:, -1] < curves[row, -1]))
    assert np.mean(ranks[::2]) < 0.5 * np.mean(ranks[1::2])


def test_a_third_is_random_and_the_rest_by_the_largest_model():
    candidates = pool(600)
    scheduler = Bohb(9, candidates)
    replay = simulate(
        scheduler, curves_of(candidates), range(600), keep_decisions=True, max_slices=900, workers=2
    )
    rules = [d.rule for _, d in replay.decisions if d.action == "start"]
    assert set(rules[:3]) == {"bohb, random"}
    assert set(rules) == {"bohb, random", "bohb, model at 1", "bohb, model at 3", "bohb, model at 9"}
    late = rules[40:]
    share = late.count("bohb, random") / len(late)
    assert abs(share - RANDOM_FRACTION) < 3 * math.sqrt(2 / 9 / len(late))
    assert set(late[60:]) == {"bohb, random", "bohb, model at 9"}
    scores = [d.value for _, d in replay.decisions if d.action == "start"]
    assert all((value is None) == (rule == "bohb, random") for value, rule in zip(scores, rules, strict=True))


def test_the_model_is_of_rungs_alone():
    candidates = pool(60, 1)
    scheduler = Bohb(9, candidates)
    simulate(scheduler, curves_of(candidates), range(60), max_slices=100)
    at_three = [c for c, course in scheduler.courses.items() if 9 in course.resources]
    assert len(at_three) >= 4
    model = scheduler.model()
    assert model.budget == 9
    assert len(model.good.points) + len(model.bad.points) == len(at_three)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_diverged_candidate_ends_and_holds_up_nothing(bad):
    scheduler = Bohb(9, pool())
    configs = []
    for position in range(9):
        config = scheduler.suggest().config
        configs.append(config)
        scheduler.started(config)
        answer = scheduler.report(config, 1, bad if position == 0 else float(position))
        assert (answer.action, answer.rule) == (
            ("stop", "diverged") if position == 0 else ("pause", "hyperband, synchronous")
        )
    resumed = []
    for _ in range(3):
        decision = scheduler.suggest()
        resumed.append(decision.config)
        scheduler.resumed(decision.config)
    assert resumed == configs[1:4]
    # It ends between two rungs, and the two others decide theirs.
    assert scheduler.report(configs[1], 2, bad).action == "stop"
    for config, loss in ((configs[2], 2.0), (configs[3], 1.0)):
        assert scheduler.report(config, 2, loss).action == "continue"
        assert scheduler.report(config, 3, loss).action == "pause"
    assert scheduler.suggest().config == configs[3]
    assert configs[1] not in scheduler.paused
    with pytest.raises(ValueError, match="not paused"):
        scheduler.resumed(configs[1])


def test_crashes_are_avoided():
    """All above 0.5 diverge at once: random draws would meet that half of the time."""
    candidates = pool(400)
    curves = np.where(candidates > 0.5, math.nan, candidates + np.zeros(9))
    scheduler = Bohb(9, candidates)
    replay = simulate(scheduler, curves, range(400), max_slices=200)
    late = replay.started[30:]
    assert np.mean([candidates[c, 0] > 0.5 for c in late]) < 0.3
    model = scheduler.model()
    assert (model.good.points <= 0.5).all()


def test_what_crashed_on_its_way_counts_at_the_next_rung():
    candidates = points = pool(20)
    scheduler = Bohb(9, candidates)
    drive(scheduler, lambda config, resource: math.nan if resource == 2 else points[config, 0], 40, running=1)
    crashed = [c for c, course in scheduler.courses.items() if course.diverged]
    assert len(crashed) >= 3
    assert all(scheduler.courses[c].until == 3 for c in crashed)
    assert scheduler.model().budget == 1  # at 3 nothing but crashes


def test_all_diverge():
    replay = simulate(Bohb(9, pool(20)), np.full((20, 9), math.nan), range(20), workers=3)
    assert set(replay.final_resources().values()) == {1}
    assert len(replay.started) == 20


def test_a_pool_of_one_is_trained_to_the_end():
    replay = simulate(Bohb(9, pool(1)), np.ones((1, 9)), [0], workers=2)
    assert replay.resources == list(range(1, 10))


def test_when_the_pool_is_used_up_the_last_bracket_goes_on():
    """Fourteen: nine in the first bracket; five of the second's, from resource 3 on, of which two end."""
    candidates = pool(14)
    replay = simulate(Bohb(9, candidates), curves_of(candidates), range(14), workers=4)
    assert Counter(replay.final_resources().values()) == {1: 6, 3: 2 + 3, 9: 1 + 2}
    scheduler = Bohb(9, candidates)
    simulate(scheduler, curves_of(candidates), range(14))
    decision = scheduler.suggest()
    assert (decision.action, decision.config, decision.rule) == ("start", None, "nothing left")


def test_nothing_to_do_while_the_last_one_runs():
    scheduler = Bohb(9, pool(2))
    for _ in range(2):
        scheduler.started(scheduler.suggest().config)
    assert scheduler.suggest().config is None
    for config, loss in ((0, 2.0), (1, 1.0)):
        scheduler.report(config, 1, loss)
    assert (scheduler.suggest().action, scheduler.suggest().config) == ("resume", 1)


def test_a_repeated_report_changes_nothing():
    scheduler = Bohb(9, pool())
    scheduler.started(3)
    first = scheduler.report(3, 1, 0.5)
    assert scheduler.report(3, 1, 0.1) == first
    assert scheduler.courses[3].losses == [0.5]


def test_what_is_not_so_is_refused():
    scheduler = Bohb(9, pool(5))
    with pytest.raises(ValueError, match="not paused"):
        scheduler.resumed(2)
    with pytest.raises(ValueError, match="no candidate"):
        scheduler.started(5)
    scheduler.started(2)
    with pytest.raises(ValueError, match="started before"):
        scheduler.started(2)
    with pytest.raises(ValueError, match="not paused"):
        scheduler.resumed(2)
