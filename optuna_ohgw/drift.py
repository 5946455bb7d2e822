"""How warm starts change the configurations of a study, and whether larger gradients help more."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats
from scipy.spatial import cKDTree
from scipy.special import digamma

from optuna_ohgw.records import PILOT
from optuna_ohgw.spec_parts import RangeSpec
from optuna_ohgw.statistics import level
from optuna_ohgw.variations import baseline_among

NEIGHBOURS = 5
RESAMPLES = 500
PAIRS = (("trained", "suggested"), ("promoted", "trained"), ("promoted", "suggested"))
Array = NDArray[np.float64]
_QUARTILES = ("step_q1", "step", "step_q3")
_UNIT_QUARTILES = ("unit_q1", "unit", "unit_q3")


def shift(trials: pd.DataFrame, ranges: Mapping[str, RangeSpec]) -> pd.DataFrame:
    """Return how far warm starts moved each parameter.

    Args:
        trials: ``Records.trials``.
        ranges: Searched parameters and their bounds.

    Returns:
        One row a variation and parameter: ``n`` warm-started trials; shares of them that ``moved``,
        were ``clipped`` (ended at a bound), are ``coarse`` (component found by finite differences)
        and had ``no_step`` (gradient not usable: a move of 0); quartiles and median of the move in search
        coordinates (``step_q1``, ``step``, ``step_q3``) and in unit coordinates (``unit_q1``, ``unit``,
        ``unit_q3``), the median size of the move in unit coordinates (``unit_size``) and the largest
        one (``unit_largest``).
    """
    rows = []
    for variation, own in _warmed(trials).groupby("variation", sort=False):
        for name, bounds in ranges.items():
            step = own[f"step_{name}"].fillna(0.0).to_numpy(dtype=float)
            quartiles = np.quantile(step, [0.25, 0.5, 0.75])
            sizes = np.abs(step) / _width(bounds)
            rows.append(
                {
                    "variation": variation,
                    "parameter": name,
                    "n": len(own),
                    "moved": float(np.mean(step != 0)),
                    "clipped": _share_naming(own["clipped"], name),
                    "coarse": _share_naming(own["coarse"], name),
                    "no_step": float(own["no_step"].notna().mean()),
                    **dict(zip(_QUARTILES, map(float, quartiles), strict=True)),
                    **dict(zip(_UNIT_QUARTILES, map(float, quartiles / _width(bounds)), strict=True)),
                    "unit_size": float(np.median(sizes)),
                    "unit_largest": float(sizes.max()),
                }
            )
    columns = ["variation", "parameter", "n", "moved", "clipped", "coarse", "no_step"]
    columns += [*_QUARTILES, *_UNIT_QUARTILES, "unit_size", "unit_largest"]
    return pd.DataFrame(rows, columns=columns)


def divergence(
    trials: pd.DataFrame, ranges: Mapping[str, RangeSpec], *, first_rung: int, k: int = NEIGHBOURS
) -> pd.DataFrame:
    """Return Kullback-Leibler divergences between suggested, trained and promoted configurations.

    All in unit coordinates. Promoted ones are the trained values of trials that went on after the
    first rung. The point of Q that a point of P came from is left out; see ``knn_divergence``.

    Args:
        trials: ``Records.trials``; all variations but pilots, the baseline too.
        ranges: Searched parameters and their bounds.
        first_rung: Epochs at which the scheduler first decides.
        k: Number of neighbours.

    Returns:
        One row a variation, pair of laws and parameter, then all of them ``jointly``: ``of`` (P),
        ``from`` (Q), ``parameter``, ``n`` and ``m`` points; ``kl`` in nats, NaN where there are too few
        points, and ``why`` then; ``noise``, the standard deviation of ``kl`` between independent samples
        of one law (in simulation, k = 5: 0.5/√n for one parameter, up to 0.8/√n for five; moves that are
        small vary far less); ``piled``, the points with k others exactly alike, as at a bound;
        ``estimator``.
    """
    rows = []
    own = trials[(trials["variation"] != PILOT) & trials["counted"]]
    for variation, mine in own.groupby("variation", sort=False):
        points = {kind: _unit(mine, ranges, kind) for kind in ("suggested", "trained")}
        known = np.isfinite(points["suggested"] + points["trained"]).all(axis=1)
        points = {kind: values[known] for kind, values in points.items()}
        went_on = (mine["epochs"] > first_rung).to_numpy()[known]
        for of, other in PAIRS:
            twins = np.flatnonzero(went_on) if of == "promoted" else np.arange(len(went_on))
            p, q = points["trained"][twins], points[other]
            axes = {**{name: [i] for i, name in enumerate(ranges)}, "jointly": list(range(len(ranges)))}
            for name, chosen in axes.items():
                value, piled = knn_divergence(p[:, chosen], q[:, chosen], k=k, twins=twins)
                few = math.isnan(value)
                rows.append(
                    {
                        "variation": variation,
                        "of": of,
                        "from": other,
                        "parameter": name,
                        "n": len(p),
                        "m": len(q) - 1,
                        "kl": value,
                        "noise": math.nan if few else (0.5 if len(chosen) == 1 else 0.8) / math.sqrt(len(p)),
                        "piled": piled,
                        "estimator": f"{k}-nearest neighbours",
                        "why": f"{len(p)} points: {k} neighbours take {k + 2}" if few else None,
                    }
                )
    columns = ["variation", "of", "from", "parameter", "n", "m", "kl", "noise", "piled", "estimator", "why"]
    return pd.DataFrame(rows, columns=columns)


def knn_divergence(
    p: Array, q: Array, *, k: int = NEIGHBOURS, twins: NDArray[np.intp] | None = None
) -> tuple[float, int]:
    """Return the k-nearest-neighbour estimate of D(P‖Q) in nats, and how many points of P are piled up.

    Wang, Kulkarni and Verdú (2009), "Divergence estimation for multidimensional densities via
    k-nearest-neighbor distances", in the form with a bias reduced by one radius for both samples: of
    each point the larger of its distances to the k-th neighbour in P and in Q; the estimate is the
    mean of ψ(l) - ψ(c) plus log(m/(n - 1)), where l other points of P and c of the m of Q lie within that
    radius and ψ is the digamma function. One radius, because the plain form compares unlike ones where
    n and m differ, and finds a difference between a uniform sample and a third of it.

    The samples of a study are paired: a warm start moves each suggestion a little. A point's own
    origin in Q is then far nearer than the law of Q says. ``twins`` are left out of the search; all other
    points of Q are independent of the point if trials are, so each term is what it is for independent
    samples, and the noise that both samples share cancels: no moves give exactly 0, small ones nearly so.

    It is biased towards 0 where laws differ: by 0.06 of ln 4 in one dimension, by up to a half in five
    with some hundred points. Where they do not, it is as often below 0 as above. Where P piles up on
    a point and Q does not, the true divergence is infinite; the estimate is what the points resolve.

    Args:
        p: Points of P, shape (n, d), finite.
        q: Points of Q, shape (m, d), finite.
        k: Number of neighbours.
        twins: For each point of P, the row of Q that it came from; None: independent samples.

    Returns:
        The estimate, NaN with fewer than k + 2 points in P or k + 1 in Q, and the number of points
        of P with at least k others exactly alike.
    """
    paired = twins is not None
    n, m = len(p), len(q) - paired
    if n < k + 2 or m < k + 1:
        return math.nan, 0
    tree_p, tree_q = cKDTree(p), cKDTree(q)
    # Each point is its own nearest neighbour.
    rho = tree_p.query(p, k=k + 1)[0][:, k]
    distance, index = tree_q.query(p, k=k + 1)
    nu = distance[:, k - 1]
    if twins is not None:
        # The k-th of the others is one further where the twin is nearer.
        nu = np.where((index[:, :k] == twins[:, None]).any(axis=1), distance[:, k], nu)
    # The k-th neighbour itself must be within, whatever the rounding.
    radius = np.maximum(rho, nu) * (1 + 1e-12)
    within_p = tree_p.query_ball_point(p, radius, return_length=True) - 1
    within_q = tree_q.query_ball_point(p, radius, return_length=True)
    if twins is not None:
        within_q = within_q - (np.linalg.norm(p - q[twins], axis=1) <= radius)
    value = float(np.mean(digamma(within_p) - digamma(within_q))) + math.log(m / (n - 1))
    return value, int(np.sum(rho == 0))


def benefit(
    steps: pd.DataFrame, trials: pd.DataFrame, reference: str | None = None, *, maximize: bool = True
) -> pd.DataFrame:
    """Return paired trial differences of the validation value beside the size of the hyper-gradient.

    A pair is the trials of two variations with one seed and configuration; they are compared at the
    last epoch at which both have a value.

    Args:
        steps: ``Records.steps``.
        trials: ``Records.trials``.
        reference: The variation that the others are compared with; None: the baseline.
        maximize: Whether higher values are better.

    Returns:
        One row a pair whose gradient is known: ``variation``, ``seed``, ``config_index``,
        ``gradient_norm`` (search coordinates), ``epoch`` and ``benefit`` (variation minus reference,
        the other way round where lower is better).
    """
    pair, columns = ["seed", "config_index"], ["variation", "seed", "config_index"]
    finite = steps[steps["counted"] & steps["val_metric"].notna()]
    reference = reference or baseline_among(steps["variation"])
    theirs = finite.loc[finite["variation"] == reference, [*pair, "epoch", "val_metric"]]
    own = finite.loc[~finite["variation"].isin([reference, PILOT]), [*columns, "epoch", "val_metric"]]
    both = own.merge(theirs, on=[*pair, "epoch"], suffixes=("", "_reference")).sort_values("epoch")
    last = both.drop_duplicates(columns, keep="last")
    difference = last["val_metric"] - last["val_metric_reference"]
    last = last.assign(benefit=difference if maximize else -difference)
    sizes = trials.loc[trials["counted"] & trials["gradient_norm"].notna(), [*columns, "gradient_norm"]]
    table = last.merge(sizes, on=columns).sort_values(columns, ignore_index=True)
    return table[[*columns, "gradient_norm", "epoch", "benefit"]]


def benefit_correlation(table: pd.DataFrame) -> pd.DataFrame:
    """Return Spearman's rank correlation of hyper-gradient size and benefit, one row a variation.

    Args:
        table: What ``benefit`` returns.

    Returns:
        ``variation``, ``pairs``, ``seeds``, ``correlation`` with its 95% percentile interval ``low`` to
        ``high`` over resampled seeds (trials of one seed are not independent).
    """
    rows = []
    for variation, own in table.groupby("variation", sort=False):
        parts = [part[["gradient_norm", "benefit"]].to_numpy() for _, part in own.groupby("seed")]

        def correlation(chosen: Array, parts: list[Array] = parts) -> float:
            data = np.concatenate([parts[int(i)] for i in chosen])
            if np.ptp(data, axis=0).min() == 0:
                return math.nan
            return float(stats.spearmanr(data[:, 0], data[:, 1]).statistic)

        every = np.arange(len(parts), dtype=float)
        value, low, high = correlation(every), math.nan, math.nan
        if len(parts) > 1 and math.isfinite(value):
            with warnings.catch_warnings():
                # Some resamples may have no correlation; the interval is then unknown, which is told.
                warnings.simplefilter("ignore", stats.DegenerateDataWarning)
                interval = stats.bootstrap(
                    (every,),
                    correlation,
                    vectorized=False,
                    n_resamples=RESAMPLES,
                    confidence_level=level(len(parts)),
                    method="percentile",
                    rng=np.random.default_rng(0),
                ).confidence_interval
            low, high = float(interval.low), float(interval.high)
        rows.append((variation, len(own), len(parts), value, low, high))
    return pd.DataFrame(rows, columns=["variation", "pairs", "seeds", "correlation", "low", "high"])


def _warmed(trials: pd.DataFrame) -> pd.DataFrame:
    return trials[(trials["variation"] != PILOT) & trials["counted"] & (trials["warm_starts"] > 0)]


def _share_naming(names: pd.Series, parameter: str) -> float:
    return float(np.mean([parameter in text.split(",") for text in names]))


def _width(bounds: RangeSpec) -> float:
    return math.log10(bounds.high / bounds.low) if bounds.log else bounds.high - bounds.low


def _unit(trials: pd.DataFrame, ranges: Mapping[str, RangeSpec], kind: str) -> Array:
    """Return configurations in unit coordinates, shape (trials, parameters)."""
    columns = []
    for name, bounds in ranges.items():
        values = trials[f"{kind}_{name}"].to_numpy(dtype=float)
        low = math.log10(bounds.low) if bounds.log else bounds.low
        columns.append(((np.log10(values) if bounds.log else values) - low) / _width(bounds))
    return np.stack(columns, axis=1)
