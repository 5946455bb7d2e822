"""Hyper-gradient estimators against closed forms and float64 central differences."""

import math
from dataclasses import replace

import pytest
import torch
from optuna.distributions import FloatDistribution
from torch import nn

from optuna_ohgw.hypergrad import ESTIMATORS, direct, exact, finite_difference, lean
from optuna_ohgw.lookahead import lookahead_loss
from optuna_ohgw.space import SearchSpace

EPS = torch.finfo(torch.float64).eps
LN10 = math.log(10.0)

PSI = {"lr": 0.1, "momentum": 0.6, "weight_decay": 0.02, "label_smoothing": 0.1, "magnitude": 0.7}
SPACE = SearchSpace(
    {
        "lr": FloatDistribution(1e-3, 10.0, log=True),
        "momentum": FloatDistribution(0.0, 0.99),
        "weight_decay": FloatDistribution(1e-5, 1.0, log=True),
        "label_smoothing": FloatDistribution(0.0, 0.5),
        "magnitude": FloatDistribution(0.0, 2.0),
    }
)
ANALYTIC = ("lr", "momentum", "weight_decay", "label_smoothing")
Z = SPACE.to_search(PSI)


def logistic():
    return nn.Linear(9, 3)


def mlp():
    return nn.Sequential(nn.Linear(9, 8, bias=False), nn.BatchNorm1d(8), nn.SiLU(), nn.Linear(8, 3))


