"""The command ``optuna-ohgw``: it parses and calls."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from rich.console import Console

    from optuna_ohgw.evidence import Evidence
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
    from optuna_ohgw import processes

    processes.prepare()  # before the imports of this process, which take as long
    from optuna_ohgw import runner, tracking

    tracking.check_tracking(spec)
    level = logging.DEBUG if verbose else logging.INFO
    try:
        ran = runner.run(spec, console, level)
    except runner.Stopped:
        sys.stderr.write("stopped; run the same command to continue\n")
        raise typer.Exit(130) from None
    if not ran:
        console.print(f"{spec.name} is finished; nothing was left to do")
    from optuna_ohgw.cells import cells_of
    from optuna_ohgw.report import report_study
    from optuna_ohgw.show import print_lines, print_summary

    storage = _existing(spec)
    page, files = report_study(storage, spec, study, smoke=smoke)
    if spec.tracking is not None:
        for cell in cells_of(spec):
            tracking.send_cell(storage, spec, cell)
        tracking.send_report(spec, files[0].parent)
    again = _again(study, overrides, smoke)
    print_summary(page, console)
    look = (
        "",
        "Look further:",
        f"  {files[0]}",
        f"  optuna-ohgw dashboard {again}",
        f"  optuna-ohgw status {again} --check-pairing",
        f"  {spec.folder}/VARIATION/seed-NNNN: best weights, learning curve, spec and logs",
    )
    print_lines(look, console)


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
    from optuna_ohgw.records import read_records
    from optuna_ohgw.show import print_status

    spec = _load(study, overrides, smoke)
    storage, console = _existing(spec), _console()
    print_status(read_records(storage, spec), console)
    if check_pairing:
        from optuna_ohgw.pairing import check_pairing as check

        report = check(storage, spec)
        console.print(report.text())
        raise typer.Exit(0 if report.intact else 1)


@app.command()
def report(
    study: StudyFile,
    overrides: Overrides = None,
    smoke: Smoke = False,
    pdf: Annotated[bool, typer.Option("--pdf", help="Export every figure for a paper, too.")] = False,
) -> None:
    """Write what a study shows: HTML, JSON, parquet, CSV, LaTeX; also while it runs."""
    from optuna_ohgw.report import report_study
    from optuna_ohgw.show import print_lines, print_summary

    spec, console = _load(study, overrides, smoke), _console()
    page, files = report_study(_existing(spec), spec, study, smoke=smoke, pdf=pdf)
    print_summary(page, console)
    print_lines(["", *map(str, files)], console)


@app.command()
def dashboard(
    study: StudyFile,
    overrides: Overrides = None,
    smoke: Smoke = False,
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1.", min=1, max=65535)] = 8080,
) -> None:
    """Open optuna-dashboard on a study, with the report's figures attached; also while it runs."""
    from optuna_ohgw import dashboard as boards
    from optuna_ohgw.report import markdown, open_page
    from optuna_ohgw.show import print_lines

    spec, console = _load(study, overrides, smoke), _console()
    storage = _existing(spec)
    boards.check_port(port)

    def attach() -> None:
        page = open_page(storage, spec, study, smoke=smoke)
        boards.attach(storage, spec, page.cell_figures(), page.figures, markdown(page))

    attach()
    print_lines(
        [f"http://127.0.0.1:{port}/dashboard/ (Ctrl-C ends it); the verdict is in {spec.name}/summary"],
        console,
    )
    boards.serve(storage, "127.0.0.1", port, attach)


@app.command()
def compare(
    studies: Annotated[list[Path], typer.Argument(help="Two or more study files.", show_default=False)],
    smoke: Smoke = False,
) -> None:
    """Show the published criteria over several studies."""
    from optuna_ohgw.errors import UserError
    from optuna_ohgw.show import print_comparison

    if len(studies) < 2:
        raise UserError(f"compare: got {len(studies)} study file; name two or more")
    print_comparison([_evidence(study, None, smoke) for study in studies], _console())


