"""Workers that are Ray actors. Oracle: the run of plain processes."""

from __future__ import annotations

import io
import signal
import time

import optuna
import psutil
import pytest
from command_runs import Run, assert_same_outcome, assert_whole, run_in_process, spec_of, trials_of
from optuna.trial import TrialState
from rich.console import Console

from optuna_ohgw import ray_cluster, runner
from optuna_ohgw.errors import UserError
from optuna_ohgw.fleet import Crew
from optuna_ohgw.ray_engine import Places, places_of

RAY = ("--engine", "ray", "--workers", "2")
STUDY = (
    "budget.trials=8",
    "execution={workers: 1, cells_at_once: 2, threads: 1, device: cpu, checkpoint_s: 0.3}",
)


def at_work(cells):
    return any(t.state == TrialState.RUNNING for own in cells.values() for t in own)


def claims_of(run):
    study = optuna.load_study(study_name=f"{run.spec.name}/workers", storage=run.spec.storage_url)
    return [t for t in study.get_trials(deepcopy=False) if t.state == TrialState.RUNNING]


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    spec = spec_of(tmp_path_factory.mktemp("calm"), *STUDY)
    run_in_process(spec)
    return spec


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_actor_that_is_killed_is_restarted_and_nothing_changes(tmp_path, calm):
    pytest.importorskip("ray")
    run = Run(tmp_path, *STUDY, options=RAY)
    try:
        run.wait_until(at_work)
        time.sleep(0.5)
        listening = [
            c.laddr.ip
            for process in psutil.Process(run.process.pid).children(recursive=True)
            for c in process.net_connections("inet")
            if c.status == psutil.CONN_LISTEN
        ]
        assert len(listening) > 3
        assert {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}
        killed = {claim.user_attrs["pid"] for claim in claims_of(run)}
        assert killed
        for pid in killed:
            psutil.Process(pid).kill()
        status, _, err = run.result()
    finally:
        run.end()
    assert (status, err) == (0, "")
    assert_whole(run.spec)
    assert_same_outcome(run.spec, calm)
    trials = [t for own in trials_of(run.spec).values() for t in own if t.state != TrialState.FAIL]
    assert {t.user_attrs["worker"]["pid"] for t in trials} - killed


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_stopped_run_and_one_whose_driver_dies_can_be_continued(tmp_path, calm):
    pytest.importorskip("ray")
    for number in (signal.SIGTERM, signal.SIGKILL):
        run = Run(tmp_path, *STUDY, options=RAY)
        try:
            run.wait_until(at_work)
            time.sleep(0.5)
            actors = [psutil.Process(claim.user_attrs["pid"]) for claim in claims_of(run)]
            run.signal(number, group=False)
            status = run.process.returncode
            psutil.wait_procs(actors, timeout=30)
        finally:
            run.end()
        assert status == (143 if number == signal.SIGTERM else -signal.SIGKILL)
        assert not any(actor.is_running() for actor in actors)
    again = Run(tmp_path, *STUDY)
    status, _, err = again.result()
    assert (status, err) == (0, "")
    assert_whole(again.spec)
    assert_same_outcome(again.spec, calm)


@pytest.mark.parametrize(
    ("device", "crew", "gpus", "here", "expected"),
    [
        ("cpu", Crew(), 4, True, Places(2, 1, 0)),  # execution.workers × the cells at once
        ("auto", Crew(trials_per_device=3), 2, False, Places(6, 1, 0.3333)),  # three fit
        ("auto", Crew(workers=6), 2, False, Places(6, 1, 1)),  # each waits for a whole one
        ("cuda", Crew(workers=6), 2, True, Places(6, 1, 0.3333)),  # there is no other room
        ("auto", Crew(workers=1), 2, True, Places(1, 1, 1)),
        ("auto", Crew(workers=3), 0, True, Places(3, 1, 0)),
    ],
)
def test_what_is_asked_of_a_cluster(tmp_path, device, crew, gpus, here, expected):
    spec = spec_of(tmp_path, *STUDY, f"execution.device={device}")
    assert places_of(spec, crew, 5, gpus, here=here) == expected


def test_without_ray_a_line_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_cluster, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"--engine: ray is not installed; pip install 'optuna-ohgw\[ray\]'$"):
        runner.run(spec_of(tmp_path / "new"), Console(file=io.StringIO()), crew=Crew(engine="ray"))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "host:port", "host"])
def test_a_cluster_that_is_not_there_is_one_line_and_leaves_nothing(tmp_path, address):
    pytest.importorskip("ray")
    with pytest.raises(
        UserError, match=rf"--address: no cluster at '{address}' can be used .*; start one by"
    ):
        runner.run(
            spec_of(tmp_path / "new"), Console(file=io.StringIO()), crew=Crew(None, None, "ray", address)
        )
    assert not (tmp_path / "new").exists()


def test_an_unknown_engine_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"--engine: 'dask' is unknown; use processes or ray$"):
        runner.run(spec_of(tmp_path), Console(file=io.StringIO()), crew=Crew(engine="dask"))
