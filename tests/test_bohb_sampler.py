"""Oracles: Optuna's public suite, planted effects, observations by hand, random draws of the same seed."""

import math

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import RandomSampler
from optuna.testing.pytest_samplers import (
    BasicSamplerTestCase,
    RelativeSamplerTestCase,
    SingleOnlySamplerTestCase,
)
from optuna.trial import TrialState, create_trial

import optuna_ohgw
from optuna_ohgw import BohbSampler, OhgwSampler, PairedHyperbandPruner, PairedSampler, PromotionPruner
from optuna_ohgw.bohb_sampler import END, observations
from optuna_ohgw.history import RESUMED_FROM

optuna.logging.set_verbosity(optuna.logging.WARNING)

X = FloatDistribution(0.0, 1.0)


class Suite:
    @pytest.fixture
    def sampler(self):
        return lambda: BohbSampler(seed=0)


# The suites of Optuna need nothing but the sampler: the classes below have no body of their own.
class TestBohbSamplerPassesOptunasBasicSuite(Suite, BasicSamplerTestCase):
    """Optuna's own tests, all inherited."""


class TestBohbSamplerPassesOptunasRelativeSuite(Suite, RelativeSamplerTestCase):
    """Optuna's own tests, all inherited."""


class TestBohbSamplerPassesOptunasSingleOnlySuite(Suite, SingleOnlySamplerTestCase):
    """Optuna's own tests, all inherited."""


def test_it_is_exported():
    assert "BohbSampler" in optuna_ohgw.__all__
    assert optuna_ohgw.BohbSampler is BohbSampler


def loss(trial):
    return (trial.suggest_float("x", 0, 1) - 0.7) ** 2 + (trial.suggest_float("y", 0, 1) - 0.2) ** 2


def curve(trial, resource=27, sign=1):
    """Report a loss that falls with training."""
    final = loss(trial)
    done = trial.study.get_trials(deepcopy=False)[trial.number].last_step or 0  # of a resumed trial
    for step in range(done + 1, resource + 1):
        trial.report(sign * (final + 0.3 / step), step)
        if trial.should_prune():
            raise optuna.TrialPruned
    return sign * (final + 0.3 / resource)


def study_of(sampler, objective, trials=60, direction="minimize", pruner=None):
    study = optuna.create_study(
        sampler=sampler, direction=direction, pruner=pruner or optuna.pruners.NopPruner()
    )
    study.optimize(objective, n_trials=trials, catch=(ArithmeticError,))
    return study


def distances(study, start=0):
    return [
        math.hypot(t.params["x"] - 0.7, t.params["y"] - 0.2) for t in study.get_trials(deepcopy=False)[start:]
    ]


def test_a_planted_effect_is_found_from_final_values():
    own, theirs = [], []
    for seed in range(6):
        own += distances(study_of(BohbSampler(seed=seed), loss), 20)
        theirs += distances(study_of(RandomSampler(seed=seed), loss), 20)
    assert np.median(own) < 0.4 * np.median(theirs)


@pytest.mark.parametrize("pruner", [PairedHyperbandPruner, PromotionPruner])
def test_a_planted_effect_is_found_under_a_pruner(pruner):
    own, theirs = [], []
    for seed in range(4):
        own += distances(study_of(BohbSampler(seed=seed), curve, 80, pruner=pruner(27)), 30)
        theirs += distances(study_of(PairedSampler(seed), curve, 80, pruner=pruner(27)), 30)
    assert np.median(own) < 0.5 * np.median(theirs)


