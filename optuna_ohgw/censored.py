"""Times to a target, which may be censored: paired comparison, and the Kaplan-Meier curve of several."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from optuna_ohgw.statistics import RNG, Array, Estimate, hodges_lehmann, location, signed_rank


@dataclass(frozen=True)
class TimeComparison:
    """T@τ of a variation against a reference, paired by seed; both cells share the budget C.

    Attributes:
        pairs: Number of pairs.
        faster: Pairs in which the variation reached the target first, the reference later or not within C.
        slower: Pairs the other way round.
        tied: Pairs in which both reached it at the same time.
        unknown: Pairs in which neither reached it within C: their order is not known.
        censored: Pairs in which the variation did not reach it within C.
        reference_censored: Pairs in which the reference did not.
        ratio: Exponential of the Hodges-Lehmann estimate of the log ratios of min(T, C). A censored
            pair draws it towards 1. NaN where no pair's order is known.
        ratio_least: The same when each pair with a censored reference is given the smallest ratio: how
            far censoring can hide a shorter time. 0 where it leaves the ratio open.
        p: Two-sided Wilcoxon signed-rank test of the log ratios, Pratt's zeros; NaN without pairs.
        p_sign: Two-sided sign test of ``faster`` against ``slower``.
        p_floor: Smallest ``p`` that as many pairs with a difference can reach, 2^(1 - m).
    """

    pairs: int
    faster: int
    slower: int
    tied: int
    unknown: int
    censored: int
    reference_censored: int
    ratio: Estimate
    ratio_least: float
    p: float
    p_sign: float
    p_floor: float


def compare_times(
    times: ArrayLike,
    budget: ArrayLike,
    reference: ArrayLike,
    reference_budget: ArrayLike,
    rng: int | np.random.Generator = RNG,
) -> TimeComparison:
    """Return the comparison of T@τ with a reference; arrays over pairs, in one unit of budget.

    The budget C of a pair is the smaller one of its two cells. A pair counts by log min(T, C): one
    whose order is known although one time is censored keeps its sign, one whose order is not known is 0.

    Args:
        times: T@τ of the variation, shape (pairs,); infinite where not reached.
        budget: What each of its cells spent.
        reference: T@τ of the reference cells of the same seeds.
        reference_budget: What each of them spent.
        rng: Seed of the resampling.
    """
    t, r, shared = _cut(times, budget, reference, reference_budget)
    d = _logs(t, shared) - _logs(r, shared)
    no_t, no_r = np.isinf(t), np.isinf(r)
    unknown = int(np.sum(no_t & no_r))
    ratio = location(d, rng).map(math.exp) if unknown < len(d) else Estimate(math.nan)
    # A difference of -1e4 is a ratio of 0 in floating point, also after averaging with others.
    least = math.exp(hodges_lehmann(np.where(no_r, -1e4, d))) if unknown < len(d) else math.nan
    faster, slower = int(np.sum(t < r)), int(np.sum(t > r))
    p, p_floor = signed_rank(d)
    return TimeComparison(
        pairs=len(d),
        faster=faster,
        slower=slower,
        tied=int(np.sum((t == r) & ~no_t)),
        unknown=unknown,
        censored=int(np.sum(no_t)),
        reference_censored=int(np.sum(no_r)),
        ratio=ratio,
        ratio_least=least,
        p=p,
        p_sign=_sign_test(faster, slower) if len(d) else math.nan,
        p_floor=p_floor,
    )


def log_ratios(
    times: ArrayLike, budget: ArrayLike, reference: ArrayLike, reference_budget: ArrayLike
) -> Array:
    """Return the natural log of min(T, C) over the reference's, C the smaller budget; 0 where unknown.

    The arguments are those of ``compare_times``.
    """
    t, r, shared = _cut(times, budget, reference, reference_budget)
    return _logs(t, shared) - _logs(r, shared)


def kaplan_meier_median(times: ArrayLike, budget: ArrayLike) -> float:
    """Return the median time to target where some times are censored.

    Args:
        times: T@τ, shape (cells,), infinite where not reached.
        budget: What each cell spent, at which it is censored.

    Returns:
        The time at which the Kaplan-Meier curve falls to 1/2, the middle where it stays there for a
        while (as the ordinary median of an even number); infinite where it never does; NaN without cells.
    """
    if np.size(times) == 0:
        return math.nan
    at, survival = _kaplan_meier(times, budget)
    below = at[survival < 0.5 - 1e-9]
    level = at[np.abs(survival - 0.5) <= 1e-9]
    if len(level):
        return float((level[0] + below[0]) / 2 if len(below) else level[0])
    return float(below[0]) if len(below) else math.inf


def restricted_mean(times: ArrayLike, budget: ArrayLike, horizon: float) -> float:
    """Return the mean of min(T, horizon): the area under the Kaplan-Meier curve up to the horizon.

    NaN without cells, and where the last cell is censored before the horizon.

    Args:
        times: T@τ, shape (cells,), infinite where not reached.
        budget: What each cell spent, at which it is censored.
        horizon: End of the area, in the unit of the times; the same for all that are compared.
    """
    if np.size(times) == 0 or not math.isfinite(horizon):
        return math.nan
    at, survival = _kaplan_meier(times, budget)
    if at[-1] < horizon and survival[-1] > 1e-9:
        return math.nan
    edges = np.concatenate([[0.0], np.minimum(at, horizon), [horizon]])
    return float(np.sum(np.diff(edges) * np.concatenate([[1.0], survival])))


def _cut(
    times: ArrayLike, budget: ArrayLike, reference: ArrayLike, reference_budget: ArrayLike
) -> tuple[Array, Array, Array]:
    """Return both times, infinite where above the smaller budget C of the pair, and C."""
    shared = np.minimum(np.asarray(budget, dtype=float), np.asarray(reference_budget, dtype=float))
    t, r = (np.where(np.asarray(x, dtype=float) <= shared, x, math.inf) for x in (times, reference))
    return t, r, shared


def _logs(times: Array, shared: Array) -> Array:
    # A cell without an epoch spent nothing: both logs are 0, its pair is of unknown order.
    return np.log(np.where(shared > 0, np.minimum(times, shared), 1.0))


def _sign_test(faster: int, slower: int) -> float:
    if faster + slower == 0:
        return 1.0
    return float(stats.binomtest(faster, faster + slower).pvalue)


def _kaplan_meier(times: ArrayLike, budget: ArrayLike) -> tuple[Array, Array]:
    t, c = np.asarray(times, dtype=float), np.asarray(budget, dtype=float)
    censored = ~(t <= c)
    curve = stats.ecdf(stats.CensoredData.right_censored(np.minimum(t, c), censored)).sf
    return curve.quantiles, curve.probabilities
