"""The look-ahead loss: a loss of ψ after a few differentiable training steps."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from optuna_ohgw.updates import SGD, UPDATES, Psi, Slots, Tensors, UpdateRule

Batch = tuple[Any, Tensor]

DEFAULTS = {
    "momentum": 0.0,
    "weight_decay": 0.0,
    "label_smoothing": 0.0,
    "magnitude": 0.0,
    "beta1": 0.9,
    "beta2": 0.999,
}
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


class Schedule(Protocol):
    """Factor of the learning rate at a step, differentiable in the hyper-parameters it reads."""

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of its hyper-parameters."""
        ...

    def __call__(self, psi: Psi, step: int) -> Tensor:
        """Return the factor at a step, counted from the present weights."""
        ...


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

    ``loss(psi)`` takes ``horizon`` differentiable steps of ``update`` from the model's present weights
    and returns the plain criterion of the weights reached, on one more mini-batch. ``psi`` maps names
    to 0-d tensors in *native* coordinates; ``lr``, ``label_smoothing``, ``magnitude``, ``dropout`` and
    what the update and the schedule read are used, a missing one is taken from ``fixed``.

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
    update: UpdateRule = field(default_factory=SGD)
    slots: Slots | None = None
    schedule: Schedule | None = None
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
        """Whether momentum acts as lr/(1 − m): one SGD step from rest, where it has no other effect."""
        return self.horizon == 1 and self.update == SGD() and self.slots is None and self.velocity is None

    @property
    def exact_names(self) -> frozenset[str]:
        """Names whose effect is differentiated; the others act inside the training loss alone."""
        scheduled = () if self.schedule is None else self.schedule.reads
        return frozenset({"lr", "label_smoothing", *self.update.reads, *scheduled})

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
            output = self._forward(params, inputs, self._dropout(psi))
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
            return self.criterion(self._forward(params, inputs, 0.0), target)

    def direct(self, psi: Psi) -> Tensor:
        """Return the regularised training loss at the present weights, L + ½·wd·‖θ‖²."""
        params = self.params()
        penalty = sum(p.square().sum() for p in params.values())
        return self.training_loss(params, psi, 0) + 0.5 * self.value(psi, "weight_decay") * penalty

    def __call__(self, psi: Psi) -> Tensor:
        """Return L_val(θ_K(ψ)), a scalar; cost K + 1/3 mini-batch units without a gradient."""
        differentiable = torch.is_grad_enabled() and any(v.requires_grad for v in psi.values())
        params, slots = self.params(), self.begin()
        for step in range(self.horizon):
            with torch.enable_grad():
                loss = self.training_loss(params, psi, step)
                gradients = gradient_of(loss, params, create_graph=differentiable)
            with contextlib.nullcontext() if differentiable else torch.no_grad():
                params, slots = self.step(params, gradients, slots, psi, step)
            if not differentiable:
                params = {name: weight.detach().requires_grad_() for name, weight in params.items()}
        with contextlib.nullcontext() if differentiable else torch.no_grad():
            return self.validation_loss(params)

    def begin(self) -> Slots:
        """Return what the optimiser keeps at the present weights; empty at rest."""
        if self.slots is not None:
            return self.slots
        return {} if self.velocity is None else {"momentum_buffer": self.velocity}

    def step(
        self,
        params: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        slots: Slots,
        psi: Psi,
        step: int,
    ) -> tuple[Tensors, Slots]:
        """Return weights and slots after step ``step``, differentiable in ψ."""
        known = {name: self.value(psi, name) for name in self.update.reads}
        lr = self.value(psi, "lr") * self.lr_scale
        if self.schedule is not None:
            lr = lr * self.schedule({n: self.value(psi, n) for n in self.schedule.reads}, step)
        if self.steady_state:
            lr = lr / (1 - known["momentum"])
        return self.update(params, gradients, slots, known, lr)

    def _dropout(self, psi: Psi) -> float | None:
        """Return the share dropped in training; None: as the model has it."""
        known = psi.get("dropout", self.fixed.get("dropout"))
        return float(known.detach()) if isinstance(known, Tensor) else known

    def _batch(self, step: int) -> Batch:
        return self.batches(self.position * (self.horizon + 1) + step)

    def _seed(self, step: int) -> int:
        return self.position * (self.horizon + 1) + step

    def _forward(self, params: Mapping[str, Tensor], inputs: Tensor, dropout: float | None) -> Tensor:
        dropped = [m for m in self.model.modules() if isinstance(m, DROPOUTS)]
        shares = [m.p for m in dropped]
        buffers = {name: buffer.detach().clone() for name, buffer in self.model.named_buffers()}
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.train()
        for drop in dropped:
            drop.p = drop.p if dropout is None else dropout
        try:
            output: Tensor = functional_call(self.model, ({**params, **buffers},), (inputs,))
        finally:
            for module, training in modes:
                module.training = training
            for drop, share in zip(dropped, shares, strict=True):
                drop.p = share
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
    update: UpdateRule | str = "sgd",
    slots: Slots | None = None,
    schedule: Schedule | None = None,
) -> LookaheadLoss:
    """Return the loss of ψ after ``horizon`` steps of an optimiser, on one more mini-batch.

    With gradient g_k of the label-smoothed loss on augmented training mini-batch k at θ_k, each
    step of the default update is that of ``torch.optim.SGD``::

        v_{k+1} = m·v_k + g_k + wd·θ_k        θ_{k+1} = θ_k − lr·v_{k+1}

    At horizon 1 from rest (``velocity=None``) momentum has no effect on the first step, so it
    acts through its steady state, lr/(1 − m); otherwise it acts exactly. The held-out mini-batch
    is neither augmented nor smoothed, and nothing is dropped on it. BatchNorm uses the statistics of
    the mini-batch throughout.

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
        velocity: Momentum buffers of SGD by parameter name; None: at rest.
        lr_scale: Factor of the learning-rate schedule at the present step.
        update: The optimiser: ``sgd``, ``nesterov``, ``adam``, ``adamw``, or an
            :class:`~optuna_ohgw.updates.UpdateRule`. Adam's read ``beta1``, ``beta2`` and
            ``weight_decay``.
        slots: What the optimiser keeps, as :func:`~optuna_ohgw.updates.slots_of` gives it; None: at rest.
        schedule: Factor of the learning rate at each step, with parameters that may be in ψ.

    A share ``dropout``, in ψ or ``fixed``, is that of all dropout modules while training.

    Raises:
        ValueError: If ``horizon`` < 1, ``batches`` is empty, the update is unknown, or both ``velocity``
            and ``slots`` are given.
    """
    if isinstance(update, str):
        if update not in UPDATES:
            raise ValueError(f"update must be one of {', '.join(UPDATES)} but got {update!r}")
        update = UPDATES[update]
    if velocity is not None and slots is not None:
        raise ValueError("velocity and slots are both given; give slots={'momentum_buffer': velocity} alone")
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
        update=update,
        slots=slots or None,
        schedule=schedule,
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
