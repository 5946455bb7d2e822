from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from optuna_ohgw.statistics import (
    Estimate,
    bootstrap,
    hodges_lehmann,
    holm,
    level,
    location,
    paired_difference,
    sd_ratio,
    signed_rank,
)

INF, NAN = math.inf, math.nan

# The depression scale factors of Hollander and Wolfe (1973, p. 29), as in the help of R's wilcox.test, which
# gives V = 40, p = 0.03906 and, with conf.int, the pseudomedian 0.46.
FIRST = [1.83, 0.50, 1.62, 2.48, 1.68, 1.88, 1.55, 3.06, 1.30]
SECOND = [0.878, 0.647, 0.598, 2.05, 1.06, 1.29, 1.06, 3.14, 1.29]


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
class TestHolm:
    def test_against_a_worked_example(self) -> None:
        # Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1, then never decreasing.
        assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])

    def test_an_unknown_p_is_no_member(self) -> None:
        assert holm([0.01, NAN, 0.03]) == pytest.approx([0.02, NAN, 0.03], nan_ok=True)
        assert holm([NAN, NAN]) == pytest.approx([NAN, NAN], nan_ok=True)

    def test_floor_of_five_pairs_in_a_family(self) -> None:
        assert holm([0.0625, 2.0**-7]) == pytest.approx([0.0625, 2.0**-6])


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
