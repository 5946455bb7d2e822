"""What workers make of a machine: their speed-up, the cost of sharing a storage, the start of a run."""

from __future__ import annotations

import gc
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import optuna
import psutil
from omegaconf import OmegaConf
from rich import box
from rich.console import Console
from rich.table import Table

from optuna_ohgw import cell_work, processes, suggest, warmstart, worker
from optuna_ohgw.bench.clock import Spread, machine
from optuna_ohgw.bench.copies import fill_storage
from optuna_ohgw.bench.scale import SLEEPERS, Scale, simulated, sleepers_share, storage_of_environment
from optuna_ohgw.bench.searches import as_worker, prepare, search
from optuna_ohgw.bench.study import WORKERS, digits_study
from optuna_ohgw.bench.whole import measured_run, own_environment
from optuna_ohgw.cells import cells_of
from optuna_ohgw.claims import Claims
from optuna_ohgw.device import resolve_device
from optuna_ohgw.opening import open_database, open_storage
from optuna_ohgw.patience import Patience
from optuna_ohgw.spec import StudySpec
from optuna_ohgw.spec_parts import BudgetSpec

_SEEDS, _CELLS_SEEDS = 2, 32
_FEW: dict[str, Any] = {"seeds": tuple(range(_SEEDS)), "pilot_seeds": ()}
_SLEEPING = ((1.0, 3, "5%"), (0.1, 6, ""))  # seconds an epoch, trials of each worker, bar
_COMMAND = "from optuna_ohgw.cli import main; main()"


def workers(console: Console, device_name: str, repeats: int) -> None:
    """Print the figures of many workers. Cost: some three minutes a repeat."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    table = Table(title="Workers", box=box.SIMPLE_HEAD, title_justify="left")
    for heading in ("", "measured", "bar"):
        table.add_column(heading, justify="left" if not heading else "right")
    rates = [[_rate(device_name, count) for count in (1, WORKERS)] for _ in range(repeats)]
    speed_up = Spread.of([two / one for one, two in rates]).text()
    table.add_row(f"trials a minute, {WORKERS} workers to 1", speed_up, "1.7")
    clocked = [_clocked_run(device_name) for _ in range(repeats)]
    shares = Spread.of([share for share, _ in clocked]).text(".1%")
    table.add_row(f"storage and scheduling, {WORKERS} workers on SQLite", shares, "2%")
    url = storage_of_environment()
    for epoch_s, trials, bar in _SLEEPING:
        shown = "OPTUNA_OHGW_STORAGE is not set"
        if url is not None:
            shown = Spread.of([sleepers_share(url, epoch_s, trials) for _ in range(repeats)]).text(".1%")
        table.add_row(f"the same, {SLEEPERS} that sleep {epoch_s:g} s an epoch, on a server", shown, bar)
    answers = Spread.of(_answers(device_name, repeats)).text()
    table.add_row(f"run on a finished study of {4 * _CELLS_SEEDS} cells, s", answers, "3")
    console.print(table)
    trial_s = statistics.median([60 / one for one, _ in rates])
    own = statistics.median([share for share, _ in clocked]) * trial_s
    _print_scale(console, simulated((1, 8, 64), trial_s - own, own), max(rss for _, rss in clocked))
    console.print(
        f"digits, {_SEEDS} seeds, SQLite, one thread a worker. Storage and scheduling: all time in calls\n"
        "of the storage, ask, tell, pruner and claims, by a clock in both workers, over their whole time.\n"
        "Sleeping workers: threads with a connection each, four a cell. Scale: simulated\n"
        "from the figures above, a core for each worker and a storage that serves one at a time.",
        highlight=False,
    )
    console.print(machine(resolve_device(device_name), repeats))


def _rate(device_name: str, count: int) -> float:
    """Return trials a minute while so many workers search, start-up and report apart."""
    run = measured_run(device_name, count, **_FEW)
    began = min(t.started for t in run.trials)
    return 60 * len(run.trials) / (max(cell.ended for cell in run.cells.values()) - began)


def _clocked_run(device_name: str) -> tuple[float, int]:
    """Return the share of two workers' time in storage and scheduling, and a worker's memory (bytes)."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        spec = digits_study(Path(folder), device_name).model_copy(update=_FEW)
        storage = open_storage(spec.storage_url, create=True)
        for cell in cells_of(spec):
            prepare(storage, spec, cell)
        with processes.context(resolve_device(device_name).type).Pool(WORKERS) as pool:
            measured = pool.starmap(_clocked, [(spec, number) for number in range(WORKERS)])
        return sum(s for s, _, _ in measured) / sum(w for _, w, _ in measured), max(m for _, _, m in measured)


