import math
import re
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from optuna_ohgw.space import SearchSpace

EPS = sys.float_info.epsilon

SPACE = SearchSpace(
    {
        "lr": FloatDistribution(1e-4, 1.0, log=True),
        "momentum": FloatDistribution(0.0, 0.8),
        "weight_decay": FloatDistribution(1e-6, 1e-2, log=True),
        "magnitude": FloatDistribution(-10.0, 10.0),
    }
)

# native value -> search coordinate -> unit coordinate, all exact in binary or correctly rounded
TABLE = [
    ("lr", 1e-4, -4.0, 0.0),
    ("lr", 1e-3, -3.0, 0.25),
    ("lr", 1e-2, -2.0, 0.5),
    ("lr", 1.0, 0.0, 1.0),
    ("momentum", 0.0, 0.0, 0.0),
    ("momentum", 0.2, 0.2, 0.25),
    ("momentum", 0.8, 0.8, 1.0),
    ("weight_decay", 1e-6, -6.0, 0.0),
    ("weight_decay", 1e-5, -5.0, 0.25),
    ("weight_decay", 1e-2, -2.0, 1.0),
    ("magnitude", -10.0, -10.0, 0.0),
    ("magnitude", 5.0, 5.0, 0.75),
]


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


@st.composite
def one_parameter(draw):
    """A space of one parameter and a native value inside its bounds."""
    if draw(st.booleans()):
        low = 10.0 ** draw(st.floats(-12.0, 6.0))
        high = low * 10.0 ** draw(st.floats(0.01, 12.0))
        distribution = FloatDistribution(low, high, log=True)
    else:
        low = draw(st.floats(-1e6, 1e6))
        distribution = FloatDistribution(low, low + draw(st.floats(1e-3, 1e6)))
    value = draw(st.floats(distribution.low, distribution.high))
    return SearchSpace({"x": distribution}), value


@given(one_parameter())
def test_native_to_search_to_native_returns_the_value_to_rounding(case):
    space, value = case
    z = space.to_search({"x": value})
    # log10 is off by half an ulp of z, 10**z multiplies that by ln 10: |z|·ln 10·ε/2, and
    # exp(z·ln 10) rounds the product and the constant as well; a linear value is not touched.
    log = space.distributions["x"].log
    allowed = (2.0 * abs(float(z)) * math.log(10.0) + 4.0) * EPS * abs(value) if log else 0.0
    assert abs(space.to_floats(z)["x"] - value) <= allowed
    assert abs(float(space.to_native(z)["x"]) - value) <= allowed


@given(one_parameter())
def test_search_to_unit_to_search_returns_the_vector_to_rounding(case):
    space, value = case
    z = space.to_search({"x": value})
    unit = space.to_unit(z)
    assert 0.0 <= float(unit) <= 1.0
    # one subtraction, one division, one product, one sum, each half an ulp of numbers no
    # larger than |low| + |width|
    allowed = 4.0 * EPS * float(space.low.abs() + space.width)
    assert abs(float(space.from_unit(unit) - z)) <= allowed


@given(one_parameter(), st.floats(-300.0, 300.0))
def test_floats_never_leave_the_native_bounds_wherever_the_vector_is(case, z):
    space, _ = case
    distribution = space.distributions["x"]
    for search in (vector(z), space.low, space.high):
        assert distribution.low <= space.to_floats(search)["x"] <= distribution.high


@given(st.lists(st.floats(-20.0, 20.0), min_size=4, max_size=4))
def test_clip_changes_only_what_is_outside_the_bounds(values):
    clipped = SPACE.clip(vector(*values)).tolist()
    low, high = [-4.0, 0.0, -6.0, -10.0], [0.0, 0.8, -2.0, 10.0]
    assert clipped == [min(max(v, a), b) for v, a, b in zip(values, low, high, strict=True)]


@pytest.mark.parametrize(("name", "native", "search", "unit"), TABLE)
def test_coordinates_of_known_values(name, native, search, unit):
    i = SPACE.names.index(name)
    values = {"lr": 0.1, "momentum": 0.5, "weight_decay": 1e-3, "magnitude": 1.0, name: native}
    z = SPACE.to_search(values)
    assert float(z[i]) == search
    assert float(SPACE.to_unit(z)[i]) == pytest.approx(unit, abs=EPS)
    u = torch.full((4,), 0.5, dtype=torch.float64)
    u[i] = unit
    assert float(SPACE.from_unit(u)[i]) == pytest.approx(search, abs=4 * EPS)
    assert SPACE.to_floats(z)[name] == pytest.approx(native, rel=20 * EPS)


