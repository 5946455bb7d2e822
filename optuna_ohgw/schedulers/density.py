"""The model of BOHB: kernel densities of the good and of the bad configurations of a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import truncnorm
from statsmodels.nonparametric import kernels

Array = NDArray[np.float64]

GOOD_PERCENT = 15
SAMPLES = 64
RANDOM_FRACTION = 1 / 3
BANDWIDTH_FACTOR = 3.0
MIN_BANDWIDTH = 1e-3
_TINY = 1e-32  # a density below it counts as it, so that no ratio is 0/0


def split_sizes(points: int, dimensions: int) -> tuple[int, int] | None:
    """Return how many of the best and of the worst points of a budget are modelled; None: too few.

    Falkner et al. 2018, section 4: with N_min = d + 1 a budget is modelled from N_min + 2 points on,
    by the best max(N_min, 15%) and the worst max(N_min, the others). With few points a point may be
    on both sides. The 15% are rounded down. The authors' implementation differs: there no point is
    on both sides, so that it models from 2·N_min points on.

    Args:
        points: Observations at the budget.
        dimensions: d, the number of hyper-parameters.
    """
    least = dimensions + 1
    if points < least + 2:
        return None
    good = max(least, points * GOOD_PERCENT // 100)
    return good, max(least, points - good)


@dataclass(frozen=True)
class Density:
    """A product kernel density of statsmodels' kernels: Gaussian, and Aitchison and Aitken's.

    Attributes:
        points: Observations ``[n, d]``: numbers in the unit cube, categories as indices from 0.
        bandwidths: Bandwidths ``[d]``, in the units of the points.
        levels: Number of categories of each dimension, 0 for a number.
    """

    points: Array
    bandwidths: Array
    levels: tuple[int, ...]

    def at(self, points: Array) -> Array:
        """Return the density ``[m]`` at points ``[m, d]``. Mass outside the cube is not moved into it."""
        terms = np.ones((len(self.points), len(points)))
        for k, levels in enumerate(self.levels):
            own, bandwidth, there = self.points[:, k], self.bandwidths[k], points[:, k]
            if levels == 0:
                terms *= kernels.gaussian(bandwidth, own[:, None], there[None, :]) / bandwidth
            elif levels > 1:
                of_level = [
                    kernels.aitchison_aitken(bandwidth, own, c, num_levels=levels) for c in range(levels)
                ]
                terms *= np.stack(of_level, axis=1)[:, there.astype(int)]
        return np.asarray(terms.mean(axis=0), dtype=np.float64)


def fit_density(points: Array, levels: Sequence[int]) -> Density:
    """Return a density with the bandwidths of the normal reference rule, 1.06·σ·n^(-1/(4 + d)).

    It equals statsmodels' ``KDEMultivariate`` with ``bw="normal_reference"`` where that has an answer:
    that counts the categories in the data, divides by zero where there is one, and warns of its
    unused generator from version 0.15 on. Bandwidths are at least 1e-3. Departure: that of a category of
    c levels is at most (c - 1)/c, where the kernel is uniform; beyond, it would rate a category
    below those never seen.

    Args:
        points: Observations ``[n, d]``.
        levels: As in :class:`Density`.
    """
    count, dimensions = points.shape
    found = 1.06 * points.std(axis=0) * count ** (-1 / (4 + dimensions))
    most = [(c - 1) / c if c > 1 else np.inf for c in levels]
    return Density(points, np.clip(found, MIN_BANDWIDTH, most), tuple(levels))


@dataclass(frozen=True)
class Model:
    """The densities l and g of the good and the bad configurations of one budget.

    Attributes:
        budget: Resource at which the configurations were compared.
        good: Density l.
        bad: Density g.
    """

    budget: float
    good: Density
    bad: Density

    def ratios(self, points: Array) -> Array:
        """Return g/l ``[m]`` at points ``[m, d]``, lower is better; a density is at least 1e-32."""
        return np.asarray(np.maximum(self.bad.at(points), _TINY) / np.maximum(self.good.at(points), _TINY))

    def sample(self, count: int, rng: np.random.Generator) -> Array:
        """Return points ``[count, d]`` around good ones, drawn evenly: Algorithm 2's l'.

        Numbers are normal with 3 times the bandwidth of l, truncated to [0, 1]. A category is kept with
        probability 1 - bandwidth, else drawn evenly, as the authors' implementation does.
        """
        good = self.good
        centres = good.points[rng.integers(len(good.points), size=count)]
        drawn = centres.copy()
        for k, levels in enumerate(good.levels):
            if levels:
                moved = rng.random(count) < good.bandwidths[k]
                drawn[:, k] = np.where(moved, rng.integers(levels, size=count), centres[:, k])
            else:
                scale = BANDWIDTH_FACTOR * good.bandwidths[k]
                low, high = -centres[:, k] / scale, (1 - centres[:, k]) / scale
                drawn[:, k] = truncnorm.rvs(low, high, centres[:, k], scale, size=count, random_state=rng)
        drawn[:, np.array(good.levels) == 0] = drawn[:, np.array(good.levels) == 0].clip(0.0, 1.0)
        return drawn

    def weights(self, points: Array) -> Array:
        """Return the density ``[m]`` by which :meth:`sample` would draw each of the points ``[m, d]``."""
        good = self.good
        terms = np.ones((len(good.points), len(points)))
        for k, levels in enumerate(good.levels):
            own, there = good.points[:, k, None], points[None, :, k]
            if levels:
                moved = good.bandwidths[k]
                terms *= np.where(own == there, 1 - moved, 0.0) + moved / levels
            else:
                scale = BANDWIDTH_FACTOR * good.bandwidths[k]
                terms *= truncnorm.pdf(there, -own / scale, (1 - own) / scale, own, scale)
        return np.asarray(terms.mean(axis=0), dtype=np.float64)


def fit_model(observed: Mapping[float, tuple[Array, Array]], levels: Sequence[int]) -> Model | None:
    """Return the model of the largest budget that has enough points; None if none has.

    Falkner et al. 2018, Algorithm 2. A loss that is not finite is a crash and counts as +∞. Departure:
    a crash is never among the good ones, so a budget also needs d + 1 finite losses, and the good
    ones are fewer where there are no more.

    Args:
        observed: Points ``[n, d]`` and losses ``[n]``, lower is better, by budget. Of equal losses the
            first is the better.
        levels: As in :class:`Density`.
    """
    for budget in sorted(observed, reverse=True):
        points, losses = observed[budget]
        finite = np.isfinite(losses)
        sizes = split_sizes(len(losses), len(levels))
        if sizes is None or finite.sum() <= len(levels):
            continue
        order = np.argsort(np.where(finite, losses, np.inf), kind="stable")
        good, bad = order[: min(sizes[0], int(finite.sum()))], order[-sizes[1] :]
        return Model(budget, fit_density(points[good], levels), fit_density(points[bad], levels))
    return None


def propose(model: Model, rng: np.random.Generator, count: int = SAMPLES) -> tuple[Array, float]:
    """Return the best ``[d]`` of so many samples around good points, and its g/l."""
    points = model.sample(count, rng)
    ratios = model.ratios(points)
    best = int(ratios.argmin())
    return points[best], float(ratios[best])


def pick(model: Model, points: Array, rng: np.random.Generator, count: int = SAMPLES) -> tuple[int, float]:
    """Return the index of the best of ``[m, d]`` given points, and its g/l.

    The finite form of :func:`propose`: so many are drawn, each as likely as :meth:`Model.sample` would
    draw it, and again if it falls on the same. Evenly if no point is where a sample could be.
    """
    weights = model.weights(points)
    weights = weights if weights.max() > _TINY else np.ones(len(points))
    drawn = np.unique(rng.choice(len(points), size=count, p=weights / weights.sum()))
    ratios = model.ratios(points[drawn])
    best = int(ratios.argmin())
    return int(drawn[best]), float(ratios[best])
