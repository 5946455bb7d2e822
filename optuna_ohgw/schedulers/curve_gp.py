"""BOIL's Gaussian process over configuration and length of training.

Inputs are rows ``[x, t]`` in float64: x in the unit cube, t the length over that of full training.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

from optuna_ohgw.schedulers.curve_scores import compress, standardized

with warnings.catch_warnings():
    # Their import compiles functions in a way that torch has begun to warn of.
    warnings.filterwarnings("ignore", message=".*torch.jit.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*torch.jit.*", category=DeprecationWarning)
    import gpytorch
    from botorch.acquisition.analytic import _log_ei_helper

Array = NDArray[np.float64]

NOISE = 5e-4
_BLOCK = 256
_TINY = 1e-12  # least variance
_MIDPOINTS = (-2.0, 3.0)
_GROWTHS = (0.5, 2.0)
_X_SCALES = (0.01, 10.0)  # times the dimension
_T_SCALES = (0.01, 100.0)


class Hyperparameters(NamedTuple):
    """What is fitted.

    Attributes:
        scale_x: ℓ_x, a squared distance of configurations.
        scale_t: ℓ_t, a squared difference of t.
        midpoint: Midpoint of the logistic weight.
        growth: Growth of the logistic weight.
    """

    scale_x: float
    scale_t: float
    midpoint: float
    growth: float


def default(dimension: int) -> Hyperparameters:
    """Return where every fit starts; ℓ_x is the mean squared distance of uniform configurations."""
    return Hyperparameters(dimension / 6, 1.0, 0.0, 1.0)


class LengthKernel(gpytorch.kernels.Kernel):  # type: ignore[misc]
    """The kernel exp(−‖Δx‖²/ℓ_x − Δt²/ℓ_t); differentiable in both scales."""

    def __init__(self, scale_x: Tensor, scale_t: Tensor) -> None:
        super().__init__()
        self.scale_x, self.scale_t = scale_x, scale_t

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **_: Any) -> Tensor:
        """Return the kernel's matrix, or its diagonal."""
        between_x = self.covar_dist(x1[..., :-1], x2[..., :-1], diag=diag, square_dist=True)
        between_t = self.covar_dist(x1[..., -1:], x2[..., -1:], diag=diag, square_dist=True)
        return torch.exp(-between_x / self.scale_x - between_t / self.scale_t)


class CurveProcess(gpytorch.models.ExactGP):  # type: ignore[misc]
    """A Gaussian process of mean zero and noise 5e-4 on standardised scores."""

    def __init__(self, inputs: Tensor, targets: Tensor, scale_x: Tensor, scale_t: Tensor) -> None:
        noise = torch.full((len(inputs),), NOISE, dtype=torch.float64)
        super().__init__(inputs, targets, gpytorch.likelihoods.FixedNoiseGaussianLikelihood(noise))
        self.mean_module = gpytorch.means.ZeroMean()
        self.covar_module = LengthKernel(scale_x, scale_t)

    def forward(self, inputs: Tensor) -> Any:
        """Return the prior at inputs."""
        return gpytorch.distributions.MultivariateNormal(self.mean_module(inputs), self.covar_module(inputs))


def posterior(inputs: Tensor, targets: Tensor, at: Tensor, fitted: Hyperparameters) -> tuple[Tensor, Tensor]:
    """Return mean and variance ``[m]`` of the process, without noise, at ``[m, d + 1]``.

    Args:
        inputs: Observed ``[n, d + 1]``.
        targets: Standardised scores ``[n]``.
        at: Where to predict.
        fitted: Hyper-parameters.
    """
    scales = torch.tensor(fitted[:2], dtype=torch.float64)
    with torch.no_grad(), _exact():
        model = CurveProcess(inputs, targets, scales[0], scales[1]).eval()
        # In blocks, since GPyTorch makes the whole covariance of what is predicted at once.
        blocks = [model(at[first : first + _BLOCK]) for first in range(0, len(at), _BLOCK)]
        mean = torch.cat([block.mean for block in blocks])
        variance = torch.cat([block.lazy_covariance_matrix.diagonal() for block in blocks])
    # Not `variance`, which warns of the rounding that is cut off here.
    return mean, variance.clamp(min=_TINY)


