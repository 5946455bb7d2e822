from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from optuna_ohgw.sensitivity import eta_sensitivity, kept_speedup, transfer

ETAS = (1e-4, 3e-4, 1e-3, 3e-3)
C = 10_000.0


def times_of(
    ratio: Callable[[float], float],
    seeds: int = 8,
    *,
    etas: tuple[float, ...] = ETAS,
    noise: float = 0.05,
    target: float = 0.9,
    rng: int = 0,
) -> pd.DataFrame:
    """Return the times of a sweep in which T at η_h is the baseline's times ``ratio(log10 η_h)``."""
    draw, rows = np.random.default_rng(rng), []
    for seed in range(seeds):
        base = 1000 * math.exp(draw.normal(0, 0.4))
        rows.append(("asha-baseline", seed, base))
        for eta in etas:
            name = "asha-ohgw-1step" if eta == 1e-3 else f"asha-ohgw-1step@{eta:g}"
            rows.append((name, seed, base * ratio(math.log10(eta)) * math.exp(draw.normal(0, noise))))
    table = pd.DataFrame(rows, columns=["variation", "seed", "mbu"])
    table["mbu"] = table["mbu"].where(table["mbu"] <= C, math.inf)
    return table.assign(target=target, budget_mbu=C, reached=np.isfinite(table["mbu"]))


def parabola(x: float) -> float:
    return math.exp(0.3 * (x + 3.25) ** 2 - 0.2)


class TestEtaSensitivity:
    def test_a_planted_parabola(self) -> None:
        result = eta_sensitivity(times_of(parabola, 30), 0.9, 1e-3)
        assert result.reason is None
        assert result.curvature.low < 0.6 < result.curvature.high
        assert result.curvature.low > 0
        assert result.curvature.value == pytest.approx(0.6, abs=0.08)
        assert result.best_eta in (3e-4, 1e-3)
        assert len(result.points) == 4 * 30
        # A local line is above a convex curve, by no more than its rise over half a step.
        exact = np.array([parabola(x) for x in np.log10(result.grid)])
        assert np.abs(np.log(result.fit / exact)).max() < 0.12
        assert (result.low <= result.fit).all()
        assert (result.fit <= result.high).all()
        assert result.grid[0] == pytest.approx(1e-4)
        assert result.grid[-1] == pytest.approx(3e-3)

    def test_no_effect_is_a_flat_curve_around_one(self) -> None:
        result = eta_sensitivity(times_of(lambda x: 1.0, 30), 0.9, 1e-3)
        assert result.curvature.low < 0 < result.curvature.high
        assert ((result.low < 1.02) & (result.high > 0.98)).all()

    def test_a_straight_line_is_found_exactly_where_there_is_no_noise(self) -> None:
        result = eta_sensitivity(times_of(lambda x: math.exp(0.1 * x), 5, noise=0.0), 0.9, 1e-3)
        np.testing.assert_allclose(result.fit, np.exp(0.1 * np.log10(result.grid)), rtol=1e-6)
        assert result.curvature.value == pytest.approx(0.0, abs=1e-9)

    def test_the_band_is_over_seeds(self) -> None:
        few, many = (eta_sensitivity(times_of(parabola, n, noise=0.2), 0.9, 1e-3) for n in (24, 96))
        widths = [np.log(r.high / r.low).mean() for r in (few, many)]
        # Four times the seeds: half the width, but for the allowance for few.
        assert widths[0] / widths[1] == pytest.approx(2, rel=0.3)

    def test_a_cell_that_did_not_reach_the_target_counts_by_its_budget(self) -> None:
        table = times_of(lambda x: 1.0, 4, noise=0.0)
        lost = (table["variation"] == "asha-ohgw-1step") & (table["seed"] == 0)
        table.loc[lost, "mbu"] = math.inf
        points = eta_sensitivity(table, 0.9, 1e-3).points.set_index(["eta_h", "seed"])["log_ratio"]
        base = table.loc[(table["variation"] == "asha-baseline") & (table["seed"] == 0), "mbu"].iloc[0]
        assert points.loc[(1e-3, 0)] == pytest.approx(math.log(C / base), abs=1e-9)
        table.loc[(table["variation"] == "asha-baseline") & (table["seed"] == 0), "mbu"] = math.inf
        points = eta_sensitivity(table, 0.9, 1e-3).points.set_index(["eta_h", "seed"])["log_ratio"]
        assert points.loc[(1e-3, 0)] == 0

    @pytest.mark.parametrize(
        ("table", "target", "reason"),
        [
            (times_of(parabola, 1), 0.9, "1 seed with"),
            (times_of(parabola, 8, etas=(1e-3, 3e-3)), 0.9, "2 values of η_h"),
            (times_of(parabola, 8, etas=(1e-3,)), 0.9, "1 value of η_h"),
            (times_of(parabola, 8).iloc[:0], 0.9, "0 values of η_h"),
            (times_of(parabola, 8), 0.5, "0 values"),
            (times_of(parabola, 8), None, "no target"),
        ],
    )
    def test_says_why_there_is_no_curve(self, table: pd.DataFrame, target: float | None, reason: str) -> None:
        result = eta_sensitivity(table, target, 1e-3)
        assert result.reason is not None
        assert reason in result.reason
        assert len(result.grid) == len(result.fit) == 0

    def test_variations_of_another_base_are_not_in_it(self) -> None:
        table = times_of(parabola, 8)
        others = times_of(lambda x: 3.0, 8)
        names = others["variation"].str.replace("ohgw-1step", "random-warm")
        both = pd.concat([table, others[names != "asha-baseline"].assign(variation=names)])
        own = eta_sensitivity(both, 0.9, 1e-3)
        pd.testing.assert_frame_equal(own.points, eta_sensitivity(table, 0.9, 1e-3).points)
        control = eta_sensitivity(both, 0.9, 1e-3, base="asha-random-warm")
        assert control.points["log_ratio"].median() == pytest.approx(math.log(3), abs=0.05)

    def test_a_name_without_a_step_size_has_the_study_s(self) -> None:
        etas = eta_sensitivity(times_of(parabola, 4), 0.9, 5e-4).points["eta_h"]
        assert sorted(set(etas)) == [1e-4, 3e-4, 5e-4, 3e-3]

    @pytest.mark.parametrize(
        "etas", [ETAS[1:], (1e-5, 1e-3, 1e-1), (1e-4, 1.1e-4, 1e-3, 1e-1), (*ETAS, 1e-2, 0.1)]
    )
    @pytest.mark.parametrize("seeds", [2, 3, 8])
    def test_any_sweep_has_a_curve_without_a_gap(self, etas: tuple[float, ...], seeds: int) -> None:
        result = eta_sensitivity(times_of(parabola, seeds, etas=etas), 0.9, 1e-3)
        assert np.isfinite([result.fit, result.low, result.high]).all()

    def test_a_seed_without_every_eta_is_left_out_of_the_curve(self) -> None:
        table = times_of(parabola, 8)
        gone = (table["variation"] == "asha-ohgw-1step@0.003") & (table["seed"] == 3)
        with_gap, without = table[~gone], table[table["seed"] != 3]
        curves = [eta_sensitivity(t, 0.9, 1e-3).fit for t in (with_gap, without)]
        np.testing.assert_array_equal(*curves)


