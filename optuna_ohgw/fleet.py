"""The worker processes of a run on this machine: started, watched, replaced when they die, stopped."""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from rich.console import Console

from optuna_ohgw.errors import CaptureError, StorageLost
from optuna_ohgw.mps import end_now
from optuna_ohgw.processes import SIGNALS, context, deaf
from optuna_ohgw.spec import StudySpec

_STOP, _READY, _LOST, _FAILED = "stop", "ready", "lost", "failed"
_SECONDS = 1.0
_SLOW_STOP_S, _AGAIN_S = 3.0, 2.0  # until a stop is called slow; until Ctrl-C means more than the first
_NO_ROOM = 75  # exit status of a worker without the memory to capture a CUDA graph
_EARLY_DEATHS = 5  # of one worker in a row, before it was ready
log = logging.getLogger("optuna_ohgw.fleet")


@dataclass(frozen=True)
class Crew:
    """Who is to work, as the command says.

    Attributes:
        workers: Number of workers; None: ``execution.workers`` for each of ``execution.cells_at_once``,
            or on GPUs ``trials_per_device`` for each.
        trials_per_device: Workers that share a GPU.
        engine: ``processes`` of this machine, or actors of ``ray``.
        address: Of a Ray cluster; None: one of this machine, for the time of the run.
    """

    workers: int | None = None
    trials_per_device: int | None = None
    engine: str = "processes"
    address: str | None = None


class Stop(threading.Event):
    """An event that can be waited for beside processes, by its ``reader``."""

    def __init__(self) -> None:
        super().__init__()
        self.reader, self._writer = connection.Pipe(duplex=False)

    def set(self) -> None:
        """Set it; from a signal's handler, too."""
        super().set()
        self._writer.send(None)


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    early: int = 0  # deaths in a row of those whose place it takes, before they were ready


def run_processes(
    spec: StudySpec,
    devices: Sequence[str | None],
    level: int,
    stop: Stop,
    look: Callable[[], None],
    say: Callable[[str], None],
) -> None:
    """Run worker processes until none finds work, or until ``stop`` is set and all have stopped.

    One that dies (out of memory, ``kill -9``) is replaced; what it held is taken up by whoever comes
    next. Each listens to a pipe of its own: a lock or a queue that all share could be left locked by
    one that is killed. When this process dies they end.

    Args:
        spec: The study.
        devices: For each worker the ``CUDA_VISIBLE_DEVICES`` it is to see; None: as they are.
        level: Level of the workers' logs.
        stop: Set to stop all.
        look: Called every second, to show progress, until they are to stop.
        say: Called with a line for the user.

    Raises:
        StorageLost: If the storage did not answer for too long.
        RuntimeError: If a worker cannot start, or dies again and again.
    """
    cuda = any(d is not None for d in devices) or spec.execution.device.startswith("cuda")
    processes = context("cuda" if cuda else "cpu")
    workers = {n: _start(processes, spec, n, device, level) for n, device in enumerate(devices)}
    error: Exception | None = None
    told, slow = 0.0, math.inf
    try:
        while workers:
            ends = [w.process.sentinel for w in workers.values()]
            connection.wait(ends if told else [*ends, stop.reader], timeout=_SECONDS)
            if (stop.is_set() or error is not None) and not told:
                told, slow = time.monotonic(), time.monotonic() + _SLOW_STOP_S
                _tell(workers.values())
            if stop.is_set() and time.monotonic() > slow:
                slow = math.inf
                say("stopping; Ctrl-C again ends it at once, without a checkpoint of what is trained")
            for number, worker in list(workers.items()):
                if worker.process.exitcode is None:
                    continue
                del workers[number]
                early, failure = _ended(worker, number)
                error = error or failure
                if worker.process.exitcode and error is None and not stop.is_set():
                    full = worker.process.exitcode == _NO_ROOM
                    own = spec.executed(cuda_graphs=False) if full else spec
                    without = ", without graphs" if full else ""
                    say(f"worker {number} ended by {_how(worker)}; another takes its place{without}")
                    workers[number] = _start(processes, own, number, devices[number], level)
                    workers[number].early = early
            if error is None and not told:
                look()
    except BaseException:
        _tell(workers.values())
        raise
    finally:
        for worker in workers.values():
            worker.process.join()
    if error is not None:
        raise error


