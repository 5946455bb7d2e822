from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from optuna_ohgw.schedulers.hyperband import HyperbandPromotion, HyperbandStopping
from optuna_ohgw.schedulers.pasha import Pasha
from optuna_ohgw.schedulers.synchronous import HyperbandSynchronous, bracket_sizes
from optuna_ohgw.simulation import finite_curves, regret, simulate

NAN = math.nan


def test_bracket_sizes_by_hand():
    # S = 5, η = 3: ⌈5·81/5⌉, ⌈5·27/4⌉, ⌈5·9/3⌉, ⌈5·3/2⌉, 5; then ⌈n/3⌉.
    assert bracket_sizes(5, 3) == [[81, 27, 9, 3, 1], [34, 12, 4, 2], [15, 5, 2], [8, 3], [5]]
    assert bracket_sizes(1, 3) == [[1]]


# S = 2 levels, 1 and 3, η = 3: brackets of 3 configurations (one of them goes on) and of 2.
@pytest.mark.parametrize("sign", [1, -1])
def test_a_rung_waits_for_all_of_it_and_a_free_worker_goes_to_the_next_bracket(sign):
    scheduler = HyperbandSynchronous(3, maximize=sign < 0)
    for config in range(3):
        assert (scheduler.suggest().until, scheduler.suggest().bracket) == (1, 0)
        scheduler.started(config)
    first = scheduler.report(0, 1, sign * 0.5)
    assert (first.action, first.rung, first.rank, first.of) == ("pause", 0, 1, 1)
    assert scheduler.report(1, 1, sign * 0.2).rank == 1
    # Configuration 2 has not reported: the worker begins bracket 1, straight to full training.
    ahead = scheduler.suggest()
    assert (ahead.action, ahead.until, ahead.bracket) == ("start", 3, 1)
    scheduler.started(3)
    last = scheduler.report(2, 1, sign * 0.3)
    assert (last.action, last.rank, last.of) == ("pause", 2, 3)
    up = scheduler.suggest()
    assert (up.action, up.config, up.until, up.value, up.rank, up.of, up.bracket) == (
        *("resume", 1, 3, sign * 0.2, 1, 3, 0),
    )
    scheduler.resumed(1)
    assert scheduler.suggest().bracket == 1
    scheduler.started(4)
    assert scheduler.suggest().bracket == 0  # bracket 2, which begins as bracket 0 did
    assert [scheduler.report(1, r, sign * 0.1).action for r in (2, 3)] == ["continue", "stop"]
    assert scheduler.report(3, 3, NAN).rule == "full training"


def test_nan_is_never_resumed_and_a_rung_of_nan_ends_its_bracket():
    scheduler = HyperbandSynchronous(9)  # brackets of 9, 3, 1 and of 5, 2 and of 3
    for config in range(9):
        scheduler.started(config)
    for config in range(9):
        scheduler.report(config, 1, 0.4 if config == 7 else NAN)
    assert scheduler.suggest().config == 7
    assert scheduler.suggest().of == 9
    scheduler.resumed(7)
    scheduler.report(7, 3, NAN)
    assert (scheduler.suggest().action, scheduler.suggest().bracket) == ("start", 1)


def test_a_report_seen_before_changes_nothing():
    scheduler = HyperbandSynchronous(3)
    scheduler.started(0)
    decision = scheduler.report(0, 1, 0.5)
    assert scheduler.report(0, 1, 0.1) is decision
    scheduler.started(1)
    scheduler.started(2)
    scheduler.report(1, 1, 0.4)
    scheduler.report(2, 1, 0.6)
    assert scheduler.suggest().config == 1


@pytest.mark.parametrize("config", [0, 1, 7])
def test_only_the_chosen_are_resumed(config):
    scheduler = HyperbandSynchronous(3)
    for other in range(3):
        scheduler.started(other)
    for other, value in enumerate((0.5, 0.4, 0.3)):
        scheduler.report(other, 1, value)
    with pytest.raises(ValueError, match=f"configuration {config} is not paused"):
        scheduler.resumed(config)
    with pytest.raises(ValueError, match="configuration 0 was started before"):
        scheduler.started(0)


