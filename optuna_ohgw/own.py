"""A user's own task as a workload: its state as a value, its random numbers paired, its loss of ψ."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optuna_ohgw.seeds import Purpose, derive_seed
from optuna_ohgw.space import SearchSpace
from optuna_ohgw.tasks.base import Evaluation
from optuna_ohgw.training import Interrupted
from optuna_ohgw.warmstart import WarmStart
from optuna_ohgw.workload import Stop, counted_flops


@dataclass(frozen=True)
class OwnState:
    """The state of a user's task.

    Attributes:
        own: What its ``state_dict`` returned, copied.
        psi: Native hyper-parameters in use.
        epoch: Epochs trained.
        seed: Study seed.
        config_index: Position of the configuration in its cell.
    """

    own: Mapping[str, Any]
    psi: Mapping[str, float]
    epoch: int
    seed: int
    config_index: int

    def digest(self) -> str:
        """Return a short digest of the task's own state."""
        digest = hashlib.sha256()
        _feed(digest.update, self.own)
        return digest.hexdigest()[:16]

    def content(self) -> dict[str, Any]:
        """Return it as tensors and plain values."""
        return {**vars(self), "own": dict(self.own), "psi": dict(self.psi)}

    def save(self, path: Path) -> None:
        """Write it to a file that ``torch.load`` reads with ``weights_only``."""
        partial = path.with_name(path.name + ".partial")
        torch.save(self.content(), partial)
        partial.replace(path)

    def export(self, path: Path) -> None:
        """Write it to a file: the task's state is under ``own``."""
        self.save(path)


