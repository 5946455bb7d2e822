"""How much depends on η_h and on clean labels: sweeps, curvature, the speed-up kept, transfer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats
from statsmodels.nonparametric.smoothers_lowess import lowess

from optuna_ohgw.censored import log_ratios
from optuna_ohgw.statistics import RNG, Estimate, bootstrap, hodges_lehmann, level, location
from optuna_ohgw.variations import base_of, baseline_among, eta_of

Array = NDArray[np.float64]

# Values of η_h that a local line sees; the farthest has no weight, so three remain.
NEIGHBOURS = 4
GRID = 41
RESAMPLES = 500
_POINTS = ["eta_h", "seed", "log_ratio", "unknown"]


@dataclass(frozen=True)
class Sensitivity:
    """T@τ over the baseline's as a function of η_h.

    Attributes:
        points: One row a seed and η_h: ``eta_h``, ``seed``, ``log_ratio`` (natural, of min(T, C)) and
            ``unknown``, whether neither cell reached the target, so that the log ratio is 0.
        grid: Values of η_h of the curve, shape (grid,).
        fit: LOESS of the log ratio over log10 η_h, as a ratio: of means, which single seeds can pull
            (Hodges-Lehmann ratios are not so easily); above a convex curve, being a smooth.
        low: Low end of the 95% band over resampled seeds, as a ratio, of this smooth; ``high`` the high end.
        high: See ``low``.
        curvature: Second derivative of a parabola through the log ratio, per decade² of η_h;
            above 0 there is a best η_h between.
        best_eta: The η_h with the smallest Hodges-Lehmann ratio, None without any.
        reason: Why there is no curve, None where there is one.
    """

    points: pd.DataFrame
    grid: Array
    fit: Array
    low: Array
    high: Array
    curvature: Estimate
    best_eta: float | None
    reason: str | None


def eta_sensitivity(
    times: pd.DataFrame,
    target: float | None,
    default_eta: float,
    *,
    base: str = "asha-ohgw-1step",
    reference: str | None = None,
) -> Sensitivity:
    """Return how T@τ (mbu) of a variation, paired with the baseline's, depends on η_h.

    Args:
        times: What ``metrics.times`` returns.
        target: τ.
        default_eta: The study's η_h, that of variations without one in their name.
        base: The variation, without its step size.
        reference: What each cell is paired with, by seed; None: the baseline.
    """
    points = _points(times[times["target"] == target], default_eta, base, reference or baseline_among([base]))
    # Every seed counts at every η_h, else the curve would show the seeds.
    matrix = points.pivot_table(index="seed", columns="eta_h", values="log_ratio").dropna()
    etas, seeds = matrix.columns.to_numpy(dtype=float), len(matrix)
    best = None
    if seeds and len(etas):
        best = float(etas[int(np.argmin(hodges_lehmann(matrix.to_numpy(), axis=0)))])
    reason = _why_not(target, etas, seeds)
    empty = np.array([])
    if reason is not None:
        return Sensitivity(points, empty, empty, empty, empty, Estimate(math.nan), best, reason)
    x = np.log10(etas)
    grid = np.linspace(x[0], x[-1], GRID)
    columns = tuple(matrix.to_numpy().T)
    fit, low, high = _band(x, columns, grid)
    return Sensitivity(points, 10**grid, fit, low, high, _curvature(x, columns), best, None)


def kept_speedup(clean: pd.DataFrame, noisy: pd.DataFrame, variation: str) -> tuple[Estimate, str]:
    """Return the share of a variation's speed-up that is kept under label noise, and a sentence on it.

    (1 - r_noisy)/(1 - r_clean), r the Hodges-Lehmann ratio of T@τ to the baseline's in mbu; the
    interval resamples the seeds that both studies have, jointly.

    Args:
        clean: Rows of ``metrics.times`` of one target, of the study with clean labels.
        noisy: The same of the noisy study, of its own target.
        variation: The variation.

    Returns:
        The share and the two ratios in words. The share is NaN, and the sentence says so, where the clean
        ratio's interval reaches 1: there is no speed-up that could be kept.
    """
    both = [_paired(table, variation, baseline_among([variation])) for table in (clean, noisy)]
    joined = both[0].merge(both[1], left_index=True, right_index=True, suffixes=("_clean", "_noisy"))
    if len(joined) < 2:
        return Estimate(math.nan), f"{_count(len(joined), 'seed')} with all four cells, an interval takes 2"
    a, b = joined["log_ratio_clean"].to_numpy(), joined["log_ratio_noisy"].to_numpy()
    ratio, under = location(a).map(math.exp), location(b).map(math.exp)
    beside = f"ratio {ratio.value:.2f} clean, {under.value:.2f} noisy, {_count(len(joined), 'seed')}"
    if not ratio.high < 1:
        return Estimate(math.nan), f"no speed-up is shown with clean labels, so none can be kept ({beside})"

    def kept(x: Array, y: Array, axis: int = -1) -> Array:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(
                (1 - np.exp(hodges_lehmann(y, axis=axis))) / (1 - np.exp(hodges_lehmann(x, axis=axis)))
            )

    return bootstrap((a, b), kept, cost=len(a) ** 2), beside


def transfer(results: Mapping[str, Sensitivity], eta: float) -> pd.DataFrame:
    """Return what one untuned η_h gives on each study, beside the best of its sweep.

    Args:
        results: What ``eta_sensitivity`` returns, by study.
        eta: The η_h taken over untuned.

    Returns:
        One row a study: ``study``, ``eta_h``, ``ratio`` (Hodges-Lehmann, NaN where the sweep lacks this
        η_h) with ``low`` and ``high``, ``best_eta``, ``best_ratio``, ``seeds``. The best of a sweep is
        chosen after the fact and flatters itself.
    """
    rows = []
    for name, result in results.items():
        etas = result.points["eta_h"].to_numpy(dtype=float)
        ratios = result.points["log_ratio"].to_numpy(dtype=float)
        own = {float(e): ratios[etas == e] for e in np.unique(etas)}
        here = next((values for e, values in own.items() if math.isclose(e, eta)), np.array([]))
        ratio = location(here).map(math.exp) if len(here) else Estimate(math.nan)
        best = own.get(result.best_eta) if result.best_eta is not None else None
        best_ratio = math.exp(float(hodges_lehmann(best))) if best is not None else math.nan
        rows.append((name, eta, ratio.value, ratio.low, ratio.high, result.best_eta, best_ratio, len(here)))
    columns = ["study", "eta_h", "ratio", "low", "high", "best_eta", "best_ratio", "seeds"]
    return pd.DataFrame(rows, columns=columns)


def _points(times: pd.DataFrame, default_eta: float, base: str, reference: str) -> pd.DataFrame:
    parts = []
    for variation in dict.fromkeys(times["variation"]):
        if base_of(variation) == base:
            eta = eta_of(variation)
            table = _paired(times, variation, reference).reset_index()
            parts.append(table.assign(eta_h=default_eta if eta is None else eta)[_POINTS])
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=_POINTS, dtype=float)


def _paired(times: pd.DataFrame, variation: str, reference: str) -> pd.DataFrame:
    """Return the log ratios of T@τ in mbu, one row a seed that has both cells; the index is the seed."""
    if times["target"].nunique() > 1:
        raise ValueError(f"times are of several targets, {sorted(set(times['target']))}; give one's rows")
    columns = ["mbu", "budget_mbu"]
    # A target asked for twice is one target, not twice the seeds.
    times = times.drop_duplicates(["variation", "seed"])
    own, theirs = (times[times["variation"] == v].set_index("seed")[columns] for v in (variation, reference))
    both = own.merge(theirs, left_index=True, right_index=True, suffixes=("", "_reference"))
    shared = both[["budget_mbu", "budget_mbu_reference"]].min(axis=1)
    unknown = ~(both["mbu"] <= shared) & ~(both["mbu_reference"] <= shared)
    values = log_ratios(*(both[c].to_numpy(dtype=float) for c in both.columns))
    return pd.DataFrame({"log_ratio": values, "unknown": unknown}, index=both.index)


def _why_not(target: float | None, etas: Array, seeds: int) -> str | None:
    if target is None:
        return "there is no target yet"
    if len(etas) < 3:
        return f"{_count(len(etas), 'value')} of η_h with a time, a curve takes 3"
    if seeds < 2:
        return f"{_count(seeds, 'seed')} with every η_h and the baseline, a band takes 2"
    return None


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def _band(x: Array, columns: tuple[Array, ...], grid: Array) -> tuple[Array, Array, Array]:
    fraction = min(1.0, NEIGHBOURS / len(x))

    def smooth(*values: Array) -> Array:
        y = np.stack(values).ravel()
        places = np.repeat(x, len(values[0]))
        return np.asarray(lowess(y, places, frac=fraction, it=0, xvals=grid))

    def smoothed(*values: Array, axis: int = -1) -> Array:
        if values[0].ndim == 1:
            return smooth(*values)
        return np.stack([smooth(*(v[i] for v in values)) for i in range(len(values[0]))], axis=-1)

    fit = smooth(*columns)
    interval = stats.bootstrap(
        columns,
        smoothed,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        confidence_level=level(len(columns[0])),
        method="percentile",
        rng=np.random.default_rng(RNG),
    ).confidence_interval
    return np.exp(fit), np.exp(interval.low), np.exp(interval.high)


def _curvature(x: Array, columns: tuple[Array, ...]) -> Estimate:
    # The parabola of least squares is linear in the values: one weight an η_h.
    weights = 2 * np.linalg.pinv(np.vander(x, 3))[0]

    def second(*values: Array, axis: int = -1) -> Array:
        means = [np.mean(v, axis=axis) for v in values]
        return np.asarray(sum(w * m for w, m in zip(weights, means, strict=True)))

    return bootstrap(columns, second)
