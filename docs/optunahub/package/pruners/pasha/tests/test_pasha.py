"""Decisions by hand: the package is loaded as the hub loads it."""

from pathlib import Path

import optuna
import optunahub
import pytest
from optuna.trial import TrialState

pasha = optunahub.load_local_module("pruners/pasha", registry_root=str(Path(__file__).parents[3]))


def run(study, values):
    """Report the values of a new or resumed trial until it is pruned; return its number and epochs."""
    trial = study.ask()
    known = len(study.trials[trial.number].intermediate_values)
    for epoch, value in enumerate(values, start=1):
        if epoch <= known:
            continue
        trial.report(value, epoch)
        if trial.should_prune():
            study.tell(trial, state=TrialState.PRUNED)
            return trial.number, epoch
    study.tell(trial, values[-1])
    return trial.number, len(values)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_best_go_on_to_the_second_rung_and_no_further_while_the_ranking_is_settled(sign):
    study = optuna.create_study(
        direction="minimize" if sign > 0 else "maximize", pruner=pasha.PashaPruner(max_resource=27)
    )
    ends = [run(study, [sign * loss] * 27) for loss in (0.5, 0.8, 0.5)]
    # 0.5 waits alone. Beside 0.8 it meets the cut-off, 0.6, and is resumed before another begins.
    assert ends == [(0, 1), (1, 1), (2, 3)]
    assert study.trials[2].user_attrs["resumed_from"] == 0
    assert run(study, [sign * 0.4] * 27)[1] == 3  # promoted at once; ranked alike at both rungs
    assert max(t.last_step for t in study.trials if t.last_step) == 3


def test_the_maximum_grows_when_the_ranking_changes():
    study = optuna.create_study(pruner=pasha.PashaPruner(max_resource=27))
    curves = [[0.1 * k, 0.1 * k] + [1 - 0.1 * k] * 25 for k in (5, 8, 5, 2, 2, 1, 1)]
    for curve in curves:
        run(study, curve)
    assert max(t.last_step for t in study.trials if t.last_step) > 3