def convolution():
    return nn.Sequential(
        nn.Unflatten(1, (1, 3, 3)),
        nn.Conv2d(1, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.SiLU(),
        nn.Conv2d(4, 3, 2),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(3, 3),
    )


PROBLEMS = [logistic, mlp, convolution]


def augment(inputs, magnitude):
    """Smooth in the magnitude and random, so that a difference needs common random numbers."""
    gain = 1 + 0.3 * magnitude * torch.randn(len(inputs), 1, dtype=inputs.dtype)
    return inputs * gain + 0.2 * magnitude.square() * torch.randn_like(inputs)


def build(make, horizon=1, *, with_velocity=False, dtype=torch.float64, seed=0, **options):
    torch.manual_seed(seed)
    model = make().double()

    def batch(position):
        generator = torch.Generator().manual_seed(1000 * seed + position)
        inputs = torch.randn(12, 9, generator=generator, dtype=torch.float64)
        return inputs.to(dtype), torch.randint(3, (12,), generator=generator)

    velocity = None
    if with_velocity:
        velocity = {n: 0.3 * torch.randn_like(p).to(dtype) for n, p in model.named_parameters()}
    options = {"augment": augment, **options}
    return lookahead_loss(model.to(dtype), batch, horizon=horizon, velocity=velocity, **options)


def central(loss, space, z, i, h):
    """Return (L(z + h·e_i) − L(z − h·e_i)) / 2h in search coordinates and the size of L."""
    step = torch.zeros_like(z)
    step[i] = h
    above, below = (float(loss(space.to_native(z + s)).detach()) for s in (step, -step))
    return (above - below) / (2 * h), max(abs(above), abs(below))


cases = pytest.mark.parametrize(
    ("make", "horizon", "with_velocity"),
    [(make, k, v) for make in PROBLEMS for k in (1, 2, 3) for v in (False, True)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)


class Scale(nn.Module):
    """One weight: the output is w·x."""

    def __init__(self, weight):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(weight, dtype=torch.float64))

    def forward(self, x):
        return self.w * x


def half_square(output, target):
    return 0.5 * (output - target).square().sum()


W, V = 1.3, -0.4
TRAIN = [(1.2, 0.5), (0.7, -1.0)]
HELD_OUT = (-0.9, 2.0)


def quadratic(horizon, velocity, lr_scale=1.0):
    """A one-weight problem with training gradients a·w − b and held-out gradient c·w − d."""
    pairs = [*TRAIN[:horizon], HELD_OUT]

    def batch(position):
        x, t = pairs[position]
        return torch.full((1, 1), x, dtype=torch.float64), torch.full((1, 1), t, dtype=torch.float64)

    velocity = None if velocity is None else {"w": torch.tensor(velocity, dtype=torch.float64)}
    return lookahead_loss(Scale(W), batch, half_square, horizon=horizon, velocity=velocity, lr_scale=lr_scale)


QUADRATIC_SPACE = SearchSpace({n: SPACE.distributions[n] for n in ("lr", "momentum", "weight_decay")})


def quadratic_derivatives(horizon, velocity, lr_scale=1.0):
    """Return (loss, ∂/∂lr, ∂/∂m, ∂/∂wd) in native coordinates, by hand."""
    lr, m, wd = PSI["lr"], PSI["momentum"], PSI["weight_decay"]
    (x0, t0), (x1, t1) = TRAIN
    xv, tv = HELD_OUT
    v0 = 0.0 if velocity is None else velocity
    decayed = x0 * (x0 * W - t0) + wd * W
    if horizon == 1 and velocity is None:
        step = lr_scale * lr / (1 - m)
        w1 = W - step * decayed
        d_lr, d_m = -decayed * lr_scale / (1 - m), -decayed * lr_scale * lr / (1 - m) ** 2
        d_wd, last = -step * W, w1
    else:
        step = lr_scale * lr
        v1 = m * v0 + decayed
        w1 = W - step * v1
        d_lr, d_m, d_wd, last = -lr_scale * v1, -step * v0, -step * W, w1
        if horizon == 2:
            v2 = m * v1 + x1 * (x1 * w1 - t1) + wd * w1
            slope = x1 * x1 + wd
            d_lr, d_m, d_wd = (
                d_lr - lr_scale * v2 - step * slope * d_lr,
                d_m - step * (v1 + m * v0 + slope * d_m),
                d_wd - step * (m * W + w1 + slope * d_wd),
            )
            last = w1 - step * v2
    held_out = xv * (xv * last - tv)
    return 0.5 * (xv * last - tv) ** 2, held_out * d_lr, held_out * d_m, held_out * d_wd


@pytest.mark.parametrize("lr_scale", [1.0, 0.5])
@pytest.mark.parametrize("velocity", [None, V])
@pytest.mark.parametrize("horizon", [1, 2])
@pytest.mark.parametrize("estimator", [exact, lean, finite_difference])
def test_closed_form_of_one_weight(estimator, horizon, velocity, lr_scale):
    loss = quadratic(horizon, velocity, lr_scale)
    z = QUADRATIC_SPACE.to_search(PSI)
    options = {"step_unit": 1e-5} if estimator is finite_difference else {}
    found = estimator(loss, QUADRATIC_SPACE, z, **options)
    value, d_lr, d_m, d_wd = quadratic_derivatives(horizon, velocity, lr_scale)
    # lr and weight decay are logarithmic: ∂/∂log10 ψ = ψ·ln 10·∂/∂ψ
    expected = [PSI["lr"] * LN10 * d_lr, d_m, PSI["weight_decay"] * LN10 * d_wd]
    # central differences at 1e-5 of a range of 4: truncation about (4e-5·ln 10)²/6 = 1e-9
    # times ratios of derivatives, rounding ε·|L|/4e-5 = 1e-11
    rel = 1e-7 if estimator is finite_difference else 1e-12
    assert found.loss == pytest.approx(value, rel=1e-13)
    assert found.gradient.tolist() == pytest.approx(expected, rel=rel, abs=1e-10 if rel > 1e-8 else 0)


def test_one_step_derivatives_are_the_inner_products_of_the_paper():
    loss = quadratic(1, V)
    (x, t), (xv, tv) = TRAIN[0], HELD_OUT
    lr, m, wd = PSI["lr"], PSI["momentum"], PSI["weight_decay"]
    g = x * (x * W - t)
    held_out = xv * (xv * (W - lr * (m * V + g + wd * W)) - tv)
    native = torch.tensor([lr * LN10, 1.0, wd * LN10], dtype=torch.float64)
    for estimator in (exact, lean):
        found = estimator(loss, QUADRATIC_SPACE, QUADRATIC_SPACE.to_search(PSI)).gradient / native
        # ∂L/∂lr = −⟨G, m·v + g + λ·w⟩, ∂L/∂m = −lr·⟨G, v⟩, ∂L/∂λ = −lr·⟨G, w⟩
        expected = [-held_out * (m * V + g + wd * W), -lr * held_out * V, -lr * held_out * W]
        assert found.tolist() == pytest.approx(expected, rel=1e-12)


def test_linear_coordinates_have_no_chain_rule():
    linear = SearchSpace({"lr": FloatDistribution(0.0, 1.0), "weight_decay": FloatDistribution(0.0, 1.0)})
    loss = quadratic(2, V)
    fixed = replace(loss, fixed={"momentum": PSI["momentum"]})
    _, d_lr, _, d_wd = quadratic_derivatives(2, V)
    for estimator in (exact, lean):
        gradient = estimator(fixed, linear, linear.to_search(PSI)).gradient
        assert gradient.tolist() == pytest.approx([d_lr, d_wd], rel=1e-12)


@pytest.mark.parametrize("estimator", [exact, lean, finite_difference])
@cases
def test_every_component_is_the_central_difference(make, horizon, with_velocity, estimator):
    loss = build(make, horizon, with_velocity=with_velocity)
    options = {} if estimator is exact else {"step_unit": 2e-6}
    found = estimator(loss, SPACE, Z, **options)
    h = 1e-5
    for i, name in enumerate(SPACE.names):
        difference, size = central(loss, SPACE, Z, i, h)
        # truncation is h²·L'''/6, far below 1e-4·|g|; the two values are off by a few ε·|L|, and
        # an estimator that is itself a difference (2e-6 of a range up to 5) by as much again
        allowed = 1e-4 * abs(difference) + 10 * EPS * size / h
        if found.methods[name] == "finite-difference":
            allowed += 10 * EPS * size / (2e-6 * float(SPACE.width[i]))
        assert abs(float(found.gradient[i]) - difference) <= allowed, name
        assert abs(difference) > 100 * allowed, f"{name}: the test would not see this component"
    assert found.loss == pytest.approx(float(loss(SPACE.to_native(Z))), rel=1e-13)


@cases
def test_lean_is_exact_to_rounding_and_differences_the_magnitude(make, horizon, with_velocity):
    loss = build(make, horizon, with_velocity=with_velocity, lr_scale=0.7)
    found, expected = lean(loss, SPACE, Z), exact(loss, SPACE, Z)
    assert found.loss == pytest.approx(expected.loss, rel=1e-13)
    for i, name in enumerate(SPACE.names):
        if name in ANALYTIC:
            assert found.methods[name] == "lean"
            # the same products summed in another order: 1e-10 leaves room for cancellation
            assert float(found.gradient[i]) == pytest.approx(float(expected.gradient[i]), rel=1e-10)
    magnitude = SPACE.names.index("magnitude")
    coarse = finite_difference(loss, SPACE, Z)
    assert found.methods["magnitude"] == coarse.methods["magnitude"] == "finite-difference"
    assert float(found.gradient[magnitude]) == float(coarse.gradient[magnitude])
    # at 5% of the range it is a coarse difference, not the derivative
    assert float(found.gradient[magnitude]) != pytest.approx(float(expected.gradient[magnitude]), rel=1e-4)


def test_lean_and_exact_agree_when_some_hyper_parameters_are_fixed():
    space = SearchSpace({n: SPACE.distributions[n] for n in ("weight_decay", "lr")})
    for horizon in (1, 3):
        loss = build(mlp, horizon, fixed=PSI)
        z = space.to_search(PSI)
        whole = exact(build(mlp, horizon), SPACE, Z)
        expected = [float(whole.gradient[SPACE.names.index(n)]) for n in space.names]
        assert exact(loss, space, z).gradient.tolist() == pytest.approx(expected, rel=1e-10)
        assert lean(loss, space, z).gradient.tolist() == pytest.approx(expected, rel=1e-10)


def test_frozen_parameters_take_no_part():
    for estimator in (exact, lean):
        loss = build(mlp, 2)
        loss.model[0].weight.requires_grad_(False)
        found = estimator(loss, SPACE, Z)
        for name in ANALYTIC:
            i = SPACE.names.index(name)
            difference, size = central(loss, SPACE, Z, i, 1e-5)
            allowed = 1e-4 * abs(difference) + 10 * EPS * size / 1e-5
            assert abs(float(found.gradient[i]) - difference) <= allowed, name


@pytest.mark.parametrize("make", PROBLEMS)
def test_direct_is_the_derivative_of_the_regularised_training_loss(make):
    loss = build(make, 2, with_velocity=True)
    found = direct(loss, SPACE, Z)
    by_name = dict(zip(SPACE.names, found.gradient.tolist(), strict=True))
    assert by_name["lr"] == by_name["momentum"] == 0.0
    assert found.methods == {
        "lr": "zero",
        "momentum": "zero",
        "weight_decay": "direct",
        "label_smoothing": "direct",
        "magnitude": "direct",
    }
    squares = sum(float(p.detach().square().sum()) for p in loss.model.parameters())
    expected = 0.5 * squares * PSI["weight_decay"] * LN10
    assert by_name["weight_decay"] == pytest.approx(expected, rel=1e-13)
    for name in ("label_smoothing", "magnitude"):
        difference, size = central(loss.direct, SPACE, Z, SPACE.names.index(name), 1e-5)
        allowed = 1e-4 * abs(difference) + 10 * EPS * size / 1e-5
        assert abs(by_name[name] - difference) <= allowed
        assert abs(difference) > 100 * allowed
    assert found.loss == pytest.approx(float(loss.direct(SPACE.to_native(Z)).detach()), rel=1e-14)
    assert found.cost_mbu == 1.0


def test_direct_calls_a_magnitude_without_augmentation_zero():
    found = direct(build(logistic, augment=None), SPACE, Z)
    assert found.methods["magnitude"] == "zero"
    assert float(found.gradient[SPACE.names.index("magnitude")]) == 0.0


def test_weights_before_batch_norm_are_scale_invariant():
    loss = build(mlp)
    loss.model[1].eps = 1e-30
    params = loss.params()
    value = loss.validation_loss(params)
    gradients = dict(zip(params, torch.autograd.grad(value, params.values()), strict=True))

    def cosine(name):
        weight, gradient = params[name].detach(), gradients[name]
        return float((weight * gradient).sum() / (weight.norm() * gradient.norm()))

    # 72 products that cancel: each is off by a few ε
    assert abs(cosine("0.weight")) < 1e-13
    assert abs(cosine("3.weight")) > 1e-2


def test_the_one_step_weight_decay_of_a_scale_invariant_network_is_of_second_order_in_lr():
    def scale_invariant():
        norms = [nn.BatchNorm1d(n, affine=False, eps=1e-30) for n in (8, 3)]
        first, last = nn.Linear(9, 8, bias=False), nn.Linear(8, 3, bias=False)
        return nn.Sequential(first, norms[0], nn.SiLU(), last, norms[1])

    space = SearchSpace({"weight_decay": SPACE.distributions["weight_decay"]})

    def weight_decay_component(make, lr):
        loss = build(make, augment=None, fixed={"lr": lr})
        return float(exact(loss, space, space.to_search(PSI)).gradient)

    # −lr·⟨G(w₁), w₀⟩ with ⟨G(w₀), w₀⟩ = 0: ten times the step is a hundred times the component
    small, large = (weight_decay_component(scale_invariant, lr) for lr in (1e-4, 1e-3))
    assert large / small == pytest.approx(100.0, rel=0.05)
    small, large = (weight_decay_component(logistic, lr) for lr in (1e-4, 1e-3))
    assert large / small == pytest.approx(10.0, rel=0.05)


def brighten(inputs, magnitude):
    """Deterministic, since random numbers differ between float32 and float64."""
    return inputs * (1 + 0.3 * magnitude * torch.linspace(-1, 1, 9, dtype=inputs.dtype))


@pytest.mark.parametrize("seed", range(3))
@cases
def test_lean_in_float32_is_close_to_exact_in_float64(make, horizon, with_velocity, seed):
    single, double = (
        build(make, horizon, with_velocity=with_velocity, dtype=dtype, seed=seed, augment=brighten)
        for dtype in (torch.float32, torch.float64)
    )
    found, expected = lean(single, SPACE, Z), exact(double, SPACE, Z)
    assert found.gradient.dtype == torch.float64
    eps = torch.finfo(torch.float32).eps
    for i, name in enumerate(ANALYTIC):
        # Each of at most six passes is off by a few ε, and the inner products over weights lose
        # up to two digits to cancellation: 256 ε = 3e-5. Measured over 40 seeds: median 1e-7,
        # 99th percentile 5e-6, worst 5e-4 in a component 1e-4 of the norm.
        assert float(found.gradient[i]) == pytest.approx(float(expected.gradient[i]), rel=256 * eps), name
    assert found.methods["magnitude"] == "finite-difference"
    i = SPACE.names.index("magnitude")
    coarse = finite_difference(double, SPACE, Z)
    # two values off by a few ε·|L| over a tenth of the range
    allowed = 16 * eps * abs(coarse.loss) / (0.1 * float(SPACE.width[i]))
    assert abs(float(found.gradient[i] - coarse.gradient[i])) <= allowed


PLAIN = SearchSpace(
    {
        "a": FloatDistribution(1e-2, 1e2, log=True),
        "b": FloatDistribution(-1.0, 3.0),
        "c": FloatDistribution(0.0, 10.0),
    }
)


def test_any_differentiable_callable_is_a_loss():
    z = torch.tensor([0.5, 2.0, 4.0], dtype=torch.float64)
    found = exact(lambda psi: psi["a"] * psi["b"] + psi["c"] ** 2, PLAIN, z)
    a = 10**0.5
    assert found.loss == pytest.approx(2 * a + 16, rel=1e-14)
    assert found.gradient.tolist() == pytest.approx([2 * a * LN10, a, 8.0], rel=1e-14)
    assert found.cost_mbu == 1.0
    assert set(found.methods.values()) == {"exact"}


def test_the_costs_a_loss_declares_are_used():
    class Declared:
        cost_mbu, exact_cost_mbu = 5.0, 11.0

        def __call__(self, psi):
            return psi["a"] + psi["b"] + psi["c"]

    z = torch.zeros(3, dtype=torch.float64)
    assert exact(Declared(), PLAIN, z).cost_mbu == 11.0
    assert finite_difference(Declared(), PLAIN, z).cost_mbu == 35.0


def test_components_outside_the_graph_fall_back_to_differences_and_say_so():
    def loss(psi):
        return psi["a"].square() + 3.0 * float(psi["b"].detach()) ** 2

    z = torch.tensor([0.0, 1.0, 5.0], dtype=torch.float64)
    found = exact(loss, PLAIN, z)
    assert found.methods == {"a": "exact", "b": "finite-difference", "c": "finite-difference"}
    # the central difference of a parabola is exact at any step
    assert found.gradient.tolist() == pytest.approx([2 * LN10, 6.0, 0.0], rel=1e-12)
    # 1 mbu and two forward passes for each of two components
    assert found.cost_mbu == pytest.approx(1 + 2 * 2 / 3, rel=1e-14)


def test_a_loss_without_any_graph_is_differenced_in_every_component():
    def loss(psi):
        return torch.tensor(sum(float(v.detach()) for v in psi.values()), dtype=torch.float64)

    z = torch.tensor([0.0, 1.0, 5.0], dtype=torch.float64)
    found = exact(loss, PLAIN, z)
    assert set(found.methods.values()) == {"finite-difference"}
    # a = 10**z at ±5% of a range of 4
    assert found.gradient.tolist() == pytest.approx([(10**0.2 - 10**-0.2) / 0.4, 1.0, 1.0], rel=1e-12)


def test_an_augmentation_without_a_gradient_falls_back_in_a_look_ahead_loss():
    def in_whole_steps(inputs, magnitude):
        return inputs * (1 + float(magnitude.detach().round()))

    z = SPACE.to_search({**PSI, "magnitude": 0.5})
    loss = build(mlp, 2, augment=in_whole_steps)
    found, expected = exact(loss, SPACE, z), finite_difference(loss, SPACE, z)
    i = SPACE.names.index("magnitude")
    assert found.methods["magnitude"] == "finite-difference"
    assert [found.methods[n] for n in ANALYTIC] == ["exact"] * 4
    assert float(found.gradient[i]) == float(expected.gradient[i]) != 0.0
    assert found.cost_mbu == pytest.approx(7 + 2 * (2 + 1 / 3), rel=1e-14)


@pytest.mark.parametrize(
    ("z", "expected"),
    [
        # x² between x + h and x − h: slope 2x, with the outer point cut at the bound 2x ∓ h
        (1.0, 2.0),
        (3.0, 6.0 - 0.2),
        (-1.0, -2.0 + 0.2),
        (2.9, (3.0**2 - 2.7**2) / 0.3),
    ],
)
def test_a_difference_at_a_bound_is_one_sided_and_stays_inside(z, expected):
    seen = []

    def loss(psi):
        seen.append(float(psi["b"].detach()))
        return psi["b"].detach().square()

    space = SearchSpace({"b": PLAIN.distributions["b"]})
    at = torch.tensor([z], dtype=torch.float64)
    for estimator in (finite_difference, exact):
        seen.clear()
        found = estimator(loss, space, at)
        assert found.gradient.tolist() == pytest.approx([expected], rel=1e-12)
        assert len(seen) == 3
        assert all(-1.0 <= b <= 3.0 for b in seen)


@pytest.mark.parametrize("corner", ["low", "high"])
def test_every_estimator_is_finite_at_the_bounds(corner):
    space = SearchSpace({**SPACE.distributions, "lr": FloatDistribution(1e-3, 1.0, log=True)})
    z = getattr(space, corner)
    for name, estimator in ESTIMATORS.items():
        found = estimator(build(mlp, 2), space, z)
        assert torch.isfinite(found.gradient).all(), name
        assert math.isfinite(found.loss), name


@pytest.mark.parametrize("horizon", [1, 2, 3])
def test_costs_in_mini_batch_units(horizon):
    loss = build(logistic, horizon)
    bare = SearchSpace({n: SPACE.distributions[n] for n in ("lr", "weight_decay")})
    smooth = SearchSpace({n: SPACE.distributions[n] for n in ("lr", "label_smoothing")})
    evaluation = horizon + 1 / 3
    expected = [
        (finite_difference, SPACE, 11 * evaluation),
        (finite_difference, bare, 5 * evaluation),
        (exact, SPACE, 3 * horizon + 1),
        (exact, bare, 3 * horizon + 1),
        (direct, SPACE, 1),
        (lean, bare, horizon + 1 + 3 * (horizon - 1)),
        (lean, smooth, 2 * horizon + 1 + 3 * (horizon - 1)),
        (lean, SPACE, 2 * horizon + 1 + 3 * (horizon - 1) + 2 * evaluation),
    ]
    for estimator, space, cost in expected:
        found = estimator(loss, space, space.to_search(PSI))
        assert found.cost_mbu == pytest.approx(cost, rel=1e-14), (estimator.__name__, space.names)


def test_lean_keeps_its_promise_of_cost_at_horizon_one():
    found = lean(build(logistic), SPACE, Z)
    assert found.cost_mbu == pytest.approx(5 + 2 / 3, rel=1e-14)
    assert found.cost_mbu <= 6.0


@pytest.mark.parametrize("horizon", [1, 2, 3])
def test_lean_runs_a_double_backward_only_where_it_says(horizon, monkeypatch):
    kept = []
    grad = torch.autograd.grad

    def counted(*args, create_graph=False, **kwargs):
        kept.append(create_graph)
        return grad(*args, create_graph=create_graph, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    lean(build(logistic, horizon), SPACE, Z)
    assert sum(kept) == horizon - 1


@pytest.mark.parametrize("estimator", [exact, lean, finite_difference, direct])
def test_a_loss_that_is_nan_stays_nan(estimator):
    loss = build(mlp)
    with torch.no_grad():
        loss.model[3].bias[0] = math.nan
    found = estimator(loss, SPACE, Z)
    assert math.isnan(found.loss)
    names = ("label_smoothing",) if estimator is direct else ("lr", "label_smoothing", "magnitude")
    assert all(math.isnan(found.gradient[SPACE.names.index(n)]) for n in names)


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_every_estimator_repeats_its_result_and_returns_float64_in_the_order_of_the_space(name):
    space = SearchSpace({n: SPACE.distributions[n] for n in reversed(SPACE.names)})
    loss = build(mlp, 2)
    first, second = (ESTIMATORS[name](loss, SPACE, Z) for _ in range(2))
    assert torch.equal(first.gradient, second.gradient)
    assert first.gradient.dtype == torch.float64
    assert first.gradient.shape == (5,)
    assert not first.gradient.requires_grad
    assert tuple(first.methods) == SPACE.names
    backwards = ESTIMATORS[name](loss, space, space.to_search(PSI))
    # the order of names changes the order of sums at most
    assert backwards.gradient.flip(0).tolist() == pytest.approx(first.gradient.tolist(), rel=1e-10)


def test_an_estimator_works_where_gradients_are_switched_off():
    expected = {name: f(build(mlp), SPACE, Z).gradient for name, f in ESTIMATORS.items()}
    with torch.no_grad():
        for name, estimator in ESTIMATORS.items():
            assert torch.equal(estimator(build(mlp), SPACE, Z).gradient, expected[name]), name