def test_categories_and_integers_are_modelled_jointly():
    def objective(trial):
        kind = trial.suggest_categorical("kind", ["a", "b", "c", "d"])
        depth = trial.suggest_int("depth", 1, 8)
        rate = trial.suggest_float("rate", 1e-4, 1.0, log=True)
        return (kind != "c") + abs(depth - 6) / 4 + abs(math.log10(rate) + 2) / 2

    late = []
    for seed in range(6):
        late += study_of(BohbSampler(seed=seed), objective, 90).get_trials(deepcopy=False)[45:]
    assert np.mean([t.params["kind"] == "c" for t in late]) > 0.5  # 0.25 by luck
    assert np.mean([abs(t.params["depth"] - 6) <= 1 for t in late]) > 0.6  # 0.375 by luck
    assert np.mean([abs(math.log10(t.params["rate"]) + 2) < 0.6 for t in late]) > 0.4  # 0.3 by luck


def params_of(study):
    return [t.params for t in study.get_trials(deepcopy=False)]


def test_the_same_seed_is_the_same_study():
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first = params_of(study_of(BohbSampler(seed=0), curve, 25))
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002
    assert params_of(study_of(BohbSampler(seed=0), curve, 25)) == first
    assert params_of(study_of(BohbSampler(seed=1), curve, 25)) != first
    assert params_of(study_of(BohbSampler(), curve, 5)) != params_of(study_of(BohbSampler(), curve, 5))


def test_a_study_goes_on_in_another_process_as_if_it_were_one():
    whole = study_of(BohbSampler(seed=0), curve, 25)
    halves = study_of(BohbSampler(seed=0), curve, 12)
    halves.sampler = BohbSampler(seed=0)
    halves.optimize(curve, n_trials=13)
    assert params_of(halves) == params_of(whole)


def test_threads_share_no_draw():
    study = optuna.create_study(sampler=BohbSampler(seed=0))
    study.optimize(loss, n_trials=30, n_jobs=4)
    assert len({tuple(p.items()) for p in params_of(study)}) == 30


def test_minimise_and_maximise_mirror():
    down = study_of(BohbSampler(seed=0), curve, 40)
    up = study_of(BohbSampler(seed=0), lambda t: curve(t, sign=-1), 40, "maximize")
    assert params_of(up) == params_of(down)


def test_before_a_model_it_draws_as_the_paired_sampler():
    """Five points are a model of two dimensions; before them every draw is random."""
    own = params_of(study_of(BohbSampler(seed=3), loss, 40))
    theirs = params_of(study_of(PairedSampler(3), loss, 40))
    same = [a == b for a, b in zip(own, theirs, strict=True)]
    assert all(same[:5])
    assert 5 <= sum(same[5:]) <= 19  # a third of 35 is 11.7; two and a half standard deviations


def test_nan_is_avoided():
    def objective(trial):
        x = trial.suggest_float("x", 0, 1)
        return math.nan if x > 0.5 else x

    def dividing(trial):
        x = trial.suggest_float("x", 0, 1)
        return x if x <= 0.5 else 1 // 0

    for broken in (objective, dividing):
        study = study_of(BohbSampler(seed=0), broken, 60)
        late = [t.params["x"] for t in study.get_trials(deepcopy=False)[20:]]
        assert np.mean([x > 0.5 for x in late]) < 0.3


def trial_of(x, values=None, state=TrialState.COMPLETE, value=None, **attributes):
    return create_trial(
        state=state,
        value=value,
        params={"x": x},
        distributions={"x": X},
        intermediate_values=values or {},
        user_attrs=attributes,
    )


def numbers(found):
    return {step: (points[:, 0].tolist(), losses.tolist()) for step, (points, losses) in found.items()}


