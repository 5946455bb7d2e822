from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import pytest
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.trial import TrialState, create_trial

from optuna_ohgw.cells import Cell
from optuna_ohgw.metrics import summary
from optuna_ohgw.records import EPOCH_COLUMNS, epochs_table, finals_table, trials_table, warm_mbu

CELLS = [
    Cell("s", "asha-baseline", 7, pilot=True),
    Cell("s", "asha-baseline", 0),
    Cell("s", "asha-ohgw-1step", 0),
    Cell("s", "asha-ohgw-1step", 1),  # not in storage
]
KEYS = ["variation", "seed", "trial", "config_index", "state", "epoch"]


def curve(*accuracies: float | None, warm: float = 0.0) -> dict[str, list[float | None]]:
    n = len(accuracies)
    return {
        "mbu": [10.0 * e + warm for e in range(1, n + 1)],
        "wall": [100.0 + e for e in range(n)],
        "train_s": [2.0] * n,
        "warm_s": [0.5 if warm and not e else 0.0 for e in range(n)],
        "eval_s": [1.0] * n,
        "train_loss": [None if a is None else 1.0 for a in accuracies],
        "val_loss": [None if a is None else 1.5 for a in accuracies],
        "val_accuracy": list(accuracies),
    }


def plant(study: optuna.Study, state: TrialState, **attrs: Any) -> None:
    value = 0.5 if state == TrialState.COMPLETE else None
    study.add_trial(create_trial(state=state, value=value, user_attrs=attrs))


@pytest.fixture
def storage() -> BaseStorage:
    storage = InMemoryStorage()
    pilot, baseline, warm = (
        optuna.create_study(study_name=cell.name, storage=storage, direction="maximize") for cell in CELLS[:3]
    )
    optuna.create_study(study_name="somebody's", storage=storage)
    plant(pilot, TrialState.COMPLETE, curve=curve(0.1, 0.2))
    plant(baseline, TrialState.PRUNED, curve=curve(None), reason="diverged in epoch 1")
    plant(baseline, TrialState.FAIL, curve=curve(0.3, 0.4), reason="interrupted")
    plant(baseline, TrialState.COMPLETE, curve=curve(0.3, 0.4, 0.5), retry_of=1, config_index=1)
    plant(baseline, TrialState.RUNNING, curve=curve(0.9))
    plant(baseline, TrialState.FAIL, reason="ValueError: no")
    plant(baseline, TrialState.WAITING, config_index=9, retry_of=3)
    record = {"cost_mbu": 4.0, "seconds": 0.25, "reason": None}
    moved_nothing = {"cost_mbu": 2.0, "seconds": 0.25, "reason": "the loss is nan"}
    plant(warm, TrialState.PRUNED, curve=curve(0.6, warm=6.0), ohgw=[record, moved_nothing])
    warm.set_user_attr("final", {"trial": 0, "val_accuracy": 0.6, "test_accuracy": 0.55, "test_loss": 1.0})
    return storage


def test_there_is_one_row_an_epoch_of_every_ended_trial(storage: BaseStorage) -> None:
    table = epochs_table(storage, CELLS)
    assert list(table.columns) == [*KEYS, *EPOCH_COLUMNS, "warm_mbu"]
    assert table[KEYS].to_records(index=False).tolist() == [
        ("pilot", 7, 0, 0, "COMPLETE", 1),
        ("pilot", 7, 0, 0, "COMPLETE", 2),
        ("asha-baseline", 0, 0, 0, "PRUNED", 1),
        ("asha-baseline", 0, 2, 1, "COMPLETE", 1),
        ("asha-baseline", 0, 2, 1, "COMPLETE", 2),
        ("asha-baseline", 0, 2, 1, "COMPLETE", 3),
        ("asha-ohgw-1step", 0, 0, 0, "PRUNED", 1),
    ]
    assert table["mbu"].tolist() == [10, 20, 10, 10, 20, 30, 16]
    assert table["warm_mbu"].tolist() == [0, 0, 0, 0, 0, 0, 6]
    assert table["warm_s"].tolist() == [0, 0, 0, 0, 0, 0, 0.5]