def log_likelihood(inputs: Tensor, values: Tensor, lengths: Tensor, point: Tensor) -> Tensor:
    """Return the log marginal likelihood over n of the standardised scores.

    Args:
        inputs: Observed ``[n, d + 1]``.
        values: The curve of each ``[n, max_resource]``.
        lengths: Length at which each is cut ``[n]``.
        point: ln ℓ_x, ln ℓ_t, midpoint and growth ``[4]``; the result is differentiable in it.
    """
    targets = standardized(compress(values, lengths, point[2], point[3]))
    with _exact():
        model = CurveProcess(inputs, targets, point[0].exp(), point[1].exp())
        found: Tensor = gpytorch.ExactMarginalLogLikelihood(model.likelihood, model)(model(inputs), targets)
    return found


def fit(inputs: Tensor, values: Tensor, lengths: Tensor) -> Hyperparameters:
    """Return the hyper-parameters of the largest marginal likelihood that L-BFGS-B finds.

    It starts at :func:`default`, so that the same data give the same. Bounds: midpoint [−2, 3],
    growth [0.5, 2]; ℓ_x from 0.01 to 10 times the dimension and ℓ_t from 0.01 to 100.
    """
    dimension = inputs.shape[1] - 1
    start = default(dimension)

    def loss(point: Array) -> tuple[float, Array]:
        free = torch.tensor(point, dtype=torch.float64, requires_grad=True)
        found = -log_likelihood(inputs, values, lengths, free)
        (slope,) = torch.autograd.grad(found, free)
        return found.item(), slope.numpy()

    found = minimize(
        loss,
        [math.log(start.scale_x), math.log(start.scale_t), start.midpoint, start.growth],
        jac=True,
        method="L-BFGS-B",
        bounds=[
            tuple(math.log(bound * dimension) for bound in _X_SCALES),
            tuple(math.log(bound) for bound in _T_SCALES),
            _MIDPOINTS,
            _GROWTHS,
        ],
    )
    log_x, log_t, midpoint, growth = (float(number) for number in found.x)
    return Hyperparameters(math.exp(log_x), math.exp(log_t), midpoint, growth)


def virtual_lengths(
    inputs: Tensor,
    config: Tensor,
    lengths: Sequence[float],
    fitted: Hyperparameters,
    *,
    most: int,
    bound: float,
) -> list[int]:
    """Return which lengths of one curve to add to what is observed, the first chosen first.

    Each is the one of the largest variance given all before it. None is added once ln cond of the
    kernel's matrix of what is observed, without noise, is above the bound; with the noise in it
    ln cond stays below ln(1 + n/5e-4), which is 15 at n = 1634, and would not bind.

    Args:
        inputs: Observed ``[n, d + 1]``, this curve's own point among them.
        config: x of the curve ``[d]``.
        lengths: The t of the lengths that may be added.
        fitted: Hyper-parameters.
        most: Return at most so many.
        bound: Bound of ln cond.
    """
    left, chosen = list(range(len(lengths))), list[int]()
    at = torch.column_stack([config.expand(len(lengths), -1), torch.tensor(lengths, dtype=torch.float64)])
    while left and len(chosen) < most and log_condition(inputs, fitted) <= bound:
        _, variance = posterior(inputs, torch.zeros(len(inputs), dtype=torch.float64), at[left], fitted)
        best = left.pop(int(variance.argmax()))
        chosen.append(best)
        inputs = torch.cat([inputs, at[best : best + 1]])
    return chosen


def log_condition(inputs: Tensor, fitted: Hyperparameters) -> float:
    """Return ln of the condition number of the kernel's matrix without noise; at most 36.04."""
    scales = torch.tensor(fitted[:2], dtype=torch.float64)
    with torch.no_grad():
        matrix = LengthKernel(scales[0], scales[1])(inputs).to_dense()
        values = torch.linalg.eigvalsh(matrix)
    least = values[-1] * torch.finfo(torch.float64).eps  # below it is rounding
    return float((values[-1] / values[0].clamp(min=least)).log())


def log_expected_improvement(mean: Tensor, variance: Tensor, best: Tensor) -> Tensor:
    """Return ln E[max(f − best, 0)] of normal f ``[m]``, exact however small."""
    deviation = variance.sqrt()
    found: Tensor = _log_ei_helper((mean - best) / deviation) + deviation.log()
    return found


def _exact() -> ExitStack:
    """Return GPyTorch's settings for Cholesky factors throughout, and for inputs seen before."""
    stack = ExitStack()
    stack.enter_context(gpytorch.settings.fast_computations(False, False, False))
    stack.enter_context(gpytorch.settings.debug(False))
    return stack
