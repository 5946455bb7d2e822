"""A cell whose trials are read from a table, on a simulated clock with any number of workers."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from optuna_ohgw.cell_study import ask, distributions
from optuna_ohgw.cells import Cell, Ledger, create_cell
from optuna_ohgw.curve import Curve
from optuna_ohgw.history import CLOCK, CONFIG_INDEX, CURVE, INTERRUPTED, RECORD, RESUMED_FROM
from optuna_ohgw.metric import Metric
from optuna_ohgw.schedulers.pruners import SchedulerPruner
from optuna_ohgw.spec import StudySpec
from optuna_ohgw.spec_tasks import ReplaySpec
from optuna_ohgw.surroundings import worker_record
from optuna_ohgw.tasks.replay import Known, courses_of
from optuna_ohgw.trial import BATCHES, why_pruned


def begin_anew(database: BaseStorage, spec: StudySpec, cell: Cell) -> None:
    """Make the cell of a replay anew if it was begun: its clock is not in the storage."""
    try:
        study_id = database.get_study_id_from_name(cell.name)
        environment = database.get_study_user_attrs(study_id).get("environment", {})
        if not database.get_n_trials(study_id):
            return
        database.delete_study(study_id)
    except KeyError:
        environment = {}  # whoever deleted it was killed before it made it anew
    create_cell(database, spec, cell, environment)


@dataclass(order=True)
class _Running:
    """A trial that a simulated worker trains; the next epoch of it ends at ``ends``."""

    ends: float
    launched: int
    trial: optuna.Trial = field(compare=False)
    known: Known = field(compare=False)
    curve: Curve = field(compare=False)
    start: float = field(compare=False)

    @property
    def epochs(self) -> int:
        return len(self.curve.columns["mbu"])


def replay_cell(
    study: optuna.Study, spec: StudySpec, cell: Cell, ledger: Ledger, stop: Callable[[], bool]
) -> None:
    """Run the trials of a cell until its budget is spent or ``stop()`` becomes true.

    Epochs take the seconds of the table. Those that end at the same time report in the order of their
    launch; then each free worker is given its next trial. A configuration that would be trained beyond
    its known curve ends there. Trials have ``clock``: simulated seconds of start and end.
    """
    assert isinstance(spec.task, ReplaySpec)
    if isinstance(study.pruner, SchedulerPruner):
        study.pruner.eager = False  # whom to train next is asked when all have reported
    rows, launches, now = courses_of(spec, cell), itertools.count(), 0.0
    running: list[_Running] = []
    while True:
        while len(running) < spec.task.workers and not stop():
            trial = ask(study, spec, ledger)
            if trial is None:
                break
            begun = _begin(trial, spec, rows, now, next(launches))
            if begun is not None:
                heapq.heappush(running, begun)
        if stop():
            for one in running:
                one.trial.set_user_attr("reason", INTERRUPTED)
                study.tell(one.trial.number, state=TrialState.FAIL)
            return
        if not running:
            return
        now = running[0].ends
        due = []
        while running and running[0].ends == now:
            due.append(heapq.heappop(running))
        for one in due:
            if _report(one, spec, ledger, now):
                heapq.heappush(running, one)


def replayed(study: optuna.Study, best: FrozenTrial) -> dict[str, Any]:
    """Return the record of a cell's best trial; nothing is trained or tested."""
    values, sign = best.intermediate_values, 1 if study.direction == StudyDirection.MAXIMIZE else -1
    top = max(values, key=lambda epoch: sign * values[epoch])
    return {
        "trial": best.number,
        "config_index": best.user_attrs[CONFIG_INDEX],
        "psi": best.params,
        "best_epoch": top,
        "val_metric": values[top],
        "test_metric": None,
        "test_loss": None,
        "retrained": False,
        "seconds": 0.0,
    }


def _begin(
    trial: optuna.Trial, spec: StudySpec, rows: list[Known], now: float, launched: int
) -> _Running | None:
    known = rows[trial.user_attrs[CONFIG_INDEX]]
    for name, d in distributions(spec).items():
        trial.suggest_float(name, d.low, d.high, log=d.log)
    columns = trial.user_attrs.get(CURVE, Curve().columns)
    curve, warm_s = Curve({c: list(values) for c, values in columns.items()}), 0.0
    if RESUMED_FROM not in trial.user_attrs:
        warm_s = known.warm_s
        warmed = known.warm_mbu > 0
        record = {"suggested": known.suggested, "trained": known.trained, "cost_mbu": known.warm_mbu}
        trial.set_user_attr(RECORD, [{**record, "rule": "replayed" if warmed else None, "fixed": []}])
        trial.set_user_attr(BATCHES, known.batches)
    trial.set_user_attr("worker", worker_record("replay"))
    one = _Running(now + warm_s + known.epoch_s, launched, trial, known, curve, now)
    if one.epochs < len(known.curve):
        return one
    _end(one, now, TrialState.PRUNED, f"the table ends at epoch {one.epochs}")
    return None


def _report(one: _Running, spec: StudySpec, ledger: Ledger, now: float) -> bool:
    """Report an epoch; return whether the trial goes on, with the time at which its next one ends."""
    trial, known, epoch = one.trial, one.known, one.epochs + 1
    value = known.curve[epoch - 1]
    one.curve.append(
        mbu=known.warm_mbu + known.batches * epoch,
        wall=now,
        train_s=known.epoch_s,
        warm_s=known.warm_s if epoch == 1 else 0.0,
        eval_s=0.0,
        train_loss=math.nan,
        val_loss=math.nan,
        val_metric=value,
    )
    if math.isnan(value):
        return _end(one, now, TrialState.PRUNED, f"diverged in epoch {epoch}: no value in the table")
    trial.report(value, epoch)
    total = spec.task.epochs
    resumes = isinstance(trial.study.pruner, SchedulerPruner)
    pruned = (epoch < total or resumes) and trial.should_prune()
    if epoch == total:
        return _end(one, now, TrialState.COMPLETE, None)
    if pruned:
        return _end(one, now, TrialState.PRUNED, why_pruned(trial, epoch, 1))
    if ledger.is_spent():
        return _end(one, now, TrialState.PRUNED, f"budget of the cell spent after epoch {epoch}")
    if epoch == len(known.curve):
        return _end(one, now, TrialState.PRUNED, f"the table ends at epoch {epoch}")
    one.ends = now + known.epoch_s
    return True


def _end(one: _Running, now: float, state: TrialState, reason: str | None) -> bool:
    trial, columns = one.trial, one.curve.columns
    trial.set_user_attr(CURVE, columns)
    trial.set_user_attr(CLOCK, {"start": one.start, "end": now})
    if reason is not None:
        trial.set_user_attr("reason", reason)
    best = Metric(maximize=trial.study.direction == StudyDirection.MAXIMIZE).best(columns["val_metric"])
    trial.study.tell(trial.number, best if state == TrialState.COMPLETE else None, state)
    return False
