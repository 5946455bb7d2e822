"""Workers as Ray actors: on a cluster that is there, or on one of this machine for the time of a run."""

from __future__ import annotations

import contextlib
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optuna_ohgw.errors import StorageLost, UserError
from optuna_ohgw.fleet import Crew, Stop
from optuna_ohgw.mps import shared_gpu
from optuna_ohgw.opening import shown_url, sqlite_path
from optuna_ohgw.ray_cluster import check_ray, cluster_of_this_machine, connected
from optuna_ohgw.spec import StudySpec

_SECONDS = 1.0
_ROOM_S, _END_S = 30.0, 60.0
_PARTS = 10_000  # of a resource, the finest that Ray knows


@dataclass(frozen=True)
class Places:
    """Number of workers, and what each asks of the cluster."""

    count: int
    cpus: int
    gpus: float


def run_actors(
    spec: StudySpec,
    crew: Crew,
    cells: int,
    level: int,
    stop: Stop,
    look: Callable[[], None],
    say: Callable[[str], None],
) -> None:
    """Run workers as Ray actors until none finds work, or until ``stop`` is set and all have stopped.

    Ray places them where there is room, restarts one that dies, and ends them with this process.

    Args:
        spec: The study.
        crew: Their number, those that share a GPU, and the address of a cluster, such as ``auto``; without
            one it is started here, and ended. Workers for whom there is no room wait for it.
        cells: Cells that are left.
        level: Level of the workers' logs.
        stop: Set to stop all.
        look: Called every second, to show progress.
        say: Called with a line for the user.

    Raises:
        UserError: If no cluster can be used, or if its machines cannot reach the storage.
        StorageLost: If the storage did not answer for too long.
        RuntimeError: If a worker fails.
    """
    check_ray()
    with _cluster(spec, crew, cells) as (ray, places):
        kind = ray.remote(max_restarts=-1, max_task_retries=-1, max_concurrency=3)(_Actor)
        kind = kind.options(num_cpus=places.cpus, num_gpus=places.gpus)
        actors = [kind.remote(os.getcwd()) for _ in range(places.count)]
        own = spec.executed(device="cuda" if places.gpus else "cpu")
        workers = {actor.serve.remote(own, n, level): actor for n, actor in enumerate(actors)}
        _watch(ray, places, workers, stop, look, say)


def places_of(spec: StudySpec, crew: Crew, cells: int, gpus: int, *, here: bool) -> Places:
    """Return what to ask of a cluster.

    Args:
        spec: The study.
        crew: What the command says.
        cells: Cells that are left.
        gpus: GPUs of the cluster.
        here: Whether it is one of this machine alone, so that there is no room but by sharing.

    Raises:
        UserError: If GPUs are asked for that are not there.
    """
    device, share = spec.execution.device, crew.trials_per_device
    if ":" in device:
        raise UserError(f"execution.device: {device!r} is for Ray to choose; use cuda or auto")
    gpus = 0 if device == "cpu" else gpus
    if not gpus and (share is not None or device == "cuda"):
        field = f"execution.device: {device!r}" if share is None else f"--trials-per-device: {share}"
        raise UserError(f"{field}, but there are no GPUs for the workers; use --workers alone, and auto")
    count = (
        crew.workers
        or gpus * (share or 0)
        or spec.execution.workers * min(spec.execution.cells_at_once, cells)
    )
    share = share or (math.ceil(count / gpus) if gpus and here else 1)
    part = math.floor(_PARTS / share) / _PARTS  # rounded up, the last would have no room
    return Places(count, spec.execution.threads or 1, part if gpus else 0)


def check_reach(spec: StudySpec, nodes: Sequence[Mapping[str, Any]]) -> None:
    """Raise a UserError if the storage is a file of this machine and the cluster (Ray's nodes) has others."""
    others = {n["NodeManagerHostname"] for n in nodes if n["Alive"]} - {socket.gethostname()}
    if others and sqlite_path(spec.storage_url) is not None:
        raise UserError(
            f"storage: {shown_url(spec.storage_url)} is a file of this machine, and {min(others)} of the "
            "cluster cannot reach it; use --storage postgresql+psycopg://..."
        )


