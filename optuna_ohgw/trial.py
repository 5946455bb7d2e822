"""One trial, visible from suggestion to last epoch."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NoReturn

import optuna
import torch

from optuna_ohgw import checkpoint
from optuna_ohgw.cell_study import distributions
from optuna_ohgw.curve import Best, Curve, Progress, Stopwatch, is_finite, metric_of
from optuna_ohgw.freezing import epochs
from optuna_ohgw.history import CHECKPOINT, CURVE, RECORD, RESUMED_FROM, paused_at
from optuna_ohgw.peak_memory import PeakMemory
from optuna_ohgw.space import SearchSpace
from optuna_ohgw.spec import StudySpec
from optuna_ohgw.suggest import ohgw_suggest
from optuna_ohgw.surroundings import cgroup_record, read_usage
from optuna_ohgw.training import Interrupted
from optuna_ohgw.variations import BASELINE, WARM_STARTS, eta_of, warm_start_of
from optuna_ohgw.warmstart import WarmStart
from optuna_ohgw.workload import Workload

BATCHES = "batches_per_epoch"
FLOPS = "flops"
MEMORY = "memory"
CGROUP = "cgroup"
_FLUSH_SECONDS = 5.0
# By what it depends on: a process counts once, trials of other cells and seeds included.
_flops: dict[str, dict[str, int]] = {}
log = logging.getLogger("optuna_ohgw.trial")


def variation_settings(spec: StudySpec, variation: str) -> WarmStart | None:
    """Return what a variation does before training; None for the baseline."""
    own, eta_h = WARM_STARTS[warm_start_of(variation) or BASELINE], eta_of(variation)
    if own is None:
        return None
    shared = spec.warm_start.model_dump(exclude={"every_rung", "horizon"})
    shared["freeze"] = tuple(name for name in spec.warm_start.freeze if name in spec.ranges)
    return WarmStart(**{**shared, **own, **({} if eta_h is None else {"eta_h": eta_h})})


def suggest_structure(trial: optuna.trial.BaseTrial, spec: StudySpec) -> dict[str, Any]:
    """Return the structural parameters: suggested where the spec has choices, else fixed."""
    chosen = {n: trial.suggest_categorical(n, list(c.choices)) for n, c in spec.choices.items()}
    return {**spec.task.structure, **chosen}


def structure_of(trial: optuna.trial.FrozenTrial, spec: StudySpec) -> dict[str, Any]:
    """Return the structural parameters of a trial that has begun."""
    return {name: trial.params.get(name, value) for name, value in spec.task.structure.items()}


def flops(
    spec: StudySpec, variation: str, structure: dict[str, Any], work: Workload, state: Any
) -> dict[str, int]:
    """Return the FLOPs of a training mini-batch and of the variation's warm start, counted once."""
    key = json.dumps(
        [spec.task.model_dump(), spec.warm_start.model_dump(), *spec.ranges, variation, structure]
    )
    if key not in _flops:
        settings, space = variation_settings(spec, variation), SearchSpace(distributions(spec))
        _flops[key] = work.flops(state, space, settings, spec.warm_start.horizon, spec.constants)
    return _flops[key]


@contextmanager
def recorded_memory(trial: optuna.Trial, device: torch.device) -> Iterator[PeakMemory]:
    """Record the peak memory of what is done inside, however it ends; with what a paused trial had.

    And what its control groups used, where there are any.
    """
    memory, earlier = PeakMemory(device), trial.user_attrs.get(MEMORY) or {}
    before = read_usage()
    try:
        with memory:
            yield memory
    finally:
        both = {k: [p for p in (v, earlier.get(k)) if p is not None] for k, v in memory.peaks.items()}
        trial.set_user_attr(MEMORY, {kind: max(peaks, default=None) for kind, peaks in both.items()})
        if used := cgroup_record(before, read_usage(), trial.user_attrs.get(CGROUP) or {}):
            trial.set_user_attr(CGROUP, used)


