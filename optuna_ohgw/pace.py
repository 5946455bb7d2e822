"""How long a study takes yet: from what its workers got done in their seconds so far."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence

from optuna.trial import FrozenTrial, TrialState

from optuna_ohgw.cells import ended_at
from optuna_ohgw.history import is_interrupted, superseded
from optuna_ohgw.spec import StudySpec
from optuna_ohgw.spec_parts import ENDLESS


def eta_s(used: float, worker_s: float, rests: Sequence[float], *, live: int, at_once: int) -> float | None:
    """Return the seconds until the rests of all budgets are used.

    The pace is (used / worker_s) for each worker. Not less than what the longest rest takes those who may
    work on one cell.

    Args:
        used: What was done, in budgets of a cell.
        worker_s: Seconds that it took, of all workers together.
        rests: What is left, in budgets of a cell, by cell.
        live: Number of workers now.
        at_once: How many may work on a cell at a time.

    Returns:
        None where nobody works, or nothing was done yet.
    """
    if live == 0:
        return None
    if sum(rests) <= 0:
        return 0.0
    if used <= 0 or worker_s <= 0:
        return None
    each = worker_s / used
    return max(sum(rests) * each / live, max(rests) * each / min(live, at_once))


def worker_seconds(trials: Iterable[FrozenTrial], now: datetime.datetime) -> float:
    """Return for how long workers were at a cell's trials, what they did in vain not counted.

    Args:
        trials: Of the cell; those that run do until now.
        now: Local time, as Optuna has it.
    """
    spans = ((t.datetime_start, ended_at(t) or now) for t in trials)
    return sum(max(0.0, (end - start).total_seconds()) for start, end in spans if start is not None)


def share_begun(trials: list[FrozenTrial], spec: StudySpec, share: float) -> float:
    """Return the share of a cell's budget that is used, its running trials included, 0 to 1.

    Where trials are counted, one that runs counts as far as it is on the way that an ended one went on
    average, or to the end where none has ended.

    Args:
        trials: Of the cell.
        spec: The study.
        share: Of a :class:`~optuna_ohgw.cells.Ledger`, for which a trial counts when it has ended.
    """
    if not spec.budget.trials or spec.scheduler.name in ENDLESS:
        return min(1.0, share)
    gone = superseded(trials)
    own = [t for t in trials if t.number not in gone and not is_interrupted(t)]
    ended = [len(t.intermediate_values) for t in own if t.state.is_finished()]
    way = max(1.0, sum(ended) / len(ended)) if ended else spec.task.epochs
    begun = [t for t in own if t.state == TrialState.RUNNING]
    part = sum(min(1.0, len(t.intermediate_values) / way) for t in begun)
    return min(1.0, max(share, (len(ended) + part) / spec.budget.trials))
