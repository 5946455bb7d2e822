from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from optuna_ohgw.censored import (
    compare_times,
    kaplan_meier_median,
    log_ratios,
    restricted_mean,
)
from optuna_ohgw.statistics import hodges_lehmann, signed_rank

INF, NAN = math.inf, math.nan

# Remission of acute myelogenous leukaemia under maintained chemotherapy, in weeks (Miller 1981, p. 49; in R
# survival::aml). R's survfit gives the median 31 and 0.909, 0.818, 0.716, 0.614, 0.491, 0.368, 0.184.
AML = [9, 13, INF, 18, 23, INF, 31, 34, INF, 48, INF]
AML_BUDGET = [200, 200, 13, 200, 200, 28, 200, 200, 45, 200, 161]


CASES = [
    (10, 40, 20, 40, math.log(0.5), "faster"),
    (20, 40, 10, 40, math.log(2), "slower"),
    (20, 40, 20, 40, 0.0, "tied"),
    (10, 40, INF, 30, math.log(10 / 30), "faster"),  # the reference is cut at C = 30
    (INF, 30, 10, 40, math.log(30 / 10), "slower"),
    (INF, 30, 35, 40, 0.0, "unknown"),  # one was cut before the other got there
    (35, 40, INF, 30, 0.0, "unknown"),
    (INF, 30, INF, 40, 0.0, "unknown"),
    (35, 40, 20, 30, math.log(30 / 20), "slower"),  # reached, but after C
    (INF, 0, INF, 0, 0.0, "unknown"),  # no epoch
    (INF, 0, 10, 40, 0.0, "unknown"),
]


class TestCompareTimes:
    @pytest.mark.parametrize(("t", "c", "r", "k", "d", "order"), CASES)
    def test_one_pair(self, t: float, c: float, r: float, k: float, d: float, order: str) -> None:
        result = compare_times([t], [c], [r], [k])
        expected = NAN if order == "unknown" else math.exp(d)
        assert result.ratio.value == pytest.approx(expected, nan_ok=True)
        assert {o: getattr(result, o) for o in ("faster", "slower", "tied", "unknown")} == {
            o: int(o == order) for o in ("faster", "slower", "tied", "unknown")
        }
        assert math.isnan(result.ratio.low)
        assert result.p == result.p_floor == 1.0

    def test_all_cases_together(self) -> None:
        t, c, r, k, d, _ = zip(*CASES, strict=True)
        result = compare_times(t, c, r, k)
        assert log_ratios(t, c, r, k) == pytest.approx(d)
        assert (result.pairs, result.faster, result.slower, result.tied, result.unknown) == (11, 2, 3, 1, 5)
        assert (result.censored, result.reference_censored) == (7, 6)
        assert math.log(result.ratio.value) == pytest.approx(hodges_lehmann(d))
        assert result.p_sign == stats.binomtest(2, 5).pvalue
        assert (result.p, result.p_floor) == signed_rank(d)
        assert result.p_floor == 2.0**-4

    def test_order_does_not_hang_on_the_direction(self) -> None:
        t, c, r, k, *_ = zip(*CASES, strict=True)
        one, other = compare_times(t, c, r, k), compare_times(r, k, t, c)
        assert (one.faster, one.slower, one.p, one.p_sign) == (
            other.slower,
            other.faster,
            other.p,
            other.p_sign,
        )
        assert one.ratio.value == pytest.approx(1 / other.ratio.value)

    def test_five_pairs_cannot_go_below_a_sixteenth(self) -> None:
        result = compare_times([1, 2, 3, 4, 5], [99] * 5, [2, 5, 9, 13, 20], [99] * 5)
        assert result.p == result.p_floor == 0.0625

    def test_all_censored_says_nothing(self) -> None:
        result = compare_times([INF] * 8, [10] * 8, [INF] * 8, [12] * 8)
        assert (result.p, result.p_sign, result.p_floor, result.unknown) == (1.0, 1.0, 1.0, 8)
        assert math.isnan(result.ratio.value)

    def test_no_pair(self) -> None:
        result = compare_times([], [], [], [])
        assert result.pairs == 0
        assert math.isnan(result.p)
        assert math.isnan(result.p_sign)
        assert math.isnan(result.ratio.value)

    def test_least_ratio_gives_censored_references_the_most_in_favour(self) -> None:
        rng = np.random.default_rng(0)
        t, r, c = rng.uniform(1, 2, 12), rng.uniform(2, 3, 12), np.full(12, 9.0)
        whole = compare_times(t, c, r, c)
        assert whole.ratio_least == whole.ratio.value
        # 3 of 12 at nothing leave 45 of 78 averages; their median of all is the lowest 6.5 of them.
        cut = np.where(np.arange(12) < 3, INF, r)
        rest = sorted((a + b) / 2 for a, b in itertools.combinations_with_replacement(np.log(t / r)[3:], 2))
        assert compare_times(t, c, cut, c).ratio_least == pytest.approx(math.exp((rest[5] + rest[6]) / 2))
        # From 29% on the estimate breaks down.
        assert compare_times(t, c, np.where(np.arange(12) < 4, INF, r), c).ratio_least == 0.0

    def test_a_censored_variation_does_not_change_it(self) -> None:
        t, r, c = np.array([INF, INF, 5, 6, 7, 9]), np.array([2.0, 3, 4, 5, 6, 7]), np.full(6, 10.0)
        result = compare_times(t, c, r, c)
        assert result.ratio_least == pytest.approx(result.ratio.value)

    def test_same_input_same_output(self) -> None:
        rng = np.random.default_rng(0)
        t, r, c = rng.uniform(1, 2, 9), rng.uniform(1, 2, 9), np.full(9, 3.0)
        assert compare_times(t, c, r, c) == compare_times(t, c, r, c)
        assert compare_times(t, c, r, c, rng=1).ratio.low != compare_times(t, c, r, c).ratio.low


