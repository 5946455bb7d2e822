"""A study from its first cell to its report: what ``run`` does, by process or from a finished storage."""

from __future__ import annotations

import itertools
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from rich.console import Console

    from optuna_ohgw.spec import StudySpec


def newly_named(
    spec: StudySpec, overrides: list[str] | None, load: Callable[[list[str]], StudySpec]
) -> tuple[StudySpec, list[str]]:
    """Return a study under the first of NAME, NAME-2, ... that is no other study's, and its overrides.

    One that has such a name already is found again. An output folder that is named gets the number, too.

    Args:
        spec: The study.
        overrides: Those it was read with.
        load: Overrides ↦ the study read with them.
    """
    name, output, changes = spec.name, spec.output, list(overrides or ())
    for number in itertools.count(2):
        if not _is_taken(spec):
            break
        changes = [*(overrides or ()), f"name={name}-{number}"]
        changes += [f"output={output}-{number}"] if output else []
        spec = load(changes)
    return spec, changes


def _is_taken(spec: StudySpec) -> bool:
    """Return whether the storage has another study of this name, or the output folder one of another name."""
    from optuna_ohgw.cells import check_cells, check_folder
    from optuna_ohgw.errors import AnotherStudy
    from optuna_ohgw.opening import open_storage, sqlite_path

    file = sqlite_path(spec.storage_url)
    try:
        check_folder(spec)
        if file is None or file.exists():
            check_cells(open_storage(spec.storage_url, create=True), spec)
    except AnotherStudy:
        return True
    return False


def train(spec: StudySpec, console: Console, crew: tuple[Any, ...], level: int) -> None:
    """Train all cells with a crew (workers, trials a device, engine, address); a stop is an exit status."""
    from optuna_ohgw import processes

    if crew[2] != "ray":
        processes.prepare()  # before the imports of this process, which take as long
    with processes.uncollected():
        from optuna_ohgw import runner, tracking
        from optuna_ohgw.fleet import Crew

    tracking.check_tracking(spec)
    try:
        runner.run(spec, console, level, Crew(*crew))
    except runner.Stopped as stopped:
        sys.stderr.write("stopped; run the same command to continue\n")
        raise typer.Exit(128 + stopped.number) from None


def report_at_the_end(spec: StudySpec, study: Path, smoke: bool, console: Console) -> None:
    """Write the report, send what is tracked, and print the summary."""
    from optuna_ohgw.processes import uncollected

    with uncollected():
        from filelock import FileLock

        from optuna_ohgw import tracking
        from optuna_ohgw.cells import cells_of
        from optuna_ohgw.report import report_study
        from optuna_ohgw.show import print_summary

    storage = existing(spec, wait=True)  # a server that restarts now would leave a study without its report
    with FileLock(spec.folder / ".report.lock"):  # two runs that share a study end at the same time
        page, files = report_study(storage, spec, study, smoke=smoke)
    if spec.tracking is not None:
        for cell in cells_of(spec):
            tracking.send_cell(storage, spec, cell)
        tracking.send_report(spec, files[0].parent)
    print_summary(page, console)


def look_further(spec: StudySpec, again: str, console: Console) -> None:
    """Print where a study can be looked at; ``again`` is its file with the options given."""
    from optuna_ohgw.show import print_lines

    look = (
        "",
        "Look further:",
        f"  {spec.folder / 'report' / 'report.html'}",
        f"  optuna-ohgw dashboard {again}",
        f"  optuna-ohgw status {again} --check-pairing",
        f"  {spec.folder}/VARIATION/seed-NNNN: best weights, learning curve, spec and logs",
    )
    print_lines(look, console)


def existing(spec: StudySpec, *, wait: bool = False) -> BaseStorage:
    """Return the storage of a study that was started, its cells checked.

    Args:
        spec: The study.
        wait: Whether a server that does not answer is waited for, as by a worker.

    Raises:
        UserError: If there is none, or it is of another study.
    """
    from optuna_ohgw.cells import check_cells
    from optuna_ohgw.errors import UserError
    from optuna_ohgw.opening import PATIENCE_S, open_storage

    patience_s = spec.execution.patience_s if wait else PATIENCE_S
    storage = open_storage(spec.storage_url, create=False, patience_s=patience_s, wait=wait)
    if not check_cells(storage, spec):
        raise UserError(
            f"storage: {spec.storage_url} holds no cell of {spec.name!r}; start it with 'optuna-ohgw run'"
        )
    return storage


def as_typed(study: Path, overrides: list[str] | None, smoke: bool, url: str | None) -> str:
    """Return a study file with the options given, to be typed after another command."""
    settings = [part for pair in overrides or () for part in ("--set", pair)]
    if url is not None and url != os.environ.get("OPTUNA_OHGW_STORAGE"):
        settings += ["--storage", url]
    return shlex.join([str(study), *settings, *(["--smoke"] if smoke else [])])
