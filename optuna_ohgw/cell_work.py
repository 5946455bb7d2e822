"""What a worker does in a cell: search it trial by trial, then train its best to the end."""

from __future__ import annotations

import logging
import os
import traceback
from contextlib import nullcontext
from pathlib import Path

import optuna
import torch
from filelock import FileLock
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from optuna_ohgw import held
from optuna_ohgw.cell_study import ask, load_cell
from optuna_ohgw.cells import Cell, Ledger, revive
from optuna_ohgw.checkpoint import CheckpointStore
from optuna_ohgw.claims import Claims
from optuna_ohgw.ending import best_trial, drop_checkpoints, keep_best, raise_if_failed, train_to_the_end
from optuna_ohgw.errors import CaptureError, CellFailed, StorageLost
from optuna_ohgw.history import CONFIG_INDEX, FINAL, INTERRUPTED, WORKER
from optuna_ohgw.opening import for_trials
from optuna_ohgw.replay_cell import begin_anew, replay_cell, replayed
from optuna_ohgw.training import Interrupted
from optuna_ohgw.trial import run_trial, structure_of

_FEWEST_FAILED = 3
log = logging.getLogger("optuna_ohgw.cell_work")


def search(cell: Cell, claims: Claims | None = None) -> None:
    """Run trials of a cell until its budget is spent or the run stops.

    Args:
        cell: The cell.
        claims: Of this worker, which holds one on the cell. None: no other process works on it.

    Raises:
        CellFailed: If more than ``execution.max_failed`` of the trials fail, of three or more.
    """
    context = held.context()
    spec, folder = context.spec, cell.folder(context.spec.folder)
    database = held.database()
    alone = claims is None or spec.execution.workers == 1
    number = claims.own.number if claims is not None and claims.own is not None else 0
    owner = {} if alone else {WORKER: held.record(number)}
    storage = for_trials(database, sole=alone, owner=owner, patience=context.patience)
    if spec.replays:
        begin_anew(database, spec, cell)
    study = load_cell(storage, spec, cell, 0 if alone else number)
    ledger, failed, ended = Ledger(study, spec), 0, 0
    if spec.replays:
        replay_cell(study, spec, cell, ledger, context.stops)
        return
    revive(study, _nobody if claims is None or alone else claims.alive())
    while not context.stops():
        trial = _next(study, ledger, folder)
        if trial is None:
            if claims is None or alone or not revive(study, claims.alive()):
                return
            continue
        trial.set_user_attr(WORKER, held.record(number))
        try:
            failed += not _one(trial, study, cell, folder, ledger)
        except UpdateFinishedTrialError:
            log.warning("%s trial %d was ended by another process", cell.label, trial.number)
            continue
        ended += 1
        if failed >= _FEWEST_FAILED and failed > spec.execution.max_failed * ended:
            reason = study.get_trials(deepcopy=False)[trial.number].user_attrs.get("reason")
            raise CellFailed(f"{failed} of {ended} trials failed, the last with {reason}; see {folder}")


def finish(cell: Cell) -> bool:
    """Train the best configuration of a cell to the full length and measure its test value, once.

    Returns:
        Whether the cell is at its end; not if the run stops meanwhile.

    Raises:
        CellFailed: If no trial gave a value.
    """
    context = held.context()
    spec, folder = context.spec, cell.folder(context.spec.folder)
    study = load_cell(held.database(), spec, cell)
    if FINAL in study.user_attrs:
        return True
    best = best_trial(study)
    if best is None:
        raise_if_failed(study, cell, folder)
    elif spec.replays:
        study.set_user_attr(FINAL, replayed(study, best))
        return True
    drop_checkpoints(study, cell, folder)
    if best is None:
        study.set_user_attr(FINAL, dict.fromkeys(("trial", "val_metric", "test_metric", "test_loss")))
        return True
    try:
        work = held.workload_of(cell, structure_of(best, spec))
        study.set_user_attr(FINAL, train_to_the_end(best, spec, cell, work, context.stops))
    except Interrupted:
        log.info("%s: interrupted in its final training", cell.label)
        return False
    return True


def is_searched(cell: Cell) -> bool:
    """Return whether a cell's search is at its end, so that its best can be trained to the end."""
    spec, database = held.context().spec, held.database()
    study_id = database.get_study_id_from_name(cell.name)
    # In this order: one that is taken between the two looks is seen running.
    waiting = database.get_n_trials(study_id, TrialState.WAITING)
    if database.get_n_trials(study_id, TrialState.RUNNING):
        return False
    return not waiting or Ledger(load_cell(database, spec, cell), spec).is_spent()


def _nobody(_: FrozenTrial) -> bool:
    return False


def _one(trial: optuna.Trial, study: optuna.Study, cell: Cell, folder: Path, ledger: Ledger) -> bool:
    context = held.context()
    spec, index = context.spec, int(trial.user_attrs[CONFIG_INDEX])
    state, value, full = TrialState.FAIL, None, False
    try:
        best = run_trial(
            trial,
            spec,
            cell.variation,
            lambda structure: held.workload_of(cell, structure),
            seed=cell.seed,
            config_index=index,
            stop=context.stops,
            spent=ledger.is_spent,
            store=_checkpoints(folder),
        )
        state, value = TrialState.COMPLETE, best.value
        work = held.workload_of(cell, structure_of(study.get_trials(deepcopy=False)[trial.number], spec))
        keep_best(best, study, trial.number, folder, work.suffix)
    except optuna.TrialPruned:
        state = TrialState.PRUNED
    except Interrupted:
        trial.set_user_attr("reason", INTERRUPTED)
    except (StorageLost, UpdateFinishedTrialError, CaptureError):
        raise  # no fault of the trial, which goes on when it is back, or at another worker
    except Exception as error:
        log.error("%s trial %d failed: %s", cell.label, trial.number, traceback.format_exc())
        _end_with_the_device()
        trial.set_user_attr("reason", f"{type(error).__name__}: {error}"[:500])
        full = isinstance(error, torch.OutOfMemoryError)
    if full:  # not before: the error holds what it was raised from
        held.forget_workloads()
    study.tell(trial.number, value, state)
    _report(study, trial, cell, state)
    return state != TrialState.FAIL or context.stops()


def _end_with_the_device() -> None:
    """End this process if it cannot use its GPU any more, as after an illegal access.

    Every trial of every cell would fail in it. Another takes its place, where the present one goes on.
    """
    device = held.device()
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        log.error("this process has lost its GPU and ends: %s", error)
        os._exit(1)


def _next(study: optuna.Study, ledger: Ledger, folder: Path) -> optuna.Trial | None:
    spec = held.context().spec
    alone = spec.execution.workers == 1
    with nullcontext() if alone else FileLock(folder / ".ask.lock"):
        return ask(study, spec, ledger)


def _checkpoints(folder: Path) -> CheckpointStore:
    """Return the store of a cell's checkpoints."""
    return CheckpointStore(folder / "checkpoints")


def _report(study: optuna.Study, trial: optuna.Trial, cell: Cell, state: TrialState) -> None:
    best = best_trial(study)
    metric = held.context().spec.metric
    value = metric.best(best.intermediate_values.values()) if best else None
    log.info(
        "%s: trial %d (configuration %d) %s, best validation %s %s",
        cell.label,
        trial.number,
        trial.user_attrs[CONFIG_INDEX],
        state.name.lower(),
        metric.name,
        f"{value:.4f}" if value is not None else "none",
    )
