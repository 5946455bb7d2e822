"""What is around a process: the batch job that started it, and its control groups with what they used."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

UNLIMITED = 2**60  # cgroup v1 writes a number near 2^63 for no limit
_LIMITS = ("memory.max", "memory.limit_in_bytes")
_NOW = ("memory.current", "memory.usage_in_bytes")
_PEAK = ("memory.peak", "memory.max_usage_in_bytes")


@dataclass(frozen=True)
class Usage:
    """What the control groups of a process have used; None where that is not told.

    Attributes:
        memory: Bytes in use in the innermost group that tells, files kept in memory included.
        memory_peak: The most since the group was made.
        memory_limit: The tightest limit over the groups around.
        cpu_s: Processor seconds since the group was made.
    """

    memory: int | None = None
    memory_peak: int | None = None
    memory_limit: int | None = None
    cpu_s: float | None = None


def worker_record(device_name: str) -> dict[str, Any]:
    """Return who trains a trial, for its record: host, process, device and the Slurm job if there is one."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "device": device_name, **slurm_job(os.environ)}


def slurm_job(environment: Mapping[str, str]) -> dict[str, str]:
    """Return ``slurm_job``, its id, and in an array ``slurm_array``, ``JOB_TASK`` as ``squeue`` shows it."""
    job, array, task = (environment.get(f"SLURM_{n}") for n in ("JOB_ID", "ARRAY_JOB_ID", "ARRAY_TASK_ID"))
    found = {"slurm_job": job, "slurm_array": f"{array}_{task}" if array and task else None}
    return {name: value for name, value in found.items() if value}


def cgroup_record(before: Usage, after: Usage, earlier: Mapping[str, Any]) -> dict[str, float]:
    """Return what a trial's groups used, without what is not told; empty where nothing is.

    Args:
        before: At the trial's start.
        after: At its end.
        earlier: The record of a run that this one goes on from, whose seconds are added.
    """
    seconds = None
    if before.cpu_s is not None and after.cpu_s is not None:
        seconds = round(after.cpu_s - before.cpu_s + earlier.get("cpu_s", 0.0), 3)
    peaks = [p for p in (after.memory_peak, earlier.get("memory_peak")) if p is not None]
    found = {
        "memory": after.memory,
        "memory_peak": max(peaks, default=None),
        "memory_limit": after.memory_limit,
        "cpu_s": seconds,
    }
    return {name: value for name, value in found.items() if value is not None}


def read_usage(root: Path = Path("/")) -> Usage:
    """Return what the control groups of this process used; ``root`` is where ``proc`` and ``sys`` are."""
    memory = list(cgroup_folders(root, "memory"))
    limits = [b for folder in memory for b in map(byte_count, _texts([folder], _LIMITS)) if b is not None]
    processor = map(cpu_seconds, _texts(cgroup_folders(root, "cpuacct"), ("cpu.stat", "cpuacct.usage")))
    return Usage(
        memory=next(map(byte_count, _texts(memory, _NOW)), None),
        memory_peak=next(map(byte_count, _texts(memory, _PEAK)), None),
        memory_limit=min(limits, default=None),
        cpu_s=next((s for s in processor if s is not None), None),
    )


def byte_count(text: str) -> int | None:
    """Return the bytes that a file of a control group names; None for no limit."""
    word = text.strip()
    return int(word) if word.isdigit() and int(word) < UNLIMITED else None


def cpu_seconds(text: str) -> float | None:
    """Return the seconds in a ``cpu.stat`` (version 2) or a ``cpuacct.usage`` (version 1, nanoseconds)."""
    words = text.split()
    if len(words) == 1 and words[0].isdigit():
        return int(words[0]) / 1e9
    pairs = dict(zip(words[::2], words[1::2], strict=False))
    return int(pairs["usage_usec"]) / 1e6 if "usage_usec" in pairs else None


def cgroup_folders(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of a controller, from the process's own group up to the root group."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    mounts = root / "sys/fs/cgroup"
    for line in lines:
        _, names, path = line.split(":", 2)
        if names == "":
            bases = [mounts / "unified", mounts]
        elif controller in names.split(","):
            bases = [mounts / names, mounts / controller]
        else:
            continue
        base = next((b for b in bases if b.is_dir()), None)
        if base is None:
            continue
        # In a container the path may be that of the host, which is not there; the root group is.
        here = base / path.lstrip("/")
        while here != base:
            yield here
            here = here.parent
        yield base


def _texts(folders: Iterable[Path], names: Iterable[str]) -> Iterator[str]:
    """Yield what the files of these names hold, where they can be read, in the order of the folders."""
    wanted = tuple(names)
    for folder in folders:
        for name in wanted:
            try:
                text = (folder / name).read_text()
            except OSError:
                continue
            yield text
