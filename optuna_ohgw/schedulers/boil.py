"""BOIL: a Gaussian process over configuration and length of training chooses both."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from optuna_ohgw.schedulers.base import Decision
from optuna_ohgw.schedulers.choosing import Array, Choice, Chooser
from optuna_ohgw.schedulers.curve_gp import (
    default,
    fit,
    log_expected_improvement,
    posterior,
    virtual_lengths,
)
from optuna_ohgw.schedulers.curve_scores import (
    clipped_values,
    compress,
    fit_cost,
    length_grid,
    predicted_cost,
    standardized,
    value_range,
)

_LENGTHS = 12  # lengths to choose from
_VIRTUAL = 3  # virtual points of a course
_ROWS = 400  # points of both kinds, beyond which no virtual one is added
_LOG_CONDITION = 15.0
_EARLY = 0.1  # share of full training up to which random starts are sent


class _Point(NamedTuple):
    config: int
    length: int


class Boil(Chooser):
    """Bayesian optimization for iterative learning, Nguyen, Schulze and Osborne 2020.

    A point is a candidate x and a length t at which it was paused or stopped. Its learning curve up
    to t is compressed to one score (:func:`curve_scores.compress`), and a Gaussian process on
    (x, t / ``max_resource``) with the kernel exp(−‖Δx‖²/ℓ_x − Δt²/ℓ_t) and noise 5e-4 models the
    scores, standardised. ℓ_x, ℓ_t and the weight's midpoint and growth have the largest marginal
    likelihood, found by L-BFGS-B after the first d + 1 points and again every 2d. Each point
    brings up to three virtual points, shorter lengths of the same curve, each where the variance is
    largest, until ln cond > 15. The choice is the candidate and the length of the largest
    ln EI − ln cost, EI over the best score among all points, the cost by linear regression on (x, t).

    Departures from the paper:

    - The pool is finite, and the lengths are at most 12, from 1 to ``max_resource``, each about the
      same factor on; x and t are gone through, not optimised.
    - A paused candidate is resumed: its cost is only that of the units past where it is. The costs
      are units of training, so that the regression finds the length itself; x enters where a caller's
      costs differ (:func:`curve_scores.fit_cost`).
    - The value in the score is the loss, clipped and scaled to 1 (the best of all) … 0 (the third
      quartile of the curves' first losses, see :func:`curve_scores.value_range`). A curve that diverged is 0
      everywhere: it is never resumed, and warns of its neighbours.
    - The score is divided by the sum of the weights in place of the length. Else the score of a
      short curve is near 0 however good it is, since the weight begins near 0.
    - The condition number is that of the kernel's matrix without noise (:func:`curve_gp.virtual_lengths`).
    - Several workers: those that run count as points at their ends with the mean predicted there,
      beside which less is to be gained. Their curves count once they pause.
    - The first d + 1 points are of random candidates, at random lengths of the 12 up to a tenth of
      ``max_resource``. More workers than d + 1 start more.

    What was fitted at a point depends on the points before it alone, in the order in which they
    came: a scheduler made again from the same events chooses the same. A choice takes O(n³) time in
    the points and O(n²·m) in the m candidates times lengths. Virtual points end at 400 points in all.

    Args:
        max_resource: Resource of full training.
        candidates: Configurations ``[n, d]`` in the unit cube.
        maximize: Whether higher values are better.
        seed: Seed of the random starts.

    Attributes:
        fitted: Hyper-parameters of the last choice.
    """

    name = "boil"

    def __init__(
        self, max_resource: int, candidates: Array, *, maximize: bool = False, seed: int = 0
    ) -> None:
        super().__init__(max_resource, candidates, maximize=maximize, seed=seed)
        count, dimension = candidates.shape
        self.fitted = default(dimension)
        self._initial = dimension + 1
        self._every = 2 * dimension
        self._lengths = length_grid(max_resource, _LENGTHS)
        random = np.random.default_rng(np.random.SeedSequence(seed))
        early = [t for t in self._lengths if t <= max(_EARLY * max_resource, 1)]
        order = [int(config) for config in random.permutation(np.arange(count))]
        places = random.integers(0, len(early), size=(count,))
        self._starts = [_Point(order[i], early[int(places[i])]) for i in range(count)]
        self._points: list[_Point] = []  # in the order in which they came
        self._rows: list[_Point] = []  # with the virtual ones
        self._folded = 0  # points that are in the rows

    def _decide(self, config: int, resource: int, value: float) -> Decision:
        course = self.courses[config]
        decision = super()._decide(config, resource, value)
        if not course.running:
            self._points.append(_Point(config, min(course.resource, self.max_resource)))
        return decision

    def choose(self) -> Choice | None:
        """Return the candidate and the length of the largest ln EI − ln cost."""
        if len(self._points) < self._initial:
            for config, length in self._starts:
                if config not in self.courses:
                    return Choice(config, length, None, "random start")
        options = self._options()
        if not options:
            return None
        self._fold()
        inputs, values, lengths = self._data(self._rows, self._points)
        weight = torch.tensor(self.fitted[2:], dtype=torch.float64)
        targets = standardized(compress(values, lengths, weight[0], weight[1]))
        best = targets.max()
        running = [_Point(config, course.until) for config, course in self.courses.items() if course.running]
        if running:
            ends = self._inputs(running)
            believed, _ = posterior(inputs, targets, ends, self.fitted)
            inputs, targets = torch.cat([inputs, ends]), torch.cat([targets, believed])
        mean, variance = posterior(inputs, targets, self._inputs(options), self.fitted)
        gain = log_expected_improvement(mean, variance, best).numpy() - np.log(self._costs(options))
        chosen = int(np.argmax(gain))
        return Choice(*options[chosen], float(gain[chosen]), self.name)

    def _options(self) -> list[_Point]:
        begins = dict.fromkeys(self.fresh, 0)
        begins.update({config: self.courses[config].resource for config in self.paused})
        return [_Point(c, t) for c, begin in begins.items() for t in self._lengths if t > begin]

    def _fold(self) -> None:
        """Take in the points that came since, one by one, each with what was known then alone."""
        while self._folded < len(self._points):
            point = self._points[self._folded]
            self._folded += 1
            self._rows.append(point)
            self._add_virtual(point)
            since = self._folded - self._initial
            if since >= 0 and since % self._every == 0:
                self.fitted = fit(*self._data(self._rows, self._points[: self._folded]))

    def _add_virtual(self, point: _Point) -> None:
        config, length = point
        known = {row.length for row in self._rows if row.config == config}
        left = [t for t in self.courses[config].resources if t < length and t not in known]
        added = virtual_lengths(
            self._inputs(self._rows),
            torch.from_numpy(self.candidates[config]),
            [t / self.max_resource for t in left],
            self.fitted,
            most=min(_VIRTUAL, _ROWS - len(self._rows)),
            bound=_LOG_CONDITION,
        )
        self._rows += [_Point(config, left[place]) for place in added]

    def _inputs(self, rows: list[_Point]) -> Tensor:
        configs, lengths = np.array(rows).T
        return torch.from_numpy(np.column_stack([self.candidates[configs], lengths / self.max_resource]))

    def _data(self, rows: list[_Point], points: list[_Point]) -> tuple[Tensor, Tensor, Tensor]:
        """Return inputs, values ``[n, max_resource]`` and lengths of rows, as the points tell."""
        curves = {config: self._curve(config, length) for config, length in points}  # the last of each
        low, high = value_range(list(curves.values()))
        values = np.zeros((len(rows), self.max_resource))
        scaled = {config: clipped_values(curve, low, high) for config, curve in curves.items()}
        for row, (config, length) in enumerate(rows):
            values[row, :length] = scaled[config][:length]
        lengths = torch.tensor([row.length for row in rows])
        return self._inputs(rows), torch.from_numpy(values), lengths

    def _curve(self, config: int, length: int) -> Array:
        """Return the loss of every unit up to a length; a unit without a report has the next one's."""
        course = self.courses[config]
        places = np.searchsorted(course.resources, np.arange(1, length + 1))
        return np.array(course.losses)[places]

    def _costs(self, options: list[_Point]) -> Array:
        seen, lengths = np.array(self._points).T
        coefficients = fit_cost(self.candidates[seen], lengths.astype(float), lengths.astype(float))
        configs, ends = np.array(options).T
        begins = np.array([self.courses[c].resource if c in self.courses else 0 for c in configs])
        return predicted_cost(coefficients, self.candidates[configs], begins, ends)
