from __future__ import annotations

import math
from typing import Any

import pandas as pd
import pytest
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState
from planted import START, grown_storage, plant_cell, planted_spec, planted_storage, planted_trial

from optuna_ohgw.cells import Cell
from optuna_ohgw.metrics import cell_metrics, curves, pilot_target, times
from optuna_ohgw.records import Records, read_records
from optuna_ohgw.spec import StudySpec

SPEC = planted_spec(seeds=(0, 1), pilot_seeds=(7,))
A, B = SPEC.variations


def stored(cells: dict[tuple[str, int], list[dict[str, Any]]], spec: StudySpec = SPEC) -> Records:
    """Return the records of cells given as trials; of each the keywords of ``planted_trial``."""
    storage = InMemoryStorage()
    for (variation, seed), trials in cells.items():
        cell = Cell(spec.name, variation, seed, pilot=seed in spec.pilot_seeds)
        study_id = plant_cell(storage, cell, spec)
        for k, keywords in enumerate(trials):
            storage.create_new_trial(study_id, template_trial=planted_trial(k, **keywords))
    return read_records(storage, spec)


# Two workers, epochs of 1.1 s (1 training, 0.1 evaluation) and a warm start of 0.5 s. Wall seconds
# from the start, with what each epoch cost in mbu:
#   1.6 trial 0  15 (5 of them its warm start)  accuracy 0.3   cell 15
#   2.1 trial 1  10                             accuracy 0.5   cell 25
#   2.7 trial 0  10                             not finite     cell 35
#   3.2 trial 1  10                             accuracy 0.4   cell 45
#   4.8 trial 2  15                             accuracy 0.7   cell 60
INTERLEAVED = [
    {"accuracy": [0.3, None], "warm": True},
    {"accuracy": [0.5, 0.4], "start": START + 1.0},
    {"accuracy": [0.7], "start": START + 3.2, "warm": True},
]


class TestCurves:
    def test_epochs_add_up_in_order_of_wall_time(self) -> None:
        table = curves(stored({(B, 0): INTERLEAVED}))
        assert table["cell_mbu"].tolist() == [15, 25, 35, 45, 60]
        assert table["best"].tolist() == [0.3, 0.5, 0.5, 0.5, 0.7]
        assert table["cell_device_s"].tolist() == pytest.approx([1.6, 2.7, 3.8, 4.9, 6.5])
        assert table["cell_wall_s"].tolist() == pytest.approx([1.6, 2.1, 2.7, 3.2, 4.8])

    def test_the_pause_between_two_runs_is_no_wall_time(self) -> None:
        trials = [{"accuracy": [0.1]}, {"accuracy": [0.2, 0.3], "start": START + 1000}]
        assert curves(stored({(A, 0): trials}))["cell_wall_s"].tolist() == pytest.approx([1.1, 2.2, 3.3])

    def test_a_trial_that_is_trained_again_counts_for_nothing(self) -> None:
        lost = {"accuracy": [0.9], "state": TrialState.FAIL, "reason": "interrupted"}
        again = {"accuracy": [0.9], "start": START + 50}
        table = curves(stored({(A, 0): [lost, again]}))
        assert table["cell_mbu"].tolist() == [10]
        assert table["cell_wall_s"].tolist() == pytest.approx([1.1])

    def test_a_running_trial_counts_with_what_it_has_stored(self) -> None:
        trials = [{"accuracy": [0.1]}, {"accuracy": [0.2, 0.3], "start": START + 1.1}]
        trials[1]["state"] = TrialState.RUNNING
        assert curves(stored({(A, 0): trials}))["cell_wall_s"].tolist() == pytest.approx([1.1, 2.2, 3.3])

    def test_nothing_before_the_first_accuracy(self) -> None:
        table = curves(stored({(A, 0): [{"accuracy": [None]}, {"accuracy": [0.2], "start": START + 5}]}))
        assert table["best"].fillna(-1).tolist() == [-1, 0.2]


