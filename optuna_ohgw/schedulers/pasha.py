"""PASHA: promotion ASHA whose maximum grows while the ranking of the best is unsettled."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Mapping
from itertools import combinations

from optuna_ohgw.schedulers.promotion import PromotionAsha
from optuna_ohgw.schedulers.rungs import Rung, loss_of, quantile


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
        self._epsilon, self._stale = 0.0, False
        self._top = min(2, len(self.rungs))  # rungs in use
        # With one rung there are no two to compare: the maximum could never grow.
        self.maximum = self.rungs[self._top - 1].level if self._top > 1 else max_resource
        self._curves: dict[int, dict[int, float]] = {}
        self._length: dict[int, int] = {}
        self._crossings: dict[tuple[int, int], float] = {}
        self._differences: list[float] = []  # at the crossings, rising
        self._settled: tuple[int, int, float] | None = None  # what a ranking was last found settled with

    @property
    def epsilon(self) -> float:
        """ε, in units of the value.

        It decides nothing once training goes to the end, and is then found when it is asked for.
        """
        if self._stale:
            self._look_at_all()
            self._set_epsilon()
            self._stale = False
        return self._epsilon

    def observed(self, config: int, resource: int, value: float) -> None:
        """Keep the value, update ε, and let the maximum grow if the ranking is unsettled."""
        self._curves.setdefault(config, {})[resource] = loss_of(value, self.maximize)
        before, self._length[config] = self._length.get(config, 0), resource
        if self._top < 2:
            return
        if self.maximum == self.max_resource:
            self._stale = True
            return
        self._update_epsilon(config, before)
        top, below = self.rungs[self._top - 1], self.rungs[self._top - 2]
        key = self._top, len(top.losses), self.epsilon
        if self._settled == key:
            return
        if settled(top, below, self.epsilon):
            self._settled = key
        else:
            self._grow()

    def _grow(self) -> None:
        if self._top < len(self.rungs):
            self._top += 1
            self.maximum = self.rungs[self._top - 1].level
        else:
            self.maximum = self.max_resource
        self._look_at_all()

    def _update_epsilon(self, reported: int, before: int) -> None:
        """Look again at the pairs of a configuration that has reported; set ε."""
        high, low = self.rungs[self._top - 1].level, self.rungs[self._top - 2].level
        # Of a pair only what both have reported matters, and what lies beyond the top rung does not.
        if self._length[reported] > low and before < high:
            for other, length in self._length.items():
                if length > low and length > before and other != reported:
                    self._look_at(min(reported, other), max(reported, other))
        self._set_epsilon()

    def _set_epsilon(self) -> None:
        if self._differences:
            self._epsilon = quantile(self._differences, 0.9)

    def _look_at_all(self) -> None:
        low = self.rungs[self._top - 2].level
        self._crossings.clear()
        self._differences.clear()
        for pair in combinations(sorted(c for c, length in self._length.items() if length > low), 2):
            self._look_at(*pair)

    def _look_at(self, one: int, other: int) -> None:
        """Keep the difference of two curves at the last epoch of both, if they cross twice before."""
        a, b = self._curves[one], self._curves[other]
        high, low = self.rungs[self._top - 1].level, self.rungs[self._top - 2].level
        known = self._crossings.pop((one, other), None)
        if known is not None:
            del self._differences[bisect_left(self._differences, known)]
        last = min(self._length[one], self._length[other], high)
        if last not in a or last not in b:  # units were skipped
            last = max((e for e in a if e in b and e <= high), default=0)
        if last > low and crossed_twice(a, b, last) and math.isfinite(a[last] - b[last]):
            difference = self._crossings[one, other] = abs(a[last] - b[last])
            insort(self._differences, difference)


def crossed_twice(one: Mapping[int, float], other: Mapping[int, float], last: int) -> bool:
    """Return whether, back from ``last``, the order of two curves flips and then returns.

    Only units that both have count.
    """
    order, flipped = one[last] > other[last], False
    for epoch in range(last - 1, 0, -1):
        if epoch not in one or epoch not in other:
            continue
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
