"""Measurements of this machine, as ratios of one run: what a warm start, an epoch, a trial and a run cost."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console

from optuna_ohgw.bench.growth import growth
from optuna_ohgw.bench.train import train
from optuna_ohgw.bench.warm_start import warm_start
from optuna_ohgw.bench.whole import run

BENCHMARKS: dict[str, Callable[[Console, str, int], None]] = {
    "warm-start": warm_start,
    "train": train,
    "run": run,
    "growth": growth,
}
