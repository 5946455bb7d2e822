"""Pruners that pause and resume: the oracle is the simulated clock, or a trial that was never paused."""

from __future__ import annotations

import itertools
import math
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from optuna.artifacts import FileSystemArtifactStore
from optuna.storages import JournalStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from optuna_ohgw import history
from optuna_ohgw.checkpoint import FELL_BACK
from optuna_ohgw.freezing import epochs
from optuna_ohgw.history import (
    CHECKPOINT,
    DECISION,
    RESUMED_FROM,
    LogicalStudy,
    best_trial,
    chain,
    checkpoint_bytes,
    decisions_of,
    dropped,
    is_duplicate,
    resume,
    superseded,
)
from optuna_ohgw.sampler import OhgwSampler
from optuna_ohgw.schedulers import SCHEDULERS, Settings, fold
from optuna_ohgw.schedulers.promotion import PromotionAsha
from optuna_ohgw.schedulers.pruners import (
    PairedHyperbandPruner,
    PashaPruner,
    PromotionPruner,
    SchedulerPruner,
)
from optuna_ohgw.schedulers.synchronous import HyperbandSynchronous
from optuna_ohgw.simulation import simulate
from optuna_ohgw.storage import BatchedStorage

END = 27


def curve(position: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng((seed, position))
    return (rng.random() * np.exp(-np.arange(END) / 9) + 0.05 * rng.random(END)).round(3)


def storage_of(kind: str, folder: Path) -> Any:
    if kind == "memory":
        return None
    if kind == "journal":
        return JournalStorage(JournalFileBackend(str(folder / "journal.log")))
    return RDBStorage(f"sqlite:///{folder / 'study.db'}")


def position_of(trial: optuna.Trial) -> int:
    trials, number = trial.study.get_trials(deepcopy=False), trial.number
    while RESUMED_FROM in trials[number].user_attrs:
        number = trials[number].user_attrs[RESUMED_FROM]
    return sum(RESUMED_FROM not in t.user_attrs for t in trials[:number])


def objective(trial: optuna.Trial, seed: int = 0, sign: int = 1) -> float:
    """Report a planted curve; a resumed trial goes on where it was paused."""
    values = sign * curve(position_of(trial), seed)
    first = trial.study.get_trials(deepcopy=False)[trial.number].last_step or 0
    for epoch in range(first + 1, END + 1):
        trial.report(values[epoch - 1], epoch)
        if trial.should_prune():
            raise optuna.TrialPruned
    return float(values[-1])


def final_resources(study: optuna.Study) -> dict[int, int]:
    found: Counter[int] = Counter()
    for trial in study.trials:
        if trial.intermediate_values:
            place = position_of(optuna.trial.Trial(study, trial._trial_id))
            found[place] = max(found[place], trial.last_step or 0)
    return dict(found)


@pytest.mark.parametrize("kind", ["memory", "sqlite", "journal"])
@pytest.mark.parametrize(
    ("name", "make"),
    [("pasha", PashaPruner), ("asha-promotion", PromotionPruner), ("hyperband", PairedHyperbandPruner)],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_study_does_what_the_simulation_does(kind, name, make, sign, tmp_path: Path) -> None:
    up = sign < 0
    curves = np.array([sign * curve(i) for i in range(60)])
    simulated = simulate(SCHEDULERS[name](Settings(END, maximize=up)), curves, range(60))
    study = optuna.create_study(
        storage=storage_of(kind, tmp_path), direction="maximize" if up else "minimize", pruner=make(END)
    )
    while len(final_resources(study)) < 60:
        study.optimize(lambda t: objective(t, sign=sign), n_trials=1)
    found, expected = final_resources(study), simulated.final_resources()
    del found[59], expected[59]  # at its pause the simulation is over, the study goes on
    assert found == expected
    if name != "hyperband":
        assert any(RESUMED_FROM in t.user_attrs for t in study.trials)


def ended_at(study: optuna.Study, trial: optuna.Trial, value: float, first: int = 1) -> int:
    for epoch in range(first, END + 1):
        trial.report(value, epoch)
        if trial.should_prune():
            study.tell(trial, state=TrialState.PRUNED)
            return epoch
    study.tell(trial, value)
    return END


def test_a_heartbeats_retry_of_a_resumed_trial_is_decided_on_as_it_would_have_been() -> None:
    study = optuna.create_study(pruner=PromotionPruner(END))
    assert [ended_at(study, study.ask(), value) for value in (0.1, 0.5)] == [1, 1]
    killed = study.ask()
    assert killed.user_attrs == {RESUMED_FROM: 0}
    killed.report(0.1, 2)
    study.tell(killed, state=TrialState.FAIL)
    # A decision between the kill and its retry: the trial counts as given up, until it is repeated.
    assert ended_at(study, study.ask(), 0.7) == 1
    RetryHeartbeatStaleTrialCallback()(study, study.trials[killed.number])
    again = study.ask()
    assert again.user_attrs == {RESUMED_FROM: 0}
    assert ended_at(study, again, 9.0, 2) == 3  # at its rung, and no further with a value that bad
    rungs = study.pruner._folds[study._study_id].scheduler.rungs
    assert [dict(rung.losses) for rung in rungs[:2]] == [{0: 0.1, 1: 0.5, 2: 0.7}, {0: 9.0}]


def fresh(study: optuna.Study) -> optuna.Trial:
    """Return a new trial, after all that wait to be resumed ended at their next rung."""
    while RESUMED_FROM in (trial := study.ask()).user_attrs:
        ended_at(study, trial, 0.3, (study.trials[trial.number].last_step or 0) + 1)
    return trial


def test_a_heartbeats_retry_of_a_fresh_trial_is_one_configuration() -> None:
    study = optuna.create_study(pruner=PromotionPruner(END))
    for value in (0.3, 0.4, 0.5):
        assert ended_at(study, fresh(study), value) == 1
    killed = fresh(study)
    killed.report(0.01, 1)
    assert not killed.should_prune()  # the best so far, promoted at once
    study.tell(killed, state=TrialState.FAIL)
    RetryHeartbeatStaleTrialCallback()(study, study.trials[killed.number])
    assert ended_at(study, fresh(study), 0.01) > 1
    first, second = study.pruner._folds[study._study_id].scheduler.rungs[:2]
    assert first.losses == {0: 0.3, 1: 0.4, 2: 0.5, 3: 0.01}
    assert second.losses[3] == 0.01


@pytest.mark.parametrize("steps", [(2, 4, 6, 8), (5,), (1, 4, 9), (3, 9)])
def test_pasha_takes_reports_that_skip_units(steps) -> None:
    """Each trial ends where it reported at or beyond its next rung, and values are compared there."""
    study = optuna.create_study(pruner=PashaPruner(9))
    rng = np.random.default_rng(0)
    for _ in range(40):
        trial = study.ask()
        done = study.trials[trial.number].last_step or 0
        for step in (s for s in steps if s > done):
            trial.report(rng.random(), step)
            if trial.should_prune():
                study.tell(trial, state=TrialState.PRUNED)
                break
        else:
            study.tell(trial, 0.0)
    assert {t.state for t in study.trials} <= {TrialState.PRUNED, TrialState.COMPLETE, TrialState.WAITING}
    low, *_ = study.pruner._folds[study._study_id].scheduler.rungs
    roots = [t for t in study.trials if RESUMED_FROM not in t.user_attrs]
    assert low.losses == {i: t.intermediate_values[steps[0]] for i, t in enumerate(roots)}


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_the_answer_of_a_search_that_trained_nothing_to_the_end(direction) -> None:
    up = direction == "maximize"
    study = optuna.create_study(pruner=PashaPruner(81), direction=direction)
    with pytest.raises(ValueError, match="no ended trial has a value"):
        best_trial(study)
    study.optimize(lambda t: objective(t, sign=-1 if up else 1), n_trials=30)
    assert not study.get_trials(states=[TrialState.COMPLETE])
    best = best_trial(study)
    gone = superseded(study.trials)
    last = [
        t.intermediate_values[t.last_step]
        for t in study.trials
        if t.number not in gone and t.state == TrialState.PRUNED
    ]
    assert best.intermediate_values[best.last_step] == (max if up else min)(last)


@pytest.mark.parametrize("how", [ArithmeticError, optuna.TrialPruned])
@pytest.mark.parametrize("name", ["asha-promotion", "hyperband-synchronous"])
def test_a_trial_that_ends_without_a_report_counts_as_nan_at_its_rung(how, name) -> None:
    """Every fourth configuration ends so before its first report, every fifth in epoch 2 of 3."""
    curves = np.array([curve(i) for i in range(60)])
    curves[::4] = math.nan
    curves[::5, 1:] = math.nan
    make = SCHEDULERS[name]
    simulated = simulate(make(Settings(END)), curves, range(60))

    def ending(trial: optuna.Trial) -> float:
        values = curves[position_of(trial)]
        first = trial.study.get_trials(deepcopy=False)[trial.number].last_step or 0
        for epoch in range(first + 1, END + 1):
            if math.isnan(values[epoch - 1]):
                raise how
            trial.report(values[epoch - 1], epoch)
            if trial.should_prune():
                raise optuna.TrialPruned
        return float(values[-1])

    pruner = SchedulerPruner(lambda up: make(Settings(END, maximize=up)))
    study = optuna.create_study(pruner=pruner)
    while len({position_of(optuna.trial.Trial(study, t._trial_id)) for t in study.trials}) < 60:
        # As a study's worker does: an end without a decision queued no one.
        if not study.get_trials(states=[TrialState.WAITING]):
            pruner.queue(study)
        study.optimize(ending, n_trials=1, catch=(ArithmeticError,))
    found, expected = final_resources(study), simulated.final_resources()
    sound = [i for i in range(59) if i % 4 and i % 5]
    assert [found[i] for i in sound] == [expected[i] for i in sound]
    assert max(found.values()) == END


@pytest.mark.parametrize("make", [PashaPruner, PromotionPruner])
def test_no_decision_depends_on_what_a_process_remembers(make, tmp_path: Path) -> None:
    studies = []
    for fresh in (False, True):
        folder = tmp_path / str(fresh)
        folder.mkdir()
        pruner = make(END)
        study = optuna.create_study(storage=storage_of("sqlite", folder), study_name="s", pruner=pruner)
        for _ in range(32):
            if fresh:
                study = optuna.load_study(
                    storage=f"sqlite:///{folder / 'study.db'}", study_name="s", pruner=make(END)
                )
            study.optimize(objective, n_trials=1)
        studies.append(study)
    first, second = ([(t.user_attrs, t.intermediate_values, t.state) for t in s.trials] for s in studies)
    assert first == second
    assert any(RESUMED_FROM in attributes for attributes, _, _ in first)


def test_a_decision_explains_itself() -> None:
    study = optuna.create_study(pruner=PromotionPruner(9))
    for value in (0.5, 0.8):
        trial = study.ask()
        trial.report(value, 1)
        assert trial.should_prune()
        assert trial.should_prune()  # asked twice
        study.tell(trial, state=TrialState.PRUNED)
    first, second = (decisions_of(t)[1] for t in study.trials[:2])
    del first["time"]
    assert first == {
        "action": "pause",
        "config": 0,
        "rule": "asha-promotion",
        "resource": 1,
        "rung": 0,
        "value": 0.5,
        "rank": 1,
        "of": 1,
        "maximum": 9,
        "ends": True,
    }
    assert (second["rank"], second["of"], second["cutoff"]) == (2, 2, pytest.approx(0.6))
    # The second's pause freed its worker for the first.
    assert [t.user_attrs for t in study.trials] == [{}, {}, {RESUMED_FROM: 0}]
    trial = study.ask()
    for epoch in (2, 3):
        assert not trial.should_prune()
        trial.report(0.3, epoch)
    assert trial.should_prune()
    study.tell(trial, state=TrialState.PRUNED)
    # The best of two goes on at once, without a pause.
    trial = study.ask()
    trial.report(0.1, 1)
    assert not trial.should_prune()
    assert decisions_of(study.trials[trial.number])[1]["promoted"]


# ---- checkpoints


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def build(seed: int):
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, END)
    return {
        "model": model,
        "optimizer": optimizer,
        "schedule": schedule,
        "own": torch.Generator().manual_seed(seed),
    }


def train(parts: dict[str, Any]) -> float:
    model, optimizer = parts["model"].train(), parts["optimizer"]
    total = 0.0
    for _ in range(3):
        x = torch.randn(16, 4) + torch.randn(16, 4, generator=parts["own"])
        noise = float(np.random.rand()) + random.random()  # noqa: NPY002
        loss = ((model(x) - x.sum(1, keepdim=True) - noise) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
    parts["schedule"].step()
    return total


def frozen_objective(trial: optuna.Trial, store: FileSystemArtifactStore) -> float:
    parts = build(position_of(trial))
    value = 0.0
    for epoch in epochs(trial, END, store, **parts):
        value = train(parts)
        trial.report(value, epoch)
    return value


def test_a_resumed_trial_goes_on_bit_for_bit(tmp_path: Path) -> None:
    store = FileSystemArtifactStore(str(tmp_path / "store"))
    (tmp_path / "store").mkdir()
    study = optuna.create_study(storage=storage_of("sqlite", tmp_path), pruner=PromotionPruner(END))
    study.optimize(lambda t: frozen_objective(t, store), n_trials=40)
    resumed = [t for t in study.trials if RESUMED_FROM in t.user_attrs and t.state.is_finished()]
    assert len(resumed) >= 6
    assert max(t.last_step for t in resumed) >= 9
    for trial in resumed:
        parts = build(position_of(optuna.trial.Trial(study, trial._trial_id)))
        alone = [train(parts) for _ in range(trial.last_step)]
        assert [trial.intermediate_values[e] for e in range(1, trial.last_step + 1)] == alone
    # Of a paused configuration the last checkpoint and the one before, none that nothing can want.
    gone = superseded(study.trials)
    paused = [t for t in study.trials if t.number not in gone and t.state == TrialState.PRUNED]
    kept = {made["artifact"] for t in paused for made in chain(t.user_attrs[CHECKPOINT])}
    assert {f.name for f in (tmp_path / "store").iterdir()} == kept
    assert checkpoint_bytes(study) == sum(f.stat().st_size for f in (tmp_path / "store").iterdir()) > 0


@pytest.mark.parametrize("make", [HyperbandSynchronous, PromotionAsha])
def test_what_is_paused_for_good_leaves_no_checkpoint(make, tmp_path: Path) -> None:
    study = optuna.create_study(pruner=SchedulerPruner(lambda up: make(9, maximize=up)))
    store, most = FileSystemArtifactStore(str(tmp_path)), 0

    def one(trial: optuna.Trial) -> float:
        parts, value = build(position_of(trial)), 0.0
        for epoch in epochs(trial, 9, store, **parts):
            value = train(parts)
            trial.report(math.nan if position_of(trial) % 5 == 2 else value, epoch)
        return value

    for _ in range(40):
        study.optimize(one, n_trials=1)
        files = list(tmp_path.iterdir())
        assert checkpoint_bytes(study) == sum(file.stat().st_size for file in files)
        # A process that was not there knows the same.
        pruner = SchedulerPruner(lambda up: make(9, maximize=up))
        assert study.pruner.unwanted(study) == pruner.unwanted(study) == []
        most = max(most, len(files))
    # The first bracket has 9, and what it leaves behind is gone when the second is filled.
    assert most <= 9 if make is HyperbandSynchronous else len(files) > 9
    diverged = {t.number for t in study.trials if any(map(math.isnan, t.intermediate_values.values()))}
    assert diverged
    assert make is HyperbandSynchronous or diverged <= dropped(study.trials)
    assert not any(FELL_BACK in t.user_attrs for t in study.trials)


def test_other_parts_than_those_saved_are_refused(tmp_path: Path) -> None:
    store = FileSystemArtifactStore(str(tmp_path))
    study = optuna.create_study(pruner=PromotionPruner(END))

    def run(**parts: Any) -> None:
        trial = study.ask()
        for epoch in epochs(trial, END, store, **parts):
            trial.report(0.5, epoch)

    with pytest.raises(optuna.TrialPruned):
        run(model=Net())
    study.tell(0, state=TrialState.PRUNED)
    resume(study, study.trials[0])
    with pytest.raises(ValueError, match=r"trial 0 holds \['model'\], asked for \['net'\]; pass the same"):
        run(net=Net())


def test_a_pruner_that_only_stops_leaves_no_checkpoint(tmp_path: Path) -> None:
    store = FileSystemArtifactStore(str(tmp_path))
    study = optuna.create_study(
        pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, bootstrap_count=1)
    )
    with pytest.raises(optuna.TrialPruned):
        frozen_objective(study.ask(), store)
    assert list(tmp_path.iterdir()) == []


def test_times_of_decisions_rise_when_the_clock_steps_back(monkeypatch) -> None:
    clock = iter([5e9, 4e9, 5e9, 5e9])
    monkeypatch.setattr(history, "_last_time", 0.0)
    monkeypatch.setattr(history.time, "time", lambda: next(clock))
    times = [history.rising_time() for _ in range(4)]
    assert times[0] == 5e9
    assert all(one < other for one, other in itertools.pairwise(times))


# ---- several processes


def work(url: str, folder: str, seed: int) -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    torch.set_num_threads(1)
    store = FileSystemArtifactStore(folder)
    sampler = optuna.samplers.RandomSampler(seed=seed)
    storage = BatchedStorage(RDBStorage(url))
    study = optuna.load_study(storage=storage, study_name="s", pruner=PashaPruner(END), sampler=sampler)
    study.optimize(lambda t: frozen_objective(t, store), n_trials=25)


@pytest.mark.slow
def test_four_processes_never_resume_one_trial_twice(tmp_path: Path) -> None:
    url, folder = f"sqlite:///{tmp_path / 's.db'}", tmp_path / "store"
    folder.mkdir()
    optuna.create_study(storage=url, study_name="s")
    # This file as a script: what pytest imports it as is not there for another process.
    command = [sys.executable, __file__, url, str(folder)]
    workers = [subprocess.Popen([*command, str(i)], stderr=subprocess.PIPE, text=True) for i in range(4)]
    errors = [worker.communicate(timeout=200)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * 4, errors
    study = optuna.load_study(storage=url, study_name="s")
    trials = study.trials
    assert not [t for t in trials if t.state == TrialState.FAIL]
    resumed = [t for t in trials if RESUMED_FROM in t.user_attrs and t.state.is_finished()]
    real = [t for t in resumed if not is_duplicate(t, trials)]
    assert len(real) >= 5
    assert len({t.user_attrs[RESUMED_FROM] for t in real}) == len(real)
    for trial in resumed:
        source = trials[trial.user_attrs[RESUMED_FROM]]
        if is_duplicate(trial, trials):
            assert trial.intermediate_values == source.intermediate_values  # it trained nothing
        else:
            assert trial.last_step > source.last_step


def test_a_second_queued_resumption_trains_nothing(tmp_path: Path) -> None:
    store = FileSystemArtifactStore(str(tmp_path))
    study = optuna.create_study(pruner=PromotionPruner(END))
    study.optimize(lambda t: frozen_objective(t, store), n_trials=1)
    resume(study, study.trials[0])
    resume(study, study.trials[0])
    study.optimize(lambda t: frozen_objective(t, store), n_trials=2)
    first, second = study.trials[1:3]
    assert first.last_step == 3
    assert second.intermediate_values == study.trials[0].intermediate_values
    assert superseded(study.trials) == {0, 2}


def test_a_configuration_is_one_trial_to_a_sampler() -> None:
    study = optuna.create_study(pruner=PromotionPruner(END))
    study.optimize(lambda t: objective(t) + 0 * t.suggest_float("x", 0, 1), n_trials=0)
    while sum(RESUMED_FROM in t.user_attrs for t in study.trials) < 5:
        study.optimize(objective, n_trials=1)
    logical = LogicalStudy(study).get_trials()
    places = [position_of(optuna.trial.Trial(study, t._trial_id)) for t in logical if t.state.is_finished()]
    assert len(places) == len(set(places))
    assert len(logical) < len(study.trials)
    finished = LogicalStudy(study).get_trials(deepcopy=False, states=(TrialState.PRUNED,))
    assert all(t.state == TrialState.PRUNED for t in finished)


def points_that_tpe_sees_twice(sampler: Any, tpe: Any, folder: Path) -> int:
    """Return how many configurations a study under PASHA shows to its TPE sampler more than once, at most."""
    store, draw, most = FileSystemArtifactStore(str(folder)), tpe.sample_relative, 0

    def noted(study: Any, trial: Any, space: Any) -> Any:
        nonlocal most
        others = [t for t in study.get_trials(deepcopy=False) if t.number != trial.number and t.params]
        most = max(most, len(others) - len({t.params["x"] for t in others}))
        return draw(study, trial, space)

    def one(trial: optuna.Trial) -> float:
        x = trial.suggest_float("x", 0, 1)
        for epoch in epochs(trial, END, store):
            trial.report((x - 0.3) ** 2 + 1 / epoch, epoch)
        return (x - 0.3) ** 2

    tpe.sample_relative = noted
    optuna.create_study(sampler=sampler, pruner=PashaPruner(END)).optimize(one, n_trials=30)
    return most


def test_tpe_that_would_see_a_resumed_trial_twice_is_warned_of_and_can_be_wrapped(tmp_path: Path) -> None:
    tpe = optuna.samplers.TPESampler(seed=0)
    assert points_that_tpe_sees_twice(OhgwSampler(tpe), tpe, tmp_path) == 0
    tpe = optuna.samplers.TPESampler(seed=0)
    with pytest.warns(UserWarning, match=r"two points.*pass sampler=OhgwSampler\(TPESampler"):
        assert points_that_tpe_sees_twice(tpe, tpe, tmp_path) > 0


def test_reports_that_are_skipped_or_nan_are_decided_on(tmp_path: Path) -> None:
    study = optuna.create_study(pruner=PromotionPruner(END))
    for value, step in ((0.5, 4), (float("nan"), 1), (0.1, 1), (0.2, 1)):
        trial = study.ask()
        trial.report(value, step)
        if trial.should_prune():
            study.tell(trial, state=TrialState.PRUNED)
    attributes = [k for t in study.trials for k in t.system_attrs if k.startswith(DECISION)]
    assert f"{DECISION}4" in attributes
    nan = [t for t in study.trials if t.intermediate_values and np.isnan(t.intermediate_values.get(1, 0.0))]
    assert all(t.user_attrs.get(RESUMED_FROM) is None for t in nan)


if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2], int(sys.argv[3]))


def test_a_decision_looks_at_what_is_new_alone_even_beside_a_trial_that_was_never_ended(monkeypatch) -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0), pruner=PromotionPruner(END))
    killed = study.ask()
    killed.report(0.5, 1)
    study.optimize(objective, n_trials=60)
    looked_at = list[int]()
    monkeypatch.setattr(
        fold, "decisions_of", lambda trial: looked_at.append(trial.number) or decisions_of(trial)
    )
    trial = study.ask()
    trial.report(0.4, 1)
    trial.should_prune()
    waiting = {t.number for t in study.get_trials(states=[TrialState.WAITING])}
    # The last of the sixty ended after its own decision was made, so that it is looked at once more.
    assert set(looked_at) - waiting == {0, 60, trial.number}
