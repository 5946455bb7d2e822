"""Storage to tidy tables in one pass; the only bridge between running and analysis."""

from __future__ import annotations

import datetime
import math
from dataclasses import dataclass
from typing import Any

import pandas as pd
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from optuna_ohgw.cells import Cell, cells_of, config_index
from optuna_ohgw.decisions import decisions, in_words
from optuna_ohgw.history import CLOCK, LOST, is_interrupted, kept_until, superseded
from optuna_ohgw.spec import StudySpec

PILOT = "pilot"
EPOCH_COLUMNS = ["mbu", "wall", "train_s", "warm_s", "eval_s", "train_loss", "val_loss", "val_metric"]
STEP_COLUMNS = [
    "variation",
    "seed",
    "trial",
    "config_index",
    "state",
    "counted",
    "epoch",
    *EPOCH_COLUMNS,
]
CELL_COLUMNS = [
    "variation",
    "seed",
    "exists",
    "finished",
    "ended",
    "running",
    "pruned",
    "failed",
    "final_val",
    "final_test",
    "final_test_loss",
    "final_trial",
    "reason",
]
# Of empty tables too, so that they can be joined.
_KEY_TYPES = {"variation": object, "seed": int, "trial": int, "config_index": int, "counted": bool}


@dataclass(frozen=True)
class Records:
    """All that a storage holds of a study, as tables.

    Attributes:
        spec: The study.
        cells: One row a cell that the spec names, pilots included (``variation`` is ``pilot``):
            ``exists``, ``finished`` (its final training is done), numbers of trials ``ended``,
            ``running``, ``pruned`` and ``failed`` (interrupted ones, trained again, in none of
            them), ``final_val``, ``final_test`` (of the metric), ``final_test_loss`` (nats),
            ``final_trial`` and ``reason`` (of the last failure).
        trials: One row a trial, whatever its state; see ``docs/analysis.md`` for the columns.
        steps: One row an epoch of every trial, running and interrupted ones included:
            ``counted`` is False for those that are trained again.
        environment: Versions and device that the study was started with.
    """

    spec: StudySpec
    cells: pd.DataFrame
    trials: pd.DataFrame
    steps: pd.DataFrame
    environment: dict[str, Any]

    def tidy(self) -> pd.DataFrame:
        """Return the whole record, one row a variation × seed × trial × epoch.

        A trial without an epoch has one row, with none in the epoch's columns.
        """
        keys = ["variation", "seed", "trial"]
        shared = ["config_index", "state", "counted"]
        epochs = self.steps.drop(columns=shared)
        whole = {c: f"trial_{c}" for c in ("train_s", "warm_s", "eval_s")}
        return self.trials.rename(columns=whole).merge(epochs, on=keys, how="left")


def read_records(storage: BaseStorage, spec: StudySpec) -> Records:
    """Return the tables of a study, whatever of it is there.

    Every cell's trials are read once, without copies.
    """
    known = {s.study_name: s for s in storage.get_all_studies()}
    cells: list[dict[str, Any]] = []
    trials: list[dict[str, Any]] = []
    steps: dict[str, list[Any]] = {column: [] for column in STEP_COLUMNS}
    environment: dict[str, Any] = {}
    for cell in cells_of(spec):
        name = PILOT if cell.pilot else cell.variation
        found = known.get(cell.name)
        frozen = [] if found is None else storage.get_all_trials(found._study_id, deepcopy=False)
        attributes = {} if found is None else found.user_attrs
        environment = environment or attributes.get("environment", {})
        gone = superseded(frozen)
        rows = [_trial_row(trial, frozen, name, cell, spec, gone) for trial in frozen]
        for number, made in decisions(frozen, spec).items():
            rows[number]["decision"] = in_words(*list(made.items())[-1]) if made else None
        for trial, row in zip(frozen, rows, strict=True):
            _add_steps(steps, trial, row)
        cells.append(_cell_row(name, cell, rows, attributes, exists=found is not None))
        trials.extend(rows)
    return Records(
        spec,
        pd.DataFrame(cells, columns=CELL_COLUMNS),
        pd.DataFrame(trials, columns=_trial_columns(spec)).astype(_KEY_TYPES | {"superseded": bool}),
        pd.DataFrame(steps, columns=STEP_COLUMNS).astype(_KEY_TYPES | dict.fromkeys(EPOCH_COLUMNS, float)),
        environment,
    )


def _cell_row(
    name: str, cell: Cell, rows: list[dict[str, Any]], attributes: dict[str, Any], *, exists: bool
) -> dict[str, Any]:
    final = attributes.get("final") or {}
    failures = [row["reason"] for row in rows if row["state"] == "FAIL" and row["counted"]]
    states = [row["state"] for row in rows if row["counted"]]
    return {
        "variation": name,
        "seed": cell.seed,
        "exists": exists,
        "finished": bool(final),
        "ended": sum(state in ("COMPLETE", "PRUNED", "FAIL") for state in states),
        "running": states.count("RUNNING"),
        "pruned": states.count("PRUNED"),
        "failed": len(failures),
        "final_val": _number(final.get("val_metric")),
        "final_test": _number(final.get("test_metric")),
        "final_test_loss": _number(final.get("test_loss")),
        "final_trial": _number(final.get("trial")),
        "reason": failures[-1] if failures else None,
    }


