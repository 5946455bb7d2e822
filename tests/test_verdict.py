from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest

from optuna_ohgw.censored import compare_times, kaplan_meier_median
from optuna_ohgw.comparison import COMPARISON_COLUMNS, controls_of
from optuna_ohgw.metrics import cell_metrics, curves, times
from optuna_ohgw.records import read_records
from optuna_ohgw.statistics import holm
from optuna_ohgw.verdict import (
    CONTROLS,
    VERDICT_COLUMNS,
    across_studies,
    comparisons,
    overall,
    verdicts,
)
from tests.planted import FOUR, grown_storage, planted_spec

INF, NAN = math.inf, math.nan
BASE, ONE, RANDOM, GRID = "asha-baseline", "asha-ohgw-1step", "asha-random-warm", "asha-lr-grid"
EIGHT = np.array([100.0, 130, 160, 200, 240, 300, 350, 420])


def table(
    values: Mapping[str, Sequence[float]], budget: float | Sequence[float] = 1000.0, target: float = 0.9
) -> pd.DataFrame:
    """Return times as ``metrics.times`` does; seconds are mbu divided by 10."""
    rows = []
    for variation, own in values.items():
        for seed, (t, c) in enumerate(zip(own, np.broadcast_to(budget, len(own)), strict=True)):
            if math.isnan(t):
                continue  # the cell is not there
            row = {"variation": variation, "seed": seed, "target": target, "reached": t <= c}
            row |= {b: t / k for b, k in (("mbu", 1), ("device_s", 10), ("wall_s", 10))}
            row |= {f"budget_{b}": c / k for b, k in (("mbu", 1), ("device_s", 10), ("wall_s", 10))}
            rows.append(row)
    return pd.DataFrame(rows)


def costs(values: Mapping[str, Mapping[str, Sequence[float]]]) -> pd.DataFrame:
    """Return cell metrics of variation -> column -> one value a seed."""
    parts = [
        pd.DataFrame({"seed": range(len(next(iter(c.values())))), **c}).assign(variation=v)
        for v, c in values.items()
    ]
    return pd.concat(parts, ignore_index=True)


def even(n: int = 8, **changes: float) -> pd.DataFrame:
    """Return cell metrics of n seeds in which the variation differs by the given factors."""
    rng = np.random.default_rng(0)
    columns = {"final_test": rng.uniform(0.9, 0.91, n), "device_s_per_epoch": rng.uniform(2, 2.1, n)}
    columns |= {"peak_ram": rng.uniform(1e9, 1.1e9, n), "peak_vram": np.full(n, NAN)}
    noise = {c: 1 + rng.permutation(np.linspace(-1e-4, 1e-4, n)) for c in columns}
    own = {c: v * changes.get(c, 1.0) * noise[c] for c, v in columns.items()}
    return costs({BASE: columns, ONE: own})


def row(frame: pd.DataFrame, **where: Any) -> dict[str, Any]:
    for column, value in where.items():
        frame = frame[frame[column] == value]
    assert len(frame) == 1
    return frame.iloc[0].to_dict()


def verdict(
    values: pd.DataFrame, cells: pd.DataFrame, criterion: str, variation: str = ONE
) -> dict[str, Any]:
    found = verdicts(comparisons(values), cells, values, 0.9)
    return row(found, criterion=criterion, variation=variation)


