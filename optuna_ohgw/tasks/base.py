"""The contract of a task: what the training loop and the warm start need of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn


class Evaluation(NamedTuple):
    """Mean loss (nats) and the metric over a part of the data."""

    loss: float
    metric: float


class Task(Protocol):
    """Data and network of a trial, on one device.

    Random numbers depend on (seed, config_index, epoch or position) alone, so that paired trials
    see the same initial weights, data order and augmentation draws, whatever else they do.
    """

    device: torch.device
    batches_per_epoch: int

    def network(self) -> nn.Module:
        """Return the network to load a state into; the same object, in the same memory, at every call."""
        ...

    def initialize(self, seed: int, config_index: int) -> nn.Module:
        """Return the network with the initial weights of a configuration."""
        ...

    def epoch(
        self, seed: int, config_index: int, epoch: int, magnitude: float
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the augmented training mini-batches (inputs, target) of an epoch, in order."""
        ...

    def training_loss(self, output: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
        """Return the label-smoothed training loss of a mini-batch, a scalar."""
        ...

    def criterion(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the plain loss of a mini-batch, a scalar."""
        ...

    def evaluate(self, part: str) -> Evaluation:
        """Return loss and metric of the network on ``"validation"`` or ``"test"``."""
        ...

    def warm_batches(self, seed: int, config_index: int, rung: int) -> Callable[[int], tuple[Any, Tensor]]:
        """Return position ↦ training mini-batch (raw inputs, target) for the warm start."""
        ...

    def augment(self, inputs: Any, magnitude: Tensor) -> Tensor:
        """Return augmented network inputs of raw ones, differentiable in the magnitude."""
        ...

    def prepare(self, inputs: Any) -> Tensor:
        """Return network inputs of raw ones, as in evaluation."""
        ...

    def order_digest(self, seed: int, config_index: int) -> str:
        """Return a digest of the first epoch's data order and augmentation draws."""
        ...