class _Actor:
    """A worker; one call serves, others ask whether it is there and tell it to stop."""

    def __init__(self, folder: str) -> None:
        os.makedirs(folder, exist_ok=True)
        os.chdir(folder)  # a study's paths are relative to where the command was given
        self._stop = threading.Event()

    def serve(self, spec: StudySpec, number: int, level: int) -> None:
        from optuna_ohgw import worker

        worker.serve(spec, number, level, self._stop)

    def is_there(self) -> bool:
        return True

    def stop(self) -> None:
        self._stop.set()


@contextlib.contextmanager
def _cluster(spec: StudySpec, crew: Crew, cells: int) -> Iterator[tuple[Any, Places]]:
    """Connect to the cluster, which is started if none is named; yield Ray and what to ask for."""
    with contextlib.ExitStack() as stack:
        address = crew.address
        if address is None:
            gpus = _gpus_here()
            places = places_of(spec, crew, cells, gpus, here=True)
            if 0 < places.gpus < 1:
                stack.enter_context(shared_gpu())  # the workers inherit it
            cpus = max(places.count * places.cpus, os.cpu_count() or 1)
            address = stack.enter_context(cluster_of_this_machine(cpus, gpus))
            ray = stack.enter_context(connected(address))
        else:
            ray = stack.enter_context(connected(address))
            check_reach(spec, ray.nodes())
            gpus = int(ray.cluster_resources().get("GPU", 0))
            places = places_of(spec, crew, cells, gpus, here=False)
        yield ray, places


def _gpus_here() -> int:
    import torch

    return torch.cuda.device_count()


def _watch(
    ray: Any,
    places: Places,
    workers: dict[Any, Any],
    stop: Stop,
    look: Callable[[], None],
    say: Callable[[str], None],
) -> None:
    """Wait for the workers, each by the call that serves; tell them to stop if one fails."""
    waiting = {actor.is_there.remote(): job for job, actor in workers.items()}
    error: Exception | None = None
    deadline = time.monotonic() + _ROOM_S
    try:
        while workers:
            done, _ = ray.wait(list(workers), num_returns=len(workers), timeout=_SECONDS)
            for there in ray.wait(list(waiting), num_returns=len(waiting), timeout=0)[0] if waiting else ():
                del waiting[there]
            for job in done:
                error = error or _error_of(ray, job)
                ray.kill(workers.pop(job))  # its place is another's, who may wait to be restarted
            stopping = stop.is_set() or error is not None
            if done or stopping:  # who found no work leaves none for those who have not begun
                for job in set(waiting.values()) & workers.keys():
                    ray.kill(workers.pop(job))
            if stopping:
                _tell(workers)  # again and again: one that was restarted has forgotten
            else:
                look()
            if waiting and time.monotonic() > deadline:
                deadline = math.inf
                needs = f"{places.cpus} CPUs" + (f" and {places.gpus:g} GPUs" if places.gpus else "")
                say(f"{len(waiting)} of {places.count} workers wait for room in the cluster, {needs} each")
    except BaseException:
        _tell(workers)
        ray.wait(list(workers), num_returns=len(workers), timeout=_END_S)
        raise
    if error is not None:
        raise error


def _tell(workers: Mapping[Any, Any]) -> None:
    for actor in workers.values():
        actor.stop.remote()


def _error_of(ray: Any, job: Any) -> Exception | None:
    """Return why a worker that ended could not go on, if so."""
    try:
        ray.get(job)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, StorageLost):
            return cause
        return RuntimeError(f"a worker failed: {type(cause).__name__}: {cause}")
    except ray.exceptions.RayError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return RuntimeError(f"a worker could not be run: {lines[0]} {lines[-1]}")
    return None
