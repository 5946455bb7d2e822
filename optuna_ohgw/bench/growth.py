"""What a trial and a cell cost as the storage grows."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import optuna
import torch
from optuna.storages import RDBStorage
from rich import box
from rich.console import Console
from rich.table import Table

from optuna_ohgw import runner
from optuna_ohgw.bench.clock import Spread, machine, ratios
from optuna_ohgw.bench.copies import fill_cell, fill_storage
from optuna_ohgw.bench.searches import Search, as_worker, in_turns, prepare, search, undone
from optuna_ohgw.bench.study import digits_study
from optuna_ohgw.cells import Cell, cells_of
from optuna_ohgw.device import resolve_device
from optuna_ohgw.opening import open_database
from optuna_ohgw.spec import StudySpec
from optuna_ohgw.spec_parts import BudgetSpec, SchedulerSpec

_VARIATION = "asha-ohgw-1step"
_EPOCHS = 3
_TRIALS = (10, 100, 1000)
_CELLS = (4, 100, 2500)  # of _OF_CELL trials: to 10,000 in one storage
_FIRST = 10  # real trials of the cell that grows
# Of so many after _FIRST trials of value 0 each is among the better third, whatever its value.
_FRESH = 5
_OF_CELL, _FRESH_CELL = 4, 8
_FRESH_SEED = 1000


def growth(console: Console, device_name: str, repeats: int) -> None:
    """Print seconds a trial by the trials in its cell, and by the cells in its storage."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    torch.set_num_threads(1)  # as a worker
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        in_cell = by_trials(Path(folder) / "trials", device_name, repeats)
        in_storage, checks = by_cells(Path(folder) / "cells", device_name, repeats)
    _print_searches(console, "A trial by the trials in its cell", "trials", in_cell)
    console.print()
    _print_searches(console, "A trial by the cells in its storage", "cells", in_storage)
    console.print()
    _print_checks(console, checks)
    console.print(
        f"digits, {_EPOCHS} epochs, one worker, SQLite; the same configurations at every size, in turns.\n"
        f"By trials: {_FRESH} fresh ones in a cell that holds copies of {_FIRST}. By cells: a fresh cell of\n"
        f"{_FRESH_CELL} trials with its end, beside cells of {_OF_CELL}. Ratio: median (range) of what was\n"
        "measured in the same round. Same training: the ratio with the median training of all sizes in\n"
        "place of each one's own, which is the same work. Rest: suggestion, storage, pruner, files.\n"
        "Opening: reads the cell, once when it is started or continued; with opening: the ratio where it\n"
        "is charged to these few trials. Bar: flat within 10%.",
        highlight=False,
    )
    console.print(machine(resolve_device(device_name), repeats))


def by_trials(
    folder: Path, device_name: str, repeats: int, sizes: Sequence[int] = _TRIALS
) -> dict[int, list[Search]]:
    """Return searches of the same fresh trials in a cell that holds so many finished ones."""
    cell = Cell("digits", _VARIATION, 0)
    searches: dict[int, Callable[[], Search]] = {}
    with as_worker():
        for size in sizes:
            spec = _study(folder / str(size), device_name, _FIRST)
            storage = _storage(spec)
            prepare(storage, spec, cell)
            search(spec, cell)
            study = optuna.load_study(study_name=cell.name, storage=storage)
            fill_cell(storage, study._study_id, size)
            grown = spec.model_copy(update={"budget": BudgetSpec(trials=_FIRST + _FRESH)})
            searches[size] = undone(grown, cell, storage, size)
        return in_turns(searches, repeats)


def by_cells(
    folder: Path, device_name: str, repeats: int, sizes: Sequence[int] = _CELLS
) -> tuple[dict[int, list[Search]], dict[int, list[float]]]:
    """Return searches of the same fresh cell beside so many cells, and seconds to find none left."""
    searches: dict[int, Callable[[], Search]] = {}
    checks: dict[int, Callable[[], float]] = {}
    cell = Cell("digits", _VARIATION, _FRESH_SEED)
    with as_worker():
        for size in sizes:
            spec = _study(folder / str(size), device_name, _OF_CELL)
            spec = spec.model_copy(update={"seeds": tuple(range(size // len(spec.variations)))})
            first, *others = cells_of(spec)
            storage = _storage(spec)
            prepare(storage, spec, first)
            search(spec, first, finish=True)
            study = optuna.load_study(study_name=first.name, storage=storage)
            fill_storage(storage, study._study_id, others)
            fresh = spec.model_copy(update={"budget": BudgetSpec(trials=_FRESH_CELL)})
            searches[size] = undone(fresh, cell, storage, 0, finish=True)
            checks[size] = lambda spec=spec: _check(spec)  # type: ignore[misc]
        return in_turns(searches, repeats), in_turns(checks, repeats)


def _study(folder: Path, device_name: str, trials: int) -> StudySpec:
    spec = digits_study(folder, device_name)
    changes = {
        "task": spec.task.model_copy(update={"epochs": _EPOCHS}),
        "scheduler": SchedulerSpec(min_resource=1, reduction_factor=3, bootstrap_count=2),
        "pilot_seeds": (),
        "budget": BudgetSpec(trials=trials),
    }
    return spec.model_copy(update=changes)


def _storage(spec: StudySpec) -> RDBStorage:
    spec.folder.mkdir(parents=True)
    return open_database(spec.storage_url, create=True)


def _check(spec: StudySpec) -> float:
    started = time.perf_counter()
    if runner.run(spec, Console(quiet=True)):
        raise RuntimeError("bench: a finished study was not found finished")
    return time.perf_counter() - started


def with_same_training(measured: Mapping[int, list[Search]]) -> dict[int, list[float]]:
    """Return seconds a trial by size, with the median training of all sizes in place of its own.

    All sizes train the same; how long that takes differs from time to time, more than the rest does.
    """
    training = statistics.median([s.training / s.trials for many in measured.values() for s in many])
    return {size: [s.rest + training for s in many] for size, many in measured.items()}


def _print_searches(console: Console, title: str, what: str, measured: Mapping[int, list[Search]]) -> None:
    least, even = measured[min(measured)], with_same_training(measured)
    headings = ("s/trial", "ratio", "same training", "rest, ms", "opening, ms", "with opening")
    title = f"{title}, {least[0].epochs} epochs of {least[0].trials} trials"
    table = _table(title, what, *headings)
    for size, many in measured.items():
        table.add_row(
            f"{size:,}",
            f"{statistics.median([s.a_trial for s in many]):.4f}",
            Spread.of(ratios([s.a_trial for s in many], [s.a_trial for s in least])).text(),
            Spread.of(ratios(even[size], even[min(measured)])).text(),
            f"{1e3 * statistics.median([s.rest for s in many]):.1f}",
            f"{1e3 * statistics.median([s.opening for s in many]):.0f}",
            f"{statistics.median(ratios(*([s.with_opening for s in x] for x in (many, least)))):.2f}",
        )
    console.print(table)


def _print_checks(console: Console, checks: Mapping[int, list[float]]) -> None:
    table = _table("A run with nothing left", "cells", "s", "ms a cell")
    for size, seconds in checks.items():
        each = Spread.of([1e3 * s / size for s in seconds]).text(".1f")
        table.add_row(f"{size:,}", f"{statistics.median(seconds):.2f}", each)
    console.print(table)


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for heading in headings:
        table.add_column(heading, justify="right")
    return table