@pytest.mark.parametrize("workers", [1, 4, 7])
def test_every_bracket_trains_as_many_as_its_sizes_and_the_negative_does_the_same(workers):
    rng = np.random.default_rng(0)
    curves = rng.random((400, 1)) + 0.1 * rng.normal(size=(400, 50))
    order = range(400)
    lower = simulate(HyperbandSynchronous(50), curves, order, workers=workers, keep_decisions=True)
    higher = simulate(HyperbandSynchronous(50, maximize=True), -curves, order, workers=workers)
    assert lower.configs == higher.configs
    # The first 143 are brackets of 81, 34, 15, 8 and 5; at 400 starts these are long done.
    last, begins = lower.final_resources(), np.cumsum([0, 81, 34, 15, 8, 5])
    for k, sizes in enumerate(bracket_sizes(5, 3)):
        own = [last[c] for c in range(begins[k], begins[k + 1])]
        reached = [sum(r >= level for r in own) for level in (1, 3, 9, 27, 50)[k:]]
        assert reached == sizes
    again = HyperbandSynchronous(50)
    for _, decision in lower.decisions:
        if decision.action == "start":
            assert again.suggest() == decision
            again.started(len(again._of))
        elif decision.action == "resume":
            assert again.suggest() == decision
            again.resumed(decision.config)
        else:
            value = curves[decision.config, decision.resource - 1]
            assert repr(again.report(decision.config, decision.resource, float(value))) == repr(decision)


def test_positions_that_start_out_of_order_keep_their_brackets():
    scheduler = HyperbandSynchronous(3)  # brackets of 3 and 2, then as before
    for config in (3, 1, 0, 2, 4, 5):
        scheduler.started(config)
        assert scheduler.until(config) == (3 if config in (3, 4) else 1)
    for config in (0, 1, 2):
        scheduler.report(config, 1, config / 10)
    assert (scheduler.suggest().config, scheduler.suggest().bracket) == (0, 0)
    assert scheduler.until(0) == 3


def test_with_a_single_rung_pasha_promotes_to_full_training():
    scheduler = Pasha(3)
    for config in range(2):
        scheduler.started(config)
        scheduler.report(config, 1, config / 10)
    assert scheduler.maximum == 3
    assert (scheduler.suggest().config, scheduler.suggest().until) == (0, 3)


@pytest.mark.parametrize("make", [HyperbandStopping, HyperbandPromotion])
def test_hyperband_without_a_rung_trains_each_to_the_end(make):
    scheduler = make(1)
    assert (scheduler.suggest().until, scheduler.suggest().bracket) == (1, 0)
    scheduler.started(0)
    assert scheduler.report(0, 1, 0.5).action == "stop"


def test_a_bracket_that_is_closed_ends_with_those_that_it_has():
    """Five of nine: two go on to 3, one to 9."""
    scheduler = HyperbandSynchronous(9)
    for config in range(5):
        scheduler.started(config)
        scheduler.report(config, 1, float(config))
    assert scheduler.suggest().action == "start"
    scheduler.close()
    for config in range(2):
        decision = scheduler.suggest()
        assert (decision.config, decision.until, decision.rank, decision.of) == (config, 3, config + 1, 5)
        scheduler.resumed(config)
    assert scheduler.suggest().action == "start"
    for config in range(2):
        scheduler.report(config, 3, float(config))
    assert (scheduler.suggest().config, scheduler.suggest().until) == (0, 9)


def test_closing_waits_for_those_that_run():
    scheduler = HyperbandSynchronous(3)
    for config in range(2):
        scheduler.started(config)
    scheduler.report(0, 1, 0.0)
    scheduler.close()
    assert scheduler.suggest().action == "start"
    scheduler.report(1, 1, 1.0)
    assert (scheduler.suggest().action, scheduler.suggest().config) == ("resume", 0)


PEERS, TASKSET = (os.environ.get(f"OPTUNA_OHGW_{name}") for name in ("PEERS", "TASKSET"))


@pytest.mark.skipif(not (PEERS and TASKSET), reason="the peers' results are not at hand")
def test_slices_and_answers_are_those_of_the_reference():
    runs = pd.read_csv(Path(PEERS) / "runs.csv").query("scheduler == 'hb_sync' and seed < 4")
    for name, own in runs.groupby("table"):
        values = pd.read_parquet(Path(TASKSET) / f"{name}.parquet", columns=["valid_loss"])["valid_loss"]
        curves = finite_curves(np.array(values.tolist(), dtype=float)[:, 1:])
        for run in own.itertuples():
            order = np.random.RandomState(1000 + run.seed).permutation(1000)[:256]
            replay = simulate(HyperbandSynchronous(50), curves, order.tolist(), workers=4)
            assert (replay.slices, replay.makespan) == (run.slices, run.makespan)
            assert regret(curves, replay.returned()) == pytest.approx(run.regret, abs=1e-9)
