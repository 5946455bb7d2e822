"""A study's records brought together: what was reached, what it cost, what it shows, what is missing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from optuna.storages import BaseStorage

from optuna_ohgw import metrics
from optuna_ohgw.censored import kaplan_meier_median, restricted_mean
from optuna_ohgw.comparison import comparisons, horizon
from optuna_ohgw.records import PILOT, Records, read_records
from optuna_ohgw.spec import StudySpec
from optuna_ohgw.variations import baseline_among
from optuna_ohgw.verdict import overall, verdicts

MEDIANS = (
    "best_val",
    "final_test",
    "auc_mbu",
    "overhead_mbu",
    "overhead_s",
    "overhead_flops",
    "peak_ram",
    "peak_vram",
    "peak_nvml",
)


@dataclass(frozen=True)
class Evidence:
    """What a study shows so far.

    Attributes:
        records: The tables that were read.
        source: The study file, as its user named it.
        curves, times, cells: See ``metrics``; times are of all targets.
        targets: The spec's, then τ* where the pilots give one.
        pilot: τ*, or None.
        primary: The target that the verdict is on: τ* where the study, or one beside it on the same
            task, has pilots, else the first of the spec's; None while its pilots still run. The rule
            does not look at results.
        table: One row a variation; see ``summary_table``.
        comparisons: Every variation against the baseline and its controls; see ``verdict``.
        verdicts: The published criteria, one row a variation and criterion.
        sentences: The verdict in words, one a variation.
        missing: What is not there, one sentence each.
    """

    records: Records
    source: str
    curves: pd.DataFrame
    times: pd.DataFrame
    cells: pd.DataFrame
    targets: list[float]
    pilot: float | None
    primary: float | None
    table: pd.DataFrame
    comparisons: pd.DataFrame
    verdicts: pd.DataFrame
    sentences: list[str]
    missing: list[str]

    @property
    def spec(self) -> StudySpec:
        """The study."""
        return self.records.spec


def gather(storage: BaseStorage, spec: StudySpec, source: Path | str, pilot: float | None = None) -> Evidence:
    """Read a study once and return what it shows so far; partial studies are normal.

    Args:
        storage: Where it is.
        spec: The study.
        source: Its file, as the user named it.
        pilot: τ* of another study on the same task, for one that has no pilots of its own.
    """
    return evidence_of(read_records(storage, spec), str(source), pilot)


def evidence_of(records: Records, source: str, pilot: float | None = None) -> Evidence:
    """Return what the records show; the arguments are those of ``gather``."""
    spec = records.spec
    curves = metrics.curves(records)
    if spec.pilot_seeds:
        pilot = metrics.pilot_target(curves, records)
    targets = list(dict.fromkeys([*spec.targets, *([pilot] if pilot is not None else [])]))
    primary = pilot if spec.pilot_seeds or pilot is not None else targets[0]
    times = metrics.times(curves, records, targets)
    cells = metrics.cell_metrics(curves, records)
    against = comparisons(times)
    criteria = verdicts(against, cells, times, primary, maximize=spec.metric.maximize)
    return Evidence(
        records,
        source,
        curves,
        times,
        cells,
        targets,
        pilot,
        primary,
        summary_table(times, cells, records, targets),
        against,
        criteria,
        overall(against, criteria, primary),
        missing(records, primary),
    )


def summary_table(
    times: pd.DataFrame, cells: pd.DataFrame, records: Records, targets: list[float]
) -> pd.DataFrame:
    """Return one row a variation that has a cell in the storage.

    Columns: ``cells``, ``finished``; for each target τ and budget b (``mbu``, ``device_s``,
    ``wall_s``) ``T@τ_b``, the Kaplan-Meier median (NaN where too few reached it), and ``reached@τ``,
    ``restricted_mean@τ_mbu``, ``sd@τ_mbu`` (of min(T, C), C the cell's budget); medians over cells, with
    ``_q1`` and ``_q3``, of the metrics in ``MEDIANS``; numbers of ``trials``, ``pruned`` and
    ``failed``, interrupted ones left out.
    """
    counts = records.cells[records.cells["exists"]].groupby("variation")
    rows = []
    for variation in records.spec.variations:
        if variation not in counts.groups:
            continue
        own, mine = counts.get_group(variation), cells[cells["variation"] == variation]
        row: dict[str, object] = {"variation": variation, "cells": len(own)}
        row["finished"] = int(own["finished"].sum())
        for target in targets:
            row.update(_time_columns(times[times["target"] == target], variation, target))
        for name in MEDIANS:
            values = mine[name].dropna()
            quartiles = np.quantile(values, [0.25, 0.5, 0.75]) if len(values) else [math.nan] * 3
            row[f"{name}_q1"], row[name], row[f"{name}_q3"] = map(float, quartiles)
        row.update({name: int(own[name].sum()) for name in ("pruned", "failed")})
        row["trials"] = int(own["ended"].sum()) - int(own["failed"].sum())
        rows.append(row)
    return pd.DataFrame(rows)


def _time_columns(times: pd.DataFrame, variation: str, target: float) -> dict[str, object]:
    own, key = times[times["variation"] == variation], f"@{target:.6g}"
    columns: dict[str, object] = {f"reached{key}": int(own["reached"].sum())}
    for budget in metrics.BUDGETS:
        observed = own[budget].to_numpy(), own[f"budget_{budget}"].to_numpy()
        columns[f"T{key}_{budget}"] = kaplan_meier_median(*observed)
    observed = own["mbu"].to_numpy(), own["budget_mbu"].to_numpy()
    columns[f"restricted_mean{key}_mbu"] = restricted_mean(*observed, horizon(times, "mbu"))
    columns[f"sd{key}_mbu"] = float(np.std(np.minimum(*observed), ddof=1)) if len(own) > 1 else math.nan
    return columns


def missing(records: Records, primary: float | None) -> list[str]:
    """Return what a reader must know to be missing, one sentence each."""
    spec, cells, trials = records.spec, records.cells, records.trials
    lines = []
    if not cells["exists"].any():
        return [f"No cell of {spec.name} is in the storage yet."]
    for variation in dict.fromkeys([*([PILOT] if spec.pilot_seeds else []), *spec.variations]):
        own = cells[cells["variation"] == variation]
        lines += _of_variation(variation, own)
    baseline = baseline_among(spec.variations)
    if baseline not in spec.variations:
        lines.append(f"{baseline} is not in the study: nothing can be compared with it.")
    if primary is None:
        lines.append("The pilots are not finished: there is no τ* and no verdict yet.")
    if len(spec.seeds) == 1:
        lines.append("There is one seed: no spread and no test.")
    diverged = trials[trials["reason"].fillna("").str.startswith("diverged")]
    if len(diverged):
        lines.append(f"{len(diverged)} of {int(trials['counted'].sum())} trials diverged and were pruned.")
    unmoved = trials["no_step"].notna().sum()
    if unmoved:
        reasons = ", ".join(sorted(set(trials["no_step"].dropna()))[:3])
        lines.append(f"{unmoved} warm starts moved nothing ({reasons}).")
    return lines


def _of_variation(variation: str, own: pd.DataFrame) -> list[str]:
    lines, total = [], len(own)
    absent, unfinished = own[~own["exists"]], own[own["exists"] & ~own["finished"]]
    nothing = unfinished[(unfinished["ended"] > 0) & (unfinished["ended"] == unfinished["failed"])]
    if len(absent) == total:
        return [f"{variation}: none of its {total} cells has begun."]
    if len(absent):
        lines.append(f"{variation}: {_seeds(absent)} of {total} not begun.")
    if len(nothing):
        why = nothing["reason"].iloc[-1]
        lines.append(f"{variation}: every trial failed in {_seeds(nothing)} ({why}).")
    bare = own[own["finished"] & own["final_val"].isna()]
    if len(bare):
        lines.append(f"{variation}: every trial diverged in {_seeds(bare)}.")
    going = unfinished.drop(nothing.index)
    if len(going):
        lines.append(f"{variation}: {_seeds(going)} of {total} not finished; what there is of them counts.")
    failed = int(own["failed"].sum()) - int(nothing["failed"].sum())
    if failed:
        lines.append(f"{variation}: {failed} trials failed ({own['reason'].dropna().iloc[-1]}).")
    return lines


def _seeds(cells: pd.DataFrame) -> str:
    seeds = [str(seed) for seed in cells["seed"]]
    shown = ", ".join(seeds[:8]) + (f" and {len(seeds) - 8} more" if len(seeds) > 8 else "")
    return f"seed{'s' if len(seeds) > 1 else ''} {shown}"
