"""Oracle: the same configurations trained without a pause, and the scheduler's own simulation."""

from __future__ import annotations

import re

import optuna
import pytest
from cell_runs import (
    CONFIGS,
    EPOCHS,
    StopAt,
    assert_prefix,
    courses,
    in_process,
    logical,
    run,
    spec_of,
)
from optuna.trial import TrialState

from optuna_ohgw import cell_work
from optuna_ohgw.cell_study import load_cell
from optuna_ohgw.cells import cells_of, revive, share_done
from optuna_ohgw.checkpoint import FELL_BACK
from optuna_ohgw.decisions import decisions, in_words
from optuna_ohgw.errors import UserError
from optuna_ohgw.history import CHECKPOINT, RESUMED_FROM, chain, checkpoint_bytes
from optuna_ohgw.metrics import curves
from optuna_ohgw.opening import open_storage
from optuna_ohgw.pairing import check_pairing
from optuna_ohgw.records import read_records
from optuna_ohgw.schedulers import SCHEDULERS, Settings
from optuna_ohgw.simulation import simulate
from optuna_ohgw.why import why

RESUMING = ["asha-promotion", "pasha", "hyperband-promotion", "hyperband-synchronous", "one-epoch"]


@pytest.mark.parametrize("name", RESUMING)
def test_a_cell_is_what_simulation_and_unpaused_training_say(tmp_path, unpaused, name):
    # Synchronous brackets need as many configurations as the first one has; rungs of warm starts differ.
    eta, names = (3, ("baseline",)) if name == "hyperband-synchronous" else (2, ("baseline", "1step"))
    shown = [f"scheduler.reduction_factor={eta}", f"variations={['ohgw-1step', 'baseline'][-len(names) :]}"]
    spec = spec_of(tmp_path, name, *shown)
    run(spec)
    own = courses(spec)
    assert own.keys() == {(v, i) for v in names for i in range(CONFIGS)}
    for key, course in own.items():
        assert_prefix(course, unpaused[key])
    settings = Settings(EPOCHS, reduction_factor=eta, maximize=True, configs=CONFIGS)
    for variation in names:
        full = [unpaused[variation, i][0]["val_metric"] for i in range(CONFIGS)]
        replay = simulate(SCHEDULERS[name](settings), full, range(CONFIGS), resumes_last=True)
        reached = {i: len(own[variation, i][0]["mbu"]) for i in range(CONFIGS)}
        assert reached == replay.final_resources()
        assert len(set(reached.values())) > 1, "nothing was decided"
    storage = open_storage(spec.storage_url, create=False)
    records = read_records(storage, spec)
    counted = records.trials[records.trials["counted"]]
    assert len(counted) == len(names) * CONFIGS < len(records.trials)
    table = curves(records)
    spent = table.groupby("variation")["cell_mbu"].max()
    for cell in cells_of(spec):
        expected = sum(t.user_attrs["curve"]["mbu"][-1] for t in logical(spec, cell).values())
        assert spent[cell.variation] == pytest.approx(expected)
        assert share_done(load_cell(storage, spec, cell), spec) == 1
    report = check_pairing(storage, spec)
    assert not report.faults


@pytest.mark.parametrize("name", ["asha-promotion", "hyperband-promotion"])
@pytest.mark.parametrize("calls", [21, pytest.param(150, marks=pytest.mark.slow)])
def test_a_stopped_cell_comes_to_the_same(tmp_path, name, calls):
    whole, broken = (spec_of(tmp_path / part, name) for part in ("whole", "broken"))
    run(whole)
    run(broken, StopAt(calls))
    stopped = open_storage(broken.storage_url, create=False)
    revived = sum(revive(load_cell(stopped, broken, cell)) for cell in cells_of(broken))
    assert revived >= 1
    run(broken)
    assert courses(broken) == courses(whole)
    assert not check_pairing(open_storage(broken.storage_url, create=False), broken).faults


def test_a_sampler_that_learns_sees_a_resumed_trial_once(tmp_path, monkeypatch):
    """TPE under PASHA: what it is told has every configuration once, with its latest values."""
    seen = []
    draw = optuna.samplers.TPESampler.sample_relative

    def noted(self, study, trial, space):
        others = [t for t in study.get_trials(deepcopy=False) if t.number != trial.number]
        seen.append([(t.user_attrs["config_index"], t.last_step) for t in others])
        return draw(self, study, trial, space)

    monkeypatch.setattr(optuna.samplers.TPESampler, "sample_relative", noted)
    run(spec_of(tmp_path, "pasha", "variations=[ohgw-1step]", "sampler=tpe"))
    assert len(seen) >= CONFIGS - 1
    for told in seen:
        configs = [index for index, _ in told]
        assert sorted(configs) == list(range(len(configs)))
    assert max(step for _, step in seen[-1]) > 1  # some were resumed


