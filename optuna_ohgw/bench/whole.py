"""What a run costs around its training: start-up, storage, pruner, change of cell, report."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
from omegaconf import OmegaConf
from rich import box
from rich.console import Console
from rich.table import Table

from optuna_ohgw.bench.account import PARTS, SEARCH, RunTime, account, overhead, times_of
from optuna_ohgw.bench.clock import Spread, machine
from optuna_ohgw.bench.study import WORKERS, digits_study
from optuna_ohgw.device import resolve_device

_COMMAND = "from optuna_ohgw.cli import main; main()"


def run(console: Console, device_name: str, repeats: int) -> None:
    """Print what a run of the digits study costs around its training. Cost: over a minute a run."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    runs = [measured_run(device_name) for _ in range(repeats)]
    _print(console, runs)
    console.print(machine(resolve_device(device_name), len(runs)))


def measured_run(device_name: str, workers: int = WORKERS, **changes: Any) -> RunTime:
    """Run the digits study in a temporary folder, as the command does for a user."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        spec, file = digits_study(Path(folder) / "output", device_name), Path(folder) / "digits.yaml"
        spec = spec.model_copy(update=changes)
        OmegaConf.save(OmegaConf.create(spec.model_dump(mode="json")), file)
        began = time.time()
        command = [sys.executable, "-c", _COMMAND, "run", str(file), "--workers", str(workers)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=own_environment())
        ended = time.time()
        if done.returncode:
            last = (done.stderr.strip() or "it gave no reason").splitlines()[-1]
            raise RuntimeError(f"bench: the run failed: {last}")
        return RunTime(began, ended, *times_of(spec))


def own_environment() -> dict[str, str]:
    """Return the environment without another storage than the study's own."""
    return {name: value for name, value in os.environ.items() if name != "OPTUNA_OHGW_STORAGE"}


def _print(console: Console, runs: Sequence[RunTime]) -> None:
    accounts = [account(run, WORKERS) for run in runs]
    totals = [sum(seconds.values()) for seconds in accounts]
    count, ran = len(runs[0].trials), len(runs[0].cells)
    title = f"A run of {ran} cells on {WORKERS} workers"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for heading in ("", "s", "share", "ms a trial"):
        table.add_column(heading, justify="right" if heading else "left")
    for part in PARTS:
        seconds = statistics.median([own[part] for own in accounts])
        parts = [own[part] / total for own, total in zip(accounts, totals, strict=True)]
        each = f"{1e3 * seconds / count:.1f}" if part in SEARCH else ""
        table.add_row(part, f"{seconds:.2f}", Spread.of(parts).text(".1%"), each)
    console.print(table)
    whole, search = (Spread.of([overhead(a, p) for a in accounts]).text(".1%") for p in (PARTS, SEARCH))
    wall = Spread.of([r.ended - r.began for r in runs]).text(".1f")
    console.print(
        f"Overhead of the whole command: {whole} of the training. Bar: at most 5%.\n"
        f"Overhead while it searches (no start-up, waiting, report): {search}.\n"
        f"Wall time of the command: {wall} s.\n"
        f"digits: {ran} cells, {count} trials, SQLite, {WORKERS} cells at once, one thread each.\n"
        "Seconds: of both workers together; share: of wall time × workers. Training: epochs, warm\n"
        "starts, evaluation, final training. Start-up: imports, checks, cells, to a worker's first\n"
        "trial. Between trials: the end of one in the storage and the start of the next. Inside\n"
        "trials: suggestion, initial weights, storage, pruner. Change of cell: test accuracy, files,\n"
        "opening the next one. Waiting: without a cell while the other worker ends its last.",
        highlight=False,
    )
