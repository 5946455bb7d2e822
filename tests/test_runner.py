from __future__ import annotations

import contextlib
import datetime
import io
import multiprocessing
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import optuna
import pandas as pd
import psutil
import pytest
import torch
from command_runs import (
    Run,
    assert_same_outcome,
    assert_whole,
    final_of,
    in_process,
    outcome,
    run_in_process,
    spec_of,
    trials_of,
)
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console

from optuna_ohgw import cell_work, fleet, held, runner, worker
from optuna_ohgw.cell_study import load_cell
from optuna_ohgw.cells import Ledger, cells_of
from optuna_ohgw.claims import Claims
from optuna_ohgw.errors import CaptureError, CellFailed, StorageLost, UserError
from optuna_ohgw.fleet import Crew
from optuna_ohgw.opening import open_storage
from optuna_ohgw.spec import StudySpec
from optuna_ohgw.training import Interrupted

pytestmark = pytest.mark.timeout(900)  # on a busy machine


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


def test_the_reference_run_has_something_to_lose(undisturbed: StudySpec) -> None:
    """Its second cell has a later trial that goes on beyond the first rung, where it is killed."""
    assert_whole(undisturbed)
    second = trials_of(undisturbed)["asha-ohgw-1step/seed-0003"]
    assert max(len(t.intermediate_values) for t in second[1:]) > 20
    table, final, _ = outcome(undisturbed)
    assert np.isfinite(table["mbu"]).all()
    assert len(final) == 2


@pytest.mark.slow
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
    assert status == 128 + number
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
    run = start(tmp_path, "execution.workers=2", "budget.trials=60", "task.epochs=9")
    status, _, err = run.result()
    assert (status, err) == (0, "")
    assert_whole(run.spec)
    for trials in trials_of(run.spec).values():
        assert len(trials) == 60
        assert len({t.user_attrs["worker"]["pid"] for t in trials}) == 2


@pytest.mark.slow
def test_two_people_who_start_a_study_at_once_share_it(
    start: Callable[..., Run], tmp_path: Path, undisturbed: StudySpec
) -> None:
    """Both make the cells, one cell is taken by each, and the end is that of one run."""
    runs = [start(tmp_path, "seeds=[3,4]") for _ in range(2)]
    for run in runs:
        status, _, err = run.result()
        assert (status, err) == (0, "")
    assert_whole(runs[0].spec)
    workers = {
        label: {t.user_attrs["worker"]["pid"] for t in trials}
        for label, trials in trials_of(runs[0].spec).items()
    }
    assert all(len(pids) == 1 for pids in workers.values())
    assert len(set.union(*workers.values())) == 2
    alone = spec_of(undisturbed.folder)
    assert_same_outcome(spec_of(tmp_path), alone)


def test_an_interrupt_before_the_workers_start_can_be_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "check_data", interrupted)
    with pytest.raises(runner.Stopped):
        runner.run(spec_of(tmp_path), Console(file=io.StringIO()))


def test_an_interrupt_while_the_cells_are_made_is_noted_and_starts_no_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an exception it could be lost: imports, finalizers and callbacks of libraries swallow some."""
    honest = runner.create_cell

    def create_cell(*args: Any) -> None:
        with contextlib.suppress(BaseException):
            signal.raise_signal(signal.SIGINT)
        honest(*args)

    monkeypatch.setattr(runner, "create_cell", create_cell)
    monkeypatch.setattr(runner, "run_processes", lambda *_: pytest.fail("workers were started"))
    with pytest.raises(runner.Stopped) as stopped:
        runner.run(spec := spec_of(tmp_path), Console(file=io.StringIO()))
    assert stopped.value.number == signal.SIGINT
    assert not any(trials_of(spec).values())


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def gpus(monkeypatch: pytest.MonkeyPatch, count: int, shown: str | None = None) -> None:
    """Pretend that torch finds so many GPUs."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    if shown is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)


