"""``ohgw_suggest`` against a quadratic whose every step is known in closed form."""

from __future__ import annotations

import json
import math
import sqlite3
import threading
from contextlib import closing
from itertools import pairwise

import optuna
import pytest
import torch
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.samplers import RandomSampler, TPESampler
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FixedTrial, TrialState, create_trial

from optuna_ohgw.sampler import OhgwSampler, PairedSampler
from optuna_ohgw.seeds import Purpose, derive_seed
from optuna_ohgw.suggest import ohgw_suggest
from optuna_ohgw.warmstart import WarmStart

optuna.logging.set_verbosity(optuna.logging.WARNING)

SPACE = {"lr": FloatDistribution(1e-5, 1.0, log=True), "mom": FloatDistribution(0.0, 0.99)}
RAW = WarmStart(eta_h=0.1)
SAMPLERS = {
    "plain": lambda: RandomSampler(seed=0),
    "ohgw": lambda: OhgwSampler(RandomSampler(seed=0)),
}
either_sampler = pytest.mark.parametrize("kind", SAMPLERS)


def quadratic(psi):
    """Minimum at lr = 1e-2, mom = 0.5; its gradient in search coordinates is 2(z − z*)."""
    return (torch.log10(psi["lr"]) + 2) ** 2 + (psi["mom"] - 0.5) ** 2


def forbidden(psi):
    raise AssertionError("the loss must not be evaluated")


def after_one_step(psi, moved=("lr", "mom")):
    """z − 0.1·2(z − z*), by hand; names that are not moved keep their floats."""
    stepped = {"lr": 10 ** (0.8 * math.log10(psi["lr"]) - 0.4), "mom": 0.8 * psi["mom"] + 0.1}
    return {n: stepped[n] if n in moved else psi[n] for n in psi}


def close(psi):
    return pytest.approx(psi, rel=1e-12)


def value_of(psi):
    return (math.log10(psi["lr"]) + 1) ** 2 + psi["mom"]


def study_with(kind, **kwargs):
    return optuna.create_study(sampler=SAMPLERS[kind](), **kwargs)


# --- calls of one trial ----------------------------------------------------------------------


@either_sampler
def test_the_default_settings_are_the_published_rule(kind):
    trial = study_with(kind).ask()
    ohgw_suggest(trial, SPACE, quadratic)
    (record,) = trial.user_attrs["ohgw"]
    expected = math.log10(record["suggested"]["lr"]) * (1 - 2e-3) - 4e-3
    assert math.log10(record["trained"]["lr"]) == pytest.approx(expected, rel=1e-12)
    assert record["rule"] == "raw"


@either_sampler
def test_a_second_call_returns_the_same_and_adds_no_record(kind):
    trial = study_with(kind).ask()
    first = ohgw_suggest(trial, SPACE, quadratic, RAW)
    records = trial.user_attrs["ohgw"]
    assert ohgw_suggest(trial, SPACE, forbidden, RAW) == first
    assert trial.user_attrs["ohgw"] == records
    assert len(records) == 1


@either_sampler
def test_every_rung_warms_again_from_the_values_in_use(kind):
    study = study_with(kind)
    trial = study.ask()
    values = [ohgw_suggest(trial, SPACE, quadratic, RAW, every_rung=True)]
    params = trial.params
    for _ in range(2):
        values.append(ohgw_suggest(trial, SPACE, quadratic, RAW, every_rung=True))
    records = trial.user_attrs["ohgw"]
    assert [r["trained"] for r in records] == values
    assert [r["suggested"] for r in records[1:]] == values[:-1]
    for before, after in pairwise(values):
        assert after == close(after_one_step(before))
    study.tell(trial, 0.0)
    assert study.trials[0].params == params
    assert params == (values[0] if kind == "ohgw" else records[0]["suggested"])


@either_sampler
def test_every_rung_sees_the_loss_of_the_present_weights(kind):
    seen = []

    def loss_at(rung):
        def loss(psi):
            seen.append(rung)
            return quadratic(psi)

        return loss

    trial = study_with(kind).ask()
    for rung in range(3):
        ohgw_suggest(trial, SPACE, loss_at(rung), RAW, every_rung=True)
    assert sorted(set(seen)) == [0, 1, 2]


