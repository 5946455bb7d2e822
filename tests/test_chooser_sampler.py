"""Oracles: Optuna's public suite, a sampler made anew for each trial, planted effects, four processes."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import optuna
import pytest
import torch
from optuna.artifacts import FileSystemArtifactStore
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.testing.pytest_samplers import (
    BasicSamplerTestCase,
    RelativeSamplerTestCase,
    SingleOnlySamplerTestCase,
)
from optuna.trial import TrialState

from optuna_ohgw import (
    BatchedStorage,
    BoilSampler,
    DyHPOSampler,
    OhgwSampler,
    PashaPruner,
    PromotionPruner,
    epochs,
)
from optuna_ohgw.history import RESUMED_FROM, SENT, superseded

pytest.importorskip("botorch")
optuna.logging.set_verbosity(optuna.logging.WARNING)
END = 9
SAMPLERS = {
    "dyhpo": lambda: DyHPOSampler(END, candidates=24, seed=1),
    "boil": lambda: BoilSampler(END, candidates=24, seed=1),
}


class DyhpoSuite:
    @pytest.fixture
    def sampler(self):
        return lambda: DyHPOSampler(END, candidates=64, seed=0)


class BoilSuite:
    @pytest.fixture
    def sampler(self):
        return lambda: BoilSampler(END, candidates=32, seed=0)


class TestDyhpoSamplerPassesOptunasBasicSuite(DyhpoSuite, BasicSamplerTestCase):
    """Optuna's own tests, all inherited."""


class TestDyhpoSamplerPassesOptunasRelativeSuite(DyhpoSuite, RelativeSamplerTestCase):
    """Optuna's own tests, all inherited."""


class TestDyhpoSamplerPassesOptunasSingleOnlySuite(DyhpoSuite, SingleOnlySamplerTestCase):
    """Optuna's own tests, all inherited."""


class TestBoilSamplerPassesOptunasBasicSuite(BoilSuite, BasicSamplerTestCase):
    """Optuna's own tests, all inherited."""


class TestBoilSamplerPassesOptunasRelativeSuite(BoilSuite, RelativeSamplerTestCase):
    """Optuna's own tests, all inherited."""


class TestBoilSamplerPassesOptunasSingleOnlySuite(BoilSuite, SingleOnlySamplerTestCase):
    """Optuna's own tests, all inherited."""


def objective(trial, sign=1):
    """Report a loss that falls with training, least at x = 0.7 of kind b."""
    x = trial.suggest_float("x", 0, 1)
    kind = trial.suggest_categorical("kind", ["a", "b", "c"])
    final = (x - 0.7) ** 2 + 0.3 * (kind != "b")
    done = trial.study.get_trials(deepcopy=False)[trial.number].last_step or 0  # of a resumed trial
    for step in range(done + 1, END + 1):
        trial.report(sign * (final + 0.3 / step), step)
        if trial.should_prune() and step < END:
            raise optuna.TrialPruned
    return sign * (final + 0.3 / END)


def study_of(name, trials, direction="minimize", sign=1):
    sampler = SAMPLERS[name]()
    study = optuna.create_study(sampler=sampler, pruner=sampler.pruner, direction=direction)
    study.optimize(lambda t: objective(t, sign), n_trials=trials)
    return study


def story(study):
    return [
        (t.state, t.params, t.intermediate_values, t.user_attrs.get(RESUMED_FROM))
        for t in study.get_trials(deepcopy=False)
    ]


@pytest.mark.parametrize("name", SAMPLERS)
def test_nothing_is_trained_twice_and_little_to_the_end(name):
    study = study_of(name, {"dyhpo": 60, "boil": 24}[name])
    trials = study.get_trials(deepcopy=False)
    gone = superseded(trials)
    kept = [t for t in trials if t.number not in gone and t.state.is_finished()]
    resumed = [t for t in trials if RESUMED_FROM in t.user_attrs]
    assert len(resumed) > 3
    for trial in resumed:
        source = trials[trial.user_attrs[RESUMED_FROM]]
        assert trial.params == source.params
        assert source.intermediate_values.items() <= trial.intermediate_values.items()
    assert len({tuple(t.params.values()) for t in kept}) == len(kept)
    full = [t for t in kept if t.last_step == END]
    assert 1 <= len(full) < 0.7 * len(kept)
    # The planted best: of 24 candidates some 3 are of kind b within 0.2.
    best = study.best_trial.params
    assert best["kind"] == "b"
    assert abs(best["x"] - 0.7) < 0.2


