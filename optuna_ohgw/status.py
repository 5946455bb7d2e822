"""How far a study is: read from the storage, by any machine, changing nothing."""

from __future__ import annotations

import contextlib
import datetime
import math
import os
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from optuna_ohgw.cell_trials import CellTrials, read_cells
from optuna_ohgw.cells import Cell, Ledger, cells_of
from optuna_ohgw.claims import CELL, DEVICE, ERROR, Pulse, as_left, claims_of
from optuna_ohgw.history import LOST, checkpoint_bytes, is_interrupted, paused_at, superseded
from optuna_ohgw.pace import eta_s, share_begun, worker_seconds
from optuna_ohgw.reading import hide_passwords
from optuna_ohgw.spec import StudySpec

DONE, RUNNING, WAITING, GIVEN_UP = "done", "running", "waiting", "given up"
STATES = ("complete", "pruned", "paused", "running", "waiting", "failed", "interrupted")


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
        eta_s: Seconds until all is used, see :mod:`optuna_ohgw.pace`; None where nothing is known.
        checkpoint_bytes: What checkpoints of paused and running trials take, as the storage tells.
        lost_s: Seconds of training that killed workers did in vain.
        budget: The limits of a cell's budget, by name.
        disk_bytes: What the output folder takes, as this machine sees it; None where it does not.
    """

    study: str
    cells: tuple[CellStatus, ...]
    workers: tuple[Worker, ...]
    share: float
    eta_s: float | None
    checkpoint_bytes: int
    lost_s: float
    budget: dict[str, float]
    disk_bytes: int | None
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
    on = defaultdict[str, list[FrozenTrial]](list)
    for claim in claims:
        on[claim.user_attrs[CELL]].append(claim)
    known, now = read_cells(storage, spec), datetime.datetime.now()
    seen = [_see(cell, known.get(cell.name), spec, on[cell.label], how, now) for cell in cells_of(spec)]
    cells = tuple(one.status for one in seen)
    eta = eta_s(
        sum(one.begun for one in seen),
        sum(one.worker_s for one in seen),
        [1 - one.begun for one in seen if one.status.state != GIVEN_UP],
        live=len(held),
        at_once=spec.execution.workers,
    )
    return Status(
        spec.name,
        cells,
        tuple(_worker(c, how) for c in held),
        sum(cell.share for cell in cells) / len(cells),
        eta,
        sum(one.bytes for one in seen),
        sum(one.lost_s for one in seen),
        spec.budget.model_dump(exclude_none=True),
        _folder_bytes(spec.folder),
    )


@dataclass(frozen=True)
class _Seen:
    """A cell, and what it adds to those of the study: of its budget, running trials included, and so on."""

    status: CellStatus
    begun: float = 0.0
    worker_s: float = 0.0
    bytes: int = 0
    lost_s: float = 0.0


def _see(
    cell: Cell,
    found: CellTrials | None,
    spec: StudySpec,
    claims: list[FrozenTrial],
    how: dict[int, str],
    now: datetime.datetime,
) -> _Seen:
    if found is None:
        return _Seen(CellStatus(cell.label, WAITING, dict.fromkeys(STATES, 0), 0.0, None, None))
    trials = as_left(found.trials, claims, how, shared=spec.execution.workers > 1)
    final, found = found.final, CellTrials(found.final, trials)
    share = 1.0 if final is not None else min(1.0, Ledger(found, spec).share_done())
    held, error = any(how[claim.number] != "dead" for claim in claims), _error(claims)
    state = DONE if final is not None else RUNNING if held else GIVEN_UP if error else WAITING
    values = [v for t in trials for v in t.intermediate_values.values()]
    best, test = _finite(spec.metric.best(values)), (final or {}).get("test_metric")
    return _Seen(
        CellStatus(cell.label, state, _by_state(trials), share, best, test, error),
        1.0 if final is not None else share_begun(trials, spec, share),
        worker_seconds(trials, now),
        checkpoint_bytes(found),
        sum(t.user_attrs.get(LOST, 0.0) for t in trials if not is_interrupted(t)),
    )


def _folder_bytes(folder: Path) -> int | None:
    if not folder.is_dir():
        return None
    size = 0
    for inner, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(OSError):  # deleted meanwhile
                size += os.lstat(os.path.join(inner, name)).st_size
    return size


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


def _finite(value: float) -> float | None:
    return None if math.isnan(value) else value
