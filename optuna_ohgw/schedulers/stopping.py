"""ASHA, the stopping form: a configuration trains on until a rung stops it."""

from __future__ import annotations

import math
from typing import Literal

from optuna_ohgw.schedulers.base import Decision, Scheduler, check_new
from optuna_ohgw.schedulers.rungs import loss_of, make_rungs


class StoppingAsha(Scheduler):
    """Asynchronous successive halving that stops configurations at rungs and never resumes any.

    Li et al. 2020, "A System for Massively Parallel Hyperparameter Tuning", in the form that tests
    a configuration where it arrives. Two rules are in use for the test:

    - ``quantile``: go on with fewer than two values at the rung, or if at least as good as the
      interpolated quantile r_k / r_{k+1} of them (Syne Tune's).
    - ``optuna``: go on if among the best ⌊n/η⌋, at least one (Optuna's SuccessiveHalvingPruner);
      the first ``bootstrap_count`` at a rung are stopped.

    A report that skips rungs is tested at each of them, the lowest first. NaN is stopped at any
    rung; by Optuna's rule without a place among its values.

    Args:
        max_resource: Resource of full training.
        min_resource: The lowest rung.
        reduction_factor: η.
        rule: ``quantile`` or ``optuna``.
        bootstrap_count: See above; for ``optuna`` alone.
        maximize: Whether higher values are better.
    """

    def __init__(
        self,
        max_resource: int,
        *,
        min_resource: int = 1,
        reduction_factor: int = 3,
        rule: Literal["quantile", "optuna"] = "quantile",
        bootstrap_count: int = 0,
        maximize: bool = False,
    ) -> None:
        super().__init__(max_resource, maximize=maximize)
        if bootstrap_count and rule != "optuna":
            raise ValueError(
                f"bootstrap_count {bootstrap_count} is of Optuna's rule; drop it or take that rule"
            )
        self.rule, self.bootstrap_count, self.reduction_factor = rule, bootstrap_count, reduction_factor
        self.rungs = make_rungs(min_resource, max_resource, reduction_factor)
        self._next: dict[int, int] = {}

    def suggest(self) -> Decision:
        """Return to start a new configuration."""
        return Decision("start", None, self.name, until=self._until(0))

    def until(self, config: int) -> int:
        """Return the next rung of a configuration, or full training."""
        return self._until(self._next[config])

    def started(self, config: int) -> None:
        """Take note of a new configuration."""
        check_new(config, self._next)
        self._next[config] = 0

    def resumed(self, config: int) -> None:
        """Raise: nothing is ever paused."""
        raise ValueError(f"configuration {config} cannot be resumed: it was stopped or trains still")

    @property
    def name(self) -> str:
        """Name of the rule in a decision."""
        return f"asha, {self.rule}"

    def _decide(self, config: int, resource: int, value: float) -> Decision:
        decision, loss = None, loss_of(value, self.maximize)
        while self._until(self._next[config]) <= min(resource, self.max_resource - 1):
            decision = self._test(config, resource, value, loss)
            if decision.action == "stop":
                return decision
        if resource >= self.max_resource:
            return Decision("stop", config, "full training", resource, value=value)
        return decision or Decision("continue", config, self.name, resource, self._until(self._next[config]))

    def _test(self, config: int, resource: int, value: float, loss: float) -> Decision:
        index = self._next[config]
        rung, self._next[config] = self.rungs[index], index + 1
        if not (math.isnan(value) and self.rule == "optuna"):
            rung.add(config, loss)
        n = len(rung.losses)
        if self.rule == "optuna":
            cutoff = rung.top(self.reduction_factor) if n > self.bootstrap_count else None
            good = cutoff is not None and loss <= cutoff
        else:
            cutoff = rung.cutoff()
            good = cutoff is None or loss <= cutoff
        return Decision(
            "continue" if good and not math.isnan(value) else "stop",
            config,
            self.name,
            resource,
            until=self._until(index + 1),
            rung=index,
            value=value,
            cutoff=None if cutoff is None else (-cutoff if self.maximize else cutoff),
            rank=rung.rank(loss),
            of=n,
        )

    def _until(self, index: int) -> int:
        return self.rungs[index].level if index < len(self.rungs) else self.max_resource