@contextlib.contextmanager
def stop_on_signal(stop: threading.Event) -> Iterator[list[int]]:
    """Set ``stop`` at Ctrl-C or SIGTERM while inside; yield the signals that came.

    Ctrl-C two seconds after the first of them or later kills the workers and ends this process at once,
    wherever it waits: for a server that is frozen, say. An exception would not do, as libraries make
    others of it. SIGTERM does not: Slurm may send it twice.
    """
    came: list[int] = []
    first = math.inf

    def ask_to_stop(number: int, _: Any) -> None:
        nonlocal first
        now = time.monotonic()
        if number == signal.SIGINT and now - first > _AGAIN_S:
            _end_at_once(came[0])
        first = min(first, now)
        came.append(number)
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = {s: signal.signal(s, ask_to_stop) for s in SIGNALS}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_at_once(number: int) -> NoReturn:
    for child in multiprocessing.active_children():
        child.kill()
    end_now()
    Console().show_cursor()  # the progress hides it
    os.write(2, b"stopped; run the same command to continue\n")
    os._exit(128 + number)


def _start(processes: Any, spec: StudySpec, number: int, device: str | None, level: int) -> _Worker:
    mine, theirs = processes.Pipe()
    process = processes.Process(
        target=_work, args=(spec, number, level, theirs), name=f"optuna-ohgw-worker-{number}"
    )
    # Deaf to signals until it can ignore them; its devices are read when torch starts there.
    with deaf(), _visible(device):
        process.start()
    theirs.close()
    return _Worker(process, mine)


@contextlib.contextmanager
def _visible(device: str | None) -> Iterator[None]:
    if device is None:
        yield
        return
    name = "CUDA_VISIBLE_DEVICES"
    before = os.environ.get(name)
    os.environ[name] = device
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _work(spec: StudySpec, number: int, level: int, pipe: Connection) -> None:
    """Be a worker process: deaf to signals (the parent decides), listening to the parent."""
    from optuna_ohgw import worker

    for one in SIGNALS:
        signal.signal(one, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    gc.freeze()  # the libraries' half a million objects, whose search takes as long as a trial
    stop = threading.Event()
    threading.Thread(target=_listen, args=(pipe, stop), daemon=True).start()
    try:
        worker.serve(spec, number, level, stop, lambda: _say(pipe, _READY, ""))
    except StorageLost as error:
        _say(pipe, _LOST, str(error))
        sys.exit(1)
    except CaptureError as error:
        log.error("worker %d: %s", number, error)
        if error.memory:
            os._exit(_NO_ROOM)  # one that takes its place goes on with the trial
        _say(pipe, _FAILED, str(error))
        sys.exit(1)
    except Exception as error:
        log.error("worker %d: %s", number, traceback.format_exc())
        _say(pipe, _FAILED, f"{type(error).__name__}: {error}")
        sys.exit(1)


def _listen(pipe: Connection, stop: threading.Event) -> None:
    """Set ``stop`` when told; end this process when its parent is gone."""
    while True:
        try:
            pipe.recv()
        except (EOFError, OSError):
            os._exit(1)
        stop.set()


def _say(pipe: Connection, kind: str, text: str) -> None:
    with contextlib.suppress(OSError):
        pipe.send((kind, text))


def _tell(workers: Any) -> None:
    for worker in workers:
        _say(worker.pipe, _STOP, "")


def _ended(worker: _Worker, number: int) -> tuple[int, Exception | None]:
    """Return the early deaths in a row, and why no other may take an ended worker's place, if so."""
    worker.process.join()
    said: dict[str, str] = {}
    with contextlib.suppress(EOFError, OSError):
        while worker.pipe.poll():
            kind, text = worker.pipe.recv()
            said[kind] = text
    worker.pipe.close()
    early = 0 if _READY in said else worker.early + 1
    if _LOST in said:
        return early, StorageLost(said[_LOST])
    if _FAILED in said:
        return early, RuntimeError(f"worker {number} failed: {said[_FAILED]}")
    if worker.process.exitcode and early >= _EARLY_DEATHS:
        return early, RuntimeError(
            f"worker {number} ended by {_how(worker)} {early} times before it could begin; "
            "free memory, or use fewer workers"
        )
    return early, None


def _how(worker: _Worker) -> str:
    code = worker.process.exitcode
    if code == _NO_ROOM:
        return "want of memory to capture a CUDA graph"
    return f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit status {code}"
