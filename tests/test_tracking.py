"""What is sent of a study, once each; the services themselves where they are installed."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.trial import FrozenTrial, TrialState
from planted import RANGES, START, grown_storage, plant_cell, planted_spec, planted_trial

from optuna_ohgw import tracking
from optuna_ohgw.cells import Cell, cells_of
from optuna_ohgw.errors import UserError
from optuna_ohgw.opening import open_storage
from optuna_ohgw.spec import StudySpec
from optuna_ohgw.tracking import check_tracking, send_cell, send_report, tracked

CELL = Cell("planted", "asha-ohgw-1step", 3)


class TestTracked:
    def test_holds_both_psi_every_epoch_and_what_it_cost(self) -> None:
        trial = planted_trial(4, [0.3, None], warm=True, unit=(0.25, 0.5, 0.5))
        trial.number = 4
        row = tracked(trial, CELL)
        assert row.name == "asha-ohgw-1step/seed-0003/4"
        assert row.tags == {
            "variation": "asha-ohgw-1step",
            "seed": "3",
            "state": "PRUNED",
            "reason": "diverged in epoch 2",
        }
        assert row.params["suggested_lr"] == pytest.approx(1e-3)
        assert row.params["trained_lr"] == pytest.approx(1e-3 * 10**-1e-4)
        assert set(row.params) == {f"{kind}_{name}" for kind in ("suggested", "trained") for name in RANGES}
        (first_wall, first), (_, second) = row.curve
        assert first_wall == pytest.approx(START + 1.6)
        assert (first["mbu"], first["val_metric"], first["warm_s"]) == (15.0, 0.3, 0.5)
        assert set(second) == {"mbu", "train_s", "warm_s", "eval_s"}  # what was not finite is left out
        assert row.costs == {
            "warm_mbu": 5.0,
            "total_train_s": 2.0,
            "total_warm_s": 0.5,
            "total_eval_s": pytest.approx(0.2),
            "batch_flops": 1000.0,
            "warm_flops": 4000.0,
            "peak_ram_bytes": 1_050_000_000.0,
        }

    def test_of_a_trial_that_failed_at_once(self) -> None:
        trial = planted_trial(0, [], state=TrialState.FAIL, reason="ValueError: no")
        row = tracked(trial, Cell("planted", "asha-baseline", 7, pilot=True))
        assert row.curve == []
        assert (row.tags["variation"], row.tags["reason"]) == ("pilot", "ValueError: no")


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Return until when services are left alone, nothing at first."""
    paused: dict[str, float] = {}
    monkeypatch.setattr(tracking, "_paused_until", paused)
    return paused


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of what is sent, in order."""
    names: list[str] = []

    def send(spec: StudySpec, cell: Cell, trial: FrozenTrial) -> None:
        names.append(f"{cell.label}/{trial.number}")

    monkeypatch.setattr(tracking, "_to_mlflow", send)
    return names


def tracked_spec() -> StudySpec:
    return planted_spec(("asha-baseline",), (0,), tracking="mlflow")


def storage_of(*trials: FrozenTrial) -> tuple[BaseStorage, Cell]:
    storage, (cell,) = InMemoryStorage(), cells_of(tracked_spec())
    study_id = plant_cell(storage, cell, tracked_spec())
    for trial in trials:
        storage.create_new_trial(study_id, template_trial=trial)
    return storage, cell


class TestSendCell:
    def test_each_ended_trial_is_sent_once(self, sent: list[str]) -> None:
        running = planted_trial(2, [0.2], state=TrialState.RUNNING)
        storage, cell = storage_of(planted_trial(0, [0.1]), planted_trial(1, [0.3]), running)
        assert send_cell(storage, tracked_spec(), cell) == 2
        assert send_cell(storage, tracked_spec(), cell) == 0
        study = optuna.load_study(study_name=cell.name, storage=storage)
        study.tell(2, 0.2)
        assert send_cell(storage, tracked_spec(), cell) == 1
        assert sent == [f"asha-baseline/seed-0000/{k}" for k in range(3)]

    def test_an_interrupted_trial_is_not_sent_but_its_retry_is(self, sent: list[str]) -> None:
        lost = planted_trial(0, [0.1], state=TrialState.FAIL, reason="interrupted")
        again = planted_trial(0, [0.1], retry_of=0)
        storage, cell = storage_of(lost, again)
        assert send_cell(storage, tracked_spec(), cell) == 1
        assert sent == ["asha-baseline/seed-0000/1"]

    def test_a_service_that_fails_is_a_warning_and_the_rest_is_sent_later(
        self,
        sent: list[str],
        no_pause: dict[str, float],
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        storage, cell = storage_of(*(planted_trial(k, [0.1]) for k in range(3)))
        working = tracking._to_mlflow

        def once(spec: StudySpec, cell: Cell, trial: FrozenTrial) -> None:
            if sent:
                raise ConnectionError("refused\nby the server")
            working(spec, cell, trial)

        monkeypatch.setattr(tracking, "_to_mlflow", once)
        with caplog.at_level(logging.WARNING):
            assert send_cell(storage, tracked_spec(), cell) == 1
            assert send_cell(storage, tracked_spec(), cell) == 0  # left alone for a while: no second warning
            assert not send_report(tracked_spec(), Path())
        (warning,) = [r.getMessage() for r in caplog.records if r.name == "optuna_ohgw.tracking"]
        assert warning == ("tracking: mlflow failed (refused); run the same command again to send the rest")
        assert 0 < no_pause["mlflow"] - time.monotonic() <= 600
        no_pause["mlflow"] = time.monotonic()
        monkeypatch.setattr(tracking, "_to_mlflow", working)
        assert send_cell(storage, tracked_spec(), cell) == 2
        assert len(set(sent)) == len(sent) == 3

    def test_a_run_that_is_killed_in_a_cell_sends_only_the_rest(
        self, sent: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        storage, cell = storage_of(*(planted_trial(k, [0.1]) for k in range(3)))
        working = tracking._to_mlflow

        def killed(spec: StudySpec, cell: Cell, trial: FrozenTrial) -> None:
            if trial.number == 2:
                raise KeyboardInterrupt
            working(spec, cell, trial)

        monkeypatch.setattr(tracking, "_to_mlflow", killed)
        with pytest.raises(KeyboardInterrupt):
            send_cell(storage, tracked_spec(), cell)
        monkeypatch.setattr(tracking, "_to_mlflow", working)
        assert send_cell(storage, tracked_spec(), cell) == 1
        assert sent == [f"asha-baseline/seed-0000/{k}" for k in range(3)]

    def test_two_services_are_remembered_apart(
        self, sent: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        storage, cell = storage_of(planted_trial(0, [0.1]))
        monkeypatch.setattr(tracking, "_to_wandb", tracking._to_mlflow)
        both = [tracked_spec().model_copy(update={"tracking": name}) for name in ("mlflow", "wandb")]
        assert [send_cell(storage, spec, cell) for spec in both * 2] == [1, 1, 0, 0]

    def test_without_tracking_nothing_is_sent(self, sent: list[str]) -> None:
        storage, cell = storage_of(planted_trial(0, [0.1]))
        spec = planted_spec(("asha-baseline",), (0,))
        assert send_cell(storage, spec, cell) == 0
        assert not send_report(spec, Path())
        assert sent == []


def test_a_missing_package_is_told_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"package mlflow is not installed; pip install 'optuna-ohgw\[mlflow\]'"
    ):
        check_tracking(tracked_spec())
    check_tracking(planted_spec())


def run(folder: Path, service: str) -> StudySpec:
    """Send a study of two cells with two trials each, and its report twice."""
    (folder / "out").mkdir()
    spec = planted_spec(seeds=[0], tracking=service, output=str(folder / "out"))
    storage = grown_storage(spec, open_storage(spec.storage_url, create=True), trials=2, epochs=9)
    check_tracking(spec)
    for cell in cells_of(spec):
        assert send_cell(storage, spec, cell) == 2
    (folder / "report").mkdir()
    (folder / "report" / "report.html").write_text("<p>")
    assert send_report(spec, folder / "report")
    (folder / "report" / "report.html").write_text("<p>new")
    assert send_report(spec, folder / "report")
    return spec


# The services' own warnings (deprecations inside them, files that the interpreter closes) are not ours.
service = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


class TestMlflow:
    pytestmark = service

    def test_holds_every_trial_and_the_report_once(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        mlflow = pytest.importorskip("mlflow")
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        monkeypatch.chdir(tmp_path)
        spec = run(tmp_path, "mlflow")
        client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/out/mlflow.db")
        (experiment,) = [e for e in client.search_experiments() if e.name == "planted"]
        runs = {r.info.run_name: r for r in client.search_runs([experiment.experiment_id])}
        assert len(runs) == len(client.search_runs([experiment.experiment_id])) == 5
        storage = open_storage(spec.storage_url, create=False)
        for cell in cells_of(spec):
            for trial in optuna.load_study(study_name=cell.name, storage=storage).trials:
                row, one = tracked(trial, cell), runs[f"{cell.label}/{trial.number}"]
                assert one.info.status == "FINISHED"
                assert one.info.start_time == int(trial.datetime_start.timestamp() * 1000)
                assert row.tags.items() <= one.data.tags.items()
                assert {k: float(v) for k, v in one.data.params.items()} == row.params
                assert row.costs.items() <= one.data.metrics.items()
                history = client.get_metric_history(one.info.run_id, "val_metric")
                assert [m.value for m in history] == [v["val_metric"] for _, v in row.curve]
                assert [m.step for m in history] == list(range(1, len(row.curve) + 1))
                assert [m.timestamp for m in history] == [int(wall * 1000) for wall, _ in row.curve]
        (file,) = client.list_artifacts(runs["report"].info.run_id, "report")
        assert file.path == "report/report.html"
        assert [p.read_text() for p in tmp_path.glob("out/mlflow-artifacts/**/report.html")] == ["<p>new"]
        assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "report"]

    def test_a_curve_longer_than_a_request_takes_is_whole(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        mlflow = pytest.importorskip("mlflow")
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        storage, cell = storage_of(planted_trial(0, [k / 400 for k in range(400)]))
        spec = tracked_spec().model_copy(update={"output": str(tmp_path)})
        assert send_cell(storage, spec, cell) == 1
        client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
        (one,) = client.search_runs([client.get_experiment_by_name("planted").experiment_id])
        history = client.get_metric_history(one.info.run_id, "val_metric")
        assert [m.value for m in history] == [k / 400 for k in range(400)]

    def test_a_run_that_breaks_off_is_marked_and_the_callers_own_is_left_alone(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        mlflow = pytest.importorskip("mlflow")
        own = f"sqlite:///{tmp_path}/own.db"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", own)
        storage, cell = storage_of(planted_trial(0, [0.1]))
        spec = tracked_spec().model_copy(update={"output": str(tmp_path)})
        with mlflow.start_run() as callers:
            with monkeypatch.context() as patch:
                patch.setattr(tracking, "_BATCH", 0)  # no such step: an error after the run was made
                assert send_cell(storage, spec, cell) == 0
            tracking._paused_until.clear()
            assert send_cell(storage, spec, cell) == 1
            assert mlflow.active_run().info.run_id == callers.info.run_id
            assert mlflow.get_tracking_uri() == own
        client = mlflow.MlflowClient(own)
        runs = client.search_runs([client.get_experiment_by_name("planted").experiment_id])
        assert sorted(r.info.status for r in runs) == ["FAILED", "FINISHED"]

    def test_a_server_that_is_not_there_costs_seconds_and_one_warning(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        pytest.importorskip("mlflow")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free.getsockname()[1]}")
        for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
            monkeypatch.delenv(name, raising=False)
        storage, cell = storage_of(planted_trial(0, [0.1]))
        start = time.monotonic()
        assert [send_cell(storage, tracked_spec(), cell) for _ in range(2)] == [0, 0]
        assert time.monotonic() - start < 60
        assert [r.name for r in caplog.records if r.levelno >= logging.WARNING] == ["optuna_ohgw.tracking"]


class TestWandb:
    pytestmark = service

    def test_keeps_every_trial_offline(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        wandb = pytest.importorskip("wandb")
        monkeypatch.setenv("WANDB_MODE", "offline")
        monkeypatch.chdir(tmp_path)
        spec = run(tmp_path, "wandb")
        wandb.teardown()  # as a process does at its end: the service writes late where a machine is busy
        records = [p.read_bytes() for p in (spec.folder / "wandb").glob("offline-run-*/*.wandb")]
        labels = [f"{cell.label}/{k}".encode() for cell in cells_of(spec) for k in range(2)]
        for label in labels:
            (one,) = [r for r in records if label in r]
            assert all(key in one for key in (b"trained_lr", b"val_metric", b"peak_ram_bytes"))
        assert len(records) == len(labels) + 2  # the report each time; the same run once uploaded
        assert sum(b"report.html" in r for r in records) == 2
        assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "report"]

    def test_without_a_key_it_is_told_before_it_is_asked_for(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.importorskip("wandb")
        for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("NETRC", str(tmp_path / "none"))
        check = (
            "from planted import planted_spec; from optuna_ohgw.tracking import check_tracking;"
            "check_tracking(planted_spec(tracking='wandb'))"
        )
        where = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "HOME": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", check],
            cwd=tmp_path,
            env=where,
            capture_output=True,
            text=True,
            check=False,
        )
        line = "tracking: wandb has no API key; run 'wandb login', or set WANDB_MODE=offline"
        assert done.stderr.splitlines()[-1] == f"optuna_ohgw.errors.UserError: {line}"
