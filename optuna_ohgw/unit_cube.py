"""Parameters of an Optuna search space as points: numbers in [0, 1], categories as indices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)


def levels(space: Mapping[str, BaseDistribution]) -> tuple[int, ...]:
    """Return the number of categories of each parameter, 0 for a number."""
    return tuple(len(d.choices) if isinstance(d, CategoricalDistribution) else 0 for d in space.values())


def to_point(space: Mapping[str, BaseDistribution], params: Mapping[str, Any]) -> list[float]:
    """Return the coordinates of parameters, in the order of the space."""
    return [to_unit(distribution, params[name]) for name, distribution in space.items()]


def from_point(space: Mapping[str, BaseDistribution], point: Sequence[float]) -> dict[str, Any]:
    """Return the parameters at a point; each is inside its distribution and on its grid."""
    return {name: from_unit(d, float(u)) for (name, d), u in zip(space.items(), point, strict=True)}


def features(space: Mapping[str, BaseDistribution], params: Mapping[str, Any]) -> list[float]:
    """Return parameters as a model's inputs, each in [0, 1]: a category is one-hot."""
    found: list[float] = []
    for name, distribution in space.items():
        unit = to_unit(distribution, params[name])
        if isinstance(distribution, CategoricalDistribution):
            found += [float(index == unit) for index in range(len(distribution.choices))]
        else:
            found.append(unit)
    return found


def to_unit(distribution: BaseDistribution, value: Any) -> float:
    """Return the coordinate of a value.

    Linear, or linear in the logarithm, between the bounds. Each value of a grid is the middle of an
    equal part of [0, 1]; each integer of a logarithmic range is a part as long as ln((v + ½)/(v - ½)).
    A category is its index.

    Raises:
        ValueError: If the distribution is none of Optuna's three.
    """
    if isinstance(distribution, CategoricalDistribution):
        return float(distribution.to_internal_repr(value))
    count = _count(distribution)
    assert isinstance(distribution, (FloatDistribution, IntDistribution))
    if count is not None and not distribution.log:
        assert distribution.step is not None
        return float((round((value - distribution.low) / distribution.step) + 0.5) / count)
    low, high = _ends(distribution)
    return (_scaled(distribution, float(value)) - low) / (high - low) if high > low else 0.5


def from_unit(distribution: BaseDistribution, unit: float) -> Any:
    """Return the value at a coordinate, the inverse of :func:`to_unit`; clipped to the bounds."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[round(unit)]
    count = _count(distribution)
    assert isinstance(distribution, (FloatDistribution, IntDistribution))
    if count is not None and not distribution.log:
        place = min(max(math.floor(unit * count), 0), count - 1)
        if isinstance(distribution, IntDistribution):
            return distribution.low + place * distribution.step
        # In decimals, as a user would write it: 0.3, not 0.30000000000000004.
        found = Decimal(str(distribution.low)) + place * Decimal(str(distribution.step))
        return min(float(found), distribution.high)
    low, high = _ends(distribution)
    scaled = low + unit * (high - low)
    value = math.exp(scaled) if distribution.log else scaled
    inside = min(max(value, distribution.low), distribution.high)
    return round(inside) if isinstance(distribution, IntDistribution) else float(inside)


def _count(distribution: BaseDistribution) -> int | None:
    """Return how many values a grid has; None for a range without one."""
    if isinstance(distribution, IntDistribution):
        return (distribution.high - distribution.low) // distribution.step + 1
    if isinstance(distribution, FloatDistribution):
        if distribution.step is None:
            return None
        return round((distribution.high - distribution.low) / distribution.step) + 1
    raise ValueError(f"{distribution} has no coordinate; give a float, int or categorical distribution")


def _scaled(distribution: FloatDistribution | IntDistribution, value: float) -> float:
    return math.log(value) if distribution.log else value


def _ends(distribution: FloatDistribution | IntDistribution) -> tuple[float, float]:
    margin = 0.5 if isinstance(distribution, IntDistribution) else 0.0
    low, high = distribution.low - margin, distribution.high + margin
    return _scaled(distribution, low), _scaled(distribution, high)
