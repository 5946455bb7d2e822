"""Measurements of this machine, as ratios of one run: a warm start, an epoch, a trial, a run, a decision."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console

from optuna_ohgw.bench.decisions import decisions
from optuna_ohgw.bench.growth import growth
from optuna_ohgw.bench.train import train
from optuna_ohgw.bench.warm_start import warm_start
from optuna_ohgw.bench.whole import run
from optuna_ohgw.bench.workers import workers

BENCHMARKS: dict[str, Callable[[Console, str, int], None]] = {
    "warm-start": warm_start,
    "train": train,
    "run": run,
    "growth": growth,
    "decisions": decisions,
    "workers": workers,
}
