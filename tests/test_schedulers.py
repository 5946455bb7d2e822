from __future__ import annotations

import itertools
import json
import math
import os
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
import pytest
from optuna.trial import TrialState

from optuna_ohgw.schedulers.hyperband import (
    Brackets,
    HyperbandPromotion,
    HyperbandStopping,
    bracket_shares,
)
from optuna_ohgw.schedulers.one_epoch import OneEpoch
from optuna_ohgw.schedulers.pasha import Pasha, crossed_twice, settled
from optuna_ohgw.schedulers.promotion import PromotionAsha
from optuna_ohgw.schedulers.rungs import Rung, levels, quantile, quantiles
from optuna_ohgw.schedulers.stopping import StoppingAsha
from optuna_ohgw.schedulers.synchronous import HyperbandSynchronous
from optuna_ohgw.simulation import finite_curves, regret, simulate

NAN = math.nan
MAKERS = {
    "stopping": StoppingAsha,
    "optuna": lambda *a, **k: StoppingAsha(*a, rule="optuna", **k),
    "promotion": PromotionAsha,
    "pasha": Pasha,
    "hyperband-stopping": HyperbandStopping,
    "hyperband-promotion": HyperbandPromotion,
    "hyperband-synchronous": HyperbandSynchronous,
    "one-epoch": lambda *a, **k: OneEpoch(*a, configs=40, keep=4, **k),
}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((1, 50, 3), (1, 3, 9, 27)),
        ((1, 27, 3), (1, 3, 9)),
        ((2, 100, 4), (2, 8, 32)),
        ((3, 3, 2), ()),
        ((5, 3, 2), ()),
        ((1, 2, 9), (1,)),
    ],
)
def test_rungs_lie_below_full_training(arguments, expected):
    assert levels(*arguments) == expected


@pytest.mark.parametrize("arguments", [(0, 9, 3), (1, 0, 3), (1, 9, 1)])
def test_bad_rungs_are_refused_with_the_number(arguments):
    with pytest.raises(ValueError, match=r"(must be 1 or more|give 2 or more)"):
        levels(*arguments)


def test_the_last_share_is_over_full_training():
    assert quantiles((1, 3, 9, 27), 50) == (1 / 3, 1 / 3, 1 / 3, 0.54)


def test_quantile_is_numpys():
    rng = np.random.default_rng(0)
    for n in range(1, 40):
        values = sorted(rng.normal(size=n).round(1).tolist())
        for q in (1 / 3, 0.25, 0.54, 0.5, 0.0, 1.0):
            assert quantile(values, q) == np.quantile(values, q)


def test_a_quantile_beside_infinity_is_infinite_unless_it_falls_on_a_number():
    assert quantile([1.0, math.inf], 0.5) == math.inf
    assert quantile([1.0, 2.0, math.inf], 0.5) == 2.0
    assert quantile([-math.inf, 1.0, 2.0], 0.4) == -math.inf


def test_a_record_is_strict_json():
    scheduler = PromotionAsha(9)
    for config in range(2):
        scheduler.started(config)
        record = scheduler.report(config, 1, NAN).record()
        assert json.loads(json.dumps(record, allow_nan=False))["rank"] == 1


# Values at rung 1 in order of arrival, decision, cut-off (η = 3, of 9).
TABLE = [
    (0.5, "continue", None),
    (0.8, "stop", 0.6),  # 0.5 + 0.3/3
    (0.6, "stop", 0.5 + 2 / 3 * 0.1),
    (0.4, "continue", 0.5),  # place 1 of 0.4 0.5 0.6 0.8
    (NAN, "stop", 0.5 + 1 / 3 * 0.1),
]


@pytest.mark.parametrize("sign", [1, -1])
def test_the_quantile_rule_by_hand(sign):
    scheduler = StoppingAsha(9, maximize=sign < 0)
    for config, (value, action, cutoff) in enumerate(TABLE):
        scheduler.started(config)
        decision = scheduler.report(config, 1, sign * value)
        assert (decision.action, decision.rung, decision.of) == (action, 0, config + 1)
        assert decision.cutoff == (cutoff if cutoff is None else pytest.approx(sign * cutoff))
    assert scheduler.report(0, 2, 9.0).action == "continue"
    assert scheduler.report(0, 2, 9.0).until == 3
    assert [scheduler.report(3, 3, sign * 0.3).rank, scheduler.report(0, 3, sign * 0.5).rank] == [1, 2]
    assert scheduler.report(3, 9, sign * 0.3).rule == "full training"


