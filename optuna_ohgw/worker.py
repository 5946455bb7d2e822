"""A worker process: cells of a study, one after the other, until none needs it."""

from __future__ import annotations

import logging
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import optuna
import torch
from optuna.storages import RDBStorage
from optuna.storages._cached_storage import _CachedStorage

from optuna_ohgw import held
from optuna_ohgw.cell_log import logged
from optuna_ohgw.cell_work import finish, is_searched, search
from optuna_ohgw.claims import BEAT_S, Claims
from optuna_ohgw.device import name_of, resolve_device
from optuna_ohgw.errors import CaptureError, CellFailed, StorageLost
from optuna_ohgw.held import Context
from optuna_ohgw.patience import hurried_by
from optuna_ohgw.spec import StudySpec
from optuna_ohgw.steps import use_graphs

_POLL_S = 1.0
log = logging.getLogger("optuna_ohgw.worker")


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
        CaptureError: If a training step failed while it was captured; this process has lost its GPU.
    """
    if spec.execution.threads:
        torch.set_num_threads(spec.execution.threads)
    device = resolve_device(spec.execution.device)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # a CUDA graph is captured on the current device
    use_graphs(spec.execution.cuda_graphs)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    context = Context(spec, stop, level, number)
    held.begin(context)
    with hurried_by(stop):
        claims = Claims(_read_once(held.database(), spec), spec, name_of(device))
        ready()
        with _beating(claims, context):
            while not stop.is_set():
                if claims.take() is not None:
                    _work_on(claims, context)
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
                if not context.stops() and is_searched(cell):
                    done = finish(cell)
        except (StorageLost, CaptureError):
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


def _read_once(database: optuna.storages.BaseStorage, spec: StudySpec) -> optuna.storages.BaseStorage:
    """Return a storage that reads an ended trial once: a worker that waits looks at its cells every second.

    A proxy does so by itself. Not of a replay, whose cells are made anew, maybe under the same numbers.
    """
    return _CachedStorage(database) if isinstance(database, RDBStorage) and not spec.replays else database
