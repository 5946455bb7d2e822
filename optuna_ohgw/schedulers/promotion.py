"""ASHA, the promotion form: a configuration pauses at every rung and goes on when it is promoted."""

from __future__ import annotations

import math
from itertools import takewhile

from optuna_ohgw.schedulers.base import Decision, Scheduler, check_new
from optuna_ohgw.schedulers.rungs import Rung, loss_of, make_rungs


class PromotionAsha(Scheduler):
    """Asynchronous successive halving by promotion, Li et al. 2020, Algorithm 2.

    A free worker looks through the rungs from the top down for the best configuration that is not
    promoted yet and is at least as good as the interpolated quantile r_k / r_{k+1} of all that
    reached the rung, promoted ones included, of at least two; else it starts a new one. Departure:
    the paper takes the best ⌊n/η⌋ in place of the quantile, as Syne Tune does here. NaN is never promoted.

    Args:
        max_resource: Resource of full training.
        min_resource: The lowest rung.
        reduction_factor: η.
        maximize: Whether higher values are better.
    """

    name = "asha-promotion"

    def __init__(
        self,
        max_resource: int,
        *,
        min_resource: int = 1,
        reduction_factor: int = 3,
        maximize: bool = False,
    ) -> None:
        super().__init__(max_resource, maximize=maximize)
        self.rungs = make_rungs(min_resource, max_resource, reduction_factor)
        self.maximum = max_resource
        self._next: dict[int, int] = {}

    def suggest(self) -> Decision:
        """Return whom to promote, or to start a new configuration."""
        for index in reversed(range(len(self.rungs))):
            rung = self.rungs[index]
            cutoff = rung.cutoff()
            if rung.level >= self.maximum or cutoff is None or not rung.waiting:
                continue
            loss, _, config = rung.waiting[0]
            if loss <= cutoff and loss < math.inf:
                return self._decision("resume", config, rung.level, index, rung, loss)
        return Decision("start", None, self.name, until=self._until(0), maximum=self.maximum)

    def until(self, config: int) -> int:
        """Return the next rung of a configuration, or full training."""
        return self._until(self._next[config])

    def started(self, config: int) -> None:
        """Take note of a new configuration."""
        check_new(config, self._next)
        self._next[config] = 0

    def resumed(self, config: int) -> None:
        """Take note of a promotion.

        Raises:
            ValueError: If the configuration is not paused.
        """
        index = self._next[config] - 1
        if index < 0 or not self.rungs[index].waits(config):
            raise ValueError(f"configuration {config} is not paused")
        self.rungs[index].promote(config)

    def unwanted(self) -> list[int]:
        """Return those whose value was NaN."""
        last = [takewhile(lambda entry: entry[0] == math.inf, reversed(rung.waiting)) for rung in self.rungs]
        return [config for entries in last for *_, config in entries]

    def _decide(self, config: int, resource: int, value: float) -> Decision:
        index = self._next[config]
        if resource >= self.max_resource:
            self.observed(config, resource, value)
            return Decision("stop", config, "full training", resource, value=value, maximum=self.maximum)
        if resource < self._until(index):
            self.observed(config, resource, value)
            return Decision("continue", config, self.name, resource, self._until(index), maximum=self.maximum)
        # A report that skips rungs counts at each of them and waits at the highest.
        while resource >= self._until(index) < self.max_resource:
            if index > self._next[config]:
                self.rungs[index - 1].promote(config)
            rung = self.rungs[index]
            rung.add(config, loss_of(value, self.maximize))
            index += 1
        self._next[config] = index
        self.observed(config, resource, value)
        return self._decision("pause", config, resource, index - 1, rung, rung.losses[config])

    def observed(self, config: int, resource: int, value: float) -> None:
        """Take note of every value, after its rung has it."""

    def _decision(
        self, action: str, config: int, resource: int, index: int, rung: Rung, loss: float
    ) -> Decision:
        cutoff, sign = rung.cutoff(), -1 if self.maximize else 1
        return Decision(
            "resume" if action == "resume" else "pause",
            config,
            self.name,
            resource,
            until=self._until(index + 1) if action == "resume" else None,
            rung=index,
            value=math.nan if loss == math.inf else sign * loss,
            cutoff=None if cutoff is None else sign * cutoff,
            rank=rung.rank(loss),
            of=len(rung.losses),
            maximum=self.maximum,
        )

    def _until(self, index: int) -> int:
        return self.rungs[index].level if index < len(self.rungs) else self.max_resource