@either_sampler
def test_no_settings_suggests_and_records_that(kind):
    trial = study_with(kind).ask()
    psi = ohgw_suggest(trial, SPACE, forbidden, settings=None)
    record = {"suggested": psi, "trained": psi, "rule": None, "cost_mbu": 0.0, "fixed": []}
    assert trial.user_attrs["ohgw"] == [record]
    assert psi == trial.params


@either_sampler
@pytest.mark.parametrize("rule", ["raw", "trust-region", "line-search", "lr-grid", "gaussian"])
def test_freezing_every_name_trains_the_suggestion_bit_for_bit_under_every_rule(kind, rule):
    settings = WarmStart(rule=rule, freeze=("lr", "mom"), steps=2)
    study = study_with(kind)
    study.optimize(lambda t: value_of(ohgw_suggest(t, SPACE, quadratic, settings)), n_trials=8)
    reference = optuna.create_study(sampler=RandomSampler(seed=0))
    reference.optimize(lambda t: value_of(ohgw_suggest(t, SPACE, settings=None)), n_trials=8)
    for trial, cold in zip(study.trials, reference.trials, strict=True):
        (record,) = trial.user_attrs["ohgw"]
        assert record["trained"] == record["suggested"] == trial.params == cold.params
        assert trial.value == cold.value


@either_sampler
def test_freezing_one_name_moves_the_other_only(kind):
    trial = study_with(kind).ask()
    psi = ohgw_suggest(trial, SPACE, quadratic, WarmStart(eta_h=0.1, freeze=("lr",)))
    (record,) = trial.user_attrs["ohgw"]
    assert psi["lr"] == record["suggested"]["lr"]
    assert psi == close(after_one_step(record["suggested"], moved=("mom",)))


@either_sampler
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_trains_the_suggestion_and_says_why(kind, bad):
    study = study_with(kind)
    trial = study.ask()
    psi = ohgw_suggest(trial, SPACE, lambda p: quadratic(p) * 0 + bad, RAW)
    (record,) = trial.user_attrs["ohgw"]
    assert record["reason"] == f"the loss is {bad}"
    assert psi == record["trained"] == record["suggested"] == trial.params
    study.tell(trial, value_of(psi))
    assert study.trials[0].state == TrialState.COMPLETE
    json.dumps(record, allow_nan=False)


@either_sampler
def test_a_value_pushed_past_its_bound_is_trained_at_the_bound(kind):
    def steep(psi):
        return -1e6 * torch.log10(psi["lr"]) + 1e6 * psi["mom"]

    trial = study_with(kind).ask()
    psi = ohgw_suggest(trial, SPACE, steep, RAW)
    assert psi == {"lr": 1.0, "mom": 0.0} == trial.user_attrs["ohgw"][0]["trained"]
    assert sorted(trial.user_attrs["ohgw"][0]["at_bound"]) == ["lr", "mom"]


@either_sampler
def test_changing_the_returned_dict_does_not_change_the_record(kind):
    study = study_with(kind)
    trial = study.ask()
    psi = ohgw_suggest(trial, SPACE, quadratic, RAW)
    trained = dict(psi)
    psi.pop("lr")
    again = ohgw_suggest(trial, SPACE, quadratic, RAW)
    assert again == trained
    again.clear()
    warmer = ohgw_suggest(trial, SPACE, quadratic, RAW, every_rung=True)
    stepped = dict(warmer)
    warmer.clear()
    study.tell(trial, 0.0)
    assert [r["trained"] for r in study.trials[0].user_attrs["ohgw"]] == [trained, stepped]


@either_sampler
def test_other_user_attributes_are_left_alone(kind):
    trial = study_with(kind).ask()
    trial.set_user_attr("mine", 1)
    ohgw_suggest(trial, SPACE, quadratic, RAW)
    assert set(trial.user_attrs) == {"mine", "ohgw"}


# --- fixed values ----------------------------------------------------------------------------


@either_sampler
@pytest.mark.parametrize("settings", [RAW, None], ids=["warm", "no-settings"])
def test_a_fully_enqueued_trial_trains_its_values_and_says_so_without_a_gradient(kind, settings):
    fixed = {"lr": 0.3, "mom": 0.9}
    study = study_with(kind)
    study.enqueue_trial(fixed)
    trial = study.ask()
    assert ohgw_suggest(trial, SPACE, forbidden, settings) == fixed == trial.params
    (record,) = trial.user_attrs["ohgw"]
    assert record["trained"] == record["suggested"] == fixed
    assert (record["reason"], record["cost_mbu"]) == ("fixed", 0.0)
    assert record["fixed"] == ["lr", "mom"]


