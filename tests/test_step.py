import math
import sys

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from optuna.distributions import FloatDistribution

from optuna_ohgw.space import SearchSpace
from optuna_ohgw.step import (
    best_candidate,
    gaussian_step,
    random_gradient,
    raw_step,
    unit_direction,
    unit_step,
)

EPS = sys.float_info.epsilon

# search bounds [-5, 0], [0, 0.5], [0, 10]; widths 5, 0.5, 10
SPACE = SearchSpace(
    {
        "lr": FloatDistribution(1e-5, 1.0, log=True),
        "momentum": FloatDistribution(0.0, 0.5),
        "magnitude": FloatDistribution(0.0, 10.0),
    }
)
CENTRE = torch.tensor([-2.5, 0.25, 5.0], dtype=torch.float64)

gradients = st.lists(
    st.floats(-1e6, 1e6, allow_subnormal=False).filter(lambda g: g == 0 or abs(g) > 1e-6),
    min_size=3,
    max_size=3,
).map(lambda values: torch.tensor(values, dtype=torch.float64))


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("z", "gradient", "eta_h", "expected"),
    [
        ((-2.5, 0.25, 5.0), (0.0, 0.0, 0.0), 1e-3, (-2.5, 0.25, 5.0)),
        ((-2.5, 0.25, 5.0), (1.0, 0.0, 0.0), 0.5, (-3.0, 0.25, 5.0)),
        ((-2.5, 0.25, 5.0), (-1.0, 0.25, -4.0), 0.5, (-2.0, 0.125, 7.0)),
        ((-2.5, 0.25, 5.0), (1e9, -1e9, 1e9), 1e-3, (-5.0, 0.5, 0.0)),
        ((-5.0, 0.5, 0.0), (1.0, -1.0, 1.0), 1.0, (-5.0, 0.5, 0.0)),
        ((-5.0, 0.5, 0.0), (-1.0, 0.25, -1.0), 1.0, (-4.0, 0.25, 1.0)),
    ],
)
def test_the_raw_step_is_against_the_gradient_and_clipped(z, gradient, eta_h, expected):
    assert raw_step(SPACE, vector(*z), vector(*gradient), eta_h).tolist() == list(expected)


@pytest.mark.parametrize(
    ("gradient", "expected"),
    [
        ((0.0, 0.0, 0.0), (0.0, 0.0, 0.0)),
        ((2.0, 0.0, 0.0), (-1.0, 0.0, 0.0)),
        ((0.0, -7.0, 0.0), (0.0, 1.0, 0.0)),
        # in unit coordinates the gradient is (3, 4, 0): widths 5 and 0.5
        ((0.6, 8.0, 0.0), (-0.6, -0.8, 0.0)),
        # equal parts in unit coordinates
        ((0.2, 2.0, -0.1), (-(3**-0.5), -(3**-0.5), 3**-0.5)),
    ],
)
def test_the_unit_direction_is_minus_the_gradient_in_unit_coordinates(gradient, expected):
    assert unit_direction(SPACE, vector(*gradient)).tolist() == pytest.approx(expected, abs=2 * EPS)


@given(gradients, st.floats(0.01, 0.45))
def test_a_trust_region_step_moves_by_exactly_the_radius(gradient, radius):
    assume(bool(gradient.any()))
    moved = unit_step(SPACE, CENTRE, unit_direction(SPACE, gradient), radius)
    change = SPACE.to_unit(moved) - SPACE.to_unit(CENTRE)
    # coordinates up to 1 hold rounding of a few ε whatever the radius
    assert float(torch.linalg.vector_norm(change)) == pytest.approx(radius, abs=8 * EPS)


@given(gradients, st.integers(0, 2**31))
def test_a_trust_region_step_minimises_the_linear_model_in_its_ball(gradient, seed):
    moved = unit_step(SPACE, CENTRE, unit_direction(SPACE, gradient), 0.2)
    model = float(gradient @ (moved - CENTRE))
    others = torch.randn(20, 3, generator=seeded(seed), dtype=torch.float64)
    others = 0.2 * others / torch.linalg.vector_norm(others, dim=1, keepdim=True)
    linear = (others * SPACE.width) @ gradient
    scale = float((gradient.abs() * SPACE.width).sum())
    assert float(linear.min()) >= model - 8 * EPS * scale
    # the minimum of a linear function in a ball is −radius times the norm of its gradient
    norm = math.hypot(*(g * w for g, w in zip(gradient.tolist(), (5, 0.5, 10), strict=True)))
    assert model == pytest.approx(-0.2 * norm, abs=8 * EPS * scale)


