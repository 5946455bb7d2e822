"""What a cell achieved: time to target, best value, overhead. Tables in, tables out."""

from __future__ import annotations

import math

import pandas as pd


def cell_curve(epochs: pd.DataFrame) -> pd.DataFrame:
    """Return a cell's epochs in order of wall time with its budget so far.

    Args:
        epochs: Rows of one cell from ``records.epochs_table``.

    Returns:
        The rows with ``cell_mbu`` (cumulative over all trials, warm starts included) and ``best``
        (highest validation accuracy so far).
    """
    table = epochs.sort_values("wall", kind="stable").copy()
    spent = table.groupby("trial")["mbu"].diff().fillna(table["mbu"])
    table["cell_mbu"] = spent.cumsum()
    table["best"] = table["val_accuracy"].cummax()
    return table


def time_to_target(epochs: pd.DataFrame, target: float) -> float:
    """Return T@τ of a cell in mbu; infinity if the target was not reached (censored)."""
    curve = cell_curve(epochs)
    reached = curve.loc[curve["val_accuracy"] >= target, "cell_mbu"]
    return float(reached.iloc[0]) if len(reached) else math.inf


def pilot_target(epochs: pd.DataFrame, share: float = 0.9) -> float | None:
    """Return τ*: the highest target that at least ``share`` of the pilot seeds reach.

    Args:
        epochs: Rows from ``records.epochs_table``; those of the variation ``pilot`` count.
        share: Share of the seeds that must reach it.

    Returns:
        A validation accuracy, or None without pilot rows or where too few seeds have any accuracy.
    """
    best = epochs.loc[epochs["variation"] == "pilot"].groupby("seed")["val_accuracy"].max()
    if best.empty:
        return None
    needed = math.ceil(share * len(best) - 1e-9)
    target = float(best.sort_values(ascending=False, na_position="last").iloc[needed - 1])
    return None if math.isnan(target) else target


def summary(
    epochs: pd.DataFrame, trials: pd.DataFrame, finals: pd.DataFrame, targets: list[float]
) -> pd.DataFrame:
    """Return one row a variation.

    Columns: ``cells``; for each target ``T@τ`` the median over seeds in mbu (infinity when half
    or more of the cells did not reach it) and ``reached@τ`` the number that did; medians of
    ``validation`` and ``test`` (fractions; a cell without any counts as the worst);
    ``overhead``: mbu of warm starts over those of training, and ``overhead_s``: seconds of warm
    starts over those of training and evaluation, pooled over cells; ``pruned`` and ``failed``
    trials, and ``trials``, those that ended otherwise.
    """
    rows = []
    for variation, own in epochs.groupby("variation", sort=False):
        if variation == "pilot":
            continue
        final = finals[finals["variation"] == variation]
        mine = trials[trials["variation"] == variation]
        # A cell whose trials all failed has no epochs, and reached nothing.
        cells = [own[own["seed"] == seed] for seed in sorted({*own["seed"], *mine["seed"]})]
        ended = own.groupby(["seed", "trial"])[["mbu", "warm_mbu"]].max().sum()
        seconds = own[["train_s", "warm_s", "eval_s"]].sum()
        row: dict[str, object] = {"variation": variation, "cells": len(cells)}
        for target in targets:
            times = pd.Series([time_to_target(cell, target) for cell in cells])
            row[f"T@{target}"] = _median(times)
            row[f"reached@{target}"] = int((times < math.inf).sum())
        row["validation"] = _median(pd.Series([c["val_accuracy"].max() for c in cells]))
        row["test"] = _median(final["test_accuracy"]) if len(final) else math.nan
        row["overhead"] = float(ended["warm_mbu"] / (ended["mbu"] - ended["warm_mbu"]))
        row["overhead_s"] = float(seconds["warm_s"] / (seconds["train_s"] + seconds["eval_s"]))
        row["pruned"] = int((mine["state"] == "PRUNED").sum())
        row["trials"] = int(mine["state"].isin(["COMPLETE", "PRUNED"]).sum())
        row["failed"] = int(((mine["state"] == "FAIL") & (mine["reason"] != "interrupted")).sum())
        rows.append(row)
    return pd.DataFrame(rows)


def _median(values: pd.Series) -> float:
    ordered = values.sort_values(na_position="first").to_list()
    middle = (len(ordered) - 1) / 2
    return (ordered[math.floor(middle)] + ordered[math.ceil(middle)]) / 2 if ordered else math.nan
