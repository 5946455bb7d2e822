"""BOHB over a finite pool: Hyperband says when and how far, a density model says which."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from optuna_ohgw.schedulers.base import Decision
from optuna_ohgw.schedulers.choosing import Array, Choice, Chooser, Course
from optuna_ohgw.schedulers.density import RANDOM_FRACTION, Model, fit_model, pick
from optuna_ohgw.schedulers.rungs import loss_of
from optuna_ohgw.schedulers.synchronous import HyperbandSynchronous
from optuna_ohgw.seeds import Purpose, derive_seed


class Bohb(Chooser):
    """BOHB, Falkner et al. 2018, with configurations from a finite pool.

    Every start, resume and pause is that of :class:`HyperbandSynchronous`. A new configuration is a
    random fresh one with probability 1/3 or without a model, else that with the lowest g/l of 64 draws
    around good ones (Algorithm 2; see :mod:`optuna_ohgw.schedulers.density`). Losses are modelled at rungs.

    Departures: the draws are fresh candidates of the pool, each as likely as the paper's samples would
    fall on it. A candidate that reports NaN or ∞ ends there and counts as +∞ at the rung that it was
    on its way to. When the last candidate was started, the bracket being filled ends its first rung
    with those that it has. Departures of Hyperband and of the model are said there.

    Args:
        max_resource: Resource of full training.
        candidates: Configurations ``[n, d]`` in the unit cube.
        min_resource: The lowest rung.
        reduction_factor: η.
        maximize: Whether higher values are better.
        seed: Seed of all random draws.
    """

    name = "bohb"

    def __init__(
        self,
        max_resource: int,
        candidates: Array,
        *,
        min_resource: int = 1,
        reduction_factor: int = 3,
        maximize: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(max_resource, candidates, maximize=maximize, seed=seed)
        self._hyperband = HyperbandSynchronous(
            max_resource, min_resource=min_resource, reduction_factor=reduction_factor, maximize=maximize
        )
        self._started: list[int] = []  # candidate by Hyperband's position
        self._positions: dict[int, int] = {}

    def choose(self) -> Choice | None:
        """Return Hyperband's resume, or the candidate to be started; None if nothing can be trained now."""
        wanted = self._hyperband.suggest()
        assert wanted.until is not None
        if wanted.config is not None:
            return Choice(self._started[wanted.config], wanted.until, wanted.value, wanted.rule)
        fresh = self.fresh
        if not fresh:
            return None
        rng = np.random.default_rng(derive_seed(self.seed, Purpose.SUGGEST, len(self._started)))
        at_random = rng.random() < RANDOM_FRACTION
        model = None if at_random else self.model()
        if model is None:
            return Choice(fresh[int(rng.integers(len(fresh)))], wanted.until, None, f"{self.name}, random")
        place, ratio = pick(model, self.candidates[fresh], rng)
        rule = f"{self.name}, model at {model.budget:g}"
        return Choice(fresh[place], wanted.until, -math.log(ratio), rule)

    def model(self) -> Model | None:
        """Return the model of what was reported so far; None while no resource has enough reports."""
        seen: dict[float, tuple[list[int], list[float]]] = {}
        for config, course in self.courses.items():
            for resource, loss in zip(course.resources, course.losses, strict=True):
                if math.isfinite(loss) and resource not in self._hyperband.levels:
                    continue
                rung = resource if math.isfinite(loss) else course.until
                configs, losses = seen.setdefault(rung, ([], []))
                configs.append(config)
                losses.append(loss)
        observed = {r: (self.candidates[configs], np.array(losses)) for r, (configs, losses) in seen.items()}
        return fit_model(observed, (0,) * self.candidates.shape[1])

    def suggest(self) -> Decision:
        """Return what Hyperband does, with the candidate to start; ``start`` with None where none is left."""
        decision = super().suggest()
        if decision.config is None:
            return decision
        wanted = self._hyperband.suggest()
        if decision.action == "resume":
            return replace(wanted, config=decision.config)
        return replace(decision, bracket=wanted.bracket)

    def started(self, config: int, until: int | None = None) -> None:
        """Take note of a start; where it is sent follows from its position, whatever ``until`` says.

        Raises:
            ValueError: If it was started before or is no candidate.
        """
        if config in self.courses or not 0 <= config < len(self.candidates):
            known = "was started before" if config in self.courses else "is no candidate"
            raise ValueError(f"configuration {config} {known}")
        position = len(self._started)
        self._hyperband.started(position)
        self._positions[config] = position
        self._started.append(config)
        self.courses[config] = Course(until=self._hyperband.until(position))
        self._events += 1
        if len(self._started) == len(self.candidates):
            self._hyperband.close()

    def resumed(self, config: int, until: int | None = None) -> None:
        """Take note that a candidate goes on, to its next rung, whatever ``until`` says.

        Raises:
            ValueError: If Hyperband does not wait to resume it.
        """
        if config not in self._positions:
            raise ValueError(f"configuration {config} is not paused")
        self._hyperband.resumed(self._positions[config])
        course = self.courses[config]
        course.until, course.running = self._hyperband.until(self._positions[config]), True
        self._events += 1

    def unwanted(self) -> list[int]:
        """Return those that Hyperband left behind."""
        return [self._started[position] for position in self._hyperband.unwanted()]

    def _decide(self, config: int, resource: int, value: float) -> Decision:
        course, position = self.courses[config], self._positions[config]
        course.resources.append(resource)
        course.losses.append(loss_of(value, self.maximize))
        self._events += 1
        if course.diverged:
            # Its rung need not wait for it: there it is worse than all.
            rung = self._hyperband.report(position, max(resource, course.until), math.nan)
            decision = replace(rung, action="stop", rule="diverged", resource=resource, value=value)
        else:
            decision = self._hyperband.report(position, resource, value)
        course.running = decision.action == "continue"
        return replace(decision, config=config)
