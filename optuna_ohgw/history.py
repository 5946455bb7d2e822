"""Paused and resumed trials: one configuration is one logical trial."""

from __future__ import annotations

import math
import time
from collections.abc import Container, Iterator, Mapping
from typing import Any, Protocol

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

CONFIG_INDEX, RESUMED_FROM, RETRY_OF = "config_index", "resumed_from", "retry_of"
INTERRUPTED, CHECKPOINT, CLOCK = "interrupted", "checkpoint", "clock"
RECORD, CURVE = "ohgw", "curve"  # a trial's warm starts, and what it measured
KILLS = "kills"  # of a retry: how often in a row it was killed after the epoch that it goes on from
LOST = "lost_s"  # seconds that a trial's earlier runs trained in vain
# System attributes: a trial's decisions by resource; when and after what resource it was resumed.
DECISION, RESUMED = "ohgw:decision:", "ohgw:resumed"
DROPPED = "ohgw:dropped"  # trials whose checkpoints were deleted when this one ended
# Of a trial under a scheduler that chooses: which candidate it is, why, how far it was sent and when.
SENT = "ohgw:sent"
COMPLETED = "completed_rung_"  # Optuna's halving, by rung
WORKER = "worker"  # who trains a trial
SURPLUS = "surplus"  # of two that were made at the same moment the later, which nobody trains
# Of a cell's study: what its best configuration came to, when the cell is at its end.
FINAL = "final"


class HasTrials(Protocol):
    """What has trials: an Optuna study, or what was read of one."""

    def get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """Return the trials by number."""


_last_time = 0.0


def rising_time() -> float:
    """Return the Unix time in seconds, later than before in this process whatever its clock does.

    Events are put in order by it.
    """
    global _last_time  # noqa: PLW0603 - a clock of the process
    _last_time = max(time.time(), math.nextafter(_last_time, math.inf))
    return _last_time


def is_interrupted(trial: FrozenTrial) -> bool:
    """Return whether a trial was stopped or killed before its end, to be trained again."""
    return trial.state == TrialState.FAIL and trial.user_attrs.get("reason") == INTERRUPTED


def kept_until(trial: FrozenTrial) -> float:
    """Return the Unix time up to which an interrupted trial was not trained in vain; NaN where all was."""
    made = trial.user_attrs.get(CHECKPOINT)
    if made is None or trial.datetime_start is None or not is_interrupted(trial):
        return math.nan
    wall = float(made["wall"])
    return wall if wall > trial.datetime_start.timestamp() else math.nan  # else its source's


def retry_of(trial: FrozenTrial) -> int | None:
    """Return the number of the trial that this one repeats: after a stop of ours, or a stale heartbeat."""
    if RETRY_OF in trial.user_attrs:
        return int(trial.user_attrs[RETRY_OF])
    history = trial.system_attrs.get("retry_history")
    return int(history[-1]) if history else None


def decisions_of(trial: FrozenTrial) -> dict[int, dict[str, Any]]:
    """Return the decisions on a trial by resource, those before it was resumed included."""
    start = len(DECISION)
    found = {int(k[start:]): v for k, v in trial.system_attrs.items() if k.startswith(DECISION)}
    return dict(sorted(found.items()))


def paused_at(trial: FrozenTrial, resource: int) -> bool:
    """Return whether a scheduler paused a trial there."""
    return bool(trial.system_attrs.get(f"{DECISION}{resource}", {}).get("action") == "pause")


def is_duplicate(trial: FrozenTrial, trials: list[FrozenTrial]) -> bool:
    """Return whether an earlier trial goes on from the same one.

    Two processes may queue the same trial at once. Numbers are given in one order that all
    processes see, so the lowest goes on and every other knows that it is not the one. One that
    failed does not count: another may take its place.
    """
    source = trial.user_attrs.get(RESUMED_FROM)
    return source is not None and any(
        t.user_attrs.get(RESUMED_FROM) == source and t.state != TrialState.FAIL
        for t in trials[: trial.number]
    )


def resume(
    study: optuna.Study,
    trial: FrozenTrial,
    decided: Mapping[str, Any] | None = None,
    *,
    until: int | None = None,
    why: Mapping[str, Any] | None = None,
    **attributes: Any,
) -> None:
    """Queue a paused trial to go on: a waiting trial with its values, linked by ``resumed_from``.

    Args:
        study: The study.
        trial: What it goes on from.
        decided: Further system attributes, such as later decisions.
        until: Resource to which it is sent, where its scheduler does not decide that later.
        why: The decision to resume it.
        attributes: Further user attributes.
    """
    note = {RESUMED: {"time": rising_time(), "resource": trial.last_step, "until": until, "why": why}}
    carried = {name: value for name, value in trial.user_attrs.items() if name != "reason"}
    known = {name: value for name, value in trial.system_attrs.items() if name != DROPPED}
    study.add_trial(
        create_trial(
            state=TrialState.WAITING,
            params=trial.params,
            distributions=trial.distributions,
            intermediate_values=trial.intermediate_values,
            user_attrs={**carried, RESUMED_FROM: trial.number, **attributes},
            system_attrs={**known, **(decided or {}), **note},
        )
    )


def kills_in_vain(trial: FrozenTrial) -> int:
    """Return how often a killed trial was killed in a row, this time included, with no checkpoint between."""
    before = trial.user_attrs.get(KILLS) or {"count": 0, "epoch": 0}
    made = trial.user_attrs.get(CHECKPOINT)
    return int(before["count"]) + 1 if (0 if made is None else made["epoch"]) == before["epoch"] else 1


