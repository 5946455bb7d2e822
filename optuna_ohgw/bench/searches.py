"""Searches of fresh trials in this process, by a worker's own functions, done over and over."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import optuna
import torch
from optuna.storages import BaseStorage, RDBStorage

from optuna_ohgw import cell_work, held
from optuna_ohgw.bench.account import time_of
from optuna_ohgw.bench.copies import forget, newest
from optuna_ohgw.cells import Cell, create_cell
from optuna_ohgw.history import FINAL
from optuna_ohgw.spec import StudySpec


@dataclass(frozen=True)
class Search:
    """A search of fresh trials.

    Attributes:
        opening: Seconds from the call to the first trial's start.
        seconds: Seconds from there to the end of the call.
        training: Those of them that were training.
        epochs: Epochs trained.
        trials: Trials run.
    """

    opening: float
    seconds: float
    training: float
    epochs: int
    trials: int

    @property
    def a_trial(self) -> float:
        """Seconds a trial, without the opening."""
        return self.seconds / self.trials

    @property
    def with_opening(self) -> float:
        """Seconds a trial, with its share of the opening."""
        return (self.opening + self.seconds) / self.trials

    @property
    def rest(self) -> float:
        """Seconds a trial that are neither training nor opening."""
        return (self.seconds - self.training) / self.trials


@contextmanager
def as_worker() -> Iterator[None]:
    """Let this process do a worker's jobs, on one thread; what they leave in memory goes at the end."""
    known, threads = set(held.databases()), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        held.end()
        for url in set(held.databases()) - known:
            database = held.databases().pop(url)
            assert isinstance(database, RDBStorage)
            database.engine.dispose()


def prepare(storage: BaseStorage, spec: StudySpec, cell: Cell) -> None:
    """Make a cell and its folder."""
    cell.folder(spec.folder).mkdir(parents=True, exist_ok=True)
    create_cell(storage, spec, cell, {})


def search(spec: StudySpec, cell: Cell, *, finish: bool = False) -> tuple[float, float]:
    """Search a cell as a worker does; return when it began and ended."""
    held.begin(held.Context(spec, threading.Event(), logging.INFO))
    began = time.time()
    cell_work.search(cell)
    if finish:
        cell_work.finish(cell)
    return began, time.time()


def undone(
    spec: StudySpec, cell: Cell, storage: RDBStorage, held: int, *, finish: bool = False
) -> Callable[[], Search]:
    """Return a search that leaves storage and folder as it found them."""
    mark = newest(storage)

    def measured() -> Search:
        prepare(storage, spec, cell)
        began, ended = search(spec, cell, finish=finish)
        study = optuna.load_study(study_name=cell.name, storage=storage)
        fresh = study.get_trials(deepcopy=False)[held:]
        times = [time_of(cell.label, trial) for trial in fresh]
        training = sum(t.training for t in times)
        if finish:
            training += study.user_attrs[FINAL].get("seconds", 0.0)
        forget(storage, *mark)
        for file in cell.folder(spec.folder).iterdir():
            file.unlink()
        epochs = sum(len(t.intermediate_values) for t in fresh)
        return Search(times[0].started - began, ended - times[0].started, training, epochs, len(fresh))

    return measured


def in_turns(calls: Mapping[int, Callable[[], Any]], repeats: int) -> dict[int, list[Any]]:
    """Return what the calls return by size, each in turn, after a round that does not count."""
    rounds = [{size: call() for size, call in calls.items()} for _ in range(repeats + 1)][1:]
    done = {size: [one[size] for one in rounds] for size in calls}
    work = {(s.epochs, s.trials) for many in done.values() for s in many if isinstance(s, Search)}
    if len(work) > 1:
        raise RuntimeError(f"bench: epochs and trials differ by size or round: {sorted(work)}")
    return done
