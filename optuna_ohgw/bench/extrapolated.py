"""How long the CIFAR-10 study would take on this machine, from the measured parts of an epoch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from optuna_ohgw.bench.clock import Spread
from optuna_ohgw.schedulers.stopping import StoppingAsha
from optuna_ohgw.simulation import simulate

CELL_EPOCHS = 2_500  # 880,000 mini-batches of 352 an epoch: what the study compares cells at
FINAL_EPOCHS = 200
# Seconds a trial between and inside trials, and at a change of cell: ``bench run``, 2 CPU cores.
AROUND_SECONDS = 0.025
_CELLS = 32


@dataclass(frozen=True)
class Trials:
    """Means over the trials of cells: epochs trained, and rungs begun."""

    epochs: float
    rungs: float


@dataclass(frozen=True)
class Part:
    """Cells of the study or beside it, epochs of each, and what its trials cost besides.

    ``warm_starts`` is a mean over the cells, a trial or, at ``every_rung``, a rung.
    """

    cells: int
    warm_starts: float = 1.25  # baseline 0, random-warm 1 (its gradient sets the length), 1-step 1, 3-step 3
    epochs: int = CELL_EPOCHS
    bootstrap_count: int = 2
    every_rung: bool = False
    trials: bool = True


STUDY_PARTS: dict[str, Part] = {
    "search, 4 variations × 32 seeds": Part(128),
    "their final retraining, at most": Part(128, epochs=FINAL_EPOCHS, trials=False),
    "4 pilot cells": Part(4, warm_starts=0.0),
    "bootstrap_count 0, 132 cells": Part(132, warm_starts=160 / 132, bootstrap_count=0),
    "warm starts at every rung, 132 cells": Part(132, warm_starts=160 / 132, every_rung=True),
    "sweep of η_h, 48 cells": Part(48, warm_starts=5 / 6),
    "label noise, 36 cells": Part(36, warm_starts=40 / 36),
    "final retraining of those beside, at most": Part(352, epochs=FINAL_EPOCHS, trials=False),
}


@cache
def halved(
    *,
    epochs: int = 200,
    min_resource: int = 1,
    reduction_factor: int = 4,
    bootstrap_count: int = 2,
    budget_epochs: float = math.inf,
    budget_trials: int | None = None,
) -> Trials:
    """Return the mean trial under the halving of a study, simulated over 32 cells.

    A trial's rank is drawn at random and the same at every rung. The defaults are those of
    ``studies/cifar10.yaml``.

    Args:
        epochs: Epochs of full training.
        min_resource: The lowest rung.
        reduction_factor: η.
        bootstrap_count: The first so many at a rung are stopped.
        budget_epochs: Epochs of a cell.
        budget_trials: Trials of a cell; None: as many as the epochs allow.
    """
    trained: list[int] = []
    count = budget_trials or int(budget_epochs)
    for seed in range(_CELLS):
        ranks = np.random.default_rng(seed).random(count)
        scheduler = StoppingAsha(
            epochs,
            min_resource=min_resource,
            reduction_factor=reduction_factor,
            rule="optuna",
            bootstrap_count=bootstrap_count,
        )
        curves = np.broadcast_to(ranks[:, None], (count, epochs))
        done = simulate(scheduler, curves, range(count), max_slices=budget_epochs)
        trained += done.final_resources().values()
    levels = [rung.level for rung in scheduler.rungs]
    begun = [1 + sum(level < last for level in levels) for last in trained]
    return Trials(float(np.mean(trained)), float(np.mean(begun)))


def device_hours(
    epoch_seconds: Sequence[float], warm_start_seconds: float, at_once: float = 1.0
) -> dict[str, Spread]:
    """Return the device-hours of each part of the study.

    Args:
        epoch_seconds: Seconds of one full epoch alone on the device, by repeat: training and
            evaluation.
        warm_start_seconds: Of one warm start.
        at_once: How many times the trials an hour grow with several at once.
    """
    return {
        name: Spread.of([part_hours(part, s, warm_start_seconds) / at_once for s in epoch_seconds])
        for name, part in STUDY_PARTS.items()
    }


def part_hours(part: Part, epoch_seconds: float, warm_start_seconds: float) -> float:
    """Return the hours of a part: its epochs, and what each trial of it costs besides."""
    seconds = part.cells * part.epochs * epoch_seconds
    if part.trials:
        mean = halved(bootstrap_count=part.bootstrap_count, budget_epochs=part.epochs)
        starts = part.warm_starts * (mean.rungs if part.every_rung else 1.0)
        trials = part.cells * part.epochs / mean.epochs
        seconds += trials * (starts * warm_start_seconds + AROUND_SECONDS)
    return seconds / 3600