@pytest.mark.parametrize(
    ("device", "shown", "crew", "expected"),
    [
        ("auto", None, Crew(workers=5), ["0", "1", "0", "1", "0"]),
        ("cuda", None, Crew(trials_per_device=3), ["0", "1", "0", "1", "0", "1"]),
        ("auto", None, Crew(workers=3, trials_per_device=2), ["0", "1", "0"]),
        ("auto", None, Crew(), ["0", "1", "0", "1"]),  # workers × the cells that are left
        ("auto", "4,GPU-5", Crew(workers=3), ["4", "GPU-5", "4"]),
        ("auto", "0,1,9", Crew(workers=3), ["0", "1", "0"]),  # torch sees no third
        ("cuda:1", None, Crew(workers=2), [None, None]),
        ("cpu", None, Crew(), [None] * 4),
    ],
)
def test_workers_get_the_gpus_in_turns(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    shown: str | None,
    crew: Crew,
    expected: list[str | None],
) -> None:
    gpus(monkeypatch, 2, shown)
    spec = spec_of(tmp_path, "execution={workers: 2, cells_at_once: 8}", f"execution.device={device}")
    runner._check_crew(spec, crew)
    assert runner._devices(spec, 2, crew) == expected


@pytest.mark.parametrize(
    ("count", "device", "workers", "expected", "shared"),
    [
        (2, "auto", 4, "cuda", True),
        (2, "auto", 2, "cuda", False),
        (2, "cuda", 4, "cuda", True),
        (2, "cuda:1", 4, "cuda:1", True),
        (2, "cuda:1", 1, "cuda:1", False),
        (0, "auto", 4, "cpu", False),
        (2, "cpu", 4, "cpu", False),
    ],
)
def test_workers_are_told_what_to_train_on_and_share_a_gpu(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    count: int,
    device: str,
    workers: int,
    expected: str,
    shared: bool,
) -> None:
    """A worker that finds no GPU must not go on without: it is told cuda, not auto."""
    gpus(monkeypatch, count)
    began, said = [], []

    @contextlib.contextmanager
    def shared_gpu() -> Iterator[bool]:
        said.append("shared")
        yield True

    monkeypatch.setattr(runner, "shared_gpu", shared_gpu)
    monkeypatch.setattr(runner, "run_processes", lambda spec, devices, *_: began.append((spec, devices)))
    spec = spec_of(
        tmp_path,
        f"execution={{workers: {(workers + 1) // 2}, cells_at_once: {min(workers, 2)}, device: {device}}}",
    )
    runner.run(spec, Console(file=io.StringIO()))
    ((own, devices),) = began
    assert own.execution.device == expected
    assert own.executed(device=device) == spec
    assert len(devices) == workers
    assert bool(said) is shared


def test_a_worker_without_room_for_a_graph_is_replaced_by_one_without_graphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began: list[bool] = []
    said: list[str] = []

    def start(processes: Any, spec: StudySpec, *_: Any) -> Any:
        began.append(spec.execution.cuda_graphs)
        status = fleet._NO_ROOM if len(began) == 1 else 0
        process = multiprocessing.get_context("spawn").Process(target=os._exit, args=(status,))
        process.start()
        return fleet._Worker(process, multiprocessing.Pipe()[0])  # type: ignore[arg-type]

    monkeypatch.setattr(fleet, "_start", start)
    fleet.run_processes(spec_of(tmp_path), [None], 30, fleet.Stop(), lambda: None, said.append)
    assert began == [True, False]
    (line,) = said
    assert line.endswith("want of memory to capture a CUDA graph; another takes its place, without graphs")