def _clocked(spec: StudySpec, number: int) -> tuple[float, float, int]:
    """Work as a worker; return seconds in storage and scheduling, all seconds, and memory in bytes."""
    gc.freeze()  # as workers do
    with clock_on() as spent:
        began = time.perf_counter()
        worker.serve(spec, number, 30, threading.Event())
        return spent[0], time.perf_counter() - began, psutil.Process().memory_info().rss


@contextmanager
def clock_on() -> Iterator[list[float]]:
    """Count the seconds of this thread in storage and scheduling while inside; what is nested counts once.

    A warm start, which happens while its parameters are suggested, is none of it.
    """
    spent, depth, mine, warmed = [0.0], [0], threading.get_ident(), warmstart.warm_start

    def clocked(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if depth[0] or threading.get_ident() != mine:
                return function(*arguments, **options)
            depth[0], began = 1, time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                depth[0] = 0
                spent[0] += time.perf_counter() - began

        return call

    def warm_start(*arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        try:
            return warmed(*arguments, **options)
        finally:
            spent[0] -= (time.perf_counter() - began) * depth[0]

    places: tuple[tuple[Any, tuple[str, ...]], ...] = (
        (Patience, ("call",)),
        (Claims, ("take", "release", "is_sole", "may_need_me")),
        (optuna.Study, ("ask", "tell", "get_trials")),
        (optuna.Trial, ("report", "should_prune", "set_user_attr", "suggest_float")),
        (cell_work, ("_next",)),
    )
    read = clocked(vars(optuna.Trial)["user_attrs"].fget)
    with ExitStack() as stack:
        stack.enter_context(patch.object(suggest, "warm_start", warm_start))
        stack.enter_context(patch.object(optuna.Trial, "user_attrs", property(read)))
        for owner, names in places:
            for name in names:
                stack.enter_context(patch.object(owner, name, clocked(getattr(owner, name))))
        yield spent


def _answers(device_name: str, repeats: int) -> list[float]:
    """Return seconds of the command on a finished study of 128 cells."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        changes = {"seeds": tuple(range(_CELLS_SEEDS)), "pilot_seeds": (), "budget": BudgetSpec(trials=4)}
        spec = digits_study(Path(folder) / "output", device_name).model_copy(update=changes)
        first, *others = cells_of(spec)
        spec.folder.mkdir(parents=True)
        storage = open_database(spec.storage_url, create=True)
        prepare(storage, spec, first)
        claims = Claims(storage, spec, device_name)
        claims.take()  # by when the last was released a report knows that it is of today
        with as_worker():
            search(spec, first, finish=True)
        claims.release(done=True)
        fill_storage(storage, optuna.load_study(study_name=first.name, storage=storage)._study_id, others)
        assert claims.take() is None
        file = Path(folder) / "digits.yaml"
        OmegaConf.save(OmegaConf.create(spec.model_dump(mode="json")), file)
        command = [sys.executable, "-c", _COMMAND, "run", str(file)]
        seconds = []
        for _ in range(repeats + 1):  # the first writes the report
            began = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True, env=own_environment())
            seconds.append(time.perf_counter() - began)
        return seconds[1:]


def _print_scale(console: Console, scales: list[Scale], rss: int) -> None:
    table = Table(title="Scale, simulated", box=box.SIMPLE_HEAD, title_justify="left")
    for heading in ("workers", "trials/hour", "to one", "waiting", "GB"):
        table.add_column(heading, justify="right")
    for one in scales:
        rate, share = f"{one.trials_an_hour:,.0f}", f"{one.waiting:.1%}"
        table.add_row(str(one.workers), rate, f"{one.speed_up:.1f}", share, f"{one.workers * rss / 1e9:.1f}")
    console.print(table)
