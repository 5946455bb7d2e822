"""The samplers against Optuna's public suite, their own base samplers and scipy."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable

import numpy as np
import optuna
import pytest
import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import HyperbandPruner, SuccessiveHalvingPruner
from optuna.samplers import (
    BaseSampler,
    CmaEsSampler,
    GPSampler,
    NSGAIISampler,
    QMCSampler,
    RandomSampler,
    TPESampler,
)
from optuna.storages import InMemoryStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.testing.pytest_samplers import (
    BasicSamplerTestCase,
    MultiObjectiveSamplerTestCase,
    RelativeSamplerTestCase,
)
from optuna.trial import TrialState
from scipy.stats import qmc

from optuna_ohgw.sampler import OhgwSampler, PairedSampler
from optuna_ohgw.seeds import Purpose, derive_seed
from optuna_ohgw.suggest import ohgw_suggest
from optuna_ohgw.warmstart import WarmStart

optuna.logging.set_verbosity(optuna.logging.WARNING)

BASES: dict[str, Callable[[], BaseSampler]] = {
    "random": lambda: RandomSampler(seed=0),
    "tpe": lambda: TPESampler(seed=0, n_startup_trials=4),
    "gp": lambda: GPSampler(seed=0, n_startup_trials=4),
    "qmc": lambda: QMCSampler(seed=0, warn_independent_sampling=False),
    "nsga2": lambda: NSGAIISampler(seed=0, population_size=6),
}
# The relative suite asks for a joint draw after one trial; NSGA-II has none before a generation.
RELATIVE: dict[str, Callable[[], BaseSampler]] = {
    "tpe": lambda: TPESampler(seed=0, n_startup_trials=0),
    "gp": lambda: GPSampler(seed=0, n_startup_trials=0),
    "qmc": BASES["qmc"],
}
# Three draws of a Gaussian process hold as much as sixteen, and cost less.
NULL = {**BASES, "gp": lambda: GPSampler(seed=0, n_startup_trials=17)}
SPACE = {"lr": FloatDistribution(1e-5, 1.0, log=True), "mom": FloatDistribution(0.0, 0.99)}
RAW = WarmStart(eta_h=0.1)


def quadratic(psi):
    """Minimum at lr = 1e-2, mom = 0.5; its gradient in search coordinates is 2(z − z*)."""
    return (torch.log10(psi["lr"]) + 2) ** 2 + (psi["mom"] - 0.5) ** 2


def after_one_step(psi):
    """z − 0.1·2(z − z*), by hand."""
    return {"lr": 10 ** (0.8 * math.log10(psi["lr"]) - 0.4), "mom": 0.8 * psi["mom"] + 0.1}


def value_of(psi):
    return (math.log10(psi["lr"]) + 1) ** 2 + psi["mom"]


def plain_values(trial):
    return {n: trial.suggest_float(n, d.low, d.high, log=d.log) for n, d in SPACE.items()}


def slow_gp(names):
    return [pytest.param(n, marks=pytest.mark.slow) if n == "gp" else n for n in names]


class Suite:
    @pytest.fixture
    def sampler(self, base):
        return lambda: OhgwSampler(BASES[base]())


@pytest.mark.parametrize("base", slow_gp(BASES))
class TestOhgwSamplerPassesOptunasBasicSuite(Suite, BasicSamplerTestCase):
    pass


@pytest.mark.parametrize("base", slow_gp(RELATIVE))
class TestOhgwSamplerPassesOptunasRelativeSuite(RelativeSamplerTestCase):
    @pytest.fixture
    def sampler(self, base):
        return lambda: OhgwSampler(RELATIVE[base]())


@pytest.mark.parametrize("base", slow_gp(BASES))
class TestOhgwSamplerPassesOptunasMultiObjectiveSuite(Suite, MultiObjectiveSamplerTestCase):
    pass


@pytest.mark.parametrize("names", [(), ("x", "y")])
class TestPairedSamplerPassesOptunasBasicSuite(BasicSamplerTestCase):
    @pytest.fixture
    def sampler(self, names):
        return lambda: PairedSampler(0, names=names)


@pytest.mark.parametrize("names", [(), ("x", "y")])
class TestPairedSamplerPassesOptunasMultiObjectiveSuite(MultiObjectiveSamplerTestCase):
    @pytest.fixture
    def sampler(self, names):
        return lambda: PairedSampler(0, names=names)


def structure(trial):
    """Structural parameters: categorical, integer, discrete float, conditional."""
    if trial.suggest_categorical("kind", ["a", "b"]) == "a":
        depth = trial.suggest_int("depth", 1, 4)
    else:
        depth = trial.suggest_float("dropout", 0.0, 0.5)
    return trial.suggest_float("width", 0.25, 2.0, step=0.25) * depth


@pytest.mark.parametrize(
    ("base", "structural"),
    [
        pytest.param(base, structural, marks=[pytest.mark.slow] * (base == "gp" and structural))
        for base in NULL
        for structural in (False, True)
    ],
)
@pytest.mark.parametrize(
    "settings",
    [None, WarmStart(freeze=("lr", "mom"))],
    ids=["no-step", "all-frozen"],
)
def test_without_a_step_the_draws_of_twenty_trials_are_the_base_samplers_bit_for_bit(
    base, structural, settings
):
    def plain(trial):
        extra = structure(trial) if structural else 0.0
        return value_of(plain_values(trial)) + extra

    def wrapped(trial):
        extra = structure(trial) if structural else 0.0
        return value_of(ohgw_suggest(trial, SPACE, quadratic, settings)) + extra

    ours = optuna.create_study(sampler=OhgwSampler(NULL[base]()))
    theirs = optuna.create_study(sampler=NULL[base]())
    ours.optimize(wrapped, n_trials=20)
    theirs.optimize(plain, n_trials=20)
    assert [t.params for t in ours.trials] == [t.params for t in theirs.trials]
    assert [t.value for t in ours.trials] == [t.value for t in theirs.trials]
    assert [t.distributions for t in ours.trials] == [t.distributions for t in theirs.trials]
    assert len({t.params["lr"] for t in ours.trials}) >= 6  # the genetic algorithm repeats some


@pytest.mark.parametrize("base", BASES)
def test_the_first_suggestions_are_the_base_samplers_with_a_step_too(base):
    # Until a model has history (4 trials, one population of 6), no draw depends on a value.
    suggested = []

    def wrapped(trial):
        value = value_of(ohgw_suggest(trial, SPACE, quadratic, RAW))
        suggested.append(trial.user_attrs["ohgw"][0]["suggested"])
        return value

    ours = optuna.create_study(sampler=OhgwSampler(BASES[base]()))
    theirs = optuna.create_study(sampler=BASES[base]())
    ours.optimize(wrapped, n_trials=4)
    theirs.optimize(lambda t: value_of(plain_values(t)), n_trials=4)
    assert suggested == [t.params for t in theirs.trials]


@pytest.mark.parametrize("base", ["tpe", "qmc"])
def test_a_fully_enqueued_trial_does_not_shift_the_draws(base):
    def study_of(sampler, values):
        study = optuna.create_study(sampler=sampler)
        for number in range(10):
            if number in (5, 7):
                study.enqueue_trial({"lr": 0.1, "mom": 0.2})
            study.optimize(lambda t: value_of(values(t)), n_trials=1)
        return study

    ours = study_of(OhgwSampler(BASES[base]()), lambda t: ohgw_suggest(t, SPACE, settings=None))
    theirs = study_of(BASES[base](), plain_values)
    assert [t.params for t in ours.trials] == [t.params for t in theirs.trials]


def test_a_range_that_changes_falls_back_to_an_independent_draw_as_the_base_does():
    def study_of(sampler, values):
        study = optuna.create_study(sampler=sampler)
        for number in range(16):
            high = 0.5 if number < 8 else 0.05  # the joint draw is mostly out of the new range
            space = {**SPACE, "mom": FloatDistribution(0.0, high)}
            study.optimize(lambda t, s=space: value_of(values(t, s)), n_trials=1)
        return study

    def plain(trial, space):
        return {n: trial.suggest_float(n, d.low, d.high, log=d.log) for n, d in space.items()}

    ours = study_of(OhgwSampler(BASES["tpe"]()), lambda t, s: ohgw_suggest(t, s, settings=None))
    theirs = study_of(BASES["tpe"](), plain)
    assert [t.params for t in ours.trials] == [t.params for t in theirs.trials]


def test_structural_and_discrete_parameters_are_left_to_the_base_sampler_when_others_move():
    def objective(trial):
        extra = structure(trial)
        psi = ohgw_suggest(trial, SPACE, quadratic, RAW)
        assert (trial.params["width"] / 0.25).is_integer()
        assert set(trial.user_attrs["ohgw"][0]["trained"]) == {"lr", "mom"}
        return value_of(psi) + extra

    def plain(trial):
        return structure(trial) + value_of(plain_values(trial))

    ours = optuna.create_study(sampler=OhgwSampler(RandomSampler(seed=3)))
    theirs = optuna.create_study(sampler=RandomSampler(seed=3))
    ours.optimize(objective, n_trials=20)
    theirs.optimize(plain, n_trials=20)
    for warm, cold in zip(ours.trials, theirs.trials, strict=True):
        structural = set(cold.params) - set(SPACE)
        assert {n: warm.params[n] for n in structural} == {n: cold.params[n] for n in structural}
        assert warm.user_attrs["ohgw"][0]["suggested"] == {n: cold.params[n] for n in SPACE}
        assert warm.params["lr"] != cold.params["lr"]
    assert {len(t.params) for t in ours.trials} == {5}
    assert any("depth" in t.params for t in ours.trials)
    assert any("dropout" in t.params for t in ours.trials)


def test_joint_draws_stay_visible_in_relative_params():
    study = optuna.create_study(sampler=OhgwSampler(TPESampler(seed=0, n_startup_trials=1)))
    study.optimize(lambda t: value_of(ohgw_suggest(t, SPACE, quadratic, RAW)), n_trials=3)
    trial = study.ask()
    ohgw_suggest(trial, SPACE, quadratic, RAW)
    assert trial.relative_params == trial.user_attrs["ohgw"][0]["suggested"]


def test_a_base_sampler_that_returns_the_same_dict_each_time_keeps_it_whole():
    class Constant(RandomSampler):
        drawn = {"lr": 1e-3, "mom": 0.25}  # noqa: RUF012

        def infer_relative_search_space(self, study, trial):
            return dict(SPACE)

        def sample_relative(self, study, trial, search_space):
            return self.drawn

    def loss(psi):
        assert set(Constant.drawn) == {"lr", "mom"}  # in the middle of a warm start too
        return quadratic(psi)

    study = optuna.create_study(sampler=OhgwSampler(Constant()))
    study.optimize(lambda t: value_of(ohgw_suggest(t, SPACE, loss, RAW)), n_trials=2)
    for trial in study.trials:
        assert trial.user_attrs["ohgw"][0]["suggested"] == {"lr": 1e-3, "mom": 0.25}


# --- what is recorded ------------------------------------------------------------------------


@pytest.fixture(params=["memory", "sqlite", "journal"])
def open_storage(request, tmp_path):
    """A function that opens the same storage anew (in memory: returns the same one)."""
    if request.param == "memory":
        storage = InMemoryStorage()
        return lambda: storage
    if request.param == "sqlite":
        return lambda: RDBStorage(f"sqlite:///{tmp_path / 'study.db'}")
    return lambda: JournalStorage(JournalFileBackend(str(tmp_path / "study.log")))


def warm_and_remember(returned):
    def objective(trial):
        psi = ohgw_suggest(trial, SPACE, quadratic, RAW)
        returned[trial.number] = (dict(psi), trial.params)
        psi.clear()  # the caller's dict is the caller's own
        return value_of(returned[trial.number][0])

    return objective


@pytest.mark.parametrize("base", ["random", "tpe"])
def test_with_ohgw_sampler_every_view_of_a_trial_holds_the_trained_values(open_storage, base):
    seen: dict[int, dict] = {}

    class Spy(type(BASES[base]())):
        def infer_relative_search_space(self, study, trial):
            seen.update({t.number: t.params for t in study.get_trials(deepcopy=False)[:-1]})
            return super().infer_relative_search_space(study, trial)

    returned: dict[int, tuple[dict, dict]] = {}
    sampler = OhgwSampler(Spy(seed=0))
    study = optuna.create_study(study_name="s", storage=open_storage(), sampler=sampler)
    study.optimize(warm_and_remember(returned), n_trials=14)
    reloaded = optuna.load_study(study_name="s", storage=open_storage())
    for view in (study, reloaded):
        for trial in view.trials:
            (record,) = trial.user_attrs["ohgw"]
            trained, live = returned[trial.number]
            assert trial.params == live == trained == record["trained"]
            assert record["trained"] != record["suggested"]
            assert trained == pytest.approx(after_one_step(record["suggested"]), rel=1e-12)
            assert trial.value == value_of(trial.params)
        assert view.best_params == returned[view.best_trial.number][0]
    assert seen == {number: returned[number][0] for number in range(13)}


def test_without_ohgw_sampler_params_hold_the_suggestion_and_the_record_the_trained(open_storage):
    returned: dict[int, tuple[dict, dict]] = {}
    sampler = RandomSampler(seed=0)
    study = optuna.create_study(study_name="s", storage=open_storage(), sampler=sampler)
    study.optimize(warm_and_remember(returned), n_trials=5)
    cold = optuna.create_study(sampler=RandomSampler(seed=0))
    cold.optimize(lambda t: value_of(plain_values(t)), n_trials=5)
    reloaded = optuna.load_study(study_name="s", storage=open_storage())
    for trial, reference in zip(reloaded.trials, cold.trials, strict=True):
        (record,) = trial.user_attrs["ohgw"]
        trained, live = returned[trial.number]
        assert trial.params == live == record["suggested"] == reference.params
        assert trained == record["trained"]
        assert trained == pytest.approx(after_one_step(reference.params), rel=1e-12)


def test_importances_and_trials_dataframe_see_the_trained_values():
    study = optuna.create_study(sampler=OhgwSampler(RandomSampler(seed=0)))
    study.optimize(lambda t: value_of(ohgw_suggest(t, SPACE, quadratic, RAW)), n_trials=8)
    assert list(study.trials_dataframe()["params_lr"]) == [
        t.user_attrs["ohgw"][0]["trained"]["lr"] for t in study.trials
    ]
    assert set(optuna.importance.get_param_importances(study)) == {"lr", "mom"}


def rungs(trial):
    psi = ohgw_suggest(trial, SPACE, quadratic, RAW)
    for step in range(1, 10):
        trial.report(value_of(psi) + 1 / step, step)
        if trial.should_prune():
            raise optuna.TrialPruned
    return value_of(psi)


@pytest.mark.parametrize("base", ["tpe", "random", "nsga2"])
@pytest.mark.parametrize(
    "pruner",
    [
        HyperbandPruner(min_resource=1, max_resource=9, reduction_factor=3),
        SuccessiveHalvingPruner(min_resource=1, reduction_factor=3),
    ],
    ids=["hyperband", "halving"],
)
def test_pruned_and_complete_trials_record_the_trained_values_under_a_pruner(base, pruner):
    study = optuna.create_study(sampler=OhgwSampler(BASES[base]()), pruner=pruner)
    study.optimize(rungs, n_trials=24)
    assert {t.state for t in study.trials} == {TrialState.COMPLETE, TrialState.PRUNED}
    for trial in study.trials:
        (record,) = trial.user_attrs["ohgw"]
        assert trial.params == record["trained"]
        assert trial.params == pytest.approx(after_one_step(record["suggested"]), rel=1e-12)


def test_two_threads_that_warm_at_the_same_moment_keep_their_own_trials():
    meet = threading.Barrier(2)
    returned = {}

    def objective(trial):
        met = []

        def loss(psi):
            if not met:
                met.append(meet.wait(timeout=30))  # both requests are open here
            return quadratic(psi)

        returned[trial.number] = ohgw_suggest(trial, SPACE, loss, RAW)
        return value_of(returned[trial.number])

    study = optuna.create_study(sampler=OhgwSampler(PairedSampler(4)))
    study.optimize(objective, n_trials=8, n_jobs=2)
    for trial in study.trials:
        (record,) = trial.user_attrs["ohgw"]
        assert trial.params == record["trained"] == returned[trial.number]
        assert record["suggested"] == paired_draws(4, [trial.number])[0]
        assert trial.params == pytest.approx(after_one_step(record["suggested"]), rel=1e-12)


CHILD = """
import sys
import optuna, torch
from optuna.distributions import FloatDistribution
from optuna_ohgw.sampler import OhgwSampler, PairedSampler
from optuna_ohgw.suggest import ohgw_suggest
from optuna_ohgw.warmstart import WarmStart