def pair_of(ratio: float, seeds: int = 24, rng: int = 0) -> pd.DataFrame:
    return times_of(lambda x: ratio, seeds, etas=(1e-3,), rng=rng)


class TestKeptSpeedup:
    def test_a_planted_share(self) -> None:
        kept, why = kept_speedup(pair_of(0.7), pair_of(0.85, rng=1), "asha-ohgw-1step")
        assert kept.low < 0.5 < kept.high
        assert kept.value == pytest.approx(0.5, abs=0.1)
        assert "24 seeds" in why

    def test_without_a_speed_up_nothing_can_be_kept(self) -> None:
        for ratio in (1.0, 1.2):
            kept, why = kept_speedup(pair_of(ratio), pair_of(0.5, rng=1), "asha-ohgw-1step")
            assert math.isnan(kept.value)
            assert "no speed-up" in why

    def test_a_speed_up_that_may_be_chance_is_none(self) -> None:
        clean = times_of(lambda x: 0.95, 8, etas=(1e-3,), noise=0.4, rng=3)
        kept, why = kept_speedup(clean, pair_of(0.5, 8, rng=1), "asha-ohgw-1step")
        assert math.isnan(kept.value)
        assert "ratio 0.81 clean" in why

    def test_a_target_asked_for_twice_is_not_twice_the_seeds(self) -> None:
        clean, noisy = pair_of(0.7, 8), pair_of(0.85, 8, rng=1)
        once = kept_speedup(clean, noisy, "asha-ohgw-1step")
        twice = kept_speedup(*(pd.concat([t, t]) for t in (clean, noisy)), "asha-ohgw-1step")
        assert once == twice

    def test_rows_of_several_targets_are_refused(self) -> None:
        both = pd.concat([pair_of(0.7), pair_of(0.7).assign(target=0.8)])
        with pytest.raises(ValueError, match=r"several targets, \[0.8, 0.9\]"):
            kept_speedup(both, pair_of(0.8), "asha-ohgw-1step")

    def test_too_few_seeds_with_all_four_cells(self) -> None:
        noisy = pair_of(0.8)
        kept, why = kept_speedup(pair_of(0.7), noisy[noisy["seed"] == 0], "asha-ohgw-1step")
        assert math.isnan(kept.value)
        assert why.startswith("1 seed with")


class TestTransfer:
    def test_the_untuned_beside_the_best(self) -> None:
        results = {
            "a": eta_sensitivity(times_of(parabola, 12), 0.9, 1e-3),
            "b": eta_sensitivity(times_of(parabola, 12, etas=(1e-4, 3e-4, 3e-3)), 0.9, 1e-3),
        }
        table = transfer(results, 1e-3).set_index("study")
        assert table.loc["a", "ratio"] == pytest.approx(parabola(-3), rel=0.05)
        assert table.loc["a", "low"] < parabola(-3) < table.loc["a", "high"]
        assert math.isnan(table.loc["b", "ratio"])
        assert table.loc["a", "best_ratio"] <= table.loc["a", "ratio"]
        assert table["best_eta"].tolist() == [results["a"].best_eta, 3e-4]
