from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from optuna_ohgw.statistics import (
    Estimate,
    bootstrap,
    compare_times,
    hodges_lehmann,
    holm,
    kaplan_meier_median,
    level,
    location,
    log_ratios,
    paired_difference,
    restricted_mean,
    sd_ratio,
    signed_rank,
)

INF, NAN = math.inf, math.nan

# The depression scale factors of Hollander and Wolfe (1973, p. 29), as in the help of R's wilcox.test, which
# gives V = 40, p = 0.03906 and, with conf.int, the pseudomedian 0.46.
FIRST = [1.83, 0.50, 1.62, 2.48, 1.68, 1.88, 1.55, 3.06, 1.30]
SECOND = [0.878, 0.647, 0.598, 2.05, 1.06, 1.29, 1.06, 3.14, 1.29]

# Remission of acute myelogenous leukaemia under maintained chemotherapy, in weeks (Miller 1981, p. 49; in R
# survival::aml). R's survfit gives the median 31 and 0.909, 0.818, 0.716, 0.614, 0.491, 0.368, 0.184.
AML = [9, 13, INF, 18, 23, INF, 31, 34, INF, 48, INF]
AML_BUDGET = [200, 200, 13, 200, 200, 28, 200, 200, 45, 200, 161]


class TestHodgesLehmann:
    def test_reference_table(self) -> None:
        # 0.46 within the rounding of three-digit data.
        assert hodges_lehmann(np.subtract(FIRST, SECOND)) == pytest.approx(0.46, abs=1e-9)

    @pytest.mark.parametrize("n", [1, 2, 5, 8])
    def test_is_the_median_of_all_averages_of_two(self, n: int) -> None:
        d = np.random.default_rng(n).normal(size=n)
        averages = [(d[i] + d[j]) / 2 for i in range(n) for j in range(i, n)]
        assert hodges_lehmann(d) == pytest.approx(np.median(averages), abs=1e-14)

    def test_takes_one_axis_and_keeps_the_others(self) -> None:
        d = np.random.default_rng(0).normal(size=(7, 3))
        assert hodges_lehmann(d, axis=0) == pytest.approx([float(hodges_lehmann(d[:, i])) for i in range(3)])

    def test_moves_with_a_shift_and_turns_with_the_sign(self) -> None:
        d = np.random.default_rng(1).normal(size=9)
        assert hodges_lehmann(d + 3) == pytest.approx(hodges_lehmann(d) + 3)
        assert hodges_lehmann(-d) == pytest.approx(-hodges_lehmann(d))