@either_sampler
@pytest.mark.parametrize("name", ["lr", "mom"])
def test_an_enqueued_value_is_trained_as_it_is_and_the_others_are_warmed(kind, name):
    fixed = {"lr": 0.3, "mom": 0.9}[name]
    (other,) = set(SPACE) - {name}
    study = study_with(kind)
    study.enqueue_trial({name: fixed})
    trial = study.ask()
    psi = ohgw_suggest(trial, SPACE, quadratic, RAW)
    (record,) = trial.user_attrs["ohgw"]
    assert psi[name] == fixed == trial.params[name]
    assert psi == record["trained"] == close(after_one_step(record["suggested"], moved=(other,)))
    assert psi[other] != record["suggested"][other]
    assert trial.params == (record["trained"] if kind == "ohgw" else record["suggested"])
    assert record["fixed"] == [name]


@either_sampler
def test_an_enqueued_value_stays_fixed_at_every_rung(kind):
    study = study_with(kind)
    study.enqueue_trial({"lr": 0.3})
    trial = study.ask()
    first = ohgw_suggest(trial, SPACE, quadratic, RAW, every_rung=True)
    second = ohgw_suggest(trial, SPACE, quadratic, RAW, every_rung=True)
    assert first["lr"] == second["lr"] == 0.3
    assert second == close(after_one_step(first, moved=("mom",)))


@either_sampler
def test_an_enqueued_value_out_of_range_is_trained_and_recorded_as_optuna_keeps_it(kind):
    study = study_with(kind)
    study.enqueue_trial({"lr": 5.0})
    trial = study.ask()
    with pytest.warns(UserWarning, match="Fixed parameter lr with value 5.0 is out of range"):
        psi = ohgw_suggest(trial, SPACE, quadratic, RAW)
    (record,) = trial.user_attrs["ohgw"]
    assert psi["lr"] == record["suggested"]["lr"] == record["trained"]["lr"] == 5.0
    assert trial.params["lr"] == 5.0


@either_sampler
def test_an_enqueued_structural_value_fixes_nothing_of_the_space(kind):
    study = study_with(kind)
    study.enqueue_trial({"depth": 3})
    trial = study.ask()
    assert trial.suggest_int("depth", 1, 4) == 3
    psi = ohgw_suggest(trial, SPACE, quadratic, RAW)
    (record,) = trial.user_attrs["ohgw"]
    assert psi == close(after_one_step(record["suggested"]))
    assert record["fixed"] == []


@pytest.mark.parametrize("every_rung", [False, True])
def test_a_fixed_trial_trains_its_values_at_every_call(every_rung):
    fixed = {"lr": 0.3, "mom": 0.9}
    trial = FixedTrial(fixed)
    for _ in range(2):
        assert ohgw_suggest(trial, SPACE, forbidden, RAW, every_rung=every_rung) == fixed
    assert trial.params == fixed
    assert {r["reason"] for r in trial.user_attrs["ohgw"]} == {"fixed"}
    assert {r["cost_mbu"] for r in trial.user_attrs["ohgw"]} == {0.0}


@either_sampler
@pytest.mark.parametrize("every_rung", [False, True])
def test_rerunning_the_objective_on_the_best_trial_gives_the_best_value(kind, every_rung):
    def objective(trial):
        psi = {}
        for _ in range(3):
            psi = ohgw_suggest(trial, SPACE, quadratic, RAW, every_rung=every_rung)
        return value_of(psi)

    study = study_with(kind)
    study.optimize(objective, n_trials=6)
    before = [t.user_attrs for t in study.trials]
    assert objective(study.best_trial) == study.best_value
    assert [t.user_attrs for t in study.trials] == before


def test_a_frozen_trial_without_a_record_trains_its_parameters():
    study = optuna.create_study(sampler=RandomSampler(seed=0))
    study.tell(study.ask(fixed_distributions=SPACE), 1.0)
    assert ohgw_suggest(study.best_trial, SPACE, forbidden, RAW) == study.best_params


# --- retries ---------------------------------------------------------------------------------


