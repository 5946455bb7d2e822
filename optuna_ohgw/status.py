"""How far a study is: read from the storage, by any machine, changing nothing."""

from __future__ import annotations

import datetime
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from optuna_ohgw.cell_trials import CellTrials, read_cells
from optuna_ohgw.cells import Ledger, cells_of
from optuna_ohgw.claims import CELL, DEVICE, ERROR, Pulse, as_left, claims_of
from optuna_ohgw.history import LOST, checkpoint_bytes, is_interrupted, paused_at, superseded
from optuna_ohgw.reading import hide_passwords
from optuna_ohgw.spec import StudySpec

DONE, RUNNING, WAITING, GIVEN_UP = "done", "running", "waiting", "given up"
STATES = ("complete", "pruned", "paused", "running", "waiting", "failed", "interrupted")
_RECENT_S = 1800.0


@dataclass(frozen=True)
class Worker:
    """A worker that holds a cell.

    Attributes:
        cell: Label of the cell.
        host: Name of its machine.
        pid: Number of its process there.
        device: What it trains on.
        since: Unix seconds at which it took the cell.
        known: Whether it is known to live; of another machine it may take ten seconds of ``--watch``.
    """

    cell: str
    host: str
    pid: int
    device: str
    since: float
    known: bool


@dataclass(frozen=True)
class CellStatus:
    """A cell: ``done``, ``running``, ``waiting`` or ``given up``, its trials by state, and its budget."""

    cell: str
    state: str
    trials: dict[str, int]
    share: float
    best: float | None
    test: float | None
    error: str | None = None


@dataclass(frozen=True)
class Status:
    """A study.

    Attributes:
        study: Its name.
        cells: Every cell, pilots first.
        workers: Those who hold a cell and are not known to be dead.
        share: Of the budgets of all cells the share that is used, 0 to 1.
        eta_s: Seconds until all is used, at the pace of the last half hour; None where none is known.
        checkpoint_bytes: What checkpoints of paused and running trials take, as the storage tells.
        lost_s: Seconds of training that killed workers did in vain.
    """

    study: str
    cells: tuple[CellStatus, ...]
    workers: tuple[Worker, ...]
    share: float
    eta_s: float | None
    checkpoint_bytes: int
    lost_s: float
    counts: dict[str, int] = field(init=False)
    trials: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        states = Counter(cell.state for cell in self.cells)
        object.__setattr__(self, "counts", {s: states[s] for s in (DONE, RUNNING, WAITING, GIVEN_UP)})
        trials = {s: sum(cell.trials[s] for cell in self.cells) for s in STATES}
        object.__setattr__(self, "trials", trials)

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values, for JSON."""
        return asdict(self)


def read_status(storage: BaseStorage, spec: StudySpec, pulse: Pulse) -> Status:
    """Return how far a study is.

    Args:
        storage: Where it is.
        spec: The study.
        pulse: Kept between calls, it comes to know which workers of other machines live.
    """
    claims = claims_of(storage, spec)
    how = pulse.of(claims)
    held = [c for c in claims if how[c.number] != "dead"]
    at_work, on = {c.user_attrs[CELL] for c in held}, defaultdict[str, list[FrozenTrial]](list)
    for claim in claims:
        on[claim.user_attrs[CELL]].append(claim)
    known = read_cells(storage, spec)
    cells, spans, size, lost = [], list[tuple[float, float]](), 0, 0.0
    shared = spec.execution.workers > 1
    for cell in cells_of(spec):
        found = known.get(cell.name)
        if found is None:
            cells.append(CellStatus(cell.label, WAITING, dict.fromkeys(STATES, 0), 0.0, None, None))
            continue
        final, trials = found.final, as_left(found.trials, on[cell.label], how, shared=shared)
        found = CellTrials(final, trials)
        share = 1.0 if final is not None else min(1.0, Ledger(found, spec).share_done())
        error = _error(on[cell.label])
        held_now = cell.label in at_work
        state = DONE if final is not None else RUNNING if held_now else GIVEN_UP if error else WAITING
        values = [v for t in trials for v in t.intermediate_values.values()]
        best, test = max(values, default=None), (final or {}).get("test_accuracy")
        cells.append(CellStatus(cell.label, state, _by_state(trials), share, best, test, error))
        spans += _progress(trials, share)
        size += checkpoint_bytes(found)
        lost += sum(t.user_attrs.get(LOST, 0.0) for t in trials if not is_interrupted(t))
    whole = sum(c.share for c in cells) / len(cells)
    rest = sum(1 - c.share for c in cells)
    now = datetime.datetime.now().timestamp()
    eta = eta_s(spans, rest, now) if held else None
    return Status(spec.name, tuple(cells), tuple(_worker(c, how) for c in held), whole, eta, size, lost)


def eta_s(ends: Sequence[tuple[float, float]], rest: float, now: float) -> float | None:
    """Return the seconds until a rest of budgets is used at the recent pace; None where none is known.

    Args:
        ends: (Unix seconds of a trial's end, the share of its cell's budget that it used).
        rest: What is left, in budgets of a cell.
        now: Unix seconds.
    """
    recent = [(end, share) for end, share in ends if now - end <= _RECENT_S]
    if rest <= 0 or not recent:
        return 0.0 if rest <= 0 else None
    used, took = sum(share for _, share in recent), now - min(end for end, _ in recent)
    return rest * took / used if took > 0 and used > 0 else None


def _progress(trials: list[FrozenTrial], share: float) -> list[tuple[float, float]]:
    """Return when trials ended, each with an equal part of what its cell has used."""
    gone = superseded(trials)
    ended = [t for t in trials if t.number not in gone and t.state.is_finished() and not is_interrupted(t)]
    times = [t.datetime_complete.timestamp() for t in ended if t.datetime_complete is not None]
    return [(end, share / len(times)) for end in times]


def _by_state(trials: list[FrozenTrial]) -> dict[str, int]:
    gone = superseded(trials)
    found = dict.fromkeys(STATES, 0)
    for trial in trials:
        if trial.state == TrialState.WAITING:
            found["waiting"] += 1
        elif is_interrupted(trial):
            found["interrupted"] += 1
        elif trial.number not in gone:
            paused = trial.state == TrialState.PRUNED and paused_at(trial, trial.last_step or 0)
            names = {TrialState.FAIL: "failed", TrialState.PRUNED: "pruned"}
            found["paused" if paused else names.get(trial.state, trial.state.name.lower())] += 1
    return found


def _error(claims: list[FrozenTrial]) -> str | None:
    """Return by what the last who worked on a cell gave it up, if so; a driver's words may hold a URL."""
    error = claims[-1].user_attrs.get(ERROR) if claims else None
    return None if error is None else hide_passwords(error)


def _worker(claim: FrozenTrial, how: dict[int, str]) -> Worker:
    who = claim.user_attrs
    since = claim.datetime_start.timestamp() if claim.datetime_start else math.nan
    return Worker(who[CELL], who["host"], who["pid"], who[DEVICE], since, known=how[claim.number] == "alive")
