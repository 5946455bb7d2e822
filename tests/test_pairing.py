from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.trial import FrozenTrial, create_trial

from optuna_ohgw import cell_work, held
from optuna_ohgw.cells import cells_of, create_cell
from optuna_ohgw.opening import open_storage
from optuna_ohgw.pairing import PairingReport, check_pairing
from optuna_ohgw.spec import StudySpec, load_spec

STUDIES = Path(__file__).parents[1] / "studies"
SMALL = (
    "task.epochs=2",
    "task.train_images=160",
    "task.validation_images=40",
    "task.test_images=40",
    "variations=[asha-baseline,asha-ohgw-1step]",
    "warm_start.eta_h=0.1",
    "seeds=[0]",
    "pilot_seeds=[]",
    "scheduler.min_resource=1",
    "budget.trials=2",
)


def spec_of(folder: Path, *overrides: str) -> StudySpec:
    return load_spec(STUDIES / "digits.yaml", (*SMALL, f"output={folder}", *overrides))


def run(spec: StudySpec) -> None:
    """Search every cell in this process."""
    storage = open_storage(spec.storage_url, create=True)
    held.begin(held.Context(spec, threading.Event(), 30))
    try:
        for cell in cells_of(spec):
            cell.folder(spec.folder).mkdir(parents=True)
            create_cell(storage, spec, cell, {})
            cell_work.search(cell)
    finally:
        held.end()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    run(spec_of(folder))
    return folder


@pytest.fixture
def spec(finished: Path, tmp_path: Path) -> Iterator[StudySpec]:
    """Return a copy of the run that a test may spoil."""
    shutil.copy(finished / "study.db", tmp_path)
    return spec_of(tmp_path)


def edited(spec: StudySpec, edit: Any) -> BaseStorage:
    """Return a storage of the run's trials after ``edit(trial)`` on each of the warm variation."""
    source, target = open_storage(spec.storage_url, create=False), InMemoryStorage()
    for cell in cells_of(spec):
        trials = optuna.load_study(study_name=cell.name, storage=source).get_trials()
        study = optuna.create_study(study_name=cell.name, storage=target, direction="maximize")
        for trial in trials:
            if cell.variation == "asha-ohgw-1step":
                edit(trial)
            study.add_trial(trial)
    return target


def test_a_real_run_is_intact(spec: StudySpec) -> None:
    report = check_pairing(open_storage(spec.storage_url, create=False), spec)
    assert report.faults == []
    assert report.intact
    assert (report.trials, report.recomputed) == (4, 4)
    assert report.text() == "pairing (paired): intact; 4 trials compared, 4 recomputed"


def test_the_run_is_not_trivially_paired(spec: StudySpec) -> None:
    """Its pairs agree in what they suggest and not in what they train, nor with the next pair."""
    storage = open_storage(spec.storage_url, create=False)
    a, b = (
        optuna.load_study(study_name=cell.name, storage=storage).get_trials(deepcopy=False)
        for cell in cells_of(spec)
    )
    for first, second in zip(a, b, strict=True):
        assert first.user_attrs["streams"] == second.user_attrs["streams"]
        assert first.params != second.params
    assert a[0].user_attrs["streams"]["weights"] != a[1].user_attrs["streams"]["weights"]
    assert a[0].user_attrs["streams"]["order"] != a[1].user_attrs["streams"]["order"]
    assert a[0].params != a[1].params


def suggestion(trial: FrozenTrial) -> None:
    trial.user_attrs["ohgw"][0]["suggested"]["lr"] *= 1 + 1e-15


def weights(trial: FrozenTrial) -> None:
    trial.user_attrs["streams"]["weights"] = "0" * 16


def order(trial: FrozenTrial) -> None:
    trial.user_attrs["streams"]["order"] = "0" * 16


def swapped(trial: FrozenTrial) -> None:
    trial.user_attrs["config_index"] = 1 - trial.user_attrs["config_index"]


def twice(trial: FrozenTrial) -> None:
    trial.user_attrs["config_index"] = 0


def beyond(trial: FrozenTrial) -> None:
    trial.user_attrs["config_index"] += 10


@pytest.mark.parametrize(
    ("edit", "said", "faults"),
    [
        (suggestion, "suggestion is not what its seed gives", 4),
        (weights, "weights is not what its seed gives", 4),
        (order, "order is not what its seed gives", 4),
        (swapped, "suggestion differs from its pair's", 12),
        (twice, "configuration 0 is there twice", 7),
        (beyond, "weights is not what its seed gives", 6),
    ],
)
def test_what_was_tampered_with_is_named(spec: StudySpec, edit: Any, said: str, faults: int) -> None:
    report = check_pairing(edited(spec, edit), spec)
    assert not report.intact
    assert any(said in fault and "asha-ohgw-1step/seed-0000 trial" in fault for fault in report.faults)
    assert len(report.faults) == faults
    assert f"broken in {faults} places" in report.text()


def test_a_retried_trial_does_not_count(spec: StudySpec) -> None:
    storage = edited(spec, lambda trial: None)
    study = optuna.load_study(study_name=cells_of(spec)[1].name, storage=storage)
    first = study.trials[0]
    attrs = {**first.user_attrs, "retry_of": 0}
    study.add_trial(create_trial(state=first.state, value=first.value, user_attrs=attrs))
    report = check_pairing(storage, spec)
    assert report.faults == []
    assert report.trials == 4


def test_nothing_compared_is_not_intact(tmp_path: Path) -> None:
    report = check_pairing(InMemoryStorage(), spec_of(tmp_path))
    assert not report.intact
    assert not PairingReport("paired").intact


@pytest.mark.parametrize("sampler", ["qmc", "tpe"])
def test_samplers_with_a_history_pair_seeds_only(tmp_path: Path, sampler: str) -> None:
    spec = spec_of(tmp_path, f"sampler={sampler}", "space.batch_size={choices: [16, 32]}")
    run(spec)
    report = check_pairing(open_storage(spec.storage_url, create=False), spec)
    assert report.intact
    kind = "paired" if sampler == "qmc" else "seed-paired only"
    assert report.text() == f"pairing ({kind}): intact; 4 trials compared, 4 recomputed"
    broken = check_pairing(edited(spec, suggestion), spec)
    assert broken.intact == (sampler == "tpe")  # its suggestions cannot be recomputed
    assert not check_pairing(edited(spec, weights), spec).intact
