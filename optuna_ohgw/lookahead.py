"""The look-ahead loss: a loss of ψ after a few differentiable training steps."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

Tensors = dict[str, Tensor]
Psi = Mapping[str, Tensor]
Batch = tuple[Any, Tensor]

DEFAULTS = {
    "momentum": 0.0,
    "weight_decay": 0.0,
    "label_smoothing": 0.0,
    "magnitude": 0.0,
}


def uniform_cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Return the mean cross-entropy of ``output`` ``[B, C]`` against the uniform distribution."""
    return -F.log_softmax(output, dim=1).mean()


def gradient_of(value: Tensor, weights: Mapping[str, Tensor], *, create_graph: bool = False) -> Tensors:
    """Return the gradient of a scalar in named weights, zero where it does not depend on one."""
    leaves = list(weights.values())
    gradients = torch.autograd.grad(
        value, leaves, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )
    return dict(zip(weights, gradients, strict=True))


@dataclass(frozen=True)
class LookaheadLoss:
    """A scalar loss of ψ, differentiable in it, made by :func:`lookahead_loss`.

    ``loss(psi)`` takes ``horizon`` differentiable SGD steps from the model's present weights and
    returns the plain criterion of the weights reached, on one more mini-batch. ``psi`` maps names
    to 0-d tensors in *native* coordinates; ``lr``, ``momentum``, ``weight_decay``,
    ``label_smoothing`` and ``magnitude`` are read, a missing one is taken from ``fixed``.

    Nothing is changed by a call: parameters are used functionally, buffers (BatchNorm) are
    copied, and the global random state is restored. Every call with the same ``draw`` sees the
    same mini-batches and the same random numbers.
    """

    model: nn.Module
    batches: Callable[[int], Batch]
    criterion: Callable[[Tensor, Tensor], Tensor]
    horizon: int = 1
    augment: Callable[[Any, Tensor], Tensor] | None = None
    prepare: Callable[[Any], Tensor] | None = None
    fixed: Mapping[str, float] = field(default_factory=dict)
    velocity: Mapping[str, Tensor] | None = None
    lr_scale: float = 1.0
    position: int = 0

    def __post_init__(self) -> None:
        if self.horizon < 1:
            raise ValueError(f"horizon must be at least 1 but got {self.horizon}")

    @property
    def cost_mbu(self) -> float:
        """Cost of one evaluation: K training steps and a forward pass, K + 1/3."""
        return self.horizon + 1 / 3

    @property
    def exact_cost_mbu(self) -> float:
        """Cost of the value and its exact gradient: K steps, K double backwards, one step."""
        return 3.0 * self.horizon + 1.0

    def draw(self, position: int) -> LookaheadLoss:
        """Return the same loss on the ``position``-th fresh set of mini-batches."""
        return replace(self, position=position)

    def with_horizon(self, horizon: int) -> LookaheadLoss:
        """Return the same loss after ``horizon`` steps."""
        return replace(self, horizon=horizon)

    @property
    def steady_state(self) -> bool:
        """Whether momentum acts as lr/(1 − m): one step from rest, where it has no other effect."""
        return self.horizon == 1 and self.velocity is None

    def params(self) -> Tensors:
        """Return the present trainable weights, detached, as leaves that require gradients."""
        named = self.model.named_parameters()
        return {n: p.detach().requires_grad_() for n, p in named if p.requires_grad}

    def value(self, psi: Psi, name: str) -> Tensor:
        """Return hyper-parameter ``name`` as a 0-d tensor of the weights' type and device."""
        weight = next(self.model.parameters())
        if name in psi:
            return psi[name].to(device=weight.device, dtype=weight.dtype)
        fixed = self.fixed.get(name, DEFAULTS.get(name))
        if fixed is None:
            raise ValueError(f"{name!r} is neither in ψ nor in fixed; give it in one of them")
        return torch.tensor(fixed, device=weight.device, dtype=weight.dtype)

    def training_terms(self, params: Mapping[str, Tensor], psi: Psi, step: int) -> tuple[Tensor, Tensor]:
        """Return (criterion, uniform − criterion) on training mini-batch ``step``, augmented.

        The training loss is their sum with the second weighted by the label smoothing, in which
        it is linear.
        """
        inputs, target = self._batch(step)
        with self._reproducible(step):
            if self.augment is not None:
                inputs = self.augment(inputs, self.value(psi, "magnitude"))
            output = self._forward(params, inputs)
        plain = self.criterion(output, target)
        return plain, uniform_cross_entropy(output, target) - plain

    def training_loss(self, params: Mapping[str, Tensor], psi: Psi, step: int) -> Tensor:
        """Return the label-smoothed loss on augmented training mini-batch ``step``, a scalar."""
        if "label_smoothing" not in psi and not self.fixed.get("label_smoothing", 0.0):
            return self.training_terms(params, psi, step)[0]
        plain, difference = self.training_terms(params, psi, step)
        return plain + self.value(psi, "label_smoothing") * difference

    def validation_loss(self, params: Mapping[str, Tensor]) -> Tensor:
        """Return the plain criterion on the mini-batch after the training ones, a scalar."""
        inputs, target = self._batch(self.horizon)
        if self.prepare is not None:
            inputs = self.prepare(inputs)
        with self._reproducible(self.horizon):
            return self.criterion(self._forward(params, inputs), target)

    def direct(self, psi: Psi) -> Tensor:
        """Return the regularised training loss at the present weights, L + ½·wd·‖θ‖²."""
        params = self.params()
        penalty = sum(p.square().sum() for p in params.values())
        return self.training_loss(params, psi, 0) + 0.5 * self.value(psi, "weight_decay") * penalty

    def __call__(self, psi: Psi) -> Tensor:
        """Return L_val(θ_K(ψ)), a scalar; cost K + 1/3 mini-batch units without a gradient."""
        differentiable = torch.is_grad_enabled() and any(v.requires_grad for v in psi.values())
        lr = self.value(psi, "lr") * self.lr_scale
        momentum, decay = self.value(psi, "momentum"), self.value(psi, "weight_decay")
        if self.steady_state:
            lr = lr / (1 - momentum)
        params, velocity = self.params(), dict(self.velocity or {})
        for step in range(self.horizon):
            with torch.enable_grad():
                loss = self.training_loss(params, psi, step)
                gradients = gradient_of(loss, params, create_graph=differentiable)
            with contextlib.nullcontext() if differentiable else torch.no_grad():
                for name, weight in params.items():
                    decayed = gradients[name] + decay * weight
                    velocity[name] = momentum * velocity[name] + decayed if name in velocity else decayed
                params = {name: weight - lr * velocity[name] for name, weight in params.items()}
            if not differentiable:
                params = {name: weight.detach().requires_grad_() for name, weight in params.items()}
        with contextlib.nullcontext() if differentiable else torch.no_grad():
            return self.validation_loss(params)

    def _batch(self, step: int) -> Batch:
        return self.batches(self.position * (self.horizon + 1) + step)

    def _seed(self, step: int) -> int:
        return self.position * (self.horizon + 1) + step

    def _forward(self, params: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        buffers = {name: buffer.detach().clone() for name, buffer in self.model.named_buffers()}
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.train()
        try:
            output: Tensor = functional_call(self.model, ({**params, **buffers},), (inputs,))
        finally:
            for module, training in modes:
                module.training = training
        return output

    @contextlib.contextmanager
    def _reproducible(self, step: int) -> Iterator[None]:
        device = next(self.model.parameters()).device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            seed = self._seed(step)
            torch.default_generator.manual_seed(seed)
            if device.type == "cuda":
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            yield


def lookahead_loss(
    model: nn.Module,
    batches: Callable[[int], Batch] | Iterable[Batch],
    criterion: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    *,
    horizon: int = 1,
    augment: Callable[[Any, Tensor], Tensor] | None = None,
    prepare: Callable[[Any], Tensor] | None = None,
    fixed: Mapping[str, float] | None = None,
    velocity: Mapping[str, Tensor] | None = None,
    lr_scale: float = 1.0,
) -> LookaheadLoss:
    """Return the loss of ψ after ``horizon`` SGD-momentum steps, on one more mini-batch.

    With gradient g_k of the label-smoothed loss on augmented training mini-batch k at θ_k, each
    step is that of ``torch.optim.SGD``::

        v_{k+1} = m·v_k + g_k + wd·θ_k        θ_{k+1} = θ_k − lr·v_{k+1}

    At horizon 1 from rest (``velocity=None``) momentum has no effect on the first step, so it
    acts through its steady state, lr/(1 − m); otherwise it acts exactly. The held-out mini-batch
    is neither augmented nor smoothed. BatchNorm uses the statistics of the mini-batch throughout.

    Args:
        model: The network; its present parameters are read at every call.
        batches: Mini-batches of (inputs, target ``[B]``): a function of a position 0, 1, 2 …, or
            an iterable, read as far as needed and repeated from its start when it ends.
        criterion: Mean loss of (output ``[B, C]``, target ``[B]``), a scalar. Label smoothing
            mixes it with the uniform cross-entropy, exact when it is the cross-entropy.
        horizon: Number K ≥ 1 of differentiable steps.
        augment: ``augment(inputs, magnitude)``, differentiable in the 0-d ``magnitude`` if that
            is to have an exact gradient. Randomness from torch's global generator is repeated.
        prepare: Turns the held-out inputs into what the model takes; default: as they are.
        fixed: Native values of the hyper-parameters that ψ does not hold (momentum,
            weight decay, label smoothing, magnitude: 0 unless given).
        velocity: Momentum buffers by parameter name; None: at rest.
        lr_scale: Factor of the learning-rate schedule at the present step.

    Raises:
        ValueError: If ``horizon`` < 1 or ``batches`` is empty.
    """
    source = batches if callable(batches) else _repeat(batches)
    return LookaheadLoss(
        model=model,
        batches=source,
        criterion=criterion,
        horizon=horizon,
        augment=augment,
        prepare=prepare,
        fixed=dict(fixed or {}),
        velocity=velocity,
        lr_scale=lr_scale,
    )


def _repeat(batches: Iterable[Batch]) -> Callable[[int], Batch]:
    seen = list[Batch]()
    iterator: Iterator[Batch] | None = None
    # A shuffling or transforming loader draws from torch's generator: it gets a stream of its own.
    own = torch.get_rng_state()

    def batch(position: int) -> Batch:
        nonlocal iterator, own
        missing = max(0, position + 1 - len(seen))
        if missing:
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(own)
                iterator = iterator if iterator is not None else iter(batches)
                seen.extend(itertools.islice(iterator, missing))
                own = torch.get_rng_state()
        if not seen:
            raise ValueError("batches is empty but at least one mini-batch is needed")
        return seen[position % len(seen)]

    return batch
