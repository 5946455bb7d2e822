from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import pytest
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.trial import TrialState, create_trial
from planted import planted_spec

from optuna_ohgw.records import STEP_COLUMNS, read_records

SPEC = planted_spec(("asha-baseline", "asha-ohgw-1step"), (0, 1), pilot_seeds=(7,), name="s")
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
        "val_metric": list(accuracies),
    }


def plant(study: optuna.Study, state: TrialState, **attrs: Any) -> None:
    value = 0.5 if state == TrialState.COMPLETE else None
    study.add_trial(create_trial(state=state, value=value, user_attrs=attrs))


RECORD = {
    "suggested": {"lr": 0.1, "momentum": 0.9, "magnitude": 9.9},
    "trained": {"lr": 0.2, "momentum": 0.9, "magnitude": 10.0},
    "gradient": {"lr": -3.0, "momentum": 4.0, "magnitude": 0.0},
    "step": {"lr": 0.30103, "momentum": 0.0, "magnitude": 0.1},
    "methods": {"lr": "lean", "momentum": "lean", "magnitude": "finite-difference"},
    "at_bound": ["magnitude"],
    "rule": "raw",
    "cost_mbu": 4.0,
    "seconds": 0.25,
    "reason": None,
}
MOVED_NOTHING = {
    "rule": "raw",
    "cost_mbu": 2.0,
    "seconds": 0.25,
    "reason": "the loss is nan",
    "methods": None,
}


@pytest.fixture
def storage() -> BaseStorage:
    storage = InMemoryStorage()
    names = ("s/pilot/seed-0007", "s/asha-baseline/seed-0000", "s/asha-ohgw-1step/seed-0000")
    pilot, baseline, warm = (
        optuna.create_study(study_name=name, storage=storage, direction="maximize") for name in names
    )
    optuna.create_study(study_name="somebody's", storage=storage)
    optuna.create_study(study_name="s/summary", storage=storage)
    plant(pilot, TrialState.COMPLETE, curve=curve(0.1, 0.2))
    plant(baseline, TrialState.PRUNED, curve=curve(None), reason="diverged in epoch 1")
    plant(baseline, TrialState.FAIL, curve=curve(0.3, 0.4), reason="interrupted")
    plant(baseline, TrialState.COMPLETE, curve=curve(0.3, 0.4, 0.5), retry_of=1, config_index=1)
    plant(baseline, TrialState.RUNNING, curve=curve(0.45))
    plant(baseline, TrialState.FAIL, reason="ValueError: no")
    plant(baseline, TrialState.WAITING, config_index=9, retry_of=3)
    plant(
        warm,
        TrialState.PRUNED,
        curve=curve(0.6, 0.5, warm=6.0),
        ohgw=[RECORD, MOVED_NOTHING],
        flops={"batch": 100, "warm": 400},
        memory={"ram": 7, "vram": None, "nvml": None},
        worker={"host": "h", "pid": 3, "device": "cpu", "slurm_job": "812"},
        cgroup={"memory": 5, "memory_peak": 9, "cpu_s": 1.5},
        batches_per_epoch=10,
    )
    warm.set_user_attr("final", {"trial": 0, "val_metric": 0.6, "test_metric": 0.55, "test_loss": 1.0})
    return storage


def test_there_is_one_row_an_epoch(storage: BaseStorage) -> None:
    table = read_records(storage, SPEC).steps
    assert list(table.columns) == STEP_COLUMNS
    assert table[[*KEYS, "counted"]].to_records(index=False).tolist() == [
        ("pilot", 7, 0, 0, "COMPLETE", 1, True),
        ("pilot", 7, 0, 0, "COMPLETE", 2, True),
        ("asha-baseline", 0, 0, 0, "PRUNED", 1, True),
        ("asha-baseline", 0, 1, 1, "FAIL", 1, False),  # interrupted, trained again as trial 2
        ("asha-baseline", 0, 1, 1, "FAIL", 2, False),
        ("asha-baseline", 0, 2, 1, "COMPLETE", 1, True),
        ("asha-baseline", 0, 2, 1, "COMPLETE", 2, True),
        ("asha-baseline", 0, 2, 1, "COMPLETE", 3, True),
        ("asha-baseline", 0, 3, 2, "RUNNING", 1, True),
        ("asha-ohgw-1step", 0, 0, 0, "PRUNED", 1, True),
        ("asha-ohgw-1step", 0, 0, 0, "PRUNED", 2, True),
    ]
    assert table["mbu"].tolist() == [10, 20, 10, 10, 20, 10, 20, 30, 10, 16, 26]
    assert table["warm_s"].tolist() == [0] * 9 + [0.5, 0]


def test_what_is_not_finite_stays_missing(storage: BaseStorage) -> None:
    table = read_records(storage, SPEC).steps
    diverged = table[(table["variation"] == "asha-baseline") & (table["trial"] == 0)]
    assert diverged[["train_loss", "val_loss", "val_metric"]].isna().all(axis=None)
    assert table["val_metric"].dtype == float
    assert table["val_metric"].isna().sum() == 1