@pytest.mark.parametrize("name", ["dyhpo", pytest.param("boil", marks=pytest.mark.slow)])
def test_no_choice_depends_on_what_a_process_remembers(name, tmp_path):
    whole = study_of(name, 26)
    url = f"sqlite:///{tmp_path}/study.db"
    optuna.create_study(study_name="s", storage=url)
    for _ in range(26):
        sampler = SAMPLERS[name]()
        study = optuna.load_study(study_name="s", storage=url, sampler=sampler, pruner=sampler.pruner)
        study.optimize(objective, n_trials=1)
    assert story(study) == story(whole)


def test_values_may_be_maximised():
    least, most = study_of("dyhpo", 26), study_of("dyhpo", 26, "maximize", -1)
    assert [s[:2] for s in story(least)] == [s[:2] for s in story(most)]


def test_with_another_pruner_it_chooses_new_configurations_alone():
    study = optuna.create_study(sampler=SAMPLERS["dyhpo"](), pruner=optuna.pruners.NopPruner())
    study.optimize(objective, n_trials=12)
    assert {t.state for t in study.trials} == {TrialState.COMPLETE}
    chosen = [t.system_attrs[SENT]["config"] for t in study.trials]
    assert chosen[0] is None
    assert len(set(chosen)) == 12
    rules = {t.system_attrs[SENT]["rule"] for t in study.trials[6:]}
    assert rules == {"expected improvement"}


@pytest.mark.parametrize("name", SAMPLERS)
def test_hyperbands_view_of_a_bracket_hides_no_trial(name):
    pruner = optuna.pruners.HyperbandPruner(min_resource=1, max_resource=END, reduction_factor=3)
    study = optuna.create_study(sampler=SAMPLERS[name](), pruner=pruner)
    study.optimize(objective, n_trials=16)
    chosen = [t.system_attrs[SENT]["config"] for t in study.trials]
    assert sum(c is not None for c in chosen) > 8
    assert len({c for c in chosen if c is not None}) == sum(c is not None for c in chosen)


@pytest.mark.parametrize("pruner", [PromotionPruner, PashaPruner])
def test_another_pruner_that_pauses_is_refused(pruner):
    study = optuna.create_study(sampler=SAMPLERS["boil"](), pruner=pruner(END))
    with pytest.raises(ValueError, match=r"pauses trials, too; pass pruner=sampler.pruner"):
        study.optimize(objective, n_trials=3)


def test_a_heartbeats_retry_keeps_its_candidate():
    sampler = SAMPLERS["dyhpo"]()
    study = optuna.create_study(sampler=sampler, pruner=sampler.pruner)
    study.optimize(objective, n_trials=6)
    while RESUMED_FROM in (killed := study.ask()).user_attrs:
        study.tell(killed, state=TrialState.PRUNED)
    params = {"x": killed.suggest_float("x", 0, 1)}
    params["kind"] = killed.suggest_categorical("kind", ["a", "b", "c"])
    config = study.trials[killed.number].system_attrs[SENT]["config"]
    study.tell(killed, state=TrialState.FAIL)
    RetryHeartbeatStaleTrialCallback()(study, study.trials[killed.number])
    study.optimize(objective, n_trials=1)
    again = study.trials[killed.number + 1]
    assert (again.params, again.system_attrs[SENT]["config"]) == (params, config)
    assert again.intermediate_values
    assert sampler.pruner._folds[study._study_id].scheduler.courses[config].resource == again.last_step


def test_trials_that_are_enqueued_are_evidence_and_a_used_up_pool_is_no_end():
    sampler = DyHPOSampler(END, candidates=3, seed=0)
    study = optuna.create_study(sampler=sampler, pruner=sampler.pruner)
    study.enqueue_trial({"x": 0.7, "kind": "b"})
    study.optimize(objective, n_trials=24)
    # The first is the best there can be: it is resumed to its end.
    ends = [t.params for t in study.trials if t.state == TrialState.COMPLETE]
    assert {"x": 0.7, "kind": "b"} in ends
    starts = [t for t in study.trials if RESUMED_FROM not in t.user_attrs]
    chosen = Counter(t.system_attrs[SENT]["config"] for t in starts)
    assert {chosen[0], chosen[1], chosen[2]} == {1}


def test_a_conditional_parameter_is_drawn_on_its_own():
    def conditional(trial):
        x = trial.suggest_float("x", 0, 1)
        y = trial.suggest_float("y", 0, 1) if x > 0.5 else 0.0
        trial.report(x + y, 1)
        trial.should_prune()
        return x + y

    sampler = SAMPLERS["dyhpo"]()
    study = optuna.create_study(sampler=sampler, pruner=sampler.pruner)
    study.optimize(conditional, n_trials=12)
    assert sampler.infer_relative_search_space(study, study.trials[0]) == {"x": FloatDistribution(0, 1)}


