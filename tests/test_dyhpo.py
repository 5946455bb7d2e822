"""Oracles: closed forms, Monte Carlo, a pool whose best is known, and the same choice in another process."""

import math

import numpy as np
import pytest
import torch

pytest.importorskip("gpytorch")

from optuna_ohgw.schedulers import deep_kernel, dyhpo
from optuna_ohgw.schedulers.deep_kernel import DeepKernelGP, Inputs, Network
from optuna_ohgw.schedulers.dyhpo import Dyhpo, scaled
from optuna_ohgw.simulation import simulate


@pytest.fixture(scope="module")
def planted():
    """A pool in which the loss depends on x alone, falls with the resource, and is best at 0.7."""
    x = np.random.default_rng(3).random((60, 1))
    resource = np.arange(1, 11)
    curves = abs(x - 0.7) + 0.3 / resource + 0.1
    return x, curves


@pytest.fixture
def quick(monkeypatch):
    """Train less, where the choice need not be good."""
    monkeypatch.setattr(dyhpo, "FIRST_STEPS", 20)
    monkeypatch.setattr(dyhpo, "MOST_STEPS", 5)


def seen(scheduler, curves, pairs):
    """Let candidates report up to a resource, in order."""
    for config, until in pairs:
        scheduler.started(config, until)
        for resource in range(1, until + 1):
            scheduler.report(config, resource, float(curves[config][resource - 1]))
    return scheduler


SEEN = [(0, 2), (1, 1), (2, 1), (3, 3), (4, 1), (5, 1)]


