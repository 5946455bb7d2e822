"""Figures of a study in one visual language: tables in, plotly figures out."""

from optuna_ohgw.figures.across import (
    best_value,
    eta_sensitivity,
    overhead_bars,
    paired_times,
    survival_of_times,
)
from optuna_ohgw.figures.trials import benefit_heatmap, learning_curves, psi_shift, survival, workers

__all__ = [
    "benefit_heatmap",
    "best_value",
    "eta_sensitivity",
    "learning_curves",
    "overhead_bars",
    "paired_times",
    "psi_shift",
    "survival",
    "survival_of_times",
    "workers",
]
