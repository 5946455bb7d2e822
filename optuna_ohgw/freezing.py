"""Freeze and thaw: a trial that is paused, stopped or killed goes on later from a checkpoint, bit for bit."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import optuna

from optuna_ohgw import checkpoint
from optuna_ohgw.history import CHECKPOINT, DROPPED, RESUMED_FROM, is_duplicate, paused_at
from optuna_ohgw.schedulers.pruners import SchedulerPruner


def epochs(
    trial: optuna.Trial, total: int, store: Any, *, every_s: float | None = None, **parts: Any
) -> Iterator[int]:
    """Yield the epochs that a trial has left, 1 to ``total``; freeze it where the pruner pauses it.

    Report each epoch inside the loop. A pruner of this package that pauses a trial ends the loop
    by ``TrialPruned`` after a checkpoint is made; a resumed trial, whose number is new and whose
    ``resumed_from`` attribute is the old one, begins after the epoch of the checkpoint, with every
    part as it was. With ``every_s`` a trial leaves checkpoints while it runs, too, and a retry that
    carries its attributes, such as that of Optuna's ``RetryHeartbeatStaleTrialCallback``, begins after
    the last. On a CPU it goes on as if nothing had happened, bit for bit, if ``parts`` and the random
    streams below are all that training depends on.

    Checkpoints are artifacts of their trial. Two are kept for each configuration, the last and the one
    before, and none when it is trained to ``total`` or stopped, or paused for good: a pause, or the end
    of training, deletes those that the scheduler cannot want any more, such as of a synchronous rung's
    losers. One that is missing or altered is passed over, so a trial may begin before what it has
    reported already: report such an epoch again or not, it changes nothing.

    Args:
        trial: The running trial.
        total: Epochs of full training, the pruner's ``max_resource``.
        store: An Optuna artifact store, such as ``FileSystemArtifactStore``.
        every_s: Seconds between checkpoints of a running trial; None: only where it is paused.
        parts: What is saved, by name: whatever has ``state_dict`` and ``load_state_dict`` (network,
            optimizer, schedule, scaler) or is a ``torch.Generator``. The default streams of torch,
            CUDA, NumPy and ``random`` are saved with them.

    Yields:
        Epoch numbers from 1.

    Raises:
        optuna.TrialPruned: Where the pruner stops or pauses the trial, or where another trial is
            already at work on the same checkpoint.
        ValueError: If the checkpoint holds other parts.
    """
    if RESUMED_FROM in trial.user_attrs:
        trials = trial.study.get_trials(deepcopy=False)
        if is_duplicate(trials[trial.number], trials):
            raise optuna.TrialPruned(f"trial {trial.user_attrs[RESUMED_FROM]} is resumed by another")
    first, saved = checkpoint.load(trial, store, parts) + 1, time.monotonic()
    for epoch in range(first, total + 1):
        yield epoch
        # One that resumes is asked at the end, too: a worker is free for a paused trial then.
        resumes = isinstance(trial.study.pruner, SchedulerPruner)
        pruned = (epoch < total or resumes) and trial.should_prune()
        if pruned and epoch < total:
            paused = paused_at(trial.study.get_trials(deepcopy=False)[trial.number], epoch)
            for_good = _drop(trial, store)
            if paused and trial.number not in for_good:
                checkpoint.save(trial, epoch, store, parts)
            else:
                checkpoint.delete(store, trial.user_attrs.get(CHECKPOINT))
            raise optuna.TrialPruned
        if every_s is not None and epoch < total and time.monotonic() - saved >= every_s:
            checkpoint.save(trial, epoch, store, parts)
            saved = time.monotonic()
    _drop(trial, store)
    checkpoint.delete(store, trial.user_attrs.get(CHECKPOINT))


def _drop(trial: optuna.Trial, store: Any) -> list[int]:
    """Delete the checkpoints that the scheduler cannot want any more; return the numbers of their trials.

    Of those whose trial has not ended only this one's; the others wait for the next call.
    """
    pruner = trial.study.pruner
    if not isinstance(pruner, SchedulerPruner):
        return []
    trials = trial.study.get_trials(deepcopy=False)
    found = [n for n in pruner.unwanted(trial.study) if trials[n].state.is_finished() or n == trial.number]
    for number in found:
        checkpoint.delete(store, trials[number].user_attrs.get(CHECKPOINT))
    if found:
        # An ended trial takes no attribute.
        trial.storage.set_trial_system_attr(trial._trial_id, DROPPED, found)
    return found
