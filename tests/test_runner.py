from __future__ import annotations

import contextlib
import datetime
import io
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
import psutil
import pytest
from filelock import FileLock
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console

from optuna_ohgw import runner, worker
from optuna_ohgw.cells import Cell, Ledger, cells_of, create_cell, load_cell, open_storage
from optuna_ohgw.errors import UserError
from optuna_ohgw.metrics import cell_metrics, curves, times
from optuna_ohgw.pairing import check_pairing
from optuna_ohgw.records import read_records
from optuna_ohgw.spec import StudySpec, load_spec
from optuna_ohgw.training import Interrupted

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
def in_process(spec: StudySpec) -> Iterator[worker.Context]:
    """Make this process a worker of its own, its cells and folders made."""
    spec.folder.mkdir(parents=True, exist_ok=True)
    storage = open_storage(spec.storage_url, create=True)
    for cell in cells_of(spec):
        cell.folder(spec.folder).mkdir(parents=True, exist_ok=True)
        create_cell(storage, spec, cell, {})
    worker._tasks.clear()
    worker._context = worker.Context(spec, threading.Event(), queue.Queue(), 30)
    try:
        yield worker._context
    finally:
        worker._context = None
        worker._tasks.clear()


def run_in_process(spec: StudySpec) -> None:
    with in_process(spec):
        for cell in cells_of(spec):
            worker.search(cell, 0)
            worker.finish(cell)


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

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.spec = spec_of(folder, *overrides)
        flags = [part for pair in settings_of(folder, *overrides) for part in ("--set", pair)]
        self.process = subprocess.Popen(
            [*COMMAND, "run", str(STUDY), *flags],
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

    def result(self, timeout: float = 200) -> tuple[int, str, str]:
        """Return status, stdout and stderr."""
        out, err = self.process.communicate(timeout=timeout)
        return self.process.returncode, out, err

    def end(self) -> None:
        """Kill what is left of the group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


@pytest.fixture
def start() -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def begin(folder: Path, *overrides: str) -> Run:
        runs.append(Run(folder, *overrides))
        return runs[-1]

    yield begin
    for run in runs:
        run.end()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> StudySpec:
    spec = spec_of(tmp_path_factory.mktemp("undisturbed"))
    run_in_process(spec)
    return spec


def past_a_rung(trials: dict[str, list[FrozenTrial]]) -> bool:
    """Whether a trial of the second cell, not its first, trains on beyond its first rung.

    Told by its time, some ten epochs: what it reported is not in the storage before its end.
    """
    second = trials["asha-ohgw-1step/seed-0003"]
    while_ago = datetime.datetime.now() - datetime.timedelta(seconds=0.15)
    running = [t for t in second if t.state == TrialState.RUNNING and t.number > 0]
    return any(t.datetime_start < while_ago for t in running if t.datetime_start)


def assert_whole(spec: StudySpec) -> None:
    """Assert that every configuration ended once and that pairs are pairs."""
    for trials in trials_of(spec).values():
        ended = [t for t in trials if t.state in (TrialState.COMPLETE, TrialState.PRUNED)]
        indices = sorted(t.user_attrs["config_index"] for t in ended)
        assert indices == list(range(spec.budget.trials or 0))
        assert all(t.state.is_finished() for t in trials)
        left = [t for t in trials if t.state == TrialState.FAIL]
        assert {t.user_attrs["reason"] for t in left} <= {"interrupted"}
    report = check_pairing(open_storage(spec.storage_url, create=False), spec)
    assert report.intact, report.text()


def test_the_reference_run_has_something_to_lose(undisturbed: StudySpec) -> None:
    """Its second cell has a later trial that goes on beyond the first rung, where it is killed."""
    assert_whole(undisturbed)
    second = trials_of(undisturbed)["asha-ohgw-1step/seed-0003"]
    assert max(len(t.intermediate_values) for t in second[1:]) > 20
    table, final, _ = outcome(undisturbed)
    assert np.isfinite(table["mbu"]).all()
    assert len(final) == 2


def test_a_killed_run_goes_on_to_the_same_end(
    undisturbed: StudySpec, start: Callable[..., Run], tmp_path: Path
) -> None:
    first = start(tmp_path)
    first.wait_until(past_a_rung)
    first.signal(signal.SIGKILL)
    before = trials_of(first.spec)
    finished = {(c, t.number): t for c, own in before.items() for t in own if t.state.is_finished()}
    assert len(finished) >= 3
    assert any(t.state == TrialState.RUNNING for t in before["asha-ohgw-1step/seed-0003"])

    second = start(tmp_path)
    status, out, err = second.result()
    assert (status, err) == (0, "")
    assert "1 unfinished trials of an earlier run start again" in out
    after = trials_of(first.spec)
    for (label, number), trial in finished.items():
        assert after[label][number] == trial
    assert_whole(first.spec)
    assert_same_outcome(first.spec, undisturbed)
    assert runner.run(first.spec, Console(file=io.StringIO())) is False  # nothing is left


@pytest.mark.slow
@pytest.mark.parametrize("group", [True, False], ids=["group", "parent"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_says_how_to_go_on_and_does(
    undisturbed: StudySpec, start: Callable[..., Run], tmp_path: Path, number: int, group: bool
) -> None:
    first = start(tmp_path)
    first.wait_until(past_a_rung)
    assert first.signal(number, group=group) < 15
    status, _, err = first.result()
    assert status == 130
    assert err == "stopped; run the same command to continue\n"
    stopped = trials_of(first.spec)["asha-ohgw-1step/seed-0003"][-1]
    assert (stopped.state, stopped.user_attrs["reason"]) == (TrialState.FAIL, "interrupted")

    second = start(tmp_path)
    status, _, err = second.result()
    assert (status, err) == (0, "")
    assert_whole(first.spec)
    assert_same_outcome(first.spec, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.2, 0.5, 1.0])
def test_a_stop_while_workers_start_is_as_quiet(
    start: Callable[..., Run], tmp_path: Path, delay: float
) -> None:
    run = start(tmp_path)
    run.wait_until(lambda trials: True)  # the cells are there: workers are about to start
    time.sleep(delay)
    assert run.signal(signal.SIGINT) < 15
    status, _, err = run.result()
    assert (status, err) == (130, "stopped; run the same command to continue\n")


@pytest.mark.slow
def test_workers_end_when_only_their_parent_is_killed(start: Callable[..., Run], tmp_path: Path) -> None:
    run = start(tmp_path)
    run.wait_until(lambda trials: any(t.state == TrialState.RUNNING for own in trials.values() for t in own))
    pids = {child.pid for child in psutil.Process(run.process.pid).children(recursive=True)}
    assert len(pids) >= 2  # the worker and what it was forked from
    run.signal(signal.SIGKILL, group=False)
    deadline = time.monotonic() + 10
    while any(_is_training(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(_is_training(pid) for pid in pids)
    before = trials_of(run.spec)
    time.sleep(1.0)
    assert trials_of(run.spec) == before


def _is_training(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.slow
def test_two_workers_of_a_cell_train_every_configuration_once(
    start: Callable[..., Run], tmp_path: Path
) -> None:
    longer = ("execution.workers=2", "budget.trials=60", "task.epochs=9")  # than a command's imports
    run = start(tmp_path, *longer)
    run.wait_until(lambda trials: True)
    status, _, err = start(tmp_path, *longer).result()
    assert status == 2
    assert err.startswith(f"error: output: another run is at work in {tmp_path}; ")
    assert err.count("\n") == 1
    status, _, err = run.result()
    assert (status, err) == (0, "")
    assert_whole(run.spec)
    for trials in trials_of(run.spec).values():
        assert len(trials) == 60
        assert len({t.user_attrs["worker"]["pid"] for t in trials}) == 2


def test_a_second_run_at_the_same_time_is_refused_in_one_line(tmp_path: Path) -> None:
    spec = spec_of(tmp_path)
    with FileLock(tmp_path / ".run.lock"), pytest.raises(UserError) as caught:
        runner.run(spec, Console(file=io.StringIO()))
    assert str(caught.value).startswith(f"output: another run is at work in {tmp_path}; ")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "study.db").exists()


def test_an_interrupt_before_the_workers_start_can_be_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "_check_data", interrupted)
    with pytest.raises(runner.Stopped):
        runner.run(spec_of(tmp_path), Console(file=io.StringIO()))


class TestWorker:
    """Jobs of a worker, called in this process with a stub in place of training."""

    @pytest.fixture
    def spec(self, tmp_path: Path) -> StudySpec:
        return spec_of(tmp_path, "variations=[asha-baseline]", "budget.trials=5", "task.epochs=4")

    @staticmethod
    def stub(monkeypatch: pytest.MonkeyPatch, *ends: Any) -> list[int]:
        """Make the k-th trial raise ``ends[k]``, or train if it is None; return the positions tried."""
        tried: list[int] = []
        honest = worker.run_trial

        def run_trial(*args: Any, **kwargs: Any) -> Any:
            tried.append(kwargs["config_index"])
            end = ends[len(tried) - 1] if len(tried) <= len(ends) else None
            if end is not None:
                raise end
            return honest(*args, **kwargs)

        monkeypatch.setattr(worker, "run_trial", run_trial)
        return tried

    def test_a_trial_that_raises_is_recorded_and_the_cell_goes_on(
        self, spec: StudySpec, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tried = self.stub(monkeypatch, None, ValueError("no such thing"), MemoryError("x" * 999))
        run_in_process(spec)
        assert tried == [0, 1, 2, 3, 4]
        (trials,) = trials_of(spec).values()
        assert [t.state == TrialState.FAIL for t in trials] == [False, True, True, False, False]
        assert trials[1].user_attrs["reason"] == "ValueError: no such thing"
        assert trials[2].user_attrs["reason"] == "MemoryError: " + "x" * 487
        assert [t.user_attrs["config_index"] for t in trials] == [0, 1, 2, 3, 4]
        log = (cells_of(spec)[0].folder(spec.folder) / "worker-0.log").read_text()
        assert "trial 1 failed: Traceback" in log
        table, final, _ = outcome(spec)
        assert set(table["failed"]) == {2}
        assert len(final) == 1

    def test_three_failures_in_a_row_end_the_search(
        self, spec: StudySpec, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        errors = [ValueError("a"), ValueError("b"), None, ValueError("c"), ValueError("d")]
        self.stub(monkeypatch, *errors)
        run_in_process(spec)
        monkeypatch.undo()
        again = spec_of(spec.folder / "again", "variations=[asha-baseline]")
        self.stub(monkeypatch, *[ValueError("e")] * 3)
        with in_process(again), pytest.raises(RuntimeError, match="3 trials in a row failed"):
            worker.search(cells_of(again)[0], 0)
        assert [t.state for (own,) in [trials_of(again).values()] for t in own] == [TrialState.FAIL] * 3

    def test_an_interrupted_trial_says_so_and_ends_the_search(
        self, spec: StudySpec, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with in_process(spec) as context:

            def run_trial(*args: Any, **kwargs: Any) -> Any:
                context.stop.set()
                raise Interrupted

            monkeypatch.setattr(worker, "run_trial", run_trial)
            worker.search(cells_of(spec)[0], 0)
            events = [context.events.get_nowait()]
            assert context.events.empty()
        (trials,) = trials_of(spec).values()
        assert [(t.state, t.user_attrs["reason"]) for t in trials] == [(TrialState.FAIL, "interrupted")]
        assert events[0]["done"] == 0

    @pytest.mark.parametrize("limit", [45.0, 61.0])
    def test_a_budget_of_mbu_ends_a_cell_and_a_resumed_one_starts_nothing(
        self, tmp_path: Path, limit: float
    ) -> None:
        spec = spec_of(tmp_path, "variations=[asha-baseline]", "task.epochs=4")
        budget = spec.budget.model_copy(update={"mbu": limit, "trials": None})
        spec = spec.model_copy(update={"budget": budget})
        (cell,) = cells_of(spec)
        with in_process(spec):
            worker.search(cell, 0)
        study = load_cell(open_storage(spec.storage_url, create=False), spec, cell)
        assert Ledger(study, spec).is_spent()
        spent = sum(t.user_attrs["curve"]["mbu"][-1] for t in study.trials)
        batches = study.trials[0].user_attrs["batches_per_epoch"]
        assert limit <= spent < limit + batches
        count = len(study.trials)
        with in_process(spec):  # a new process knows no task yet
            worker.search(cell, 0)
        assert len(study.get_trials()) == count

    def test_of_equal_accuracies_the_first_trial_is_kept(self, spec: StudySpec, tmp_path: Path) -> None:
        from optuna_ohgw.training import TrainState
        from optuna_ohgw.trial import Best

        state = TrainState({}, {}, {}, {}, 1, 1, 0, 0)
        study = optuna.create_study(direction="maximize")
        for value in (0.5, 0.7, 0.7, 0.6):
            trial = study.ask()
            trial.report(value, 1)
            worker._keep(Best(state, value), study, trial.number, tmp_path)
            study.tell(trial, value)
        assert worker.best_trial(study).number == 1
        assert [p.name for p in tmp_path.glob("trial-*")] == ["trial-1.safetensors"]

    def test_the_final_training_is_skipped_where_the_weights_were_kept(self, tmp_path: Path) -> None:
        spec = spec_of(tmp_path, "variations=[asha-baseline]", "budget.trials=1", "task.epochs=3")
        run_in_process(spec)
        storage, (cell,) = open_storage(spec.storage_url, create=False), cells_of(spec)
        kept = final_of(storage, cell)
        assert not kept["retrained"]
        folder = cell.folder(spec.folder)
        assert {p.name for p in folder.glob("*.safetensors")} == {"best.safetensors"}
        rows = pd.read_csv(folder / "curve.csv")
        assert rows["epoch"].tolist() == [1, 2, 3]
        assert rows["val_accuracy"].max() == pytest.approx(kept["val_accuracy"], rel=1e-5)

        other = spec_of(tmp_path / "other", "variations=[asha-baseline]", "budget.trials=1", "task.epochs=3")
        with in_process(other):
            (cell,) = cells_of(other)
            worker.search(cell, 0)
            for path in cell.folder(other.folder).glob("trial-*"):
                path.unlink()
            worker.finish(cell)
        again = final_of(open_storage(other.storage_url, create=False), cell)
        assert again["retrained"]
        for column in ("psi", "best_epoch", "val_accuracy", "test_accuracy", "test_loss", "config_index"):
            assert again[column] == kept[column]