def one_trial(kind, every_rung=False):
    """A finished trial with one record, or two with ``every_rung``, and what it trained first."""
    study = study_with(kind)
    trial = study.ask()
    first = ohgw_suggest(trial, SPACE, quadratic, RAW, every_rung=every_rung)
    if every_rung:
        ohgw_suggest(trial, SPACE, quadratic, RAW, every_rung=True)
    study.tell(trial, state=TrialState.FAIL)
    return study, study.trials[0], first


@either_sampler
@pytest.mark.parametrize("thawed", [False, True], ids=["params", "fixed-params"])
def test_a_retry_trains_the_same_values_without_a_second_warp(kind, thawed):
    study, failed, first = one_trial(kind)
    study.add_trial(
        create_trial(
            state=TrialState.WAITING,
            params=failed.params,
            distributions=failed.distributions,
            user_attrs=failed.user_attrs,
            system_attrs={"fixed_params": failed.params} if thawed else None,
        )
    )
    retry = study.ask()
    assert retry.number == 1
    for _ in range(2):
        assert ohgw_suggest(retry, SPACE, forbidden, RAW) == first
    study.tell(retry, 0.0)
    assert study.trials[1].user_attrs["ohgw"] == failed.user_attrs["ohgw"]
    assert study.trials[1].params == failed.params


@either_sampler
def test_a_retry_by_enqueue_trial_with_the_record_trains_the_same_values(kind):
    study, failed, first = one_trial(kind)
    study.enqueue_trial(failed.params, user_attrs=failed.user_attrs)
    retry = study.ask()
    assert ohgw_suggest(retry, SPACE, forbidden, RAW) == first
    assert retry.params == failed.params
    assert retry.user_attrs["ohgw"] == failed.user_attrs["ohgw"]


@either_sampler
@pytest.mark.parametrize("thawed", [False, True], ids=["params", "fixed-params"])
def test_a_retry_replays_the_first_record_only_and_warms_again_at_later_rungs(kind, thawed):
    study, failed, first = one_trial(kind, every_rung=True)
    assert len(failed.user_attrs["ohgw"]) == 2
    study.add_trial(
        create_trial(
            state=TrialState.WAITING,
            params=failed.params,
            distributions=failed.distributions,
            user_attrs=failed.user_attrs,
            system_attrs={"fixed_params": failed.params} if thawed else None,
        )
    )
    retry = study.ask()
    assert ohgw_suggest(retry, SPACE, forbidden, RAW, every_rung=True) == first
    assert retry.user_attrs["ohgw"] == failed.user_attrs["ohgw"][:1]
    second = ohgw_suggest(retry, SPACE, quadratic, RAW, every_rung=True)
    assert second == failed.user_attrs["ohgw"][1]["trained"]
    assert len(retry.user_attrs["ohgw"]) == 2


@pytest.fixture
def stale_study(tmp_path):
    """A study on SQLite with heartbeats, and a function that makes its running trials stale."""
    path = tmp_path / "study.db"
    storage = RDBStorage(
        f"sqlite:///{path}",
        heartbeat_interval=60,
        heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=1),
    )

    def make_stale(trial):
        storage.record_heartbeat(trial._trial_id)
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("UPDATE trial_heartbeats SET heartbeat = '2000-01-01 00:00:00'")

    return storage, make_stale


beats_outside_optimize = pytest.mark.filterwarnings(
    "ignore:Heartbeat of storage is supposed to be used with Study.optimize"
)


@either_sampler
@beats_outside_optimize
def test_a_worker_that_died_in_training_is_retried_with_the_same_values(kind, stale_study):
    storage, make_stale = stale_study
    study = study_with(kind, storage=storage)
    lost = study.ask()
    first = ohgw_suggest(lost, SPACE, quadratic, RAW)
    make_stale(lost)
    retried = []

    def objective(trial):
        retried.append(ohgw_suggest(trial, SPACE, forbidden, RAW))
        return value_of(retried[0])

    study.optimize(objective, n_trials=1)
    assert [t.state for t in study.trials] == [TrialState.FAIL, TrialState.COMPLETE]
    assert retried == [first]
    assert study.trials[1].params == study.trials[0].params
    assert study.trials[1].user_attrs["ohgw"] == study.trials[0].user_attrs["ohgw"]
    assert len(study.trials[1].user_attrs["ohgw"]) == 1