def retry(study: optuna.Study, trial: FrozenTrial, config_index: int) -> None:
    """Queue an interrupted trial to be trained again, from its last checkpoint where it left one.

    It has the same configuration, and goes by the decisions already made on it. What was reported,
    measured and warmed after the checkpoint is forgotten, and its recorded seconds are ``lost_s``.
    """
    made = trial.user_attrs.get(CHECKPOINT)
    kept = DECISION, RESUMED, SENT
    system = {k: v for k, v in trial.system_attrs.items() if k.startswith(kept)}
    epoch = 0 if made is None else int(made["epoch"])
    attributes: dict[str, Any] = {CONFIG_INDEX: config_index, RETRY_OF: trial.number}
    if trial.state == TrialState.RUNNING:
        attributes[KILLS] = {"count": kills_in_vain(trial), "epoch": epoch}
    elif KILLS in trial.user_attrs:
        attributes[KILLS] = None  # it was stopped, not killed
    curve = trial.user_attrs.get(CURVE) or {}
    lost = seconds_after(curve, epoch) + trial.user_attrs.get(LOST, 0.0)
    if lost:
        attributes[LOST] = round(lost, 4)
    if made is None and RESUMED_FROM not in trial.user_attrs:
        system = {k: v for k, v in system.items() if k.startswith(DECISION)}
        study.add_trial(create_trial(state=TrialState.WAITING, user_attrs=attributes, system_attrs=system))
        return
    carried = {name: value for name, value in trial.user_attrs.items() if name != "reason"}
    if made is not None:
        carried[RECORD] = carried.get(RECORD, [])[: made["warm_starts"]]
        carried[CURVE] = {column: values[:epoch] for column, values in curve.items()}
        system |= {f"{COMPLETED}{k}": trial.system_attrs[f"{COMPLETED}{k}"] for k in range(made["rungs"])}
    values = trial.intermediate_values
    study.add_trial(
        create_trial(
            state=TrialState.WAITING,
            params=trial.params,
            distributions=trial.distributions,
            intermediate_values={s: v for s, v in values.items() if made is None or s <= epoch},
            user_attrs=carried | attributes,
            system_attrs=system,
        )
    )


def seconds_after(curve: Mapping[str, Any], epoch: int) -> float:
    """Return the seconds that a curve records after an epoch."""
    return sum(sum(filter(None, curve.get(c, [])[epoch:])) for c in ("train_s", "warm_s", "eval_s"))


def superseded(trials: list[FrozenTrial]) -> set[int]:
    """Return the numbers of what is no logical trial: resumed since, waiting to be, or a duplicate."""
    numbers: set[int] = set()
    sources: set[int] = set()
    for trial in trials:
        source = trial.user_attrs.get(RESUMED_FROM)
        if source is None or trial.state == TrialState.FAIL:
            continue
        if source in sources or trial.state == TrialState.WAITING:
            numbers.add(trial.number)
        else:
            numbers.add(source)
        sources.add(source)
    return numbers


def chain(checkpoint: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """Yield a checkpoint's record and those before it that are kept."""
    while checkpoint is not None:
        yield checkpoint
        checkpoint = checkpoint["previous"]


def dropped(trials: list[FrozenTrial]) -> set[int]:
    """Return the numbers of the trials whose checkpoints were deleted, since no scheduler could want them."""
    return {number for t in trials for number in t.system_attrs.get(DROPPED, ())}


def checkpoint_bytes(study: HasTrials) -> int:
    """Return what the checkpoints of a study's paused and unfinished trials take on disk."""
    trials = study.get_trials(deepcopy=False)
    gone = superseded(trials) | dropped(trials)
    kept = [t.user_attrs.get(CHECKPOINT) for t in trials if t.number not in gone and _goes_on(t)]
    return sum({made["artifact"]: int(made["bytes"]) for last in kept for made in chain(last)}.values())


def _goes_on(trial: FrozenTrial) -> bool:
    paused = trial.state == TrialState.PRUNED and paused_at(trial, trial.last_step or 0)
    return paused or not trial.state.is_finished() or is_interrupted(trial)


class LogicalStudy(optuna.Study):
    """A view of a study in which a resumed trial stands for what it goes on from."""

    def __init__(self, study: optuna.Study) -> None:
        self.__dict__.update(study.__dict__)
        self.whole = study

    def get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """Return the logical trials."""
        trials = super().get_trials(deepcopy=deepcopy)
        gone = superseded(trials)
        return [t for t in trials if t.number not in gone and (states is None or t.state in states)]


def logical(study: optuna.Study) -> optuna.Study:
    """Return a study as its logical trials; itself where nothing was ever resumed."""
    trials = study.get_trials(deepcopy=False)
    return LogicalStudy(study) if any(RESUMED_FROM in t.user_attrs for t in trials) else study


def whole(study: optuna.Study) -> optuna.Study:
    """Return a study with all its trials, of which it may be a view."""
    if isinstance(study, LogicalStudy):
        return study.whole
    return getattr(study, "_study", study)  # HyperbandPruner's view of a bracket


def best_trial(study: optuna.Study) -> FrozenTrial:
    """Return the trial with the best last value, paused and stopped ones included.

    A search's answer, also where no trial reached the end. A trial that was resumed stands for what it
    goes on from.

    Raises:
        ValueError: If no ended trial has a value.
    """
    trials = logical(study).get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    last = {t.number: _last_value(t) for t in trials}
    known = [t for t in trials if not math.isnan(last[t.number])]
    if not known:
        raise ValueError("no ended trial has a value")
    sign = -1 if study.direction == StudyDirection.MAXIMIZE else 1
    return min(known, key=lambda t: sign * last[t.number])


def _last_value(trial: FrozenTrial) -> float:
    if trial.last_step is not None:
        return float(trial.intermediate_values[trial.last_step])
    return math.nan if trial.value is None else float(trial.value)
