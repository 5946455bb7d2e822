from __future__ import annotations

import math

import pandas as pd
import pytest

from optuna_ohgw.metrics import cell_curve, pilot_target, summary, time_to_target

NAN = math.nan


def rows(
    trial: int, *epochs: tuple[float, float, float], seed: int = 0, variation: str = "a"
) -> pd.DataFrame:
    """Return a trial's epochs of (wall, cumulative mbu, validation accuracy)."""
    table = pd.DataFrame(epochs, columns=["wall", "mbu", "val_accuracy"])
    table["trial"], table["seed"], table["variation"] = trial, seed, variation
    table["epoch"] = range(1, len(table) + 1)
    table["warm_mbu"] = table["mbu"].iloc[0] - 10.0  # every epoch is of ten mini-batches
    table["train_s"], table["warm_s"], table["eval_s"] = 3.0, 0.0, 1.0
    return table


def joined(*tables: pd.DataFrame) -> pd.DataFrame:
    return pd.concat(tables, ignore_index=True)


# Two workers. In order of wall time, with what each epoch cost:
#   1.0 trial 0  15 (5 of them its warm start)  accuracy 0.3   cell 15
#   1.5 trial 1  10                             accuracy 0.5   cell 25
#   2.0 trial 0  10                             not finite     cell 35
#   2.5 trial 1  10                             accuracy 0.4   cell 45
#   3.0 trial 2  12 (2 of them)                 accuracy 0.7   cell 57
INTERLEAVED = joined(
    rows(0, (1.0, 15, 0.3), (2.0, 25, NAN)),
    rows(1, (1.5, 10, 0.5), (2.5, 20, 0.4)),
    rows(2, (3.0, 12, 0.7)),
)


class TestCellCurve:
    @pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 0, 4, 1, 3]])
    def test_adds_up_epochs_in_order_of_wall_time(self, order: list[int]) -> None:
        given = INTERLEAVED.iloc[order]
        before = given.copy()
        curve = cell_curve(given)
        assert curve["wall"].tolist() == [1.0, 1.5, 2.0, 2.5, 3.0]
        assert curve["cell_mbu"].tolist() == [15, 25, 35, 45, 57]
        assert curve["best"].iloc[[0, 1, 3, 4]].tolist() == [0.3, 0.5, 0.5, 0.7]
        pd.testing.assert_frame_equal(given, before)


class TestTimeToTarget:
    @pytest.mark.parametrize(
        ("target", "expected"),
        [
            (0.2, 15),
            (0.3, 15),
            (0.31, 25),
            (0.5, 25),
            (0.51, 57),
            (0.7, 57),
            (0.71, math.inf),
            (1.0, math.inf),
        ],
    )
    def test_over_interleaved_trials(self, target: float, expected: float) -> None:
        assert time_to_target(INTERLEAVED, target) == expected

    def test_accuracies_that_are_not_finite_reach_nothing_but_cost(self) -> None:
        diverged = rows(0, (1.0, 10, NAN))
        assert time_to_target(diverged, 1e-9) == math.inf
        assert time_to_target(joined(diverged, rows(1, (2.0, 10, 0.9))), 0.9) == 20

    def test_of_a_cell_without_epochs_is_censored(self) -> None:
        assert time_to_target(INTERLEAVED.iloc[:0], 0.1) == math.inf

    def test_does_not_stop_counting_at_the_first_trial(self) -> None:
        alone = joined(rows(0, (1.0, 10, 0.1)), rows(1, (9.0, 10, 0.1)), rows(2, (5.0, 10, 0.9)))
        assert time_to_target(alone, 0.9) == 20


def pilots(*best: float) -> pd.DataFrame:
    tables = [
        rows(0, (1.0, 10, value / 2), (2.0, 20, value), (3.0, 30, NAN), seed=1000 + k, variation="pilot")
        for k, value in enumerate(best)
    ]
    return joined(*tables, rows(0, (1.0, 10, 0.01), seed=0), rows(0, (1.0, 10, 0.999), seed=1))


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
        ],
    )
    def test_is_the_highest_that_nine_in_ten_seeds_reach(
        self, best: tuple[float, ...], expected: float
    ) -> None:
        table = pilots(*best)
        target = pilot_target(table)
        assert target == expected
        own = [cell for _, cell in table[table["variation"] == "pilot"].groupby("seed")]
        assert sum(time_to_target(cell, expected) < math.inf for cell in own) >= 0.9 * len(best) - 1e-9
        above = [b for b in best if b > expected]
        assert not above or len([b for b in best if b >= min(above)]) < 0.9 * len(best)

    def test_share_is_a_setting(self) -> None:
        assert pilot_target(pilots(0.9, 0.6, 0.8, 0.7), share=0.5) == 0.8

    def test_a_seed_without_an_accuracy_counts_as_one_that_reached_nothing(self) -> None:
        assert pilot_target(pilots(0.9, NAN)) is None
        assert pilot_target(pilots(*[0.9] * 9, NAN)) == 0.9

    def test_without_pilots_there_is_none(self) -> None:
        assert pilot_target(INTERLEAVED) is None
        assert pilot_target(INTERLEAVED.iloc[:0]) is None