@either_sampler
@beats_outside_optimize
def test_a_worker_that_died_in_the_warm_start_is_retried_with_a_whole_one(kind, stale_study):
    def killed(psi):
        raise KeyboardInterrupt

    storage, make_stale = stale_study
    study = study_with(kind, storage=storage)
    lost = study.ask()
    with pytest.raises(KeyboardInterrupt):
        ohgw_suggest(lost, SPACE, killed, RAW)
    make_stale(lost)
    study.optimize(lambda t: value_of(ohgw_suggest(t, SPACE, quadratic, RAW)), n_trials=1)
    dead, retry = study.trials
    (record,) = retry.user_attrs["ohgw"]
    assert record["trained"] == close(after_one_step(record["suggested"]))
    assert retry.params == (record["trained"] if kind == "ohgw" else record["suggested"])
    if kind == "plain":
        assert record["suggested"] == dead.params


def test_a_retry_of_a_trial_that_stored_some_trained_values_only_keeps_those():
    study = study_with("ohgw")
    study.add_trial(
        create_trial(
            state=TrialState.WAITING,
            params={"lr": 0.3},
            distributions={"lr": SPACE["lr"]},
            system_attrs={"failed_trial": 0, "retry_history": [0]},
        )
    )
    trial = study.ask()
    psi = ohgw_suggest(trial, SPACE, quadratic, RAW)
    (record,) = trial.user_attrs["ohgw"]
    assert psi == trial.params == record["trained"]
    assert psi == close(after_one_step(record["suggested"], moved=("mom",)))
    assert (psi["lr"], record["fixed"]) == (0.3, ["lr"])


@pytest.mark.parametrize("base", [RandomSampler, TPESampler])
@pytest.mark.parametrize("wrap", [lambda s: s, OhgwSampler], ids=["plain", "ohgw"])
def test_a_call_after_a_warm_start_that_raised_trains_the_same_suggestion(base, wrap):
    def out_of_memory(psi):
        raise MemoryError

    reference = optuna.create_study(sampler=base(seed=0))
    study = optuna.create_study(sampler=wrap(base(seed=0)))
    for _ in range(12):  # TPE draws jointly from the eleventh on
        cold = reference.ask(fixed_distributions=SPACE)
        reference.tell(cold, value_of(cold.params))
        trial = study.ask()
        if trial.number >= 10:
            with pytest.raises(MemoryError):
                ohgw_suggest(trial, SPACE, out_of_memory, RAW)
        psi = ohgw_suggest(trial, SPACE, settings=None)
        study.tell(trial, value_of(psi))
        if base is TPESampler:  # independent draws are made anew after an error
            assert psi == trial.params == cold.params


# --- random controls -------------------------------------------------------------------------


def control(position, seed=0, *, earlier=0, kind="ohgw", settings=None):
    """The record of a random control at ``position``, suggested at a fixed point."""
    sampler = PairedSampler(0)
    study = optuna.create_study(sampler=OhgwSampler(sampler) if kind == "ohgw" else sampler)
    for _ in range(earlier):
        study.tell(study.ask(), 0.0)
    study.enqueue_trial({}, user_attrs={"config_index": position})
    trial = study.ask()
    settings = settings or WarmStart(eta_h=0.1, random=True)
    ohgw_suggest(trial, SPACE, quadratic, settings, seed=seed)
    return trial.user_attrs["ohgw"][0]


@either_sampler
def test_a_random_control_depends_on_seed_and_position_alone(kind):
    record = control(3, kind=kind)
    assert control(3, kind=kind)["trained"] == record["trained"]
    assert control(3, kind=kind, earlier=5)["trained"] == record["trained"]
    assert control(3, seed=1, kind=kind)["step"] != record["step"]
    assert control(3, seed=1, kind=kind)["suggested"] == record["suggested"]


def test_without_a_config_index_the_position_is_the_number_of_the_trial():
    study = optuna.create_study(sampler=OhgwSampler(PairedSampler(0)))
    settings = WarmStart(eta_h=0.1, random=True)
    for position in range(3):
        trial = study.ask()
        ohgw_suggest(trial, SPACE, quadratic, settings)
        assert trial.user_attrs["ohgw"][0]["trained"] == control(position)["trained"]


