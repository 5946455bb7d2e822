"""Pruners that pause and resume: the oracle is the simulated clock, or a trial that was never paused."""

from __future__ import annotations

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
from optuna.storages import JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from optuna_ohgw.freezing import CHECKPOINT, checkpoint_bytes, epochs
from optuna_ohgw.history import (
    DECISION,
    RESUMED_FROM,
    LogicalStudy,
    decisions_of,
    is_duplicate,
    resume,
    superseded,
)
from optuna_ohgw.schedulers import SCHEDULERS, Settings
from optuna_ohgw.schedulers.pruners import PairedHyperbandPruner, PashaPruner, PromotionPruner
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


@pytest.mark.parametrize("make", [PashaPruner, PromotionPruner])
def test_no_decision_depends_on_what_a_process_remembers(make, tmp_path: Path) -> None:
    studies = []
    for fresh in (False, True):
        folder = tmp_path / str(fresh)
        folder.mkdir()
        pruner = make(END)
        study = optuna.create_study(storage=storage_of("sqlite", folder), study_name="s", pruner=pruner)
        for _ in range(50):
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
    # One checkpoint a paused configuration, none that nothing can want.
    gone = superseded(study.trials)
    paused = [t for t in study.trials if t.number not in gone and t.state == TrialState.PRUNED]
    kept = {t.user_attrs[CHECKPOINT]["artifact"] for t in paused}
    assert {f.name for f in (tmp_path / "store").iterdir()} == kept
    assert checkpoint_bytes(study) == sum(f.stat().st_size for f in (tmp_path / "store").iterdir()) > 0


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


# ---- several processes


def work(url: str, folder: str, seed: int) -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    torch.set_num_threads(1)
    store = FileSystemArtifactStore(folder)
    sampler = optuna.samplers.RandomSampler(seed=seed)
    storage = BatchedStorage(RDBStorage(url))
    study = optuna.load_study(storage=storage, study_name="s", pruner=PashaPruner(END), sampler=sampler)
    study.optimize(lambda t: frozen_objective(t, store), n_trials=25)


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
