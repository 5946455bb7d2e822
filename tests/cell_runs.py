"""Small cells of digits, run in this process, and what came of them."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from optuna_ohgw import cell_work, held
from optuna_ohgw.cell_study import load_cell
from optuna_ohgw.cells import cells_of, create_cell
from optuna_ohgw.history import superseded
from optuna_ohgw.opening import open_storage
from optuna_ohgw.spec import load_spec

STUDY = Path(__file__).parents[1] / "studies" / "digits.yaml"
EPOCHS, CONFIGS = 9, 9
MEASURED = ("mbu", "train_loss", "val_loss", "val_metric")


def spec_of(folder, name, *overrides):
    settings = (
        f"task.epochs={EPOCHS}",
        "task.train_images=128",
        "task.batch_size=16",
        "task.validation_images=100",
        "task.test_images=100",
        "space.lr={low: 0.001, high: 0.3, log: true}",
        "variations=[baseline,ohgw-1step]",
        "warm_start={eta_h: 0.1, every_rung: true}",
        "seeds=[3]",
        "pilot_seeds=[]",
        f"scheduler={{name: {name}, min_resource: 1, reduction_factor: 2}}",
        f"budget.trials={CONFIGS}",
        "execution={workers: 1, cells_at_once: 1, threads: 1, device: cpu}",
        f"output={folder}",
    )
    return load_spec(STUDY, (*settings, *overrides))


class StopAt:
    """An event that is set when it was asked often enough, and not before."""

    def __init__(self, calls):
        self.left = calls

    def is_set(self):
        self.left -= 1
        return self.left < 0


@contextlib.contextmanager
def in_process(spec, stop=None):
    spec.folder.mkdir(parents=True, exist_ok=True)
    storage = open_storage(spec.storage_url, create=True)
    for cell in cells_of(spec):
        cell.folder(spec.folder).mkdir(parents=True, exist_ok=True)
        create_cell(storage, spec, cell, {})
    held.begin(held.Context(spec, stop or threading.Event(), 30))
    try:
        yield
    finally:
        held.end()


def run(spec, stop=None):
    with in_process(spec, stop):
        for cell in cells_of(spec):
            cell_work.search(cell)


def logical(spec, cell):
    study = load_cell(open_storage(spec.storage_url, create=False), spec, cell)
    trials = study.get_trials(deepcopy=False)
    gone = superseded(trials)
    kept = [t for t in trials if t.number not in gone and t.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    return {t.user_attrs["config_index"]: t for t in kept}


def courses(spec):
    """Return curve and warm starts of every configuration, by cell and index."""
    found = {}
    for cell in cells_of(spec):
        for index, trial in logical(spec, cell).items():
            warm = [
                {k: v for k, v in r.items() if k not in ("seconds", "peak_bytes")}
                for r in trial.user_attrs["ohgw"]
            ]
            curve = {column: trial.user_attrs["curve"][column] for column in MEASURED}
            found[cell.variation.split("-")[-1], index] = curve, warm
    return found


def unpaused_courses(folder):
    """Return the course of every configuration trained to the end, with warm starts at the same rungs."""
    spec = spec_of(folder, "asha-promotion")
    with pytest.MonkeyPatch.context() as patch:

        def never(*arguments):
            study = load_cell(*arguments)
            study.pruner = optuna.pruners.NopPruner()
            return study

        patch.setattr(cell_work, "load_cell", never)
        run(spec)
    found = courses(spec)
    assert {len(curve["mbu"]) for curve, _ in found.values()} == {EPOCHS}
    return found


def assert_prefix(own, whole):
    (curve, warm), (full, warms) = own, whole
    epochs = len(curve["mbu"])
    assert all(curve[column] == full[column][:epochs] for column in MEASURED)
    assert warm == warms[: len(warm)]