def run_trial(  # noqa: PLR0915 - one trial, top to bottom
    trial: optuna.Trial,
    spec: StudySpec,
    variation: str,
    workload_for: Callable[[dict[str, Any]], Workload],
    *,
    seed: int,
    config_index: int,
    stop: Callable[[], bool] = lambda: False,
    spent: Callable[[], bool] = lambda: False,
    store: Any = None,
) -> Best:
    """Train one trial to the end, or raise ``TrialPruned``; return its best state.

    A trial leaves a checkpoint where its scheduler pauses it, where the run stops, and every
    ``execution.checkpoint_s``; one that is resumed or trained again goes on from it.

    The trial's attributes keep its streams, its warm starts, its curve, its FLOPs and peak memory,
    and why it ended early. An epoch whose training loss, validation loss or metric is not finite
    prunes it, and is not reported.

    Args:
        trial: A trial of the cell's study.
        spec: The study.
        variation: Name of the cell's variation.
        workload_for: Structural parameters ↦ what is trained, on the device.
        seed: Study seed.
        config_index: Position of the configuration in the cell.
        stop: Becomes true when the run is to end (raises ``Interrupted``).
        spent: Becomes true when the cell's budget is spent (prunes, with the reason).
        store: Artifact store of the checkpoints.
    """
    settings, space = variation_settings(spec, variation), distributions(spec)
    structure = suggest_structure(trial, spec)
    work = workload_for(structure)
    state = work.start(seed, config_index)
    progress = Progress(work, state, Best(sign=spec.metric.sign))
    if "streams" not in trial.user_attrs:
        digests = {"weights": state.digest(), "order": work.order_digest(seed, config_index)}
        trial.set_user_attr("streams", {"seed": seed, "config_index": config_index, **digests})
        trial.set_user_attr(BATCHES, work.batches_per_epoch)
        trial.set_user_attr(FLOPS, flops(spec, variation, structure, work, state))
    rungs, total = spec.scheduler.rungs(spec.task.epochs), spec.task.epochs
    warm_epochs = (0, *rungs) if spec.warm_start.every_rung and settings is not None else (0,)
    every_s = spec.execution.checkpoint_s if store is not None else None
    known = trial.study.get_trials(deepcopy=False)[trial.number].intermediate_values
    curve, first, warm_starts, warmed, mbu = progress.curve, 0, 0, 0, 0.0
    flushed = time.monotonic()
    with recorded_memory(trial, work.device) as memory:
        watch = Stopwatch(work.device)
        try:
            for number in epochs(trial, total, store, every_s=every_s, progress=progress):
                epoch, state = number - 1, progress.state
                if not first:
                    first, curve, warm_starts = number, progress.curve, _warm_starts(trial)
                    warmed = warm_starts
                    # Not from the curve, which is rounded.
                    cost = sum(r["cost_mbu"] for r in trial.user_attrs.get(RECORD, [])[:warm_starts])
                    mbu = float(cost + work.batches_per_epoch * epoch)
                if number > first and spent():
                    _prune(trial, curve, f"budget of the cell spent after epoch {epoch}")
                warm_s = 0.0
                if epoch in warm_epochs:
                    rung = warm_epochs.index(epoch)
                    base = replace(state, psi={**spec.constants, **state.psi})
                    loss = work.loss(base, rung, spec.warm_start.horizon) if settings else None
                    psi = ohgw_suggest(trial, space, loss, settings, every_rung=rung > 0, seed=seed)
                    state = replace(base, psi={**base.psi, **psi})
                    records = trial.user_attrs[RECORD]
                    warmed, mbu = len(records), mbu + records[-1]["cost_mbu"]
                    warm_s = records[-1].get("seconds", 0.0)
                watch.lap()
                state, train_loss = work.train(state, stop)
                train_s = watch.lap()
                memory.captured = work.captured_bytes()
                evaluation = work.evaluate(state, "validation")
                mbu += work.batches_per_epoch
                curve.append(
                    mbu=mbu,
                    wall=time.time(),
                    train_s=train_s,
                    warm_s=warm_s,
                    eval_s=watch.lap(),
                    train_loss=train_loss,
                    val_loss=evaluation.loss,
                    val_metric=metric_of(evaluation),
                )
                if not is_finite(train_loss, evaluation):
                    losses = f"training loss {train_loss:.3g}, validation loss {evaluation.loss:.3g}"
                    losses += "" if math.isfinite(evaluation.metric) else f", metric {evaluation.metric}"
                    _prune(trial, curve, f"diverged in epoch {number}: {losses}")
                shown = config_index, number, train_loss, evaluation.metric
                log.debug("configuration %d epoch %d: training loss %.4f, validation metric %.4f", *shown)
                progress.state = state
                progress.best.offer(state, evaluation)
                warm_starts = warmed
                if number == total or number in rungs or time.monotonic() - flushed > _FLUSH_SECONDS:
                    trial.set_user_attr(CURVE, curve.columns)
                    flushed = time.monotonic()
                if number not in known:  # by an earlier run, whose checkpoint was lost
                    trial.report(evaluation.metric, number)
        except Interrupted:
            epoch = progress.state.epoch
            if store is not None and epoch and epoch != (trial.user_attrs.get(CHECKPOINT) or {}).get("epoch"):
                trial.set_user_attr(CURVE, curve.columns)
                parts, wall = {"progress": progress}, curve.columns["wall"][-1]
                checkpoint.save(trial, epoch, store, parts, warm_starts=warm_starts, wall=wall)
            raise
        except optuna.TrialPruned:
            if "reason" not in trial.user_attrs:
                trial.set_user_attr(CURVE, curve.columns)
                trial.set_user_attr("reason", why_pruned(trial, len(curve.columns["mbu"]), first))
            raise
        return progress.best


def _warm_starts(trial: optuna.Trial) -> int:
    """Return the warm starts of a trial that its checkpoint holds."""
    made = trial.user_attrs.get(CHECKPOINT)
    return 0 if made is None else int(made["warm_starts"])


def why_pruned(trial: optuna.Trial, epoch: int, first: int) -> str:
    """Return why a trial was pruned after an epoch; ``first`` is the first that it trained itself."""
    if not first:
        return f"trial {trial.user_attrs[RESUMED_FROM]} is resumed by another"
    frozen = trial.study.get_trials(deepcopy=False)[trial.number]
    return f"{'paused' if paused_at(frozen, epoch) else 'stopped'} by the pruner after epoch {epoch}"


def _prune(trial: optuna.Trial, curve: Curve, reason: str) -> NoReturn:
    trial.set_user_attr(CURVE, curve.columns)
    trial.set_user_attr("reason", reason)
    raise optuna.TrialPruned