def test_a_run_that_is_broken_off_ends_its_gpu_service(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []
    monkeypatch.setattr(fleet, "end_now", lambda: done.append("service"))
    monkeypatch.setattr(fleet.os, "write", lambda *_: None)
    monkeypatch.setattr(fleet.os, "_exit", done.append)
    fleet._end_at_once(signal.SIGINT)
    assert done == ["service", 130]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_worker_without_its_gpu_does_not_go_on_without(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, "execution.device=cuda")
    with pytest.raises((RuntimeError, AssertionError), match=r"(?i)cuda|nvidia"):
        worker.serve(spec, 0, 30, threading.Event())


@pytest.mark.parametrize(
    ("count", "device", "crew", "told"),
    [
        (0, "auto", Crew(trials_per_device=2), "--trials-per-device: 2, but no GPU is used here; use --work"),
        (2, "cpu", Crew(trials_per_device=2), "--trials-per-device: 2, but no GPU is used here; use --work"),
        (2, "cuda:1", Crew(trials_per_device=2), "--trials-per-device: 2, but .*'cuda:1' names one GPU; use"),
        (2, "auto", Crew(5, 2), "--workers: 5 are more than 2 on each of 2 GPUs; drop --workers or"),
        (0, "auto", Crew(2, 2, "ray"), "--trials-per-device: 2, but there are no GPUs"),
    ],
)
def test_a_crew_that_cannot_be_had_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, device: str, crew: Crew, told: str
) -> None:
    gpus(monkeypatch, count)
    folder = tmp_path / "new"
    with pytest.raises(UserError, match=told):
        runner.run(spec_of(folder, f"execution.device={device}"), Console(file=io.StringIO()), crew=crew)
    assert not folder.exists()


