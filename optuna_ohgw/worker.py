"""What a worker process does: search a cell trial by trial, then train its best to the end."""

from __future__ import annotations

import gc
import logging
import os
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import torch
from filelock import FileLock
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.storages._cached_storage import _CachedStorage
from optuna.trial import FrozenTrial, TrialState

from optuna_ohgw.cell_log import logged
from optuna_ohgw.cell_study import ask, load_cell
from optuna_ohgw.cells import Cell, Ledger, revive
from optuna_ohgw.checkpoint import CheckpointStore
from optuna_ohgw.claims import BEAT_S, Claims
from optuna_ohgw.ending import best_trial, drop_checkpoints, keep_best, raise_if_failed, train_to_the_end
from optuna_ohgw.errors import CaptureError, CellFailed, StorageLost
from optuna_ohgw.history import (
    CONFIG_INDEX,
    FINAL,
    INTERRUPTED,
    WORKER,
)
from optuna_ohgw.opening import for_trials, open_storage, shown_url
from optuna_ohgw.patience import Patience, hurried_by
from optuna_ohgw.replay_cell import begin_anew, replay_cell, replayed
from optuna_ohgw.spec import StudySpec
from optuna_ohgw.steps import use_graphs
from optuna_ohgw.surroundings import worker_record
from optuna_ohgw.training import Interrupted
from optuna_ohgw.trial import run_trial, structure_of
from optuna_ohgw.workload import Workload
from optuna_ohgw.workloads import workload

_POLL_S = 1.0
_FEWEST_FAILED = 3
log = logging.getLogger("optuna_ohgw.worker")


@dataclass
class Context:
    """What every job of a process shares; set once when it starts.

    Attributes:
        spec: The study.
        stop: Set when the run is to stop.
        level: Level of the logs.
        number: Of this worker among those of its run on this machine.
        lost: Set when another took this worker for dead.
        patience: How long the storage is waited for; one for all that goes to it.
    """

    spec: StudySpec
    stop: threading.Event
    level: int = logging.INFO
    number: int = 0
    lost: threading.Event = field(default_factory=threading.Event)
    patience: Patience = field(init=False)

    def __post_init__(self) -> None:
        self.patience = Patience(self.spec.execution.patience_s, shown_url(self.spec.storage_url))

    def stops(self) -> bool:
        """Return whether what this worker does is to end."""
        return self.stop.is_set() or self.lost.is_set()


_context: Context | None = None
_workloads: dict[tuple[Any, ...], Workload] = {}
_databases: dict[str, optuna.storages.BaseStorage] = {}


