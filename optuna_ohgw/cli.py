"""The command ``optuna-ohgw``: it parses and calls."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from optuna_ohgw.run_study import as_typed, existing, look_further, newly_named, report_at_the_end, train

if TYPE_CHECKING:
    from rich.console import Console

    from optuna_ohgw.collection import Member
    from optuna_ohgw.evidence import Evidence
    from optuna_ohgw.spec import StudySpec
    from optuna_ohgw.status import Status

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
StorageUrl = Annotated[
    str | None,
    typer.Option(
        "--storage",
        help="URL of the storage in place of the study's own.",
        envvar="OPTUNA_OHGW_STORAGE",
        show_default=False,
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only errors.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="More in the logs.")]


@app.command()
def run(
    study: StudyFile,
    overrides: Overrides = None,
    smoke: Smoke = False,
    url: StorageUrl = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Worker processes on this machine.", min=1, show_default="as the study says"),
    ] = None,
    trials_per_device: Annotated[
        int | None, typer.Option(help="Workers that share a GPU.", min=1, show_default=False)
    ] = None,
    engine: Annotated[str, typer.Option(help="processes of this machine, or ray.")] = "processes",
    address: Annotated[
        str | None, typer.Option(help="Of a Ray cluster, such as auto.", show_default="one of this machine")
    ] = None,
    force_new_name: Annotated[
        bool,
        typer.Option("--force-new-name", help="A study that was changed since is a new one, NAME-2."),
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train every variation of a study with paired seeds; run it again, or on more machines, to go on."""
    console = _console(quiet=quiet)
    spec = _load(study, overrides, smoke, url)
    if force_new_name:
        spec, overrides = newly_named(spec, overrides, lambda given: _load(study, given, smoke, url))
    from optuna_ohgw.errors import UserError
    from optuna_ohgw.finished import has_report, is_finished

    if address is not None and engine != "ray":
        raise UserError(f"--address: {address!r} is for --engine ray; add it, or drop the address")

    folder = spec.folder / "report"
    if is_finished(spec):
        console.print(f"{spec.name} is finished; nothing was left to do")
        if spec.tracking is None and has_report(spec, folder):  # else what is not sent yet is
            look_further(spec, as_typed(study, overrides, smoke, url), console)
            return
    else:
        crew = workers, trials_per_device, engine, address
        train(spec, console, crew, logging.DEBUG if verbose else logging.INFO)
    report_at_the_end(spec, study, smoke, console)
    look_further(spec, as_typed(study, overrides, smoke, url), console)


