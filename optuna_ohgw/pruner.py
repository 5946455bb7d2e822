"""A pruner that a resumed run does not mislead."""

from __future__ import annotations

from collections.abc import Container

import optuna
from optuna.pruners import BasePruner
from optuna.trial import FrozenTrial, TrialState

from optuna_ohgw.history import is_interrupted


class RetryAwarePruner(BasePruner):
    """Return a pruner that decides as ``base`` does, among the trials that count.

    Optuna's halving compares with every trial that reached a rung, failed ones included. An
    interrupted trial is trained again from its start, so its retry would compete with itself.
    """

    def __init__(self, base: BasePruner) -> None:
        self.base = base

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Return the base pruner's decision as if no trial had been interrupted."""
        return self.base.prune(_CountedStudy(study), trial)


class _CountedStudy(optuna.Study):
    """A view of a study without its interrupted trials."""

    def __init__(self, study: optuna.Study) -> None:
        self.__dict__.update(study.__dict__)

    def get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """Return the trials that count."""
        return [t for t in super().get_trials(deepcopy, states) if not is_interrupted(t)]
