"""The benchmark of decisions: its bulk copies against Optuna's own, and what it counts."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
from optuna.pruners import SuccessiveHalvingPruner
from optuna.trial import TrialState, create_trial

from optuna_ohgw.bench.choices import choices
from optuna_ohgw.bench.clock import Spread
from optuna_ohgw.bench.decisions import BETWEEN, EACH, FOLD, NEW, PRUNERS, WARM, by_kind
from optuna_ohgw.bench.histories import EPOCHS, add_running, end, history, open_history, write_history
from optuna_ohgw.history import RESUMED_FROM, decisions_of
from optuna_ohgw.schedulers.pruners import PromotionPruner

OPTUNAS = SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)


@pytest.mark.parametrize("pruner", [PromotionPruner(EPOCHS), OPTUNAS])
def test_a_history_is_written_as_optuna_would_write_it(pruner, tmp_path: Path) -> None:
    trials = history(pruner, 40)
    write_history(tmp_path / "own.db", trials)
    study = optuna.create_study(storage=f"sqlite:///{tmp_path / 'optunas.db'}")
    study.add_trials(trials)
    assert open_history(tmp_path / "own.db").trials == study.trials
    assert len(trials) == 40
    assert {t.state for t in trials} == {TrialState.COMPLETE, TrialState.PRUNED}


def test_a_history_holds_the_decisions_of_its_pruner_on_resumed_trials_too() -> None:
    trials = history(PromotionPruner(EPOCHS), 200)
    resumed = [t for t in trials if RESUMED_FROM in t.user_attrs]
    assert resumed
    for trial in trials:
        assert trial.last_step in decisions_of(trial)
    for trial in resumed:
        assert set(trials[trial.user_attrs[RESUMED_FROM]].intermediate_values) < set(
            trial.intermediate_values
        )


def test_nothing_waits_or_runs_after_a_measured_decision(tmp_path: Path) -> None:
    write_history(tmp_path / "own.db", history(PromotionPruner(EPOCHS), 20))
    study = open_history(tmp_path / "own.db")
    trial = add_running(study, 0.5, {1: 0.7})
    assert (trial.number, trial.state, trial.intermediate_values) == (20, TrialState.RUNNING, {1: 0.7})
    study.add_trial(create_trial(state=TrialState.WAITING))
    end(study, trial)
    assert [t.state for t in study.trials[20:]] == [TrialState.PRUNED, TrialState.FAIL]


@pytest.mark.parametrize("name", PRUNERS)
def test_both_pruners_decide_equally_often(name, tmp_path: Path) -> None:
    measured = by_kind(tmp_path / "study", PRUNERS[name][0], 60, repeats=2)
    assert {kind: (len(own), len(optunas)) for kind, (own, optunas) in measured.items()} == {
        WARM: (2 * EACH, 2 * EACH),
        BETWEEN: (2, 2),
        NEW: (2, 2),
        FOLD: (2, 2),
    }
    assert all(Spread.of(seconds).low > 0 for both in measured.values() for seconds in both)


def test_choices_are_measured_in_three_ways_and_a_new_process_chooses_the_same() -> None:
    measured = choices(2, started=12, candidates=20)
    assert [len(seconds) for seconds in measured.values()] == [2, 2, 2]