class TestControls:
    @pytest.mark.parametrize(
        ("variation", "present", "expected"),
        [
            (ONE, [BASE, RANDOM, GRID], [RANDOM, GRID]),
            (ONE, [BASE, GRID], [GRID]),
            (ONE, [BASE], []),
            ("asha-ohgw-3step", ["asha-random-3step", RANDOM], ["asha-random-3step"]),
            ("asha-ohgw-3step", [RANDOM], [RANDOM]),
            ("asha-ohgw-trust", ["asha-random-trust", RANDOM], ["asha-random-trust"]),
            ("asha-ohgw-linesearch", ["asha-random-linesearch", GRID], ["asha-random-linesearch", GRID]),
            (f"{ONE}@3e-4", [RANDOM, f"{RANDOM}@0.0003"], [f"{RANDOM}@0.0003"]),
            (f"{ONE}@3e-4", [RANDOM, f"{RANDOM}@1e-4"], [RANDOM]),
            (ONE, [f"{RANDOM}@1e-4"], []),
            (RANDOM, [BASE, RANDOM, GRID], []),
            (BASE, [RANDOM, GRID], []),
        ],
    )
    def test_are_the_matching_ones_that_were_run(
        self, variation: str, present: list[str], expected: list[str]
    ) -> None:
        assert controls_of(variation, present) == expected

    def test_use_no_gradient(self) -> None:
        controls = {v for groups in CONTROLS.values() for group in groups for v in group}
        assert not any("ohgw" in control for control in controls)
        assert all("ohgw" in variation for variation in CONTROLS)


class TestComparisons:
    def test_has_a_row_for_every_pair_of_variations_and_budget(self) -> None:
        found = comparisons(table({BASE: EIGHT, RANDOM: EIGHT, ONE: EIGHT * 0.8}))
        assert list(found.columns) == COMPARISON_COLUMNS
        keys = set(zip(found["variation"], found["against"], found["kind"], strict=True))
        assert keys == {(RANDOM, BASE, "baseline"), (ONE, BASE, "baseline"), (ONE, RANDOM, "control")}
        assert len(found) == 3 * 3
        assert found.groupby("budget").size().to_dict() == {"mbu": 3, "device_s": 3, "wall_s": 3}

    def test_figures_are_those_of_the_pairs(self) -> None:
        rng = np.random.default_rng(0)
        base, own = EIGHT * rng.uniform(0.9, 1.1, 8), EIGHT * rng.uniform(0.6, 0.9, 8)
        own[3], base[5] = INF, INF
        found = row(comparisons(table({BASE: base, ONE: own}, 500)), budget="mbu")
        expected = compare_times(own, [500] * 8, base, [500] * 8)
        assert (found["ratio"], found["ratio_low"], found["ratio_high"]) == (
            expected.ratio.value,
            expected.ratio.low,
            expected.ratio.high,
        )
        for name in ("pairs", "faster", "slower", "unknown", "censored", "reference_censored", "p", "p_sign"):
            assert found[name] == getattr(expected, name)
        assert found["km_median"] == kaplan_meier_median(own, [500] * 8)
        assert found["horizon"] == 500
        assert found["rmst_reference"] == pytest.approx(np.mean(np.minimum(base, 500)))

    def test_pairs_are_by_seed_whatever_the_order_of_rows(self) -> None:
        values = table({BASE: EIGHT, ONE: EIGHT * 0.8})
        shuffled = values.sample(frac=1, random_state=0)
        assert row(comparisons(shuffled), budget="mbu")["ratio"] == pytest.approx(0.8)

    def test_missing_pairs_are_counted(self) -> None:
        own = EIGHT * 0.8
        own[[1, 4]] = NAN
        found = row(comparisons(table({BASE: EIGHT, ONE: own})), budget="mbu")
        assert (found["pairs"], found["missing"]) == (6, 2)
        assert "2 seeds without the pair" in found["says"]

    def test_without_the_baseline_there_is_no_pair(self) -> None:
        found = row(comparisons(table({ONE: EIGHT})), budget="mbu")
        assert found["pairs"] == 0
        assert math.isnan(found["p"])
        assert not found["enough"]
        assert "nothing to compare" in found["says"]

    def test_holm_is_over_the_variations_of_one_target_and_budget(self) -> None:
        rng = np.random.default_rng(3)
        values = {BASE: EIGHT} | {
            v: EIGHT * rng.uniform(0.6, 1.1, 8) for v in (RANDOM, ONE, "asha-ohgw-3step")
        }
        both = pd.concat([table(values), table(values, target=0.8)], ignore_index=True)
        found = comparisons(both)
        family = found[(found["target"] == 0.8) & (found["budget"] == "mbu") & (found["kind"] == "baseline")]
        assert len(family) == 3
        assert family["p_holm"].to_numpy() == pytest.approx(holm(family["p"]))
        assert family["p_floor_holm"].tolist() == [3 * 2.0**-7] * 3
        pairs = found[(found["target"] == 0.8) & (found["budget"] == "mbu") & (found["kind"] == "control")]
        assert pairs["p_floor_holm"].tolist() == [2 * 2.0**-7] * 2

    def test_horizon_is_what_every_open_cell_was_observed_to(self) -> None:
        values = table({BASE: [100.0, INF, 300], ONE: [90.0, 250, INF]}, [900.0, 500, 400])
        assert row(comparisons(values), budget="mbu")["horizon"] == 400
        every = table({BASE: [100.0, 300], ONE: [90.0, 250]}, [900.0, 500])
        assert row(comparisons(every), budget="mbu")["horizon"] == 900

    def test_a_cell_without_an_epoch_is_not_observed(self) -> None:
        values = table({BASE: [100.0, 200, 300], ONE: [INF, 150, 250]}, [1000.0] * 3)
        values.loc[(values["variation"] == ONE) & (values["seed"] == 0), "budget_mbu"] = 0.0
        found = row(comparisons(values), budget="mbu")
        assert (found["pairs"], found["unknown"]) == (3, 1)
        assert found["km_median"] == 200
        assert found["rmst"] == 200

    def test_an_empty_table_has_the_columns(self) -> None:
        columns = table({BASE: EIGHT}).columns
        assert list(comparisons(pd.DataFrame(columns=columns)).columns) == COMPARISON_COLUMNS
        assert comparisons(table({BASE: EIGHT})).empty


