"""What is measured of a trial epoch by epoch, and the state that the rest of its training depends on."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from optuna_ohgw.tasks.base import Evaluation
from optuna_ohgw.workload import Workload

COLUMNS = (
    "mbu",
    "wall",
    "train_s",
    "warm_s",
    "eval_s",
    "train_loss",
    "val_loss",
    "val_metric",
)


@dataclass
class Curve:
    """What a trial measured, one row an epoch; ``mbu`` is cumulative, ``wall`` Unix seconds."""

    columns: dict[str, list[float | None]] = field(default_factory=lambda: {c: [] for c in COLUMNS})

    def append(self, **row: float) -> None:
        """Add an epoch, rounded for storage; what is not finite is None.

        Milliseconds of wall time, four digits of durations, six of the rest.
        """
        for name in COLUMNS:
            digits = 4 if name.endswith("_s") else 6
            value = round(row[name], 3) if name == "wall" else float(f"{row[name]:.{digits}g}")
            self.columns[name].append((value or 0) if math.isfinite(value) else None)


@dataclass
class Best:
    """The state of the best validation metric so far."""

    state: Any = None
    value: float | None = None
    sign: float = 1.0

    def offer(self, state: Any, evaluation: Evaluation) -> None:
        """Keep ``state`` if it is better than all before."""
        if self.value is None or self.sign * evaluation.metric > self.sign * self.value:
            self.state, self.value = state, evaluation.metric


@dataclass
class Progress:
    """What the rest of a trial depends on, to be frozen and thawed."""

    workload: Workload
    state: Any
    best: Best = field(default_factory=Best)
    curve: Curve = field(default_factory=Curve)

    def state_dict(self) -> dict[str, Any]:
        """Return it as tensors and plain values; the best state but once where it is the present one."""
        same = self.best.state is self.state
        best = None if same or self.best.state is None else self.best.state.content()
        known = {"same": same, "state": best, "value": self.best.value}
        return {"state": self.state.content(), "best": known, "curve": self.curve.columns}

    def load_state_dict(self, content: dict[str, Any]) -> None:
        """Take over what ``state_dict`` returned, on the workload's device."""
        self.state = self.workload.restore(content["state"])
        best = content["best"]
        kept = None if best["state"] is None else self.workload.restore(best["state"])
        self.best = Best(self.state if best["same"] else kept, best["value"], self.best.sign)
        self.curve = Curve(content["curve"])


class Stopwatch:
    """Seconds between calls, the device's work included."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.last = 0.0
        self.lap()

    def lap(self) -> float:
        """Return the seconds since the call before."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        elapsed, self.last = now - self.last, now
        return elapsed


def is_finite(train_loss: float, evaluation: Evaluation) -> bool:
    """Return whether an epoch can be reported."""
    return all(map(math.isfinite, (train_loss, evaluation.loss, evaluation.metric)))


def metric_of(evaluation: Evaluation) -> float:
    """Return the metric; NaN where the loss is not finite."""
    return evaluation.metric if math.isfinite(evaluation.loss) else math.nan
