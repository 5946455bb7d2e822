"""The command ``optuna-ohgw``: it parses and calls."""

from __future__ import annotations

import logging
import math
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

    from optuna_ohgw.spec import StudySpec

app = typer.Typer(
    help="One-shot hyper-gradient warm starts for Optuna: paired studies, run and read honestly.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

StudyFile = Annotated[Path, typer.Argument(help="The study's YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a value: --set seeds=2 --set task.data=FOLDER. Repeatable."),
]
Smoke = Annotated[bool, typer.Option("--smoke", help="The light form that the file's smoke section tells.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only errors.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="More in the logs.")]


@app.command()
def run(
    study: StudyFile,
    overrides: Overrides = None,
    smoke: Smoke = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train every variation of a study with paired seeds; run it again to continue."""
    console = _console(quiet=quiet)
    spec = _load(study, overrides, smoke)
    from optuna_ohgw import runner

    level = logging.DEBUG if verbose else logging.INFO
    try:
        ran = runner.run(spec, console, level)
    except runner.Stopped:
        sys.stderr.write("stopped; run the same command to continue\n")
        raise typer.Exit(130) from None
    if not ran:
        console.print(f"{spec.name} is finished; nothing was left to do")
    _show(spec, _again(study, overrides, smoke), console)


@app.command()
def status(
    study: StudyFile,
    overrides: Overrides = None,
    smoke: Smoke = False,
    check_pairing: Annotated[
        bool,
        typer.Option("--check-pairing", help="Recompute suggestions, weights and data order and compare."),
    ] = False,
) -> None:
    """Show how far a study is."""
    from optuna_ohgw.cells import cells_of, check_cells, open_storage
    from optuna_ohgw.errors import UserError

    spec = _load(study, overrides, smoke)
    storage = open_storage(spec.storage_url, create=False)
    if not check_cells(storage, spec):
        raise UserError(
            f"storage: {spec.storage_url} holds no cell of {spec.name!r}; start it with 'optuna-ohgw run'"
        )
    console = _console()
    _show_status(spec, storage, cells_of(spec), console)
    if check_pairing:
        from optuna_ohgw.pairing import check_pairing as check

        report = check(storage, spec)
        console.print(report.text())
        raise typer.Exit(0 if report.intact else 1)


@app.command()
def bench(
    what: Annotated[str, typer.Argument(help="warm-start or train.")] = "warm-start",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    repeats: Annotated[int, typer.Option(help="Timed repeats; the median counts.", min=3)] = 7,
) -> None:
    """Measure this machine; print ratios of one run."""
    from optuna_ohgw import bench as benchmarks
    from optuna_ohgw.errors import UserError
    from optuna_ohgw.runner import check_device

    check_device(device, "--device")
    if what not in benchmarks.BENCHMARKS:
        raise UserError(f"bench: {what!r} is unknown; use one of {', '.join(benchmarks.BENCHMARKS)}")
    benchmarks.BENCHMARKS[what](_console(), device, repeats)


def main() -> None:
    """Run the command; a user's mistake is one line and exit status 2."""
    from optuna_ohgw.errors import UserError

    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")
    try:
        app()
    except UserError as error:
        _say(error)
        raise SystemExit(2) from None
    except RuntimeError as error:
        _say(error)
        raise SystemExit(1) from None


def _say(error: Exception) -> None:
    from optuna_ohgw.reading import hide_passwords

    sys.stderr.write(f"error: {hide_passwords(' '.join(str(error).split()))}\n")


def _load(study: Path, overrides: list[str] | None, smoke: bool) -> StudySpec:
    import optuna

    from optuna_ohgw.spec import load_spec

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return load_spec(study, tuple(overrides or ()), smoke=smoke)


def _show(spec: StudySpec, arguments: str, console: Console) -> None:
    from optuna_ohgw import metrics, records
    from optuna_ohgw.cells import cells_of, open_storage
    from optuna_ohgw.reading import hide_passwords

    storage, cells = open_storage(spec.storage_url, create=False), cells_of(spec)
    epochs = records.epochs_table(storage, cells)
    pilot = metrics.pilot_target(epochs)
    targets = list(spec.targets) + ([pilot] if pilot is not None else [])
    table = metrics.summary(
        epochs, records.trials_table(storage, cells), records.finals_table(storage, cells), targets
    )
    _print_summary(spec, table, targets, pilot, console)
    lines = (
        "\nLook further:",
        f"  optuna-ohgw status {arguments} --check-pairing",
        f"  optuna-dashboard {shlex.quote(spec.storage_url)}",
        f"  {spec.folder}/VARIATION/seed-NNNN: best weights, learning curve, spec and logs",
    )
    for line in lines:
        console.print(hide_passwords(line), highlight=False, markup=False, soft_wrap=True)


def _print_summary(
    spec: StudySpec, table: pd.DataFrame, targets: list[float], pilot: float | None, console: Console
) -> None:
    from rich import box
    from rich.table import Table

    from optuna_ohgw.sampler import HISTORY_FREE

    pairing = "paired" if spec.sampler in HISTORY_FREE else "seed-paired only"
    shown = Table(
        title=f"{spec.name}: medians over {len(spec.seeds)} {pairing} seeds",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    shown.add_column("variation", no_wrap=True)
    for target in targets:
        star = "*" if target == pilot else ""
        shown.add_column(f"T@τ{star} (mbu)\nτ{star}={target:.4g}", justify="right", no_wrap=True)
    for name in ("best\nvalid.", "\ntest", "warm\nmbu", "start\nsec.", "\npruned"):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in table.to_dict("records"):
        cells = [_time(row[f"T@{t}"], row[f"reached@{t}"], row["cells"]) for t in targets]
        failed = f", {row['failed']} failed" if row["failed"] else ""
        shown.add_row(
            row["variation"],
            *cells,
            f"{row['validation']:.4f}",
            "-" if math.isnan(row["test"]) else f"{row['test']:.4f}",
            f"{row['overhead']:.1%}",
            f"{row['overhead_s']:.1%}",
            f"{row['pruned']}/{row['trials']}{failed}",
        )
    console.print(shown)
    console.print(
        "T@τ: mini-batch units until a cell first reaches τ, median (seeds that did / seeds);\n"
        "-: half or more did not. Warm start: its cost over that of training, in mbu and in seconds."
    )
    if pilot is not None:
        console.print("τ*: the highest target that at least 90% of the pilot's seeds reach.")


def _time(value: float, reached: int, cells: int) -> str:
    text = "-" if math.isinf(value) else f"{value:,.0f}"
    return f"{text} ({reached}/{cells})"


def _show_status(spec: StudySpec, storage: Any, cells: list[Any], console: Console) -> None:
    from rich import box
    from rich.table import Table

    from optuna_ohgw import records

    trials = records.trials_table(storage, cells)
    finals = records.finals_table(storage, cells)
    shown = Table(title=spec.name, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("cell", "running", "complete", "pruned", "failed", "best", "test"):
        shown.add_column(name, justify="left" if name == "cell" else "right")
    for cell in cells:
        variation = "pilot" if cell.pilot else cell.variation
        mine = (
            trials[(trials["variation"] == variation) & (trials["seed"] == cell.seed)]
            if len(trials)
            else trials
        )
        final = finals[(finals["variation"] == variation) & (finals["seed"] == cell.seed)]
        counts = mine["state"].value_counts() if len(mine) else {}
        done = [f"{final[c].iloc[0]:.4f}" if len(final) else "-" for c in ("val_accuracy", "test_accuracy")]
        numbers = [str(counts.get(state, 0)) for state in ("RUNNING", "COMPLETE", "PRUNED", "FAIL")]
        shown.add_row(cell.label, *numbers, *done)
    console.print(shown)


def _console(*, quiet: bool = False) -> Console:
    from rich.console import Console

    return Console(quiet=quiet, width=None if sys.stdout.isatty() else 100)


def _again(study: Path, overrides: list[str] | None, smoke: bool) -> str:
    settings = [part for pair in overrides or () for part in ("--set", pair)]
    return shlex.join([str(study), *settings, *(["--smoke"] if smoke else [])])
