"""Rungs: their levels, the values that reached them, and the two cut-offs of successive halving."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from dataclasses import dataclass, field
from itertools import pairwise, takewhile


def levels(min_resource: int, max_resource: int, reduction_factor: int) -> tuple[int, ...]:
    """Return the resources of the rungs, min·ηᵏ below ``max_resource``, in rising order.

    ``max_resource`` is no rung, and no power of η need be.

    Raises:
        ValueError: If an argument is out of its range.
    """
    if min_resource < 1 or max_resource < 1:
        raise ValueError(f"min_resource {min_resource} and max_resource {max_resource} must be 1 or more")
    if reduction_factor < 2:
        raise ValueError(f"reduction_factor is {reduction_factor}; give 2 or more")
    found, level = [], min_resource
    while level < max_resource:
        found.append(level)
        level *= reduction_factor
    return tuple(found)


def quantiles(rungs: tuple[int, ...], max_resource: int) -> tuple[float, ...]:
    """Return the share of each rung that goes on, r_k / r_{k+1}, the last one over ``max_resource``."""
    return tuple(low / high for low, high in pairwise((*rungs, max_resource)))


def loss_of(value: float, maximize: bool) -> float:
    """Return a value as a loss: lower is better, NaN is +∞."""
    return math.inf if math.isnan(value) else (-value if maximize else value)


def quantile(ordered: list[float], q: float) -> float:
    """Return the quantile of rising numbers, linear between neighbours, as ``numpy.quantile`` does.

    Written out since numpy takes longer for it than all the rest of a decision. A quantile beside +∞
    is +∞ unless it falls on a finite number, one beside -∞ alone is -∞.
    """
    place = q * (len(ordered) - 1)
    below = math.floor(place)
    share = place - below
    low, high = ordered[below], ordered[min(below + 1, len(ordered) - 1)]
    if share == 0 or low == high:
        return low
    if math.isinf(high) or math.isinf(low):
        return high if math.isinf(high) else low
    # From the nearer end, so that the result does not fall behind either.
    return low + (high - low) * share if share < 0.5 else high - (high - low) * (1 - share)


@dataclass
class Rung:
    """The losses of the configurations that reached a resource; the best first, ties by arrival.

    Attributes:
        level: The resource.
        share: Share that goes on.
        losses: Loss by configuration, in order of arrival.
        waiting: Losses, arrivals and configurations that are not promoted yet, rising.
    """

    level: int
    share: float
    losses: dict[int, float] = field(default_factory=dict)
    ordered: list[float] = field(default_factory=list)
    waiting: list[tuple[float, int, int]] = field(default_factory=list)

    def add(self, config: int, loss: float) -> None:
        """Insert a configuration."""
        insort(self.waiting, (loss, len(self.losses), config))
        insort(self.ordered, loss)
        self.losses[config] = loss

    def waits(self, config: int) -> bool:
        """Return whether a configuration is here and not promoted yet."""
        return self._place(config) is not None

    def promote(self, config: int) -> None:
        """Take a configuration off those that wait; it still counts in the cut-off."""
        place = self._place(config)
        if place is not None:
            del self.waiting[place]

    def _place(self, config: int) -> int | None:
        loss = self.losses.get(config)
        if loss is None:
            return None
        first = bisect_left(self.waiting, (loss, -1, -1))
        ties = takewhile(lambda i: self.waiting[i][0] == loss, range(first, len(self.waiting)))
        return next((i for i in ties if self.waiting[i][2] == config), None)

    def rank(self, loss: float) -> int:
        """Return the place of a loss among those here, 1 for the best."""
        return bisect_left(self.ordered, loss) + 1

    def cutoff(self) -> float | None:
        """Return the interpolated quantile of the losses; None with fewer than two."""
        return quantile(self.ordered, self.share) if len(self.ordered) >= 2 else None

    def top(self, reduction_factor: int) -> float:
        """Return the worst loss of the best ⌊n/η⌋, at least one: Optuna's cut-off."""
        return self.ordered[max(len(self.ordered) // reduction_factor, 1) - 1]


def make_rungs(min_resource: int, max_resource: int, reduction_factor: int) -> list[Rung]:
    """Return empty rungs, the lowest first."""
    found = levels(min_resource, max_resource, reduction_factor)
    return [Rung(r, q) for r, q in zip(found, quantiles(found, max_resource), strict=True)]
