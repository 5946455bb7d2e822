"""Hyper-gradient estimators: one signature, pure functions of tensors.

Each takes a loss of ψ, the space and a search vector ``z`` ``[d]`` (float64), and returns a
:class:`HyperGradient` in *search* coordinates. Costs are in mini-batch units (mbu): a training
mini-batch, forward and backward, is 1; a forward 1/3; a double backward 2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optuna_ohgw.lookahead import LookaheadLoss, gradient_of
from optuna_ohgw.space import SearchSpace
from optuna_ohgw.updates import SGD, Tensors

Loss = Callable[[Mapping[str, Tensor]], Tensor]
Estimator = Callable[[Any, SearchSpace, Tensor], "HyperGradient"]


@dataclass(frozen=True)
class HyperGradient:
    """The value of a loss of ψ and its gradient.

    Attributes:
        loss: The value at ψ.
        gradient: ∂L/∂z in search coordinates, shape ``[d]``, float64.
        cost_mbu: What it cost, in mini-batch units.
        methods: How each component was found, by name: ``exact``, ``lean``, ``direct``, ``zero``
            (zero by construction) or ``finite-difference``.
    """

    loss: float
    gradient: Tensor
    cost_mbu: float
    methods: dict[str, str]


def exact(loss: Loss, space: SearchSpace, z: Tensor) -> HyperGradient:
    """Return the gradient of any differentiable loss of ψ, by reverse-mode differentiation.

    On a :class:`LookaheadLoss` of horizon K this is the unrolled hyper-gradient (Maclaurin et al.
    2015; Franceschi et al. 2017): a double backward through K steps, 3K + 1 mbu, with the memory
    of K differentiable steps. Components that the loss's graph does not contain fall back to
    :func:`finite_difference` at two evaluations each. A loss that is not a ``LookaheadLoss``
    counts 1 mbu, or its own ``exact_cost_mbu``.
    """
    native = {n: v.detach().requires_grad_() for n, v in space.to_native(z).items()}
    with torch.enable_grad():
        value = torch.as_tensor(loss(native))
    cost = float(getattr(loss, "exact_cost_mbu", 1.0))
    return _from_graph(loss, space, z, native, value, cost, "exact", zero_if_absent=False)


def direct(loss: LookaheadLoss, space: SearchSpace, z: Tensor) -> HyperGradient:
    """Return ∂/∂ψ of the regularised training loss at the present weights, L(θ₀) + ½·wd·‖θ₀‖².

    Zero by construction: learning rate and momentum, which do not appear in it. The component of
    weight decay is ½‖θ₀‖² > 0 whatever the data, so a step always lowers weight decay; label
    smoothing and magnitude see the training loss before any step. Cost: 1 mbu.
    """
    native = {n: v.detach().requires_grad_() for n, v in space.to_native(z).items()}
    with torch.enable_grad():
        value = loss.direct(native)
    return _from_graph(loss.direct, space, z, native, value, 1.0, "direct", zero_if_absent=True)


def finite_difference(loss: Loss, space: SearchSpace, z: Tensor, *, step_unit: float = 0.05) -> HyperGradient:
    """Return central differences of any loss of ψ, differentiable or not.

    The loss must repeat its random numbers from call to call (a :class:`LookaheadLoss` does). The
    step is in unit coordinates, cut at the bounds, where the difference becomes one-sided.
    Cost: 2d + 1 evaluations (of K + 1/3 mbu for a ``LookaheadLoss``, of its own ``cost_mbu`` or
    1/3 for another).
    """
    components = [_central(loss, space, z, i, step_unit) for i in range(len(z))]
    with torch.no_grad():
        value = float(loss(space.to_native(z)))
    cost = (2 * len(z) + 1) * _evaluation_cost(loss)
    methods = dict.fromkeys(space.names, "finite-difference")
    return HyperGradient(value, torch.tensor(components, dtype=torch.float64), cost, methods)


def lean(loss: LookaheadLoss, space: SearchSpace, z: Tensor, *, step_unit: float = 0.05) -> HyperGradient:
    """Return the look-ahead gradient with at most 6 mbu and no double backward at horizon 1.

    With adjoints λ of θ and μ of v, run backwards from λ_K = ∇L_val(θ_K), and ν = μ − lr·λ::

        ∂lr += −⟨λ, v_{k+1}⟩     ∂m += ⟨ν, v_k⟩     ∂wd += ⟨ν, θ_k⟩     ∂s += ⟨ν, ∇_θ ∂_s L_k⟩
        λ ← λ + H_k·ν + wd·ν      μ ← m·ν

    (the adjoint form of Maclaurin et al. 2015). Learning rate, weight decay, momentum and label
    smoothing s equal :func:`exact` to rounding; the Hessian product, needed from horizon 2 on, is
    one double backward at a time. The augmentation magnitude is a central difference of the loss
    with common random numbers at ``step_unit`` of its range, because through ReLU its
    almost-everywhere derivative is noise at any useful scale. The parts run one after another.

    With another update than SGD, or a schedule, the derivatives of the update itself are those of its
    graph; at horizon 1 they need no double backward either.

    Cost: 2K + 1 + 3(K − 1), and 2(K + 1/3) for the magnitude: 5 2/3 mbu at horizon 1. With another
    update 2 mbu (3 with label smoothing) at horizon 1, else 3K + 1, and 2(K + 1/3) for each of magnitude
    and dropout.
    """
    if loss.update != SGD() or loss.schedule is not None:
        return _lean_by_graph(loss, space, z, step_unit)
    psi = {n: v.detach() for n, v in space.to_native(z).items()}
    smooth = "label_smoothing" in space.names
    lr = loss.value(psi, "lr") * loss.lr_scale
    momentum, decay = loss.value(psi, "momentum"), loss.value(psi, "weight_decay")
    step_size = lr / (1 - momentum) if loss.steady_state else lr

    weights: list[Tensors] = [{n: p.detach() for n, p in loss.params().items()}]
    given = loss.begin().get("momentum_buffer", {})
    velocities: list[Tensors] = [{n: given.get(n, torch.zeros_like(p)) for n, p in weights[0].items()}]
    mixed: list[Tensors] = []
    for k in range(loss.horizon):
        gradient, smoothing_gradient = _step_gradients(loss, weights[k], psi, k, smooth)
        mixed.append(smoothing_gradient)
        carried = 0.0 if loss.steady_state else momentum
        velocities.append(
            {n: carried * velocities[k][n] + gradient[n] + decay * w for n, w in weights[k].items()}
        )
        weights.append({n: w - step_size * velocities[k + 1][n] for n, w in weights[k].items()})

    value, lam = _validation_gradient(loss, weights[-1])
    mu = {n: torch.zeros_like(p) for n, p in lam.items()}
    totals = dict.fromkeys(("lr", "momentum", "weight_decay", "label_smoothing"), 0.0)
    for k in reversed(range(loss.horizon)):
        nu = {n: mu[n] - step_size * lam[n] for n in lam}
        totals["lr"] -= _dot(lam, velocities[k + 1])
        totals["momentum"] += _dot(nu, velocities[k])
        totals["weight_decay"] += _dot(nu, weights[k])
        totals["label_smoothing"] += _dot(nu, mixed[k]) if smooth else 0.0
        if k:
            product = _hessian_product(loss, weights[k], psi, k, nu)
            lam = {n: lam[n] + product[n] + decay * nu[n] for n in lam}
            mu = {n: momentum * nu[n] for n in nu}
    if loss.steady_state:
        totals["momentum"] = totals["lr"] * float(lr / (1 - momentum) ** 2)
        totals["lr"] *= float(1 / (1 - momentum))
    totals["lr"] *= loss.lr_scale

    derivative = space.native_derivative(z)
    horizon = loss.horizon
    cost = horizon + 1.0 + 3.0 * (horizon - 1) + (horizon if smooth else 0)
    components, methods = [], {}
    for i, name in enumerate(space.names):
        if name in totals:
            components.append(totals[name] * float(derivative[i]))
            methods[name] = "lean"
        else:
            components.append(_central(loss, space, z, i, step_unit))
            methods[name] = "finite-difference"
            cost += 2 * loss.cost_mbu
    return HyperGradient(value, torch.tensor(components, dtype=torch.float64), cost, methods)


ESTIMATORS: dict[str, Estimator] = {
    "lean": lean,
    "exact": exact,
    "direct": direct,
    "finite-difference": finite_difference,
}


def _lean_by_graph(loss: LookaheadLoss, space: SearchSpace, z: Tensor, step_unit: float) -> HyperGradient:
    native = {n: v.detach().requires_grad_() for n, v in space.to_native(z).items()}
    smooth = "label_smoothing" in native
    with torch.enable_grad():
        if loss.horizon > 1:
            value, cost = loss(native), loss.exact_cost_mbu
        else:
            weights = {n: p.detach() for n, p in loss.params().items()}
            fixed = {n: v.detach() for n, v in native.items()}
            gradients, mixed = _step_gradients(loss, weights, fixed, 0, smooth)
            if smooth:
                # Linear in the smoothing, so that no graph of the gradient is needed.
                change = loss.value(native, "label_smoothing") - loss.value(fixed, "label_smoothing")
                gradients = {n: g + change * mixed[n] for n, g in gradients.items()}
            after, _ = loss.step(weights, gradients, loss.begin(), native, 0)
            value, cost = loss.validation_loss(after), 2.0 + smooth
        found = torch.autograd.grad(value, list(native.values()), allow_unused=True)
    derivative, components, methods = space.native_derivative(z), [], {}
    for i, (name, component) in enumerate(zip(native, found, strict=True)):
        if name in loss.exact_names:
            known = component is not None
            components.append(float(component) * float(derivative[i]) if component is not None else 0.0)
            methods[name] = "lean" if known else "zero"
        else:
            components.append(_central(loss, space, z, i, step_unit))
            methods[name] = "finite-difference"
            cost += 2 * loss.cost_mbu
    return HyperGradient(float(value.detach()), torch.tensor(components, dtype=torch.float64), cost, methods)


def _from_graph(
    loss: Loss,
    space: SearchSpace,
    z: Tensor,
    native: Tensors,
    value: Tensor,
    cost: float,
    method: str,
    *,
    zero_if_absent: bool,
) -> HyperGradient:
    components: list[Tensor | None] = [None] * len(native)
    if value.requires_grad:
        components = list(torch.autograd.grad(value, list(native.values()), allow_unused=True))
    derivative = space.native_derivative(z)
    gradient, methods = torch.zeros(len(z), dtype=torch.float64), {}
    for i, (name, component) in enumerate(zip(native, components, strict=True)):
        if component is not None:
            gradient[i] = component.double() * derivative[i]
            methods[name] = method
        elif zero_if_absent:
            methods[name] = "zero"
        else:
            gradient[i] = _central(loss, space, z, i, 0.05)
            methods[name] = "finite-difference"
            cost += 2 * _evaluation_cost(loss)
    return HyperGradient(float(value.detach()), gradient, cost, methods)


def _evaluation_cost(loss: Loss) -> float:
    return float(getattr(loss, "cost_mbu", 1 / 3))


def _central(loss: Loss, space: SearchSpace, z: Tensor, i: int, step_unit: float) -> float:
    above, below = z.clone(), z.clone()
    above[i] += step_unit * space.width[i]
    below[i] -= step_unit * space.width[i]
    above, below = space.clip(above), space.clip(below)
    with torch.no_grad():
        difference = float(loss(space.to_native(above))) - float(loss(space.to_native(below)))
    return difference / float(above[i] - below[i])


def _step_gradients(
    loss: LookaheadLoss, weights: Tensors, psi: Mapping[str, Tensor], step: int, smooth: bool
) -> tuple[Tensors, Tensors]:
    leaves = {n: w.detach().requires_grad_() for n, w in weights.items()}
    with torch.enable_grad():
        if not smooth:
            return gradient_of(loss.training_loss(leaves, psi, step), leaves), {}
        # Two passes, not two backwards of one graph: keeping it would raise the peak by a seventh.
        gradient = gradient_of(loss.training_loss(leaves, psi, step), leaves)
        return gradient, gradient_of(loss.training_terms(leaves, psi, step)[1], leaves)


def _validation_gradient(loss: LookaheadLoss, weights: Tensors) -> tuple[float, Tensors]:
    leaves = {n: w.detach().requires_grad_() for n, w in weights.items()}
    with torch.enable_grad():
        value = loss.validation_loss(leaves)
        gradients = gradient_of(value, leaves)
    return float(value.detach()), gradients


def _hessian_product(
    loss: LookaheadLoss, weights: Tensors, psi: Mapping[str, Tensor], step: int, vector: Tensors
) -> Tensors:
    leaves = {n: w.detach().requires_grad_() for n, w in weights.items()}
    with torch.enable_grad():
        gradients = gradient_of(loss.training_loss(leaves, psi, step), leaves, create_graph=True)
        product = torch.stack([(gradients[n] * vector[n]).sum() for n in leaves]).sum()
    return gradient_of(product, leaves)


def _dot(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    return float(torch.stack([torch.dot(a[n].flatten().double(), b[n].flatten().double()) for n in a]).sum())