@app.command()
def replay(
    sources: Annotated[
        list[Path],
        typer.Argument(
            help="A study file, or parquet tables of learning curves.", metavar="FILE...", show_default=False
        ),
    ],
    scheduler: Annotated[
        list[str] | None,
        typer.Option(help="asha, asha-promotion, pasha, ...; again for more; all unless named."),
    ] = None,
    overrides: Overrides = None,
    smoke: Smoke = False,
    workers: Annotated[int, typer.Option(help="Configurations trained at the same time.", min=1)] = 1,
    seeds: Annotated[int, typer.Option(help="Tables: seeds of the draw.", min=1)] = 20,
    configs: Annotated[int, typer.Option(help="Tables: configurations started.", min=2)] = 256,
    value: Annotated[str, typer.Option(help="Tables: column of the curves.")] = "val_accuracy",
    skip: Annotated[int, typer.Option(help="Tables: entries before the first epoch.", min=0)] = 0,
    minimize: Annotated[bool, typer.Option("--minimize", help="Tables: lower is better.")] = False,
    export: Annotated[
        Path | None, typer.Option(help="A study: write its curves as such a table.", show_default=False)
    ] = None,
) -> None:
    """Show what other schedulers would have done with known learning curves."""
    from optuna_ohgw import replays
    from optuna_ohgw.errors import UserError
    from optuna_ohgw.schedulers import SCHEDULERS, Settings
    from optuna_ohgw.show import print_comparison_of_schedulers, print_lines, print_replays

    names = scheduler or list(SCHEDULERS)
    for name in names:
        if name not in SCHEDULERS:
            raise UserError(f"--scheduler: {name!r} is unknown; use some of {', '.join(SCHEDULERS)}")
    if all(source.suffix == ".parquet" for source in sources):
        if export is not None:
            raise UserError("--export: is for the curves of a study; tables are such files already")
        tables = {source.stem: replays.read_table(source, value, skip) for source in sources}
        settings = Settings(max_resource=1, maximize=not minimize, configs=configs)
        runs = replays.over_tables(tables, names, settings, seeds=seeds, workers=workers)
        print_comparison_of_schedulers(runs, workers, _console())
        return
    if len(sources) > 1:
        raise UserError(f"replay: got {len(sources)} files; name one study file, or parquet tables alone")
    evidence = _evidence(sources[0], overrides, smoke)
    target = evidence.primary if evidence.primary is not None else evidence.spec.targets[0]
    runs = replays.over_study(evidence.records, names, workers=workers, target=target)
    print_replays(runs, target, workers, _console())
    if export is not None:
        replays.export(evidence.records, export)
        print_lines([str(export)], _console())


@app.command()
def bench(
    what: Annotated[str, typer.Argument(help="warm-start, train, run or growth.")] = "warm-start",
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
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler, in bench, reports its own steps
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


def _evidence(study: Path, overrides: list[str] | None, smoke: bool) -> Evidence:
    from optuna_ohgw.report import open_page

    spec = _load(study, overrides, smoke)
    return open_page(_existing(spec), spec, study, smoke=smoke).evidence


def _existing(spec: StudySpec) -> BaseStorage:
    from optuna_ohgw.cells import check_cells, open_storage
    from optuna_ohgw.errors import UserError

    storage = open_storage(spec.storage_url, create=False)
    if not check_cells(storage, spec):
        raise UserError(
            f"storage: {spec.storage_url} holds no cell of {spec.name!r}; start it with 'optuna-ohgw run'"
        )
    return storage


def _console(*, quiet: bool = False) -> Console:
    from rich.console import Console

    return Console(quiet=quiet, width=None if sys.stdout.isatty() else 100)


def _again(study: Path, overrides: list[str] | None, smoke: bool) -> str:
    settings = [part for pair in overrides or () for part in ("--set", pair)]
    return shlex.join([str(study), *settings, *(["--smoke"] if smoke else [])])
