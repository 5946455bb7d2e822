"""Where the time of a run went, from what its trials and cells recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import optuna
from optuna.trial import FrozenTrial

from optuna_ohgw.cells import cells_of
from optuna_ohgw.history import CURVE, FINAL
from optuna_ohgw.opening import open_storage
from optuna_ohgw.spec import StudySpec

TRAINING, START, BETWEEN, INSIDE, CHANGE, WAITING, CLOSE = (
    "training",
    "start-up",
    "between trials of a cell",
    "inside trials",
    "change of cell",
    "waiting at the end",
    "report and end",
)
PARTS = (TRAINING, START, BETWEEN, INSIDE, CHANGE, WAITING, CLOSE)
SEARCH = (TRAINING, BETWEEN, INSIDE, CHANGE)


@dataclass(frozen=True)
class TrialTime:
    """A trial: its cell, its worker, Unix seconds of start and end, and its seconds of training."""

    cell: str
    worker: int
    started: float
    ended: float
    training: float


@dataclass(frozen=True)
class CellTime:
    """The end of a cell in Unix seconds, and the seconds of its final training."""

    ended: float
    training: float


@dataclass(frozen=True)
class RunTime:
    """A run: when its command began and ended (Unix seconds), its trials and its cells."""

    began: float
    ended: float
    trials: list[TrialTime]
    cells: dict[str, CellTime]


def times_of(spec: StudySpec) -> tuple[list[TrialTime], dict[str, CellTime]]:
    """Return when the trials and cells of a finished study ran, from its storage and folder."""
    storage, trials, cells = open_storage(spec.storage_url, create=False), [], {}
    for cell in cells_of(spec):
        study = optuna.load_study(study_name=cell.name, storage=storage)
        ran = [time_of(cell.label, t) for t in study.get_trials(deepcopy=False) if t.datetime_complete]
        # What the final training writes last.
        file = cell.folder(spec.folder) / "curve.csv"
        ended = file.stat().st_mtime if file.exists() else max(t.ended for t in ran)
        cells[cell.label] = CellTime(ended, study.user_attrs[FINAL].get("seconds", 0.0))
        trials += ran
    return trials, cells


def time_of(cell: str, trial: FrozenTrial) -> TrialTime:
    """Return when and where a finished trial of a cell ran, and what of it was training."""
    assert trial.datetime_start is not None
    assert trial.datetime_complete is not None
    curve = trial.user_attrs.get(CURVE, {})
    training = sum(sum(filter(None, curve.get(column, ()))) for column in ("train_s", "warm_s", "eval_s"))
    span = trial.datetime_start.timestamp(), trial.datetime_complete.timestamp()
    return TrialTime(cell, trial.user_attrs["worker"]["pid"], *span, training)


def account(run: RunTime, workers: int) -> dict[str, float]:
    """Return the seconds of all workers by part; together the wall time × workers.

    A worker's time goes from the command over its trials and the ends of their cells to the last end
    of all, after which the report is written. Who trained a cell to its end is not known and
    does not matter to the sums.
    """
    seconds = dict.fromkeys(PARTS, 0.0)
    finals = sum(cell.training for cell in run.cells.values())
    seconds[TRAINING] = sum(t.training for t in run.trials) + finals
    seconds[INSIDE] = sum(t.ended - t.started - t.training for t in run.trials)
    ends = []
    ordered = sorted(run.trials, key=lambda t: (t.worker, t.started))
    for _, group in groupby(ordered, key=lambda t: t.worker):
        own = list(group)
        seconds[START] += own[0].started - run.began
        for before, after in pairwise(own):
            part = BETWEEN if before.cell == after.cell else CHANGE
            seconds[part] += after.started - before.ended
        ends.append(max(run.cells[t.cell].ended for t in own))
        seconds[CHANGE] += ends[-1] - own[-1].ended
    seconds[CHANGE] -= finals
    last = max(ends)
    seconds[WAITING] = workers * (last - run.began) - sum(end - run.began for end in ends)
    seconds[CLOSE] = workers * (run.ended - last)
    return seconds


def overhead(seconds: Mapping[str, float], parts: Sequence[str] = PARTS) -> float:
    """Return what some parts take over the training among them, as a share of it."""
    return sum(seconds[part] for part in parts) / seconds[TRAINING] - 1