torch.set_num_threads(1)
space = {"lr": FloatDistribution(1e-5, 1.0, log=True), "mom": FloatDistribution(0.0, 0.99)}
study = optuna.load_study(
    study_name="s", storage=sys.argv[1], sampler=OhgwSampler(PairedSampler(4))
)

def loss(psi):
    return (torch.log10(psi["lr"]) + 2) ** 2 + (psi["mom"] - 0.5) ** 2

def objective(trial):
    psi = ohgw_suggest(trial, space, loss, WarmStart(eta_h=0.1))
    trial.set_user_attr("returned", psi)
    return psi["lr"]

study.optimize(objective, n_trials=4)
"""


@pytest.mark.slow
def test_three_processes_on_one_sqlite_file_share_the_sequence_and_record_what_they_train(
    tmp_path,
):
    url = f"sqlite:///{tmp_path / 'study.db'}"
    study = optuna.create_study(study_name="s", storage=url)
    path = os.pathsep.join(p for p in sys.path if p)
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, url],
            env={**os.environ, "PYTHONPATH": path},
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for child in children:
        _, errors = child.communicate(timeout=120)
        assert child.returncode == 0, errors
    trials = study.trials
    assert [t.number for t in trials] == list(range(12))
    expected = paired_draws(4, range(12))
    for trial in trials:
        (record,) = trial.user_attrs["ohgw"]
        assert trial.state == TrialState.COMPLETE
        assert trial.params == record["trained"] == trial.user_attrs["returned"]
        assert record["suggested"] == expected[trial.number]


# --- delegation and warnings -----------------------------------------------------------------


def test_without_a_call_of_ohgw_suggest_it_is_its_base_sampler():
    def objective(trial):
        return value_of(plain_values(trial)) + structure(trial)

    ours = optuna.create_study(sampler=OhgwSampler(BASES["tpe"]()))
    theirs = optuna.create_study(sampler=BASES["tpe"]())
    ours.optimize(objective, n_trials=15)
    theirs.optimize(objective, n_trials=15)
    assert [t.params for t in ours.trials] == [t.params for t in theirs.trials]
    assert all("ohgw" not in t.user_attrs for t in ours.trials)


def test_every_hook_of_the_base_sampler_is_called():
    calls = []

    class Spy(RandomSampler):
        def before_trial(self, study, trial):
            calls.append(("before", trial.number))

        def after_trial(self, study, trial, state, values):
            calls.append(("after", trial.number, state, list(values)))

        def reseed_rng(self):
            calls.append("reseed")

    sampler = OhgwSampler(Spy())
    study = optuna.create_study(sampler=sampler)
    study.optimize(lambda t: float(t.number), n_trials=2)
    sampler.reseed_rng()
    assert calls == [
        ("before", 0),
        ("after", 0, TrialState.COMPLETE, [0.0]),
        ("before", 1),
        ("after", 1, TrialState.COMPLETE, [1.0]),
        "reseed",
    ]


def test_a_warm_start_that_raises_leaves_no_request_behind():
    def broken(psi):
        raise RuntimeError("out of memory")

    study = optuna.create_study(sampler=OhgwSampler(RandomSampler(seed=0)))
    trial = study.ask()
    with pytest.raises(RuntimeError, match="out of memory"):
        ohgw_suggest(trial, SPACE, broken, RAW)
    assert trial.params == {}
    later = study.ask()
    assert 0.0 <= later.suggest_float("mom", 0.0, 0.99) <= 0.99
    assert "ohgw" not in later.user_attrs


def test_cma_es_warns_and_names_other_samplers():
    message = (
        r"^CmaEsSampler will be told warmed points that it did not propose; its covariance may "
        r"adapt badly\. Use TPESampler, GPSampler or RandomSampler\.$"
    )
    with pytest.warns(UserWarning, match=message) as caught:
        OhgwSampler(CmaEsSampler())
    assert [os.path.basename(w.filename) for w in caught] == ["test_sampler.py"]


@pytest.mark.parametrize("base", BASES)
def test_other_bases_do_not_warn(base):
    inner = BASES[base]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert OhgwSampler(inner).base is inner


# --- PairedSampler ---------------------------------------------------------------------------


def draw(study, names=("lr", "mom")):
    trial = study.ask()
    psi = {n: trial.suggest_float(n, SPACE[n].low, SPACE[n].high, log=SPACE[n].log) for n in names}
    study.tell(trial, value_of(psi) if len(psi) == 2 else 0.0)
    return psi


def paired_draws(seed, positions, *, names=(), earlier=0):
    """Suggestions at ``positions``, each asked for by a trial with that ``config_index``."""
    study = optuna.create_study(sampler=PairedSampler(seed, names=names))
    for _ in range(earlier):
        draw(study)
    drawn = []
    for position in positions:
        study.enqueue_trial({}, user_attrs={"config_index": position})
        drawn.append(draw(study))
    return drawn


both_forms = pytest.mark.parametrize("names", [(), ("lr", "mom")], ids=["random", "sobol"])


@both_forms
def test_the_kth_suggestion_depends_on_the_seed_and_k_alone(names):
    first = optuna.create_study(study_name="a", sampler=PairedSampler(0, names=names))
    by_number = [draw(first) for _ in range(8)]
    assert paired_draws(0, range(8), names=names) == by_number
    assert paired_draws(0, range(8), names=names, earlier=3) == by_number
    order = [5, 0, 7, 2, 6, 1, 4, 3]
    assert paired_draws(0, order, names=names) == [by_number[k] for k in order]
    assert paired_draws(0, [3, 3], names=names) == [by_number[3]] * 2
    other = paired_draws(1, range(8), names=names)
    for name in SPACE:
        assert not {psi[name] for psi in by_number} & {psi[name] for psi in other}
        assert len({psi[name] for psi in by_number}) == 8


@both_forms
def test_the_suggestion_does_not_depend_on_the_order_of_names_in_a_trial(names):
    forwards = optuna.create_study(sampler=PairedSampler(0, names=names))
    backwards = optuna.create_study(sampler=PairedSampler(0, names=names))
    for _ in range(4):
        assert draw(forwards) == draw(backwards, ("mom", "lr"))


@both_forms
def test_running_trials_do_not_shift_the_suggestion(names):
    study = optuna.create_study(sampler=PairedSampler(0, names=names))
    trials = [study.ask() for _ in range(6)]
    drawn = {t.number: plain_values(t) for t in reversed(trials)}
    assert [drawn[k] for k in range(6)] == paired_draws(0, range(6), names=names)


def test_a_config_index_set_by_the_objective_counts():
    study = optuna.create_study(sampler=PairedSampler(0))
    trial = study.ask()
    trial.set_user_attr("config_index", 9)
    assert plain_values(trial) == paired_draws(0, [9])[0]


@both_forms
def test_two_parameters_of_a_trial_are_independent_and_uniform(names):
    drawn = paired_draws(0, range(500), names=names)
    unit = np.array([[(math.log10(p["lr"]) + 5) / 5, p["mom"] / 0.99] for p in drawn])
    # A correlation of independent draws has deviation 1/√500 = 0.045.
    assert abs(np.corrcoef(unit.T)[0, 1]) < 0.15
    # A mean of 500 uniform draws has deviation √(1/12/500) = 0.013.
    assert np.abs(unit.mean(0) - 0.5).max() < 0.05
    assert abs(np.corrcoef(unit[:-1, 0], unit[1:, 0])[0, 1]) < (0.15 if not names else 1.0)


def test_parameters_with_other_names_get_other_random_draws():
    study = optuna.create_study(sampler=PairedSampler(0))
    trial = study.ask()
    assert trial.suggest_float("a", 0.0, 1.0) != trial.suggest_float("b", 0.0, 1.0)


def sobol_reference(seed, dimension, n):
    rng = np.random.default_rng(derive_seed(seed, Purpose.SUGGEST))
    return qmc.Sobol(dimension, scramble=True, rng=rng).random(n)


@pytest.mark.parametrize("seed", [0, 11])
def test_sobol_suggestions_are_scipys_points_one_by_one(seed):
    points = sobol_reference(seed, 2, 32)
    drawn = paired_draws(seed, range(32), names=("lr", "mom"))
    for psi, (first, second) in zip(drawn, points, strict=True):
        assert math.log10(psi["lr"]) == pytest.approx(-5 + 5 * first, abs=1e-12)
        assert psi["mom"] == pytest.approx(0.99 * second, abs=1e-15)


def test_the_order_of_names_is_the_order_of_sobol_dimensions():
    points = sobol_reference(0, 2, 4)
    drawn = paired_draws(0, range(4), names=("mom", "lr"))
    assert [p["mom"] for p in drawn] == pytest.approx(list(0.99 * points[:, 0]), abs=1e-15)


def test_sobol_suggestions_cover_the_square_better_than_random_ones():
    def discrepancy(seed, names):
        drawn = paired_draws(seed, range(64), names=names)
        unit = [[(math.log10(p["lr"]) + 5) / 5, p["mom"] / 0.99] for p in drawn]
        return qmc.discrepancy(np.array(unit))

    for seed in range(3):
        assert discrepancy(seed, ("lr", "mom")) < 0.5 * discrepancy(seed, ())


def test_beside_sobol_names_every_other_kind_of_parameter_is_drawn_independently():
    sobol = PairedSampler(0, names=("lr", "kind", "depth", "width"))
    independent = PairedSampler(0)

    def structural(sampler):
        study = optuna.create_study(sampler=sampler)
        rows = []
        for _ in range(30):
            trial = study.ask()
            trial.suggest_float("lr", 1e-5, 1.0, log=True)
            trial.suggest_categorical("kind", ["a", "b", "c"])
            trial.suggest_int("depth", 1, 5)
            trial.suggest_float("width", 0.5, 2.0, step=0.5)
            rows.append({n: v for n, v in trial.params.items() if n != "lr"})
        return rows

    rows = structural(sobol)
    assert rows == structural(independent)
    assert {r["kind"] for r in rows} == {"a", "b", "c"}
    assert {r["depth"] for r in rows} == {1, 2, 3, 4, 5}
    assert {r["width"] for r in rows} == {0.5, 1.0, 1.5, 2.0}


@both_forms
def test_bounds_are_kept_where_rounding_could_leave_them(names):
    narrow = FloatDistribution(0.1, math.nextafter(0.1, 1.0))
    log = FloatDistribution(1e-3, math.nextafter(1e-3, 1.0), log=True)
    sampler = PairedSampler(0, names=names)
    study = optuna.create_study(sampler=sampler)
    for _ in range(32):
        trial = study.ask(fixed_distributions={"mom": narrow, "lr": log})
        assert narrow.low <= trial.params["mom"] <= narrow.high
        assert log.low <= trial.params["lr"] <= log.high


def test_the_same_paired_suggestions_come_with_and_without_the_wrapper():
    study = optuna.create_study(sampler=OhgwSampler(PairedSampler(2)))
    study.optimize(lambda t: value_of(ohgw_suggest(t, SPACE, quadratic, RAW)), n_trials=6)
    suggested = [t.user_attrs["ohgw"][0]["suggested"] for t in study.trials]
    assert suggested == paired_draws(2, range(6))
    assert json.loads(json.dumps(suggested)) == suggested


def test_categorical_and_integer_draws_are_paired_too():
    distributions = {"kind": CategoricalDistribution(["a", "b"]), "depth": IntDistribution(1, 9)}

    def rows(earlier):
        study = optuna.create_study(sampler=PairedSampler(0))
        for _ in range(earlier):
            study.tell(study.ask(), 0.0)
        drawn = []
        for k in range(12):
            study.enqueue_trial({}, user_attrs={"config_index": k})
            drawn.append(study.ask(fixed_distributions=distributions).params)
        return drawn

    assert rows(0) == rows(5)
    assert len({r["depth"] for r in rows(0)}) > 3
