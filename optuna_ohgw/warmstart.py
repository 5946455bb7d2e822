"""The warm start: estimator and step rule together, with a record of what was done and its cost."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from optuna_ohgw.hypergrad import ESTIMATORS, HyperGradient
from optuna_ohgw.lookahead import LookaheadLoss
from optuna_ohgw.peak_memory import restart_peak
from optuna_ohgw.space import SearchSpace
from optuna_ohgw.step import (
    best_candidate,
    gaussian_step,
    random_gradient,
    raw_step,
    unit_direction,
    unit_step,
)

Rule = Literal["raw", "trust-region", "line-search", "lr-grid", "gaussian"]


@dataclass(frozen=True)
class WarmStart:
    """How ψ is moved before training.

    Attributes:
        rule: ``raw`` (ψ ← ψ − η_h·g), ``trust-region``, ``line-search``, ``lr-grid`` (no
            gradient: a few learning rates scored by the horizon-``grid_horizon`` loss) or
            ``gaussian`` (no gradient: noise of deviation ``sigma``).
        steps: Number of steps, each with a fresh gradient on fresh mini-batches.
        random: Replace every step by a random one of the same length: the matched control, as long
            as its twin's step after clipping to the bounds (and clipped in its turn). It changes
            nothing where the rule takes no gradient.
        estimator: Name of an estimator in ``hypergrad.ESTIMATORS``; None: ``lean`` for a
            :class:`LookaheadLoss`, ``exact`` for any other loss.
        eta_h: Step size of ``raw``, in search coordinates.
        radius: Length of a ``trust-region`` step, in unit coordinates.
        lengths: Lengths that ``line-search`` tries beside 0, in unit coordinates.
        grid: Offsets of the learning rate that ``lr-grid`` tries beside 0, in unit coordinates.
        grid_horizon: Horizon of the loss that scores the grid.
        sigma: Deviation of ``gaussian``, in search coordinates.
        freeze: Names of parameters left alone.
        snr_batches: Mini-batch sets over which a gradient is averaged and its signal-to-noise
            ratio |mean|/standard error found; 0: one set, no ratio. Its cost is charged.
        min_snr: Components with a smaller ratio do not move.

    Raises:
        ValueError: If a number is out of its range or ``min_snr`` lacks ``snr_batches`` ≥ 2.
    """

    rule: Rule = "raw"
    steps: int = 1
    random: bool = False
    estimator: str | None = None
    eta_h: float = 1e-3
    radius: float = 0.2
    lengths: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4)
    grid: tuple[float, ...] = (-0.4, -0.2, 0.2, 0.4)
    grid_horizon: int = 5
    sigma: float = 0.01
    freeze: tuple[str, ...] = ()
    snr_batches: int = 0
    min_snr: float | None = None

    def __post_init__(self) -> None:
        if self.rule not in get_args(Rule):
            raise ValueError(f"rule must be one of {get_args(Rule)} but got {self.rule!r}")
        for name in ("eta_h", "radius", "sigma"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                wanted = "finite" if value == math.inf else "positive"
                raise ValueError(f"{name} must be {wanted} but got {value}")
        if not all(0 < length < math.inf for length in self.lengths):
            raise ValueError(f"lengths must be positive and finite but got {self.lengths}")
        if self.grid_horizon < 1:
            raise ValueError(f"grid_horizon must be at least 1 but got {self.grid_horizon}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1 but got {self.steps}")
        if self.estimator is not None and self.estimator not in ESTIMATORS:
            raise ValueError(f"estimator must be one of {sorted(ESTIMATORS)} but got {self.estimator!r}")
        if self.snr_batches == 1 or self.snr_batches < 0:
            raise ValueError(f"snr_batches must be 0 or at least 2 but got {self.snr_batches}")
        if self.min_snr is not None and not self.snr_batches:
            raise ValueError("min_snr needs snr_batches of at least 2 but got 0")


@dataclass(frozen=True)
class Warmed:
    """What came of a warm start.

    Attributes:
        psi: Native values to train with; a parameter that did not move keeps its exact float.
        record: JSON-ready account: suggested and trained ψ, gradient and step (search
            coordinates), methods, cost in mbu (charged, and without a gradient that only a
            control's magnitude needed), seconds, peak memory in bytes, reason of no step.
    """

    psi: dict[str, float]
    record: dict[str, Any]


def warm_start(
    loss: Any,
    space: SearchSpace,
    suggested: Mapping[str, float],
    settings: WarmStart,
    generator: torch.Generator,
    *,
    frozen: Collection[str] = (),
) -> Warmed:
    """Return ψ moved by one warm start, before training.

    A loss or gradient that is not finite, or whose norm overflows, moves nothing; the record says
    why and the trial goes on. Nothing else is touched: weights, buffers and random streams stay.

    Args:
        loss: ψ ↦ scalar; a :class:`LookaheadLoss` gives fresh mini-batches for every step.
        space: The continuous hyper-parameters.
        suggested: Their native values.
        settings: Rule, estimator and step sizes.
        generator: CPU generator of the random control; gradients draw nothing from it.
        frozen: Further names to leave alone (values that a user fixed).
    """
    started = time.perf_counter()
    device = _device(loss)
    if device.type == "cuda":
        restart_peak(device)
    z = z0 = space.clip(space.to_search(suggested))
    unknown = sorted(set(settings.freeze) - set(space.names))
    if unknown:
        raise ValueError(f"freeze names {unknown}, which are not among {list(space.names)}")
    held = {*settings.freeze, *frozen}
    free = torch.tensor([name not in held for name in space.names])
    cost = uncharged = 0.0
    reason: str | None = None
    last: HyperGradient | None = None
    snr: Tensor | None = None
    for step in range(settings.steps):
        if settings.rule == "gaussian":
            z = gaussian_step(space, z, settings.sigma, free, generator)
            continue
        if settings.rule == "lr-grid":
            z, spent, reason = _lr_grid(loss, space, z, settings, free, step)
            cost, uncharged = cost + spent, uncharged + spent
            continue
        last, snr = _gradient(loss, space, z, settings, step)
        cost += last.cost_mbu
        uncharged += 0.0 if settings.random else last.cost_mbu
        gradient = torch.where(free, last.gradient, 0.0)
        reason = _unusable(last.loss, gradient)
        if reason is not None:
            reason = f"step {step + 1}: {reason}" if step else reason
            break
        if snr is not None and settings.min_snr is not None:
            gradient = torch.where(snr >= settings.min_snr, gradient, 0.0)
        candidates = _candidates(space, z, gradient, settings)
        if settings.random:
            candidates = _as_long(space, z, candidates, settings, generator)
        if settings.rule == "line-search":
            z, spent, reason = _search(_at(loss, step * max(1, settings.snr_batches)), space, candidates)
            cost, uncharged = cost + spent, uncharged + spent
        else:
            z = candidates[-1]
    if reason is not None:
        z = z0
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    moved = space.to_floats(z)
    psi = {n: suggested[n] if z[i] == z0[i] else moved[n] for i, n in enumerate(space.names)}
    record = {
        "suggested": dict(suggested),
        "trained": psi,
        "rule": settings.rule,
        "random": settings.random,
        "gradient": _named(space, last.gradient) if last else None,
        "loss": _finite(last.loss) if last else None,
        "methods": last.methods if last else None,
        "step": _named(space, z - z0),
        "snr": _named(space, snr) if snr is not None else None,
        "at_bound": [n for i, n in enumerate(space.names) if z[i] in (space.low[i], space.high[i])],
        "cost_mbu": cost,
        "cost_uncharged_mbu": uncharged,
        "seconds": time.perf_counter() - started,
        "peak_bytes": _peak_bytes(device),
        "reason": reason,
    }
    return Warmed(psi, record)


def _candidates(space: SearchSpace, z: Tensor, gradient: Tensor, settings: WarmStart) -> list[Tensor]:
    if settings.rule == "raw":
        return [raw_step(space, z, gradient, settings.eta_h)]
    direction = unit_direction(space, gradient)
    if settings.rule == "trust-region":
        return [unit_step(space, z, direction, settings.radius)]
    return [unit_step(space, z, direction, length) for length in (0.0, *settings.lengths)]


def _as_long(
    space: SearchSpace,
    z: Tensor,
    candidates: list[Tensor],
    settings: WarmStart,
    generator: torch.Generator,
) -> list[Tensor]:
    """Return points as far from z as the twin's are after clipping, in one random direction."""
    scale = torch.ones_like(z) if settings.rule == "raw" else 1 / space.width
    lengths = [torch.linalg.vector_norm((c - z) * scale) for c in candidates]
    longest = max(range(len(lengths)), key=lambda i: float(lengths[i]))
    step = random_gradient(candidates[longest] - z, scale, generator)
    if lengths[longest] == 0:
        return candidates
    return [space.clip(z + step * (length / lengths[longest])) for length in lengths]


def _gradient(
    loss: Any, space: SearchSpace, z: Tensor, settings: WarmStart, step: int
) -> tuple[HyperGradient, Tensor | None]:
    name = settings.estimator or ("lean" if isinstance(loss, LookaheadLoss) else "exact")
    count = max(1, settings.snr_batches)
    try:
        sets = [ESTIMATORS[name](_at(loss, step * count + j), space, z) for j in range(count)]
    except RuntimeError as failure:
        if "derivative for" not in str(failure):  # torch raises no class of its own
            raise
        reason = str(failure).splitlines()[0]
        remedy = "a layer cannot be differentiated twice; set horizon 1 and lean, or finite-difference"
        raise RuntimeError(f"{reason}: {remedy}") from failure
    stacked = torch.stack([s.gradient for s in sets])
    mean = HyperGradient(
        sum(s.loss for s in sets) / count, stacked.mean(0), sum(s.cost_mbu for s in sets), sets[0].methods
    )
    if count == 1:
        return mean, None
    error = stacked.std(0) / math.sqrt(count)
    return mean, torch.where(error > 0, mean.gradient.abs() / error, torch.inf)


def _lr_grid(
    loss: Any, space: SearchSpace, z: Tensor, settings: WarmStart, free: Tensor, step: int
) -> tuple[Tensor, float, str | None]:
    if "lr" not in space.names or not free[space.names.index("lr")]:
        return z, 0.0, None
    direction = torch.tensor([float(name == "lr") for name in space.names], dtype=torch.float64)
    candidates = [z, *(unit_step(space, z, direction, offset) for offset in settings.grid)]
    longer = loss.with_horizon(settings.grid_horizon) if hasattr(loss, "with_horizon") else loss
    return _search(_at(longer, step), space, candidates)


def _search(loss: Any, space: SearchSpace, candidates: list[Tensor]) -> tuple[Tensor, float, str | None]:
    with torch.no_grad():
        best, values = best_candidate(candidates, lambda z: float(loss(space.to_native(z))))
    reason = None if any(map(math.isfinite, values)) else "no candidate has a finite loss"
    return best, len(candidates) * float(getattr(loss, "cost_mbu", 1 / 3)), reason


def _at(loss: Any, position: int) -> Any:
    return loss.draw(position) if hasattr(loss, "draw") else loss


def _unusable(loss: float, gradient: Tensor) -> str | None:
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if not torch.isfinite(gradient).all():
        return "the hyper-gradient is not finite"
    if not torch.isfinite(torch.linalg.vector_norm(gradient)):
        return "the norm of the hyper-gradient overflows"
    return None


def _named(space: SearchSpace, values: Tensor) -> dict[str, float | None]:
    return {name: _finite(v) for name, v in zip(space.names, values.tolist(), strict=True)}


def _finite(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _device(loss: Any) -> torch.device:
    if isinstance(loss, LookaheadLoss):
        return next(loss.model.parameters()).device
    return torch.device("cpu")


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
