"""The Gaussian process of DyHPO: a kernel on what a network makes of configuration, budget and curve."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

with warnings.catch_warnings():
    # The import compiles functions by torch.jit.script, which torch deprecates.
    warnings.filterwarnings("ignore", message=r"`torch\.jit")
    import gpytorch
    from gpytorch.constraints import GreaterThan
    from gpytorch.distributions import MultivariateNormal
    from linear_operator.utils.errors import NanError, NotPSDError
    from linear_operator.utils.warnings import NumericalWarning

State = dict[str, Tensor]
HIDDEN, FILTERS, WIDTH, FEATURES = 64, 4, 3, 128
NOISE, LEAST_NOISE = 0.1, 1e-3  # variance at the beginning and at least, of standardised targets
INDEPENDENT = 0.5 * math.log(2 * math.pi * math.e)  # loss per point of a standard normal fit
SEEN = "observations"


class Inputs(NamedTuple):
    """Where a value is observed or predicted.

    Attributes:
        points: Configuration and budget / full budget ``[n, d + 1]``.
        curves: Values before that budget, then zeros ``[n, length]``, length from 3.
    """

    points: Tensor
    curves: Tensor

    def at(self, rows: Tensor) -> Inputs:
        """Return some rows."""
        return Inputs(self.points[rows], self.curves[rows])

    def with_rows(self, other: Inputs) -> Inputs:
        """Return these rows and then others."""
        return Inputs(torch.cat([self.points, other.points]), torch.cat([self.curves, other.curves]))

    def double(self) -> Inputs:
        """Return the same in float64."""
        return Inputs(self.points.double(), self.curves.double())


class Network(nn.Module):
    """The feature extractor of Wistuba et al. 2022.

    Configuration and budget go through a linear layer of 64, batch normalisation and a leaky ReLU; the
    curve before the budget through 4 filters of width 3 and the maximum over all places; both, joined,
    through a linear layer of 128 and a leaky ReLU.

    Args:
        d: Number of hyper-parameters.
    """

    def __init__(self, d: int) -> None:
        super().__init__()
        self.point = nn.Sequential(nn.Linear(d + 1, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.LeakyReLU())
        self.curve = nn.Conv1d(1, FILTERS, WIDTH)
        self.joined = nn.Sequential(nn.Linear(HIDDEN + FILTERS, FEATURES), nn.LeakyReLU())

    def forward(self, points: Tensor, curves: Tensor) -> Tensor:
        """Return features ``[n, 128]`` of points ``[n, d + 1]`` and curves ``[n, length]``."""
        pooled = self.curve(curves.unsqueeze(1)).amax(dim=2)
        return cast(Tensor, self.joined(torch.cat([self.point(points), pooled], dim=1)))


class DeepKernelGP(gpytorch.models.ExactGP):  # type: ignore[misc, unused-ignore]
    """Constant mean and a scaled RBF kernel on the features of a :class:`Network`, with Gaussian noise.

    Args:
        inputs: Where the targets were observed, n from 2.
        targets: ``[n]``, about standardised.
    """

    def __init__(self, inputs: Inputs, targets: Tensor) -> None:
        likelihood = gpytorch.likelihoods.GaussianLikelihood(noise_constraint=GreaterThan(LEAST_NOISE))
        super().__init__(tuple(inputs), targets, likelihood)
        self.network = Network(inputs.points.shape[1] - 1)
        self.mean_module = gpytorch.means.ConstantMean()
        self.covar_module = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())
        likelihood.noise = NOISE

    def forward(self, points: Tensor, curves: Tensor) -> MultivariateNormal:
        """Return the prior of the latent function."""
        features = self.network(points, curves)
        return MultivariateNormal(self.mean_module(features), self.covar_module(features))


def dimension(state: State) -> int:
    """Return the number of hyper-parameters that a state is of."""
    return state["network.point.0.weight"].shape[1] - 1


def fit(
    inputs: Inputs, targets: Tensor, state: State | None, *, steps: int, lr: float, seen: int
) -> State | None:
    """Return the state after steps of Adam on the exact marginal likelihood; None if that fails.

    It fails where the covariance has no Cholesky factor or something is not finite; from scratch also
    where the likelihood never rises, and from a state where it ends below that of independent noise.
    New weights are drawn from torch's generator.

    Args:
        inputs: Where the targets were observed, n from 2.
        targets: ``[n]``, about standardised.
        state: Where to go on; None to begin anew.
        steps: Number of steps.
        lr: Step size.
        seen: Number of observations, which the state keeps.
    """
    model = model_of(inputs, targets, state)
    model.train()
    objective = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
    optimiser = torch.optim.Adam(model.parameters(), lr=lr)
    losses: list[float] = []
    try:
        with _careful(), torch.enable_grad():
            for _ in range(steps):
                optimiser.zero_grad()
                loss = -objective(model(*inputs), targets)
                loss.backward()
                optimiser.step()
                losses.append(loss.item())
    except (NanError, NotPSDError):
        return None
    # The bounds of the kernel's parameters are constants, infinite ones among them.
    kept = {name: value for name, value in model.state_dict().items() if "constraint" not in name}
    found = {name: value.detach().clone() for name, value in kept.items()}
    if not all(bool(torch.isfinite(value).all()) for value in found.values()):
        return None
    bar = INDEPENDENT if state is not None else losses[0]
    if len(losses) > 1 and not losses[-1] < bar:
        return None
    return found | {SEEN: torch.tensor(float(seen))}


def posterior(state: State, inputs: Inputs, targets: Tensor, at: Inputs) -> tuple[Tensor, Tensor] | None:
    """Return mean and standard deviation ``[m]`` of the latent function, in float64; None if it fails.

    Args:
        state: Of a trained process.
        inputs: Evidence.
        targets: ``[n]``.
        at: Where, m of them.
    """
    model = model_of(inputs.double(), targets.double(), state).double()
    model.eval()
    try:
        with _careful(), torch.no_grad():
            found = model(*at.double())
            mean, variance = found.mean, found.variance
    except (NanError, NotPSDError):
        return None
    if not bool(torch.isfinite(mean).all() and torch.isfinite(variance).all()):
        return None
    return mean, variance.clamp_min(1e-12).sqrt()


def expected_improvement(mean: Tensor, std: Tensor, incumbent: Tensor) -> Tensor:
    """Return E[max(f − incumbent, 0)] of f ~ N(mean, std²), a higher f being better; ``[m]`` each."""
    z = (mean - incumbent) / std
    density = (-z.square() / 2).exp() / math.sqrt(2 * math.pi)
    return torch.clamp_min(std * (z * torch.special.ndtr(z) + density), 0)


def model_of(inputs: Inputs, targets: Tensor, state: State | None) -> DeepKernelGP:
    """Return the process with the weights of a state, or new ones, conditioned on observations."""
    model = DeepKernelGP(inputs, targets)
    if state is not None:
        weights = {name: value for name, value in state.items() if name != SEEN}
        model.load_state_dict(model.state_dict() | weights)
    return model


@contextmanager
def _careful() -> Iterator[None]:
    """Exact algebra at every size; jitter that was needed is no one's concern."""
    with warnings.catch_warnings(), gpytorch.settings.max_cholesky_size(10**6):
        warnings.simplefilter("ignore", NumericalWarning)
        yield
