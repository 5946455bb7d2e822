"""The training of a cell's best configuration to the full length."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import replace

from optuna_ohgw import checkpoint
from optuna_ohgw.curve import Best, Curve, Progress, Stopwatch, is_finite, metric_of
from optuna_ohgw.spec import StudySpec
from optuna_ohgw.training import Interrupted
from optuna_ohgw.workload import Workload

FINAL_CHECKPOINT = "final.checkpoint"
log = logging.getLogger("optuna_ohgw.final_training")


def train_final(
    spec: StudySpec,
    work: Workload,
    trained: list[dict[str, float]],
    *,
    seed: int,
    config_index: int,
    stop: Callable[[], bool] = lambda: False,
    store: checkpoint.CheckpointStore | None = None,
) -> tuple[Best, Curve]:
    """Return the best state of a configuration trained to the end, with its learning curve.

    It repeats the trial's own streams, so on a CPU the epochs that the trial did come out the
    same. ``trained`` holds the values of each warm start of the trial, in order; rungs that it did
    not reach are trained with the last. It ends early where it diverges. With a ``store`` it leaves
    checkpoints as a trial does, and goes on from them.
    """
    progress = Progress(work, work.start(seed, config_index), Best(sign=spec.metric.sign))
    of = [seed, config_index, json.dumps(trained, sort_keys=True)]
    if store is not None and checkpoint.take(store, FINAL_CHECKPOINT, of, progress):
        log.info("the final training goes on from epoch %d", progress.state.epoch)
    warm_epochs = (0, *spec.scheduler.rungs(spec.task.epochs))
    kept, saved, watch = progress.state.epoch, time.monotonic(), Stopwatch(work.device)
    try:
        for epoch in range(progress.state.epoch, spec.task.epochs):
            state = progress.state
            if epoch in warm_epochs and warm_epochs.index(epoch) < len(trained):
                psi = trained[warm_epochs.index(epoch)]
                state = replace(state, psi={**spec.constants, **state.psi, **psi})
            watch.lap()
            state, train_loss = work.train(state, stop)
            train_s = watch.lap()
            evaluation = work.evaluate(state, "validation")
            progress.curve.append(
                mbu=(epoch + 1) * work.batches_per_epoch,
                wall=time.time(),
                train_s=train_s,
                warm_s=0.0,
                eval_s=watch.lap(),
                train_loss=train_loss,
                val_loss=evaluation.loss,
                val_metric=metric_of(evaluation),
            )
            if not is_finite(train_loss, evaluation):
                break
            progress.state = state
            progress.best.offer(state, evaluation)
            due = time.monotonic() - saved >= spec.execution.checkpoint_s
            if store is not None and due and epoch + 1 < spec.task.epochs:
                checkpoint.keep(store, FINAL_CHECKPOINT, of, progress)
                kept, saved = progress.state.epoch, time.monotonic()
    except Interrupted:
        if store is not None and progress.state.epoch > kept:
            checkpoint.keep(store, FINAL_CHECKPOINT, of, progress)
        raise
    return progress.best, progress.curve
