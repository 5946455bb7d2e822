"""DyHPO: one epoch at a time, where a deep-kernel Gaussian process expects the most improvement."""

from optuna_ohgw import DyHPOSampler, best_trial, epochs

__all__ = ["DyHPOSampler", "best_trial", "epochs"]
