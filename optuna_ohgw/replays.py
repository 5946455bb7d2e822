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
from optuna_ohgw.schedulers import SCHEDULERS, Scheduler, Settings
from optuna_ohgw.schedulers.choosers import CHOOSERS, check_installed
from optuna_ohgw.simulation import Array, Replay, finite_curves, regret, simulate

TABLE_COLUMNS = [
    *("table", "seed", "scheduler", "slices", "makespan", "reached_end", "regret", "selection_regret"),
    *("best_drawn", "t5", "t1"),
]
STUDY_COLUMNS = [
    *("variation", "seed", "scheduler", "configs", "slices", "makespan", "reached_end", "best"),
    *("time_to_target", "beyond"),
]
CURVE = "val_metric"


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
    if values.empty:
        raise UserError(f"{path}: has no rows; name a table of learning curves")
    for row, curve in enumerate(values):
        if not isinstance(curve, np.ndarray | list):
            raise UserError(
                f"{path}: column {column!r} holds {curve!s:.20} in row {row}, no curve; "
                "name one of lists by --value"
            )
    lengths = {len(curve) for curve in values}
    if len(lengths) != 1 or min(lengths) <= skip:
        raise UserError(
            f"{path}: curves of {column!r} have {min(lengths)} to {max(lengths)} entries, {skip} of them "
            "skipped; give curves of one length (those of a study end where it stopped them: give the study)"
        )
    return np.array(values.tolist(), dtype=float)[:, skip:]


def _check_finals(name: str, curves: Array, maximize: bool) -> None:
    """Raise a UserError where a table's final values allow no regret; NaN was replaced."""
    final = curves[:, -1]
    best = float(final.max() if maximize else final.min())
    if not np.isfinite(final).all():
        raise UserError(f"{name}: no value is a number; name another column by --value")
    if np.median(final) == best:
        raise UserError(
            f"{name}: at least half of the final values are the best one, {best:g}, so no "
            "regret can be said; give a table where fewer are"
        )


def read_candidates(path: Path) -> Array:
    """Return the hyper-parameters of a parquet file in the unit cube, ``[n, d]``.

    They are its columns of finite numbers that differ. One whose values are all positive is taken by
    its logarithm; each goes from 0 at its lowest value to 1 at its highest.

    Raises:
        UserError: If there is no such column.
    """
    numbers = pd.read_parquet(path).select_dtypes("number")
    columns = [c for c in numbers if np.isfinite(numbers[c]).all() and numbers[c].nunique() > 1]
    if not columns:
        raise UserError(f"{path}: has no column of hyper-parameters, which this scheduler chooses by")
    values = numbers[columns].to_numpy(dtype=float, copy=True)
    positive = values.min(axis=0) > 0
    values[:, positive] = np.log(values[:, positive])
    low, high = values.min(axis=0), values.max(axis=0)
    return np.asarray((values - low) / (high - low))


def _made(name: str, settings: Settings, candidates: Array | None, seed: int) -> Scheduler:
    if name in SCHEDULERS:
        return SCHEDULERS[name](settings)
    if candidates is None:
        raise ValueError(f"{name} needs candidates")
    check_installed(name, "--scheduler")
    return CHOOSERS[name](settings, candidates, seed)


def over_tables(
    tables: Mapping[str, Array],
    schedulers: Sequence[str],
    settings: Settings,
    *,
    seeds: int,
    workers: int,
    slices: float = math.inf,
    candidates: Mapping[str, Array] | None = None,
) -> pd.DataFrame:
    """Return one row a table, seed and scheduler.

    Seed s draws the configurations by ``numpy.random.RandomState(1000 + s).permutation``, the same
    for all schedulers. NaN, and all after it, counts as the table's worst finite value.

    Args:
        tables: Curves by name.
        schedulers: Names from ``SCHEDULERS`` or ``CHOOSERS``.
        settings: Of all schedulers; its ``max_resource`` is that of each table.
        seeds: Number of seeds.
        workers: Configurations trained at the same time.
        slices: Stop after so many units of training.
        candidates: Hyper-parameters ``[n, d]`` of each table in the unit cube, for ``CHOOSERS``.

    Returns:
        ``slices`` (units of training), ``makespan`` (units of time), ``reached_end`` (configurations
        trained to the end), ``regret`` of what is returned (see :func:`simulation.regret`),
        ``selection_regret`` (less that of the best drawn), ``best_drawn`` (whether that is returned),
        ``t5`` and ``t1`` (time until a value as good as the best 5% and 1% of final values; ∞: never).
    """
    rows, maximize = [], settings.maximize
    for name, table in tables.items():
        curves = finite_curves(table, maximize=maximize)
        _check_finals(name, curves, maximize)
        ranked = np.sort(-curves[:, -1] if maximize else curves[:, -1])
        sign = -1 if maximize else 1
        bars = [sign * float(ranked[max(math.ceil(len(ranked) * share) - 1, 0)]) for share in (0.05, 0.01)]
        for seed in range(seeds):
            order = np.random.RandomState(1000 + seed).permutation(len(curves))[: settings.configs].tolist()
            settings = replace(settings, max_resource=curves.shape[1], configs=len(order))
            best = min(regret(curves, row, maximize=maximize) for row in order)
            for scheduler in schedulers:
                pool = None if candidates is None else candidates[name][order]
                made = _made(scheduler, settings, pool, seed)
                replay = simulate(made, curves, order, workers=workers, max_slices=slices)
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