def test_it_may_be_the_base_of_a_warm_start():
    own, sampler = study_of("dyhpo", 26), SAMPLERS["dyhpo"]()
    study = optuna.create_study(sampler=OhgwSampler(sampler), pruner=sampler.pruner)
    study.optimize(objective, n_trials=26)
    assert story(study) == story(own)


def test_what_is_suggested_before_on_its_own_hinders_no_choice():
    def with_another(trial):
        trial.suggest_float(f"own {trial.number}", 0, 1)
        return objective(trial)

    sampler = SAMPLERS["dyhpo"]()
    study = optuna.create_study(sampler=sampler, pruner=sampler.pruner)
    study.optimize(with_another, n_trials=12)
    pool = sampler.pool(study, sampler.infer_relative_search_space(study, study.trials[0]))
    assert pool.space.keys() == {"kind", "x"}
    own = [t for t in study.trials if t.system_attrs[SENT].get("pool") == pool.key]
    assert len(own) > 6
    for trial in own:
        params = pool.params[trial.system_attrs[SENT]["config"]]
        assert {n: trial.params[n] for n in pool.space} == params


def test_a_failed_trial_warns_of_its_candidate():
    def failing(trial):
        if trial.suggest_float("x", 0, 1) > 0.5:
            raise ArithmeticError
        return objective(trial)

    sampler = SAMPLERS["dyhpo"]()
    study = optuna.create_study(sampler=sampler, pruner=sampler.pruner)
    study.optimize(failing, n_trials=30, catch=(ArithmeticError,))
    failed = [t.system_attrs[SENT]["config"] for t in study.trials if t.state == TrialState.FAIL]
    chosen = [c for c in failed if c is not None]
    assert len(set(chosen)) == len(chosen)
    assert max(t.last_step or 0 for t in study.trials) == END


@pytest.mark.parametrize("other", [{"seed": 2}, {"candidates": 9}, {"max_resource": 5}])
def test_a_study_keeps_to_its_pool(other):
    study = study_of("dyhpo", 3)
    options = {"max_resource": END, "candidates": 24, "seed": 1, **other}
    sampler = DyHPOSampler(options.pop("max_resource"), **options)
    study.sampler, study.pruner = sampler, sampler.pruner
    with pytest.raises(ValueError, match="the study was begun with"):
        study.optimize(objective, n_trials=1)


def test_without_a_seed_a_process_takes_that_of_the_study():
    study = study_of("dyhpo", 8)
    sampler = DyHPOSampler(END, candidates=24)
    space = {"kind": CategoricalDistribution(["a", "b", "c"]), "x": FloatDistribution(0, 1)}
    assert sampler.pool(study, space).params == SAMPLERS["dyhpo"]().pool(study, space).params


@pytest.mark.parametrize("options", [{"max_resource": 0}, {"max_resource": 3, "candidates": 0}])
def test_what_cannot_be_is_refused(options):
    with pytest.raises(ValueError, match="must be 1 or more"):
        BoilSampler(**options)


# ---- several processes


def work(url, folder):
    store = FileSystemArtifactStore(folder)

    def frozen(trial):
        x = trial.suggest_float("x", 0, 1)
        value = 1.0
        for epoch in epochs(trial, END, store, model=torch.nn.Linear(1, 1)):
            value = (x - 0.7) ** 2 + 0.3 / epoch
            trial.report(value, epoch)
        return value

    sampler = SAMPLERS["dyhpo"]()
    storage = BatchedStorage(RDBStorage(url))  # Optuna's own may give a waiting trial to two, on SQLite
    study = optuna.load_study(study_name="s", storage=storage, sampler=sampler, pruner=sampler.pruner)
    study.optimize(frozen, n_trials=9)


@pytest.mark.slow
def test_four_processes_start_and_resume_nothing_twice(tmp_path):
    url = f"sqlite:///{tmp_path}/study.db"
    optuna.create_study(study_name="s", storage=url)
    # This file as a script: what pytest imports it as is not there for another process.
    command = [sys.executable, str(Path(__file__)), url, str(tmp_path)]
    workers = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    for worker in workers:
        _, errors = worker.communicate(timeout=240)
        assert worker.returncode == 0, errors
    trials = optuna.load_study(study_name="s", storage=url).get_trials(deepcopy=False)
    starts = [t for t in trials if RESUMED_FROM not in t.user_attrs]
    chosen = [t.system_attrs[SENT]["config"] for t in starts if t.system_attrs[SENT]["config"] is not None]
    assert len(chosen) == len(set(chosen)) > 5
    sources = Counter(
        t.user_attrs[RESUMED_FROM]
        for t in trials
        if RESUMED_FROM in t.user_attrs
        and len(t.intermediate_values) > trials[t.user_attrs[RESUMED_FROM]].last_step
    )
    assert len(sources) > 3
    assert set(sources.values()) == {1}


if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2])
