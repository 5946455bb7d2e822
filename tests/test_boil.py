"""Oracles: formulas in numpy, central differences, Monte Carlo, and a pool with a planted effect."""

import importlib.util
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.stats import norm

from optuna_ohgw.schedulers import curve_scores
from optuna_ohgw.simulation import simulate

if importlib.util.find_spec("gpytorch") is None or importlib.util.find_spec("botorch") is None:
    pytest.skip("GPyTorch and BoTorch are not installed", allow_module_level=True)  # an extra

from optuna_ohgw.schedulers import curve_gp
from optuna_ohgw.schedulers.boil import Boil


def tensor(values):
    return torch.as_tensor(values, dtype=torch.float64)


def scores(values, lengths, midpoint, growth, **options):
    return curve_scores.compress(
        tensor(values), torch.tensor(lengths), tensor(midpoint), tensor(growth), **options
    ).numpy()


def sample(n=12, d=2, seed=3, length=10):
    """Inputs, values, lengths and targets of n random curves."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, length + 1, n)
    inputs = np.column_stack([random.random((n, d)), lengths / length])
    values = np.sort(random.random((n, length)), axis=1)
    return tensor(inputs), tensor(values), torch.tensor(lengths), tensor(random.standard_normal(n))


def kernel(a, b, scale_x, scale_t):
    x = ((a[:, None, :-1] - b[None, :, :-1]) ** 2).sum(-1)
    return np.exp(-x / scale_x - (a[:, None, -1] - b[None, :, -1]) ** 2 / scale_t)


# --- scores -----------------------------------------------------------------------------------


def test_a_score_by_hand():
    # z is -6, 0, 6; with growth ln 2 and midpoint 0 the weights are 1/65, 1/2, 64/65.
    a, b, c = 1 / 65, 1 / 2, 64 / 65
    curves = [[0.1, 0.4, 0.7], [0.1, 0.4, 9.0], [0.1, 9.0, 9.0]]
    plain = scores(curves, [3, 2, 1], 0.0, math.log(2), normalized=False)
    sums = np.array([0.1 * a + 0.4 * b + 0.7 * c, 0.1 * a + 0.4 * b, 0.1 * a])
    np.testing.assert_allclose(plain, sums / [3, 2, 1], rtol=1e-12)
    over = np.array([a + b + c, a + b, a])
    np.testing.assert_allclose(scores(curves, [3, 2, 1], 0.0, math.log(2)), sums / over, rtol=1e-12)


def test_limits_of_the_score():
    curve = np.random.default_rng(0).random((1, 8))
    flat = scores(curve, [5], 0.0, 0.0)  # without growth all weights are equal
    np.testing.assert_allclose(flat, curve[:, :5].mean())
    steep = scores(curve, [8], 5.0, 100.0)  # only the last unit is past the midpoint
    np.testing.assert_allclose(steep, curve[:, 7])
    np.testing.assert_allclose(scores(np.full((1, 8), 0.3), [2], 1.0, 1.0), 0.3)


def test_values_between_the_best_and_the_third_quartile():
    curves = [np.array([first, 1.0 + first / 9]) for first in (0.0, 2.0, 3.0, 4.0, 1e34)]
    curves[0][:] = 1.5, 1.0
    low, high = curve_scores.value_range(curves)
    assert (low, high) == (1.0, 4.0)
    values = curve_scores.clipped_values(np.array([1.0, 2.5, 4.0, 1e34]), low, high)
    np.testing.assert_allclose(values, [1, 0.5, 0, 0])
    assert not curve_scores.clipped_values(np.array([1.0, math.inf]), low, high).any()


def test_two_fifths_of_absurd_losses_moves_little():
    curves = [np.array([value]) for value in (1.0, 2.0, 3.0, 1e34, 1e34)]
    assert curve_scores.value_range(curves) == (1.0, 21.0)  # ten times the median's distance


@pytest.mark.parametrize(
    "curves", [[], [np.array([math.inf])], [np.array([2.0])], [np.array([1e308]), np.array([-1e308])]]
)
def test_values_are_finite_whatever_the_losses(curves):
    low, high = curve_scores.value_range(curves)
    for curve in curves:
        values = curve_scores.clipped_values(curve, low, high)
        assert ((values >= 0) & (values <= 1)).all()


def test_standardized():
    found = curve_scores.standardized(tensor([1.0, 2.0, 3.0, 6.0])).numpy()
    np.testing.assert_allclose([found.mean(), found.std()], [0, 1], atol=1e-12)
    assert curve_scores.standardized(tensor([2.0, 2.0])).tolist() == [0, 0]


@pytest.mark.parametrize(("end", "count"), [(1, 12), (2, 12), (50, 12), (200, 5)])
def test_the_grid_of_lengths(end, count):
    grid = curve_scores.length_grid(end, count)
    assert grid == sorted(set(grid))
    assert grid[-1] == end
    assert grid[0] == 1
    assert len(grid) <= count


# --- costs ------------------------------------------------------------------------------------


def test_the_regression_is_exact_on_linear_costs():
    random = np.random.default_rng(1)
    configs, lengths = random.random((9, 3)), random.integers(1, 20, 9).astype(float)
    true = np.array([0.5, -1.0, 2.0, 3.0, 7.0])
    costs = np.column_stack([configs, lengths, np.ones(9)]) @ true
    found = curve_scores.fit_cost(configs, lengths, costs)
    np.testing.assert_allclose(found, true, rtol=1e-10)
    np.testing.assert_allclose(curve_scores.predicted_cost(found, configs, 0 * lengths, lengths), costs)
    going_on = curve_scores.predicted_cost(found, configs, lengths, lengths + 4)
    np.testing.assert_allclose(going_on, 12.0)


def test_costs_are_proportional_while_little_is_known():
    found = curve_scores.fit_cost(np.eye(2), np.array([3.0, 3.0]), np.array([6.0, 6.0]))
    np.testing.assert_allclose(found, [0, 0, 2, 0])


def test_costs_have_a_floor():
    coefficients = np.array([0.0, -1.0, 2.0])
    found = curve_scores.predicted_cost(coefficients, np.zeros((2, 1)), np.array([0, 3]), np.array([1, 9]))
    np.testing.assert_allclose(found, [1.0, 0.5])


# --- the Gaussian process ---------------------------------------------------------------------


def test_the_kernel_is_the_formula():
    inputs, *_ = sample()
    found = curve_gp.LengthKernel(tensor(0.7), tensor(0.2))(inputs, inputs[:5]).to_dense()
    expected = kernel(inputs.numpy(), inputs[:5].numpy(), 0.7, 0.2)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


def test_the_posterior_is_the_closed_form():
    inputs, _, _, targets = sample()
    at = torch.cat([sample(n=600, seed=4)[0], inputs[:2]])  # several blocks, and points seen before
    fitted = curve_gp.Hyperparameters(0.7, 0.2, 0.0, 1.0)
    mean, variance = curve_gp.posterior(inputs, targets, at, fitted)
    x, z = inputs.numpy(), at.numpy()
    inverse = np.linalg.inv(kernel(x, x, 0.7, 0.2) + 5e-4 * np.eye(len(x)))
    across = kernel(z, x, 0.7, 0.2)
    # The inverse has a condition number of at most 12 / 5e-4: eleven digits are left.
    np.testing.assert_allclose(mean.numpy(), across @ inverse @ targets.numpy(), atol=1e-9)
    expected = 1 - np.einsum("ij,jk,ik->i", across, inverse, across)
    np.testing.assert_allclose(variance.numpy(), expected, atol=1e-9)


def test_the_marginal_likelihood_and_its_gradient():
    inputs, values, lengths, _ = sample()
    point = np.array([-0.3, 0.4, 0.5, 1.2])

    def closed_form(p):
        found = scores(values, lengths.numpy(), p[2], p[3])
        y = (found - found.mean()) / found.std()
        x = inputs.numpy()
        matrix = kernel(x, x, math.exp(p[0]), math.exp(p[1])) + 5e-4 * np.eye(len(x))
        fit = y @ np.linalg.solve(matrix, y) + np.linalg.slogdet(2 * math.pi * matrix)[1]
        return -0.5 * fit / len(y)

    free = torch.tensor(point, requires_grad=True)
    found = curve_gp.log_likelihood(inputs, values, lengths, free)
    assert found.item() == pytest.approx(closed_form(point), rel=1e-9)
    (slope,) = torch.autograd.grad(found, free)
    step = 1e-5  # truncation 1e-10, rounding 1e-16 · 2e4 / 1e-5
    differences = [(closed_form(point + e) - closed_form(point - e)) / (2 * step) for e in step * np.eye(4)]
    np.testing.assert_allclose(slope.numpy(), differences, rtol=1e-5, atol=1e-7)


def test_a_fit_is_better_than_its_start_and_within_its_bounds():
    inputs, values, lengths, _ = sample(n=30)
    fitted = curve_gp.fit(inputs, values, lengths)

    def likelihood(h):
        point = tensor([math.log(h.scale_x), math.log(h.scale_t), h.midpoint, h.growth])
        return curve_gp.log_likelihood(inputs, values, lengths, point).item()

    assert likelihood(fitted) > likelihood(curve_gp.default(2)) + 0.1
    assert -2 <= fitted.midpoint <= 3
    assert 0.5 <= fitted.growth <= 2
    assert fitted == curve_gp.fit(inputs, values, lengths)


def test_log_expected_improvement():
    mean, deviation, best = np.array([0.3, -0.5, 0.0]), np.array([0.5, 0.2, 1.0]), 0.4
    found = curve_gp.log_expected_improvement(tensor(mean), tensor(deviation**2), tensor(best)).numpy()
    u = (mean - best) / deviation
    np.testing.assert_allclose(found, np.log(deviation * (norm.pdf(u) + u * norm.cdf(u))), rtol=1e-9)
    draws = mean[0] + deviation[0] * np.random.default_rng(0).standard_normal(400_000)
    # The standard error of the mean of 4e5 draws is 0.2% of it.
    assert found[0] == pytest.approx(math.log(np.maximum(draws - best, 0).mean()), abs=0.01)
    far = curve_gp.log_expected_improvement(tensor([-60.0]), tensor([1.0]), tensor(0.0))
    # φ(u) / u² is the leading term; the next is 3 / u² of it.
    assert far.item() == pytest.approx(norm.logpdf(60) - 2 * math.log(60), abs=0.002)


def test_the_condition_number_is_numpys():
    inputs, *_ = sample(n=6)
    fitted = curve_gp.Hyperparameters(0.7, 0.2, 0.0, 1.0)
    expected = math.log(np.linalg.cond(kernel(inputs.numpy(), inputs.numpy(), 0.7, 0.2)))
    assert curve_gp.log_condition(inputs, fitted) == pytest.approx(expected, rel=1e-6)
    twice = torch.cat([inputs, inputs])
    assert 30 < curve_gp.log_condition(twice, fitted) < 36.1


def test_virtual_points_are_the_most_uncertain_until_the_bound():
    config, fitted = tensor([0.5]), curve_gp.Hyperparameters(1.0, 0.1, 0.0, 1.0)
    own, lengths = tensor([[0.5, 1.0]]), [t / 20 for t in range(1, 20)]
    bound = 6.0
    chosen = curve_gp.virtual_lengths(own, config, lengths, fitted, most=19, bound=bound)
    assert 1 < len(chosen) < 10  # twenty lengths so near each other are ill-conditioned
    assert chosen[0] == 0  # the farthest from the end
    rows = np.array([[0.5, 1.0], *([0.5, lengths[i]] for i in chosen)])

    def condition(n):
        return math.log(np.linalg.cond(kernel(rows[:n], rows[:n], 1.0, 0.1)))

    assert condition(len(rows) - 1) <= bound < condition(len(rows))
    for n in range(1, len(rows)):
        seen = rows[:n]
        at = np.array([[0.5, t] for t in lengths])
        across = kernel(at, seen, 1.0, 0.1)
        inverse = np.linalg.inv(kernel(seen, seen, 1.0, 0.1) + 5e-4 * np.eye(n))
        variance = 1 - np.einsum("ij,jk,ik->i", across, inverse, across)
        assert variance[chosen[n - 1]] == pytest.approx(variance.max(), abs=1e-9)
    assert len(curve_gp.virtual_lengths(own, config, lengths, fitted, most=1, bound=bound)) == 1
    assert curve_gp.virtual_lengths(own, config, lengths, fitted, most=5, bound=-1.0) == []
    assert curve_gp.virtual_lengths(own, config, [], fitted, most=5, bound=bound) == []


# --- the scheduler ----------------------------------------------------------------------------


def planted(n=100, length=20, seed=0):
    """A pool on a line whose losses fall towards a bowl around x = 0.37, some faster than others."""
    random = np.random.default_rng(seed)
    x = random.permutation(np.linspace(0, 1, n))
    end = 0.1 + (x - 0.37) ** 2
    return x[:, None], end[:, None] + (1.5 - end[:, None]) * np.exp(-np.arange(1, length + 1) / 4)


def play(pool, curves, slices, workers=2, **options):
    scheduler = Boil(curves.shape[1], pool, **options)
    order = range(len(pool))
    replay = simulate(scheduler, curves, order, workers=workers, max_slices=slices, keep_decisions=True)
    return scheduler, replay


@pytest.mark.parametrize("seed", range(3))
def test_it_finds_a_planted_optimum(seed):
    pool, curves = planted(seed=seed)
    _, replay = play(pool, curves, 120, seed=seed)
    best = curves[:, -1].min()
    # 120 slices are six full trainings: at random the best loss seen is among the three best of a
    # hundred in one of six cases.
    three = np.sort(curves[:, -1])[2]
    assert min(replay.values) <= three
    assert min(replay.values) == pytest.approx(best, abs=0.01)


def legacy_state():
    return np.random.get_state()[1].copy()  # noqa: NPY002 - the global state is what is looked at


def test_the_same_events_give_the_same_choice_whenever_it_is_asked():
    pool, curves = planted(n=40)
    events = []

    class Noting(Boil):
        def started(self, config, until=None):
            super().started(config, until)
            events.append(("started", config, self.until(config)))

        def resumed(self, config, until=None):
            super().resumed(config, until)
            events.append(("resumed", config, self.until(config)))

        def report(self, *event):
            events.append(("report", *event))
            return super().report(*event)

    first = Noting(20, pool, seed=5)
    simulate(first, curves, range(40), workers=3, max_slices=50)
    second = Boil(20, pool, seed=5)  # told of all events, asked once
    for event, *arguments in events:
        getattr(second, event)(*arguments)
    assert list(second.courses.items()) == list(first.courses.items())
    states = torch.get_rng_state(), legacy_state()
    assert first.suggest().rule == "boil"
    assert second.suggest() == first.suggest()
    assert second.fitted == first.fitted
    assert torch.equal(torch.get_rng_state(), states[0])
    np.testing.assert_array_equal(legacy_state(), states[1])


def test_maximising_mirrors_minimising():
    pool, curves = planted(n=30)
    _, down = play(pool, curves, 40, seed=1)
    _, up = play(pool, -curves, 40, seed=1, maximize=True)
    assert (up.configs, up.resources) == (down.configs, down.resources)


def test_another_seed_starts_others():
    pool, curves = planted(n=30)
    assert play(pool, curves, 5, seed=0)[1].started != play(pool, curves, 5, seed=1)[1].started


@pytest.mark.parametrize("bad", [math.nan, 1e34])
def test_it_does_well_beside_diverged_and_absurd_losses(bad):
    pool, curves = planted()
    worst = pool[:, 0] > 0.7
    curves[worst, 2:] = bad
    scheduler, replay = play(pool, curves, 150)
    assert min(replay.values) == pytest.approx(0.1, abs=0.02)
    ends = replay.final_resources()
    if bad != 1e34:
        assert all(ends[row] <= 3 for row in ends if worst[row])
    assert all(d.value is None or math.isfinite(d.value) for _, d in replay.decisions)
    assert not any(scheduler.courses[c].diverged for c in scheduler.paused)


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_where_all_diverge_all_are_tried(bad):
    _, replay = play(np.linspace(0, 1, 9)[:, None], np.full((9, 4), bad), 100)
    assert sorted(replay.configs) == list(range(9))


@pytest.mark.parametrize("length", [1, 2, 20])
def test_a_pool_of_one_is_trained_to_the_end(length):
    scheduler, replay = play(np.full((1, 3), 0.5), np.ones((1, length)), 1000)
    assert replay.resources == list(range(1, length + 1))
    assert scheduler.choose() is None
    assert scheduler.suggest().config is None


def test_all_are_finished_in_the_end_and_no_unit_is_trained_twice():
    pool, curves = planted(n=8, length=6)
    scheduler, replay = play(pool, curves, 1000, workers=3)
    assert replay.final_resources() == dict.fromkeys(range(8), 6)
    assert replay.slices == 48
    assert scheduler.choose() is None


def test_reports_that_skip_units_count():
    scheduler = Boil(10, np.linspace(0, 1, 6)[:, None])
    for _ in range(2):
        config = scheduler.suggest().config
        scheduler.started(config, 6)
        scheduler.report(config, 3, 2.0 + config)
        assert scheduler.report(config, 6, 1.0 + config).action == "pause"
    assert scheduler.suggest().rule == "boil"


def test_the_package_needs_no_gaussian_process_to_be_imported():
    code = "import optuna_ohgw.schedulers, sys; assert not {'gpytorch', 'botorch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
