"""What a worker process does: search a cell trial by trial, then train its best to the end."""

from __future__ import annotations

import csv
import gc
import logging
import multiprocessing
import os
import signal
import socket
import threading
import traceback
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import optuna
import torch
from filelock import FileLock
from optuna.trial import FrozenTrial, TrialState

from optuna_ohgw.cells import (
    Cell,
    Ledger,
    config_index,
    has_work,
    load_cell,
    open_storage,
)
from optuna_ohgw.processes import SIGNALS
from optuna_ohgw.pruner import INTERRUPTED, is_interrupted
from optuna_ohgw.sampler import CONFIG_INDEX
from optuna_ohgw.spec import StudySpec
from optuna_ohgw.storage import BatchedStorage
from optuna_ohgw.suggest import RECORD
from optuna_ohgw.tasks.image import ImageTask, load_image_arrays, split_images
from optuna_ohgw.training import Interrupted, TrainState
from optuna_ohgw.trial import Best, Curve, run_trial, train_final

FINAL = "final"
_FAILURES = 3
log = logging.getLogger("optuna_ohgw.worker")


@dataclass
class Context:
    """What every job of a process shares; set once when it starts."""

    spec: StudySpec
    stop: Event
    events: Queue[dict[str, Any]]
    level: int


_context: Context | None = None
_tasks: dict[tuple[Any, ...], ImageTask] = {}
_databases: dict[str, optuna.storages.RDBStorage] = {}


def start(spec: StudySpec, stop: Event, events: Queue[dict[str, Any]], level: int, ordinal: Any) -> None:
    """Prepare a process: threads, signals (the parent decides), logging."""
    global _context  # noqa: PLW0603 - one a process, set by its initialiser
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with ordinal.get_lock():
        mine, ordinal.value = ordinal.value, ordinal.value + 1
    device = resolve_device(spec.execution.device)
    if device.type == "cuda" and device.index is None:
        torch.cuda.set_device(mine % torch.cuda.device_count())
    if spec.execution.threads:
        torch.set_num_threads(spec.execution.threads)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    _context = Context(spec, stop, events, level)


def _end_with_parent() -> None:
    """End this process when its parent is gone, so that the next run has the cells for itself."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def resolve_device(name: str) -> torch.device:
    """Return the device that a spec names; ``auto`` is a GPU where there is one."""
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def search(cell: Cell, slot: int) -> None:
    """Run trials of a cell until its budget is spent or the run stops."""
    context = _ready()
    spec, folder = context.spec, cell.folder(context.spec.folder)
    handler = _log_to(folder / f"worker-{slot}.log", context.level)
    try:
        storage = BatchedStorage(_database(spec.storage_url), sole=spec.execution.workers == 1)
        study = load_cell(storage, spec, cell, slot)
        ledger, failures = Ledger(study, spec), 0
        while not context.stop.is_set():
            trial = _next(study, ledger, folder)
            if trial is None:
                return
            failures = 0 if _one(trial, study, cell, folder, ledger) else failures + 1
            if failures == _FAILURES:
                raise RuntimeError(f"{failures} trials in a row failed in {cell.label}; see {folder}")
    finally:
        logging.getLogger("optuna_ohgw").removeHandler(handler)
        handler.close()


def finish(cell: Cell) -> None:
    """Train the best configuration of a cell to the full length and measure its test accuracy, once."""
    context = _ready()
    spec, folder = context.spec, cell.folder(context.spec.folder)
    handler = _log_to(folder / "worker-0.log", context.level)
    try:
        study = load_cell(_database(spec.storage_url), spec, cell)
        best = best_trial(study)
        if best is None:
            _raise_if_failed(study, cell, folder)
        if FINAL in study.user_attrs:
            return
        if best is None:
            if any(t.state == TrialState.PRUNED for t in study.get_trials(deepcopy=False)):
                study.set_user_attr(
                    FINAL, dict.fromkeys(("trial", "val_accuracy", "test_accuracy", "test_loss"))
                )
            return
        study.set_user_attr(FINAL, _final(study, best, cell, folder))
    except Interrupted:
        log.info("%s: interrupted in its final training", cell.label)
    finally:
        logging.getLogger("optuna_ohgw").removeHandler(handler)
        handler.close()


def _raise_if_failed(study: optuna.Study, cell: Cell, folder: Path) -> None:
    failed = [t for t in study.get_trials(deepcopy=False) if t.state == TrialState.FAIL]
    reasons = [t.user_attrs.get("reason") for t in failed if not is_interrupted(t)]
    if reasons:
        last = f"the last failed with {reasons[-1]}"
        raise RuntimeError(f"no trial of {cell.label} gave a value, {last}; see {folder}")


def best_trial(study: optuna.Study) -> FrozenTrial | None:
    """Return the trial with the highest validation accuracy at any epoch, pruned ones included."""
    ended = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    scored = [t for t in ended if t.intermediate_values]
    return max(scored, key=lambda t: max(t.intermediate_values.values()), default=None)


def _one(trial: optuna.Trial, study: optuna.Study, cell: Cell, folder: Path, ledger: Ledger) -> bool:
    context = _ready()
    spec, index = context.spec, int(trial.user_attrs[CONFIG_INDEX])
    trial.set_user_attr(
        "worker", {"host": socket.gethostname(), "pid": os.getpid(), "device": _device_name()}
    )
    state, value = TrialState.FAIL, None
    try:
        best = run_trial(
            trial,
            spec,
            cell.variation,
            lambda structure: _task(cell, structure),
            seed=cell.seed,
            config_index=index,
            stop=context.stop.is_set,
            spent=ledger.is_spent,
        )
        state, value = TrialState.COMPLETE, best.accuracy
        _keep(best, study, trial.number, folder)
    except optuna.TrialPruned:
        state = TrialState.PRUNED
    except Interrupted:
        trial.set_user_attr("reason", INTERRUPTED)
    except Exception as error:
        log.error("%s trial %d failed: %s", cell.label, trial.number, traceback.format_exc())
        trial.set_user_attr("reason", f"{type(error).__name__}: {error}"[:500])
    study.tell(trial.number, value, state)
    _report(study, trial, cell, state, ledger)
    return state != TrialState.FAIL or context.stop.is_set()


def _next(study: optuna.Study, ledger: Ledger, folder: Path) -> optuna.Trial | None:
    spec = _ready().spec
    alone = spec.execution.workers == 1
    with nullcontext() if alone else FileLock(folder / ".ask.lock"):
        if not has_work(study, spec) or ledger.is_spent():
            return None
        trial = study.ask()
        if CONFIG_INDEX not in trial.user_attrs:
            trials = study.get_trials(deepcopy=False)
            trial.set_user_attr(CONFIG_INDEX, config_index(trials[trial.number], trials))
        return trial


def _keep(best: Best, study: optuna.Study, number: int, folder: Path) -> None:
    """Keep a completed trial's best weights while no other is better, for the end of the cell."""
    assert best.state is not None
    top = best_trial(study)
    if top is not None and (max(top.intermediate_values.values()), -top.number) > (best.accuracy, -number):
        return
    best.state.save(folder / f"trial-{number}.safetensors")
    for path in folder.glob("trial-*.safetensors"):
        if path.name != f"trial-{number}.safetensors":
            path.unlink(missing_ok=True)