def test_a_report_that_skips_rungs_is_tested_at_each():
    scheduler = StoppingAsha(50)
    for config in range(3):
        scheduler.started(config)
    assert scheduler.report(0, 10, 0.5).rung == 2
    assert [len(r.losses) for r in scheduler.rungs] == [1, 1, 1, 0]
    assert scheduler.report(1, 10, 0.9).rung == 0
    assert [len(r.losses) for r in scheduler.rungs] == [2, 1, 1, 0]


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
@pytest.mark.parametrize("bootstrap", [0, 2])
@pytest.mark.parametrize("seed", range(6))
def test_optunas_rule_is_that_of_its_pruner(direction, bootstrap, seed):
    rng = np.random.default_rng(seed)
    pruner = optuna.pruners.SuccessiveHalvingPruner(
        min_resource=2, reduction_factor=3, bootstrap_count=bootstrap
    )
    study = optuna.create_study(direction=direction, pruner=pruner)
    scheduler = StoppingAsha(
        100,
        min_resource=2,
        rule="optuna",
        bootstrap_count=bootstrap,
        maximize=direction == "maximize",
    )
    running = []
    for _ in range(300):
        if len(running) < 4:
            trial = study.ask()
            running.append([trial, 0])
            scheduler.started(trial.number)
            continue
        one = running[rng.integers(4)]
        trial, one[1] = one[0], one[1] + int(rng.integers(1, 9))
        value = NAN if rng.random() < 0.05 else round(float(rng.normal()), 1)
        trial.report(value, one[1])
        pruned = one[1] < 100 and trial.should_prune()
        decision = scheduler.report(trial.number, one[1], value)
        assert (decision.action == "stop") == (pruned or one[1] >= 100)
        if decision.action == "stop":
            study.tell(trial, 0.0, state=TrialState.COMPLETE)
            running.remove(one)


@pytest.mark.parametrize("sign", [1, -1])
def test_promotion_by_hand(sign):
    scheduler = PromotionAsha(9, maximize=sign < 0)

    def run(config, resource, value):
        return scheduler.report(config, resource, sign * value).action

    assert scheduler.suggest().until == 1
    scheduler.started(0)
    assert run(0, 1, 0.5) == "pause"
    assert scheduler.suggest().action == "start"  # one value is no ranking
    scheduler.started(1)
    assert run(1, 1, 0.8) == "pause"
    first = scheduler.suggest()
    assert (first.action, first.config, first.until, first.rank, first.of) == ("resume", 0, 3, 1, 2)
    assert first.cutoff == pytest.approx(sign * 0.6)
    scheduler.resumed(0)
    assert scheduler.suggest().action == "start"  # 0.8 misses 0.6
    assert [run(0, 2, 0.9), run(0, 3, 0.3)] == ["continue", "pause"]
    for config, value in ((2, 0.45), (3, NAN), (4, 0.4)):
        scheduler.started(config)
        run(config, 1, value)
    # 0.4 0.45 0.5 0.8 NaN: cut-off 0.45 + 0.05/3; the best first.
    assert scheduler.suggest().config == 4
    scheduler.resumed(4)
    assert scheduler.suggest().config == 2
    scheduler.resumed(2)
    assert scheduler.suggest().action == "start"
    run(4, 3, 0.35)
    top = scheduler.suggest()
    assert (top.config, top.rung, top.until) == (0, 1, 9)  # from the top down
    scheduler.resumed(0)
    assert run(0, 9, 0.1) == "stop"
    with pytest.raises(ValueError, match="configuration 0 is not paused"):
        scheduler.resumed(0)


def test_a_promoted_configuration_that_skips_a_rung_waits_at_the_highest():
    scheduler = PromotionAsha(50)
    for config, resource in ((0, 4), (1, 3), (2, 1)):
        scheduler.started(config)
        scheduler.report(config, resource, 0.1 * config)
    decision = scheduler.suggest()
    assert (decision.config, decision.rung, decision.of) == (0, 1, 2)
    assert len(scheduler.rungs[0].losses) == 3


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([1, 3, 1, 3], [2, 2, 2, 2], True),
        ([3, 3, 1, 3], [2, 2, 2, 2], True),
        ([1, 1, 1, 3], [2, 2, 2, 2], False),
        ([3, 3, 3, 3], [2, 2, 2, 2], False),
        ([3, 1, 1, 3], [2, 2, 2, 2], True),
        ([1, 3], [2, 2], False),
    ],
)
def test_curves_that_cross_twice(one, other, expected):
    curves = [dict(enumerate(c, start=1)) for c in (one, other)]
    assert crossed_twice(*curves, len(one)) is expected
    assert crossed_twice(*curves[::-1], len(one)) is expected