class TestSays:
    @pytest.mark.parametrize(
        ("own", "words"),
        [
            (
                EIGHT * [0.78, 0.8, 0.82, 0.79, 0.81, 0.77, 0.83, 0.8],
                ["shorter by 20%", "p = 0.0078", "8 pairs"],
            ),
            (EIGHT * [1.18, 1.2, 1.22, 1.19, 1.21, 1.17, 1.23, 1.2], ["longer by 20%", "p = 0.0078"]),
            (EIGHT * [0.9, 1.1, 0.95, 1.06, 1.2, 0.8, 1.02, 0.99], ["nothing shown", "ratio", "8 pairs"]),
            (EIGHT, ["no difference seen", "8 tied of 8 pairs"]),
            ([INF] * 8, ["longer", "8 pairs"]),
        ],
    )
    def test_in_words(self, own: Sequence[float], words: list[str]) -> None:
        said = row(comparisons(table({BASE: EIGHT, ONE: own})), budget="mbu")["says"]
        assert all(word in said for word in words)

    def test_too_few_pairs_are_called_so(self) -> None:
        found = row(
            comparisons(table({BASE: EIGHT[:5], ONE: EIGHT[:5] * [0.1, 0.11, 0.12, 0.13, 0.14]})),
            budget="mbu",
        )
        assert "too few pairs" in found["says"]
        assert "0.062" in found["says"]
        assert "significant" not in found["says"]

    def test_too_few_for_the_family_are_called_so(self) -> None:
        values = {v: EIGHT[:6] * f for v, f in ((RANDOM, 0.5), (ONE, 0.6), ("asha-ohgw-3step", 0.7))}
        found = row(
            comparisons(table({BASE: EIGHT[:6]} | values)), budget="mbu", kind="baseline", variation=ONE
        )
        assert found["p"] < 0.05
        assert "p cannot be below 0.0312, 0.0938 after Holm" in found["says"]

    def test_pairs_of_unknown_order_do_not_make_enough(self) -> None:
        own, base = np.full(20, INF), np.full(20, INF)
        own[:5], base[:5] = EIGHT[:5] * 0.5, EIGHT[:5]
        found = row(comparisons(table({BASE: base, ONE: own})), budget="mbu")
        assert (found["unknown"], found["p_floor"], found["enough"]) == (15, 0.0625, False)
        assert "too few pairs to show anything (20 pairs, 15 of unknown order" in found["says"]

    def test_direction_is_known_where_censoring_hides_the_ratio(self) -> None:
        own, base = np.full(40, INF), np.full(40, INF)
        own[:7], base[:7] = EIGHT[:7] * 0.5, EIGHT[:7]
        found = row(comparisons(table({BASE: base, ONE: own})), budget="mbu")
        assert found["ratio"] == 1
        assert "shorter" in found["says"]
        assert "7 faster and 0 slower" in found["says"]