def problem(n=12, d=3, length=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    inputs = Inputs(torch.rand(n, d + 1, generator=g), torch.rand(n, length, generator=g))
    targets = torch.sin(6 * inputs.points[:, 0])
    return inputs, (targets - targets.mean()) / targets.std()


def test_the_network_has_the_paper_s_shapes():
    network = Network(5)
    shapes = {name: tuple(p.shape) for name, p in network.named_parameters()}
    assert shapes == {
        "point.0.weight": (64, 6),
        "point.0.bias": (64,),
        "point.1.weight": (64,),
        "point.1.bias": (64,),
        "curve.weight": (4, 1, 3),
        "curve.bias": (4,),
        "joined.0.weight": (128, 68),
        "joined.0.bias": (128,),
    }
    assert network(torch.rand(7, 6), torch.rand(7, 9)).shape == (7, 128)


def test_the_length_of_the_padding_does_not_matter():
    network = Network(2).eval()
    points, curves = torch.rand(4, 3), torch.rand(4, 6)
    longer = torch.cat([curves, torch.zeros(4, 3)], dim=1)
    longest = torch.cat([curves, torch.zeros(4, 8)], dim=1)
    torch.testing.assert_close(network(points, longer), network(points, longest))


def test_expected_improvement_is_the_mean_over_draws():
    mean, std = torch.tensor([0.0, 1.0, -2.0]), torch.tensor([1.0, 0.5, 2.0])
    incumbent = torch.tensor([0.5, 0.5, 0.0])
    draws = mean + std * torch.randn(400_000, 3, generator=torch.Generator().manual_seed(0))
    oracle = (draws - incumbent).clamp_min(0).mean(dim=0)
    # The standard error of the mean is at most 2 / sqrt(400000) = 0.003.
    torch.testing.assert_close(
        deep_kernel.expected_improvement(mean, std, incumbent), oracle, atol=0.01, rtol=0
    )


def test_expected_improvement_at_the_incumbent_and_far_from_it():
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    assert deep_kernel.expected_improvement(zero, one, zero).item() == pytest.approx(
        1 / math.sqrt(2 * math.pi)
    )
    assert deep_kernel.expected_improvement(9 * one, 1e-9 * one, zero).item() == pytest.approx(9)
    assert deep_kernel.expected_improvement(-60 * one, one, zero).item() == 0


def test_the_posterior_is_the_closed_form():
    inputs, targets = problem()
    at, _ = problem(n=5, seed=1)
    state = deep_kernel.fit(inputs, targets, None, steps=30, lr=1e-2, seen=12)
    mean, std = deep_kernel.posterior(state, inputs, targets, at)

    model = deep_kernel.model_of(inputs, targets, state).double().eval()
    length = model.covar_module.base_kernel.lengthscale.item()
    scale = model.covar_module.outputscale.item()
    noise, constant = model.likelihood.noise.item(), model.mean_module.constant.item()
    with torch.no_grad():
        a, b = (model.network(*rows.double()).numpy() for rows in (inputs, at))

    def kernel(p, q):
        return scale * np.exp(-((p[:, None] - q[None]) ** 2).sum(-1) / (2 * length**2))

    y = targets.double().numpy()
    inverse = np.linalg.inv(kernel(a, a) + noise * np.eye(len(a)))
    oracle = constant + kernel(b, a) @ inverse @ (y - constant)
    variance = np.diag(kernel(b, b) - kernel(b, a) @ inverse @ kernel(a, b))
    # Both in float64; the condition number is at most scale · n / noise, about 1e4.
    np.testing.assert_allclose(mean, oracle, atol=1e-8)
    np.testing.assert_allclose(std, np.sqrt(variance), atol=1e-6)


def test_training_raises_the_marginal_likelihood():
    inputs, targets = problem(n=24)

    def loss(state):
        model = deep_kernel.model_of(inputs, targets, state)
        features = model.network(*inputs).detach()
        covariance = model.covar_module(features).to_dense() + model.likelihood.noise * torch.eye(24)
        normal = torch.distributions.MultivariateNormal(model.mean_module.constant.expand(24), covariance)
        return -normal.log_prob(targets).item() / 24

    short = deep_kernel.fit(inputs, targets, None, steps=2, lr=1e-2, seen=24)
    assert loss(deep_kernel.fit(inputs, targets, short, steps=60, lr=1e-2, seen=24)) < loss(short) - 0.3


def test_what_fails_is_said_to_have_failed():
    inputs, targets = problem()
    assert deep_kernel.fit(inputs, targets * math.nan, None, steps=3, lr=1e-2, seen=12) is None
    # Independent noise cannot be predicted, and a huge step leaves nothing of the weights.
    state = deep_kernel.fit(inputs, targets, None, steps=3, lr=1e-2, seen=12)
    assert deep_kernel.fit(inputs, 40 * targets, state, steps=2, lr=1e-6, seen=12) is None


def test_scores_are_robust():
    losses = np.array([0.5, 0.7, 0.7, 0.9, 1e34, math.inf, 0.6])
    np.testing.assert_allclose(scaled(losses), [1, 0.5, 0.5, 0, 0, 0, 0.75], atol=1e-12)
    np.testing.assert_array_equal(scaled(np.array([2.0, 2.0, math.inf])), [1, 1, 0])
    assert scaled(np.array([3.4e38, -3.4e38, 1e308, -1e308])).tolist()[-1] == 1


@pytest.mark.slow
def test_it_finds_the_best_in_far_fewer_slices_than_random(planted):
    x, curves = planted
    ranked = curves[:, -1].argsort().tolist()
    found = 0
    for seed in range(4):
        replay = simulate(Dyhpo(10, x, seed=seed), curves, range(60), workers=2, max_slices=50)
        found += replay.returned() in ranked[:3]
        assert max(replay.final_resources().values()) == 10
    # Five full curves drawn at random contain one of the three best with probability 0.23, three times
    # in four with 0.04.
    assert found >= 3


def test_the_choice_follows_from_pool_seed_and_events(planted, quick):
    x, curves = planted
    torch.manual_seed(5)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    one = seen(Dyhpo(10, x, seed=1), curves, SEEN)
    choice = one.choose()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    assert choice.rule == "expected improvement"
    assert one.choose() == choice
    torch.rand(7)
    np.random.default_rng().random()
    assert seen(Dyhpo(10, x, seed=1), curves, SEEN).choose() == choice


def test_a_state_handed_over_gives_the_same_choice(planted, quick):
    x, curves = planted
    kept = seen(Dyhpo(10, x), curves, SEEN)
    first = kept.choose()
    handed = {name: value.clone() for name, value in kept.state.items()}
    # The same events: the weights have seen them all.
    again = seen(Dyhpo(10, x, state=handed), curves, SEEN)
    assert again.choose() == first
    assert all(torch.equal(again.state[name], value) for name, value in handed.items())
    # More events: both refine.
    after = [(6, 1), (7, 2)]
    later = seen(Dyhpo(10, x, state=handed), curves, SEEN + after)
    seen(kept, curves, after)
    choice = kept.choose()
    assert later.choose() == choice
    assert all(torch.equal(later.state[name], value) for name, value in kept.state.items())
    assert not torch.equal(kept.state["network.joined.0.weight"], handed["network.joined.0.weight"])
    # And choosing changed nothing of what was handed over.
    assert float(handed["observations"]) == 9
    assert later.choose() == choice


def test_a_state_is_small_and_checked(quick):
    x = np.random.default_rng(0).random((8, 20))
    scheduler = seen(Dyhpo(4, x), np.tile(x.sum(1)[:, None], 4), [(c, 1) for c in range(5)])
    scheduler.choose()
    assert 4 * sum(value.numel() for value in scheduler.state.values()) < 2**16
    as_floats = {name: value.float() for name, value in scheduler.state.items()}
    again = seen(Dyhpo(4, x, state=as_floats), np.tile(x.sum(1)[:, None], 4), [(c, 1) for c in range(6)])
    assert again.choose().rule == "expected improvement"
    with pytest.raises(ValueError, match="state has 20 hyper-parameters, the candidates 3"):
        Dyhpo(4, x[:, :3], state=scheduler.state)
    with pytest.raises(ValueError, match="step is 0"):
        Dyhpo(4, x, step=0)


def test_maximising_the_negative_is_the_same(planted, quick):
    x, curves = planted
    down = simulate(Dyhpo(10, x), curves, range(60), workers=3, max_slices=15)
    up = simulate(Dyhpo(10, x, maximize=True), -curves, range(60), workers=3, max_slices=15)
    assert (down.configs, down.resources) == (up.configs, up.resources)


def test_nan_and_huge_losses_are_evidence(planted):
    x, curves = planted
    bad = curves.copy()
    bad[x[:, 0] < 0.3] = math.nan
    bad[(x[:, 0] > 0.3) & (x[:, 0] < 0.4)] = 1e34
    replay = simulate(Dyhpo(10, x), bad, range(60), workers=2, max_slices=40, keep_decisions=True)
    last = replay.final_resources()
    assert all(last[c] == 1 for c in last if x[c, 0] < 0.3)
    assert {d.rule for _, d in replay.decisions} == {"initial design", "expected improvement"}
    assert curves[replay.returned(), -1] < np.quantile(curves[:, -1], 0.15)


def test_all_diverged_starts_others_at_random():
    x = np.random.default_rng(0).random((7, 2))
    replay = simulate(Dyhpo(4, x), np.full((7, 4), math.nan), range(7))
    assert sorted(replay.started) == list(range(7))
    assert replay.slices == 7


def test_a_pool_of_one_is_trained_to_the_end(quick):
    scheduler = Dyhpo(4, np.array([[0.5]]))
    replay = simulate(scheduler, np.array([[4.0, 3.0, 2.0, 1.0]]), [0])
    assert replay.resources == [1, 2, 3, 4]
    assert scheduler.choose() is None
    assert scheduler.suggest().config is None


def test_steps_are_units_and_end_at_the_full_budget(quick):
    x = np.random.default_rng(0).random((3, 1))
    scheduler = Dyhpo(5, x, step=2)
    curves = np.tile(x, 5) + np.linspace(1, 0, 5)
    replay = simulate(scheduler, curves, range(3), keep_decisions=True)
    sent = {d.until for _, d in replay.decisions if d.until is not None}
    assert sent == {2, 4, 5}
    assert set(replay.final_resources().values()) == {5}


def test_running_candidates_are_not_chosen_and_count_as_observed(planted, quick, monkeypatch):
    x, curves = planted
    scheduler = seen(Dyhpo(10, x), curves, SEEN)
    first = scheduler.choose()
    asked = []
    plain = deep_kernel.posterior

    def posterior(state, inputs, targets, at):
        asked.append((len(targets), len(at.points)))
        return plain(state, inputs, targets, at)

    monkeypatch.setattr(deep_kernel, "posterior", posterior)
    (scheduler.resumed if first.config in scheduler.courses else scheduler.started)(first.config, first.until)
    assert scheduler.choose().config != first.config
    assert asked == [(9, 1), (10, 59)]


def test_where_training_fails_the_choice_is_random_and_says_so(planted, monkeypatch):
    x, curves = planted
    tries = []
    monkeypatch.setattr(deep_kernel, "fit", lambda *a, **k: tries.append(torch.rand(1).item()))
    scheduler = seen(Dyhpo(10, x), curves, SEEN)
    choice = scheduler.choose()
    assert (choice.rule, choice.score) == ("random: training failed", None)
    assert len(set(tries)) == 3
    assert scheduler.state is None
    assert scheduler.choose() == choice


def test_evidence_is_limited_and_has_the_last_of_each(planted, monkeypatch):
    x, curves = planted
    monkeypatch.setattr(dyhpo, "EVIDENCE", 7)
    scheduler = seen(Dyhpo(10, x), curves, SEEN)
    rows = scheduler._observations()
    kept = scheduler._evidence(rows).tolist()
    assert len(kept) == 7
    assert set(np.flatnonzero(rows.last)) <= set(kept)


def test_the_process_is_float32_while_it_trains():
    inputs, targets = problem()
    assert {p.dtype for p in DeepKernelGP(inputs, targets).parameters()} == {torch.float32}
