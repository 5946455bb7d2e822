"""Step rules: where ψ goes, given a hyper-gradient. All vectors are ``[d]`` float64.

``z`` is in search coordinates and so is the gradient. Every rule clips its result to the bounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from optuna_ohgw.space import SearchSpace


def raw_step(space: SearchSpace, z: Tensor, gradient: Tensor, eta_h: float) -> Tensor:
    """Return z − η_h·g, the published rule, in search coordinates."""
    return space.clip(z - eta_h * gradient)


def unit_direction(space: SearchSpace, gradient: Tensor) -> Tensor:
    """Return −g/‖g‖ with g taken to unit coordinates; zero for a zero gradient."""
    in_unit = gradient * space.width
    norm = torch.linalg.vector_norm(in_unit)
    return -in_unit / norm if norm > 0 else torch.zeros_like(in_unit)


def unit_step(space: SearchSpace, z: Tensor, direction: Tensor, length: float) -> Tensor:
    """Return z moved by ``length`` along a direction in unit coordinates.

    With the direction of :func:`unit_direction` this is the trust-region rule of radius
    ``length``: the minimiser of the linear model of the loss in a ball.
    """
    return space.clip(z + length * direction * space.width)


def best_candidate(
    candidates: Sequence[Tensor], value: Callable[[Tensor], float]
) -> tuple[Tensor, list[float]]:
    """Return the candidate of the lowest finite value and all values; ties go to the first.

    Cost: one evaluation a candidate.
    """
    values = [value(candidate) for candidate in candidates]
    ranked = [v if math.isfinite(v) else math.inf for v in values]
    return candidates[ranked.index(min(ranked))], values


def random_gradient(like: Tensor, scale: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random vector as long as ``like``, both measured in coordinates scaled by ``scale``.

    The direction is uniform on the sphere of the components where ``like`` is not zero: the
    matched control of a hyper-gradient, with the same components moved.
    """
    direction = torch.randn(like.shape, generator=generator, dtype=torch.float64) * (like != 0)
    norm = torch.linalg.vector_norm(direction)
    if norm == 0:
        return torch.zeros_like(like)
    scaled: Tensor = direction / norm * torch.linalg.vector_norm(like * scale) / scale
    return scaled


def gaussian_step(
    space: SearchSpace, z: Tensor, sigma: float, free: Tensor, generator: torch.Generator
) -> Tensor:
    """Return z plus Gaussian noise of deviation σ in search coordinates where ``free`` is true."""
    noise = torch.randn(z.shape, generator=generator, dtype=torch.float64)
    return space.clip(z + sigma * noise * free)