@pytest.mark.parametrize(
    ("top", "below", "epsilon", "expected"),
    [
        ([], [1, 2, 3], 0.0, True),
        ([1, 2, 3], [1, 2, 3], 0.0, True),
        ([2, 1, 3], [1, 2, 3], 0.0, False),
        ([2, 1, 3], [1, 2, 3], 1.0, True),
        ([3, 2, 1], [1, 2, 3], 1.0, False),
        ([3, 2, 1], [1, 2, 3], 2.0, True),
        ([2, 1], [1, 2, 0], 1.0, True),  # the third is not at the top, so it is no neighbour
        # From 1.0 the walk stops at 1.5, though 1.9 would be within ε of 1.5.
        ([3, 2, 1], [1.0, 1.5, 1.9], 0.5, False),
    ],
)
def test_a_ranking_is_settled_within_epsilon(top, below, epsilon, expected):
    rungs = []
    for losses in (top, below):
        rung = Rung(1, 0.5)
        for config, loss in enumerate(losses):
            rung.add(config, float(loss))
        rungs.append(rung)
    assert settled(*rungs, epsilon) is expected


def test_pashas_maximum_stays_while_the_ranking_is_settled_and_grows_when_not():
    curves = np.tile(np.arange(30.0)[:, None], (1, 50))
    calm = Pasha(50)
    assert calm.maximum == 3
    assert max(simulate(calm, curves, range(30)).final_resources().values()) == 3
    assert calm.epsilon == 0.0
    crossing = curves.copy()
    crossing[:, 2:] = 30 - curves[:, 2:]
    wild = Pasha(50)
    simulate(wild, crossing, range(30))
    assert wild.maximum > 3


def noisy(seed, n=40, length=50):
    rng = np.random.default_rng(seed)
    values = rng.random((n, 1)) * np.exp(-np.arange(length) / 20) + 0.03 * rng.normal(size=(n, length))
    values[3, 20:] = NAN
    values[7] = NAN
    return values.round(3)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("seed", range(3))
def test_maximising_the_negative_decides_the_same(name, seed):
    curves = noisy(seed)
    lower = simulate(MAKERS[name](50), curves, range(40), workers=3)
    higher = simulate(MAKERS[name](50, maximize=True), -curves, range(40), workers=3)
    assert lower.configs == higher.configs
    assert lower.resources == higher.resources
    assert lower.returned() == higher.returned(maximize=True)


@pytest.mark.parametrize("name", MAKERS)
def test_the_same_events_give_the_same_decisions(name):
    events, asked = [], []
    scheduler = MAKERS[name](50)
    for method in ("started", "resumed", "report"):
        call = getattr(scheduler, method)

        def spy(*arguments, method=method, call=call):
            result = call(*arguments)
            events.append((method, arguments, result, repr(scheduler.suggest())))
            return result

        setattr(scheduler, method, spy)
    simulate(scheduler, noisy(1), range(40), workers=4)
    again = MAKERS[name](50)
    for method, arguments, result, suggestion in events:
        asked.append(repr(getattr(again, method)(*arguments)) == repr(result))
        asked.append(repr(again.suggest()) == suggestion)
    assert len(asked) > 80
    assert all(asked)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize(("back", "value"), [(0, None), (0, -9.0), (0, 9.0), (0, NAN), (1, -9.0), (2, 9.0)])
def test_a_report_at_or_below_the_last_is_answered_as_that_and_changes_nothing(name, back, value):
    undisturbed = simulate(MAKERS[name](50), noisy(2), range(40), workers=4, keep_decisions=True)
    scheduler = MAKERS[name](50)
    report, answered = scheduler.report, []

    def twice(config, resource, first):
        decision = report(config, resource, first)
        again = report(config, max(resource - back, 1), first if value is None else value)
        answered.append(repr(again) == repr(decision))
        return decision

    scheduler.report = twice
    replay = simulate(scheduler, noisy(2), range(40), workers=4, keep_decisions=True)
    assert len(answered) >= 40
    assert all(answered)
    assert repr(replay) == repr(undisturbed)