def test_bounds_and_width_are_those_of_the_search_coordinate():
    assert SPACE.low.tolist() == [-4.0, 0.0, -6.0, -10.0]
    assert SPACE.high.tolist() == [0.0, 0.8, -2.0, 10.0]
    assert SPACE.width.tolist() == [4.0, 0.8, 4.0, 20.0]


def test_the_order_of_vectors_is_that_of_the_space_not_of_the_values():
    z = SPACE.to_search({"magnitude": 1.0, "weight_decay": 1e-3, "lr": 0.1, "momentum": 0.5})
    assert SPACE.names == ("lr", "momentum", "weight_decay", "magnitude")
    assert z.tolist() == [-1.0, 0.5, -3.0, 1.0]
    assert tuple(SPACE.to_native(z)) == tuple(SPACE.to_floats(z)) == SPACE.names


def test_vectors_are_float64_whatever_the_default_type_of_torch():
    z = SPACE.to_search({"lr": 0.1, "momentum": 0.5, "weight_decay": 1e-3, "magnitude": 1.0})
    vectors = [
        z,
        SPACE.low,
        SPACE.high,
        SPACE.width,
        SPACE.to_unit(z),
        SPACE.from_unit(z),
        SPACE.clip(z),
        SPACE.native_derivative(z),
        *SPACE.to_native(z).values(),
    ]
    assert torch.get_default_dtype() == torch.float32
    assert {v.dtype for v in vectors} == {torch.float64}


@settings(max_examples=30)
@given(st.lists(st.floats(0.05, 0.95), min_size=4, max_size=4))
def test_native_derivative_is_the_central_difference_and_the_autograd_derivative(unit):
    z = SPACE.from_unit(vector(*unit))
    derivative = SPACE.native_derivative(z)
    h = 1e-5
    for i, name in enumerate(SPACE.names):
        step = torch.zeros(4, dtype=torch.float64)
        step[i] = h
        above, below = SPACE.to_native(z + step)[name], SPACE.to_native(z - step)[name]
        # truncation (h·ln 10)²/6 = 9e-11, rounding of the values and of z over h about 3e-10,
        # relative to the value; a linear value as large as 10 has its rounding in absolute terms
        assert float((above - below) / (2 * h)) == pytest.approx(float(derivative[i]), rel=2e-9)
        leaf = z.clone().requires_grad_()
        (exact,) = torch.autograd.grad(SPACE.to_native(leaf)[name], leaf)
        assert float(exact[i]) == pytest.approx(float(derivative[i]), rel=4 * EPS)
        assert float(exact.abs().sum()) == abs(float(exact[i]))


@pytest.mark.parametrize(
    ("distribution", "message"),
    [
        (FloatDistribution(0.0, 1.0, step=0.25), "without a step but got FloatDistribution("),
        (IntDistribution(1, 8), "without a step but got IntDistribution("),
        (CategoricalDistribution(["sgd"]), "without a step but got CategoricalDistribution("),
        (FloatDistribution(0.5, 0.5), "has low == high (0.5); make it a constant"),
        (FloatDistribution(0.1, 0.1, log=True), "has low == high (0.1); make it a constant"),
    ],
)
def test_a_distribution_that_cannot_be_moved_is_refused_by_name(distribution, message):
    with pytest.raises(ValueError, match=f"'rate' .*{re.escape(message)}"):
        SearchSpace({"lr": FloatDistribution(0.0, 1.0), "rate": distribution})


def test_an_empty_space_is_refused():
    with pytest.raises(ValueError, match="empty but needs at least one FloatDistribution"):
        SearchSpace({})


def test_a_missing_native_value_is_a_key_error_not_a_default():
    with pytest.raises(KeyError, match="momentum"):
        SPACE.to_search({"lr": 0.1})


def test_nan_stays_nan_in_floats():
    floats = SPACE.to_floats(vector(math.nan, math.nan, math.nan, math.nan))
    assert all(math.isnan(v) for v in floats.values())
