"""What a decision costs: a pruner's beside that of Optuna's own, and DyHPO's next choice."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import optuna
import torch
from optuna.pruners import BasePruner, SuccessiveHalvingPruner
from optuna.trial import FrozenTrial
from rich import box
from rich.console import Console
from rich.table import Table

from optuna_ohgw.bench.choices import print_choices
from optuna_ohgw.bench.clock import Spread, machine, ratios
from optuna_ohgw.bench.histories import EPOCHS, Curves, add_running, end, history, open_history, write_history
from optuna_ohgw.schedulers.pruners import PashaPruner, PromotionPruner, SchedulerPruner
from optuna_ohgw.schedulers.stopping import StoppingAsha

BAR = 1.2
EACH = 10  # decisions of a process that goes on, for each new process
WARM, BETWEEN, NEW, FOLD = "at a rung", "between rungs", "a process's first", "whole fold"

PRUNERS: dict[str, tuple[Callable[[], BasePruner], int]] = {
    "asha-quantile": (lambda: SchedulerPruner(lambda up: StoppingAsha(EPOCHS, maximize=up)), 5000),
    "asha-promotion": (lambda: PromotionPruner(EPOCHS), 5000),
    "pasha": (lambda: PashaPruner(EPOCHS), 1000),
}


def decisions(console: Console, device_name: str, repeats: int) -> None:
    """Print the cost of ``prune`` against that of Optuna's pruner, and of DyHPO's next choice."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    table = Table(title="A pruner's decision, SQLite", box=box.SIMPLE_HEAD, title_justify="left")
    for heading in ("", "trials", "", "ms", "Optuna's", "ratio", "n", "bar"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for name, (make, size) in PRUNERS.items():
            for what, (own, optunas) in by_kind(Path(folder) / name, make, size, repeats).items():
                table.add_row(
                    name,
                    f"{size:,}",
                    what,
                    _milliseconds(own),
                    _milliseconds(optunas),
                    Spread.of(ratios(own, optunas)).text() if what != BETWEEN else "",
                    f"{len(own)}",
                    f"{BAR}" if what in (WARM, NEW) else "",
                )
    console.print(table)
    console.print(
        "Optuna's: SuccessiveHalvingPruner on a study of its own decisions over the same curves, η = 3, in\n"
        "turns. Ratio: median (range) of what was measured one after the other. A process's first decision\n"
        "reads all finished trials. Whole fold: by a fresh pruner that has them in memory. Between rungs\n"
        "neither looks at other trials.",
        highlight=False,
    )
    console.print()
    print_choices(console, repeats)
    console.print(machine(torch.device("cpu"), repeats))


@dataclass
class Side:
    """One pruner with its study, and what its decisions took.

    Attributes:
        file: The study's database.
        make: ↦ a pruner that remembers nothing.
        curves: Where its values come from; the same as the other side's.
        seconds: By what was decided.
    """

    file: Path
    make: Callable[[], BasePruner]
    curves: Curves = field(default_factory=lambda: Curves(1))
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def begin(self) -> None:
        """Begin as a new process does, and decide twice."""
        self._study = open_history(self.file)
        for what in (NEW, FOLD):
            self._pruner = self.make()
            self.at_rung(what)

    def at_rung(self, what: str) -> None:
        """Decide on a new trial at the lowest rung."""
        x = self.curves.parameter()
        trial = add_running(self._study, x, {1: self.curves.value(x, 1)})
        self._time(what, trial)
        end(self._study, trial)

    def between(self) -> None:
        """Decide on a trial that went on at the lowest rung, one epoch later."""
        trial = add_running(self._study, 0.0, {1: -1.0})
        if self._pruner.prune(self._study, trial):
            raise RuntimeError("bench: the best of all trials was stopped at the lowest rung")
        storage, number = self._study._storage, trial._trial_id
        storage.set_trial_intermediate_value(number, 2, -1.0)
        self._time(BETWEEN, storage.get_trial(number))
        end(self._study, trial)

    def _time(self, what: str, trial: FrozenTrial) -> None:
        started = time.perf_counter()
        self._pruner.prune(self._study, trial)
        self.seconds.setdefault(what, []).append(time.perf_counter() - started)


def by_kind(
    folder: Path, make: Callable[[], BasePruner], size: int, repeats: int
) -> Mapping[str, tuple[list[float], list[float]]]:
    """Return seconds of decisions by their kind: of a pruner, and of Optuna's, in turns."""
    folder.mkdir(parents=True)
    sides = (
        Side(folder / "optuna.db", lambda: SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)),
        Side(folder / "own.db", make),
    )
    for side in sides:
        write_history(side.file, history(side.make(), size))
    for _ in range(repeats):
        for side in sides:
            side.begin()
        for _ in range(EACH):
            for side in sides:
                side.at_rung(WARM)
        for side in sides:
            side.between()
    optunas, own = (side.seconds for side in sides)
    return {what: (own[what], optunas[what]) for what in (WARM, BETWEEN, NEW, FOLD)}


def _milliseconds(seconds: list[float]) -> str:
    return f"{1e3 * statistics.median(seconds):.3g}"