def test_what_is_not_finite_stays_missing(storage: BaseStorage) -> None:
    table = epochs_table(storage, CELLS)
    diverged = table[(table["variation"] == "asha-baseline") & (table["trial"] == 0)]
    assert diverged[["train_loss", "val_loss", "val_accuracy"]].isna().all(axis=None)
    assert table["val_accuracy"].dtype == float
    assert table["val_accuracy"].isna().sum() == 1


def test_interrupted_and_running_trials_are_left_out_of_the_epochs(storage: BaseStorage) -> None:
    table = epochs_table(storage, CELLS)
    assert not table["state"].isin(["FAIL", "RUNNING", "WAITING"]).any()
    assert not ((table["variation"] == "asha-baseline") & table["trial"].isin([1, 3])).any()


def test_a_failed_trial_keeps_what_it_measured(storage: BaseStorage) -> None:
    study = optuna.load_study(study_name=CELLS[2].name, storage=storage)
    plant(study, TrialState.FAIL, curve=curve(0.1), reason="RuntimeError: out of memory")
    table = epochs_table(storage, CELLS)
    assert table["state"].tolist().count("FAIL") == 1


def test_there_is_one_row_a_trial_whatever_its_state(storage: BaseStorage) -> None:
    table = trials_table(storage, CELLS)
    own = table[table["variation"] == "asha-baseline"]
    assert own["state"].tolist() == ["PRUNED", "FAIL", "COMPLETE", "RUNNING", "FAIL", "WAITING"]
    assert own["config_index"].tolist() == [0, 1, 1, 2, 3, 9]
    assert own["reason"].tolist()[:2] == ["diverged in epoch 1", "interrupted"]
    warm = table[table["variation"] == "asha-ohgw-1step"].iloc[0]
    assert (warm["warm_mbu"], warm["warm_s"], warm["no_step"]) == (6.0, 0.5, "the loss is nan")
    assert own["no_step"].isna().all()


def test_finals_are_those_of_the_finished_cells(storage: BaseStorage) -> None:
    (row,) = finals_table(storage, CELLS).to_dict("records")
    assert (row["variation"], row["seed"]) == ("asha-ohgw-1step", 0)
    assert (row["val_accuracy"], row["test_accuracy"]) == (0.6, 0.55)


def test_an_empty_storage_gives_empty_tables_with_their_columns(storage: BaseStorage) -> None:
    empty = InMemoryStorage()
    for table in (epochs_table, trials_table, finals_table):
        nothing, something = table(empty, CELLS), table(storage, CELLS)
        assert nothing.empty
        assert set(nothing.columns) <= set(something.columns)
    assert list(epochs_table(empty, CELLS).columns) == list(epochs_table(storage, CELLS).columns)
    assert list(trials_table(empty, CELLS).columns) == list(trials_table(storage, CELLS).columns)
    assert {"variation", "seed", "val_accuracy", "test_accuracy"} <= set(finals_table(empty, CELLS).columns)
    tables = [table(empty, CELLS) for table in (epochs_table, trials_table, finals_table)]
    assert summary(*tables, [0.5]).empty


def test_the_tables_fit_the_summary(storage: BaseStorage) -> None:
    tables = [table(storage, CELLS) for table in (epochs_table, trials_table, finals_table)]
    table = summary(*tables, [0.5]).set_index("variation")
    assert table.loc["asha-baseline", "T@0.5"] == 10 + 30  # the diverged epoch was paid for
    assert table.loc["asha-ohgw-1step", "T@0.5"] == 16
    assert table.loc["asha-ohgw-1step", "overhead"] == pytest.approx(6 / 10)
    assert table.loc["asha-baseline", "failed"] == 1
    assert table.loc["asha-ohgw-1step", "test"] == 0.55


def test_warm_starts_of_a_trial_add_up() -> None:
    trial = create_trial(value=0.5, user_attrs={"ohgw": [{"cost_mbu": 1.5}, {"cost_mbu": 2.0}]})
    assert warm_mbu(trial) == 3.5
    assert warm_mbu(create_trial(value=0.5)) == 0.0


def test_tables_survive_a_round_trip_as_csv(storage: BaseStorage, tmp_path: Path) -> None:
    table = epochs_table(storage, CELLS)
    table.to_csv(tmp_path / "t.csv", index=False)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "t.csv"), table)
