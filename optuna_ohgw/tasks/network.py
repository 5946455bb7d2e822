"""What tasks that train a network by mini-batches share: optimiser, schedule, look-ahead, state."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optuna_ohgw.lookahead import DROPOUTS, LookaheadLoss, lookahead_loss
from optuna_ohgw.updates import Psi, load_slots, slots_of

Batches = Callable[[int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class WarmUpCosine:
    """A linear rise over a share ``warm_up`` of all steps, times a cosine fall to ``final_rate``.

    Attributes:
        steps: Of the whole training.
        first: Step that the first call's ``step`` 0 is.
    """

    steps: int
    first: int = 0
    reads: tuple[str, ...] = ("warm_up", "final_rate")

    def __call__(self, psi: Psi, step: int) -> Tensor:
        """Return the factor of the rate."""
        at, final = self.first + step, psi["final_rate"]
        rise = (at + 1) / (psi["warm_up"] * self.steps).clamp(min=1e-6)
        fall = final + (1 - final) * 0.5 * (1 + math.cos(math.pi * at / self.steps))
        return rise.clamp(max=1.0) * fall


class NetworkTask(ABC):
    """A network behind the contract of ``tasks.contract``; a subclass gives network, batches, evaluation.

    The loss is the cross-entropy, label-smoothed in training.

    Args:
        optimizer: ``sgd``, ``nesterov``, ``adam`` or ``adamw``.
        device: Where it trains.
        epochs: Of the whole schedule.
    """

    batches_per_epoch: int
    network: nn.Module
    stop: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self, optimizer: str, device: torch.device, epochs: int) -> None:
        self.optimizer_name, self.device, self.epochs = optimizer, device, epochs

    @abstractmethod
    def make_network(self) -> nn.Module:
        """Return a network with initial weights, drawn from torch's generator."""

    @abstractmethod
    def epoch_batches(self, seed: int) -> Batches:
        """Return position ↦ mini-batch of an epoch."""

    @abstractmethod
    def warm_batches(self, seed: int) -> Batches:
        """Return position ↦ training mini-batch for the warm start."""

    @property
    def drops(self) -> bool:
        """Whether the network has a layer that ``dropout`` acts on."""
        return any(isinstance(module, DROPOUTS) for module in self.network.modules())

    def build(self, seed: int) -> None:
        """Begin with new weights."""
        self.network = self.make_network().to(self.device)
        self.optimizer = self._optimizer()

    def train(self, psi: Mapping[str, float], epoch: int, seed: int, batches: int | None = None) -> float:
        """Train an epoch; return the mean loss (nats)."""
        batch, steps = self.epoch_batches(seed), batches or self.batches_per_epoch
        schedule = WarmUpCosine(self.epochs * self.batches_per_epoch, epoch * self.batches_per_epoch)
        known = {name: torch.tensor(psi.get(name, 0.0)) for name in schedule.reads}
        self._set(psi)
        self.network.train()
        total = torch.zeros((), device=self.device)
        for position in range(steps):
            self.stop()
            inputs, target = batch(position)
            self.optimizer.param_groups[0]["lr"] = psi["lr"] * float(schedule(known, position))
            self.optimizer.zero_grad()
            output = self.network(inputs)
            loss = F.cross_entropy(output, target, label_smoothing=psi.get("label_smoothing", 0.0))
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            total += loss.detach()
        return float(total) / steps

    def loss(self, psi: Mapping[str, float], epoch: int, seed: int, horizon: int) -> LookaheadLoss:
        """Return the look-ahead loss of the optimiser, from its present state."""
        return lookahead_loss(
            self.network,
            self.warm_batches(seed),
            horizon=horizon,
            fixed=psi,
            update=self.optimizer_name,
            slots=slots_of(self.optimizer, self.network),
            schedule=WarmUpCosine(self.epochs * self.batches_per_epoch, epoch * self.batches_per_epoch),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return weights, buffers and what the optimiser keeps."""
        return {"network": self.network.state_dict(), "optimizer": slots_of(self.optimizer, self.network)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over weights, buffers and what the optimiser keeps."""
        self.network.load_state_dict(state["network"])
        self.optimizer = self._optimizer()
        load_slots(self.optimizer, self.network, state["optimizer"])

    def _optimizer(self) -> torch.optim.Optimizer:
        parameters, name = self.network.parameters(), self.optimizer_name
        if name in ("sgd", "nesterov"):
            return torch.optim.SGD(parameters, lr=0.0, momentum=0.5, nesterov=name == "nesterov")
        return (torch.optim.Adam if name == "adam" else torch.optim.AdamW)(parameters, lr=0.0)

    def _set(self, psi: Mapping[str, float]) -> None:
        group = self.optimizer.param_groups[0]
        group["weight_decay"] = psi.get("weight_decay", 0.0)
        if "momentum" in group:
            group["momentum"] = psi.get("momentum", 0.0)
            # torch has no Nesterov step without momentum; without it both are the plain one.
            group["nesterov"] = self.optimizer_name == "nesterov" and group["momentum"] > 0
        else:
            group["betas"] = psi.get("beta1", 0.9), psi.get("beta2", 0.999)
        for module in self.network.modules():
            if isinstance(module, DROPOUTS):
                module.p = psi.get("dropout", 0.0)
