"""Learning curves as scores, and what training costs: the parts of BOIL without a Gaussian process."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]

_SPAN = 6.0  # the logistic weight is laid over z from -6 to 6
_QUANTILE = 0.75  # of the first losses of the curves, where values end
_FENCE = 10.0  # values end at the latest so many times as far from the best as the median
_FLOOR = 0.5  # of a predicted cost


def value_range(curves: Sequence[Array]) -> tuple[float, float]:
    """Return the losses that count as values 1 and 0.

    1 is the best loss of all. 0 is the third quartile of the first finite loss of each curve, but at
    most ten times as far from the best as their median: so a loss of 1e34 moves nothing while fewer
    than half of the curves begin there. Both are 0 where no loss is finite.

    Args:
        curves: Losses of each curve; NaN and ±∞ are no losses.
    """
    known = [finite for curve in curves if len(finite := curve[np.isfinite(curve)])]
    if not known:
        return 0.0, 0.0
    low = min(float(curve.min()) for curve in known) / 2  # halves keep the differences finite
    firsts = np.array([curve[0] for curve in known]) / 2
    fence = min(_FENCE * (float(np.median(firsts)) - low), np.finfo(np.float64).max / 4)
    return 2 * low, 2 * min(float(np.quantile(firsts, _QUANTILE)), low + fence)


def clipped_values(losses: Array, low: float, high: float) -> Array:
    """Return values in [0, 1], higher is better: 1 at the loss ``low``, 0 from ``high`` on.

    A curve that holds NaN or ±∞ diverged, and has the value 0 everywhere.
    """
    if not np.isfinite(losses).all():
        return np.zeros(len(losses))
    if high <= low:
        return np.where(losses <= low, 1.0, 0.0)
    values: Array = np.clip((high / 2 - losses / 2) / (high / 2 - low / 2), 0.0, 1.0)
    return values


def logistic_weights(max_resource: int, midpoint: Tensor, growth: Tensor) -> Tensor:
    """Return σ(growth·(z − midpoint)) ``[max_resource]``, z evenly from −6 to 6 over full training.

    Differentiable in ``midpoint`` and ``growth``, both scalars.
    """
    z = torch.linspace(-_SPAN, _SPAN, max_resource, dtype=torch.float64)
    return torch.sigmoid(growth * (z - midpoint))


def compress(
    values: Tensor, lengths: Tensor, midpoint: Tensor, growth: Tensor, *, normalized: bool = True
) -> Tensor:
    """Return the score of each curve ``[n]``, cut at its length: its mean under the logistic weight.

    Σ value·weight / Σ weight over the units of training up to the length. ``normalized=False`` is
    the paper's form, which divides by the length: Σ value·weight / length.

    Args:
        values: Curves ``[n, max_resource]``; what lies past a curve's length does not matter.
        lengths: Length of each ``[n]``, from 1.
        midpoint: Place in [−6, 6] where the weight is half.
        growth: Steepness of the weight.
        normalized: Divide by the sum of the weights.
    """
    weights = logistic_weights(values.shape[1], midpoint, growth)
    inside = torch.arange(values.shape[1]) < lengths[:, None]
    total = (torch.where(inside, values, 0.0) * weights).sum(1)
    return total / ((inside * weights).sum(1) if normalized else lengths)


def standardized(scores: Tensor) -> Tensor:
    """Return scores less their mean, over their standard deviation; zeros where all are equal."""
    centred = scores - scores.mean()
    return centred / (centred.square().mean() + 1e-18).sqrt()


def length_grid(max_resource: int, count: int) -> list[int]:
    """Return at most ``count`` lengths from 1 to ``max_resource``, each about the same factor on."""
    return sorted({round(float(t)) for t in np.geomspace(1, max_resource, min(count, max_resource))})


def fit_cost(configs: Array, lengths: Array, costs: Array) -> Array:
    """Return coefficients ``[d + 2]`` of the cost, by least squares: of x, of the length, and 1.

    As long as the observations do not settle them all, as d + 1 of them or equal lengths cannot, the
    cost is taken as proportional to the length.

    Args:
        configs: x of each observation ``[n, d]``.
        lengths: Units of training ``[n]``.
        costs: What they took ``[n]``.
    """
    design = np.column_stack([configs, lengths, np.ones(len(configs))])
    coefficients: Array = np.zeros(design.shape[1])
    found, _, rank, _ = np.linalg.lstsq(design, costs, rcond=None)
    if rank == design.shape[1]:
        coefficients[:] = found
    else:
        coefficients[-2] = costs.sum() / lengths.sum()
    return coefficients


def predicted_cost(coefficients: Array, configs: Array, begins: Array, ends: Array) -> Array:
    """Return the cost ``[m]`` of going on from one length to another, at least 0.5.

    From scratch it is the whole of the regression, else only the difference of its two lengths. A
    slope that is not positive, which a regression may give, ends at the floor.

    Args:
        coefficients: What :func:`fit_cost` returns.
        configs: x of each ``[m, d]``.
        begins: Units of training done ``[m]``; 0 from scratch.
        ends: Units of training at the end ``[m]``.
    """
    start = np.where(begins > 0, 0.0, configs @ coefficients[:-2] + coefficients[-1])
    cost: Array = np.maximum(start + coefficients[-2] * (ends - begins), _FLOOR)
    return cost