_PLAIN_COLUMNS = [
    "variation",
    "seed",
    "trial",
    "config_index",
    "state",
    "reason",
    "decision",
    "counted",
    "superseded",
    "start",
    "end",
    "kept_until",
    "worker",
    "device",
    "slurm_job",
    "epochs",
    "batches_per_epoch",
    "train_s",
    "warm_s",
    "eval_s",
    "lost_s",
    "warm_mbu",
    "best",
    "last",
    "warm_starts",
    "no_step",
    "clipped",
    "coarse",
    "gradient_norm",
    "flops_batch",
    "flops_warm",
    "ram_bytes",
    "vram_bytes",
    "nvml_bytes",
    "cgroup_peak_bytes",
    "cgroup_cpu_s",
]
_KINDS = ("suggested", "trained", "gradient", "step")


def _trial_columns(spec: StudySpec) -> list[str]:
    return [*_PLAIN_COLUMNS, *(f"{kind}_{name}" for name in spec.ranges for kind in _KINDS)]


def _trial_row(
    trial: FrozenTrial,
    trials: list[FrozenTrial],
    name: str,
    cell: Cell,
    spec: StudySpec,
    gone: set[int],
) -> dict[str, Any]:
    attributes = trial.user_attrs
    records = [r for r in attributes.get("ohgw", []) if r]
    curve = attributes.get("curve") or {}
    values = [a for a in curve.get("val_metric", []) if a is not None]
    worker = attributes.get("worker") or {}
    flops, memory = attributes.get("flops") or {}, attributes.get("memory") or {}
    cgroup = attributes.get("cgroup") or {}
    first = records[0] if records else {}
    warms = [r for r in records if r.get("rule")]
    methods = [m for r in warms for m in (r.get("methods") or {}).items()]
    row: dict[str, Any] = {
        "variation": name,
        "seed": cell.seed,
        "trial": trial.number,
        "config_index": config_index(trial, trials),
        "state": trial.state.name,
        "reason": attributes.get("reason"),
        "counted": not is_interrupted(trial)
        and trial.state != TrialState.WAITING
        and trial.number not in gone,
        "superseded": trial.number in gone,
        "start": attributes.get(CLOCK, {}).get("start", _unix(trial.datetime_start)),
        "end": attributes.get(CLOCK, {}).get("end", _unix(trial.datetime_complete)),
        "kept_until": kept_until(trial),
        "worker": f"{worker['host']}:{worker['pid']}" if worker else None,
        "device": worker.get("device"),
        "slurm_job": worker.get("slurm_job"),
        "epochs": len(curve.get("mbu", [])),
        "batches_per_epoch": _number(attributes.get("batches_per_epoch")),
        **{c: sum(filter(None, curve.get(c, []))) for c in ("train_s", "warm_s", "eval_s")},
        LOST: float(attributes.get(LOST, 0.0)),
        "warm_mbu": float(sum(r["cost_mbu"] for r in records)),
        "best": spec.metric.best(values),
        "last": values[-1] if values else math.nan,
        "warm_starts": len(warms),
        "no_step": next((r["reason"] for r in records if r.get("reason")), None),
        "clipped": ",".join(sorted({n for r in warms for n in r.get("at_bound", [])})),
        "coarse": ",".join(sorted({n for n, how in methods if how == "finite-difference"})),
        "gradient_norm": _norm(first.get("gradient")),
        "flops_batch": _number(flops.get("batch")),
        "flops_warm": _number(flops.get("warm")),
        **{f"{kind}_bytes": _number(memory.get(kind)) for kind in ("ram", "vram", "nvml")},
        "cgroup_peak_bytes": _number(cgroup.get("memory_peak")),
        "cgroup_cpu_s": _number(cgroup.get("cpu_s")),
    }
    for parameter in spec.ranges:
        for kind in _KINDS:
            row[f"{kind}_{parameter}"] = _number((first.get(kind) or {}).get(parameter))
    return row


def _add_steps(steps: dict[str, list[Any]], trial: FrozenTrial, row: dict[str, Any]) -> None:
    curve = trial.user_attrs.get("curve") or {}
    count = len(curve.get("mbu", []))
    for column in ("variation", "seed", "trial", "config_index", "state", "counted"):
        steps[column].extend([row[column]] * count)
    steps["epoch"].extend(range(1, count + 1))
    for column in EPOCH_COLUMNS:
        steps[column].extend(curve.get(column, [None] * count))


def _norm(gradient: dict[str, float | None] | None) -> float:
    if not gradient or any(g is None for g in gradient.values()):
        return math.nan
    return math.hypot(*(g for g in gradient.values() if g is not None))


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _unix(time: datetime.datetime | None) -> float:
    return math.nan if time is None else time.timestamp()
