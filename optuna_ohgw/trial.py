"""One trial, visible from suggestion to last epoch, and the final training of a cell's best."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import optuna
import torch
from optuna.distributions import FloatDistribution

from optuna_ohgw.cost import PeakMemory, count_flops
from optuna_ohgw.space import SearchSpace
from optuna_ohgw.spec import STRUCTURE, StudySpec
from optuna_ohgw.steps import captured_bytes
from optuna_ohgw.suggest import RECORD, ohgw_suggest
from optuna_ohgw.tasks.base import Evaluation, Task
from optuna_ohgw.training import TrainState, initial_state, state_loss, train_epoch
from optuna_ohgw.variations import VARIATIONS, base_of, eta_of
from optuna_ohgw.warmstart import WarmStart

CURVE = "curve"
BATCHES = "batches_per_epoch"
FLOPS = "flops"
MEMORY = "memory"
COLUMNS = (
    "mbu",
    "wall",
    "train_s",
    "warm_s",
    "eval_s",
    "train_loss",
    "val_loss",
    "val_accuracy",
)
_FLUSH_SECONDS = 5.0
# By what it depends on: a process counts once, trials of other cells and seeds included.
_flops: dict[str, dict[str, int]] = {}
log = logging.getLogger("optuna_ohgw.trial")


@dataclass
class Curve:
    """What a trial measured, one row an epoch; ``mbu`` is cumulative, ``wall`` Unix seconds."""

    columns: dict[str, list[float | None]] = field(default_factory=lambda: {c: [] for c in COLUMNS})

    def append(self, **row: float) -> None:
        """Add an epoch, rounded for storage; what is not finite is None.

        Milliseconds of wall time, four digits of durations, six of the rest.
        """
        for name in COLUMNS:
            digits = 4 if name.endswith("_s") else 6
            value = round(row[name], 3) if name == "wall" else float(f"{row[name]:.{digits}g}")
            self.columns[name].append((value or 0) if math.isfinite(value) else None)


@dataclass
class Best:
    """The state of the best validation accuracy so far."""

    state: TrainState | None = None
    accuracy: float = -math.inf

    def offer(self, state: TrainState, evaluation: Evaluation) -> None:
        """Keep ``state`` if it is better than all before."""
        if evaluation.accuracy > self.accuracy:
            self.state, self.accuracy = state, evaluation.accuracy


class Stopwatch:
    """Seconds between calls, the device's work included."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.last = 0.0
        self.lap()

    def lap(self) -> float:
        """Return the seconds since the call before."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        elapsed, self.last = now - self.last, now
        return elapsed


def variation_settings(spec: StudySpec, variation: str) -> WarmStart | None:
    """Return what a variation does before training; None for the baseline."""
    own, eta_h = VARIATIONS[base_of(variation)], eta_of(variation)
    if own is None:
        return None
    shared = spec.warm_start.model_dump(exclude={"every_rung", "horizon"})
    shared["freeze"] = tuple(name for name in spec.warm_start.freeze if name in spec.ranges)
    return WarmStart(**{**shared, **own, **({} if eta_h is None else {"eta_h": eta_h})})


def distributions(spec: StudySpec) -> dict[str, FloatDistribution]:
    """Return Optuna's distributions of the continuous hyper-parameters."""
    return {n: FloatDistribution(r.low, r.high, log=r.log) for n, r in spec.ranges.items()}


def suggest_structure(trial: optuna.trial.BaseTrial, spec: StudySpec) -> dict[str, Any]:
    """Return the structural parameters: suggested where the spec has choices, else fixed."""
    fixed = {name: getattr(spec.task, name) for name in STRUCTURE}
    chosen = {n: trial.suggest_categorical(n, list(c.choices)) for n, c in spec.choices.items()}
    return {**fixed, **chosen}


def flops(
    spec: StudySpec, variation: str, structure: dict[str, Any], task: Task, state: TrainState
) -> dict[str, int]:
    """Return the FLOPs of a training mini-batch and of the variation's warm start, counted once."""
    key = json.dumps(
        [spec.task.model_dump(), spec.warm_start.model_dump(), *spec.ranges, variation, structure]
    )
    if key not in _flops:
        settings, space = variation_settings(spec, variation), SearchSpace(distributions(spec))
        _flops[key] = count_flops(task, state, space, settings, spec.warm_start.horizon, spec.constants)
    return _flops[key]


@contextmanager
def recorded_memory(trial: optuna.Trial, device: torch.device) -> Iterator[PeakMemory]:
    """Record the peak memory of what is done inside, however it ends."""
    memory = PeakMemory(device)
    try:
        with memory:
            yield memory
    finally:
        trial.set_user_attr(MEMORY, memory.peaks)


