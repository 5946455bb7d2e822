"""What a run costs around its training: start-up, storage, pruner, change of cell, close-down."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import optuna
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from optuna_ohgw.bench.account import PARTS, SEARCH, RunTime, account, overhead, times_of
from optuna_ohgw.bench.clock import Spread, machine
from optuna_ohgw.bench.study import WORKERS, digits_study
from optuna_ohgw.cells import open_storage
from optuna_ohgw.report import report_study
from optuna_ohgw.worker import resolve_device

_SEEDS, _PILOTS = 4, 2
_MOST_RUNS = 3
# A process of its own a run, which imports in the order of the command: nothing is warm.
_RUN = """
import sys, time
from pathlib import Path
import optuna
import torch
from rich.console import Console
from optuna_ohgw.spec import StudySpec
optuna.logging.set_verbosity(optuna.logging.WARNING)
spec = StudySpec.model_validate_json(Path(sys.argv[1]).read_text())
from optuna_ohgw import processes
processes.prepare()
from optuna_ohgw import runner
began = time.time()
runner.run(spec, Console(quiet=True))
print(began, time.time())
"""


def run(console: Console, device_name: str, repeats: int) -> None:
    """Print what a run of the digits study costs around its training."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    torch.set_num_threads(1)  # as its workers
    runs = [measured_run(device_name) for _ in range(min(repeats, _MOST_RUNS))]
    _print(console, runs)
    console.print(machine(resolve_device(device_name), len(runs)))


def measured_run(device_name: str) -> RunTime:
    """Run the digits study, smaller, in a temporary folder and a process of its own."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        smaller = {"seeds": tuple(range(_SEEDS)), "pilot_seeds": tuple(range(1000, 1000 + _PILOTS))}
        spec = digits_study(Path(folder) / "output", device_name).model_copy(update=smaller)
        file = Path(folder) / "spec.json"
        file.write_text(spec.model_dump_json())
        launched = time.time()
        command = [sys.executable, "-c", _RUN, str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip() or "it gave no reason").splitlines()[-1]
            raise RuntimeError(f"bench: the run failed: {last}")
        began, ended = map(float, done.stdout.split())
        trials, cells = times_of(spec)
        started = time.perf_counter()
        report_study(open_storage(spec.storage_url, create=False), spec, file)
        report = time.perf_counter() - started
    return RunTime(began, ended, trials, cells, imports=began - launched, report=report)


def _print(console: Console, runs: Sequence[RunTime]) -> None:
    accounts = [account(run, WORKERS) for run in runs]
    totals = [sum(seconds.values()) for seconds in accounts]
    count = len(runs[0].trials)
    title = f"A run of {len(runs[0].cells)} cells on {WORKERS} workers"
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
    wall, imports, report = (
        statistics.median(values)
        for values in zip(*((r.ended - r.began, r.imports, r.report) for r in runs), strict=True)
    )
    console.print(
        f"Overhead of the whole run: {whole} of the training.\n"
        f"Overhead while it searches: {search}. Bar: at most 5%.\n"
        f"Wall time {wall:.1f} s; Python's start and imports before it: {imports:.1f} s; "
        f"report after it: {report:.1f} s.\n"
        f"digits: 4 variations × {_SEEDS} seeds and {_PILOTS} pilots, {count} trials, SQLite, "
        f"{WORKERS} cells at once, one thread each.\n"
        "Seconds: of both workers together; share: of wall time × workers. Training: epochs, warm\n"
        "starts, evaluation, final training. Start-up: to a worker's first trial. Between trials: the end\n"
        "of one in the storage and the start of the next. Inside trials: suggestion, initial weights,\n"
        "storage, pruner. Change of cell: test accuracy, files, opening the next one. Waiting: without a\n"
        "cell while the other worker ends its last. While it searches: without start-up, waiting and\n"
        "close-down.",
        highlight=False,
    )
