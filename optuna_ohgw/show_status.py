"""What ``status`` prints, once or again and again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from optuna_ohgw.status import DONE, GIVEN_UP, RUNNING, STATES, CellStatus, Status, Worker

_SECONDS = 2.0
_SHOWN = 40  # cells and workers that a summary names at the most


def blocks(status: Status, *, all_cells: bool = False) -> RenderableType:
    """Return a study for a console of 100 columns: a summary, its workers, its cells.

    Of cells those that run or were given up, or all.
    """
    parts: list[RenderableType] = [_summary(status)]
    if status.workers:
        parts.append(_workers(status.workers[:_SHOWN]))
        if len(status.workers) > _SHOWN:
            parts.append(f"and {len(status.workers) - _SHOWN} more workers; --json names all.")
        if not all(worker.known for worker in status.workers):
            parts.append("?: on another machine, not heard of yet; --watch tells in a minute if it lives.")
    busy = [c for c in status.cells if c.state in (RUNNING, GIVEN_UP)]
    few = len(status.cells) <= _SHOWN
    chosen = status.cells if all_cells or few else tuple(busy[:_SHOWN])
    if chosen:
        parts.append(_cells(chosen))
    if not all_cells and not few:
        parts.append(f"{len(chosen)} of {len(status.cells)} cells; --cells shows all.")
    parts += [_plain(f"{c.cell} was given up: {c.error}") for c in busy if c.state == GIVEN_UP]
    return Group(*parts)


def watch(read: Callable[[], Status], console: Console, *, all_cells: bool, as_json: bool) -> None:
    """Show a study again and again, until it is done or the user interrupts.

    Without a terminal, and as JSON, only what has changed.
    """
    before: str | None = None
    try:
        with Live(console=console, auto_refresh=False, transient=False) as live:
            while True:
                status = read()
                told = json.dumps(status.as_dict() | {"eta_s": None, "disk_bytes": None})
                if as_json:
                    if told != before:
                        console.out(line(status), highlight=False)
                elif console.is_terminal:
                    live.update(blocks(status, all_cells=all_cells), refresh=True)
                elif told != before:
                    console.print(blocks(status, all_cells=all_cells))
                before = told
                if status.counts[DONE] == len(status.cells):
                    return
                time.sleep(_SECONDS)
    except KeyboardInterrupt:
        return


def line(status: Status, pairing: dict[str, Any] | None = None) -> str:
    """Return a study as one line of JSON, with what a check of its pairing found if there was one."""
    return json.dumps(status.as_dict() | ({} if pairing is None else {"pairing": pairing}))


def _summary(status: Status) -> Text:
    cells = ", ".join(f"{number} {state}" for state, number in status.counts.items() if number)
    trials = ", ".join(f"{status.trials[s]:,} {s}" for s in STATES if status.trials[s]) or "none yet"
    eta = "-" if status.eta_s is None else str(timedelta(seconds=round(status.eta_s)))
    lines = [
        f"{status.study}: {len(status.cells)} cells: {cells}",
        f"budget used {status.share:.1%}, ETA {eta}",
        f"trials: {trials}",
    ]
    if status.checkpoint_bytes or status.lost_s:
        size = f"{status.checkpoint_bytes / 1e6:,.1f} MB of checkpoints"
        lines.append(f"{size}, {status.lost_s:,.0f} s trained in vain by workers that were stopped or killed")
    if status.disk_bytes is not None:
        lines.append(f"{status.disk_bytes / 1e6:,.1f} MB in the output folder")
    return Text("\n".join(lines))


def _workers(workers: tuple[Worker, ...]) -> Table:
    shown = _table("Workers")
    for name in ("cell", "host", "pid", "device", "since"):
        shown.add_column(name, justify="right" if name == "pid" else "left", no_wrap=name == "cell")
    for worker in workers:
        since = datetime.fromtimestamp(worker.since).strftime("%Y-%m-%d %H:%M:%S")
        host = worker.host if worker.known else f"{worker.host} ?"
        shown.add_row(*map(_plain, (worker.cell, host, str(worker.pid), worker.device, since)))
    return shown


def _cells(cells: tuple[CellStatus, ...]) -> Table:
    shown = _table("Cells")
    every = ("running", "complete", "pruned", "paused", "failed")
    kinds = [kind for kind in every if any(cell.trials[kind] for cell in cells)]
    headings = ("compl." if kind == "complete" else kind for kind in kinds)
    for name in ("cell", "", "used", *headings, "best", "test"):
        shown.add_column(name, justify="left" if name in ("cell", "") else "right", no_wrap=True)
    for cell in cells:
        shown.add_row(
            _plain(cell.cell),
            cell.state,
            f"{cell.share:.0%}",
            *(str(cell.trials[kind]) for kind in kinds),
            *("-" if v is None else f"{v:.4f}" for v in (cell.best, cell.test)),
        )
    return shown


def _plain(text: str) -> Text:
    """Return a text from elsewhere as one line; nothing in it is markup, an emoji or a terminal's command."""
    return Text("".join(c if c.isprintable() else " " for c in text))


def _table(title: str) -> Table:
    return Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )
