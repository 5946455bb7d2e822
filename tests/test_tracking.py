"""What is sent of a study, once each; the services themselves where they are installed."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import optuna
import pytest
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.trial import FrozenTrial, TrialState
from planted import RANGES, START, grown_storage, plant_cell, planted_spec, planted_trial

from optuna_ohgw import tracking
from optuna_ohgw.cells import Cell, cells_of, open_storage
from optuna_ohgw.errors import UserError
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
        assert (first["mbu"], first["val_accuracy"], first["warm_s"]) == (15.0, 0.3, 0.5)
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
        self, sent: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
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
        (warning,) = [r.getMessage() for r in caplog.records if r.name == "optuna_ohgw.tracking"]
        assert warning == (
            "tracking: mlflow could not be reached (refused); run the same command again to send the rest"
        )
        monkeypatch.setattr(tracking, "_to_mlflow", working)
        assert send_cell(storage, tracked_spec(), cell) == 2
        assert len(set(sent)) == len(sent) == 3

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


def run(tmp_path: Path, service: str) -> StudySpec:
    folder = tmp_path / "out"
    folder.mkdir()
    spec = planted_spec(seeds=[0], tracking=service, output=str(folder))
    storage = grown_storage(spec, open_storage(spec.storage_url, create=True), trials=2, epochs=9)
    for cell in cells_of(spec):
        assert send_cell(storage, spec, cell) == 2
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.html").write_text("<p>")
    assert send_report(spec, tmp_path / "report")
    return spec


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_mlflow_holds_every_trial_and_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    run(tmp_path, "mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/out/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "planted"]
    runs = {r.info.run_name: r for r in client.search_runs([experiment.experiment_id])}
    assert len(runs) == 5
    one = runs["asha-ohgw-1step/seed-0000/1"]
    assert "trained_lr" in one.data.params
    assert one.data.tags["variation"] == "asha-ohgw-1step"
    history = client.get_metric_history(one.info.run_id, "val_accuracy")
    assert [m.step for m in history] == list(range(1, len(history) + 1))
    assert [f.path for f in client.list_artifacts(runs["report"].info.run_id, "report")] == [
        "report/report.html"
    ]
    assert not (tmp_path / "mlruns").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_wandb_keeps_every_trial_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    spec = run(tmp_path, "wandb")
    runs = list((spec.folder / "wandb").glob("offline-run-*"))
    assert len(runs) == 5
    assert all(list(r.glob("*.wandb")) for r in runs)
    assert json.dumps([r.name for r in tmp_path.iterdir()]).count("wandb") == 0
