"""What every scheduler is: a fold over the events of a study, which answers with decisions."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Container, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

Action = Literal["start", "resume", "continue", "pause", "stop"]


@dataclass(frozen=True)
class Decision:
    """What to do next, and why.

    Attributes:
        action: ``start`` a new configuration or ``resume`` a paused one (answers to ``suggest``);
            ``continue``, ``pause`` or ``stop`` (answers to ``report``).
        config: The configuration meant; None for ``start``.
        rule: Name of the rule that decided.
        resource: Resource that the configuration has used, in units of training such as epochs.
        until: Resource up to which to train without asking again; None where that is not known.
        rung: Index of the rung, 0 for the lowest; None between rungs.
        value: The value compared, as reported.
        cutoff: What it was compared with; None without a comparison.
        rank: Place among the values of the rung, 1 for the best.
        of: Number of values in the rung.
        maximum: The resource at which training ends for now, where it grows.
        bracket: Index of the bracket, where there are several.
    """

    action: Action
    config: int | None
    rule: str
    resource: int = 0
    until: int | None = None
    rung: int | None = None
    value: float | None = None
    cutoff: float | None = None
    rank: int | None = None
    of: int | None = None
    maximum: int | None = None
    bracket: int | None = None

    def record(self) -> dict[str, Any]:
        """Return what is known, JSON-ready, without empty fields and numbers that are not finite."""
        known = {name: value for name, value in asdict(self).items() if value is not None}
        return {n: v for n, v in known.items() if not isinstance(v, float) or math.isfinite(v)}


class Scheduler(ABC):
    """A fold over a study's events: the same events in the same order give the same decisions.

    An event is ``started``, ``resumed`` or ``report``; ``suggest`` changes nothing. So a scheduler
    can be made again, in any process, from what the storage holds. Values are minimised, or
    maximised with ``maximize``; NaN is worse than everything and equal to itself. Reports of a
    configuration come in increasing resource; one at or below the last changes nothing and is
    answered as that was.

    Args:
        max_resource: Resource of full training.
        maximize: Whether higher values are better.

    Attributes:
        resumes_last: Whether it resumes configurations still when no new one is to be started.
    """

    resumes_last = False

    def __init__(self, max_resource: int, *, maximize: bool = False) -> None:
        if max_resource < 1:
            raise ValueError(f"max_resource is {max_resource}; give 1 or more")
        self.max_resource = max_resource
        self.maximize = maximize
        self._last: dict[int, Decision] = {}

    @abstractmethod
    def suggest(self) -> Decision:
        """Return what a free worker does: ``start`` or ``resume``."""

    @abstractmethod
    def until(self, config: int) -> int:
        """Return the resource at which a configuration that was started is decided on next."""

    @abstractmethod
    def started(self, config: int) -> None:
        """Take note that the configuration of that position, from 0, is being trained.

        Raises:
            ValueError: If it was started before.
        """

    @abstractmethod
    def resumed(self, config: int) -> None:
        """Take note that a paused configuration is being trained again."""

    def unwanted(self) -> Iterable[int]:
        """Return the paused configurations that it will never resume, whatever happens."""
        return ()

    def report(self, config: int, resource: int, value: float) -> Decision:
        """Take note of a value after ``resource`` units; return what the configuration does."""
        last = self._last.get(config)
        if last is not None and resource <= last.resource:
            return last
        decision = self._last[config] = self._decide(config, resource, value)
        return decision

    @abstractmethod
    def _decide(self, config: int, resource: int, value: float) -> Decision:
        """Take note of a value beyond those that the configuration has reported."""


def check_new(config: int, known: Container[int]) -> None:
    """Raise ``ValueError`` if a configuration is among those that were started."""
    if config in known:
        raise ValueError(f"configuration {config} was started before")
