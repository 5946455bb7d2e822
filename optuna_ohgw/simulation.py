"""Replay of learning curves under a scheduler, on a simulated clock with any number of workers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from optuna_ohgw.schedulers.base import Decision, Scheduler

Array = NDArray[np.float64]


@dataclass
class Replay:
    """What happened, in order.

    Attributes:
        times: Time stamp of each report, in slices since the beginning.
        configs: Row of the table that reported.
        resources: Resource reported at, from 1.
        values: Values reported.
        decisions: Every decision that was acted on with the time of it; empty unless asked for.
        started: Rows in the order in which they were started.
        beyond: Rows that a scheduler would have trained further than their curve is known.
    """

    times: list[int] = field(default_factory=list)
    configs: list[int] = field(default_factory=list)
    resources: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    decisions: list[tuple[int, Decision]] = field(default_factory=list)
    started: list[int] = field(default_factory=list)
    beyond: list[int] = field(default_factory=list)

    @property
    def slices(self) -> int:
        """Units of training done in all."""
        return len(self.times)

    @property
    def makespan(self) -> int:
        """Time stamp of the last report."""
        return self.times[-1] if self.times else 0

    def final_resources(self) -> dict[int, int]:
        """Return the last resource of each row started."""
        last = dict.fromkeys(self.started, 0)
        last.update(zip(self.configs, self.resources, strict=True))
        return last

    def returned(self, maximize: bool = False) -> int:
        """Return the row whose last value is the best, the search's answer."""
        last = dict(zip(self.configs, self.values, strict=True))
        return min(last, key=lambda c: _loss(last[c], maximize))

    def time_to(self, threshold: float, maximize: bool = False) -> float:
        """Return the time stamp of the first value at least as good as a threshold; ∞ if none is."""
        bar = _loss(threshold, maximize)
        for time, value in zip(self.times, self.values, strict=True):
            if _loss(value, maximize) <= bar:
                return float(time)
        return math.inf


def simulate(
    scheduler: Scheduler,
    curves: Array | Sequence[Sequence[float]],
    order: Sequence[int],
    *,
    workers: int = 1,
    max_slices: float = math.inf,
    keep_decisions: bool = False,
    resumes_last: bool = False,
) -> Replay:
    """Return what a scheduler does with learning curves.

    A unit of training takes a unit of time. At a time stamp the running configurations report, in
    the order in which they were launched, and then each free worker is given its next. When the
    last configuration of ``order`` has been started nothing is resumed either, unless it
    ``resumes_last``: those that run go on to their own next decision to pause or stop.

    Args:
        scheduler: A fresh scheduler; configurations are known to it by their place in ``order``.
        curves: Values ``[n, resource]`` of each row after 1, 2, … units; a curve that ends early
            ends the configuration there.
        order: Rows in the order in which they are started.
        workers: Configurations trained at the same time.
        max_slices: Stop after so many units of training.
        keep_decisions: Keep every decision in the replay.
        resumes_last: Resume still when the last one has been started; some schedulers always do.
    """
    replay, running, trained, now = Replay(), list[int](), dict[int, int](), 0
    more = resumes_last or scheduler.resumes_last
    while True:
        while len(running) < workers and (more or len(replay.started) < len(order)):
            decision = scheduler.suggest()
            if decision.config is None and len(replay.started) == len(order):
                break
            config = len(replay.started) if decision.config is None else decision.config
            if decision.action == "start":
                replay.started.append(order[config])
                trained[config] = 0
                scheduler.started(config)
            else:
                scheduler.resumed(config)
            running.append(config)
            if keep_decisions:
                replay.decisions.append((now, decision))
        if not running or replay.slices >= max_slices:
            return replay
        now += 1
        going = []
        for config in running:
            row, resource = order[config], trained[config]
            curve = curves[row]
            if resource == len(curve):
                replay.beyond.append(row)
                continue
            value, trained[config] = float(curve[resource]), resource + 1
            replay.times.append(now)
            replay.configs.append(row)
            replay.resources.append(resource + 1)
            replay.values.append(value)
            decision = scheduler.report(config, resource + 1, value)
            if decision.action == "continue":
                going.append(config)
            if keep_decisions and decision.rung is not None:
                replay.decisions.append((now, decision))
        running = going


def regret(curves: Array, row: int, *, maximize: bool = False) -> float:
    """Return (final loss of a row - best of all) / (median - best), over a table's final values.

    Args:
        curves: Finite values ``[n, resource]``.
        row: The row returned by a search.
        maximize: Whether higher values are better.
    """
    final = -curves[:, -1] if maximize else curves[:, -1]
    best = float(final.min())
    return float((final[row] - best) / (np.median(final) - best))


def finite_curves(values: Array, *, maximize: bool = False) -> Array:
    """Return curves with NaN, and all after it, replaced by the worst finite value of the table."""
    losses = -values if maximize else values
    worst = float(np.max(losses, where=np.isfinite(losses), initial=-math.inf))
    gone = np.logical_or.accumulate(~np.isfinite(losses), axis=1)
    filled = np.where(gone, worst, losses)
    return -filled if maximize else filled


def _loss(value: float, maximize: bool) -> float:
    return math.inf if math.isnan(value) else (-value if maximize else value)