class TestSignedRank:
    def test_reference_table(self) -> None:
        p, floor = signed_rank(np.subtract(FIRST, SECOND))
        assert p == pytest.approx(0.03906, abs=5e-6)
        assert floor == 2.0**-8

    @pytest.mark.parametrize(
        "d",
        [
            [0, 0, 0, 1, 2, -3, 4, 5],
            [0, 0, 1, 1, 1, -1, 2, 2, 2],
            [0] * 12 + [1, 2, 3, 4, -5, 6],  # eighteen pairs: scipy alone would take the normal law
            [1, 2, 3, 4, 5, 6],
            [1, -1, 2, 2, 3],
        ],
    )
    def test_is_exact_for_few_differences(self, d: list[float]) -> None:
        ranks = stats.rankdata(np.abs(d))[np.nonzero(d)]
        signs = np.array(list(itertools.product([-1, 1], repeat=len(ranks))))
        every, own = signs @ ranks, np.sign(np.array(d)[np.nonzero(d)]) @ ranks
        tail = min(np.mean(every <= own + 1e-9), np.mean(every >= own - 1e-9))
        p, floor = signed_rank(d)
        assert p == pytest.approx(min(1.0, 2 * tail), abs=1e-12)
        assert floor == 2.0 ** (1 - len(ranks))

    def test_zeros_are_as_scipy_ranks_them(self) -> None:
        d = np.random.default_rng(0).normal(0.4, 1, 40)
        d[:10] = 0.0
        assert signed_rank(d)[0] == stats.wilcoxon(d, zero_method="pratt").pvalue

    def test_rounding_does_not_break_ties(self) -> None:
        d = np.array([0.1 + 0.2, -0.3, 0.5, 0.7, 0.9, -1.1, 0.0])
        assert signed_rank(d) == signed_rank([0.3, -0.3, 0.5, 0.7, 0.9, -1.1, 0.0])

    @pytest.mark.parametrize("m", range(2, 20))
    @pytest.mark.parametrize("zeros", [0, 1, 20])
    def test_never_falls_below_its_floor(self, m: int, zeros: int) -> None:
        p, floor = signed_rank([0.0] * zeros + [float(i) for i in range(1, m + 1)])
        assert floor == 2.0 ** (1 - m)
        assert p >= floor * (1 - 1e-9)

    @pytest.mark.parametrize(
        ("d", "p", "floor"),
        [([], NAN, 1.0), ([0.0] * 5, 1.0, 1.0), ([0.0, 0.0, 3.0], 1.0, 1.0), ([2.0], 1.0, 1.0)],
    )
    def test_says_nothing_without_differences(self, d: list[float], p: float, floor: float) -> None:
        assert signed_rank(d) == pytest.approx((p, floor), nan_ok=True)


# T and budget of the variation, of the reference: difference of the logs of min(T, C), order
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


class TestHolm:
    def test_against_a_worked_example(self) -> None:
        # Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1, then never decreasing.
        assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])

    def test_an_unknown_p_is_no_member(self) -> None:
        assert holm([0.01, NAN, 0.03]) == pytest.approx([0.02, NAN, 0.03], nan_ok=True)
        assert holm([NAN, NAN]) == pytest.approx([NAN, NAN], nan_ok=True)

    def test_floor_of_five_pairs_in_a_family(self) -> None:
        assert holm([0.0625, 2.0**-7]) == pytest.approx([0.0625, 2.0**-6])


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


class TestIntervals:
    @pytest.mark.parametrize("seeds", [0, 1])
    def test_too_few_seeds_have_a_value_only(self, seeds: int) -> None:
        estimate = location([2.0] * seeds)
        assert (estimate.value == 2.0) if seeds else math.isnan(estimate.value)
        assert math.isnan(estimate.low)
        assert math.isnan(estimate.high)

    def test_seeds_all_alike_have_a_value_only(self) -> None:
        estimate = location([2.0] * 8)
        assert estimate.value == 2.0
        assert math.isnan(estimate.low)

    def test_two_seeds_span_their_values(self) -> None:
        # A quarter of the resamples has one value twice, so the interval ends at the values themselves.
        estimate = location([1.0, 3.0])
        assert (estimate.value, estimate.low, estimate.high) == (2.0, 1.0, 3.0)

    def test_interval_of_a_mean_is_near_the_normal_one(self) -> None:
        x = np.random.default_rng(0).normal(size=400)
        estimate = bootstrap((x,), np.mean, resamples=9999)
        half = 1.96 * x.std() / 20
        # 9999 resamples know a 2.5% point to about 2% of the half width.
        assert estimate.low == pytest.approx(x.mean() - half, abs=0.05 * half)
        assert estimate.high == pytest.approx(x.mean() + half, abs=0.05 * half)

    def test_level_tends_to_95_percent_from_above(self) -> None:
        # sqrt(8/7) times the t quantile 2.3646 with 7 degrees of freedom is 2.5279; the normal law has
        # 0.57% beyond it on each side.
        assert level(8) == pytest.approx(1 - 2 * 0.00574, abs=2e-5)
        assert level(10**6) == pytest.approx(0.95, abs=1e-5)
        assert all(level(n) > level(n + 1) for n in range(2, 60))

    def test_chunks_do_not_change_it(self) -> None:
        x = np.random.default_rng(0).normal(size=20)
        assert bootstrap((x,), hodges_lehmann, cost=2**20) == bootstrap((x,), hodges_lehmann, cost=1)

    def test_map(self) -> None:
        estimate = Estimate(0.0, -1.0, 1.0).map(math.exp)
        assert (estimate.value, estimate.low, estimate.high) == (1.0, math.exp(-1), math.e)