def run_trial(
    trial: optuna.Trial,
    spec: StudySpec,
    variation: str,
    task_for: Callable[[dict[str, Any]], Task],
    *,
    seed: int,
    config_index: int,
    stop: Callable[[], bool] = lambda: False,
    spent: Callable[[], bool] = lambda: False,
) -> Best:
    """Train one trial to the end, or raise ``TrialPruned``; return its best state.

    The trial's attributes keep its streams, its warm starts, its curve, its FLOPs and peak memory,
    and why it ended early. An epoch whose training or validation loss is not finite prunes it, and
    is not reported.

    Args:
        trial: A trial of the cell's study.
        spec: The study.
        variation: Name of the cell's variation.
        task_for: Structural parameters ↦ task on the device.
        seed: Study seed.
        config_index: Position of the configuration in the cell.
        stop: Becomes true when the run is to end (raises ``Interrupted``).
        spent: Becomes true when the cell's budget is spent (prunes, with the reason).
    """
    settings, space = variation_settings(spec, variation), distributions(spec)
    structure = suggest_structure(trial, spec)
    task = task_for(structure)
    state = initial_state(task, seed, config_index, spec.task.epochs)
    digests = {"weights": state.digest(), "order": task.order_digest(seed, config_index)}
    trial.set_user_attr("streams", {"seed": seed, "config_index": config_index, **digests})
    trial.set_user_attr(BATCHES, task.batches_per_epoch)
    trial.set_user_attr(FLOPS, flops(spec, variation, structure, task, state))
    rungs = spec.scheduler.rungs(spec.task.epochs)
    warm_epochs = (0, *rungs) if spec.warm_start.every_rung and settings is not None else (0,)
    curve, best, mbu, flushed = Curve(), Best(), 0.0, time.monotonic()
    with recorded_memory(trial, task.device) as memory:
        watch = Stopwatch(task.device)
        for epoch in range(spec.task.epochs):
            if epoch in warm_epochs:
                rung = warm_epochs.index(epoch)
                memory.note()
                base = replace(state, psi={**spec.constants, **state.psi})
                loss = state_loss(task, base, rung, spec.warm_start.horizon) if settings else None
                psi = ohgw_suggest(trial, space, loss, settings, every_rung=rung > 0, seed=seed)
                state = replace(base, psi={**base.psi, **psi})
                record = trial.user_attrs[RECORD][-1]
                mbu += record["cost_mbu"]
            warm_s = record.get("seconds", 0.0) if epoch in warm_epochs else 0.0
            watch.lap()
            state, train_loss = train_epoch(task, state, stop)
            train_s = watch.lap()
            memory.captured = captured_bytes(task.network())
            evaluation = task.evaluate("validation")
            mbu += task.batches_per_epoch
            curve.append(
                mbu=mbu,
                wall=time.time(),
                train_s=train_s,
                warm_s=warm_s,
                eval_s=watch.lap(),
                train_loss=train_loss,
                val_loss=evaluation.loss,
                val_accuracy=_accuracy(evaluation),
            )
            if not (math.isfinite(train_loss) and math.isfinite(evaluation.loss)):
                losses = f"training loss {train_loss:.3g}, validation loss {evaluation.loss:.3g}"
                _prune(trial, curve, f"diverged in epoch {epoch + 1}: {losses}")
            log.debug(
                "configuration %d epoch %d: training loss %.4f, validation accuracy %.4f",
                config_index,
                epoch + 1,
                train_loss,
                evaluation.accuracy,
            )
            best.offer(state, evaluation)
            last = epoch + 1 == spec.task.epochs
            if last or epoch + 1 in rungs or time.monotonic() - flushed > _FLUSH_SECONDS:
                trial.set_user_attr(CURVE, curve.columns)
                flushed = time.monotonic()
            trial.report(evaluation.accuracy, epoch + 1)
            if not last and trial.should_prune():
                _prune(trial, curve, f"stopped by the pruner after epoch {epoch + 1}")
            if not last and spent():
                _prune(trial, curve, f"budget of the cell spent after epoch {epoch + 1}")
        return best


def train_final(
    spec: StudySpec,
    task: Task,
    trained: list[dict[str, float]],
    *,
    seed: int,
    config_index: int,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[Best, Curve]:
    """Return the best state of a configuration trained to the end, with its learning curve.

    It repeats the trial's own streams, so on a CPU the epochs that the trial did come out the
    same. ``trained`` holds the values of each warm start of the trial, in order; rungs that it did
    not reach are trained with the last. It ends early where it diverges.
    """
    state = initial_state(task, seed, config_index, spec.task.epochs)
    warm_epochs = (0, *spec.scheduler.rungs(spec.task.epochs))
    curve, best, watch = Curve(), Best(), Stopwatch(task.device)
    for epoch in range(spec.task.epochs):
        if epoch in warm_epochs and warm_epochs.index(epoch) < len(trained):
            psi = trained[warm_epochs.index(epoch)]
            state = replace(state, psi={**spec.constants, **state.psi, **psi})
        state, train_loss = train_epoch(task, state, stop)
        train_s = watch.lap()
        evaluation = task.evaluate("validation")
        curve.append(
            mbu=(epoch + 1) * task.batches_per_epoch,
            wall=time.time(),
            train_s=train_s,
            warm_s=0.0,
            eval_s=watch.lap(),
            train_loss=train_loss,
            val_loss=evaluation.loss,
            val_accuracy=_accuracy(evaluation),
        )
        if not (math.isfinite(train_loss) and math.isfinite(evaluation.loss)):
            break
        best.offer(state, evaluation)
    return best, curve


def _accuracy(evaluation: Evaluation) -> float:
    return evaluation.accuracy if math.isfinite(evaluation.loss) else math.nan


def _prune(trial: optuna.Trial, curve: Curve, reason: str) -> NoReturn:
    trial.set_user_attr(CURVE, curve.columns)
    trial.set_user_attr("reason", reason)
    raise optuna.TrialPruned
