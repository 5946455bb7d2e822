"""Schedulers that choose, as pruners: what they remember and whom they start is in the storage."""

from __future__ import annotations

from typing import Any

import optuna
from optuna.trial import TrialState, create_trial

from optuna_ohgw.history import CONFIG_INDEX, SENT, rising_time
from optuna_ohgw.schedulers.base import Decision
from optuna_ohgw.schedulers.choosing import Chooser
from optuna_ohgw.schedulers.fold import Fold
from optuna_ohgw.schedulers.pruners import SchedulerPruner

MEMORY = "ohgw:memory"


class ChooserPruner(SchedulerPruner):
    """A :class:`SchedulerPruner` of a pool of candidates that are known by their ``config_index``.

    ``queue`` queues new configurations too, with their ``config_index``; call it in one process at a
    time. The trial keeps why and how far it was sent. What the choices depend on beside the
    events, such as weights, is an attribute of the study: 64 KB at most.
    """

    def _suggest(self, study: optuna.Study, fold: Fold) -> Decision:
        scheduler = fold.scheduler
        assert isinstance(scheduler, Chooser)
        known = study._storage.get_study_system_attrs(study._study_id).get(MEMORY)
        if known is not None:
            scheduler.load(known)
        decision = scheduler.suggest()
        memory = scheduler.dump()
        if memory != known:
            study._storage.set_study_system_attr(study._study_id, MEMORY, memory)
        return decision

    def _start(self, study: optuna.Study, chosen: Decision) -> bool:
        if chosen.config is None:
            return False
        attributes = {CONFIG_INDEX: chosen.config}
        note = {SENT: sent(chosen)}
        study.add_trial(create_trial(state=TrialState.WAITING, user_attrs=attributes, system_attrs=note))
        return True


def sent(chosen: Decision) -> dict[str, Any]:
    """Return the note of a start: candidate, how far it is sent, when, by what rule and score."""
    return {
        "config": chosen.config,
        "until": chosen.until,
        "time": rising_time(),
        "rule": chosen.rule,
        "score": chosen.value,
    }
