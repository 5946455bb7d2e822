"""Trials and report sent to MLflow or Weights & Biases, too; the storage stays what counts."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial

from optuna_ohgw.cells import Cell
from optuna_ohgw.errors import UserError
from optuna_ohgw.pruner import is_interrupted
from optuna_ohgw.spec import StudySpec

SENT = "tracked"
_MILLISECONDS = 1000
log = logging.getLogger("optuna_ohgw.tracking")


@dataclass(frozen=True)
class Tracked:
    """A trial as plain values.

    Attributes:
        name: Name of its run.
        tags: ``variation``, ``seed``, ``state``, ``reason``.
        params: ``suggested_P`` and ``trained_P``, native.
        costs: ``warm_mbu``, ``total_warm_s``, ``total_train_s``, ``total_eval_s``, ``batch_flops``,
            ``warm_flops`` and ``peak_ram_bytes``, ``peak_vram_bytes``, ``peak_nvml_bytes``, as far as known.
        curve: For each epoch its metrics, what was not finite left out, and its Unix time in seconds.
    """

    name: str
    tags: dict[str, str]
    params: dict[str, float]
    costs: dict[str, float]
    curve: list[tuple[float, dict[str, float]]]


def check_tracking(spec: StudySpec) -> None:
    """Raise a UserError if a package is missing that the study's ``tracking`` needs."""
    if spec.tracking is not None and importlib.util.find_spec(spec.tracking) is None:
        raise UserError(
            f"tracking: the package {spec.tracking} is not installed; "
            f"pip install 'optuna-ohgw[{spec.tracking}]'"
        )


def tracked(trial: FrozenTrial, cell: Cell) -> Tracked:
    """Return what is sent of a trial of a cell."""
    attributes = trial.user_attrs
    records = attributes.get("ohgw") or [{}]
    params = {
        f"{kind}_{name}": float(value)
        for kind, record in (("suggested", records[0]), ("trained", records[-1]))
        for name, value in record.get(kind, {}).items()
    }
    curve = attributes.get("curve") or {}
    rows = []
    for epoch, wall in enumerate(curve.get("wall", [])):
        values = {name: column[epoch] for name, column in curve.items() if name != "wall"}
        rows.append((float(wall), {n: float(v) for n, v in values.items() if v is not None}))
    sums = {name: sum(filter(None, curve.get(name, []))) for name in ("train_s", "warm_s", "eval_s")}
    costs = {
        "warm_mbu": sum(record.get("cost_mbu", 0.0) for record in records),
        **{f"total_{name}": value for name, value in sums.items()},
        **{f"{name}_flops": value for name, value in (attributes.get("flops") or {}).items()},
        **{f"peak_{name}_bytes": value for name, value in (attributes.get("memory") or {}).items()},
    }
    known = {n: float(v) for n, v in costs.items() if v is not None and math.isfinite(v)}
    tags = {
        "variation": "pilot" if cell.pilot else cell.variation,
        "seed": str(cell.seed),
        "state": trial.state.name,
        "reason": str(attributes.get("reason") or ""),
    }
    return Tracked(f"{cell.label}/{trial.number}", tags, params, known, rows)


def send_cell(storage: BaseStorage, spec: StudySpec, cell: Cell) -> int:
    """Send the ended trials of a cell that were not sent before; return their number.

    What was sent is kept in the cell's study. An interrupted trial is not sent, its retry is. A service
    that fails does not end the study: a warning says so, and the next run sends what is left.
    """
    if spec.tracking is None:
        return 0
    send = {"mlflow": _to_mlflow, "wandb": _to_wandb}[spec.tracking]
    study = optuna.load_study(study_name=cell.name, storage=storage)
    sent = dict(study.user_attrs.get(SENT, {}))
    done = list(sent.get(spec.tracking, []))
    count = 0
    for trial in study.get_trials(deepcopy=False):
        if trial.number in done or not trial.state.is_finished() or is_interrupted(trial):
            continue
        if not _try(partial(send, spec, cell, trial), spec):
            break
        done.append(trial.number)
        count += 1
    if count:
        study.set_user_attr(SENT, {**sent, spec.tracking: done})
    return count


def send_report(spec: StudySpec, folder: Path) -> bool:
    """Send a report's files as artifacts of a run named ``report``; return whether it worked."""
    if spec.tracking is None:
        return False
    send = {"mlflow": _report_to_mlflow, "wandb": _report_to_wandb}[spec.tracking]
    return _try(partial(send, spec, folder), spec)


def _try(action: Callable[[], None], spec: StudySpec) -> bool:
    try:
        action()
    except Exception as error:  # whatever a service raises, the study goes on
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        log.warning(
            "tracking: %s could not be reached (%s); run the same command again to send the rest",
            spec.tracking,
            first,
        )
        return False
    return True


def _open_mlflow(spec: StudySpec) -> None:
    """Choose server and experiment: MLflow's own variable, else a database in the output folder."""
    import mlflow

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    if os.environ.get("MLFLOW_TRACKING_URI"):
        mlflow.set_experiment(spec.name)
        return
    folder = spec.folder.resolve()
    mlflow.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
    if mlflow.get_experiment_by_name(spec.name) is None:
        mlflow.create_experiment(spec.name, artifact_location=(folder / "mlflow-artifacts").as_uri())
    mlflow.set_experiment(spec.name)


def _to_mlflow(spec: StudySpec, cell: Cell, trial: FrozenTrial) -> None:
    # optuna-integration's callbacks are deprecated and send one value, no curve.
    import mlflow
    from mlflow.entities import Metric

    _open_mlflow(spec)
    row = tracked(trial, cell)
    with mlflow.start_run(run_name=row.name, tags=row.tags) as run:
        metrics = [
            Metric(name, value, int(wall * _MILLISECONDS), epoch)
            for epoch, (wall, values) in enumerate(row.curve, start=1)
            for name, value in values.items()
        ]
        # A batch may hold a thousand.
        for i in range(0, len(metrics), 1000):
            mlflow.MlflowClient().log_batch(run.info.run_id, metrics=metrics[i : i + 1000])
        mlflow.log_params(row.params)
        mlflow.log_metrics(row.costs)


def _report_to_mlflow(spec: StudySpec, folder: Path) -> None:
    import mlflow

    _open_mlflow(spec)
    with mlflow.start_run(run_name="report"):
        mlflow.log_artifacts(str(folder), artifact_path="report")


def _to_wandb(spec: StudySpec, cell: Cell, trial: FrozenTrial) -> None:
    import wandb

    row = tracked(trial, cell)
    where: dict[str, Any] = {"project": spec.name, "group": row.tags["variation"], "name": row.name}
    where |= {"dir": str(spec.folder)}
    quiet = wandb.Settings(silent=True)
    with wandb.init(
        **where, settings=quiet, config={**row.params, **row.tags}, reinit="finish_previous"
    ) as run:
        for epoch, (_, values) in enumerate(row.curve, start=1):
            run.log(values, step=epoch)
        run.summary.update(row.costs)


def _report_to_wandb(spec: StudySpec, folder: Path) -> None:
    import wandb

    where = {"project": spec.name, "name": "report", "dir": str(spec.folder)}
    with wandb.init(**where, settings=wandb.Settings(silent=True), reinit="finish_previous") as run:
        artifact = wandb.Artifact(f"{spec.name}-report", type="report")
        artifact.add_dir(str(folder))
        run.log_artifact(artifact)
