"""Native, search and unit coordinates of the continuous hyper-parameters ψ."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from optuna.distributions import FloatDistribution
from torch import Tensor

_LN10 = math.log(10.0)


@dataclass(frozen=True)
class SearchSpace:
    """The continuous hyper-parameters of a trial and their three coordinates.

    *Native* values are what a model trains with. The *search* coordinate is ``log10`` of a
    log-distributed parameter and the value itself of a linear one; hyper-gradients and the step
    size η_h live there. The *unit* coordinate maps the bounds of the search coordinate to
    ``[0, 1]``; trust regions live there. Vectors are float64 of shape ``[d]`` in the order of
    ``names``.

    Args:
        distributions: Optuna's distribution of each parameter, by name.

    Raises:
        ValueError: If a distribution is not a ``FloatDistribution``, has a step, or has
            ``low == high``.
    """

    distributions: Mapping[str, FloatDistribution]

    def __post_init__(self) -> None:
        if not self.distributions:
            raise ValueError("the space is empty but needs at least one FloatDistribution")
        for name, distribution in self.distributions.items():
            if not isinstance(distribution, FloatDistribution) or distribution.step is not None:
                raise ValueError(
                    f"{name!r} must be a FloatDistribution without a step but got {distribution}; "
                    "suggest discrete and categorical parameters with the trial itself"
                )
            if distribution.single():
                raise ValueError(f"{name!r} has low == high ({distribution.low}); make it a constant")

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the parameters, in the order of every vector."""
        return tuple(self.distributions)

    @property
    def low(self) -> Tensor:
        """Lower bounds in search coordinates, shape ``[d]``."""
        return torch.tensor([_forward(d, d.low) for d in self.distributions.values()], dtype=torch.float64)

    @property
    def high(self) -> Tensor:
        """Upper bounds in search coordinates, shape ``[d]``."""
        return torch.tensor([_forward(d, d.high) for d in self.distributions.values()], dtype=torch.float64)

    @property
    def width(self) -> Tensor:
        """Lengths of the ranges in search coordinates, shape ``[d]``."""
        return self.high - self.low

    def to_search(self, native: Mapping[str, float]) -> Tensor:
        """Return the search coordinates, shape ``[d]``, of native values."""
        values = [_forward(d, native[name]) for name, d in self.distributions.items()]
        return torch.tensor(values, dtype=torch.float64)

    def to_native(self, search: Tensor) -> dict[str, Tensor]:
        """Return native 0-d tensors of a search vector ``[d]``, differentiable in it."""
        return {
            name: torch.exp(search[i] * _LN10) if distribution.log else search[i]
            for i, (name, distribution) in enumerate(self.distributions.items())
        }

    def to_floats(self, search: Tensor) -> dict[str, float]:
        """Return native Python floats of a search vector ``[d]``, clipped to the native bounds."""
        return {
            name: min(max(10.0**z if d.log else z, d.low), d.high)
            for (name, d), z in zip(self.distributions.items(), self.clip(search).tolist(), strict=True)
        }

    def to_unit(self, search: Tensor) -> Tensor:
        """Return the unit coordinates ``[d]`` of a search vector ``[d]``."""
        return (search - self.low) / self.width

    def from_unit(self, unit: Tensor) -> Tensor:
        """Return the search coordinates ``[d]`` of a unit vector ``[d]``."""
        return self.low + unit * self.width

    def clip(self, search: Tensor) -> Tensor:
        """Return the search vector ``[d]`` with every component inside its bounds."""
        return torch.minimum(torch.maximum(search, self.low), self.high)

    def native_derivative(self, search: Tensor) -> Tensor:
        """Return d native / d search at a search vector, shape ``[d]``: ``ψ·ln 10`` or 1."""
        native = self.to_native(search)
        return torch.stack(
            [
                native[name] * _LN10 if d.log else torch.ones((), dtype=torch.float64)
                for name, d in self.distributions.items()
            ]
        )


def _forward(distribution: FloatDistribution, value: float) -> float:
    return math.log10(value) if distribution.log else float(value)
