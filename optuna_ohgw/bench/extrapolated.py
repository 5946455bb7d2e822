"""How long the CIFAR-10 study would take on this machine, from the measured parts of an epoch."""

from __future__ import annotations

from collections.abc import Sequence

from optuna_ohgw.bench.clock import Spread

CELL_EPOCHS = 2_500  # 880,000 mini-batches of 352 an epoch: what the study compares cells at
FINAL_EPOCHS = 200
# Cells of the study and of those reported beside it (studies/cifar10*.yaml).
PARTS: dict[str, tuple[int, int]] = {
    "search, 4 variations × 32 seeds": (128, CELL_EPOCHS),
    "their final retraining, at most": (128, FINAL_EPOCHS),
    "4 pilot cells": (4, CELL_EPOCHS),
    "bootstrap_count 0, 132 cells": (132, CELL_EPOCHS),
    "warm starts at every rung, 132 cells": (132, CELL_EPOCHS),
    "sweep of η_h, 48 cells": (48, CELL_EPOCHS),
    "label noise, 36 cells": (36, CELL_EPOCHS),
}


def device_hours(epoch_seconds: Sequence[float], at_once: float = 1.0) -> dict[str, Spread]:
    """Return the device-hours of each part of the study.

    Args:
        epoch_seconds: Seconds of one full epoch alone on the device, by repeat: training,
            evaluation, and its share of warm start and storage.
        at_once: How many times the trials an hour grow with several at once.
    """
    return {
        name: Spread.of([cells * epochs * seconds / at_once / 3600 for seconds in epoch_seconds])
        for name, (cells, epochs) in PARTS.items()
    }
