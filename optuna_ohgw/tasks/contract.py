"""The contract of a task of the user's own: one class, a few methods.

A study names it as ``task: {name: my_module:MyTask, epochs: 20, options: {...}}``. Options go to the
constructor by name, after ``seed`` (of the study, for the split of the data), ``device`` and ``epochs``.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from optuna_ohgw.metric import Metric

METHODS = {
    "build": ("seed",),
    "train": ("psi", "epoch", "seed", "batches"),
    "evaluate": ("part",),
    "state_dict": (),
    "load_state_dict": ("state",),
}
LOSS = ("psi", "epoch", "seed", "horizon")
PARTS = ("warm", "validation", "test")


class OwnTask(Protocol):
    """What the class of a user's task has. It need not inherit from this.

    ``loss`` may be left out: then hyper-gradients are central differences over short training runs,
    which the records flag as ``finite-difference``. ``order(seed)`` may be added: text, bytes or a tensor
    that tells an epoch's data order, for the check of pairing. A long epoch may call ``self.stop()``
    between mini-batches, which ends it where the run is to stop. ``counted_batches`` (1) is over how many
    mini-batches FLOPs are counted, where one alone does not stand for an epoch.

    Attributes:
        metric: What ``evaluate`` measures.
        hyperparameters: Limits (low, high) in native units of every continuous hyper-parameter.
        batches_per_epoch: Mini-batches that ``train`` takes in an epoch, the unit of cost.
    """

    metric: Metric
    hyperparameters: Mapping[str, tuple[float, float]]
    batches_per_epoch: int

    def build(self, seed: int) -> None:
        """Begin anew: a network, its optimiser and all else that training changes, drawn by ``seed``."""
        ...

    def train(self, psi: Mapping[str, float], epoch: int, seed: int, batches: int | None = None) -> float:
        """Train epoch 0, 1, … or its first ``batches`` mini-batches; return the mean training loss.

        Data order and noise must depend on ``seed`` alone: torch's, NumPy's and Python's generators are
        seeded with it before the call.
        """
        ...

    def evaluate(self, part: str) -> tuple[float, float]:
        """Return metric and loss on ``validation`` or ``test``, or on ``warm``: some training data."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return all that training changes, as tensors, numbers, texts, lists and mappings."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` returned."""
        ...


class OwnTaskWithLoss(OwnTask, Protocol):
    """A task with a differentiable loss of ψ."""

    def loss(self, psi: Mapping[str, float], epoch: int, seed: int, horizon: int) -> Callable[..., Any]:
        """Return the loss of ψ at the present state, such as ``lookahead_loss`` makes.

        It takes a mapping of names to 0-d tensors and changes nothing; ``psi`` are the values in use,
        for names that the mapping lacks. Its mini-batches are drawn by ``seed``.
        """
        ...


@functools.cache
def load_class(path: str) -> Any:
    """Return the class that ``module:Class`` names, from the working folder or the environment.

    Raises:
        ValueError: If it cannot be imported, or lacks a part of the contract; it says what.
    """
    module_name, _, name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise ValueError(
                f"module {module_name!r} needs {error.name!r}, which is not installed"
            ) from error
        raise ValueError(
            f"module {module_name!r} is neither in {os.getcwd()} nor installed; run from its folder"
        ) from error
    except Exception as error:
        raise ValueError(f"module {module_name!r} fails: {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if found is None:
        classes = [n for n, v in vars(module).items() if inspect.isclass(v) and v.__module__ == module_name]
        raise ValueError(f"module {module_name!r} has no {name!r}; classes: {', '.join(classes) or 'none'}")
    if missing := faults(found):
        raise ValueError(f"{path} is no task: {'; '.join(missing)}")
    return found


def faults(found: Any) -> list[str]:
    """Return what a class lacks of the contract, in words; nothing if it has all."""
    if not inspect.isclass(found):
        return [f"it is {type(found).__name__!r}, not a class"]
    lines = []
    if not isinstance(getattr(found, "metric", None), Metric):
        lines.append("metric is missing; give metric = Metric('accuracy', maximize=True)")
    ranges = getattr(found, "hyperparameters", None)
    if not (isinstance(ranges, Mapping) and ranges):
        lines.append("hyperparameters is missing; give limits by name, as {'lr': (0.0, 1.0)}")
    else:
        for name, ends in ranges.items():
            numbers = isinstance(ends, tuple) and all(isinstance(end, int | float) for end in ends)
            if not (numbers and len(ends) in (2, 3) and ends[0] < ends[1]):
                lines.append(f"hyperparameters[{name!r}] is {ends!r}; give (low, high)")
    signatures = METHODS | ({"loss": LOSS} if hasattr(found, "loss") else {})
    for method, names in signatures.items():
        own = getattr(found, method, None)
        call = f"{method}({', '.join(('self', *names))})"
        if not callable(own):
            lines.append(f"{call} is missing")
            continue
        try:
            inspect.signature(own).bind(None, **dict.fromkeys(names))
        except TypeError as error:
            lines.append(f"{call} cannot be called so ({error})")
    return lines
