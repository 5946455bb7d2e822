"""Progress bars of a run: one a cell at work, one for all."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import optuna
from optuna.storages import BaseStorage
from optuna.trial import TrialState
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

from optuna_ohgw.cells import Cell, Ledger, cells_of
from optuna_ohgw.claims import Claims
from optuna_ohgw.history import FINAL
from optuna_ohgw.spec import StudySpec


class ProgressView:
    """Progress bars of the cells at work, on whatever machine, and of the whole study.

    Args:
        storage: Read at every look.
        spec: The study.
        claims: Who works on what.
        progress: The bars.
    """

    def __init__(self, storage: BaseStorage, spec: StudySpec, claims: Claims, progress: Progress) -> None:
        self._storage, self._spec, self._claims, self._progress = storage, spec, claims, progress
        self._cells = {cell.label: cell for cell in cells_of(spec)}
        self._ledgers: dict[int, Ledger] = {}  # by id of the study: the cell of a replay is made anew
        self._done: dict[str, float] = {}
        self._bars: dict[str, TaskID] = {}
        self._best = math.nan
        self._claims_seen = 0
        self._overall = progress.add_task("all cells", total=len(self._cells), best="")
        for label in self._cells:
            self._measure(label)
        self._finished = {label for label in self._cells if self._is_finished(label)}
        self._show()

    def look(self) -> list[Cell]:
        """Show how far the cells are; return those that came to their end since the last look."""
        ended = []
        held = {label for label, _ in self._claims.pulses().values()}
        # Those begun and ended between two looks, too.
        recent, self._claims_seen = self._claims.since(self._claims_seen)
        for label in sorted((held | recent) - self._bars.keys() - self._finished):
            self._bars[label] = self._progress.add_task(label, total=1, best="")
        for label in list(self._bars):
            try:
                best, finished = self._measure(label), self._is_finished(label)
            except KeyError:
                continue  # a replay's, which is being made anew
            text = "" if best is None else f"best {best:.4f}"
            self._progress.update(self._bars[label], completed=self._done[label], best=text)
            if finished:
                ended.append(self._cells[label])
                self._take_off(label, text)
            elif label not in held:
                self._progress.remove_task(self._bars.pop(label))
        self._show()
        return ended

    def _measure(self, label: str) -> float | None:
        study = optuna.load_study(study_name=self._cells[label].name, storage=self._storage)
        ledger = self._ledgers.setdefault(study._study_id, Ledger(study, self._spec))
        self._done[label] = min(1.0, ledger.share_done())
        trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
        values = [value for t in trials for value in t.intermediate_values.values()]
        best = self._spec.metric.best(values)
        self._best = self._spec.metric.best([self._best, best])
        return None if math.isnan(best) else best

    def _is_finished(self, label: str) -> bool:
        study_id = self._storage.get_study_id_from_name(self._cells[label].name)
        return FINAL in self._storage.get_study_user_attrs(study_id)

    def _take_off(self, label: str, best: str) -> None:
        self._finished.add(label)
        self._done[label] = 1.0
        count = f"{len(self._finished)}/{len(self._cells)} cells"
        self._progress.console.print(f"{label} done ({count}), {best}", highlight=False)
        self._progress.remove_task(self._bars.pop(label))

    def _show(self) -> None:
        text = f"best {self._best:.4f}" if not math.isnan(self._best) else ""
        self._progress.update(self._overall, completed=sum(self._done.values()), best=text)


@contextlib.contextmanager
def show_progress(
    storage: BaseStorage, spec: StudySpec, claims: Claims, console: Console
) -> Iterator[ProgressView]:
    """Show bars while the context is open; see :class:`ProgressView`."""
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
        yield ProgressView(storage, spec, claims, progress)