class TestTimes:
    @pytest.mark.parametrize(
        ("target", "expected"),
        [
            (0.2, (15, 1.6, 1.6)),
            (0.3, (15, 1.6, 1.6)),
            (0.31, (25, 2.7, 2.1)),
            (0.51, (60, 6.5, 4.8)),
            (0.71, (math.inf,) * 3),
        ],
    )
    def test_the_budget_until_a_target_is_first_reached(
        self, target: float, expected: tuple[float, ...]
    ) -> None:
        records = stored({(B, 0): INTERLEAVED})
        (row,) = times(curves(records), records, [target]).to_dict("records")
        assert (row["mbu"], row["device_s"], row["wall_s"]) == pytest.approx(expected)
        assert row["reached"] == (target <= 0.7)
        budget = (row["budget_mbu"], row["budget_device_s"], row["budget_wall_s"])
        assert budget == pytest.approx((60, 6.5, 4.8))

    def test_a_cell_without_an_epoch_is_censored_at_nothing_and_a_missing_one_is_missing(self) -> None:
        records = stored({(A, 0): [{"accuracy": [0.9]}], (B, 0): []})
        table = times(curves(records), records, [0.5, 0.95])
        assert table[["variation", "target", "reached", "budget_mbu"]].to_records(index=False).tolist() == [
            (A, 0.5, True, 10),
            (B, 0.5, False, 0),
            (A, 0.95, False, 10),
            (B, 0.95, False, 0),
        ]

    def test_a_target_named_twice_counts_once(self) -> None:
        records = stored({(A, 0): [{"accuracy": [0.9]}]})
        assert len(times(curves(records), records, [0.5, 0.9, 0.5])) == 2

    def test_pilots_are_left_out(self) -> None:
        records = stored({(A, 7): [{"accuracy": [0.9]}]})
        assert times(curves(records), records, [0.5]).empty

    def test_planted_times_come_back(self) -> None:
        given = {
            (A, 0): (700.0, 2000.0),
            (B, 0): (512.5, 2000.0),
            (A, 1): (9e9, 1500.0),
            (B, 1): (10.0, 10.0),
        }
        records = read_records(planted_storage(given, SPEC), SPEC)
        table = times(curves(records), records, [0.9]).set_index(["variation", "seed"])
        for cell, (reached_at, budget) in given.items():
            assert table.loc[cell, "mbu"] == (reached_at if reached_at <= budget else math.inf)
            assert table.loc[cell, "budget_mbu"] == budget


class TestPilotTarget:
    @pytest.mark.parametrize(
        ("best", "expected"),
        [
            ((0.8,), 0.8),
            ((0.8, 0.7), 0.7),
            ((0.9, 0.6, 0.8, 0.7), 0.6),  # 90% of 4 are 3.6: all 4 must reach it
            ((0.91, 0.92, 0.93, 0.94, 0.95, 0.96, 0.97, 0.98, 0.99, 0.5), 0.91),  # 9 of 10
            ((0.5, 0.6) * 10, 0.5),  # 18 of 20
            ((0.5, 0.4) + (0.9,) * 18, 0.9),
            ((0.9, None), None),
            ((0.9,) * 9 + (None,), 0.9),
        ],
    )
    def test_is_the_highest_that_nine_in_ten_seeds_reach(
        self, best: tuple[float | None, ...], expected: float | None
    ) -> None:
        assert pilot_target(*self.pilots(best)) == expected

    def pilots(
        self, best: tuple[float | None, ...], *, finished: bool = True
    ) -> tuple[pd.DataFrame, Records]:
        seeds = tuple(range(100, 100 + len(best)))
        spec = planted_spec(seeds=(0,), pilot_seeds=seeds)
        cells = {
            (A, s): [{"accuracy": [0.1 if b else None, b, None]}] for s, b in zip(seeds, best, strict=True)
        }
        records = stored({**cells, (A, 0): [{"accuracy": [0.999]}]}, spec)
        records.cells["finished"] = finished
        return curves(records), records

    def test_share_is_a_setting(self) -> None:
        assert pilot_target(*self.pilots((0.9, 0.6, 0.8, 0.7)), share=0.5) == 0.8

    def test_there_is_none_while_the_pilots_run_so_that_it_cannot_move(self) -> None:
        assert pilot_target(*self.pilots((0.9, 0.6), finished=False)) is None

    def test_without_pilots_there_is_none(self) -> None:
        spec = planted_spec(seeds=(0,))
        records = stored({(A, 0): [{"accuracy": [0.9]}]}, spec)
        assert pilot_target(curves(records), records) is None


