"""The study that the benchmarks of a run use: digits, as in the study file of that name."""

from __future__ import annotations

from pathlib import Path

from optuna_ohgw.spec import StudySpec
from optuna_ohgw.spec_parts import BudgetSpec, ExecutionSpec, RangeSpec, SchedulerSpec, WarmStartSpec
from optuna_ohgw.spec_tasks import AugmentationSpec, ImageSpec

WORKERS = 2


def digits_study(folder: Path, device: str = "auto") -> StudySpec:
    """Return the study of ``studies/digits.yaml`` with an output folder, without those beside it."""
    return StudySpec(
        name="digits",
        task=ImageSpec(
            data="digits",
            model="mlp",
            epochs=27,
            batch_size=32,
            validation_images=360,
            augmentation=AugmentationSpec(flip=False, crop_padding=1, operations=2, cutout=3),
        ),
        space={
            "lr": RangeSpec(low=1e-4, high=1.0, log=True),
            "weight_decay": RangeSpec(low=1e-6, high=1e-1, log=True),
            "momentum": RangeSpec(low=0.0, high=0.99),
            "magnitude": RangeSpec(low=0.0, high=10.0),
            "label_smoothing": RangeSpec(low=0.0, high=0.3),
        },
        sampler="random",
        scheduler=SchedulerSpec(min_resource=3, reduction_factor=3, bootstrap_count=2),
        variations=("asha-baseline", "asha-random-warm", "asha-ohgw-1step", "asha-ohgw-3step"),
        warm_start=WarmStartSpec(eta_h=1e-3, horizon=1),
        seeds=tuple(range(8)),
        pilot_seeds=(1000, 1001, 1002, 1003),
        targets=(0.95,),
        budget=BudgetSpec(trials=16),
        execution=ExecutionSpec(workers=1, cells_at_once=WORKERS, threads=1, device=device),
        output=str(folder),
    )
