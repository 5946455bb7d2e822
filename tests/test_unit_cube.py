"""Oracles: coordinates by hand, round trips, Optuna's own check of what a distribution contains."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from optuna_ohgw.unit_cube import from_point, from_unit, levels, to_point, to_unit

GRIDS = {
    "float step": FloatDistribution(-10.2, 10.2, step=0.1),
    "float odd step": FloatDistribution(0.0, 0.9, step=0.3),
    "float one": FloatDistribution(0.5, 0.5, step=0.1),
    "int": IntDistribution(-3, 12),
    "int step": IntDistribution(3, 9, step=2),
    "int log": IntDistribution(1, 1000, log=True),
    "int one": IntDistribution(4, 4),
}
RANGES = {
    "float": FloatDistribution(-3.0, 7.0),
    "float log": FloatDistribution(1e-7, 1.0, log=True),
    "float one": FloatDistribution(0.5, 0.5),
}
CATEGORIES = CategoricalDistribution(["a", None, 3, float("nan"), 0.5])


@pytest.mark.parametrize(
    ("distribution", "value", "unit"),
    [
        (FloatDistribution(-1.0, 3.0), 0.0, 0.25),
        (FloatDistribution(1e-4, 1.0, log=True), 1e-3, 0.25),
        (FloatDistribution(0.0, 1.0, step=0.25), 0.5, 0.5),
        (FloatDistribution(0.0, 1.0, step=0.25), 1.0, 0.9),
        (IntDistribution(1, 4), 1, 0.125),
        (IntDistribution(0, 10, step=5), 10, 5 / 6),
        (IntDistribution(1, 2, log=True), 2, math.log(4) / math.log(5)),
        (FloatDistribution(2.0, 2.0), 2.0, 0.5),
        (CategoricalDistribution(["x", "y", "z"]), "z", 2.0),
    ],
)
def test_coordinates_by_hand(distribution, value, unit):
    assert to_unit(distribution, value) == pytest.approx(unit, rel=1e-12)


def values_of(distribution):
    if isinstance(distribution, IntDistribution):
        return list(range(distribution.low, distribution.high + 1, distribution.step))
    count = round((distribution.high - distribution.low) / distribution.step) + 1
    return [distribution.low + k * distribution.step for k in range(count)]


@pytest.mark.parametrize("name", GRIDS)
def test_every_value_of_a_grid_comes_back(name):
    distribution = GRIDS[name]
    for value in values_of(distribution):
        back = from_unit(distribution, to_unit(distribution, value))
        assert back == pytest.approx(value, abs=1e-12)
        assert type(back) is (int if isinstance(distribution, IntDistribution) else float)


def test_every_category_comes_back():
    for index, choice in enumerate(CATEGORIES.choices):
        assert to_unit(CATEGORIES, choice) == index
        assert from_unit(CATEGORIES, float(index)) is choice


@pytest.mark.parametrize("name", RANGES)
@given(share=st.floats(0, 1))
def test_numbers_come_back(name, share):
    d = RANGES[name]
    value = min(
        max(d.low * (d.high / d.low) ** share if d.log else d.low + share * (d.high - d.low), d.low), d.high
    )
    assert from_unit(d, to_unit(d, value)) == pytest.approx(value, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("name", [*GRIDS, *RANGES])
@given(unit=st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1.0, -1e-9, 1 + 1e-9])))
def test_any_coordinate_is_a_value_of_the_distribution(name, unit):
    distribution: BaseDistribution = {**RANGES, **GRIDS}[name]
    value = from_unit(distribution, unit)
    assert distribution._contains(distribution.to_internal_repr(value))
    assert distribution.low <= value <= distribution.high
    assert type(value) is (int if isinstance(distribution, IntDistribution) else float)


@pytest.mark.parametrize("name", GRIDS)
def test_values_of_a_grid_have_equal_parts(name):
    """Of many even coordinates each value gets its share; of a logarithmic range as the docstring says."""
    distribution = GRIDS[name]
    units = (np.arange(100_000) + 0.5) / 100_000
    found = np.array([from_unit(distribution, u) for u in units[::10]])
    values = np.array(values_of(distribution))
    shares = np.array([np.isclose(found, v, atol=1e-9).mean() for v in values])
    expected = np.full(len(values), 1 / len(values))
    if distribution.log:
        expected = np.log((values + 0.5) / (values - 0.5)) / math.log(1000.5 / 0.5)
    assert shares == pytest.approx(expected, abs=2e-4)


def test_values_are_written_as_a_user_would():
    assert from_unit(FloatDistribution(0.0, 1.0, step=0.1), 0.3) == 0.3
    assert str(from_unit(FloatDistribution(0.1, 0.9, step=0.1), 0.29)) == "0.3"


def test_a_space_as_a_point():
    space = {"x": FloatDistribution(0.0, 2.0), "n": IntDistribution(1, 4), "c": CATEGORIES}
    params = {"c": 3, "x": 0.5, "n": 4, "other": 1}
    assert levels(space) == (0, 0, 5)
    point = to_point(space, params)
    assert point == [0.25, 0.875, 2.0]
    assert from_point(space, point) == {"x": 0.5, "n": 4, "c": 3}


def test_another_distribution_is_refused():
    class Other(BaseDistribution):
        def to_internal_repr(self, param_value_in_external_repr):
            return 0.0

        def single(self):
            return False

        def _contains(self, param_value_in_internal_repr):
            return True

    with pytest.raises(ValueError, match="no coordinate"):
        to_unit(Other(), 1)
    with pytest.raises(ValueError, match="no coordinate"):
        from_unit(Other(), 0.5)