@pytest.mark.parametrize(("seed", "position"), [(0, 0), (0, 4), (9, 4)])
def test_gaussian_noise_comes_from_the_stream_of_seed_and_position(seed, position):
    record = control(position, seed, settings=WarmStart(rule="gaussian", sigma=1e-3))
    stream = torch.Generator().manual_seed(derive_seed(seed, Purpose.CONTROL, position, 0))
    noise = torch.randn(2, generator=stream, dtype=torch.float64)
    step = [record["step"]["lr"], record["step"]["mom"]]
    assert step == pytest.approx((1e-3 * noise).tolist(), rel=1e-5)  # a record keeps six digits


def test_each_rung_has_random_numbers_of_its_own():
    study = optuna.create_study(sampler=OhgwSampler(PairedSampler(0)))
    trial = study.ask()
    settings = WarmStart(rule="gaussian", sigma=1e-3)
    for _ in range(2):
        ohgw_suggest(trial, SPACE, quadratic, settings, every_rung=True)
    first, second = (r["step"]["lr"] for r in trial.user_attrs["ohgw"])
    assert abs(first - second) > 1e-6


def test_no_global_random_stream_is_drawn_from():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    control(0)
    assert torch.equal(torch.get_rng_state(), before)


# --- threads and errors ----------------------------------------------------------------------


@either_sampler
def test_two_threads_may_warm_trials_of_one_study(kind):
    study = study_with(kind)
    meet = threading.Barrier(2)

    def objective(trial):
        meet.wait(timeout=30)
        psi = ohgw_suggest(trial, SPACE, quadratic, RAW, every_rung=True)
        ohgw_suggest(trial, SPACE, quadratic, RAW, every_rung=True)
        return value_of(psi)

    study.optimize(objective, n_trials=8, n_jobs=2)
    for trial in study.trials:
        first, second = trial.user_attrs["ohgw"]
        assert first["trained"] == close(after_one_step(first["suggested"]))
        assert second["suggested"] == first["trained"]
        assert trial.params == (first["trained"] if kind == "ohgw" else first["suggested"])


@either_sampler
@pytest.mark.parametrize("names", [("lr",), ("mom",), ("lr", "mom")])
def test_names_that_study_ask_suggested_are_refused_and_named(kind, names):
    trial = study_with(kind).ask(fixed_distributions={n: SPACE[n] for n in names})
    listed = str(sorted(names)).replace("[", r"\[").replace("]", r"\]")
    message = (
        rf"^{listed} have been suggested before ohgw_suggest, too late for a warm start; "
        r"let ohgw_suggest suggest them, and do not pass them to study\.ask$"
    )
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            ohgw_suggest(trial, SPACE, quadratic, RAW)
    assert "ohgw" not in trial.user_attrs


@either_sampler
def test_a_name_that_the_objective_suggested_is_refused(kind):
    trial = study_with(kind).ask()
    trial.suggest_float("mom", 0.0, 0.99)
    with pytest.raises(ValueError, match=r"^\['mom'\] have been suggested before ohgw_suggest"):
        ohgw_suggest(trial, SPACE, quadratic, RAW)


@either_sampler
def test_structural_names_in_study_ask_are_no_error(kind):
    trial = study_with(kind).ask(fixed_distributions={"depth": IntDistribution(1, 4)})
    psi = ohgw_suggest(trial, SPACE, quadratic, RAW)
    assert psi == close(after_one_step(trial.user_attrs["ohgw"][0]["suggested"]))


@either_sampler
def test_a_warm_start_without_a_loss_is_refused(kind):
    trial = study_with(kind).ask()
    message = r"^loss is None but a warm start needs one; pass settings=None$"
    with pytest.raises(ValueError, match=message):
        ohgw_suggest(trial, SPACE, settings=RAW)
    assert "ohgw" not in trial.user_attrs


@either_sampler
@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "the space is empty"),
        ({"depth": IntDistribution(1, 4)}, "'depth' must be a FloatDistribution without a step"),
        (
            {"w": FloatDistribution(0, 1, step=0.5)},
            "'w' must be a FloatDistribution without a step",
        ),
        ({"w": FloatDistribution(1, 1)}, "'w' has low == high"),
    ],
)
def test_a_space_that_cannot_be_warmed_is_refused_before_any_suggestion(kind, space, message):
    trial = study_with(kind).ask()
    with pytest.raises(ValueError, match=f"^{message}"):
        ohgw_suggest(trial, space, quadratic, RAW)
    assert trial.params == {}
