"""Learning curves of a table as a task: what a configuration would have reported, and what it cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial

from optuna_ohgw.cells import Cell
from optuna_ohgw.errors import UserError
from optuna_ohgw.history import CONFIG_INDEX
from optuna_ohgw.sampler import IndependentSampler
from optuna_ohgw.spec import StudySpec
from optuna_ohgw.spec_tasks import ReplaySpec
from optuna_ohgw.variations import eta_of, is_baseline, warm_start_of

if TYPE_CHECKING:
    from optuna.study import Study

KEYS = ("variation", "seed", "config_index")
PILOT = "pilot"


@dataclass(frozen=True)
class Known:
    """What a table holds of a configuration.

    Attributes:
        curve: Validation accuracy after 1, 2, … epochs, NaN where training diverged; it may end early.
        suggested: Hyper-parameters before the warm start, native.
        trained: Hyper-parameters after it.
        batches: Mini-batches an epoch.
        warm_mbu: Mini-batch units of its warm starts.
        warm_s: Seconds of its warm starts.
        epoch_s: Seconds of an epoch with its evaluation.
    """

    curve: list[float]
    suggested: dict[str, float]
    trained: dict[str, float]
    batches: float = 1.0
    warm_mbu: float = 0.0
    warm_s: float = 0.0
    epoch_s: float = 1.0


class TableSampler(IndependentSampler):
    """A sampler that gives each trial the trained values of its ``config_index``, 0 where it has none."""

    def __init__(self, rows: list[Known]) -> None:
        self._rows = rows

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Return the value in the table."""
        return self._rows[trial.user_attrs[CONFIG_INDEX]].trained[param_name]


def courses_of(spec: StudySpec, cell: Cell) -> list[Known]:
    """Return the configurations of a cell, in the order in which they are started.

    A table that a study was exported to has rows for variations and seeds: a cell has those of the
    same warm start and seed, by ``config_index``, whatever scheduler they were trained under. Of any
    other table seed s has all rows in the order ``numpy.random.RandomState(1000 + s).permutation``.

    Raises:
        UserError: If the table cannot be read so, naming the remedy.
    """
    assert isinstance(spec.task, ReplaySpec)
    path = Path(spec.task.data)
    table, own = _table(path, spec.task.value, spec.task.skip), spec.task
    if set(KEYS) <= set(table.columns):
        table = table[table["seed"] == cell.seed]
        if table.empty:
            raise UserError(f"task.data: {path} has no seed {cell.seed}; give seeds that it has")
        wanted = PILOT if cell.pilot else _kind(cell.variation)
        same = [PILOT if v == PILOT else _kind(str(v)) for v in table["variation"]]
        table = table[[kind == wanted for kind in same]].sort_values("config_index")
        if table.empty:
            raise UserError(
                f"task.data: {path} has no rows of {cell.label}; leave it out or export a study that has it"
            )
        if table["config_index"].tolist() != list(range(len(table))):
            raise UserError(f"task.data: {path}: config_index of {cell.label} is not 0, 1, 2, …; export anew")
    else:
        if not is_baseline(cell.variation):
            raise UserError(
                f"variations: {cell.variation!r}: {path} knows no warm start; give [baseline], or a table "
                "made by 'optuna-ohgw replay STUDY --export'"
            )
        table = table.iloc[np.random.RandomState(1000 + cell.seed).permutation(len(table))]
    if spec.budget.trials is not None and len(table) < spec.budget.trials:
        raise UserError(
            f"budget.trials: {spec.budget.trials} but {path} has {len(table)} configurations for "
            f"{cell.label}; lower it"
        )
    return [_known(row, spec, own) for row in table.to_dict("records")]


def _known(row: Mapping[Any, Any], spec: StudySpec, task: ReplaySpec) -> Known:
    curve = [math.nan if v is None else float(v) for v in row[task.value]][task.skip :][: task.epochs]
    if not curve:
        raise UserError(
            f"task.data: {task.data}: a curve of {task.value!r} has nothing after {task.skip} skipped "
            "entries; lower task.skip"
        )
    if any(not 0 <= v <= 1 for v in curve if not math.isnan(v)):
        raise UserError(
            f"task.value: {task.value!r} of {task.data} is no accuracy from 0 to 1; of losses use "
            "'optuna-ohgw replay FILE --minimize'"
        )
    suggested, trained = {}, {}
    for name, r in spec.ranges.items():
        values = [float(row.get(f"{k}_{name}", row.get(name, math.nan))) for k in ("suggested", "trained")]
        if not all(r.low <= v <= r.high for v in values):
            raise UserError(
                f"space.{name}: {task.data} has the value {values[1]:g}; give a range that "
                "holds all, or leave the name out"
            )
        suggested[name], trained[name] = values
    costs = {
        name: float(row[column])
        for name, column in (
            ("batches", "batches_per_epoch"),
            ("warm_mbu", "warm_mbu"),
            ("warm_s", "warm_s"),
            ("epoch_s", "epoch_s"),
        )
        if column in row and math.isfinite(row[column])
    }
    return Known(curve, suggested, trained, **costs)


def _kind(variation: str) -> tuple[str | None, float | None]:
    return warm_start_of(variation), eta_of(variation)


@cache
def _table(path: Path, column: str, skip: int) -> pd.DataFrame:
    try:
        table = pd.read_parquet(path)
    except FileNotFoundError:
        raise UserError(f"task.data: {path} does not exist; name a parquet file of learning curves") from None
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"task.data: {path} cannot be read ({first}); name a parquet file") from None
    if column not in table:
        known = ", ".join(c for c in table.columns if table[c].dtype == object) or "none"
        raise UserError(f"task.value: {path} has no column {column!r}; columns of lists: {known}")
    for curve in table[column]:
        if not isinstance(curve, np.ndarray | list):
            raise UserError(
                f"task.value: column {column!r} of {path} holds {curve!s:.20}, no curve; name one of lists"
            )
    return table