def spread_about(factor: float, width: float, n: int = 20, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    base = np.exp(rng.normal(6, 0.3, n))
    return base, base * factor * np.exp(rng.normal(0, width, n))


class TestTimeCriterion:
    def test_passes_by_medians_and_p(self) -> None:
        base, own = spread_about(0.7, 0.05)
        found = verdict(table({BASE: base, ONE: own}), even(), "1")
        assert found["outcome"] == "pass"
        assert found["figure"] == pytest.approx(np.median(own) / np.median(base) - 1)
        assert found["low"] < -0.3 < found["high"] < -0.2
        assert found["n"] == 20

    @pytest.mark.parametrize("factor", [0.95, 1.0, 1.4])
    def test_fails_where_15_percent_are_excluded(self, factor: float) -> None:
        base, own = spread_about(factor, 0.05)
        found = verdict(table({BASE: base, ONE: own}), even(), "1")
        assert found["outcome"] == "fail"
        assert found["low"] > -0.15

    def test_is_undecided_where_the_interval_has_both(self) -> None:
        base, own = spread_about(0.95, 0.6)
        found = verdict(table({BASE: base, ONE: own}), even(), "1")
        assert found["outcome"] == "undecided"
        assert found["low"] < -0.15 < found["high"]

    def test_is_undecided_where_it_is_faster_by_less(self) -> None:
        base = np.linspace(100, 400, 20)
        own = base * np.tile([0.8, 0.92], 10)
        found = verdict(table({BASE: base, ONE: own}), even(), "1")
        assert -0.15 < found["figure"] < 0
        assert found["outcome"] == "undecided"
        assert "faster" in found["why"]

    def test_is_undecided_with_too_few_pairs_whatever_the_figure(self) -> None:
        for factor in (0.3, 1.5):
            found = verdict(
                table({BASE: EIGHT[:5], ONE: EIGHT[:5] * factor * np.linspace(0.99, 1, 5)}), even(), "1"
            )
            assert found["outcome"] == "undecided"
            assert "too few pairs" in found["why"]

    def test_censoring_alone_is_no_failure(self) -> None:
        # All ratios of min(T, C) are 1 or just above 0.85, since the baseline is hardly ever observed to τ.
        own, base = np.full(20, 900.0), np.full(20, INF)
        own[12:] = INF
        found = verdict(table({BASE: base, ONE: own * np.linspace(0.99, 1.01, 20)}), even(), "1")
        assert found["low"] > -0.15
        assert found["outcome"] == "undecided"

    def test_a_few_censored_pairs_do_not_save_a_slower_one(self) -> None:
        base, own = spread_about(1.3, 0.05)
        base[:3], own[:3] = INF, INF
        assert verdict(table({BASE: base, ONE: own}, 5000), even(), "1")["outcome"] == "fail"
        base[:8], own[:8] = INF, INF
        found = verdict(table({BASE: base, ONE: own}, 5000), even(), "1")
        assert found["outcome"] == "undecided"
        assert "the baseline is censored in 8 pairs" in found["why"]

    def test_ties_everywhere_are_no_gain(self) -> None:
        found = verdict(table({BASE: EIGHT, ONE: EIGHT}), even(), "1")
        assert (found["outcome"], found["figure"]) == ("fail", 0.0)

    def test_a_baseline_that_never_gets_there_can_be_beaten(self) -> None:
        own = EIGHT * np.linspace(0.9, 1, 8)
        found = verdict(table({BASE: [INF] * 8, ONE: own}), even(), "1")
        assert found["outcome"] == "pass"
        assert found["figure"] == pytest.approx(np.median(own) / 1000 - 1)
        assert "more than" in found["why"]

    def test_neither_gets_there(self) -> None:
        found = verdict(table({BASE: [INF] * 8, ONE: [INF] * 8}), even(), "1")
        assert math.isnan(found["figure"])
        assert found["outcome"] == "undecided"


class TestCostCriteria:
    CASES = (
        ("2", "final_test", 0.9995, "pass"),
        ("2", "final_test", 1.01, "pass"),
        ("2", "final_test", 0.99, "fail"),
        ("2", "final_test", 0.998, "undecided"),
        ("3a", "device_s_per_epoch", 1.04, "pass"),
        ("3a", "device_s_per_epoch", 1.06, "fail"),
        ("3a", "device_s_per_epoch", 1.05, "undecided"),
        ("3b", "peak_ram", 1.05, "pass"),
        ("3b", "peak_ram", 1.2, "fail"),
        ("3b", "peak_ram", 1.1, "undecided"),
    )

    @pytest.mark.parametrize(("criterion", "column", "factor", "outcome"), CASES)
    def test_by_the_interval(self, criterion: str, column: str, factor: float, outcome: str) -> None:
        found = verdict(table({BASE: EIGHT, ONE: EIGHT}), even(**{column: factor}), criterion)
        assert found["outcome"] == outcome
        # The noise of ``even`` is symmetric, so that the estimate is exact.
        assert found["figure"] == pytest.approx(factor - 1, abs=1e-9)
        assert found["low"] <= found["figure"] <= found["high"]
        assert found["n"] == 8

    def test_memory_is_the_gpu_s_where_there_is_one(self) -> None:
        values, cells = table({BASE: EIGHT, ONE: EIGHT}), even(peak_ram=1.2)
        assert verdict(values, cells, "3b")["what"].startswith("peak memory of the process")
        cells["peak_vram"] = np.linspace(1e8, 1.1e8, 16)
        found = verdict(values, cells, "3b")
        assert found["what"].startswith("peak memory of the GPU")
        assert found["figure"] < 0.15

    def test_every_pair_alike_is_decided_by_the_value(self) -> None:
        cells = even()
        cells["peak_ram"] = np.where(cells["variation"] == ONE, 1.05e9, 1e9)
        found = verdict(table({BASE: EIGHT, ONE: EIGHT}), cells, "3b")
        assert (found["outcome"], found["figure"]) == ("pass", pytest.approx(0.05))
        assert "alike" in found["why"]

    @pytest.mark.parametrize("n", [1, 2, 5])
    def test_few_seeds_are_undecided(self, n: int) -> None:
        values = table({BASE: EIGHT[:n], ONE: EIGHT[:n]})
        for criterion in ("2", "3a", "3b", "4"):
            found = verdict(values, even(n, final_test=0.5, device_s_per_epoch=9, peak_ram=9), criterion)
            assert found["outcome"] == "undecided"
            assert "too few" in found["why"]

    def test_nothing_recorded_is_undecided(self) -> None:
        values = table({BASE: EIGHT, ONE: EIGHT})
        lacking = verdict(values, even().drop(columns=["final_test", "peak_ram"]), "2")
        assert (lacking["outcome"], lacking["n"]) == ("undecided", 0)
        assert "not recorded" in lacking["why"]
        unknown = verdict(values, even().assign(final_test=NAN), "2")
        assert (unknown["outcome"], unknown["n"]) == ("undecided", 0)
        absent = even()
        assert verdict(values, absent[absent["variation"] == BASE], "3b")["outcome"] == "undecided"


class TestSpreadCriterion:
    @pytest.mark.parametrize(("scale", "outcome"), [(1.0, "pass"), (1.3, "fail")])
    def test_by_the_interval(self, scale: float, outcome: str) -> None:
        own = EIGHT.mean() + scale * (EIGHT - EIGHT.mean())
        found = verdict(table({BASE: EIGHT, ONE: own}), even(), "4")
        assert found["outcome"] == outcome
        assert found["figure"] == pytest.approx(scale - 1)

    def test_is_undecided_where_the_interval_has_both(self) -> None:
        rng = np.random.default_rng(0)
        found = verdict(table({BASE: rng.uniform(100, 200, 12), ONE: rng.uniform(100, 200, 12)}), even(), "4")
        assert found["outcome"] == "undecided"
        assert found["low"] < 0.1 < found["high"]

    def test_is_undecided_with_any_censored_time(self) -> None:
        own = EIGHT.copy()
        own[-1] = INF
        found = verdict(table({BASE: EIGHT, ONE: own}, 500), even(), "4")
        assert found["outcome"] == "undecided"
        assert found["figure"] == pytest.approx(np.std(np.minimum(own, 500)) / np.std(EIGHT) - 1)
        assert "in 1 of 8 pairs a time is censored" in found["why"]

    def test_no_spread_at_all_is_undecided(self) -> None:
        found = verdict(table({BASE: [100.0] * 8, ONE: [90.0] * 8}), even(), "4")
        assert found["outcome"] == "undecided"


class TestVerdicts:
    def test_without_a_target_there_is_none(self) -> None:
        values = table({BASE: EIGHT, ONE: EIGHT})
        found = verdicts(comparisons(values), even(), values, None)
        assert found.empty
        assert list(found.columns) == VERDICT_COLUMNS
        assert overall(comparisons(values), found, None) == []

    def test_every_variation_has_every_criterion(self) -> None:
        values = table({BASE: EIGHT, RANDOM: EIGHT, ONE: EIGHT})
        found = verdicts(comparisons(values), even(), values, 0.9)
        assert found.groupby("variation")["criterion"].apply(list).to_dict() == {
            v: ["1", "2", "3a", "3b", "4"] for v in (ONE, RANDOM)
        }
        assert set(found["outcome"]) <= {"pass", "fail", "undecided"}
        assert (found["why"].str.len() > 0).all()

    def test_can_be_on_another_budget(self) -> None:
        base, own = spread_about(0.7, 0.05)
        values = table({BASE: base, ONE: own})
        values["device_s"] = np.where(values["variation"] == ONE, values["device_s"] * 2, values["device_s"])
        against = comparisons(values)
        outcome = [
            row(verdicts(against, even(), values, 0.9, budget), criterion="1")["outcome"]
            for budget in ("mbu", "device_s")
        ]
        assert outcome == ["pass", "fail"]


class TestAcrossStudies:
    @pytest.mark.parametrize(
        ("outcomes", "expected", "share"),
        [
            (["pass"] * 3 + ["fail"], "pass", 0.75),
            (["pass"] * 2 + ["fail"] * 2, "fail", 0.5),
            (["pass"] * 2 + ["undecided", "fail"], "undecided", 0.5),
            (["undecided"], "undecided", 0.0),
            (["pass"], "pass", 1.0),
            (["fail"] * 2 + ["undecided"] * 2, "fail", 0.0),
        ],
    )
    def test_against_the_bar(self, outcomes: list[str], expected: str, share: float) -> None:
        studies = {
            str(i): pd.DataFrame([[ONE, "1", "", -0.15, 0, 0, 0, 8, outcome, ""]], columns=VERDICT_COLUMNS)
            for i, outcome in enumerate(outcomes)
        }
        found = row(across_studies(studies))
        assert (found["outcome"], found["share"], found["studies"]) == (expected, share, len(outcomes))
        assert found["passed"] + found["failed"] + found["undecided"] == len(outcomes)

    def test_a_study_without_the_variation_does_not_count(self) -> None:
        values = [table({BASE: EIGHT, v: EIGHT}) for v in (ONE, RANDOM)]
        studies = {str(i): verdicts(comparisons(t), even(), t, 0.9) for i, t in enumerate(values)}
        assert across_studies(studies).set_index("variation")["studies"].to_dict() == {ONE: 1, RANDOM: 1}

    def test_no_study(self) -> None:
        assert across_studies({}).empty


class TestOverall:
    def sentences(self, values: pd.DataFrame) -> dict[str, str]:
        against = comparisons(values)
        lines = overall(against, verdicts(against, even(), values, 0.9), 0.9)
        return {line.split(",")[0]: line for line in lines}

    def test_a_gradient_that_does_not_beat_its_control_is_not_what_helps(self) -> None:
        base, own = spread_about(0.7, 0.05)
        random = own * np.exp(np.random.default_rng(5).normal(0, 0.05, 20))
        said = self.sentences(table({BASE: base, RANDOM: random, ONE: own}))
        assert f"it does not beat {RANDOM}, so the gradient is not what helps" in said[ONE]
        assert "shorter by 30%" in said[ONE]
        assert f"its gradient-free control {RANDOM}" in said[ONE]
        assert "control" not in said[RANDOM]

    def test_a_gradient_that_beats_its_control_is_let_stand(self) -> None:
        base, own = spread_about(0.7, 0.05)
        said = self.sentences(table({BASE: base, RANDOM: base * 1.01, ONE: own}))
        assert "not what helps" not in said[ONE]
        assert f"ratio 0.69 [0.68, 0.71] to its gradient-free control {RANDOM}" in said[ONE]

    def test_every_control_must_be_beaten(self) -> None:
        base, own = spread_about(0.7, 0.05)
        said = self.sentences(table({BASE: base, RANDOM: base, GRID: own * 0.99, ONE: own}))
        assert f"it does not beat {GRID}, so the gradient is not what helps" in said[ONE]

    def test_no_control_is_said(self) -> None:
        said = self.sentences(table({BASE: EIGHT, ONE: EIGHT * 0.7}))
        assert "no gradient-free control was run" in said[ONE]

    def test_nothing_shown_is_said_with_the_control_beside(self) -> None:
        rng = np.random.default_rng(0)
        values = {v: EIGHT * rng.uniform(0.8, 1.25, 8) for v in (BASE, RANDOM, ONE)}
        values[BASE][6:], values[ONE][6:] = INF, INF
        said = self.sentences(table(values))
        assert said[ONE].startswith(f"{ONE}, T@0.9: nothing shown: ratio ")
        assert "8 pairs, 2 of unknown order" in said[ONE]
        assert f"its gradient-free control {RANDOM}, which has ratio " in said[ONE]
        assert all(line.endswith(".") and "\n" not in line and "*" not in line for line in said.values())


def test_from_a_storage_to_a_verdict() -> None:
    spec = planted_spec(FOUR, range(6))
    records = read_records(grown_storage(spec, trials=6, effect={ONE: 0.6}), spec)
    curve = curves(records)
    found = times(curve, records, [0.6])
    against = comparisons(found)
    assert len(against) == 5 * 3
    judged = verdicts(against, cell_metrics(curve, records), found, 0.6)
    assert len(judged) == 3 * 5
    memory = row(judged, variation=ONE, criterion="3b")
    # Planted: 50 MB more than 1 GB in every cell with a warm start.
    assert (memory["figure"], memory["outcome"]) == (pytest.approx(0.05), "pass")
    assert len(overall(against, judged, 0.6)) == 3
