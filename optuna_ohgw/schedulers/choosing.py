"""Schedulers that choose by a model which configuration is trained next, and how far."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from optuna_ohgw.schedulers.base import Decision, Scheduler, check_new
from optuna_ohgw.schedulers.rungs import loss_of

Array = NDArray[np.float64]


@dataclass
class Course:
    """What is known of a candidate that was started.

    Attributes:
        resources: Where it reported, increasing.
        losses: What it reported there, minimised; ∞ for NaN.
        until: Resource to which it was last sent.
        running: Whether it is being trained.
    """

    resources: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    until: int = 0
    running: bool = True

    @property
    def resource(self) -> int:
        """Resource of the last report, 0 before the first."""
        return self.resources[-1] if self.resources else 0

    @property
    def diverged(self) -> bool:
        """Whether it ever reported NaN or ∞."""
        return any(math.isinf(loss) for loss in self.losses)


class Choice(NamedTuple):
    """What a model would train next.

    Attributes:
        config: Index of the candidate.
        until: Resource to which it is to be trained.
        score: The acquisition's value, higher is better; None for a random choice.
        rule: Name of the rule that chose.
    """

    config: int
    until: int
    score: float | None
    rule: str


class Chooser(Scheduler):
    """A scheduler with a pool of candidates, which pauses each where it was sent and asks a model again.

    The choice follows from the pool, the seed and the events alone. A candidate that diverged or
    reached ``max_resource`` is never resumed.

    Args:
        max_resource: Resource of full training.
        candidates: Configurations ``[n, d]`` in the unit cube.
        maximize: Whether higher values are better.
        seed: Seed of all random draws.

    Attributes:
        courses: What was started, by index of the candidate, in the order of the starts.
    """

    name: str
    resumes_last = True

    def __init__(
        self, max_resource: int, candidates: Array, *, maximize: bool = False, seed: int = 0
    ) -> None:
        super().__init__(max_resource, maximize=maximize)
        if candidates.ndim != 2 or not len(candidates):
            raise ValueError(f"candidates have shape {candidates.shape}; give [n, d] with n from 1")
        self.candidates = candidates
        self.seed = seed
        self.courses: dict[int, Course] = {}
        self._events = 0
        self._chosen: tuple[int, Choice | None] = (-1, None)
        self._only_fresh = False

    @abstractmethod
    def choose(self) -> Choice | None:
        """Return what to train next; None if nothing is left. Changes nothing that others see."""

    @property
    def fresh(self) -> list[int]:
        """Candidates that were not started."""
        return [c for c in range(len(self.candidates)) if c not in self.courses]

    @property
    def paused(self) -> list[int]:
        """Candidates that could go on."""
        if self._only_fresh:
            return []
        return [
            c
            for c, course in self.courses.items()
            if not course.running and not course.diverged and course.resource < self.max_resource
        ]

    def suggest(self) -> Decision:
        """Return the candidate to start or to resume; ``start`` with None where none is left.

        The same between two events: a choice may take a second, and is kept until something happens.
        """
        if self._chosen[0] != self._events:
            self._chosen = self._events, self.choose()
        choice = self._chosen[1]
        if choice is None:
            return Decision("start", None, "nothing left")
        course = self.courses.get(choice.config)
        return Decision(
            "start" if course is None else "resume",
            choice.config,
            choice.rule,
            0 if course is None else course.resource,
            choice.until,
            value=choice.score,
        )

    def suggest_start(self) -> Choice | None:
        """Return the candidate to start by a worker that cannot resume one; None where none is left."""
        self._only_fresh = True
        try:
            return self.choose() if self.fresh else None
        finally:
            self._only_fresh = False

    def dump(self) -> dict[str, Any] | None:
        """Return what choices depend on beside the events, JSON-ready; None for nothing."""
        return None

    def load(self, memory: Mapping[str, Any]) -> None:
        """Take over what ``dump`` returned, in this or another process; nothing where that is None."""

    def until(self, config: int) -> int:
        """Return where the candidate was last sent."""
        return self.courses[config].until

    def started(self, config: int, until: int | None = None) -> None:
        """Take note of a start; ``until`` where it was sent, else what was suggested."""
        check_new(config, self.courses)
        self.courses[config] = Course(until=self._sent(config, until))
        self._events += 1

    def resumed(self, config: int, until: int | None = None) -> None:
        """Take note that a candidate goes on.

        Raises:
            ValueError: If it is not paused.
        """
        if config not in self.paused:
            raise ValueError(f"configuration {config} is not paused")
        course = self.courses[config]
        course.until, course.running = self._sent(config, until), True
        self._events += 1

    def _decide(self, config: int, resource: int, value: float) -> Decision:
        course = self.courses[config]
        course.resources.append(resource)
        course.losses.append(loss_of(value, self.maximize))
        self._events += 1
        if resource >= self.max_resource:
            course.running = False
            return Decision("stop", config, "full training", resource, value=value)
        if course.diverged:
            course.running = False
            return Decision("stop", config, "diverged", resource, value=value)
        if resource < course.until:
            return Decision("continue", config, self.name, resource, course.until, value=value)
        course.running = False
        return Decision("pause", config, self.name, resource, value=value)

    def _sent(self, config: int, until: int | None) -> int:
        if until is not None:
            return until
        choice = self._chosen[1]
        if self._chosen[0] != self._events or choice is None or choice.config != config:
            raise ValueError(f"configuration {config} was not suggested; say how far it is sent")
        return choice.until