def test_there_is_one_row_a_trial_whatever_its_state(storage: BaseStorage) -> None:
    table = read_records(storage, SPEC).trials
    own = table[table["variation"] == "asha-baseline"]
    assert own["state"].tolist() == ["PRUNED", "FAIL", "COMPLETE", "RUNNING", "FAIL", "WAITING"]
    assert own["counted"].tolist() == [True, False, True, True, True, False]
    assert own["config_index"].tolist() == [0, 1, 1, 2, 3, 9]
    assert own["reason"].tolist()[:2] == ["diverged in epoch 1", "interrupted"]
    assert own["epochs"].tolist() == [1, 2, 3, 1, 0, 0]
    assert own["best"].fillna(-1).tolist() == [-1, 0.4, 0.5, 0.45, -1, -1]
    assert own["no_step"].isna().all()


def test_a_warm_started_trial_tells_what_moved_and_what_it_cost(storage: BaseStorage) -> None:
    table = read_records(storage, SPEC).trials
    warm = table[table["variation"] == "asha-ohgw-1step"].iloc[0]
    assert (warm["warm_mbu"], warm["warm_s"], warm["no_step"]) == (6.0, 0.5, "the loss is nan")
    assert (warm["train_s"], warm["eval_s"], warm["warm_starts"]) == (4.0, 2.0, 2)
    assert (warm["clipped"], warm["coarse"], warm["gradient_norm"]) == ("magnitude", "magnitude", 5.0)
    assert (warm["suggested_lr"], warm["trained_lr"], warm["gradient_lr"]) == (0.1, 0.2, -3.0)
    assert warm["step_lr"] == pytest.approx(math.log10(2), abs=1e-6)
    assert (warm["flops_batch"], warm["flops_warm"], warm["ram_bytes"]) == (100, 400, 7)
    assert math.isnan(warm["vram_bytes"])
    assert (warm["worker"], warm["best"], warm["last"]) == ("h:3", 0.6, 0.5)
    assert (warm["slurm_job"], warm["cgroup_peak_bytes"], warm["cgroup_cpu_s"]) == ("812", 9, 1.5)


def test_there_is_one_row_a_cell_that_the_spec_names(storage: BaseStorage) -> None:
    table = read_records(storage, SPEC).cells.set_index(["variation", "seed"])
    assert table.index.tolist() == [
        ("pilot", 7),
        ("asha-baseline", 0),
        ("asha-ohgw-1step", 0),
        ("asha-baseline", 1),
        ("asha-ohgw-1step", 1),
    ]
    assert table["exists"].tolist() == [True, True, True, False, False]
    counts = table.loc[("asha-baseline", 0), ["ended", "running", "pruned", "failed"]]
    assert counts.tolist() == [3, 1, 1, 1]
    assert table.loc[("asha-baseline", 0), "reason"] == "ValueError: no"
    final = table.loc[("asha-ohgw-1step", 0)]
    assert (final["finished"], final["final_val"], final["final_test"]) == (True, 0.6, 0.55)
    assert not table["finished"].iloc[:2].any()


def test_an_empty_storage_gives_empty_tables_with_their_columns(storage: BaseStorage) -> None:
    nothing, something = read_records(InMemoryStorage(), SPEC), read_records(storage, SPEC)
    assert nothing.steps.empty
    assert nothing.trials.empty
    assert not nothing.cells["exists"].any()
    for table in ("steps", "trials", "cells"):
        assert list(getattr(nothing, table).columns) == list(getattr(something, table).columns)
    assert nothing.tidy().empty


def test_the_whole_record_has_a_row_an_epoch_and_one_for_a_trial_without_any(storage: BaseStorage) -> None:
    records = read_records(storage, SPEC)
    tidy = records.tidy()
    assert len(tidy) == len(records.steps) + 2  # the failed and the waiting trial
    assert set(STEP_COLUMNS) | set(records.trials.columns) - {"train_s", "warm_s", "eval_s"} <= set(
        tidy.columns
    )
    assert tidy.loc[tidy["state"] == "WAITING", "mbu"].isna().all()
    one = tidy[(tidy["variation"] == "asha-ohgw-1step")]
    assert one["trial_train_s"].tolist() == [4.0, 4.0]
    assert one["train_s"].tolist() == [2.0, 2.0]


def test_every_cell_is_read_once(storage: BaseStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    read, real = [], storage.get_all_trials

    def counting(study_id: int, deepcopy: bool = True, states: Any = None) -> Any:
        read.append((study_id, deepcopy))
        return real(study_id, deepcopy=deepcopy, states=states)

    monkeypatch.setattr(storage, "get_all_trials", counting)
    read_records(storage, SPEC)
    assert len(read) == len({study_id for study_id, _ in read}) == 3
    assert not any(deepcopy for _, deepcopy in read)


def test_the_record_survives_a_round_trip_as_parquet(storage: BaseStorage, tmp_path: Path) -> None:
    tidy = read_records(storage, SPEC).tidy()
    tidy.to_parquet(tmp_path / "t.parquet", index=False)
    again = pd.read_parquet(tmp_path / "t.parquet")
    pd.testing.assert_frame_equal(again, tidy, check_dtype=False)
