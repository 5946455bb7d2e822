"""The training state, one explicit value, and training an epoch as a function of it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optuna_ohgw.lookahead import LookaheadLoss, lookahead_loss
from optuna_ohgw.seeds import Purpose, derive_seed
from optuna_ohgw.steps import step_for
from optuna_ohgw.tasks.base import Task

Tensors = dict[str, Tensor]


class Interrupted(Exception):
    """Training was asked to stop."""


@dataclass(frozen=True)
class TrainState:
    """Everything that the rest of a trial's training depends on.

    Random streams are part of it as their key (seed, config_index, epoch), and so is the position
    in the learning-rate schedule. Two equal states train on to equal states, bit for bit on a CPU.

    Attributes:
        weights: Parameters by name.
        buffers: BatchNorm statistics and other buffers by name.
        velocity: Momentum buffers by parameter name.
        psi: Native hyper-parameters in use: lr (base rate), momentum, weight_decay, magnitude,
            label_smoothing.
        epoch: Epochs trained.
        epochs: Epochs of the whole schedule.
        seed: Study seed.
        config_index: Position of the configuration in its cell.
        scaler: State of the loss scaler of float16 training; empty without one.
    """

    weights: Tensors
    buffers: Tensors
    velocity: Tensors
    psi: Mapping[str, float]
    epoch: int
    epochs: int
    seed: int
    config_index: int
    scaler: Mapping[str, Any] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> TrainState:
        """Return the state on another device."""
        groups = (self.weights, self.buffers, self.velocity)
        weights, buffers, velocity = ({n: t.to(device) for n, t in g.items()} for g in groups)
        return replace(self, weights=weights, buffers=buffers, velocity=velocity)

    def tensors(self) -> Tensors:
        """Return all tensors under ``weights.``, ``buffers.`` and ``velocity.`` names."""
        groups = {"weights": self.weights, "buffers": self.buffers, "velocity": self.velocity}
        return {f"{group}.{name}": t for group, named in groups.items() for name, t in named.items()}

    def digest(self) -> str:
        """Return a short digest of weights and buffers, equal for equal bits."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.tensors().items()):
            if not name.startswith("velocity."):
                digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def content(self) -> dict[str, Any]:
        """Return the state as tensors and plain values."""
        return {f.name: getattr(self, f.name) for f in fields(self)} | {
            "psi": dict(self.psi),
            "scaler": dict(self.scaler),
        }

    def save(self, path: Path) -> None:
        """Write the state as one safetensors file, atomically."""
        scalars = {
            "psi": dict(self.psi),
            "epoch": self.epoch,
            "epochs": self.epochs,
            "seed": self.seed,
            "config_index": self.config_index,
            "scaler": dict(self.scaler),
        }
        _write(path, self.tensors(), {"state": json.dumps(scalars)})

    def export(self, path: Path) -> None:
        """Write weights and buffers under the network's own names, ψ in the metadata.

        ``network.load_state_dict(safetensors.torch.load_file(path))`` reads it.
        """
        metadata = {"psi": json.dumps(dict(self.psi)), "epoch": str(self.epoch)}
        _write(path, {**self.weights, **self.buffers}, metadata)

    @classmethod
    def load(cls, path: Path, device: torch.device | str = "cpu") -> TrainState:
        """Return the state that a file holds.

        Raises:
            ValueError: If the file holds no training state.
        """
        from safetensors import SafetensorError, safe_open

        groups: dict[str, Any] = {"weights": {}, "buffers": {}, "velocity": {}}
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                scalars = json.loads((file.metadata() or {})["state"])
                for key in file.keys():  # noqa: SIM118 - not a mapping
                    group, _, name = key.partition(".")
                    groups[group][name] = file.get_tensor(key)
            return cls(**groups, **scalars)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no training state; give a file that save() wrote") from error


@dataclass(frozen=True)
class StateStack:
    """Several states of one architecture with their tensors stacked along a new first axis."""

    weights: Tensors
    buffers: Tensors
    velocity: Tensors
    members: tuple[TrainState, ...]

    @classmethod
    def of(cls, states: Sequence[TrainState]) -> StateStack:
        """Return the stack of states, ``[n, …]`` for every tensor."""
        bare = tuple(replace(s, weights={}, buffers={}, velocity={}) for s in states)
        return cls(
            _stack([s.weights for s in states]),
            _stack([s.buffers for s in states]),
            _stack([s.velocity for s in states]),
            bare,
        )

    def unstack(self) -> list[TrainState]:
        """Return the states, in order."""
        return [
            replace(
                member,
                weights={n: t[i] for n, t in self.weights.items()},
                buffers={n: t[i] for n, t in self.buffers.items()},
                velocity={n: t[i] for n, t in self.velocity.items()},
            )
            for i, member in enumerate(self.members)
        ]


