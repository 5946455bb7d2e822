"""Trials and report sent to MLflow or Weights & Biases, too; the storage stays what counts."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial

from optuna_ohgw.cells import Cell
from optuna_ohgw.errors import UserError
from optuna_ohgw.history import is_interrupted, superseded
from optuna_ohgw.spec import StudySpec

if TYPE_CHECKING:
    from mlflow import MlflowClient

SENT = "tracked"
REPORT = "report"
_MILLISECONDS = 1000
_BATCH = 1000  # metrics that MLflow takes in one request
_WAIT_S = 30  # for an answer, unless the service's own variable says otherwise
_PAUSE_S = 600.0
_paused_until: dict[str, float] = {}  # service: monotonic seconds; else each cell would wait for it again
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
    """Raise a UserError if a package or a key is missing that the study's ``tracking`` needs."""
    if spec.tracking is not None and importlib.util.find_spec(spec.tracking) is None:
        raise UserError(
            f"tracking: the package {spec.tracking} is not installed; "
            f"pip install 'optuna-ohgw[{spec.tracking}]'"
        )
    if spec.tracking == "wandb" and not _wandb_has_key():
        raise UserError("tracking: wandb has no API key; run 'wandb login', or set WANDB_MODE=offline")


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
    that fails does not end the study: a warning says so, nothing is sent for ten minutes, and a later
    cell or the next run sends what is left.
    """
    if spec.tracking is None or _is_paused(spec.tracking):
        return 0
    send = {"mlflow": _to_mlflow, "wandb": _to_wandb}[spec.tracking]
    study = optuna.load_study(study_name=cell.name, storage=storage)
    sent = dict(study.user_attrs.get(SENT, {}))
    done = list(sent.get(spec.tracking, []))
    before = len(done)
    trials = study.get_trials(deepcopy=False)
    gone = superseded(trials)
    for trial in trials:
        if trial.number in done or trial.number in gone:
            continue
        if not trial.state.is_finished() or is_interrupted(trial):
            continue
        if not _try(partial(send, spec, cell, trial), spec):
            break
        done.append(trial.number)
        # At once: a run that is killed meanwhile would send the cell's trials twice.
        study.set_user_attr(SENT, {**sent, spec.tracking: done})
    return len(done) - before


def send_report(spec: StudySpec, folder: Path) -> bool:
    """Send a report's files as artifacts of the one run named ``report``; return whether it worked."""
    if spec.tracking is None or _is_paused(spec.tracking):
        return False
    send = {"mlflow": _report_to_mlflow, "wandb": _report_to_wandb}[spec.tracking]
    return _try(partial(send, spec, folder), spec)


def _is_paused(service: str) -> bool:
    return time.monotonic() < _paused_until.get(service, 0.0)


def _try(action: Callable[[], None], spec: StudySpec) -> bool:
    try:
        with _quiet():
            action()
    except Exception as error:  # whatever a service raises, the study goes on
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        log.warning(
            "tracking: %s failed (%.200s); run the same command again to send the rest", spec.tracking, first
        )
        _paused_until[str(spec.tracking)] = time.monotonic() + _PAUSE_S
        return False
    return True


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the clients' own lines about set-up and retries off the console."""
    loggers = [logging.getLogger(name) for name in ("mlflow", "alembic", "urllib3.connectionpool")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _open_mlflow(spec: StudySpec) -> tuple[MlflowClient, str]:
    """Return a client and the experiment: MLflow's own variable, else a database in the output folder."""
    # Its own defaults wait four minutes for a server that is not there.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(_WAIT_S))
    import mlflow

    folder = spec.folder.resolve()
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    client = mlflow.MlflowClient(uri or f"sqlite:///{folder / 'mlflow.db'}")
    known = client.get_experiment_by_name(spec.name)
    if known is not None:
        return client, known.experiment_id
    place = None if uri else (folder / "mlflow-artifacts").as_uri()
    return client, client.create_experiment(spec.name, artifact_location=place)


def _to_mlflow(spec: StudySpec, cell: Cell, trial: FrozenTrial) -> None:
    # optuna-integration's callback is deprecated and sends the value alone, no curve. The client, not
    # mlflow.start_run: a run that the caller has open stays as it is.
    from mlflow.entities import Metric, Param

    row = tracked(trial, cell)
    start, end = (
        None if moment is None else int(moment.timestamp() * _MILLISECONDS)
        for moment in (trial.datetime_start, trial.datetime_complete)
    )
    metrics = [
        Metric(name, value, int(wall * _MILLISECONDS), epoch)
        for epoch, (wall, values) in enumerate(row.curve, start=1)
        for name, value in values.items()
    ]
    metrics += [Metric(name, value, end or 0, 0) for name, value in row.costs.items()]
    client, experiment = _open_mlflow(spec)
    run = client.create_run(experiment, start_time=start, tags=row.tags, run_name=row.name).info.run_id
    try:
        client.log_batch(run, params=[Param(name, str(value)) for name, value in row.params.items()])
        for i in range(0, len(metrics), _BATCH):
            client.log_batch(run, metrics=metrics[i : i + _BATCH])
    except Exception:
        # The trial will be sent again, under a run of its own.
        client.set_terminated(run, "FAILED")
        raise
    client.set_terminated(run, end_time=end)


def _report_to_mlflow(spec: StudySpec, folder: Path) -> None:
    client, experiment = _open_mlflow(spec)
    known = client.search_runs([experiment], f"attributes.run_name = '{REPORT}'", max_results=1)
    run = known[0].info.run_id if known else client.create_run(experiment, run_name=REPORT).info.run_id
    client.log_artifacts(run, str(folder), artifact_path=REPORT)
    client.set_terminated(run)


def _wandb_has_key() -> bool:
    """Return whether wandb needs no key or has one; else it asks for one in the middle of a run."""
    import wandb

    if wandb.setup().settings.mode in ("offline", "disabled", "dryrun"):
        return True
    try:
        return bool(wandb.login(prompt=False, verify=False))
    except wandb.Error as error:
        raise UserError(f"tracking: {error}; run 'wandb login', or set WANDB_MODE=offline") from None


def _open_wandb(spec: StudySpec, **of_run: Any) -> Any:
    import wandb

    # The console is the study's own. A run that the caller has open stays as it is.
    settings = wandb.Settings(silent=True, console="off", init_timeout=_WAIT_S)
    return wandb.init(
        project=spec.name, dir=str(spec.folder), settings=settings, reinit="create_new", **of_run
    )


def _to_wandb(spec: StudySpec, cell: Cell, trial: FrozenTrial) -> None:
    # optuna-integration's callback is deprecated and sends the value alone, no curve.
    row = tracked(trial, cell)
    config = {**row.params, **row.tags}
    with _open_wandb(spec, group=row.tags["variation"], name=row.name, config=config) as run:
        for epoch, (_, values) in enumerate(row.curve, start=1):
            run.log(values, step=epoch)
        run.summary.update(row.costs)


def _report_to_wandb(spec: StudySpec, folder: Path) -> None:
    import wandb

    with _open_wandb(spec, id=REPORT, resume="allow", name=REPORT) as run:
        artifact = wandb.Artifact(f"{spec.name}-{REPORT}", type=REPORT)
        artifact.add_dir(str(folder))
        run.log_artifact(artifact)
