"""Small studies of digits run as the command, and what came of them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
from optuna.trial import FrozenTrial, TrialState

from optuna_ohgw import held, worker
from optuna_ohgw.cells import Cell, cells_of, create_cell
from optuna_ohgw.metrics import cell_metrics, curves, times
from optuna_ohgw.opening import open_storage
from optuna_ohgw.pairing import check_pairing
from optuna_ohgw.records import read_records
from optuna_ohgw.spec import StudySpec, load_spec

STUDY = Path(__file__).parents[1] / "studies" / "digits.yaml"
COMMAND = (sys.executable, "-c", "from optuna_ohgw.cli import main; main()")
EPOCHS = 30
SETTINGS = (
    f"task.epochs={EPOCHS}",
    "task.train_images=700",
    "task.batch_size=8",
    "task.validation_images=200",
    "task.test_images=200",
    "space.lr={low: 0.01, high: 0.3, log: true}",
    "variations=[asha-baseline,asha-ohgw-1step]",
    "warm_start.eta_h=0.1",
    "seeds=[3]",
    "pilot_seeds=[]",
    "scheduler={min_resource: 3, reduction_factor: 2, bootstrap_count: 0}",
    "targets=[0.6,0.8]",
    "budget.trials=3",
    "execution={workers: 1, cells_at_once: 1, threads: 1, device: cpu}",
)


def settings_of(folder: Path, *overrides: str) -> tuple[str, ...]:
    return (*SETTINGS, f"output={folder}", *overrides)


def spec_of(folder: Path, *overrides: str) -> StudySpec:
    return load_spec(STUDY, settings_of(folder, *overrides))


@contextlib.contextmanager
def in_process(spec: StudySpec) -> Iterator[held.Context]:
    """Make this process a worker of its own, its cells and folders made."""
    spec.folder.mkdir(parents=True, exist_ok=True)
    storage = open_storage(spec.storage_url, create=True)
    for cell in cells_of(spec):
        cell.folder(spec.folder).mkdir(parents=True, exist_ok=True)
        create_cell(storage, spec, cell, {})
    held.begin(held.Context(spec, threading.Event(), 30))
    try:
        yield held.context()
    finally:
        held.end()


def run_in_process(spec: StudySpec) -> None:
    with in_process(spec):
        worker.serve(spec, 0, 30, threading.Event())


def trials_of(spec: StudySpec, storage: Any = None) -> dict[str, list[FrozenTrial]]:
    storage = storage or open_storage(spec.storage_url, create=False)
    return {
        cell.label: optuna.load_study(study_name=cell.name, storage=storage).get_trials(deepcopy=False)
        for cell in cells_of(spec)
    }


def outcome(spec: StudySpec) -> tuple[pd.DataFrame, pd.DataFrame, dict[tuple[str, int], Any]]:
    """Return the final table, what was finally trained, and what each configuration came to."""
    storage = open_storage(spec.storage_url, create=False)
    records = read_records(storage, spec)
    table = curves(records)
    reached = times(table, records, list(spec.targets))[["variation", "seed", "target", "mbu"]]
    kept = ["variation", "seed", "best_val", "final_test", "auc_mbu", "spent_mbu", "epochs"]
    counts = ["overhead_mbu", "overhead_flops", "trials", "pruned", "failed"]
    table = cell_metrics(table, records)[[*kept, *counts]].merge(reached)
    final = pd.DataFrame([final_of(storage, cell) for cell in cells_of(spec)])
    final = final.drop(columns=["seconds", "trial", "retrained"])
    ended = {}
    for label, trials in trials_of(spec).items():
        for trial in trials:
            if trial.state in (TrialState.COMPLETE, TrialState.PRUNED):
                key = label, trial.user_attrs["config_index"]
                assert key not in ended, f"configuration {key} ended twice"
                ended[key] = (trial.state, trial.params, trial.intermediate_values)
    return table, final, ended


def final_of(storage: Any, cell: Cell) -> dict[str, Any]:
    return dict(optuna.load_study(study_name=cell.name, storage=storage).user_attrs["final"])


def assert_same_outcome(first: StudySpec, second: StudySpec) -> None:
    a, b = outcome(first), outcome(second)
    pd.testing.assert_frame_equal(a[0], b[0])
    pd.testing.assert_frame_equal(a[1], b[1])
    assert a[2] == b[2]


class Run:
    """A run of the command, with its workers in a process group of its own."""

    def __init__(self, folder: Path, *overrides: str, options: tuple[str, ...] = ()) -> None:
        self.spec = spec_of(folder, *overrides)
        flags = [part for pair in settings_of(folder, *overrides) for part in ("--set", pair)]
        self.process = subprocess.Popen(
            [*COMMAND, "run", str(STUDY), *flags, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def wait_until(self, condition: Callable[[dict[str, list[FrozenTrial]]], bool]) -> None:
        """Return when the trials in storage are so."""
        # Opening a storage makes its tables: not before the run has made them and its cells.
        made = cells_of(self.spec)[-1].folder(self.spec.folder) / "spec.yaml"
        deadline, storage = time.monotonic() + 120, None
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.process.communicate()
            if made.exists():
                # Opened once: it takes as long as a short trial.
                storage = storage or open_storage(self.spec.storage_url, create=False)
                if condition(trials_of(self.spec, storage)):
                    return
            time.sleep(0.02)
        raise AssertionError("the run did not come so far in two minutes")

    def signal(self, number: int, *, group: bool = True) -> float:
        """Send a signal; return the seconds until the command ended."""
        started = time.monotonic()
        (os.killpg if group else os.kill)(self.process.pid, number)
        self.process.wait(60)
        return time.monotonic() - started

    def result(self, timeout: float = 600) -> tuple[int, str, str]:
        """Return status, stdout and stderr."""
        out, err = self.process.communicate(timeout=timeout)
        return self.process.returncode, out, err

    def end(self) -> None:
        """Kill what is left of the group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


def assert_whole(spec: StudySpec) -> None:
    """Assert that every configuration ended once and that pairs are pairs."""
    for trials in trials_of(spec).values():
        ended = [t for t in trials if t.state in (TrialState.COMPLETE, TrialState.PRUNED)]
        indices = sorted(t.user_attrs["config_index"] for t in ended)
        failed = [t.user_attrs.get("reason") for t in trials if t.state == TrialState.FAIL]
        assert indices == list(range(spec.budget.trials or 0)), (indices, failed)
        assert all(t.state.is_finished() for t in trials)
        left = [t for t in trials if t.state == TrialState.FAIL]
        assert {t.user_attrs["reason"] for t in left} <= {"interrupted"}
    report = check_pairing(open_storage(spec.storage_url, create=False), spec)
    assert report.intact, report.text()
