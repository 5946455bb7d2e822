"""Why a trial went on, paused or stopped: the scheduler's decisions, and in words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from optuna.trial import FrozenTrial

from optuna_ohgw.history import decisions_of, is_interrupted
from optuna_ohgw.schedulers.stopping import StoppingAsha
from optuna_ohgw.spec import StudySpec

_ENDED = {"continue": "went on", "pause": "paused", "stop": "stopped", "resume": "resumed"}


def decisions(trials: list[FrozenTrial], spec: StudySpec) -> dict[int, dict[int, dict[str, Any]]]:
    """Return the decisions on a cell's trials, by number and resource, as ``Decision.record`` has them.

    Schedulers that resume store theirs. Optuna's pruner, ``asha``, stores none: they are made again
    by its rule from the reports in order of their wall times. Of two workers that reported at the
    same moment the order is not known for certain.

    Args:
        trials: All of the cell, by number.
        spec: The study.
    """
    if spec.scheduler.name != "asha":
        return {t.number: decisions_of(t) for t in trials}
    scheduler = StoppingAsha(
        spec.task.epochs,
        min_resource=spec.scheduler.min_resource,
        reduction_factor=spec.scheduler.reduction_factor,
        rule="optuna",
        bootstrap_count=spec.scheduler.bootstrap_count,
        maximize=spec.metric.maximize,
    )
    events = []
    for trial in trials:
        if is_interrupted(trial):
            continue
        scheduler.started(trial.number)
        walls = (trial.user_attrs.get("curve") or {}).get("wall", [])
        reported = trial.intermediate_values.items()
        events += [(walls[e - 1], trial.number, e, v) for e, v in reported if e <= len(walls)]
    found: dict[int, dict[int, dict[str, Any]]] = {trial.number: {} for trial in trials}
    for _, number, epoch, value in sorted(events):
        decision = scheduler.report(number, epoch, value)
        if decision.rung is not None and decision.resource == epoch:
            found[number][epoch] = decision.record()
    return found


def in_words(epoch: int, decision: Mapping[str, Any]) -> str:
    """Return a decision as a sentence: what happened where, value, cut-off, rank, rule."""
    place = f"rung {decision['rung'] + 1}, " if "rung" in decision else ""
    parts = [f"value {decision['value']:.4g}" if "value" in decision else "no value"]
    if "cutoff" in decision:
        parts.append(f"cut-off {decision['cutoff']:.4g}")
    if "rank" in decision and decision.get("of"):
        parts.append(f"rank {decision['rank']} of {decision['of']}")
    for name in ("bracket", "maximum"):
        if name in decision and not math.isnan(decision[name]):
            parts.append(f"{name} {decision[name]}")
    what = "promoted at once" if decision.get("promoted") else _ENDED[decision["action"]]
    what = "ended" if decision["rule"] == "full training" else what
    why = f"; {choice_in_words(decision['why'])}" if decision.get("why") else ""
    return f"{place}epoch {epoch}: {what}: {', '.join(parts)} ({decision['rule']}){why}"


def choice_in_words(why: Mapping[str, Any]) -> str:
    """Return why a configuration was resumed: how far it is sent, by what score or rank and cut-off."""
    parts = [f"to epoch {why['until']}"] if "until" in why else []
    if "rung" not in why and "value" in why:
        parts.append(f"score {why['value']:.4g}")
    if "cutoff" in why:
        parts.append(f"cut-off {why['cutoff']:.4g}")
    if "rank" in why and why.get("of"):
        parts.append(f"rank {why['rank']} of {why['of']}")
    return f"{', '.join(parts)} ({why['rule']})"
