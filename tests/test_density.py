"""Oracles: split sizes by hand, statsmodels' own estimator, closed forms, planted effects."""

import inspect
import math

import numpy as np
import pytest
from scipy.stats import kstest, norm, truncnorm
from statsmodels.nonparametric.kernel_density import KDEMultivariate

from optuna_ohgw.schedulers.density import (
    Density,
    Model,
    fit_density,
    fit_model,
    pick,
    propose,
    split_sizes,
)

# Later versions warn without a generator, earlier ones do not take it.
UNUSED = {"rng": 0} if "rng" in inspect.signature(KDEMultivariate).parameters else {}


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize(
    ("points", "dimensions", "sizes"),
    [
        (0, 1, None),
        (3, 1, None),
        (4, 1, (2, 2)),
        (5, 1, (2, 3)),  # 15% of 5 is 0
        (19, 1, (2, 17)),  # 2.85 is rounded down
        (20, 1, (3, 17)),
        (100, 1, (15, 85)),
        (10, 8, None),
        (11, 8, (9, 9)),  # seven points are on both sides
        (18, 8, (9, 9)),
        (19, 8, (9, 10)),
        (66, 8, (9, 57)),
        (67, 8, (10, 57)),
    ],
)
def test_split_sizes_by_hand(points, dimensions, sizes):
    assert split_sizes(points, dimensions) == sizes


@pytest.mark.parametrize("shape", [(5, 1), (12, 3), (40, 8)])
def test_the_density_of_numbers_is_that_of_statsmodels(shape):
    points, there = rng().random(shape), rng(1).random((7, shape[1]))
    own = fit_density(points, (0,) * shape[1])
    theirs = KDEMultivariate(points, "c" * shape[1], bw="normal_reference", **UNUSED)
    assert own.bandwidths == pytest.approx(theirs.bw, rel=1e-12)
    assert own.at(there) == pytest.approx(theirs.pdf(there), rel=1e-12)


def test_the_density_with_categories_is_that_of_statsmodels_where_all_are_seen():
    points = np.column_stack([rng().random(9), [0, 1, 2, 0, 1, 2, 0, 0, 1]])
    there = np.column_stack([rng(1).random(6), [0, 1, 2, 0, 1, 2]])
    own = fit_density(points, (0, 3))
    theirs = KDEMultivariate(points, "cu", bw=own.bandwidths, **UNUSED)
    assert own.at(there) == pytest.approx(theirs.pdf(there), rel=1e-12)


def test_one_dimension_is_a_mean_of_normals():
    own = Density(np.array([[0.2], [0.7]]), np.array([0.1]), (0,))
    there = np.linspace(0, 1, 5)
    expected = (norm.pdf(there, 0.2, 0.1) + norm.pdf(there, 0.7, 0.1)) / 2
    assert own.at(there[:, None]) == pytest.approx(expected)


def test_categories_by_hand():
    # Of three categories, bandwidth 0.3: 0.7 at its own, 0.15 at each other. Two at 0, one at 1.
    own = Density(np.array([[0.0], [0.0], [1.0]]), np.array([0.3]), (3,))
    assert own.at(np.array([[0.0], [1.0], [2.0]])) == pytest.approx([1.55 / 3, 1.0 / 3, 0.45 / 3])


def test_a_category_of_one_says_nothing():
    points = np.column_stack([rng().random(5), np.zeros(5)])
    alone = fit_density(points, (0, 1))
    bandwidth = alone.bandwidths[0]
    expected = norm.pdf(0.5, points[:, 0], bandwidth).mean()
    assert alone.at(np.array([[0.5, 0.0]])) == pytest.approx([expected])


def test_bandwidths_have_a_floor_and_categories_a_ceiling():
    same = fit_density(np.full((6, 2), 0.5), (0, 4))
    assert same.bandwidths.tolist() == [1e-3, 1e-3]
    apart = fit_density(np.array([[0.0], [9.0], [0.0], [9.0]]), (10,))
    assert apart.bandwidths.tolist() == [0.9]
    assert apart.at(np.arange(10.0)[:, None]) == pytest.approx(np.full(10, 0.1))


def test_a_category_never_seen_is_no_sure_winner():
    """Only category 0 was good, only 1 bad; 2 is unknown."""
    model = Model(
        1,
        fit_density(np.zeros((4, 1)), (3,)),
        fit_density(np.ones((4, 1)), (3,)),
    )
    ratios = model.ratios(np.array([[0.0], [1.0], [2.0]]))
    assert ratios[0] < ratios[2] < ratios[1]
    assert ratios[2] == pytest.approx(1)


def points_of(*xs):
    return np.array(xs, dtype=float)[:, None]


def test_the_best_are_good_and_the_worst_bad():
    x = np.arange(10) / 10
    losses = np.array([3, 1, 2, 9, 8, 7, 6, 5, 4, 10.0])
    model = fit_model({3: (x[:, None], losses)}, (0,))
    assert model.budget == 3
    assert model.good.points[:, 0].tolist() == [0.1, 0.2]  # losses 1 and 2
    assert model.bad.points[:, 0].tolist() == [0.0, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.9]


