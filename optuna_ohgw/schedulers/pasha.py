"""PASHA: promotion ASHA whose maximum grows while the ranking of the best is unsettled."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations

import numpy as np

from optuna_ohgw.schedulers.promotion import PromotionAsha
from optuna_ohgw.schedulers.rungs import Rung, loss_of


class Pasha(PromotionAsha):
    """Progressive ASHA, Bohdal et al. 2023, Algorithm 1 with soft ranking and automatic ε.

    Training ends at ``maximum``, which begins at the second rung and grows by one rung whenever the
    ranking at the top rung is not one of those that the rung below allows within ε (section 4.1 of
    the paper). ε is the 90th percentile of the differences of pairs of configurations whose learning
    curves cross twice (section 4.2). Every unit of training must report.

    Departures: pairs are gone through in the order in which configurations started, where the
    authors' code depends on a hash. NaN is the worst loss, and pairs with it cross nothing.

    Args:
        max_resource: Resource of full training.
        min_resource: The lowest rung.
        reduction_factor: η.
        maximize: Whether higher values are better.

    Attributes:
        maximum: Resource at which training ends for now.
        epsilon: ε, in units of the value.
    """

    name = "pasha"

    def __init__(
        self,
        max_resource: int,
        *,
        min_resource: int = 1,
        reduction_factor: int = 3,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            max_resource, min_resource=min_resource, reduction_factor=reduction_factor, maximize=maximize
        )
        self.epsilon = 0.0
        self._top = min(2, len(self.rungs))  # rungs in use
        # With one rung there are no two to compare: the maximum could never grow.
        self.maximum = self.rungs[self._top - 1].level if self._top > 1 else max_resource
        self._curves: dict[int, dict[int, float]] = {}
        self._length: dict[int, int] = {}
        self._crossings: dict[tuple[int, int], float] = {}

    def observed(self, config: int, resource: int, value: float) -> None:
        """Keep the value, update ε, and let the maximum grow if the ranking is unsettled."""
        curve = self._curves.setdefault(config, {})
        if resource in curve:
            return
        curve[resource] = loss_of(value, self.maximize)
        self._length[config] = resource
        if self._top < 2:
            return
        self._update_epsilon(config)
        if self.maximum < self.max_resource and not settled(
            self.rungs[self._top - 1], self.rungs[self._top - 2], self.epsilon
        ):
            self._grow()

    def _grow(self) -> None:
        if self._top < len(self.rungs):
            self._top += 1
            self.maximum = self.rungs[self._top - 1].level
        else:
            self.maximum = self.max_resource
        self._crossings.clear()
        for one, other in combinations(sorted(self._curves), 2):
            self._look_at(one, other)

    def _update_epsilon(self, reported: int) -> None:
        """Look again at the pairs of a configuration that has reported; set ε."""
        low = self.rungs[self._top - 2].level
        if self._length[reported] > low:
            for other, length in self._length.items():
                if length > low and other != reported:
                    self._look_at(min(reported, other), max(reported, other))
        if len(self._curves) < 2:
            self.epsilon = 0.0
        elif self._crossings:
            self.epsilon = float(np.percentile(list(self._crossings.values()), 90))

    def _look_at(self, one: int, other: int) -> None:
        """Keep the difference of two curves at the last epoch of both, if they cross twice before."""
        a, b = self._curves[one], self._curves[other]
        high, low = self.rungs[self._top - 1].level, self.rungs[self._top - 2].level
        self._crossings.pop((one, other), None)
        last = min(self._length[one], self._length[other], high)
        if last > low and crossed_twice(a, b, last) and math.isfinite(a[last] - b[last]):
            self._crossings[one, other] = abs(a[last] - b[last])


def crossed_twice(one: Mapping[int, float], other: Mapping[int, float], last: int) -> bool:
    """Return whether, back from ``last``, the order of two curves flips and then returns."""
    order, flipped = one[last] > other[last], False
    for epoch in range(last - 1, 0, -1):
        if (one[epoch] > other[epoch]) != order:
            flipped = True
        elif flipped:
            return True
    return False


def settled(top: Rung, below: Rung, epsilon: float) -> bool:
    """Return whether the ranking at a rung is one of those that the rung below allows within ε.

    Position by position, best first: the configuration at the top rung must be among the neighbours,
    in the ranking below of the same configurations, whose loss lies within ε of that of the same
    position. An empty rung is settled. Bohdal et al. 2023, equation 1.
    """
    above = sorted(top.losses, key=lambda c: top.losses[c])
    lower = sorted((c for c in below.losses if c in top.losses), key=lambda c: below.losses[c])
    for position, config in enumerate(above):
        centre = below.losses[lower[position]]
        group = {lower[position]}
        for way in (range(position - 1, -1, -1), range(position + 1, len(lower))):
            for place in way:
                if abs(below.losses[lower[place]] - centre) > epsilon:
                    break
                group.add(lower[place])
        if config not in group:
            return False
    return True
