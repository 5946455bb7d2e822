"""Update rules of the look-ahead: what ``torch.optim`` does, as differentiable functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

Tensors = dict[str, Tensor]
Weights = Mapping[str, Tensor]
Psi = Mapping[str, Tensor]
Slots = Mapping[str, Weights]


class UpdateRule(Protocol):
    """One step of an optimiser: (weights, gradients, slots) ↦ (weights, slots), differentiable in ψ.

    ``slots`` are what the optimiser keeps between steps, by its own name and parameter name; empty at
    rest. ``psi`` gives 0-d tensors of the names in ``reads``, ``lr`` is the rate at this step.
    """

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the hyper-parameters beside the rate."""
        ...

    def __call__(
        self, weights: Weights, gradients: Weights, slots: Slots, psi: Psi, lr: Tensor
    ) -> tuple[Tensors, dict[str, Tensors]]:
        """Return the weights and slots after a step."""
        ...


@dataclass(frozen=True)
class SGD:
    """``torch.optim.SGD``: momentum, coupled weight decay; with ``nesterov`` the look-ahead form."""

    nesterov: bool = False
    reads: tuple[str, ...] = ("momentum", "weight_decay")

    def __call__(
        self, weights: Weights, gradients: Weights, slots: Slots, psi: Psi, lr: Tensor
    ) -> tuple[Tensors, dict[str, Tensors]]:
        """Return the weights and ``momentum_buffer`` after a step."""
        momentum, decay = psi["momentum"], psi["weight_decay"]
        before, velocity, after = slots.get("momentum_buffer", {}), {}, {}
        for name, weight in weights.items():
            decayed = gradients[name] + decay * weight
            velocity[name] = momentum * before[name] + decayed if name in before else decayed
            step = decayed + momentum * velocity[name] if self.nesterov else velocity[name]
            after[name] = weight - lr * step
        return after, {"momentum_buffer": velocity}


@dataclass(frozen=True)
class Adam:
    """``torch.optim.Adam`` (Kingma and Ba 2015), ``decoupled``: ``AdamW`` (Loshchilov and Hutter 2019).

    From rest the first step is lr·sign(g) but for ε, whatever β₁ and β₂: their hyper-gradient at
    horizon 1 is zero by construction. A weight whose gradients were all zero does not move.
    """

    decoupled: bool = False
    eps: float = 1e-8
    reads: tuple[str, ...] = ("beta1", "beta2", "weight_decay")

    def __call__(
        self, weights: Weights, gradients: Weights, slots: Slots, psi: Psi, lr: Tensor
    ) -> tuple[Tensors, dict[str, Tensors]]:
        """Return the weights, ``exp_avg``, ``exp_avg_sq`` and ``step`` after a step."""
        beta1, beta2, decay = psi["beta1"], psi["beta2"], psi["weight_decay"]
        first, second, count = (slots.get(s, {}) for s in ("exp_avg", "exp_avg_sq", "step"))
        after, means, squares, steps = Tensors(), Tensors(), Tensors(), Tensors()
        for name, weight in weights.items():
            gradient = gradients[name] if self.decoupled else gradients[name] + decay * weight
            decayed = weight * (1 - lr * decay) if self.decoupled else weight
            step = count[name].to(weight) + 1 if name in count else torch.ones_like(lr)
            mean, square = (1 - beta1) * gradient, (1 - beta2) * gradient.square()
            if name in first:
                mean, square = mean + beta1 * first[name], square + beta2 * second[name]
            # The root's derivative at 0 is infinite, though what it stands beside is 0 there.
            moved = square > 0
            root = torch.where(moved, square, 1.0).sqrt() / (1 - beta2**step).sqrt()
            change = torch.where(moved, mean / (1 - beta1**step) / (root + self.eps), 0.0)
            after[name] = decayed - lr * change
            means[name], squares[name], steps[name] = mean, square, step
        return after, {"exp_avg": means, "exp_avg_sq": squares, "step": steps}


def slots_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensors]:
    """Return copies of what an optimiser of a model's parameters keeps, by slot and parameter name.

    Empty slots are left out: what it returns before the first step is rest.
    """
    slots = dict[str, Tensors]()
    for name, weight in model.named_parameters():
        for slot, value in optimizer.state.get(weight, {}).items():
            if isinstance(value, Tensor):
                slots.setdefault(slot, {})[name] = value.detach().clone()
    return slots


def load_slots(optimizer: torch.optim.Optimizer, model: nn.Module, slots: Slots) -> None:
    """Give an optimiser of a model's parameters what :func:`slots_of` returned, on their device.

    The step count stays where it is, as torch keeps it.
    """
    for slot, named in slots.items():
        for name, weight in model.named_parameters():
            if name in named:
                kept = named[name]
                optimizer.state[weight][slot] = kept if slot == "step" else kept.to(weight.device)


UPDATES: dict[str, UpdateRule] = {
    "sgd": SGD(),
    "nesterov": SGD(nesterov=True),
    "adam": Adam(),
    "adamw": Adam(decoupled=True),
}
