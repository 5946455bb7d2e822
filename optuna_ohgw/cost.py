"""What a trial costs beside time: the FLOPs of its parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from optuna_ohgw.space import SearchSpace
from optuna_ohgw.tasks.base import Task
from optuna_ohgw.tasks.precision import autocast
from optuna_ohgw.training import TrainState, load, state_loss
from optuna_ohgw.warmstart import WarmStart, warm_start


def count_flops(
    task: Task,
    state: TrainState,
    space: SearchSpace,
    settings: WarmStart | None,
    horizon: int,
    constants: Mapping[str, float],
) -> dict[str, int]:
    """Return the FLOPs of one training mini-batch and of one whole warm start.

    Matrix products, convolutions and attention, forward and backward, a multiplication and an
    addition as two (``torch.utils.flop_counter``). Element-wise work and resampling count nothing:
    so neither the augmentation, which is left out here, nor the optimiser's step. A warm start
    costs the same at any ψ, so it is counted at one: the low end of every range, where no step
    diverges. The task's network is left changed, the random streams are not.

    Args:
        task: Data and network.
        state: Weights to count at; not changed.
        space: The continuous hyper-parameters.
        settings: The variation's warm start; None: it has none, 0 FLOPs.
        horizon: Horizon of the look-ahead loss.
        constants: Native values of the hyper-parameters that are not searched.

    Returns:
        ``batch`` and ``warm``.
    """
    psi = {name: distribution.low for name, distribution in space.distributions.items()}
    state = replace(state, psi={**constants, **psi})
    cuda = [task.device] if task.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        with FlopCounterMode(display=False) as batch:
            _train_batch(task, state)
        if settings is None:
            return {"batch": batch.get_total_flops(), "warm": 0}
        plain = replace(state_loss(task, state, 0, horizon), augment=partial(_unaugmented, task))
        with FlopCounterMode(display=False) as warm:
            warm_start(plain, space, psi, settings, torch.Generator().manual_seed(0))
    return {"batch": batch.get_total_flops(), "warm": warm.get_total_flops()}


def _train_batch(task: Task, state: TrainState) -> None:
    network, psi = load(task, state), state.psi
    raw, target = task.warm_batches(state.seed, state.config_index, 0)(0)
    with autocast(task.device):
        loss = task.training_loss(network(task.prepare(raw)), target, psi["label_smoothing"])
    loss.backward()  # type: ignore[no-untyped-call]
    network.zero_grad()


def _unaugmented(task: Task, inputs: Any, magnitude: Tensor) -> Tensor:
    # In the graph, as augmented inputs are, so that an estimator takes the same way through it.
    return task.prepare(inputs) + 0 * magnitude