def serve(
    spec: StudySpec,
    number: int,
    level: int,
    stop: threading.Event,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Work on the cells of a study, one after the other, until none needs this worker or ``stop`` is set.

    Any number of processes, on any number of machines, may do so at once. Cells whose trials fail too
    often are given up for this run; the claims keep the error.

    Args:
        spec: The study; its cells are made.
        number: Of this worker among those of its run on this machine.
        level: Level of the logs.
        stop: Set from another thread to stop: what is trained leaves a checkpoint.
        ready: Called when the worker can begin.

    Raises:
        StorageLost: If the storage did not answer for too long.
    """
    global _context  # noqa: PLW0603 - one a process
    if spec.execution.threads:
        torch.set_num_threads(spec.execution.threads)
    device = resolve_device(spec.execution.device)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # a CUDA graph is captured on the current device
    use_graphs(spec.execution.cuda_graphs)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    _context = Context(spec, stop, level, number)
    with hurried_by(stop):
        claims = Claims(_read_once(_database(spec), spec), spec, _device_name())
        ready()
        with _beating(claims, _context):
            while not stop.is_set():
                if claims.take() is not None:
                    _work_on(claims, _context)
                elif claims.may_need_me():
                    stop.wait(_POLL_S)
                else:
                    return


def _work_on(claims: Claims, context: Context) -> None:
    """Do what there is to do in the cell that is claimed, and release it."""
    assert claims.own is not None
    cell, done, error = claims.own.cell, False, None
    with logged(cell.folder(context.spec.folder), context.number, context.level):
        try:
            search(cell, claims)
            if not context.stops() and claims.is_sole():
                if context.spec.execution.workers > 1 and not context.spec.replays:
                    search(cell, claims)  # what another left or was stopped in meanwhile
                if not context.stops() and _is_searched(cell):
                    done = finish(cell)
        except StorageLost:
            raise
        except CaptureError as caught:
            if caught.memory:
                log.error("this process can use its GPU no more and ends: %s", caught)
                os._exit(1)  # another takes its place, and the trial
            raise
        except Exception as caught:
            log.error("%s is given up: %s", cell.label, traceback.format_exc())
            error = str(caught) if isinstance(caught, CellFailed) else f"{type(caught).__name__}: {caught}"
        claims.release(done=done, error=error)
        context.lost.clear()


@contextmanager
def _beating(claims: Claims, context: Context) -> Iterator[None]:
    """Tell others every few seconds that this worker lives, while inside."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(BEAT_S):
            try:
                if not claims.beat():
                    context.lost.set()
            except StorageLost:
                continue  # the worker's own thread says so if it needs it, or it comes back

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(BEAT_S)


def resolve_device(name: str) -> torch.device:
    """Return the device that a spec names; ``auto`` is a GPU where there is one."""
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def search(cell: Cell, claims: Claims | None = None) -> None:
    """Run trials of a cell until its budget is spent or the run stops.

    Args:
        cell: The cell.
        claims: Of this worker, which holds one on the cell. None: no other process works on it.

    Raises:
        CellFailed: If more than ``execution.max_failed`` of the trials fail, of three or more.
    """
    context = _ready()
    spec, folder = context.spec, cell.folder(context.spec.folder)
    database = _database(spec)
    alone = claims is None or spec.execution.workers == 1
    number = claims.own.number if claims is not None and claims.own is not None else 0
    owner = {} if alone else {WORKER: _record(number)}
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
        trial.set_user_attr(WORKER, _record(number))
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
    context = _ready()
    spec, folder = context.spec, cell.folder(context.spec.folder)
    study = load_cell(_database(spec), spec, cell)
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
        work = _workload(cell, structure_of(best, spec))
        study.set_user_attr(FINAL, train_to_the_end(best, spec, cell, work, context.stops))
    except Interrupted:
        log.info("%s: interrupted in its final training", cell.label)
        return False
    return True


def _is_searched(cell: Cell) -> bool:
    """Return whether a cell's search is at its end, so that its best can be trained to the end."""
    spec, database = _ready().spec, _database(_ready().spec)
    study_id = database.get_study_id_from_name(cell.name)
    # In this order: one that is taken between the two looks is seen running.
    waiting = database.get_n_trials(study_id, TrialState.WAITING)
    if database.get_n_trials(study_id, TrialState.RUNNING):
        return False
    return not waiting or Ledger(load_cell(database, spec, cell), spec).is_spent()


def _nobody(_: FrozenTrial) -> bool:
    return False


def _one(trial: optuna.Trial, study: optuna.Study, cell: Cell, folder: Path, ledger: Ledger) -> bool:
    context = _ready()
    spec, index = context.spec, int(trial.user_attrs[CONFIG_INDEX])
    state, value, full = TrialState.FAIL, None, False
    try:
        best = run_trial(
            trial,
            spec,
            cell.variation,
            lambda structure: _workload(cell, structure),
            seed=cell.seed,
            config_index=index,
            stop=context.stops,
            spent=ledger.is_spent,
            store=_checkpoints(folder),
        )
        state, value = TrialState.COMPLETE, best.value
        work = _workload(cell, structure_of(study.get_trials(deepcopy=False)[trial.number], spec))
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
        _forget_workloads()
    study.tell(trial.number, value, state)
    _report(study, trial, cell, state)
    return state != TrialState.FAIL or context.stops()


def _end_with_the_device() -> None:
    """End this process if it cannot use its GPU any more, as after an illegal access.

    Every trial of every cell would fail in it. Another takes its place, where the present one goes on.
    """
    device = resolve_device(_ready().spec.execution.device)
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        log.error("this process has lost its GPU and ends: %s", error)
        os._exit(1)


def _next(study: optuna.Study, ledger: Ledger, folder: Path) -> optuna.Trial | None:
    spec = _ready().spec
    alone = spec.execution.workers == 1
    with nullcontext() if alone else FileLock(folder / ".ask.lock"):
        return ask(study, spec, ledger)


def _checkpoints(folder: Path) -> CheckpointStore:
    """Return the store of a cell's checkpoints."""
    return CheckpointStore(folder / "checkpoints")


def _database(spec: StudySpec) -> optuna.storages.BaseStorage:
    """Return the study's storage, opened once a process: to connect and check takes as long as a trial."""
    url = spec.storage_url
    if url not in _databases:
        _databases[url] = open_storage(url, create=False, wait=True, patience=_ready().patience)
    return _databases[url]


def _read_once(database: optuna.storages.BaseStorage, spec: StudySpec) -> optuna.storages.BaseStorage:
    """Return a storage that reads an ended trial once: a worker that waits looks at its cells every second.

    A proxy does so by itself. Not of a replay, whose cells are made anew, maybe under the same numbers.
    """
    return _CachedStorage(database) if isinstance(database, RDBStorage) and not spec.replays else database


def _workload(cell: Cell, structure: dict[str, Any]) -> Workload:
    spec = _ready().spec
    key = (cell.seed, *sorted(structure.items()))
    if key not in _workloads:
        _forget_workloads()
        device = resolve_device(spec.execution.device)
        _workloads[key] = workload(spec, cell.seed, structure, device)
    return _workloads[key]


def _forget_workloads() -> None:
    """Let go of what was trained here, and of its memory on a GPU."""
    _workloads.clear()
    if resolve_device(_ready().spec.execution.device).type == "cuda":
        gc.collect()  # a network and its captured step hold each other
        torch.cuda.empty_cache()


def _report(study: optuna.Study, trial: optuna.Trial, cell: Cell, state: TrialState) -> None:
    best = best_trial(study)
    metric = _ready().spec.metric
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


def _record(claim: int) -> dict[str, Any]:
    """Return who trains a trial, for its record."""
    return {**worker_record(_device_name()), "claim": claim}


def _device_name() -> str:
    device = resolve_device(_ready().spec.execution.device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _ready() -> Context:
    assert _context is not None, "start() has not run in this process"
    return _context
