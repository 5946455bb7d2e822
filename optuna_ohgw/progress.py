"""Progress bars of a run: one a cell at work, one for all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from queue import Empty
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from optuna_ohgw.cells import Cell


class ProgressView:
    """Progress bars of the cells at work and of the whole run."""

    def __init__(self, done: dict[Cell, float], progress: Progress) -> None:
        self.done, self.progress = dict(done), progress
        self.bars: dict[Cell, TaskID] = {}
        self.overall = progress.add_task("all cells", total=len(done), best="")
        progress.update(self.overall, completed=sum(self.done.values()))
        self.best = float("-inf")
        self.finished = 0

    def start(self, cell: Cell) -> None:
        """Show a cell."""
        self.bars[cell] = self.progress.add_task(cell.label, total=1, best="")
        self.progress.update(self.bars[cell], completed=self.done[cell])

    def drain(self, events: Any) -> None:
        """Take what the workers reported."""
        while True:
            try:
                event = events.get_nowait()
            except Empty:
                return
            cell, best = event["cell"], event["best"]
            self.done[cell] = min(1.0, event["done"])
            if best is not None:
                self.best = max(self.best, best)
            if cell in self.bars:
                text = "" if best is None else f"best {best:.4f}"
                self.progress.update(self.bars[cell], completed=self.done[cell], best=text)
            self._update()

    def _update(self) -> None:
        text = f"best {self.best:.4f}" if self.best > float("-inf") else ""
        self.progress.update(self.overall, completed=sum(self.done.values()), best=text)

    def finish(self, cell: Cell) -> None:
        """Take a cell off the screen and leave a line."""
        self.finished += 1
        self.done[cell] = 1.0
        self._update()
        task = self.bars.pop(cell)
        best = self.progress.tasks[self.progress.task_ids.index(task)].fields["best"]
        self.progress.console.print(
            f"{cell.label} done ({self.finished}/{len(self.done)} cells), {best}", highlight=False
        )
        self.progress.remove_task(task)


@contextlib.contextmanager
def show_progress(done: dict[Cell, float], console: Console) -> Iterator[ProgressView]:
    """Show bars while the context is open.

    Args:
        done: Share of its budget that each cell has used, 0 to 1.
        console: Where to show them.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[best]}"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, speed_estimate_period=120) as progress:
        yield ProgressView(done, progress)