def trials_of(epochs: pd.DataFrame, **special: tuple[str, str | None]) -> pd.DataFrame:
    table = epochs.groupby(["variation", "seed", "trial"], as_index=False)["warm_mbu"].first()
    table["state"], table["reason"] = "COMPLETE", None
    for name, (state, reason) in special.items():
        chosen = table["trial"] == int(name[1:])
        table.loc[chosen, "state"], table.loc[chosen, "reason"] = state, reason
    return table


FINALS = pd.DataFrame(
    {"variation": ["a", "a", "b"], "seed": [0, 1, 0], "test_accuracy": [0.6, 0.8, 0.1], "val_accuracy": 0.5}
)


class TestSummary:
    def test_a_table_worked_out_by_hand(self) -> None:
        second = joined(rows(0, (1.0, 10, 0.9), seed=1), rows(3, (2.0, 13, NAN), seed=1))
        other = rows(0, (1.0, 10, 0.2), variation="b")
        epochs = joined(pilots(0.4), INTERLEAVED, second, other)
        epochs = epochs[(epochs["variation"] != "a") | (epochs["val_accuracy"] != 0.01)]
        epochs = epochs[epochs["val_accuracy"] != 0.999]
        epochs.loc[(epochs["variation"] == "a") & (epochs["trial"] == 2), "warm_s"] = 6.0
        trials = trials_of(epochs, t3=("PRUNED", "diverged in epoch 1"))
        table = summary(epochs, trials, FINALS, [0.5, 0.8])
        assert table["variation"].tolist() == ["a", "b"]
        a, b = table.to_dict("records")
        assert a["cells"] == 2
        assert a["T@0.5"] == (25 + 10) / 2
        assert a["reached@0.5"] == 2
        assert a["T@0.8"] == math.inf  # 10 and censored
        assert a["reached@0.8"] == 1
        assert a["validation"] == pytest.approx((0.7 + 0.9) / 2)
        assert a["test"] == pytest.approx(0.7)
        # warm starts 5 + 0 + 2 and 0 + 3, of 25 + 20 + 12 and 10 + 13 mbu in all
        assert a["overhead"] == pytest.approx(10 / 70)
        # 7 epochs of 4 seconds and a warm start of 6
        assert a["overhead_s"] == pytest.approx(6 / 28)
        assert (a["pruned"], a["trials"], a["failed"]) == (1, 5, 0)
        assert (b["cells"], b["T@0.5"], b["reached@0.5"], b["overhead"]) == (1, math.inf, 0, 0.0)

    @pytest.mark.parametrize(
        ("times", "expected"),
        [
            ((10, 20, 30), 20.0),
            ((10, 20, 30, 40), 25.0),
            ((10, 20, 30, None), 25.0),
            ((10, 20, None, None), math.inf),
            ((10, None, None), math.inf),
            ((30, None, 10), 30.0),
            ((None,), math.inf),
        ],
    )
    def test_a_censored_cell_counts_as_infinite_in_the_median(
        self, times: tuple[float | None, ...], expected: float
    ) -> None:
        epochs = joined(*(rows(0, (1.0, t or 99, 0.9 if t else 0.1), seed=k) for k, t in enumerate(times)))
        row = summary(epochs, trials_of(epochs), FINALS.iloc[:0], [0.8]).iloc[0]
        assert row["T@0.8"] == expected
        assert row["reached@0.8"] == sum(t is not None for t in times)
        assert math.isnan(row["test"])

    def test_a_cell_whose_trials_all_failed_is_censored_too(self) -> None:
        epochs = joined(rows(0, (1.0, 10, 0.9), seed=0), rows(0, (1.0, 20, 0.9), seed=1))
        trials = trials_of(epochs)
        failed = trials.iloc[:1].assign(seed=2, state="FAIL", reason="ValueError: no")
        row = summary(epochs, joined(trials, failed, failed.assign(seed=3)), FINALS, [0.8]).iloc[0]
        assert (row["cells"], row["T@0.8"], row["reached@0.8"]) == (4, math.inf, 2)
        assert row["failed"] == 2

    def test_a_cell_without_an_accuracy_counts_as_the_worst(self) -> None:
        best = (0.7, 0.8, NAN)
        epochs = joined(*(rows(0, (1.0, 10, v), seed=k) for k, v in enumerate(best)))
        row = summary(epochs, trials_of(epochs), FINALS, [0.9]).iloc[0]
        assert row["validation"] == 0.7

    def test_interrupted_trials_are_no_failures_and_no_overhead(self) -> None:
        trials = trials_of(INTERLEAVED)
        left = trials.iloc[:1].assign(trial=7, state="FAIL", reason="interrupted", warm_mbu=1000.0)
        with_it = summary(INTERLEAVED, joined(trials, left), FINALS, [0.5])
        pd.testing.assert_frame_equal(with_it, summary(INTERLEAVED, trials, FINALS, [0.5]))
        assert with_it["overhead"].iloc[0] == pytest.approx(7 / 50)

    def test_of_nothing_is_empty(self) -> None:
        empty = INTERLEAVED.iloc[:0]
        assert summary(empty, trials_of(INTERLEAVED).iloc[:0], FINALS.iloc[:0], [0.5]).empty
