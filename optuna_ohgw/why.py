"""One trial explained: what it is, what was decided on it, how it ended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial

from optuna_ohgw.cells import Cell, config_index
from optuna_ohgw.decisions import choice_in_words, decisions, in_words
from optuna_ohgw.errors import UserError
from optuna_ohgw.history import RESUMED, RESUMED_FROM, SENT
from optuna_ohgw.spec import StudySpec


def why(storage: BaseStorage, spec: StudySpec, cell: Cell, number: int) -> list[str]:
    """Return lines on a trial, the decisions before it was resumed included.

    Raises:
        UserError: If the cell has not begun or has no such trial.
    """
    known = {s.study_name: s._study_id for s in storage.get_all_studies()}
    trials = storage.get_all_trials(known[cell.name], deepcopy=False) if cell.name in known else []
    if number >= len(trials):
        has = f"has trials 0 to {len(trials) - 1}" if trials else "has no trial yet"
        raise UserError(f"explain: trial {number} of {cell.label}: the cell {has}")
    trial = trials[number]
    lines = [f"{cell.label} trial {number}, configuration {config_index(trial, trials)}: {_state(trial)}"]
    if SENT in trial.system_attrs:
        lines.append(f"  {_chosen(trial.system_attrs[SENT])}")
    if RESUMED_FROM in trial.user_attrs:
        lines.append(f"resumed from trial {trial.user_attrs[RESUMED_FROM]}{_resumed(trial)}")
    later = [t.number for t in trials if t.user_attrs.get(RESUMED_FROM) == number]
    made = decisions(trials, spec)[number]
    lines += [f"  {in_words(epoch, decision)}" for epoch, decision in made.items()]
    if not made:
        lines.append("  nothing was decided on it")
    if "reason" in trial.user_attrs:
        lines.append(f"ended: {trial.user_attrs['reason']}")
    if later:
        lines.append(f"resumed as trial {later[0]}")
    return lines


def _chosen(sent: Mapping[str, Any]) -> str:
    score = "" if sent.get("score") is None else f", score {sent['score']:.4g}"
    return f"chosen by {sent['rule']}{score}; sent to epoch {sent['until']}"


def _resumed(trial: FrozenTrial) -> str:
    why = trial.system_attrs.get(RESUMED, {}).get("why")
    return f": {choice_in_words(why)}" if why else ""


def _state(trial: FrozenTrial) -> str:
    count = len(trial.intermediate_values)
    return f"{trial.state.name.lower()} after {count} epoch{'' if count == 1 else 's'}"
