"""Several trials a device at once, as processes: how many trials an hour, and their memory."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from threading import BrokenBarrierError
from types import TracebackType
from typing import Any

import torch

from optuna_ohgw.bench.cases import Case
from optuna_ohgw.bench.clock import cores, synchronize, use
from optuna_ohgw.bench.fused import fused_epoch
from optuna_ohgw.bench.plain import plain_epoch
from optuna_ohgw.peak_memory import PeakMemory
from optuna_ohgw.tasks.image import ImageTask
from optuna_ohgw.training import train_epoch

_PATIENCE_SECONDS = 300.0


@dataclass(frozen=True)
class Job:
    """So many processes train a fixed number of epochs each, side by side.

    Attributes:
        processes: How many.
        epochs: Epochs of each.
        workers: Workers of the DataLoader, in the plain way; None: this package's training loop.
        fused: Trials of each process, trained as one batched network; 1: not fused.
        mps: Whether the processes share the GPU by NVIDIA's Multi-Process Service.
    """

    processes: int
    epochs: int
    workers: int | None = None
    fused: int = 1
    mps: bool = False

    @property
    def label(self) -> str:
        """What trains."""
        if self.workers is not None:
            return f"plain, {self.workers} workers each"
        own = "this loop" if self.fused == 1 else f"{self.fused} fused in each"
        return f"{own}, MPS" if self.mps else own

    @property
    def threads(self) -> int:
        """Threads of a process, the cores divided evenly."""
        return max(1, cores() // self.processes)


@dataclass(frozen=True)
class Measured:
    """What a job took: seconds from the first start to the last end, peak bytes by process."""

    seconds: float
    memory: list[int]


def trials_per_hour(job: Job, seconds: float, *, scale: float, trial_epochs: int) -> float:
    """Return the trials an hour, from epochs of which ``scale`` make a full one."""
    return 3600 * job.processes * job.fused * job.epochs / seconds / (scale * trial_epochs)


class Processes:
    """Processes that have the task ready, each its own copy, and do jobs together.

    They are started afresh (spawn) and live until the end of the ``with`` block; those that a job
    does not need wait. A job starts behind a barrier, the first ones when the processes are ready.
    """

    def __init__(self, case: Case, device: torch.device, counts: Sequence[int]) -> None:
        context = multiprocessing.get_context("spawn")
        # Kept: a process that is still starting takes them over by name.
        self._barriers = {count: context.Barrier(count) for count in counts}
        self._ends: list[Any] = []
        self._processes: list[Any] = []
        for _ in range(max(counts)):
            own, other = context.Pipe()
            process = context.Process(target=_serve, args=(other, self._barriers, case, str(device)))
            process.start()
            other.close()
            self._ends.append(own)
            self._processes.append(process)

    def __enter__(self) -> Processes:
        return self

    def run(self, job: Job) -> Measured:
        """Do a job."""
        ends = self._ends[: job.processes]
        try:
            for end in ends:
                end.send(job)
            answers = [end.recv() for end in ends]
        except (EOFError, OSError):
            raise RuntimeError("bench: a process ended early, perhaps for want of memory") from None
        started, ended, memory = zip(*answers, strict=True)
        return Measured(max(ended) - min(started), list(memory))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for end, process in zip(self._ends, self._processes, strict=True):
            end.close()  # which a waiting process takes for the end
            process.join(10.0 if error is None else 1.0)
            if process.is_alive():
                process.terminate()
                process.join()


def _serve(end: Connection, barriers: Mapping[int, Barrier], case: Case, device_name: str) -> None:
    device = torch.device(device_name)
    use(device)
    task = case.task(device)
    forms: dict[tuple[int | None, int], Callable[[], Any]] = {}
    try:
        while True:
            job: Job = end.recv()
            torch.set_num_threads(job.threads)
            key = job.workers, job.fused
            if key not in forms:
                forms[key] = _form(case, task, job)
            end.send(_do(job, forms[key], barriers[job.processes], device))
    except (EOFError, OSError, BrokenBarrierError, KeyboardInterrupt):
        return


def _form(case: Case, task: ImageTask, job: Job) -> Callable[[], Any]:
    if job.workers is not None:
        return plain_epoch(task, case.state(task), job.workers)
    states = case.states(task)
    if job.fused == 1:
        return lambda: train_epoch(task, next(states))

    def fused() -> None:
        state = next(states)
        fused_epoch(task, [replace(state, config_index=index) for index in range(job.fused)])

    return fused


def _do(
    job: Job, epoch: Callable[[], Any], barrier: Barrier, device: torch.device
) -> tuple[float, float, int]:
    with PeakMemory(device) as memory:
        barrier.wait(_PATIENCE_SECONDS)
        started = time.perf_counter()
        for _ in range(job.epochs):
            epoch()
        synchronize(device)
        ended = time.perf_counter()
    return started, ended, memory.peaks["vram" if device.type == "cuda" else "ram"] or 0
