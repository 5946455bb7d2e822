"""How fast an epoch could be: what it computes and moves, at the rates that the machine reaches."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optuna_ohgw.bench.cases import SPACE
from optuna_ohgw.bench.clock import synchronize
from optuna_ohgw.cost import count_flops
from optuna_ohgw.tasks.image import ImageTask
from optuna_ohgw.tasks.precision import autocast
from optuna_ohgw.training import TrainState, load

_MATRIX_SIDE = {"cpu": 2048, "cuda": 8192}
_REPEATS = 7
_LARGE_BYTES = 2**28
_LEAST_SECONDS = 0.01


@dataclass(frozen=True)
class Bound:
    """The least time of an epoch.

    Attributes:
        flops: Floating-point operations of its matrix products and convolutions.
        traffic: Bytes that it moves at least.
        rate: FLOPs a second of a large matrix product.
        bandwidth: Bytes a second of a copy, read and written.
    """

    flops: float
    traffic: float
    rate: float
    bandwidth: float

    @property
    def seconds(self) -> float:
        """The longer of computing and moving, each at its full rate."""
        return max(self.flops / self.rate, self.traffic / self.bandwidth)

    @property
    def limit(self) -> str:
        """Which of the two it is."""
        return "arithmetic" if self.flops / self.rate >= self.traffic / self.bandwidth else "memory"


def bound(task: ImageTask, state: TrainState, rate: float) -> Bound:
    """Return the bound of an epoch, at a measured matrix rate and a bandwidth measured here."""
    pictures = len(task.data.train_images)
    size = min(task.batch_size, pictures)
    flops = count_flops(task, state, SPACE, None, 1, {})["batch"] * pictures / size
    weights, saved = _weight_bytes(task), saved_bytes(task, state)
    # A step's weights: read forward, backward and by the optimizer, which writes them; their
    # gradients: written and read; momentum: read and written.
    traffic = 8 * weights * task.batches_per_epoch + 3 * saved * pictures / size
    return Bound(flops, traffic, rate, bandwidth(task.device, 3 * weights + saved))


def saved_bytes(task: ImageTask, state: TrainState) -> int:
    """Return the bytes that the forward pass of a mini-batch keeps for the backward pass.

    Each piece of memory once, the network's parameters not at all.
    """
    network, (raw, target) = load(task, state), task.warm_batches(0, 0, 0)(0)
    inputs = task.prepare(raw)
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, Any] = {}  # the storages themselves, so that no address comes twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast(task.device):
        task.training_loss(network(inputs), target, state.psi["label_smoothing"])
    return sum(storage.nbytes() for storage in kept.values())


def matrix_type(device: torch.device) -> torch.dtype:
    """Return the type in which training multiplies matrices on a device."""
    one = torch.ones(1, 1, device=device)
    with autocast(device):
        return (one @ one).dtype


def matrix_rate(device: torch.device) -> float:
    """Return FLOPs a second of a large matrix product in the type of training, the fastest of 7."""
    n = _MATRIX_SIDE[device.type]
    a, b = (torch.randn(n, n, device=device).to(matrix_type(device)) for _ in range(2))
    return 2 * n**3 / _fastest(lambda: a @ b, device)


def bandwidth(device: torch.device, working_set: int) -> float:
    """Return bytes a second of a copy, the fastest of 7.

    The faster of a copy as large as a step's working set, which may stay in the caches, and one
    that does not fit into them.
    """
    best = 0.0
    for size in (max(working_set, 2), _LARGE_BYTES):
        source = torch.ones(size // 2, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        best = max(best, 2 * len(source) / _fastest(lambda s=source, t=target: t.copy_(s), device))  # type: ignore[misc]
    return best


def _weight_bytes(task: ImageTask) -> int:
    return sum(p.numel() * p.element_size() for p in task.network().parameters())


def _fastest(call: Callable[[], Any], device: torch.device) -> float:
    """Return the least seconds a call, over so many at once that the clock does not matter."""
    calls, best, done = 1, float("inf"), 0
    while done < _REPEATS:
        synchronize(device)
        started = time.perf_counter()
        for _ in range(calls):
            call()
        synchronize(device)
        elapsed = time.perf_counter() - started
        if elapsed < _LEAST_SECONDS:
            calls *= 2
            continue
        best, done = min(best, elapsed / calls), done + 1
    return best