def test_the_end_of_a_cell_leaves_no_checkpoint(tmp_path):
    spec = spec_of(tmp_path, "pasha", "variations=[baseline]")
    (cell,) = cells_of(spec)
    with in_process(spec):
        cell_work.search(cell)
        made = list((cell.folder(tmp_path) / "checkpoints").iterdir())
        waiting = [t for t in logical(spec, cell).values() if t.state == TrialState.PRUNED]
        assert 0 < len(made) <= 2 * len(waiting)
        cell_work.finish(cell)
    study = load_cell(open_storage(spec.storage_url, create=False), spec, cell)
    assert not (cell.folder(tmp_path) / "checkpoints").exists()
    assert study.user_attrs["checkpoint_bytes"] > 0


@pytest.mark.parametrize(
    ("name", "wanted"),
    # 16, 8, 4, 2 and 1 in the first bracket; 8 of 10 in the second, which waits for the other 2.
    [("hyperband-synchronous", range(16, 24)), ("one-epoch", range(0)), ("bohb", range(0))],
)
def test_checkpoints_that_no_scheduler_can_want_are_deleted(tmp_path, name, wanted):
    spec = spec_of(tmp_path, name, "variations=[baseline]", "budget.trials=24")
    (cell,) = cells_of(spec)
    with in_process(spec):
        cell_work.search(cell)
    study = load_cell(open_storage(spec.storage_url, create=False), spec, cell)
    found = logical(spec, cell)
    kept = {made["artifact"] for i in wanted for made in chain(found[i].user_attrs[CHECKPOINT])}
    files = list((cell.folder(tmp_path) / "checkpoints").iterdir())
    assert {file.name for file in files} == kept
    assert checkpoint_bytes(study) == sum(file.stat().st_size for file in files)
    assert not any(FELL_BACK in t.user_attrs for t in study.trials)
    assert len({len(t.intermediate_values) for t in found.values()}) > 1, "nothing was resumed"


def test_decisions_explain_how_every_trial_of_asha_ended(tmp_path):
    spec = spec_of(tmp_path, "asha", "variations=[baseline]", "scheduler.bootstrap_count=1")
    run(spec)
    (cell,) = cells_of(spec)
    storage = open_storage(spec.storage_url, create=False)
    trials = load_cell(storage, spec, cell).get_trials(deepcopy=False)
    made = decisions(trials, spec)
    assert len({t.last_step for t in trials}) > 1
    for trial in trials:
        *earlier, last = made[trial.number].items()
        assert all(decision["action"] == "continue" for _, decision in earlier)
        assert last[0] == trial.last_step or trial.state == TrialState.COMPLETE
        assert (last[1]["action"] == "stop") == (trial.state == TrialState.PRUNED)
        assert last[1]["value"] == trial.intermediate_values[last[0]]
    shown = read_records(storage, spec).trials["decision"]
    assert shown[0] == in_words(*list(made[0].items())[-1])


def test_why_shows_the_decisions_before_and_after_a_pause(tmp_path):
    spec = spec_of(tmp_path, "asha-promotion", "variations=[baseline]")
    run(spec)
    (cell,) = cells_of(spec)
    storage = open_storage(spec.storage_url, create=False)
    trials = load_cell(storage, spec, cell).get_trials(deepcopy=False)
    resumed = next(t for t in trials if RESUMED_FROM in t.user_attrs)
    source = resumed.user_attrs[RESUMED_FROM]
    before, after = why(storage, spec, cell, source), why(storage, spec, cell, resumed.number)
    paused = next(line for line in before if ": paused: " in line)
    assert re.fullmatch(
        r"  rung \d, epoch \d: paused: value 0\.\d+, (cut-off 0\.\d+, )?rank \d of \d, "
        r"maximum 9 \(asha-promotion\)",
        paused,
    )
    assert paused in after
    told = next(line for line in after if line.startswith(f"resumed from trial {source}: to epoch "))
    assert re.search(r"rank \d of \d, maximum 9 \(asha-promotion\)$|rank \d of \d \(asha-promotion\)$", told)
    assert f"resumed as trial {resumed.number}" in before
    with pytest.raises(UserError, match=f"has trials 0 to {len(trials) - 1}"):
        why(storage, spec, cell, 99)


def test_a_decision_in_words():
    decision = {"action": "stop", "rule": "asha, optuna", "rung": 2, "value": 0.58, "cutoff": 0.61}
    decision |= {"rank": 7, "of": 20}
    words = "rung 3, epoch 9: stopped: value 0.58, cut-off 0.61, rank 7 of 20 (asha, optuna)"
    assert in_words(9, decision) == words
    assert in_words(3, {"action": "stop", "rule": "diverged"}) == "epoch 3: stopped: no value (diverged)"