@given(st.lists(st.floats(0.0, 1.0), min_size=3, max_size=3))
def test_a_zero_gradient_moves_nothing_bit_for_bit(unit):
    z = SPACE.clip(SPACE.from_unit(vector(*unit)))
    zero = torch.zeros(3, dtype=torch.float64)
    assert torch.equal(unit_step(SPACE, z, unit_direction(SPACE, zero), 0.2), z)
    assert torch.equal(raw_step(SPACE, z, zero, 1e3), z)


def test_a_zero_step_does_not_round_through_unit_coordinates():
    zero = torch.zeros(3, dtype=torch.float64)
    rounded = 0
    for seed in range(200):
        native = 0.01 + 0.4 * torch.rand(3, generator=seeded(seed), dtype=torch.float64)
        z = SPACE.to_search(dict(zip(SPACE.names, native.tolist(), strict=True)))
        rounded += not torch.equal(SPACE.from_unit(SPACE.to_unit(z)), z)
        assert torch.equal(unit_step(SPACE, z, zero, 0.2), z)
    assert rounded > 0, "the round trip was exact every time and the test would see nothing"


@given(gradients, st.lists(st.floats(0.0, 1.0), min_size=3, max_size=3))
def test_a_component_without_a_gradient_keeps_every_bit(gradient, unit):
    z = SPACE.clip(SPACE.from_unit(vector(*unit)))
    gradient = gradient * vector(1.0, 0.0, 1.0)
    for moved in (
        unit_step(SPACE, z, unit_direction(SPACE, gradient), 0.3),
        raw_step(SPACE, z, gradient, 0.3),
        raw_step(SPACE, z, random_gradient(gradient, SPACE.width, seeded()), 0.3),
    ):
        assert float(moved[1]) == float(z[1])


@pytest.mark.parametrize(
    ("direction", "length", "expected"),
    [
        ((1.0, 0.0, 0.0), 0.2, (-1.5, 0.25, 5.0)),
        ((0.0, -1.0, 0.0), 0.25, (-2.5, 0.125, 5.0)),
        ((0.0, 0.0, 1.0), -0.25, (-2.5, 0.25, 2.5)),
        ((1.0, 1.0, -1.0), 9.0, (0.0, 0.5, 0.0)),
    ],
)
def test_a_unit_step_has_its_length_in_unit_coordinates_and_stops_at_the_bounds(direction, length, expected):
    assert unit_step(SPACE, CENTRE, vector(*direction), length).tolist() == list(expected)


@pytest.mark.parametrize(
    ("values", "winner"),
    [
        ([3.0, 1.0, 2.0], 1),
        ([1.0, 1.0, 1.0], 0),
        ([2.0, 1.0, 1.0], 1),
        ([math.nan, 5.0, 4.0], 2),
        ([5.0, math.nan, math.nan], 0),
        ([math.nan, math.inf, 1e300], 2),
        ([math.nan, math.nan, math.nan], 0),
        ([0.0, math.inf, -1.0], 2),
    ],
)
def test_the_best_candidate_is_the_lowest_and_never_nan(values, winner):
    candidates = [vector(float(i)) for i in range(3)]
    seen = []

    def value(candidate):
        seen.append(int(candidate))
        return values[int(candidate)]

    best, returned = best_candidate(candidates, value)
    assert best is candidates[winner]
    assert seen == [0, 1, 2]
    assert [repr(v) for v in returned] == [repr(v) for v in values]


@given(gradients, st.integers(0, 2**31), st.sampled_from(["unit", "search"]))
def test_a_random_gradient_is_as_long_as_the_gradient_in_the_given_scale(like, seed, coordinates):
    assume(bool(like.any()))
    scale = SPACE.width if coordinates == "unit" else torch.ones(3, dtype=torch.float64)
    drawn = random_gradient(like, scale, seeded(seed))
    length = float(torch.linalg.vector_norm(like * scale))
    assert float(torch.linalg.vector_norm(drawn * scale)) == pytest.approx(length, rel=16 * EPS)
    assert torch.equal(drawn != 0, like != 0)