class TestWorker:
    """Jobs of a worker, called in this process with a stub in place of training."""

    @pytest.fixture
    def spec(self, tmp_path: Path) -> StudySpec:
        return spec_of(tmp_path, "variations=[asha-baseline]", "budget.trials=5", "task.epochs=4")

    @staticmethod
    def stub(monkeypatch: pytest.MonkeyPatch, *ends: Any) -> list[int]:
        """Make the k-th trial raise ``ends[k]``, or train if it is None; return the positions tried."""
        tried: list[int] = []
        honest = cell_work.run_trial

        def run_trial(*args: Any, **kwargs: Any) -> Any:
            tried.append(kwargs["config_index"])
            end = ends[len(tried) - 1] if len(tried) <= len(ends) else None
            if end is not None:
                raise end
            return honest(*args, **kwargs)

        monkeypatch.setattr(cell_work, "run_trial", run_trial)
        return tried

    def test_a_trial_that_raises_is_recorded_and_the_cell_goes_on(
        self, spec: StudySpec, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        memory = torch.OutOfMemoryError("CUDA out of memory")
        patient = spec.execution.model_copy(update={"max_failed": 1.0})
        spec = spec.model_copy(update={"execution": patient})
        tried = self.stub(monkeypatch, None, ValueError("no such thing"), MemoryError("x" * 999), memory)
        run_in_process(spec)
        assert tried == [0, 1, 2, 3, 4]
        (trials,) = trials_of(spec).values()
        assert [t.state == TrialState.FAIL for t in trials] == [False, True, True, True, False]
        assert trials[1].user_attrs["reason"] == "ValueError: no such thing"
        assert trials[2].user_attrs["reason"] == "MemoryError: " + "x" * 487
        assert trials[3].user_attrs["reason"] == "OutOfMemoryError: CUDA out of memory"
        assert [t.user_attrs["config_index"] for t in trials] == [0, 1, 2, 3, 4]
        log = (cells_of(spec)[0].folder(spec.folder) / "worker-0.log").read_text()
        assert "trial 1 failed: Traceback" in log
        table, final, _ = outcome(spec)
        assert set(table["failed"]) == {3}
        assert len(final) == 1

    def test_a_worker_whose_gpu_is_lost_ends_and_its_trial_has_not_failed(
        self, spec: StudySpec, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Ended(BaseException):
            pass

        def end(status: int) -> None:
            raise Ended(status)

        def lost(device: Any) -> None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        def run_trial(*args: Any, **kwargs: Any) -> Any:
            monkeypatch.setattr(held, "device", lambda: torch.device("cuda"))
            lost(None)

        monkeypatch.setattr(cell_work, "run_trial", run_trial)
        monkeypatch.setattr(held, "record", lambda claim: {"claim": claim})
        monkeypatch.setattr(os, "_exit", end)
        monkeypatch.setattr(torch.cuda, "synchronize", lost)
        with in_process(spec), pytest.raises(Ended, match="1"):
            cell_work.search(cells_of(spec)[0])
        assert trials_of(spec)["asha-baseline/seed-0003"][0].state == TrialState.RUNNING

    def test_out_of_memory_lets_go_of_the_network_before_the_next_trial(
        self, spec: StudySpec, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        networks, gone = [], []

        def run_trial(trial: Any, spec: Any, variation: Any, workload_for: Any, **_: Any) -> Any:
            network = workload_for(spec.task.structure).task.network()
            network.captured = [network]  # as a captured step holds it
            networks.append(weakref.ref(network))
            monkeypatch.setattr(held, "device", lambda: torch.device("cuda"))
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(cell_work, "run_trial", run_trial)
        monkeypatch.setattr(held, "record", lambda claim: {"claim": claim})
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: gone.append(networks[-1]() is None))
        with in_process(spec), contextlib.suppress(CellFailed):
            cell_work._one(*self.first(spec))
        assert gone == [True]

    @staticmethod
    def first(spec: StudySpec) -> Any:
        """Return the arguments of a cell's first trial."""
        cell = cells_of(spec)[0]
        study = load_cell(held.database(), spec, cell)
        ledger, folder = Ledger(study, spec), cell.folder(spec.folder)
        return cell_work._next(study, ledger, folder), study, cell, folder, ledger

    @pytest.mark.parametrize(
        "error",
        [StorageLost("storage: db did not answer for 600 s"), CaptureError("the step failed; use another")],
    )
    def test_a_storage_or_a_gpu_that_is_lost_is_no_failure_of_the_trial(
        self, spec: StudySpec, monkeypatch: pytest.MonkeyPatch, error: Exception
    ) -> None:
        self.stub(monkeypatch, None, error)
        with pytest.raises(type(error), match=str(error)):
            run_in_process(spec)
        (trials,) = trials_of(spec).values()
        assert trials[1].state == TrialState.RUNNING

    def test_a_worker_tells_that_it_lives_after_its_storage_was_lost(
        self, spec: StudySpec, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(worker, "BEAT_S", 0.01)

        class Away:
            beats = 0

            def beat(self) -> bool:
                self.beats += 1
                if self.beats == 1:
                    raise StorageLost("storage: db did not answer for 600 s")
                return False

        with in_process(spec) as context, worker._beating(cast(Claims, Away()), context):
            assert context.lost.wait(30)

    def test_more_than_a_share_of_failures_ends_the_search(
        self, spec: StudySpec, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        errors = [ValueError("a"), None, ValueError("b"), None, ValueError("c")]
        self.stub(monkeypatch, *errors)
        with in_process(spec), pytest.raises(CellFailed, match=r"3 of 5 trials failed, the last with .*: c;"):
            cell_work.search(cells_of(spec)[0])
        monkeypatch.undo()
        patient = spec_of(spec.folder / "patient", "variations=[asha-baseline]", "execution.max_failed=0.6")
        patient = patient.model_copy(update={"budget": spec.budget})
        self.stub(monkeypatch, *errors)
        run_in_process(patient)
        monkeypatch.undo()
        again = spec_of(spec.folder / "again", "variations=[asha-baseline]")
        self.stub(monkeypatch, *[ValueError("e")] * 3)
        with (
            in_process(again),
            pytest.raises(CellFailed, match=r"3 of 3 trials failed, .*: e;"),
        ):
            cell_work.search(cells_of(again)[0])
        assert [t.state for (own,) in [trials_of(again).values()] for t in own] == [TrialState.FAIL] * 3

    def test_a_cell_that_fails_is_given_up_and_others_go_on(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        spec = spec_of(tmp_path, "budget.trials=3", "task.epochs=4")
        self.stub(monkeypatch, *[ValueError("no such thing")] * 3)
        run_in_process(spec)
        storage = open_storage(spec.storage_url, create=False)
        first, second = (load_cell(storage, spec, cell) for cell in cells_of(spec))
        assert "final" not in first.user_attrs
        assert "final" in second.user_attrs
        claims = optuna.load_study(study_name="digits/workers", storage=spec.storage_url).get_trials()
        assert [(c.user_attrs["cell"], c.state) for c in claims] == [
            ("asha-baseline/seed-0003", TrialState.FAIL),
            ("asha-ohgw-1step/seed-0003", TrialState.PRUNED),
        ]
        assert (
            claims[0]
            .user_attrs["error"]
            .startswith("3 of 3 trials failed, the last with ValueError: no such thing")
        )
        run_in_process(spec)  # the next run tries again, and all its trials had failed
        assert len(trials_of(spec)["asha-baseline/seed-0003"]) == 3

    def test_an_interrupted_trial_says_so_and_ends_the_search(
        self, spec: StudySpec, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with in_process(spec) as context:

            def run_trial(*args: Any, **kwargs: Any) -> Any:
                context.stop.set()
                raise Interrupted

            monkeypatch.setattr(cell_work, "run_trial", run_trial)
            cell_work.search(cells_of(spec)[0])
        (trials,) = trials_of(spec).values()
        assert [(t.state, t.user_attrs["reason"]) for t in trials] == [(TrialState.FAIL, "interrupted")]

    @pytest.mark.parametrize("limit", [45.0, 61.0])
    def test_a_budget_of_mbu_ends_a_cell_and_a_resumed_one_starts_nothing(
        self, tmp_path: Path, limit: float
    ) -> None:
        spec = spec_of(tmp_path, "variations=[asha-baseline]", "task.epochs=4")
        budget = spec.budget.model_copy(update={"mbu": limit, "trials": None})
        spec = spec.model_copy(update={"budget": budget})
        (cell,) = cells_of(spec)
        with in_process(spec):
            cell_work.search(cell)
        study = load_cell(open_storage(spec.storage_url, create=False), spec, cell)
        assert Ledger(study, spec).is_spent()
        spent = sum(t.user_attrs["curve"]["mbu"][-1] for t in study.trials)
        batches = study.trials[0].user_attrs["batches_per_epoch"]
        assert limit <= spent < limit + batches
        count = len(study.trials)
        with in_process(spec):  # a new process knows no task yet
            cell_work.search(cell)
        assert len(study.get_trials()) == count

    def test_of_equal_accuracies_the_first_trial_is_kept(self, spec: StudySpec, tmp_path: Path) -> None:
        from optuna_ohgw import ending
        from optuna_ohgw.curve import Best
        from optuna_ohgw.training import TrainState

        state = TrainState({}, {}, {}, {}, 1, 1, 0, 0)
        study = optuna.create_study(direction="maximize")
        for value in (0.5, 0.7, 0.7, 0.6):
            trial = study.ask()
            trial.report(value, 1)
            ending.keep_best(Best(state, value), study, trial.number, tmp_path, ".safetensors")
            study.tell(trial, value)
        assert ending.best_trial(study).number == 1
        assert [p.name for p in tmp_path.glob("trial-*")] == ["trial-1.safetensors"]

    @pytest.mark.parametrize("lost", [Path.unlink, truncate], ids=["gone", "truncated"])
    def test_the_final_training_is_skipped_where_the_weights_were_kept(
        self, tmp_path: Path, lost: Callable[[Path], None]
    ) -> None:
        spec = spec_of(tmp_path, "variations=[asha-baseline]", "budget.trials=1", "task.epochs=3")
        run_in_process(spec)
        storage, (cell,) = open_storage(spec.storage_url, create=False), cells_of(spec)
        kept = final_of(storage, cell)
        assert not kept["retrained"]
        folder = cell.folder(spec.folder)
        assert {p.name for p in folder.glob("*.safetensors")} == {"best.safetensors"}
        rows = pd.read_csv(folder / "curve.csv")
        assert rows["epoch"].tolist() == [1, 2, 3]
        assert rows["val_metric"].max() == pytest.approx(kept["val_metric"], rel=1e-5)

        other = spec_of(tmp_path / "other", "variations=[asha-baseline]", "budget.trials=1", "task.epochs=3")
        with in_process(other):
            (cell,) = cells_of(other)
            cell_work.search(cell)
            for path in cell.folder(other.folder).glob("trial-*"):
                lost(path)
            cell_work.finish(cell)
        again = final_of(open_storage(other.storage_url, create=False), cell)
        assert again["retrained"]
        for column in ("psi", "best_epoch", "val_metric", "test_metric", "test_loss", "config_index"):
            assert again[column] == kept[column]