class TestCellMetrics:
    def test_a_table_worked_out_by_hand(self) -> None:
        baseline = [{"accuracy": [0.2, 0.6]}, {"accuracy": [0.4], "start": START + 2.2}]
        records = stored({(A, 0): baseline, (B, 0): INTERLEAVED})
        table = cell_metrics(curves(records), records).set_index("variation")
        a, b = table.loc[A], table.loc[B]
        assert (a["spent_mbu"], b["spent_mbu"]) == (30, 60)
        assert (a["best_val"], b["best_val"], b["epochs"], b["trials"]) == (0.6, 0.7, 5, 3)
        # Up to the smaller budget, 30 mbu: 0.2 from 10 to 20, 0.6 from 20 to 30.
        assert a["auc_mbu"] == pytest.approx((0 * 10 + 0.2 * 10 + 0.6 * 10) / 30)
        # 0.3 from 15 to 25, 0.5 from 25 to 30.
        assert b["auc_mbu"] == pytest.approx((0 * 15 + 0.3 * 10 + 0.5 * 5) / 30)
        assert (a["overhead_mbu"], a["overhead_s"], a["overhead_flops"]) == (0, 0, 0)
        assert b["overhead_mbu"] == pytest.approx(10 / 50)
        assert b["overhead_s"] == pytest.approx(1.0 / 5.5)
        # Two warm starts of 4,000; 5 epochs of 10 mini-batches of 1,000.
        assert b["overhead_flops"] == pytest.approx(8000 / 50000)
        assert (a["mbu_per_epoch"], b["mbu_per_epoch"]) == (10, 12)
        assert b["device_s_per_epoch"] == pytest.approx(6.5 / 5)
        assert b["flops_per_epoch"] == pytest.approx(58000 / 5)
        assert b["peak_ram"] - a["peak_ram"] == 50_000_000
        assert math.isnan(b["peak_vram"])

    def test_interrupted_trials_cost_nothing(self) -> None:
        lost = {"accuracy": [0.1], "warm": True, "state": TrialState.FAIL, "reason": "interrupted"}
        with_it = stored({(B, 0): [*INTERLEAVED, lost]})
        without = stored({(B, 0): INTERLEAVED})
        tables = [cell_metrics(curves(r), r) for r in (with_it, without)]
        pd.testing.assert_frame_equal(*tables)

    def test_of_a_cell_without_an_accuracy(self) -> None:
        records = stored({(A, 0): [{"accuracy": [None]}], (B, 0): [{"accuracy": [0.5], "warm": True}]})
        table = cell_metrics(curves(records), records).set_index("variation")
        assert math.isnan(table.loc[A, "best_val"])
        assert table.loc[A, "auc_mbu"] == 0.0

    def test_of_a_whole_study_agrees_with_its_trials(self) -> None:
        spec = planted_spec(seeds=range(3), pilot_seeds=(100,))
        records = read_records(grown_storage(spec, workers=3), spec)
        table = cell_metrics(curves(records), records)
        assert len(table) == 6
        trials = records.trials[records.trials["variation"] != "pilot"]
        whole = trials.groupby(["variation", "seed"])[["train_s", "warm_s", "eval_s"]].sum().sum(axis=1)
        found = table.set_index(["variation", "seed"])["spent_device_s"]
        pd.testing.assert_series_equal(found, whole, check_names=False)
        # Three workers: the wall time is a third of the device's and a little more.
        assert (table["spent_wall_s"] > table["spent_device_s"] / 3.01).all()
        assert (table["spent_wall_s"] < table["spent_device_s"] / 2).all()

    def test_of_nothing_is_empty(self) -> None:
        records = stored({})
        table = curves(records)
        assert cell_metrics(table, records).empty
        assert times(table, records, [0.5]).empty
        assert pilot_target(table, records) is None
