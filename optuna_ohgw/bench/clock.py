"""Timing in turns, the spread of a ratio, and the machine it was measured on."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from optuna_ohgw.version import __version__


@dataclass(frozen=True)
class Spread:
    """Median and range of what was measured several times."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of values."""
        return cls(statistics.median(values), min(values), max(values))

    def text(self, form: str = ".2f") -> str:
        """Return ``median (low–high)``, each in a format; the range without percent signs."""
        low, high = (format(value, form).rstrip("%") for value in (self.low, self.high))
        return f"{self.median:{form}} ({low}–{high})"


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Return the ratios of what was measured in the same round."""
    return [a / b for a, b in zip(above, below, strict=True)]


def fastest(times: dict[str, list[float]]) -> str:
    """Return the name of the smallest median."""
    return min(times, key=lambda name: statistics.median(times[name]))


def interleaved(
    forms: dict[str, Callable[[], Any]], device: torch.device, repeats: int, *, unmeasured: int = 2
) -> dict[str, list[float]]:
    """Return seconds a call, each form in turn, after some rounds that do not count."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for round_ in range(repeats + unmeasured):
        for name, call in forms.items():
            synchronize(device)
            started = time.perf_counter()
            call()
            synchronize(device)
            if round_ >= unmeasured:
                times[name].append(time.perf_counter() - started)
    return times


def use(device: torch.device) -> None:
    """Make a GPU that is named by number the current one, as a worker does."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def synchronize(device: torch.device) -> None:
    """Wait for a GPU's work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cores() -> int:
    """Return the CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine(device: torch.device, repeats: int) -> str:
    """Return what was measured on, and with."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu()
    return (
        f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"optuna-ohgw {__version__}, {time.strftime('%Y-%m-%d')}, {repeats} repeats"
    )


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