class TestSdRatio:
    def test_value_and_scale(self) -> None:
        rng = np.random.default_rng(0)
        a, b = rng.normal(size=(2, 20))
        once, twice = sd_ratio(a, b), sd_ratio(2 * a + 7, b)
        assert once.value == pytest.approx(np.std(a, ddof=1) / np.std(b, ddof=1))
        assert (twice.value, twice.low, twice.high) == pytest.approx(
            (2 * once.value, 2 * once.low, 2 * once.high)
        )

    def test_resamples_pairs(self) -> None:
        # The same values but for scale: in pairs the ratio cannot vary.
        a = np.random.default_rng(0).normal(size=20)
        estimate = sd_ratio(1.5 * a, a)
        assert (estimate.low, estimate.high) == pytest.approx((1.5, 1.5))

    @pytest.mark.parametrize("n", [2, 3, 4])
    def test_few_seeds_do_not_warn(self, n: int) -> None:
        a, b = np.random.default_rng(n).normal(size=(2, n))
        assert sd_ratio(a, b).value == pytest.approx(np.std(a) / np.std(b))

    def test_pairs_with_an_unknown_value_are_left_out(self) -> None:
        assert sd_ratio([1, 2, 4, NAN, 9], [1, 2, 3, 9, INF]) == sd_ratio([1, 2, 4], [1, 2, 3])
        assert math.isnan(sd_ratio([1, NAN], [1, 2]).value)

    def test_two_seeds_give_a_ratio_and_no_interval(self):
        estimate = sd_ratio([1, 3], [1, 2])
        assert estimate.value == 2
        assert math.isnan(estimate.low)
        assert math.isnan(estimate.high)

    def test_a_reference_without_spread_has_no_upper_bound(self):
        estimate = sd_ratio([1, 3, 4], [2, 2, 2])
        assert estimate.value == INF
        assert not math.isfinite(estimate.high)


class TestPairedDifference:
    def test_reference_table(self) -> None:
        result = paired_difference(FIRST, SECOND)
        assert result.estimate.value == pytest.approx(0.46, abs=1e-9)
        assert result.p == pytest.approx(0.03906, abs=5e-6)
        assert result.estimate.low < 0.46 < result.estimate.high

    def test_relative_is_over_the_reference(self) -> None:
        reference = np.array([1.0, 2, 4, 8, 16, 32, 64])
        result = paired_difference(1.05 * reference, reference, relative=True)
        assert result.estimate.value == pytest.approx(0.05)
        assert (result.pairs, result.p_floor) == (7, 2.0**-6)
        assert result.p == result.p_floor

    @pytest.mark.parametrize("sign", [1, -1])
    def test_a_negative_reference_keeps_which_way_is_up(self, sign: int) -> None:
        reference = -np.array([20.0, 18, 16, 10])
        result = paired_difference(reference + sign * np.array([2, 1.8, 1.6, 1]), reference, relative=True)
        assert result.estimate.value == pytest.approx(0.1 * sign)

    def test_unknown_values_and_zero_references_are_left_out(self) -> None:
        result = paired_difference([1.1, NAN, 3, 2], [1.0, 1, INF, 0], relative=True)
        assert result.pairs == 1
        assert result.estimate.value == pytest.approx(0.1)
        assert paired_difference([1.1, NAN, 3, 2], [1.0, 1, INF, 0]).pairs == 2
        assert math.isnan(paired_difference([], []).p)
