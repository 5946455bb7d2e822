"""What a trial trains: from a first state, epoch by epoch; networks by mini-batches here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils.flop_counter import FlopCounterMode

from optuna_ohgw.cost import count_flops
from optuna_ohgw.space import SearchSpace
from optuna_ohgw.steps import captured_bytes
from optuna_ohgw.tasks.base import Evaluation, Task
from optuna_ohgw.training import TrainState, initial_state, load, state_loss, train_epoch
from optuna_ohgw.warmstart import WarmStart, warm_start

Stop = Callable[[], bool]


class State(Protocol):
    """A frozen dataclass of everything that the rest of a trial's training depends on.

    ``psi`` are the native hyper-parameters in use, ``epoch`` counts the epochs trained.
    """

    @property
    def psi(self) -> Mapping[str, float]:
        """Native values by name."""
        ...

    @property
    def epoch(self) -> int:
        """Epochs trained."""
        ...

    def digest(self) -> str:
        """Return a short digest of what is trained, equal for equal bits."""
        ...

    def content(self) -> dict[str, Any]:
        """Return it as tensors and plain values, for a checkpoint."""
        ...

    def save(self, path: Path) -> None:
        """Write it to a file, atomically."""
        ...

    def export(self, path: Path) -> None:
        """Write what a user goes on with to a file: the trained model."""
        ...


class Workload(Protocol):
    """Data and training of the trials of a cell seed, with one structure, on one device.

    Attributes:
        device: Where it trains.
        batches_per_epoch: Mini-batches an epoch, the unit of cost.
        suffix: Of the files of its states.
    """

    device: torch.device
    suffix: str

    @property
    def batches_per_epoch(self) -> int:
        """Mini-batches an epoch."""
        ...

    def start(self, seed: int, config_index: int) -> Any:
        """Return the state before training, its ψ still empty."""
        ...

    def restore(self, content: Mapping[str, Any]) -> Any:
        """Return the state whose ``content()`` is given."""
        ...

    def read(self, path: Path) -> Any:
        """Return the state that a file of ``save`` holds."""
        ...

    def train(self, state: Any, stop: Stop) -> tuple[Any, float]:
        """Return the state after one more epoch, and the mean training loss."""
        ...

    def evaluate(self, state: Any, part: str) -> Evaluation:
        """Return loss and metric of a state on ``validation`` or ``test``."""
        ...

    def loss(self, state: Any, rung: int, horizon: int) -> Any:
        """Return the loss of ψ at a state, for a warm start."""
        ...

    def order_digest(self, seed: int, config_index: int) -> str:
        """Return a digest of the first epoch's data order."""
        ...

    def flops(
        self,
        state: Any,
        space: SearchSpace,
        settings: WarmStart | None,
        horizon: int,
        constants: Mapping[str, float],
    ) -> dict[str, int]:
        """Return the FLOPs of a training mini-batch and of a warm start, ``batch`` and ``warm``."""
        ...

    def captured_bytes(self) -> int:
        """Return the bytes that a captured step uses, which torch does not count."""
        ...


class BatchWorkload:
    """A network trained by mini-batches; see :class:`Workload`.

    Args:
        task: Data and network.
        epochs: Of the whole schedule.
    """

    suffix = ".safetensors"

    def __init__(self, task: Task, epochs: int) -> None:
        self.task, self.epochs, self.device = task, epochs, task.device
        self._at: TrainState | None = None  # that the network holds

    @property
    def batches_per_epoch(self) -> int:
        """Mini-batches an epoch."""
        return self.task.batches_per_epoch

    def start(self, seed: int, config_index: int) -> TrainState:
        """Return the state before training."""
        return initial_state(self.task, seed, config_index, self.epochs)

    def restore(self, content: Mapping[str, Any]) -> TrainState:
        """Return a state, on the device."""
        return TrainState(**content).to(self.device)

    def read(self, path: Path) -> TrainState:
        """Return the state in a file, on the device."""
        return TrainState.load(path, self.device)

    def train(self, state: TrainState, stop: Stop) -> tuple[TrainState, float]:
        """Return the state after one more epoch, and its loss."""
        self._at = None
        after, loss = train_epoch(self.task, state, stop)
        self._at = after
        return after, loss

    def evaluate(self, state: TrainState, part: str) -> Evaluation:
        """Return loss and metric of a state."""
        if self._at is not state:
            load(self.task, state)
            self._at = state
        return self.task.evaluate(part)

    def loss(self, state: TrainState, rung: int, horizon: int) -> Any:
        """Return the look-ahead loss at a state."""
        self._at = None
        return state_loss(self.task, state, rung, horizon)

    def order_digest(self, seed: int, config_index: int) -> str:
        """Return a digest of the first epoch's data order and augmentation draws."""
        return self.task.order_digest(seed, config_index)

    def flops(
        self,
        state: TrainState,
        space: SearchSpace,
        settings: WarmStart | None,
        horizon: int,
        constants: Mapping[str, float],
    ) -> dict[str, int]:
        """Return the FLOPs of a training mini-batch and of a warm start."""
        self._at = None
        return count_flops(self.task, state, space, settings, horizon, constants)

    def captured_bytes(self) -> int:
        """Return the bytes of a captured step."""
        return captured_bytes(self.task.network())


def counted_flops(
    train: Callable[[Mapping[str, float]], object],
    loss: Callable[[Mapping[str, float]], Any],
    space: SearchSpace,
    settings: WarmStart | None,
    constants: Mapping[str, float],
) -> dict[str, int]:
    """Return the FLOPs that torch counts in a training mini-batch and in a warm start.

    Args:
        train: ψ ↦ trains one mini-batch.
        loss: ψ ↦ the loss for a warm start.
        space: The continuous hyper-parameters; counted at their low ends.
        settings: The warm start; None: there is none.
        constants: Native values of the hyper-parameters that are not searched.
    """
    low = {name: distribution.low for name, distribution in space.distributions.items()}
    psi = {**constants, **low}
    with FlopCounterMode(display=False) as batch:
        train(psi)
    if settings is None:
        return {"batch": batch.get_total_flops(), "warm": 0}
    with FlopCounterMode(display=False) as warm:
        warm_start(loss(psi), space, low, settings, torch.Generator().manual_seed(0))
    return {"batch": batch.get_total_flops(), "warm": warm.get_total_flops()}
