"""Figures of a study in one visual language: tables in, plotly figures out."""

from optuna_ohgw.figures.cell import learning_curves, workers
from optuna_ohgw.figures.cost import eta_sensitivity, overhead_bars
from optuna_ohgw.figures.times import best_value, paired_times, survival_of_times
from optuna_ohgw.figures.trials import benefit_heatmap, psi_shift, survival

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