def test_observations_by_hand():
    trials = [
        trial_of(0.1, {1: 5.0, 3: 4.0}, value=9.0),  # its final value is not a further budget
        trial_of(0.2, {1: 6.0}, TrialState.PRUNED),
        trial_of(0.3, {1: 7.0}, TrialState.FAIL),  # crashed on its way to 3
        trial_of(0.4, {}, TrialState.FAIL),
        trial_of(0.5, {}, TrialState.PRUNED),
        trial_of(0.6, {1: 8.0}, TrialState.RUNNING),
        trial_of(0.7, {1: 1.0}, TrialState.WAITING),
        trial_of(0.8, {1: math.nan, 3: 2.0}, value=2.0),
        trial_of(0.9, {1: 1.0, 2: 1.0, 3: 1.0}, TrialState.FAIL),  # nobody went further
    ]
    found = observations(trials, {"x": X}, maximize=False)
    assert math.isnan(found[1][1][6])
    found[1][1][6] = -1.0
    assert numbers(found) == {
        1: ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 0.9], [5, 6, 7, math.inf, math.inf, 8, -1, 1]),
        2: ([0.3, 0.9], [math.inf, 1]),
        3: ([0.1, 0.8, 0.9], [4, 2, 1]),
    }


def test_final_values_count_where_nothing_was_reported():
    trials = [trial_of(0.1, value=2.0), trial_of(0.2, {5: 3.0}, value=3.0), trial_of(0.3, value=1.0)]
    trials.append(trial_of(0.4, {5: 3.0}, TrialState.FAIL))
    found = numbers(observations(trials, {"x": X}, maximize=True))
    assert found == {END: ([0.1, 0.3, 0.4], [-2, -1, math.inf]), 5: ([0.2, 0.4], [-3, -3])}


def test_trials_of_another_space_are_left_out():
    other = FloatDistribution(0.0, 2.0)
    assert observations([trial_of(0.1, value=1.0)], {"x": other}, False) == {}
    assert observations([trial_of(0.1, value=1.0)], {"x": X, "y": X}, False) == {}


def test_a_resumed_trial_is_one_trial(monkeypatch):
    study = optuna.create_study(sampler=BohbSampler(seed=1))
    study.add_trial(trial_of(0.1, {1: 1.0}, TrialState.PRUNED))
    study.add_trial(trial_of(0.1, {1: 1.0, 2: 0.5}, value=0.5, **{RESUMED_FROM: 0}))
    for k in range(4):
        study.add_trial(trial_of(0.2 + k / 10, {1: 2.0 + k}, TrialState.PRUNED))
    seen = []

    def spy(trials, space, maximize):
        found = observations(trials, space, maximize)
        seen.append(numbers(found))
        return found

    monkeypatch.setattr("optuna_ohgw.bohb_sampler.observations", spy)
    for _ in range(8):
        study.ask({"x": X})
    assert seen
    assert all(found[1][0] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5]) for found in seen)


def test_the_relative_space_has_what_all_have():
    study = optuna.create_study(sampler=BohbSampler(seed=0))
    one, kind = IntDistribution(2, 2), CategoricalDistribution(["a", "b"])
    study.add_trial(
        create_trial(
            state=TrialState.PRUNED,
            params={"x": 0.5, "one": 2, "kind": "a", "own": 0.1},
            distributions={"x": X, "one": one, "kind": kind, "own": X},
        )
    )
    study.add_trial(
        create_trial(
            value=1.0,
            params={"x": 0.5, "one": 2, "kind": "b"},
            distributions={"x": X, "one": one, "kind": kind},
        )
    )
    trial = study.ask()
    assert study.sampler.infer_relative_search_space(study, trial) == {"kind": kind, "x": X}


def test_fixed_parameters_are_kept():
    study = study_of(BohbSampler(seed=0), loss, 10)
    study.enqueue_trial({"x": 0.123})
    study.optimize(loss, n_trials=1)
    assert study.trials[-1].params["x"] == 0.123


def test_it_is_a_base_of_the_warming_sampler():
    assert params_of(study_of(OhgwSampler(BohbSampler(seed=0)), curve, 20)) == params_of(
        study_of(BohbSampler(seed=0), curve, 20)
    )


def test_reseeding_keeps_the_draws():
    sampler = BohbSampler(seed=0)
    sampler.reseed_rng()
    assert params_of(study_of(sampler, loss, 12)) == params_of(study_of(BohbSampler(seed=0), loss, 12))