def test_ties_go_to_the_first():
    model = fit_model({1: (points_of(0.1, 0.2, 0.3, 0.4), np.ones(4))}, (0,))
    assert model.good.points[:, 0].tolist() == [0.1, 0.2]


def test_the_largest_budget_with_enough_points():
    x = points_of(0.1, 0.2, 0.3, 0.4)
    few = x[:3], np.arange(3.0)
    observed = {9: few, 1: (x, np.arange(4.0)), 3: (x, -np.arange(4.0))}
    assert fit_model(observed, (0,)).budget == 3
    assert fit_model({9: few}, (0,)) is None
    assert fit_model({}, (0,)) is None


@pytest.mark.parametrize("crash", [math.nan, math.inf, -math.inf])
def test_a_crash_is_bad_and_never_good(crash):
    x, losses = points_of(0.1, 0.2, 0.3, 0.4, 0.5), np.array([crash, 2.0, 1.0, crash, crash])
    model = fit_model({1: (x, losses)}, (0,))
    assert model.good.points[:, 0].tolist() == [0.3, 0.2]
    assert model.bad.points[:, 0].tolist() == [0.1, 0.4, 0.5]
    losses[1] = crash  # one number alone is no model
    assert fit_model({1: (x, losses)}, (0,)) is None


def test_good_points_are_no_more_than_did_not_crash():
    losses = np.full(40, math.inf)
    losses[:3] = [1.0, 2.0, 3.0]  # 15% would be 6
    model = fit_model({1: (rng().random((40, 2)), losses)}, (0, 0))
    assert len(model.good.points) == 3
    assert len(model.bad.points) == 34


def mixed_model():
    good = Density(np.array([[0.05, 0.0], [0.9, 2.0]]), np.array([0.1, 0.3]), (0, 3))
    return Model(1, good, good)


def test_samples_are_truncated_normals_with_three_times_the_bandwidth():
    drawn = mixed_model().sample(4000, rng())
    assert drawn.shape == (4000, 2)
    assert drawn[:, 0].min() >= 0
    assert drawn[:, 0].max() <= 1

    def expected(x):
        parts = [truncnorm.cdf(x, -m / 0.3, (1 - m) / 0.3, m, 0.3) for m in (0.05, 0.9)]
        return np.mean(parts, axis=0)

    assert kstest(drawn[:, 0], expected).pvalue > 0.01
    shares = np.bincount(drawn[:, 1].astype(int), minlength=3) / 4000
    # Kept with 0.7, else even: 0.35 + 0.1, 0.1, 0.35 + 0.1; three standard errors.
    assert shares == pytest.approx([0.45, 0.1, 0.45], abs=0.025)


def test_weights_are_the_density_of_the_samples():
    model = mixed_model()
    x = (np.arange(2000) + 0.5) / 2000
    by_category = [model.weights(np.column_stack([x, np.full(2000, c)])).mean() for c in (0.0, 1.0, 2.0)]
    assert by_category == pytest.approx([0.45, 0.1, 0.45], rel=1e-6)
    drawn = model.sample(4000, rng())
    here = drawn[drawn[:, 1] == 0][:, 0]
    weights = model.weights(np.column_stack([x, np.zeros(2000)]))
    found = np.histogram(here, bins=10, range=(0, 1))[0] / 4000
    assert found == pytest.approx(weights.reshape(10, 200).mean(axis=1) / 10, abs=0.02)


def planted():
    """Good around 0.8, bad everywhere."""
    x = np.linspace(0, 1, 60)
    return fit_model({1: (x[:, None], np.abs(x - 0.8))}, (0,))


def test_what_is_proposed_is_the_lowest_ratio_of_the_samples():
    model = planted()
    point, ratio = propose(model, rng(3))
    samples = model.sample(64, rng(3))
    assert ratio == model.ratios(samples).min()
    assert point == samples[model.ratios(samples).argmin()]
    assert abs(point[0] - 0.8) < 0.1


def test_what_is_picked_is_the_lowest_ratio_of_what_is_drawn():
    model, pool = planted(), rng(1).random((500, 1))
    weights = model.weights(pool)
    drawn = rng(7).choice(500, size=64, p=weights / weights.sum())
    index, ratio = pick(model, pool, rng(7))
    assert ratio == model.ratios(pool[drawn]).min()
    assert ratio == model.ratios(pool[[index]])[0]
    picked = [pick(model, pool, rng(s))[0] for s in range(20)]
    assert np.abs(pool[picked, 0] - 0.8).max() < 0.1
    assert len(set(picked)) > 1


def test_a_pool_of_two_is_decided_by_the_ratio():
    assert all(pick(planted(), points_of(0.6, 0.75), rng(s))[0] == 1 for s in range(5))


def test_a_pool_far_from_all_that_is_good_is_no_error():
    good = Density(np.zeros((3, 2)), np.full(2, 1e-3), (0, 0))
    index, ratio = pick(Model(1, good, good), np.full((100, 2), 0.9), rng())
    assert 0 <= index < 100
    assert ratio == 1


def test_numpy_own_generator_is_left_alone():
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    propose(planted(), rng())
    pick(planted(), np.zeros((80, 1)), rng())
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002