def over_study(
    records: Records,
    schedulers: Sequence[str],
    *,
    workers: int,
    target: float,
    rungs: Mapping[str, int] | None = None,
) -> pd.DataFrame:
    """Return what schedulers would have done in each cell of a study, with the curves that it has.

    A configuration that the study stopped is known up to there; a scheduler that would have trained
    it further gets no more of it, and is said to have asked ``beyond``. One that chooses by a model
    does so among the cell's configurations and has as many epochs as the cell had.

    Args:
        records: The study.
        schedulers: Names from ``SCHEDULERS`` or ``CHOOSERS``.
        workers: Configurations trained at the same time.
        target: Value of the study's metric whose time is asked.
        rungs: ``min_resource`` and ``reduction_factor`` in place of the study's own.

    Returns:
        One row a variation, seed and scheduler; times in epochs.

    Raises:
        UserError: If ``min_resource`` is more than the study's epochs.
    """
    spec, metric, rows = records.spec, records.spec.metric, []
    own = {**spec.scheduler.model_dump(exclude={"name"}), **(rungs or {})}
    if own["min_resource"] > spec.task.epochs:
        raise UserError(
            f"--min-resource: {own['min_resource']} is more than task.epochs, which is {spec.task.epochs}"
        )
    for (variation, seed), curves in curves_of(records):
        settings = Settings(spec.task.epochs, maximize=metric.maximize, configs=len(curves), **own)
        for name in schedulers:
            pool = _trained(records, variation, seed) if name in CHOOSERS else None
            made, order = _made(name, settings, pool, seed), range(len(curves))
            limit = math.inf if pool is None else sum(map(len, curves))
            replay = simulate(made, curves, order, workers=workers, max_slices=limit, resumes_last=True)
            best = metric.best(replay.values)
            cost = replay.slices, replay.makespan, _reached(replay, spec.task.epochs)
            reached = replay.time_to(target, maximize=metric.maximize)
            rows.append((variation, seed, name, len(curves), *cost, best, reached, len(set(replay.beyond))))
    return pd.DataFrame(rows, columns=STUDY_COLUMNS)


def curves_of(records: Records) -> Iterator[tuple[tuple[str, int], list[list[float]]]]:
    """Yield variation, seed and the validation values of its configurations, in their order."""
    counted = records.steps[records.steps["counted"].astype(bool)].sort_values(["config_index", "epoch"])
    for _, own in counted.groupby(["variation", "seed"], sort=False):
        key = str(own["variation"].iloc[0]), int(own["seed"].iloc[0])
        yield key, [g[CURVE].tolist() for _, g in own.groupby("config_index")]


def _trained(records: Records, variation: str, seed: int) -> Array:
    """Return the trained hyper-parameters of a cell's configurations in the unit cube, in their order."""
    trials = records.trials[records.trials["counted"].astype(bool) & (records.trials["epochs"] > 0)]
    own = trials[(trials["variation"] == variation) & (trials["seed"] == seed)].sort_values("config_index")
    columns = []
    for name, r in records.spec.ranges.items():
        values = own[f"trained_{name}"].to_numpy(dtype=float)
        low, high = r.low, r.high
        if r.log:
            values, low, high = np.log(values), math.log(low), math.log(high)
        columns.append(np.clip((values - low) / (high - low), 0.0, 1.0))
    return np.stack(columns, axis=1)


def export(records: Records, path: Path) -> None:
    """Write the curves of a study as a table for :func:`read_table`, one row a configuration.

    Columns: variation, seed, config_index, what was suggested and trained, ``batches_per_epoch``,
    ``warm_mbu``, ``warm_s`` and ``epoch_s`` (median seconds of an epoch with its evaluation), the curve.
    """
    counted = records.steps[records.steps["counted"].astype(bool)].sort_values("epoch")
    keys = ["variation", "seed", "config_index"]
    curves = counted.groupby(keys, sort=False)[CURVE].apply(list).reset_index()
    trials = records.trials[records.trials["counted"].astype(bool)]
    names = [f"{kind}_{n}" for kind in ("suggested", "trained") for n in records.spec.ranges]
    known = trials[[*keys, *names, "batches_per_epoch", "warm_mbu", "warm_s"]].drop_duplicates(keys)
    seconds = (counted["train_s"] + counted["eval_s"]).groupby([counted[k] for k in keys]).median()
    table = curves.merge(known, on=keys, how="left").join(seconds.rename("epoch_s"), on=keys)
    table.to_parquet(path, index=False)


def _reached(replay: Replay, end: int) -> int:
    return sum(resource == end for resource in replay.final_resources().values())
