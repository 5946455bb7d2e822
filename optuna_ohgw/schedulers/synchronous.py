"""Synchronous Hyperband: a rung is decided when all that train there have reported."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from optuna_ohgw.schedulers.base import Decision, Scheduler, check_new
from optuna_ohgw.schedulers.rungs import levels, loss_of


def bracket_sizes(levels_in_all: int, reduction_factor: int) -> list[list[int]]:
    """Return how many configurations each bracket trains at each of its rungs, the largest bracket first.

    Bracket s begins with n = ⌈S/(s + 1)·η^s⌉ configurations (Li et al. 2018, Algorithm 1, with S in
    place of B/R) and keeps ⌈n/η⌉ at each of the s rungs after it.
    """
    brackets = []
    for s in range(levels_in_all - 1, -1, -1):
        sizes = [-(-levels_in_all * reduction_factor**s // (s + 1))]
        for _ in range(s):
            sizes.append(-(-sizes[-1] // reduction_factor))
        brackets.append(sizes)
    return brackets


@dataclass(eq=False)
class _Bracket:
    """A run of successive halving: the sizes and resources of its rungs, and where it stands."""

    index: int
    sizes: list[int]  # at most so many at each rung
    resources: list[int]
    rung: int = 0
    begun: int = 0
    losses: dict[int, float] = field(default_factory=dict)
    chosen: list[int] = field(default_factory=list)
    of: int = 0  # values that the chosen were chosen from
    left: list[int] = field(default_factory=list)  # those that were not chosen

    @property
    def size(self) -> int:
        """How many configurations the rung in progress trains."""
        return len(self.chosen) if self.rung else self.sizes[0]

    @property
    def free(self) -> bool:
        """Whether a configuration can be started or resumed."""
        return self.begun < self.size

    @property
    def level(self) -> int:
        """Resource of the rung in progress."""
        return self.resources[self.rung]

    def ended(self) -> bool:
        """Go up a rung if all of this one have reported; return whether there is none to go up to.

        The best go on, ties by arrival. NaN never does.
        """
        if len(self.losses) < self.size:
            return False
        if self.rung + 1 == len(self.sizes):
            return True
        numbers = [config for config, loss in self.losses.items() if not math.isnan(loss)]
        self.rung, self.of = self.rung + 1, len(self.losses)
        self.chosen = sorted(numbers, key=self.losses.__getitem__)[: self.sizes[self.rung]]
        self.left += self.losses.keys() - set(self.chosen)
        self.begun, self.losses = 0, {}
        return not self.chosen


class HyperbandSynchronous(Scheduler):
    """Hyperband, Li et al. 2018, Algorithm 1, for any number of workers.

    The rungs are min·ηᵏ below ``max_resource``, and ``max_resource``: S in all. Bracket i, from 0,
    leaves out the lowest i mod S of them. A free worker serves the oldest bracket that has something to
    train; the next bracket begins when none has. So a configuration's bracket follows from its
    position alone.

    Departures: rungs are at min·ηᵏ, not at R·η^-k, the sizes of later rungs are rounded up, and
    workers need not wait for a bracket to end. A configuration whose value is NaN is never resumed;
    a rung may then be smaller. One that never reports holds up its bracket, and no other.

    Args:
        max_resource: Resource of full training.
        min_resource: The lowest rung.
        reduction_factor: η.
        maximize: Whether higher values are better.
    """

    name = "hyperband, synchronous"

    def __init__(
        self,
        max_resource: int,
        *,
        min_resource: int = 1,
        reduction_factor: int = 3,
        maximize: bool = False,
    ) -> None:
        super().__init__(max_resource, maximize=maximize)
        self.levels = (*levels(min_resource, max_resource, reduction_factor), max_resource)
        self._factor = reduction_factor
        self._sizes = bracket_sizes(len(self.levels), reduction_factor)
        self._opened = 0
        self._open: list[_Bracket] = []  # those not yet at an end, the oldest first
        self._places: list[_Bracket] = []  # bracket by position
        self._of: dict[int, _Bracket] = {}

    def suggest(self) -> Decision:
        """Return whom to resume, or to start a new configuration, in the oldest bracket with work."""
        bracket = next((b for b in self._open if b.free), None) or self._next()
        if bracket.rung == 0:
            return Decision("start", None, self.name, until=bracket.level, bracket=bracket.index)
        config = bracket.chosen[bracket.begun]
        before = self._last[config]
        return Decision(
            "resume",
            config,
            self.name,
            before.resource,
            until=bracket.level,
            rung=bracket.rung - 1,
            value=before.value,
            rank=bracket.begun + 1,
            of=bracket.of,
            bracket=bracket.index,
        )

    def until(self, config: int) -> int:
        """Return the resource of the rung that a configuration is on its way to, or waits to go to."""
        bracket = self._of[config]
        above = bracket.rung + (config in bracket.losses)
        return bracket.resources[min(above, len(bracket.resources) - 1)]

    def started(self, config: int) -> None:
        """Take note of a new configuration, of the bracket that its position has."""
        check_new(config, self._of)
        while config >= len(self._places):
            bracket = self._next()
            self._open.append(bracket)
            self._places.extend([bracket] * bracket.size)
            self._opened += 1
        self._of[config] = self._places[config]
        self._of[config].begun += 1

    def resumed(self, config: int) -> None:
        """Take note that a configuration goes on.

        Raises:
            ValueError: If it is not one that its bracket waits to resume.
        """
        bracket = self._of.get(config)
        if bracket is None or config not in bracket.chosen[bracket.begun :]:
            raise ValueError(f"configuration {config} is not paused")
        # Any of them may be first; the rest keep their order.
        bracket.chosen.remove(config)
        bracket.chosen.insert(bracket.begun, config)
        bracket.begun += 1

    def unwanted(self) -> list[int]:
        """Return those that were not among the best of their rung when it ended."""
        return [config for bracket in dict.fromkeys(self._places) for config in bracket.left]

    def close(self) -> None:
        """Take note that no new configuration will come.

        The bracket that is being filled ends its first rung with those that it has.
        """
        for bracket in self._open:
            if bracket.rung == 0 and bracket.free:
                bracket.sizes = [-(-bracket.begun // self._factor**k) for k in range(len(bracket.sizes))]
                if bracket.ended():
                    self._open.remove(bracket)

    def _decide(self, config: int, resource: int, value: float) -> Decision:
        bracket = self._of[config]
        if resource < bracket.level:
            return Decision(
                "continue", config, self.name, resource, bracket.level, value=value, bracket=bracket.index
            )
        rung, loss = bracket.rung, loss_of(value, self.maximize)
        bracket.losses[config] = math.nan if math.isnan(value) else loss
        rank = 1 + sum(other < loss for other in bracket.losses.values())
        count, last = len(bracket.losses), rung + 1 == len(bracket.sizes)
        if bracket.ended():
            self._open.remove(bracket)
        return Decision(
            "stop" if last else "pause",
            config,
            "full training" if last else self.name,
            resource,
            rung=rung,
            value=value,
            rank=rank,
            of=count,
            bracket=bracket.index,
        )

    def _next(self) -> _Bracket:
        index = self._opened % len(self._sizes)
        return _Bracket(index, self._sizes[index], list(self.levels[index:]))
