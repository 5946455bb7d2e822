"""Storage to one tidy table; the only bridge between running and analysis."""

from __future__ import annotations

from typing import Any

import optuna
import pandas as pd
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial

from optuna_ohgw.cells import Cell, config_index
from optuna_ohgw.pruner import is_interrupted

EPOCH_COLUMNS = ["mbu", "wall", "train_s", "warm_s", "eval_s", "train_loss", "val_loss", "val_accuracy"]
_TRIAL_COLUMNS = [
    "variation",
    "seed",
    "trial",
    "config_index",
    "state",
    "reason",
    "warm_mbu",
    "warm_s",
    "no_step",
]


def epochs_table(storage: BaseStorage, cells: list[Cell]) -> pd.DataFrame:
    """Return one row an epoch of every ended trial of the cells that exist.

    Columns: ``variation`` (``pilot`` for pilots), ``seed``, ``trial``, ``config_index``, ``state``,
    ``epoch`` (from 1), ``mbu`` (cumulative in the trial, warm starts included), ``wall`` (Unix
    seconds), ``train_s``, ``warm_s``, ``eval_s`` (seconds of the epoch), ``train_loss``,
    ``val_loss`` (nats), ``val_accuracy`` (fraction), ``warm_mbu`` (the trial's warm starts).
    Interrupted trials, which are trained again, are left out.
    """
    rows: list[pd.DataFrame] = []
    for cell, study in _studies(storage, cells):
        trials = study.get_trials(deepcopy=False)
        for trial in trials:
            curve = trial.user_attrs.get("curve")
            if not curve or is_interrupted(trial) or not trial.state.is_finished():
                continue
            table = pd.DataFrame(curve, columns=EPOCH_COLUMNS, dtype=float)
            table.insert(0, "epoch", range(1, len(table) + 1))
            table.insert(0, "state", trial.state.name)
            table.insert(0, "config_index", config_index(trial, trials))
            table.insert(0, "trial", trial.number)
            table.insert(0, "seed", cell.seed)
            table.insert(0, "variation", "pilot" if cell.pilot else cell.variation)
            table["warm_mbu"] = warm_mbu(trial)
            rows.append(table)
    columns = ["variation", "seed", "trial", "config_index", "state", "epoch", *EPOCH_COLUMNS, "warm_mbu"]
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame(columns=columns)


def trials_table(storage: BaseStorage, cells: list[Cell]) -> pd.DataFrame:
    """Return one row a trial of the cells that exist, whatever its state.

    Columns: ``variation``, ``seed``, ``trial``, ``config_index``, ``state``, ``reason`` (why it
    ended early), ``warm_mbu``, ``warm_s``, ``no_step`` (why a warm start moved nothing).
    """
    rows = []
    for cell, study in _studies(storage, cells):
        trials = study.get_trials(deepcopy=False)
        for trial in trials:
            records = trial.user_attrs.get("ohgw", [])
            rows.append(
                {
                    "variation": "pilot" if cell.pilot else cell.variation,
                    "seed": cell.seed,
                    "trial": trial.number,
                    "config_index": config_index(trial, trials),
                    "state": trial.state.name,
                    "reason": trial.user_attrs.get("reason"),
                    "warm_mbu": warm_mbu(trial),
                    "warm_s": sum(record.get("seconds", 0.0) for record in records),
                    "no_step": next((r["reason"] for r in records if r.get("reason")), None),
                }
            )
    return pd.DataFrame(rows, columns=_TRIAL_COLUMNS)


def finals_table(storage: BaseStorage, cells: list[Cell]) -> pd.DataFrame:
    """Return one row a finished cell: variation, seed, val_accuracy and test_accuracy (fractions)."""
    rows = []
    for cell, study in _studies(storage, cells):
        final: dict[str, Any] | None = study.user_attrs.get("final")
        if final is not None:
            name = "pilot" if cell.pilot else cell.variation
            rows.append({"variation": name, "seed": cell.seed, **final})
    return pd.DataFrame(
        rows, columns=None if rows else ["variation", "seed", "val_accuracy", "test_accuracy"]
    )


def warm_mbu(trial: FrozenTrial) -> float:
    """Return the cost of a trial's warm starts, in mini-batch units."""
    return float(sum(record["cost_mbu"] for record in trial.user_attrs.get("ohgw", [])))


def _studies(storage: BaseStorage, cells: list[Cell]) -> list[tuple[Cell, optuna.Study]]:
    known = {s.study_name for s in storage.get_all_studies()}
    return [
        (cell, optuna.load_study(study_name=cell.name, storage=storage))
        for cell in cells
        if cell.name in known
    ]
