"""Oracle: the simulation of the same scheduler on the curves of training without a pause."""

from __future__ import annotations

import re

import pytest
from cell_runs import (
    CONFIGS,
    EPOCHS,
    StopAt,
    assert_prefix,
    courses,
    run,
    spec_of,
)
from rich.console import Console

from optuna_ohgw import runner
from optuna_ohgw.cell_study import candidates, load_cell
from optuna_ohgw.cells import cells_of, revive
from optuna_ohgw.history import SENT
from optuna_ohgw.opening import open_storage
from optuna_ohgw.pairing import check_pairing
from optuna_ohgw.records import read_records
from optuna_ohgw.schedulers import Settings
from optuna_ohgw.schedulers.choosers import CHOOSERS
from optuna_ohgw.simulation import simulate
from optuna_ohgw.why import why

pytest.importorskip("gpytorch")
LIMIT = 34  # epochs in all
BUDGET = f"budget={{trials: {CONFIGS}, epochs: {LIMIT}}}"


@pytest.mark.parametrize("name", ["bohb", "dyhpo", "boil"])
def test_a_cell_is_what_simulation_and_unpaused_training_say(tmp_path, unpaused, name):
    spec = spec_of(tmp_path, name, BUDGET)
    run(spec)
    own = courses(spec)
    settings = Settings(EPOCHS, reduction_factor=2, maximize=True, configs=CONFIGS)
    for variation in ("baseline", "1step"):
        reached = {i: len(c["mbu"]) for (v, i), (c, _) in own.items() if v == variation}
        for index in reached:
            assert_prefix(own[variation, index], unpaused[variation, index])
        full = [unpaused[variation, i][0]["val_metric"] for i in range(CONFIGS)]
        made = CHOOSERS[name](settings, candidates(spec, cells_of(spec)[0]), 3)
        assert reached == simulate(made, full, range(CONFIGS), max_slices=LIMIT).final_resources()
        assert len(set(reached.values())) > 1, "nothing was decided"
    storage = open_storage(spec.storage_url, create=False)
    assert not check_pairing(storage, spec).faults
    trials = read_records(storage, spec).trials
    # BOHB's brackets end before.
    spent = trials[trials["counted"]].groupby("variation")["epochs"].sum()
    assert (spent == (29 if name == "bohb" else LIMIT)).all()


@pytest.mark.parametrize("name", ["bohb", "dyhpo", "boil"])
@pytest.mark.parametrize("least", [20, pytest.param(60, marks=pytest.mark.slow)])
def test_a_stopped_cell_comes_to_the_same(tmp_path, name, least):
    settings = BUDGET, "variations=[baseline]"
    whole = spec_of(tmp_path / "whole", name, *settings)
    run(whole)
    for calls in range(least, least + 9):  # one falls between two trials
        broken = spec_of(tmp_path / str(calls), name, *settings)
        run(broken, StopAt(calls))
        stopped, (cell,) = open_storage(broken.storage_url, create=False), cells_of(broken)
        if revive(load_cell(stopped, broken, cell)):
            break
    else:
        pytest.fail("no trial was stopped")
    run(broken)
    assert courses(broken) == courses(whole)


def test_two_workers_start_and_train_nothing_twice(tmp_path):
    spec = spec_of(tmp_path, "dyhpo", BUDGET, "variations=[baseline]", "execution.workers=2")
    (cell,) = cells_of(spec)
    assert runner.run(spec, Console(quiet=True))  # processes: torch's modules are not for two threads
    storage = open_storage(spec.storage_url, create=False)
    shown = why(storage, spec, cell, 0)[1]
    assert re.fullmatch(r"  chosen by initial design; sent to epoch 1", shown)
    trials = load_cell(storage, spec, cell).get_trials(deepcopy=False)
    started = [t.system_attrs[SENT]["config"] for t in trials if "resumed_from" not in t.user_attrs]
    assert len(set(started)) == len(started) > 1
    table = read_records(storage, spec).trials
    assert LIMIT <= table[table["counted"]]["epochs"].sum() <= LIMIT + 1
