"""How a cell ends: what is kept of its best trial, and its training to the full length."""

from __future__ import annotations

import csv
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from optuna_ohgw.cells import Cell
from optuna_ohgw.checkpoint import CheckpointStore
from optuna_ohgw.curve import Best, Curve
from optuna_ohgw.errors import CellFailed
from optuna_ohgw.final_training import FINAL_CHECKPOINT, train_final
from optuna_ohgw.history import CONFIG_INDEX, RECORD, checkpoint_bytes, is_interrupted
from optuna_ohgw.spec import StudySpec
from optuna_ohgw.workload import Workload

log = logging.getLogger("optuna_ohgw.ending")


def best_trial(study: optuna.Study) -> FrozenTrial | None:
    """Return the trial with the best validation value at any epoch, pruned ones included."""
    ended = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    scored = [t for t in ended if t.intermediate_values]
    sign = 1 if study.direction == StudyDirection.MAXIMIZE else -1
    return max(scored, key=lambda t: max(sign * v for v in t.intermediate_values.values()), default=None)


def keep_best(best: Best, study: optuna.Study, number: int, folder: Path, suffix: str) -> None:
    """Keep a completed trial's best weights while no other is better, for the end of the cell."""
    assert best.state is not None
    assert best.value is not None
    top = best_trial(study)
    if top is not None:
        other = max(best.sign * v for v in top.intermediate_values.values())
        if (other, -top.number) > (best.sign * best.value, -number):
            return
    name = f"trial-{number}{suffix}"
    best.state.save(folder / name)
    for path in folder.glob(f"trial-*{suffix}"):
        if path.name != name:
            path.unlink(missing_ok=True)


def raise_if_failed(study: optuna.Study, cell: Cell, folder: Path) -> None:
    """Raise CellFailed for a cell without a value, if its trials failed or none was trained."""
    trials = study.get_trials(deepcopy=False)
    failed = [t for t in trials if t.state == TrialState.FAIL and not is_interrupted(t)]
    if failed:
        last = f"the last failed with {failed[-1].user_attrs.get('reason')}"
        raise CellFailed(f"no trial of {cell.label} gave a value, {last}; see {folder}")
    if not any(t.state == TrialState.PRUNED for t in trials):
        raise CellFailed(f"no trial of {cell.label} was trained within its budget; give it more")


def drop_checkpoints(study: optuna.Study, cell: Cell, folder: Path) -> None:
    """Delete the checkpoints of trials that are paused for good, and record what they took."""
    path = folder / "checkpoints"
    if path.exists():
        study.set_user_attr("checkpoint_bytes", size := checkpoint_bytes(study))
        log.info("%s: %.1f MB of checkpoints deleted", cell.label, size / 1e6)
        shutil.rmtree(path)


def train_to_the_end(
    trial: FrozenTrial, spec: StudySpec, cell: Cell, work: Workload, stop: Callable[[], bool]
) -> dict[str, Any]:
    """Return the record of a cell's end: its best configuration, trained to the full length and tested.

    Leaves the weights and the learning curve in the cell's folder. Nothing is trained again where the
    trial reached the end and its best weights are there.

    Args:
        trial: The best of the cell.
        spec: The study.
        cell: The cell.
        work: What the trial's structure trains.
        stop: Becomes true when the run is to end (raises ``Interrupted``).
    """
    folder, index = cell.folder(spec.folder), int(trial.user_attrs[CONFIG_INDEX])
    kept = folder / f"trial-{trial.number}{work.suffix}"
    curve = Curve(trial.user_attrs["curve"])
    best = Best(_kept(work, kept) if trial.state == TrialState.COMPLETE else None, sign=spec.metric.sign)
    retrained = best.state is None
    if retrained:
        trained = [record["trained"] for record in trial.user_attrs[RECORD]]
        log.info("%s: training configuration %d to the end", cell.label, index)
        best, curve = train_final(
            spec, work, trained, seed=cell.seed, config_index=index, stop=stop, store=CheckpointStore(folder)
        )
    else:
        best.value = spec.metric.best(trial.intermediate_values.values())
    assert best.state is not None
    test = work.evaluate(best.state, "test")
    best.state.export(folder / f"best{work.suffix}")
    for path in (*folder.glob(f"trial-*{work.suffix}"), folder / FINAL_CHECKPOINT):
        path.unlink(missing_ok=True)
    with (folder / "curve.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("epoch", *curve.columns))
        rows = zip(*curve.columns.values(), strict=True)
        writer.writerows((epoch, *row) for epoch, row in enumerate(rows, start=1))
    log.info("%s: test %s %.4f", cell.label, spec.metric.name, test.metric)
    return {
        "trial": trial.number,
        "config_index": index,
        "psi": dict(best.state.psi),
        "best_epoch": best.state.epoch,
        "val_metric": best.value,
        "test_metric": test.metric,
        "test_loss": test.loss,
        "retrained": retrained,
        "seconds": sum(sum(filter(None, curve.columns[c])) for c in ("train_s", "eval_s"))
        if retrained
        else 0.0,
    }


def _kept(work: Workload, path: Path) -> Any:
    """Return the state in a file; None where it is not there or was harmed."""
    if not path.exists():
        return None
    try:
        return work.read(path)
    except Exception as error:  # of the format's library
        log.warning("%s cannot be used, its trial is trained again: %s", path, error)
        return None