def initial_state(task: Task, seed: int, config_index: int, epochs: int) -> TrainState:
    """Return the state before training: initial weights, no momentum, ψ still empty."""
    network = task.initialize(seed, config_index)
    weights = {n: p.detach().clone() for n, p in network.named_parameters()}
    return TrainState(
        weights=weights,
        buffers=_buffers(network),
        velocity={n: torch.zeros_like(p) for n, p in weights.items()},
        psi={},
        epoch=0,
        epochs=epochs,
        seed=seed,
        config_index=config_index,
    )


def cosine(step: int, steps: int) -> float:
    """Return the factor of the learning rate at a step, ½(1 + cos(π·step/steps))."""
    return 0.5 * (1.0 + math.cos(math.pi * step / steps))


def train_epoch(
    task: Task, state: TrainState, stop: Callable[[], bool] = lambda: False
) -> tuple[TrainState, float]:
    """Return the state after one more epoch, and its mean training loss (nats).

    SGD with momentum at a cosine rate. The given state is not changed; the task's network is left
    at the new one, ready for ``task.evaluate``. Cost: ``task.batches_per_epoch`` mbu.

    Raises:
        Interrupted: If ``stop()`` becomes true.
    """
    network = load(task, state)
    psi = state.psi
    step = step_for(task, network, psi, state.velocity, state.scaler)
    total, steps = torch.zeros((), device=task.device), task.batches_per_epoch
    cuda = [task.device] if task.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        _seed(derive_seed(state.seed, Purpose.MODEL, state.config_index, state.epoch), task.device)
        batches = task.epoch(state.seed, state.config_index, state.epoch, psi["magnitude"])
        for i, (inputs, target) in enumerate(batches):
            if stop():
                raise Interrupted
            factor = cosine(state.epoch * steps + i, state.epochs * steps)
            total += step(inputs, target, psi["lr"] * factor)
    after = replace(
        state,
        weights={n: p.detach().clone() for n, p in network.named_parameters()},
        buffers=_buffers(network),
        velocity=step.velocity(),
        scaler=step.scaler(),
        epoch=state.epoch + 1,
    )
    return after, float(total) / steps


def load(task: Task, state: TrainState) -> torch.nn.Module:
    """Return the task's network in training mode, holding a copy of the state."""
    network = task.network()
    network.load_state_dict({**state.weights, **state.buffers}, strict=True)
    network.train()
    return network


def state_loss(task: Task, state: TrainState, rung: int, horizon: int) -> LookaheadLoss:
    """Return the look-ahead loss of ψ at a state, on fresh training mini-batches of the rung.

    At the start of training momentum acts through its steady state; later from the state's
    momentum buffers, exactly. The learning rate is that of the schedule at the state's epoch.
    """
    return lookahead_loss(
        load(task, state),
        task.warm_batches(state.seed, state.config_index, rung),
        task.criterion,
        horizon=horizon,
        augment=task.augment,
        prepare=task.prepare,
        fixed=state.psi,
        velocity=state.velocity if state.epoch else None,
        lr_scale=cosine(state.epoch, state.epochs),
    )


def _seed(seed: int, device: torch.device) -> None:
    """Seed the default generators of the CPU and of a device.

    As ``torch.manual_seed`` does, which takes as long as a training step: it visits every kind of
    device and formats a stack trace for those that are not ready.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def _buffers(network: torch.nn.Module) -> Tensors:
    """Return copies of the buffers that a state dict holds; the others are constants of the network."""
    kept = network.state_dict().keys()
    return {n: b.detach().clone() for n, b in network.named_buffers() if n in kept}


def _write(path: Path, tensors: Tensors, metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    partial = path.with_name(path.name + ".partial")
    save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, partial, metadata=metadata)
    partial.replace(path)


def _stack(named: Sequence[Tensors]) -> Tensors:
    return {name: torch.stack([tensors[name] for tensors in named]) for name in named[0]}