@pytest.mark.parametrize("name", MAKERS)
def test_a_configuration_is_started_once(name):
    scheduler = MAKERS[name](9)
    scheduler.started(0)
    with pytest.raises(ValueError, match="configuration 0 was started before"):
        scheduler.started(0)
    scheduler.report(0, 1, 0.5)
    with pytest.raises(ValueError, match="configuration 0 was started before"):
        scheduler.started(0)
    scheduler.started(1)


@pytest.mark.parametrize("name", [name for name in MAKERS if name.startswith("hyperband")])
def test_every_decision_of_hyperband_names_the_bracket_of_its_configuration(name):
    scheduler, brackets = MAKERS[name](9), {}
    reports = []
    for method in ("report", "suggest"):
        call = getattr(scheduler, method)
        setattr(scheduler, method, lambda *a, call=call: reports.append(call(*a)) or reports[-1])
    started = scheduler.started
    scheduler.started = lambda config: (brackets.update({config: reports[-1].bracket}), started(config))
    simulate(scheduler, noisy(0), range(40), workers=3)
    assert len(set(brackets.values())) > 1
    assert {d.action for d in reports} > {"start", "continue"}
    assert all(d.bracket == brackets[d.config] for d in reports if d.config is not None)
    assert all(d.record()["bracket"] is not None for d in reports)


@pytest.mark.parametrize("seed", range(8))
def test_epsilon_is_the_percentile_over_all_pairs_that_cross(seed):
    curves = noisy(seed) + np.random.default_rng(seed).normal(scale=0.1, size=(40, 50))
    scheduler, seen = Pasha(50), {}
    report, compared = scheduler.report, []

    def checked(config, resource, value):
        top, previous = scheduler._top, scheduler.epsilon
        decision = report(config, resource, value)
        seen.setdefault(config, {})[resource] = math.inf if math.isnan(value) else value
        high, low = scheduler.rungs[top - 1].level, scheduler.rungs[top - 2].level
        found = []
        for a, b in itertools.combinations(seen.values(), 2):
            last = min(max(a), max(b), high)
            if last > low and crossed_twice(a, b, last) and math.isfinite(a[last] - b[last]):
                found.append(abs(a[last] - b[last]))
        compared.append((scheduler.epsilon, np.percentile(found, 90) if found else previous, len(found)))
        return decision

    scheduler.report = checked
    simulate(scheduler, curves, range(40), workers=3)
    assert sum(count > 2 for *_, count in compared) > 20
    assert [epsilon for epsilon, *_ in compared] == [expected for _, expected, _ in compared]


@pytest.mark.parametrize("seed", range(8))
def test_a_ranking_that_was_settled_is_looked_at_again_where_it_may_have_changed(seed):
    class Forgetful(Pasha):
        def observed(self, *event):
            self._settled = None
            super().observed(*event)

    replays = [simulate(make(50), noisy(seed), range(40), workers=3) for make in (Pasha, Forgetful)]
    assert repr(replays[0]) == repr(replays[1])


def test_brackets_hold_their_shares_in_every_prefix_and_depend_on_the_position_alone():
    shares = bracket_shares(4, 3)
    assert shares == pytest.approx(np.array([81, 27, 9, 6, 5]) / 128)
    brackets = [Brackets(4, 3)[i] for i in range(100)]
    for n in range(1, 101):
        for k, share in enumerate(shares):
            assert abs(brackets[:n].count(k) - share * n) <= 1
    stopping = HyperbandStopping(50)
    for i in range(20):
        assert stopping.suggest().bracket == brackets[i]
        assert stopping.suggest().until == (1, 3, 9, 27, 50)[brackets[i]]
        stopping.started(i)


@pytest.mark.parametrize("maximize", [False, True])
def test_the_best_possible_value_is_promoted_and_blocks_no_other(maximize):
    best = math.inf if maximize else -math.inf
    for make in (PromotionAsha, Pasha):
        scheduler = make(9, maximize=maximize)
        for config, value in enumerate([best, 0.1, 0.1, 0.1]):
            scheduler.started(config)
            scheduler.report(config, 1, value)
        decision = scheduler.suggest()
        assert (decision.action, decision.config, decision.rank) == ("resume", 0, 1)
        scheduler.resumed(0)
        assert scheduler.suggest().config == 1
    scheduler = OneEpoch(9, configs=2, maximize=maximize)
    for config, value in enumerate([0.1, best]):
        scheduler.started(config)
        scheduler.report(config, 1, value)
    assert scheduler.suggest().config == 1