class TestKaplanMeier:
    def test_median_of_a_published_example(self) -> None:
        assert kaplan_meier_median(AML, AML_BUDGET) == 31

    def test_restricted_mean_of_a_published_example(self) -> None:
        steps = {
            9: 1,
            13: 0.9090909,
            18: 0.8181818,
            23: 0.7159091,
            31: 0.6136364,
            34: 0.4909091,
            48: 0.3681818,
        }
        edges = [0, *steps]
        area = sum((b - a) * s for (a, b), s in zip(itertools.pairwise(edges), steps.values(), strict=True))
        # R's survfit prints the curve with seven digits.
        assert restricted_mean(AML, AML_BUDGET, 48) == pytest.approx(area, abs=1e-5)
        assert restricted_mean(AML, AML_BUDGET, 60) == pytest.approx(area + 12 * 0.1840909, abs=1e-5)

    @pytest.mark.parametrize("n", [1, 2, 5, 8, 32])
    def test_uncensored_is_the_ordinary_median_and_mean(self, n: int) -> None:
        t = np.random.default_rng(n).uniform(1, 9, n)
        budget = np.full(n, 10.0)
        assert kaplan_meier_median(t, budget) == pytest.approx(np.median(t))
        for horizon in (3.0, 9.5):
            assert restricted_mean(t, budget, horizon) == pytest.approx(np.mean(np.minimum(t, horizon)))

    def test_censored_at_one_time_is_the_ordinary_median_too(self) -> None:
        assert kaplan_meier_median([1, 2, 3, INF, INF], [7] * 5) == 3
        assert restricted_mean([1, 2, 3, INF, INF], [7] * 5, 7) == pytest.approx((1 + 2 + 3 + 7 + 7) / 5)

    @pytest.mark.parametrize(
        ("times", "median"),
        [([1, INF, INF], INF), ([INF, INF], INF), ([1, 2, INF, INF], 2), ([], NAN), ([1, 1, 5, 7], 3)],
    )
    def test_median_at_the_edges(self, times: list[float], median: float) -> None:
        assert kaplan_meier_median(times, [9] * len(times)) == pytest.approx(median, nan_ok=True)

    def test_mean_beyond_what_was_seen_is_unknown(self) -> None:
        assert math.isnan(restricted_mean([1, INF], [5, 5], 6))
        assert restricted_mean([1, 4], [5, 5], 6) == 2.5
        assert math.isnan(restricted_mean([], [], 6))
