"""What a process may use of its machine: cores and memory, less what containers and Slurm take away."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from optuna_ohgw.surroundings import UNLIMITED, cgroup_folders


@dataclass(frozen=True)
class Cgroup:
    """Limits of the control groups of this process; None where there is none.

    Attributes:
        cpus: Cores' worth of time.
        memory: Bytes.
        used: Bytes in use of ``memory``, without what the kernel can drop.
    """

    cpus: float | None = None
    memory: int | None = None
    used: int | None = None


@dataclass(frozen=True)
class Host:
    """Cores and memory that a study may use here.

    Attributes:
        cores: Cores' worth of time, the least of those below.
        memory: Bytes, the least of those below.
        free: Bytes of it that are free.
        limits: What sets the limits, in words.
    """

    cores: float
    memory: int
    free: int
    limits: tuple[str, ...]


def measure(environment: Mapping[str, str] = os.environ, root: Path = Path("/")) -> Host:
    """Return the cores and the memory of this machine under affinity, control groups and Slurm.

    Args:
        environment: Variables, of which Slurm sets some.
        root: Where ``proc`` and ``sys`` are.
    """
    group, ram = read_cgroup(root), psutil.virtual_memory()
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores: list[tuple[float, str]] = [(float(affinity), f"{affinity} of {os.cpu_count()} cores")]
    memory: list[tuple[int, str]] = [(ram.total, "RAM")]
    if group.cpus is not None:
        cores.append((group.cpus, f"cgroup quota {group.cpus:g}"))
    if group.memory is not None:
        memory.append((group.memory, "cgroup limit"))
    if (own := _number(environment.get("SLURM_CPUS_PER_TASK"))) is not None:
        cores.append((float(own), f"SLURM_CPUS_PER_TASK {own}"))
    if (own := _slurm_memory(environment)) is not None:
        memory.append((own, "Slurm's memory"))
    free = ram.available
    if group.memory is not None:
        free = min(free, group.memory - (group.used or 0))
    least, most = min(cores), min(memory)
    return Host(least[0], most[0], max(0, min(free, most[0])), (least[1], most[1]))


def read_cgroup(root: Path = Path("/")) -> Cgroup:
    """Return the tightest limits over the control groups of this process and those around them."""
    cpus: list[float] = []
    memory: list[tuple[int, int]] = []
    for folder in cgroup_folders(root, "cpu"):
        words = _words(folder / "cpu.max", 2)
        if words is None:  # version 1
            parts = [_words(folder / f"cpu.cfs_{name}_us", 1) for name in ("quota", "period")]
            words = [part[0] for part in parts if part]
        if len(words) == 2 and words[0] not in ("max", "-1"):
            cpus.append(int(words[0]) / int(words[1]))
    for folder in cgroup_folders(root, "memory"):
        limit = _words(folder / "memory.max", 1) or _words(folder / "memory.limit_in_bytes", 1)
        if limit and limit[0] != "max" and int(limit[0]) < UNLIMITED:
            used = _words(folder / "memory.current", 1) or _words(folder / "memory.usage_in_bytes", 1)
            taken = int(used[0]) if used else 0
            memory.append((int(limit[0]), max(0, taken - _droppable(folder / "memory.stat"))))
    least = min(cpus, default=None)
    return Cgroup(least, *min(memory)) if memory else Cgroup(least)


def _words(file: Path, count: int) -> list[str] | None:
    try:
        words = file.read_text().split()
    except OSError:
        return None
    return words if len(words) == count else None


def _droppable(file: Path) -> int:
    """Return the bytes of files in memory that were not read lately."""
    try:
        pairs = dict(line.split() for line in file.read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(pairs.get("total_inactive_file", pairs.get("inactive_file", 0)))


def _slurm_memory(environment: Mapping[str, str]) -> int | None:
    node, cpu = (_number(environment.get(f"SLURM_MEM_PER_{unit}")) for unit in ("NODE", "CPU"))
    if node:  # 0 is all of it
        return node * 2**20
    cpus = _number(environment.get("SLURM_CPUS_ON_NODE"))
    return cpu * cpus * 2**20 if cpu and cpus else None


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() else None
