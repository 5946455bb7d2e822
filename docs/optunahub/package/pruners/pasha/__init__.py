"""PASHA as an Optuna pruner, and the loop over epochs that pauses and resumes trials."""

from optuna_ohgw import OhgwSampler, PashaPruner, best_trial, epochs

__all__ = ["OhgwSampler", "PashaPruner", "best_trial", "epochs"]
