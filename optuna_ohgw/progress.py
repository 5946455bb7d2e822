"""Progress bars of a run: one a cell at work, one for all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from queue import Empty
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from optuna_ohgw.cells import Cell


class ProgressView:
    """Progress bars of the cells at work and of the whole run."""

    def __init__(self, trials: int | None, ended: dict[Cell, int], progress: Progress) -> None:
        self.trials, self.ended, self.progress = trials, ended, progress
        self.bars: dict[Cell, TaskID] = {}
        total = trials * len(ended) if trials else None
        self.overall = progress.add_task("all cells", total=total, completed=sum(ended.values()), best="")
        self.finished = 0

    def start(self, cell: Cell) -> None:
        """Show a cell."""
        completed = self.ended[cell]
        self.bars[cell] = self.progress.add_task(cell.label, total=self.trials, completed=completed, best="")

    def drain(self, events: Any) -> None:
        """Take what the workers reported."""
        while True:
            try:
                event = events.get_nowait()
            except Empty:
                return
            best = "" if event["best"] is None else f"best {event['best']:.4f}"
            if event["cell"] in self.bars:
                self.progress.update(self.bars[event["cell"]], advance=event["ended"], best=best)
            self.progress.update(self.overall, advance=event["ended"])

    def finish(self, cell: Cell) -> None:
        """Take a cell off the screen and leave a line."""
        self.finished += 1
        task = self.bars.pop(cell)
        best = self.progress.tasks[self.progress.task_ids.index(task)].fields["best"]
        self.progress.console.print(
            f"{cell.label} done ({self.finished}/{len(self.ended)} cells), {best}", highlight=False
        )
        self.progress.remove_task(task)


@contextlib.contextmanager
def show_progress(trials: int | None, ended: dict[Cell, int], console: Console) -> Iterator[ProgressView]:
    """Show bars while the context is open.

    Args:
        trials: Trials planned a cell; None if the budget is another.
        ended: Trials that have ended, by cell.
        console: Where to show them.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[best]}"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, speed_estimate_period=120) as progress:
        yield ProgressView(trials, ended, progress)
