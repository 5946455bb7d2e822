"""What other schedulers would have done: replays over tables of learning curves and finished studies."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from optuna_ohgw.errors import UserError
from optuna_ohgw.records import Records
from optuna_ohgw.schedulers import SCHEDULERS, Settings
from optuna_ohgw.simulation import Array, Replay, finite_curves, regret, simulate

TABLE_COLUMNS = [
    *("table", "seed", "scheduler", "slices", "makespan", "reached_end", "regret", "selection_regret"),
    *("best_drawn", "t5", "t1"),
]
STUDY_COLUMNS = [
    *("variation", "seed", "scheduler", "configs", "slices", "makespan", "reached_end", "best"),
    *("time_to_target", "beyond"),
]
CURVE = "val_accuracy"


def read_table(path: Path, column: str, skip: int = 0) -> Array:
    """Return the learning curves of a parquet file, ``[n, resource]``; the first is after one unit.

    Args:
        path: A table with one row a configuration; further columns, such as hyper-parameters, are
            left alone.
        column: Name of the column of curves, lists of equal length.
        skip: Entries before the first unit of training, such as a value at initialisation.

    Raises:
        UserError: If the file or the column cannot be read so, naming the remedy.
    """
    try:
        values = pd.read_parquet(path, columns=[column])[column]
    except FileNotFoundError:
        raise UserError(f"{path}: does not exist; name a parquet file of learning curves") from None
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"{path}: column {column!r} cannot be read ({first}); name it by --value") from None
    lengths = {len(curve) for curve in values}
    if len(lengths) != 1 or min(lengths) <= skip:
        raise UserError(
            f"{path}: curves of {column!r} have {min(lengths)} to {max(lengths)} entries, {skip} of them "
            "skipped; give curves of one length (those of a study end where it stopped them: give the study)"
        )
    return np.array(values.tolist(), dtype=float)[:, skip:]


def over_tables(
    tables: Mapping[str, Array],
    schedulers: Sequence[str],
    settings: Settings,
    *,
    seeds: int,
    workers: int,
) -> pd.DataFrame:
    """Return one row a table, seed and scheduler.

    Seed s draws the configurations by ``numpy.random.RandomState(1000 + s).permutation``, the same
    for all schedulers. NaN, and all after it, counts as the table's worst finite value.

    Args:
        tables: Curves by name.
        schedulers: Names from ``SCHEDULERS``.
        settings: Of all schedulers; its ``max_resource`` is that of each table.
        seeds: Number of seeds.
        workers: Configurations trained at the same time.

    Returns:
        ``slices`` (units of training), ``makespan`` (units of time), ``reached_end`` (configurations
        trained to the end), ``regret`` of what is returned (see :func:`simulation.regret`),
        ``selection_regret`` (less that of the best drawn), ``best_drawn`` (whether that is returned),
        ``t5`` and ``t1`` (time until a value as good as the best 5% and 1% of final values; ∞: never).
    """
    rows, maximize = [], settings.maximize
    for name, table in tables.items():
        curves = finite_curves(table, maximize=maximize)
        ranked = np.sort(-curves[:, -1] if maximize else curves[:, -1])
        sign = -1 if maximize else 1
        bars = [sign * float(ranked[max(math.ceil(len(ranked) * share) - 1, 0)]) for share in (0.05, 0.01)]
        for seed in range(seeds):
            order = np.random.RandomState(1000 + seed).permutation(len(curves))[: settings.configs].tolist()
            settings = replace(settings, max_resource=curves.shape[1], configs=len(order))
            best = min(regret(curves, row, maximize=maximize) for row in order)
            for scheduler in schedulers:
                replay = simulate(SCHEDULERS[scheduler](settings), curves, order, workers=workers)
                own = regret(curves, replay.returned(maximize), maximize=maximize)
                key = name, seed, scheduler
                cost = replay.slices, replay.makespan, _reached(replay, curves.shape[1])
                times = [replay.time_to(bar, maximize) for bar in bars]
                rows.append((*key, *cost, own, own - best, own == best, *times))
    return pd.DataFrame(rows, columns=TABLE_COLUMNS)


def comparison(runs: pd.DataFrame) -> pd.DataFrame:
    """Return one row a scheduler: medians over tables and seeds, means of the regret and of its zeros.

    Args:
        runs: What :func:`over_tables` returns.
    """
    groups = runs.groupby("scheduler", sort=False)
    columns = {"slices": "median", "makespan": "median", "reached_end": "median"}
    columns |= {"selection_regret": "mean", "best_drawn": "mean", "t5": "median", "t1": "median"}
    return groups.agg(columns).assign(runs=groups.size()).reset_index()


def over_study(records: Records, schedulers: Sequence[str], *, workers: int, target: float) -> pd.DataFrame:
    """Return what schedulers would have done in each cell of a study, with the curves that it has.

    A configuration that the study stopped is known up to there; a scheduler that would have trained
    it further gets no more of it, and is said to have asked ``beyond``.

    Args:
        records: The study.
        schedulers: Names from ``SCHEDULERS``; rungs and η are the study's.
        workers: Configurations trained at the same time.
        target: Validation accuracy whose time is asked.

    Returns:
        One row a variation, seed and scheduler; times in epochs.
    """
    spec, rows = records.spec, []
    for (variation, seed), curves in curves_of(records):
        rungs = spec.scheduler.model_dump(exclude={"name"})
        settings = Settings(spec.task.epochs, maximize=True, configs=len(curves), **rungs)
        for name in schedulers:
            replay = simulate(SCHEDULERS[name](settings), curves, range(len(curves)), workers=workers)
            best = max((v for v in replay.values if not math.isnan(v)), default=math.nan)
            cost = replay.slices, replay.makespan, _reached(replay, spec.task.epochs)
            reached = replay.time_to(target, maximize=True)
            rows.append((variation, seed, name, len(curves), *cost, best, reached, len(set(replay.beyond))))
    return pd.DataFrame(rows, columns=STUDY_COLUMNS)


def curves_of(records: Records) -> Iterator[tuple[tuple[str, int], list[list[float]]]]:
    """Yield variation, seed and the validation accuracies of its configurations, in their order."""
    counted = records.steps[records.steps["counted"].astype(bool)].sort_values(["config_index", "epoch"])
    for _, own in counted.groupby(["variation", "seed"], sort=False):
        key = str(own["variation"].iloc[0]), int(own["seed"].iloc[0])
        yield key, [g[CURVE].tolist() for _, g in own.groupby("config_index")]


def export(records: Records, path: Path) -> None:
    """Write the curves of a study as a table for :func:`read_table`, one row a configuration.

    Columns: variation, seed, config_index, the trained hyper-parameters and the curve.
    """
    counted = records.steps[records.steps["counted"].astype(bool)].sort_values("epoch")
    keys = ["variation", "seed", "config_index"]
    curves = counted.groupby(keys, sort=False)[CURVE].apply(list).reset_index()
    trials = records.trials[records.trials["counted"].astype(bool)]
    names = [f"trained_{n}" for n in records.spec.ranges]
    known = [*keys, *(n for n in names if n in trials)]
    curves.merge(trials[known].drop_duplicates(keys), on=keys, how="left").to_parquet(path, index=False)


def _reached(replay: Replay, end: int) -> int:
    return sum(resource == end for resource in replay.final_resources().values())