@app.command()
def status(
    study: StudyFile,
    overrides: Overrides = None,
    smoke: Smoke = False,
    url: StorageUrl = None,
    watch: Annotated[bool, typer.Option("--watch", help="Again and again, until Ctrl-C or the end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="A line of JSON.")] = False,
    cells: Annotated[bool, typer.Option("--cells", help="Every cell, of a large study, too.")] = False,
    check_pairing: Annotated[
        bool,
        typer.Option("--check-pairing", help="Recompute suggestions, weights and data order and compare."),
    ] = False,
) -> None:
    """Show how far a study is, and who works on it."""
    from optuna_ohgw import show_status
    from optuna_ohgw.claims import Pulse
    from optuna_ohgw.status import read_status

    spec = _load(study, overrides, smoke, url)
    storage, console, pulse = existing(spec), _console(), Pulse()

    def read() -> Status:
        return read_status(storage, spec, pulse)

    if watch:
        show_status.watch(read, console, all_cells=cells, as_json=as_json)
    elif not as_json:
        console.print(show_status.blocks(read(), all_cells=cells), highlight=False)
    paired = None
    if check_pairing:
        from optuna_ohgw.pairing import check_pairing as check

        paired = check(storage, spec)
    if as_json and (paired is not None or not watch):
        typer.echo(show_status.line(read(), None if paired is None else paired.as_dict()))
    if paired is not None:
        if not as_json:
            console.print(paired.text(), markup=False, emoji=False)
        raise typer.Exit(0 if paired.intact else 1)


@app.command()
def report(
    study: StudyFile,
    overrides: Overrides = None,
    smoke: Smoke = False,
    url: StorageUrl = None,
    pdf: Annotated[bool, typer.Option("--pdf", help="Export every figure for a paper, too.")] = False,
) -> None:
    """Write what a study shows: HTML, JSON, parquet, CSV, LaTeX; also while it runs."""
    from optuna_ohgw.report import report_study
    from optuna_ohgw.show import print_lines, print_summary

    spec, console = _load(study, overrides, smoke, url), _console()
    page, files = report_study(existing(spec), spec, study, smoke=smoke, pdf=pdf)
    print_summary(page, console)
    print_lines(["", *map(str, files)], console)


@app.command()
def dashboard(
    study: StudyFile,
    overrides: Overrides = None,
    smoke: Smoke = False,
    url: StorageUrl = None,
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1.", min=1, max=65535)] = 8080,
) -> None:
    """Open optuna-dashboard on a study, with the report's figures attached; also while it runs."""
    from optuna_ohgw import dashboard as boards
    from optuna_ohgw.report import markdown, open_page
    from optuna_ohgw.show import print_lines

    spec, console = _load(study, overrides, smoke, url), _console()
    storage = existing(spec)
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


@app.command("list")
def list_choices() -> None:
    """Show tasks, models, schedulers, estimators and step rules, a line each."""
    from optuna_ohgw.listing import print_choices

    print_choices(_console())


@app.command()
def explain(
    study: StudyFile,
    cell: Annotated[str, typer.Argument(help="As status shows it, such as asha-baseline/seed-0000.")],
    trial: Annotated[int, typer.Argument(help="Number of the trial.", min=0)],
    overrides: Overrides = None,
    smoke: Smoke = False,
    url: StorageUrl = None,
) -> None:
    """Show why a trial went on, paused or stopped: rung, value, cut-off, rank, rule."""
    from optuna_ohgw.cells import cells_of
    from optuna_ohgw.errors import UserError
    from optuna_ohgw.show import print_lines
    from optuna_ohgw.why import why

    spec = _load(study, overrides, smoke, url)
    storage = existing(spec)
    known = {c.label: c for c in cells_of(spec)}
    cell = cell if cell in known else f"{spec.scheduler.name}-{cell}"
    if cell not in known:
        raise UserError(f"explain: {cell!r} is no cell of the study; use one of {', '.join(known)}")
    print_lines(why(storage, spec, known[cell], trial), _console())


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
        typer.Option(help="asha, pasha, dyhpo, ...; again for more; those without a model unless named."),
    ] = None,
    overrides: Overrides = None,
    smoke: Smoke = False,
    url: StorageUrl = None,
    workers: Annotated[int, typer.Option(help="Configurations trained at the same time.", min=1)] = 1,
    seeds: Annotated[int, typer.Option(help="Tables: seeds of the draw.", min=1)] = 20,
    configs: Annotated[int, typer.Option(help="Tables: configurations started.", min=2)] = 256,
    slices: Annotated[
        int | None, typer.Option(help="Tables: epochs in all, then stop.", min=1, show_default=False)
    ] = None,
    min_resource: Annotated[
        int | None,
        typer.Option(help="First rung, in epochs; else the study's, 1.", min=1, show_default=False),
    ] = None,
    reduction_factor: Annotated[
        int | None,
        typer.Option(help="η, from rung to rung; else the study's, 3.", min=2, show_default=False),
    ] = None,
    value: Annotated[str, typer.Option(help="Tables: column of the curves.")] = "val_metric",
    skip: Annotated[int, typer.Option(help="Tables: entries before the first epoch.", min=0)] = 0,
    minimize: Annotated[bool, typer.Option("--minimize", help="Tables: lower is better.")] = False,
    export: Annotated[
        Path | None, typer.Option(help="A study: write its curves as such a table.", show_default=False)
    ] = None,
) -> None:
    """Show what other schedulers would have done with known learning curves."""
    from optuna_ohgw import show_replays
    from optuna_ohgw.errors import UserError

    given = {"min_resource": min_resource, "reduction_factor": reduction_factor}
    rungs = {name: number for name, number in given.items() if number is not None}
    names, console = show_replays.known_schedulers(scheduler), _console()
    if all(source.suffix == ".parquet" for source in sources):
        if export is not None:
            raise UserError("--export: is for the curves of a study; tables are such files already")
        if overrides or smoke:
            raise UserError(f"{'--set' if overrides else '--smoke'}: is for a study, not for tables; drop it")
        drawn = show_replays.Draw(value, skip, minimize, configs, seeds, slices)
        show_replays.over_tables(sources, names, rungs, drawn, workers, console)
    elif len(sources) > 1:
        raise UserError(f"replay: got {len(sources)} files; name one study file, or parquet tables alone")
    else:
        evidence = _evidence(sources[0], overrides, smoke, url)
        show_replays.over_study(evidence, names, rungs, workers, export, console)