class OwnWorkload:
    """A task behind the contract, see ``tasks.contract`` and :class:`~optuna_ohgw.workload.Workload`.

    Args:
        own: An instance of the user's class.
        device: Where it trains.
    """

    suffix = ".pt"

    def __init__(self, own: Any, device: torch.device) -> None:
        self.own, self.device = own, device
        self._at: OwnState | None = None  # that the task holds
        self._built = False

    @property
    def batches_per_epoch(self) -> int:
        """Mini-batches an epoch."""
        return int(self.own.batches_per_epoch)

    def start(self, seed: int, config_index: int) -> OwnState:
        """Return the state before training."""
        key = derive_seed(seed, Purpose.WEIGHTS, config_index)
        with self._drawn(key):
            self.own.build(key)
        self._built, self._at = True, None
        return OwnState(copied(self.own.state_dict()), {}, 0, seed, config_index)

    def restore(self, content: Mapping[str, Any]) -> OwnState:
        """Return a state."""
        return OwnState(**content)

    def read(self, path: Path) -> OwnState:
        """Return the state in a file."""
        return OwnState(**torch.load(path, map_location=self.device, weights_only=True))

    def train(self, state: OwnState, stop: Stop) -> tuple[OwnState, float]:
        """Return the state after one more epoch, and its loss."""
        if stop():
            raise Interrupted

        def check() -> None:
            if stop():
                raise Interrupted

        self.own.stop = check
        self._take(state)
        self._at = None
        key = derive_seed(state.seed, Purpose.ORDER, state.config_index, state.epoch)
        with self._drawn(key):
            loss = float(self.own.train(dict(state.psi), state.epoch, key))
        after = replace(state, own=copied(self.own.state_dict()), epoch=state.epoch + 1)
        self._at = after
        return after, loss

    def evaluate(self, state: OwnState, part: str) -> Evaluation:
        """Return loss and metric of a state; its random numbers are the same at every call."""
        self._take(state)
        with self._drawn(derive_seed(state.seed, Purpose.MODEL, state.config_index, state.epoch)):
            metric, loss = self.own.evaluate(part)
        return Evaluation(float(loss), float(metric))

    def loss(self, state: OwnState, rung: int, horizon: int) -> Any:
        """Return the task's loss of ψ, or that of short training runs where it has none."""
        self._take(state)
        self._at = None
        key = derive_seed(state.seed, Purpose.WARM_START, state.config_index, rung)
        if not hasattr(self.own, "loss"):
            return ShortRunLoss(self, state, key, horizon)
        with self._drawn(key):
            return self.own.loss(dict(state.psi), state.epoch, key, horizon)

    def order_digest(self, seed: int, config_index: int) -> str:
        """Return a digest of the first epoch's order as the task tells it, else of its seed."""
        key = derive_seed(seed, Purpose.ORDER, config_index, 0)
        digest = hashlib.sha256()
        with self._drawn(key):
            _feed(digest.update, self.own.order(key) if hasattr(self.own, "order") else key)
        return digest.hexdigest()[:16]

    def flops(
        self,
        state: OwnState,
        space: SearchSpace,
        settings: WarmStart | None,
        horizon: int,
        constants: Mapping[str, float],
    ) -> dict[str, int]:
        """Return what torch counts; 0 for training outside of it."""
        counted = int(getattr(self.own, "counted_batches", 1))

        def batch(psi: Mapping[str, float]) -> None:
            self._take(state)
            self._at = None
            with self._drawn(0):
                self.own.train(dict(psi), state.epoch, 0, counted)

        def loss(psi: Mapping[str, float]) -> Any:
            return self.loss(replace(state, psi=psi), 0, horizon)

        found = counted_flops(batch, loss, space, settings, constants)
        return {**found, "batch": found["batch"] // counted}

    def captured_bytes(self) -> int:
        """Return 0."""
        return 0

    def short_train(self, state: OwnState, seed: int, batches: int) -> tuple[OwnState, float]:
        """Return the state after a few mini-batches of an epoch, which the task then holds, and the loss."""
        self._take(state)
        self._at = None
        with self._drawn(seed):
            loss = float(self.own.train(dict(state.psi), state.epoch, seed, batches))
        self._at = after = replace(state, own=copied(self.own.state_dict()))
        return after, loss

    def short_run(self, state: OwnState, psi: Mapping[str, float], seed: int, batches: int) -> float:
        """Train a state for a few mini-batches; return the loss on training data. The state stays."""
        self._take(state)
        self._at = None
        with self._drawn(seed):
            self.own.train(dict(psi), state.epoch, seed, batches)
        with self._drawn(seed):
            return float(self.own.evaluate("warm")[1])

    def _take(self, state: OwnState) -> None:
        if not self._built:  # a state has something to be loaded into
            self.start(state.seed, state.config_index)
        if self._at is not state:
            self.own.load_state_dict(copied(state.own))
            self._at = state

    @contextmanager
    def _drawn(self, seed: int) -> Iterator[None]:
        """Seed the default generators while inside; they go on as if nothing had been drawn."""
        before = random.getstate(), np.random.get_state()  # noqa: NPY002
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002 - what users' code may draw from
            try:
                yield
            finally:
                random.setstate(before[0])
                np.random.set_state(before[1])  # noqa: NPY002


@dataclass(frozen=True)
class ShortRunLoss:
    """The training loss after ``horizon`` mini-batches of real training, as a function of ψ.

    It has no graph, so every component of its gradient is a central difference, with the same random
    numbers on both sides. One evaluation costs K + 1/3 mbu.
    """

    workload: OwnWorkload
    state: OwnState
    seed: int
    horizon: int

    @property
    def cost_mbu(self) -> float:
        """Cost of one evaluation."""
        return self.horizon + 1 / 3

    @property
    def exact_cost_mbu(self) -> float:
        """Cost of the value, which comes without a gradient."""
        return self.cost_mbu

    def draw(self, position: int) -> ShortRunLoss:
        """Return the same on other mini-batches."""
        return replace(self, seed=derive_seed(self.seed, Purpose.WARM_START, position))

    def with_horizon(self, horizon: int) -> ShortRunLoss:
        """Return the same after another number of mini-batches."""
        return replace(self, horizon=horizon)

    def __call__(self, psi: Mapping[str, Tensor]) -> Tensor:
        """Return the loss at ψ, without a graph."""
        values = {**self.state.psi, **{n: float(v.detach()) for n, v in psi.items()}}
        value = self.workload.short_run(self.state, values, self.seed, self.horizon)
        return torch.tensor(value, dtype=torch.float64)


def copied(tree: Any) -> Any:
    """Return a copy of tensors and plain values.

    Raises:
        TypeError: If there is anything else, which a checkpoint could not hold safely.
    """
    if isinstance(tree, Tensor):
        return tree.detach().clone()
    if isinstance(tree, Mapping):
        return {key: copied(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(copied(value) for value in tree)
    if isinstance(tree, np.generic):
        return tree.item()
    if tree is None or isinstance(tree, str | bytes | bool | int | float):
        return tree
    raise TypeError(
        f"state_dict holds {type(tree).__name__!r}; give tensors, numbers, texts, lists and mappings alone"
    )


def _feed(update: Callable[[bytes], object], tree: Any) -> None:
    if isinstance(tree, Tensor):
        tensor = tree.detach().cpu().contiguous()
        update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(tree, Mapping):
        for key in sorted(tree, key=str):
            update(str(key).encode())
            _feed(update, tree[key])
    elif isinstance(tree, list | tuple):
        for value in tree:
            _feed(update, value)
    elif isinstance(tree, bytes):
        update(tree)
    else:
        update(json.dumps(tree).encode())