def _final(study: optuna.Study, trial: FrozenTrial, cell: Cell, folder: Path) -> dict[str, Any]:
    context = _ready()
    structure = {
        "model": trial.params.get("model", context.spec.task.model),
        "batch_size": trial.params.get("batch_size", context.spec.task.batch_size),
    }
    task, index = _task(cell, structure), int(trial.user_attrs[CONFIG_INDEX])
    kept = folder / f"trial-{trial.number}.safetensors"
    curve = Curve(trial.user_attrs["curve"])
    best = Best()
    retrained = not (trial.state == TrialState.COMPLETE and kept.exists())
    if retrained:
        trained = [record["trained"] for record in trial.user_attrs[RECORD]]
        log.info("%s: training configuration %d to the end", cell.label, index)
        stop = context.stop.is_set
        best, curve = train_final(context.spec, task, trained, seed=cell.seed, config_index=index, stop=stop)
    else:
        best.state = TrainState.load(kept, task.device)
        best.accuracy = max(trial.intermediate_values.values())
    assert best.state is not None
    task.network().load_state_dict({**best.state.weights, **best.state.buffers})
    test = task.evaluate("test")
    best.state.export(folder / "best.safetensors")
    for path in folder.glob("trial-*.safetensors"):
        path.unlink(missing_ok=True)
    with (folder / "curve.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("epoch", *curve.columns))
        rows = zip(*curve.columns.values(), strict=True)
        writer.writerows((epoch, *row) for epoch, row in enumerate(rows, start=1))
    log.info("%s: test accuracy %.4f", cell.label, test.accuracy)
    return {
        "trial": trial.number,
        "config_index": index,
        "psi": dict(best.state.psi),
        "best_epoch": best.state.epoch,
        "val_accuracy": best.accuracy,
        "test_accuracy": test.accuracy,
        "test_loss": test.loss,
        "retrained": retrained,
        "seconds": sum(sum(filter(None, curve.columns[c])) for c in ("train_s", "eval_s"))
        if retrained
        else 0.0,
    }


def _database(url: str) -> optuna.storages.RDBStorage:
    """Return the storage at a URL, opened once a process: to connect and check takes as long as a trial."""
    if url not in _databases:
        _databases[url] = open_storage(url, create=False)
    return _databases[url]


def _task(cell: Cell, structure: dict[str, Any]) -> ImageTask:
    spec = _ready().spec
    key = (cell.seed, *sorted(structure.items()))
    if key not in _tasks:
        _tasks.clear()
        device = resolve_device(spec.execution.device)
        if device.type == "cuda":
            gc.collect()  # a network and its captured step hold each other
        arrays = load_image_arrays(spec.task, spec.folder / "data")
        data = split_images(spec.task, arrays, cell.seed, device)
        _tasks[key] = ImageTask(spec.task, data, structure["model"], structure["batch_size"])
    return _tasks[key]


def _report(study: optuna.Study, trial: optuna.Trial, cell: Cell, state: TrialState, ledger: Ledger) -> None:
    best = best_trial(study)
    value = max(best.intermediate_values.values()) if best else None
    log.info(
        "%s: trial %d (configuration %d) %s, best validation accuracy %s",
        cell.label,
        trial.number,
        trial.user_attrs[CONFIG_INDEX],
        state.name.lower(),
        f"{value:.4f}" if value is not None else "none",
    )
    _ready().events.put({"cell": cell, "best": value, "done": ledger.share_done()})


def _log_to(path: Path, level: int) -> logging.Handler:
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("optuna_ohgw")
    logger.setLevel(level)
    logger.propagate = False
    logger.addHandler(handler)
    return handler


def _device_name() -> str:
    device = resolve_device(_ready().spec.execution.device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _ready() -> Context:
    assert _context is not None, "start() has not run in this process"
    return _context