def test_a_random_gradient_of_zero_is_zero():
    drawn = random_gradient(vector(0.0, 0.0, 0.0), SPACE.width, seeded())
    assert drawn.tolist() == [0.0, 0.0, 0.0]


def test_a_random_gradient_depends_on_its_generator_alone():
    like = vector(1.0, -2.0, 3.0)
    torch.manual_seed(1)
    first = random_gradient(like, SPACE.width, seeded(5))
    state = torch.get_rng_state()
    torch.manual_seed(2)
    generator = seeded(5)
    second = random_gradient(like, SPACE.width, generator)
    assert torch.equal(first, second)
    assert not torch.equal(second, random_gradient(like, SPACE.width, generator))
    assert not torch.equal(first, random_gradient(like, SPACE.width, seeded(6)))
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("scale", [(1.0, 1.0, 1.0), (5.0, 0.5, 10.0)])
def test_random_directions_are_uniform_on_the_sphere_of_the_given_scale(scale):
    generator, count = seeded(), 4000
    like, scale = vector(1.0, -20.0, 3.0), vector(*scale)
    drawn = torch.stack([random_gradient(like, scale, generator) * scale for _ in range(count)])
    unit = drawn / torch.linalg.vector_norm(like * scale)
    # uniform on the sphere in 3 dimensions: mean 0 with variance 1/3, mean square 1/3 with
    # variance 4/45, cross products mean 0 with variance 1/15; five standard errors each
    assert float(unit.mean(0).abs().max()) < 5 * math.sqrt(1 / 3 / count)
    second = unit.T @ unit / count
    assert float((second.diagonal() - 1 / 3).abs().max()) < 5 * math.sqrt(4 / 45 / count)
    assert float((second - second.diagonal().diag()).abs().max()) < 5 * math.sqrt(1 / 15 / count)


def test_random_directions_are_uniform_on_the_circle_of_the_components_that_are_not_zero():
    generator, count = seeded(), 6000
    like = vector(2.0, 0.0, -1.0)
    drawn = torch.stack([random_gradient(like, SPACE.width, generator) for _ in range(count)])
    assert not drawn[:, 1].any()
    angle = torch.atan2(drawn[:, 2] * 10.0, drawn[:, 0] * 5.0)
    counts = torch.histc(angle, bins=12, min=-math.pi, max=math.pi)
    # 500 a bin, deviation 21: five deviations; the corners of a square would be 134 off
    assert float((counts - count / 12).abs().max()) < 107


@pytest.mark.parametrize("sigma", [0.01, 0.1])
def test_gaussian_noise_has_its_deviation_in_search_coordinates(sigma):
    generator, count = seeded(), 4000
    free = torch.tensor([True, False, True])
    space = SearchSpace({name: FloatDistribution(-9.0, 9.0) for name in "abc"})
    z = vector(0.1, 0.2, 0.3)
    moved = torch.stack([gaussian_step(space, z, sigma, free, generator) - z for _ in range(count)])
    assert not moved[:, 1].any()
    for i in (0, 2):
        # standard errors: of the deviation σ/√(2n), of the mean σ/√n; five of each
        assert float(moved[:, i].std()) == pytest.approx(sigma, rel=5 / math.sqrt(2 * count))
        assert abs(float(moved[:, i].mean())) < 5 * sigma / math.sqrt(count)
    correlation = float(torch.corrcoef(moved[:, [0, 2]].T)[0, 1])
    assert abs(correlation) < 5 / math.sqrt(count)


def test_gaussian_noise_is_clipped_and_what_is_not_free_keeps_every_bit():
    free = torch.tensor([True, False, True])
    z = vector(-1.0, 0.1, 9.0)
    moved = [gaussian_step(SPACE, z, 100.0, free, seeded(seed)) for seed in range(50)]
    assert {float(m[1]) for m in moved} == {0.1}
    assert {-5.0, 0.0} <= {float(m[0]) for m in moved}
    assert {0.0, 10.0} <= {float(m[2]) for m in moved}
    assert all(torch.equal(SPACE.clip(m), m) for m in moved)