@app.command()
def doctor(
    study: Annotated[
        Path | None, typer.Argument(help="A study's YAML file; without one the machine alone is looked at.")
    ] = None,
    overrides: Overrides = None,
    smoke: Smoke = False,
    url: StorageUrl = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Worker processes on this machine.", min=1, show_default="as the study says"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
) -> None:
    """Check versions, devices, storage, data, disk and limits; say what to mend, exit 1 if any fails."""
    from optuna_ohgw.doctor import diagnose, table
    from optuna_ohgw.errors import UserError

    given = {"--set": overrides, "--smoke": smoke, "--workers": workers}
    if study is None and any(given.values()):
        option = next(name for name, value in given.items() if value)
        raise UserError(f"{option}: is for a study; name its file")
    checks = diagnose(None if study is None else _load(study, overrides, smoke, url), workers)
    if as_json:
        typer.echo(table.as_json(checks))
    else:
        table.print_checks(checks, _console())
    raise typer.Exit(int(any(check.outcome == "fail" for check in checks)))


@app.command()
def bench(
    what: Annotated[
        str, typer.Argument(help="warm-start, train, run, growth, decisions or workers.")
    ] = "warm-start",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    repeats: Annotated[int, typer.Option(help="Timed repeats; the median counts.", min=3)] = 7,
) -> None:
    """Measure this machine; print ratios of one run."""
    from optuna_ohgw import bench as benchmarks
    from optuna_ohgw.device import check_device
    from optuna_ohgw.errors import UserError

    check_device(device, "--device")
    if what not in benchmarks.BENCHMARKS:
        raise UserError(f"bench: {what!r} is unknown; use one of {', '.join(benchmarks.BENCHMARKS)}")
    benchmarks.BENCHMARKS[what](_console(), device, repeats)


def main() -> None:
    """Run the command; a user's mistake is one line and exit status 2."""
    from optuna_ohgw import collection
    from optuna_ohgw.errors import StorageLost, UserError

    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler, in bench, reports its own steps
    try:
        if (called := collection.call(sys.argv[1:], _compare)) is not None:
            raise SystemExit(called)
        app()
    except UserError as error:
        _say(error)
        raise SystemExit(2) from None
    except StorageLost as error:
        _say(error)
        raise SystemExit(3) from None
    except RuntimeError as error:
        _say(error)
        raise SystemExit(1) from None
    except KeyboardInterrupt:  # between the studies of a collection; within one the command tells of it
        raise SystemExit(130) from None


def _compare(members: Sequence[Member], smoke: bool, url: str | None, quiet: bool) -> None:
    from optuna_ohgw.show import print_comparison

    evidence = [_evidence(m.path, list(m.overrides), smoke, url) for m in members]
    print_comparison(evidence, _console(quiet=quiet))


def _say(error: Exception) -> None:
    from optuna_ohgw.reading import hide_passwords

    sys.stderr.write(f"error: {hide_passwords(' '.join(str(error).split()))}\n")


def _load(study: Path, overrides: list[str] | None, smoke: bool, url: str | None = None) -> StudySpec:
    import optuna

    from optuna_ohgw.errors import UserError
    from optuna_ohgw.spec import load_spec

    if url is not None and not url.strip():
        raise UserError("--storage: is empty; give a URL, or leave it out for that of the study")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return load_spec(study, tuple(overrides or ()), smoke=smoke, storage=url)


def _evidence(study: Path, overrides: list[str] | None, smoke: bool, url: str | None = None) -> Evidence:
    from optuna_ohgw.report import open_page

    spec = _load(study, overrides, smoke, url)
    return open_page(existing(spec), spec, study, smoke=smoke).evidence


def _console(*, quiet: bool = False) -> Console:
    from rich.console import Console

    return Console(quiet=quiet, width=None if sys.stdout.isatty() else 100)
