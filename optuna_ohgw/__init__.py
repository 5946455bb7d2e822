"""One-shot hyper-gradient warm starts for Optuna trials."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from optuna_ohgw.version import __version__ as __version__

if TYPE_CHECKING:
    from optuna_ohgw.bohb_sampler import BohbSampler
    from optuna_ohgw.chooser_sampler import BoilSampler, DyHPOSampler
    from optuna_ohgw.distributed import RankError, distributed_loss
    from optuna_ohgw.distributed_suggest import ohgw_suggest_distributed
    from optuna_ohgw.errors import UserError
    from optuna_ohgw.freezing import epochs
    from optuna_ohgw.history import best_trial, checkpoint_bytes
    from optuna_ohgw.hypergrad import HyperGradient, direct, exact, finite_difference, lean
    from optuna_ohgw.lookahead import LookaheadLoss, lookahead_loss
    from optuna_ohgw.metric import Metric
    from optuna_ohgw.sampler import OhgwSampler, PairedSampler
    from optuna_ohgw.schedulers.pruners import PairedHyperbandPruner, PashaPruner, PromotionPruner
    from optuna_ohgw.space import SearchSpace
    from optuna_ohgw.storage import BatchedStorage
    from optuna_ohgw.suggest import ohgw_suggest
    from optuna_ohgw.updates import slots_of
    from optuna_ohgw.warmstart import Warmed, WarmStart, warm_start

_HOME = {
    "BatchedStorage": "storage",
    "BohbSampler": "bohb_sampler",
    "BoilSampler": "chooser_sampler",
    "DyHPOSampler": "chooser_sampler",
    "HyperGradient": "hypergrad",
    "LookaheadLoss": "lookahead",
    "Metric": "metric",
    "OhgwSampler": "sampler",
    "PairedHyperbandPruner": "schedulers.pruners",
    "PairedSampler": "sampler",
    "PashaPruner": "schedulers.pruners",
    "PromotionPruner": "schedulers.pruners",
    "RankError": "distributed",
    "SearchSpace": "space",
    "UserError": "errors",
    "WarmStart": "warmstart",
    "Warmed": "warmstart",
    "best_trial": "history",
    "checkpoint_bytes": "history",
    "direct": "hypergrad",
    "distributed_loss": "distributed",
    "epochs": "freezing",
    "exact": "hypergrad",
    "finite_difference": "hypergrad",
    "lean": "hypergrad",
    "lookahead_loss": "lookahead",
    "ohgw_suggest": "suggest",
    "ohgw_suggest_distributed": "distributed_suggest",
    "slots_of": "updates",
    "warm_start": "warmstart",
}

__all__ = [
    "BatchedStorage",
    "BohbSampler",
    "BoilSampler",
    "DyHPOSampler",
    "HyperGradient",
    "LookaheadLoss",
    "Metric",
    "OhgwSampler",
    "PairedHyperbandPruner",
    "PairedSampler",
    "PashaPruner",
    "PromotionPruner",
    "RankError",
    "SearchSpace",
    "UserError",
    "WarmStart",
    "Warmed",
    "best_trial",
    "checkpoint_bytes",
    "direct",
    "distributed_loss",
    "epochs",
    "exact",
    "finite_difference",
    "lean",
    "lookahead_loss",
    "ohgw_suggest",
    "ohgw_suggest_distributed",
    "slots_of",
    "warm_start",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that the command starts without torch."""
    if name in _HOME:
        return getattr(import_module(f"optuna_ohgw.{_HOME[name]}"), name)
    raise AttributeError(f"module 'optuna_ohgw' has no attribute {name!r}")
