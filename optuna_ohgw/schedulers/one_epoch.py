"""The one-epoch baseline: all for the shortest time, the best few to the end."""

from __future__ import annotations

import math

from optuna_ohgw.schedulers.base import Decision, Scheduler, check_new
from optuna_ohgw.schedulers.rungs import loss_of


class OneEpoch(Scheduler):
    """Train every configuration for ``min_resource``, then the best ``keep`` to the end.

    Arxiv 2307.15422, which finds this as good as multi-fidelity methods at a tenth of their cost.
    The first ``configs`` are started; when they have all paused, the best are resumed, best first.

    Args:
        max_resource: Resource of full training.
        configs: How many configurations there are.
        min_resource: The short training.
        keep: How many go on.
        maximize: Whether higher values are better.
    """

    name = "one-epoch"
    resumes_last = True

    def __init__(
        self, max_resource: int, *, configs: int, min_resource: int = 1, keep: int = 1, maximize: bool = False
    ) -> None:
        super().__init__(max_resource, maximize=maximize)
        if not 1 <= keep <= configs:
            raise ValueError(f"keep is {keep}; give 1 to {configs}, the number of configurations")
        self.configs, self.min_resource, self.keep = configs, min_resource, keep
        self._losses: dict[int, float] = {}
        self._started: set[int] = set()
        self._resumed: set[int] = set()

    def suggest(self) -> Decision:
        """Return to start a new one, or the next best when all have had their turn."""
        chosen = self._best()
        waiting = [c for c in chosen if c not in self._resumed]
        if len(self._started) >= self.configs and len(self._losses) >= self.configs and waiting:
            config = waiting[0]
            loss = self._losses[config]
            rank = chosen.index(config) + 1
            return Decision(
                "resume",
                config,
                self.name,
                self.min_resource,
                self.max_resource,
                rung=0,
                value=-loss if self.maximize else loss,
                rank=rank,
                of=len(self._losses),
            )
        return Decision("start", None, self.name, until=self.min_resource)

    def until(self, config: int) -> int:
        """Return the end of the short training, then that of the full one."""
        return self.max_resource if config in self._losses else self.min_resource

    def started(self, config: int) -> None:
        """Take note of a new configuration."""
        check_new(config, self._started)
        self._started.add(config)

    def resumed(self, config: int) -> None:
        """Take note that one of the best goes on."""
        if config not in self._losses or config in self._resumed:
            raise ValueError(f"configuration {config} is not paused")
        self._resumed.add(config)

    def unwanted(self) -> set[int]:
        """Return all but the best, when all have had their turn."""
        return self._losses.keys() - set(self._best()) if len(self._losses) >= self.configs else set()

    def _decide(self, config: int, resource: int, value: float) -> Decision:
        if resource >= self.max_resource:
            return Decision("stop", config, "full training", resource, value=value)
        if config in self._losses or resource < self.min_resource:
            return Decision("continue", config, self.name, resource, self.until(config))
        loss = self._losses[config] = loss_of(value, self.maximize)
        rank = 1 + sum(other < loss for other in self._losses.values())
        of = len(self._losses)
        return Decision("pause", config, self.name, resource, rung=0, value=value, rank=rank, of=of)

    def _best(self) -> list[int]:
        finite = [c for c, loss in self._losses.items() if loss < math.inf]
        return sorted(finite, key=lambda c: self._losses[c])[: self.keep]
