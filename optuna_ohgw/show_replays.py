"""The command ``replay``: known learning curves under other schedulers, asked and shown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from optuna_ohgw import replays
from optuna_ohgw.errors import UserError
from optuna_ohgw.evidence import Evidence
from optuna_ohgw.schedulers import SCHEDULERS, Settings
from optuna_ohgw.schedulers.choosers import CHOOSERS
from optuna_ohgw.show import print_comparison_of_schedulers, print_lines, print_replays


@dataclass(frozen=True)
class Draw:
    """How tables are asked.

    Attributes:
        value: Column of the curves.
        skip: Entries before the first epoch.
        minimize: Whether lower is better.
        configs: Configurations started.
        seeds: Seeds of the draw.
        slices: Epochs in all, after which it stops; None: no limit.
    """

    value: str
    skip: int
    minimize: bool
    configs: int
    seeds: int
    slices: int | None


def known_schedulers(named: Sequence[str] | None) -> list[str]:
    """Return the names of the schedulers to ask; without any those that fit no model.

    Raises:
        UserError: If one is unknown.
    """
    known = (*SCHEDULERS, *CHOOSERS)
    for name in named or ():
        if name not in known:
            raise UserError(f"--scheduler: {name!r} is unknown; use some of {', '.join(known)}")
    return list(named or SCHEDULERS)


def over_tables(
    sources: Sequence[Path],
    names: Sequence[str],
    rungs: Mapping[str, int],
    draw: Draw,
    workers: int,
    console: Console,
) -> None:
    """Show what schedulers do with the curves of parquet tables.

    Args:
        sources: The tables.
        names: The schedulers.
        rungs: ``min_resource`` and ``reduction_factor`` where they are not the usual ones.
        draw: How they are asked.
        workers: Configurations trained at the same time.
        console: Where it is shown.

    Raises:
        UserError: If a table cannot be read, or a model would be fitted without a limit of slices.
    """
    tables = {source.stem: replays.read_table(source, draw.value, draw.skip) for source in sources}
    choosers = [name for name in names if name in CHOOSERS]
    if choosers and draw.slices is None:
        raise UserError(f"--scheduler {choosers[0]}: fits a model again and again; give --slices, say 300")
    candidates = {source.stem: replays.read_candidates(source) for source in sources} if choosers else None
    settings = Settings(max_resource=1, maximize=not draw.minimize, configs=draw.configs, **rungs)
    limit = math.inf if draw.slices is None else draw.slices
    runs = replays.over_tables(
        tables, names, settings, seeds=draw.seeds, workers=workers, slices=limit, candidates=candidates
    )
    print_comparison_of_schedulers(runs, workers, console)
    small = [f"{name} ({len(table)})" for name, table in tables.items() if len(table) < draw.configs]
    if small:
        print_lines([f"All configurations of {', '.join(small)}: fewer than {draw.configs}."], console)


def over_study(
    evidence: Evidence,
    names: Sequence[str],
    rungs: Mapping[str, int],
    workers: int,
    export: Path | None,
    console: Console,
) -> None:
    """Show what schedulers would have done with the curves of a study.

    Args:
        evidence: What the study shows.
        names: The schedulers.
        rungs: ``min_resource`` and ``reduction_factor`` where they are not the study's.
        workers: Configurations trained at the same time.
        export: Where the curves are written to as a table; None: nowhere.
        console: Where it is shown.
    """
    target = evidence.primary if evidence.primary is not None else evidence.spec.targets[0]
    runs = replays.over_study(evidence.records, names, workers=workers, target=target, rungs=rungs)
    print_replays(runs, target, workers, console)
    if export is not None:
        replays.export(evidence.records, export)
        print_lines([str(export)], console)
