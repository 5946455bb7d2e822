"""What a worker process holds for all its cells: its orders, its storage, and what it trains."""

from __future__ import annotations

import gc
import logging
import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from optuna.storages import BaseStorage

from optuna_ohgw.cells import Cell
from optuna_ohgw.device import name_of, resolve_device
from optuna_ohgw.opening import open_storage, shown_url
from optuna_ohgw.patience import Patience
from optuna_ohgw.spec import StudySpec
from optuna_ohgw.surroundings import worker_record
from optuna_ohgw.workload import Workload
from optuna_ohgw.workloads import workload


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
_databases: dict[str, BaseStorage] = {}


def begin(orders: Context) -> None:
    """Let this process do a worker's jobs."""
    global _context  # noqa: PLW0603 - one a process
    _context = orders


def end() -> None:
    """Let this process be no worker any more; its storages stay open."""
    global _context  # noqa: PLW0603 - one a process
    _context = None
    _workloads.clear()


def context() -> Context:
    """Return what this worker was told."""
    assert _context is not None, "begin() has not run in this process"
    return _context


def database() -> BaseStorage:
    """Return the study's storage, opened once a process: to connect and check takes as long as a trial."""
    url = context().spec.storage_url
    if url not in _databases:
        _databases[url] = open_storage(url, create=False, wait=True, patience=context().patience)
    return _databases[url]


def databases() -> dict[str, BaseStorage]:
    """Return the storages that are open in this process, by URL."""
    return _databases


def workload_of(cell: Cell, structure: dict[str, Any]) -> Workload:
    """Return what a cell trains with structural parameters; one is kept."""
    key = (cell.seed, *sorted(structure.items()))
    if key not in _workloads:
        forget_workloads()
        _workloads[key] = workload(context().spec, cell.seed, structure, device())
    return _workloads[key]


def forget_workloads() -> None:
    """Let go of what was trained here, and of its memory on a GPU."""
    _workloads.clear()
    if device().type == "cuda":
        gc.collect()  # a network and its captured step hold each other
        torch.cuda.empty_cache()


def device() -> torch.device:
    """Return where this worker trains."""
    return resolve_device(context().spec.execution.device)


def record(claim: int) -> dict[str, Any]:
    """Return who trains a trial, for its record."""
    return {**worker_record(name_of(device())), "claim": claim}
