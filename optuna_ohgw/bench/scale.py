"""Many workers on one storage: sleeping ones for real, computing ones by simulation."""

from __future__ import annotations

import heapq
import os
import random
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import optuna
from optuna.pruners import SuccessiveHalvingPruner
from optuna.samplers import RandomSampler
from optuna.storages import RDBStorage

from optuna_ohgw.opening import open_database
from optuna_ohgw.storage import BatchedStorage

SLEEPERS, OF_CELL = 32, 4
_EPOCHS = 27


def sleepers_share(url: str, epoch_s: float, trials: int, count: int = SLEEPERS) -> float:
    """Return the share of their time in which sleeping workers did not sleep: storage and scheduling.

    Each is a thread with a connection of its own; four share a cell, under Optuna's halving. Trials sleep
    at most 27 epochs, each half to three halves of the time given, so that they are not in step. Threads
    share one interpreter, and with the server this machine's cores, so it is an upper bound.

    Args:
        url: Of the storage.
        epoch_s: Seconds that an epoch sleeps in the mean.
        trials: Of each worker.
        count: Number of workers.
    """
    name = f"optuna-ohgw-bench-{uuid.uuid4().hex[:8]}"
    plain = open_database(url, create=True)
    cells = [f"{name}-{n}" for n in range(-(-count // OF_CELL))]
    for cell in cells:
        optuna.create_study(study_name=cell, storage=plain, direction="maximize")
    shares: list[float] = []
    # Opened one after the other: the check of the schema is not for threads.
    storages = [open_database(url, create=False) for _ in range(count)]
    threads = [
        threading.Thread(target=_sleeper, args=(storages[n], cells[n // OF_CELL], n, trials, epoch_s, shares))
        for n in range(count)
    ]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        for cell in cells:
            optuna.delete_study(study_name=cell, storage=plain)
        for storage in (plain, *storages):  # a server has few connections
            storage.engine.dispose()
    if len(shares) < count:
        raise RuntimeError(f"bench: {count - len(shares)} of {count} sleeping workers failed")
    return sum(shares) / count


def _sleeper(
    database: RDBStorage, cell: str, number: int, trials: int, epoch_s: float, shares: list[float]
) -> None:
    storage = BatchedStorage(database, owner={"worker": {"claim": number}})
    pruner = SuccessiveHalvingPruner(min_resource=3, reduction_factor=3, bootstrap_count=2)
    sampler = RandomSampler(seed=number)
    study = optuna.load_study(study_name=cell, storage=storage, sampler=sampler, pruner=pruner)
    draw = random.Random(number)
    time.sleep(draw.uniform(0, epoch_s))  # workers are not in step
    began, slept = time.perf_counter(), 0.0
    for _ in range(trials):
        trial = study.ask()
        value = sum(trial.suggest_float(f"x{n}", 0, 1) for n in range(5))
        state = optuna.trial.TrialState.COMPLETE
        for epoch in range(1, _EPOCHS + 1):
            started = time.perf_counter()
            time.sleep(draw.uniform(0.5, 1.5) * epoch_s)
            slept += time.perf_counter() - started
            trial.report(value + epoch / _EPOCHS, epoch)
            if trial.should_prune():
                state = optuna.trial.TrialState.PRUNED
                break
        study.tell(trial, value if state == optuna.trial.TrialState.COMPLETE else None, state)
    shares.append(1 - slept / (time.perf_counter() - began))


@dataclass(frozen=True)
class Scale:
    """Throughput of many workers: trials an hour, to one worker, and the share of time waiting."""

    workers: int
    trials_an_hour: float
    speed_up: float
    waiting: float


def simulated(workers: Sequence[int], compute_s: float, storage_s: float, trials: int = 2000) -> list[Scale]:
    """Return what workers with a core each would do that share a storage which serves one at a time.

    A discrete-event simulation: a trial computes for ``compute_s``, then waits for the storage, first
    come, first served, and takes it for ``storage_s``.
    """
    found = [_simulate(count, compute_s, storage_s, trials) for count in (1, *workers)]
    alone = found[0][0]
    return [
        Scale(count, 3600 * rate, rate / alone, waiting)
        for count, (rate, waiting) in zip(workers, found[1:], strict=True)
    ]


def _simulate(count: int, compute_s: float, storage_s: float, trials: int) -> tuple[float, float]:
    # Begun one after the other, as workers do.
    ready = [(compute_s * (1 + n / count), n) for n in range(count)]
    heapq.heapify(ready)
    free, waited, end = 0.0, 0.0, 0.0
    for _ in range(trials):
        asked, worker = heapq.heappop(ready)
        begin = max(asked, free)
        waited += begin - asked
        free = end = begin + storage_s
        heapq.heappush(ready, (free + compute_s, worker))
    return trials / end, waited / (end * count)


def storage_of_environment() -> str | None:
    """Return the URL of ``OPTUNA_OHGW_STORAGE`` if it is a server's."""
    url = os.environ.get("OPTUNA_OHGW_STORAGE", "")
    return url if url and not url.startswith("sqlite") else None
