"""What a cell achieved and what it cost: time to target, area under its curve, overhead."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from optuna_ohgw.metric import Metric
from optuna_ohgw.records import PILOT, Records

CELL = ["variation", "seed"]
BUDGETS = ("mbu", "device_s", "wall_s")


def curves(records: Records) -> pd.DataFrame:
    """Return every cell's epochs in order of wall time with its budget so far.

    Trials that are trained again are left out, pilots and running trials are not.

    Returns:
        The steps with ``cell_mbu`` (mini-batch units over all trials, warm starts included),
        ``cell_device_s`` (seconds of training, warm starts and evaluation), ``cell_wall_s``
        (seconds in which the cell had a trial at work) and ``best`` (best validation value
        so far, NaN before the first).
    """
    steps = records.steps
    table = steps[steps["counted"]].sort_values([*CELL, "wall"], kind="stable", ignore_index=True)
    spent = table.groupby([*CELL, "trial"])["mbu"].diff().fillna(table["mbu"])
    device = table[["train_s", "warm_s", "eval_s"]].fillna(0.0).sum(axis=1)
    keys = [table[key] for key in CELL]
    table["cell_mbu"] = spent.groupby(keys).cumsum()
    table["cell_device_s"] = device.groupby(keys).cumsum()
    table["cell_wall_s"] = _active(table, records.trials)
    sign = records.spec.metric.sign
    table["best"] = sign * (sign * table["val_metric"]).groupby(keys).cummax()
    table["best"] = table.groupby(CELL)["best"].ffill()
    return table


def times(table: pd.DataFrame, records: Records, targets: list[float]) -> pd.DataFrame:
    """Return T@τ of every cell that is in the storage, pilots left out.

    Args:
        table: What ``curves`` returns.
        records: The study.
        targets: Validation values.

    Returns:
        One row a cell and target: ``variation``, ``seed``, ``target``, ``reached``, T@τ as ``mbu``,
        ``device_s`` and ``wall_s`` (infinite where it was not reached: censored), and
        ``budget_mbu``, ``budget_device_s``, ``budget_wall_s``: what the cell spent, at which it is censored.
    """
    cells = records.cells
    own = cells.loc[cells["exists"] & (cells["variation"] != PILOT), CELL]
    columns = [f"cell_{b}" for b in BUDGETS]
    spent = table.groupby(CELL)[columns].max().rename(columns=dict(zip(columns, BUDGETS, strict=True)))
    budgets = own.join(spent.add_prefix("budget_"), on=CELL).fillna(0.0)
    parts = []
    for target in dict.fromkeys(targets):
        first = table[records.spec.metric.reached(table["val_metric"], target)].groupby(CELL)[columns].first()
        first.columns = pd.Index(BUDGETS)
        part = budgets.join(first, on=CELL)
        part.insert(2, "target", target)
        part.insert(3, "reached", part["mbu"].notna())
        parts.append(part.fillna(dict.fromkeys(BUDGETS, math.inf)))
    order = [*CELL, "target", "reached", *BUDGETS, *(f"budget_{b}" for b in BUDGETS)]
    if not parts:
        return pd.DataFrame(columns=order)
    return pd.concat(parts, ignore_index=True)[order]


def pilot_target(table: pd.DataFrame, records: Records, share: float = 0.9) -> float | None:
    """Return τ*: the hardest target that at least ``share`` of the pilot seeds reach.

    Args:
        table: What ``curves`` returns.
        records: The study; all its pilots must be finished, so that τ* does not change later.
        share: Share of the seeds that must reach it.

    Returns:
        A validation value, or None without pilots, while they run, or where too few seeds have
        any value.
    """
    pilots = records.cells[records.cells["variation"] == PILOT]
    if pilots.empty or not pilots["finished"].all():
        return None
    metric = records.spec.metric
    best = table[table["variation"] == PILOT].groupby("seed")["best"].last().reindex(pilots["seed"])
    needed = math.ceil(share * len(best) - 1e-9)
    target = float(best.sort_values(ascending=not metric.maximize, na_position="last").iloc[needed - 1])
    return None if math.isnan(target) else target


def cell_metrics(table: pd.DataFrame, records: Records) -> pd.DataFrame:
    """Return one row a cell that has an epoch, pilots left out.

    Columns: ``finished``; ``best_val``, ``final_test`` (of the metric); ``auc_mbu``, the mean of the
    best value so far over [0, C], with C the smallest budget of the seed's cells and nothing found
    counted as 0 where no value is lower, else as the worst value that any cell of the seed
    had first; ``spent_mbu``, ``spent_device_s``, ``spent_wall_s``; ``epochs``; ``overhead_mbu``,
    ``overhead_flops`` (warm starts over training) and ``overhead_s`` (over training and evaluation);
    ``mbu_per_epoch``, ``device_s_per_epoch``, ``flops_per_epoch`` (warm starts included);
    ``peak_ram``, ``peak_vram``, ``peak_nvml`` (bytes); numbers of ``trials``, ``pruned``, ``failed``.
    """
    own, trials = table[table["variation"] != PILOT], _counted(records.trials)
    grouped = own.groupby(CELL)
    cells = pd.DataFrame(
        {
            "best_val": grouped["best"].last(),
            "spent_mbu": grouped["cell_mbu"].max(),
            "spent_device_s": grouped["cell_device_s"].max(),
            "spent_wall_s": grouped["cell_wall_s"].max(),
            "epochs": grouped.size(),
        }
    ).reset_index()
    seconds = grouped[["train_s", "warm_s", "eval_s"]].sum()
    # Warm starts of trials that ended before their first epoch are in no curve.
    warm = trials[trials["epochs"] > 0].groupby(CELL)["warm_mbu"].sum()
    flops = _flops(trials)
    memory = trials.groupby(CELL)[["ram_bytes", "vram_bytes", "nvml_bytes"]].max()
    memory.columns = pd.Index(["peak_ram", "peak_vram", "peak_nvml"])
    cells = cells.join(seconds, on=CELL).join(warm, on=CELL).join(flops, on=CELL).join(memory, on=CELL)
    cells["overhead_mbu"] = cells["warm_mbu"] / (cells["spent_mbu"] - cells["warm_mbu"])
    cells["overhead_s"] = cells["warm_s"] / (cells["train_s"] + cells["eval_s"])
    cells["overhead_flops"] = cells["flops_warm"] / cells["flops_train"]
    cells["mbu_per_epoch"] = cells["spent_mbu"] / cells["epochs"]
    cells["device_s_per_epoch"] = cells["spent_device_s"] / cells["epochs"]
    cells["flops_per_epoch"] = (cells["flops_train"] + cells["flops_warm"]) / cells["epochs"]
    cells = cells.merge(_areas(own, cells, records.spec.metric), on=CELL, how="left")
    counts = records.cells.rename(columns={"ended": "trials"})
    cells = cells.merge(counts[[*CELL, "finished", "final_test", "trials", "pruned", "failed"]], on=CELL)
    order = [
        *CELL,
        "finished",
        "best_val",
        "final_test",
        "auc_mbu",
        "spent_mbu",
        "spent_device_s",
        "spent_wall_s",
        "epochs",
        "overhead_mbu",
        "overhead_s",
        "overhead_flops",
        "mbu_per_epoch",
        "device_s_per_epoch",
        "flops_per_epoch",
        "peak_ram",
        "peak_vram",
        "peak_nvml",
        "trials",
        "pruned",
        "failed",
    ]
    return cells[order]


def _counted(trials: pd.DataFrame) -> pd.DataFrame:
    return trials[trials["counted"]]


def _active(table: pd.DataFrame, trials: pd.DataFrame) -> pd.Series:
    """Return the seconds until each epoch in which its cell had a trial at work, without pauses."""
    active = pd.Series(np.nan, index=table.index)
    kept = trials["kept_until"].notna()
    counted = trials[trials["counted"] | kept | (trials["superseded"] & (trials["state"] != "WAITING"))]
    counted = counted.assign(end=counted["end"].where(counted["kept_until"].isna(), counted["kept_until"]))
    spans = dict(tuple(counted.groupby(CELL)[["start", "end"]]))
    for key, epochs in table.groupby(CELL):
        wall = epochs["wall"].to_numpy()
        own = spans[key].dropna(subset=["start"]).sort_values("start").to_numpy()
        total, reached = np.zeros(len(wall)), -math.inf
        for start, end in own:
            # The last epoch's clock may be read a little after the start of the next trial.
            last = wall.max() if math.isnan(end) else end
            total += np.clip(wall, max(start, reached), max(last, reached, start)) - max(start, reached)
            reached = max(reached, last)
        active.loc[epochs.index] = total
    return active


def _flops(trials: pd.DataFrame) -> pd.DataFrame:
    flops = trials[[*CELL]].copy()
    flops["flops_train"] = trials["flops_batch"] * trials["batches_per_epoch"] * trials["epochs"]
    flops["flops_warm"] = trials["flops_warm"] * trials["warm_starts"]
    return flops[trials["epochs"] > 0].groupby(CELL).sum(min_count=1)


def _areas(own: pd.DataFrame, cells: pd.DataFrame, metric: Metric) -> pd.DataFrame:
    shared = cells.groupby("seed")["spent_mbu"].min().to_dict()
    first = metric.sign * own.groupby(CELL)["best"].first()
    nothing = (metric.sign * first.groupby("seed").min()).to_dict()
    rows = []
    for (variation, seed), epochs in own.groupby(CELL):
        limit, none = shared[seed], 0.0 if metric.maximize and metric.low == 0 else nothing[seed]
        edges = np.clip(np.append(epochs["cell_mbu"].to_numpy(), limit), None, limit)
        # From its epoch's end a value holds until the next epoch's.
        area = float(np.sum(np.diff(edges) * epochs["best"].fillna(none).to_numpy()))
        # Before the first epoch nothing is found.
        area += float(min(epochs["cell_mbu"].iloc[0], limit)) * none
        rows.append((variation, seed, area / limit if limit > 0 else math.nan))
    return pd.DataFrame(rows, columns=[*CELL, "auc_mbu"])