def test_a_pause_of_the_one_epoch_baseline_says_the_rank():
    scheduler = OneEpoch(9, configs=3)
    decisions = []
    for config, value in enumerate([0.2, NAN, 0.1]):
        scheduler.started(config)
        decisions.append(scheduler.report(config, 1, value))
    assert [(d.rank, d.of) for d in decisions] == [(1, 1), (2, 2), (1, 3)]


@pytest.mark.parametrize("name", list(MAKERS))
@pytest.mark.parametrize("seed", range(3))
def test_what_is_unwanted_is_paused_and_never_resumed(name, seed):
    scheduler, unwanted = MAKERS[name](9), set()
    report, resumed = scheduler.report, scheduler.resumed

    def checked_report(config, resource, value):
        assert config not in unwanted
        decision = report(config, resource, value)
        now = set(scheduler.unwanted())
        assert unwanted <= now
        unwanted.update(now)
        return decision

    def checked_resumed(config):
        assert config not in unwanted
        resumed(config)

    scheduler.report, scheduler.resumed = checked_report, checked_resumed
    simulate(scheduler, noisy(seed), range(40), workers=3, resumes_last=True)


def test_one_epoch_trains_the_best_few_to_the_end():
    curves = np.tile(np.array([3.0, 1.0, 2.0, NAN, 5.0])[:, None], (1, 6))
    replay = simulate(OneEpoch(6, configs=5, keep=2), curves, range(5), workers=2)
    assert replay.final_resources() == {0: 1, 1: 6, 2: 6, 3: 1, 4: 1}
    assert replay.slices == 5 + 2 * 5
    assert replay.returned() == 1
    with pytest.raises(ValueError, match="keep is 6; give 1 to 5"):
        OneEpoch(6, configs=5, keep=6)


# ---- against other implementations' results, where they are at hand


PEERS, TASKSET = (os.environ.get(f"OPTUNA_OHGW_{name}") for name in ("PEERS", "TASKSET"))
with_peers = pytest.mark.skipif(not (PEERS and TASKSET), reason="the peers' results are not at hand")


def table(name):
    values = pd.read_parquet(Path(TASKSET) / f"{name}.parquet", columns=["valid_loss"])["valid_loss"]
    return finite_curves(np.array(values.tolist(), dtype=float)[:, 1:])


@with_peers
def test_pasha_decides_as_the_reference_does():
    traces = sorted(Path(PEERS).glob("pasha_trace_*.json"))
    assert traces
    for trace in traces:
        scheduler = Pasha(50)
        for event in json.loads(trace.read_text())["events"]:
            if event["event"] == "suggest":
                decision = scheduler.suggest()
                assert (decision.action, decision.until) == (event["action"], event["milestone"])
                if decision.action == "resume":
                    assert decision.config == event["trial"]
                    scheduler.resumed(event["trial"])
                else:
                    scheduler.started(event["trial"])
            else:
                decision = scheduler.report(event["trial"], event["resource"], event["metric"])
                assert decision.action.upper() == event["decision"]
                assert scheduler.maximum == event["current_max_t"]
                assert scheduler.epsilon == pytest.approx(event["epsilon"], abs=1e-9)


@with_peers
@pytest.mark.parametrize(
    ("name", "make"), [("asha_stop", StoppingAsha), ("asha_promo", PromotionAsha), ("pasha", Pasha)]
)
def test_final_resources_are_those_of_the_reference(name, make):
    rows = pd.read_csv(Path(PEERS) / "final_resource_one_worker.csv.gz").query("scheduler == @name")
    for (task, _), own in rows.groupby(["table", "seed"]):
        order = own.sort_values("draw")
        replay = simulate(make(50), table(task), order["config"].tolist())
        last = replay.final_resources()
        assert [last[c] for c in order["config"]] == order["last_r"].tolist()


@with_peers
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("asha_stop", StoppingAsha),
        ("asha_promo", PromotionAsha),
        ("optuna_sha", lambda r: StoppingAsha(r, rule="optuna")),
    ],
)
def test_slices_and_answers_with_four_workers_are_those_of_the_reference(name, make):
    runs = pd.read_csv(Path(PEERS) / "runs.csv").query("scheduler == @name and workers == 4 and seed < 4")
    for run in runs.itertuples():
        curves, order = table(run.table), np.random.RandomState(1000 + run.seed).permutation(1000)[:256]
        replay = simulate(make(50), curves, order.tolist(), workers=4)
        assert replay.slices == run.slices
        assert regret(curves, replay.returned()) == pytest.approx(run.regret, abs=1e-9)
