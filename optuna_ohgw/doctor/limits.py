"""What the system allows a process: open files, shared memory."""

from __future__ import annotations

import os
from pathlib import Path

from optuna_ohgw.doctor.check import Check, size

_SHARED = Path("/dev/shm")
# A run holds 16 open files and 2 a worker, a worker 13; with room for databases, data and logs.
_OWN, _EACH = 64, 8
_LITTLE = 64 * 2**20


def check_limits(workers: int) -> list[Check]:
    """Return lines on open files and, with several workers, on shared memory."""
    import resource

    checks = [judge_files(*resource.getrlimit(resource.RLIMIT_NOFILE), workers)]
    if workers > 1 and Path("/dev").is_dir() and os.uname().sysname == "Linux":
        checks.append(judge_shared(_shared_free(), workers))
    return checks


def judge_files(soft: int, hard: int, workers: int) -> Check:
    """Return whether so many workers may open what they need; -1 is no limit."""
    need = _OWN + _EACH * workers
    found = f"{soft} for {workers} workers" if soft >= 0 else "no limit"
    if soft < 0 or soft >= need:
        return Check("limits", "open files", "ok", found)
    remedy = (
        f"ulimit -n {need}" if hard < 0 or hard >= need else f"ask for a hard limit of {need}, now {hard}"
    )
    return Check("limits", "open files", "fail", f"{found}, {need} are needed", remedy)


def judge_shared(free: int | None, workers: int) -> Check:
    """Return whether shared memory is there for the locks of several processes; None if it is not."""
    remedy = "start the container with --shm-size=1g, or mount a tmpfs on /dev/shm"
    if not free:
        found = f"{_SHARED} cannot be written, {workers} workers need it for their locks"
        return Check("limits", "shared memory", "fail", found, remedy)
    if free < _LITTLE:
        return Check("limits", "shared memory", "warn", f"{size(free)} free", remedy)
    return Check("limits", "shared memory", "ok", f"{size(free)} free")


def _shared_free() -> int | None:
    if not os.access(_SHARED, os.W_OK):
        return None
    here = os.statvfs(_SHARED)
    return here.f_bavail * here.f_frsize
