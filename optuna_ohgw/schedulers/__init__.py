"""Schedulers: which configuration is trained how long, decided by a fold over events."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from optuna_ohgw.schedulers.base import Decision as Decision
from optuna_ohgw.schedulers.base import Scheduler as Scheduler
from optuna_ohgw.schedulers.hyperband import HyperbandPromotion, HyperbandStopping
from optuna_ohgw.schedulers.one_epoch import OneEpoch
from optuna_ohgw.schedulers.pasha import Pasha
from optuna_ohgw.schedulers.promotion import PromotionAsha
from optuna_ohgw.schedulers.stopping import StoppingAsha
from optuna_ohgw.schedulers.synchronous import HyperbandSynchronous


@dataclass(frozen=True)
class Settings:
    """What schedulers are made from; each takes what it has.

    Attributes:
        max_resource: Resource of full training.
        min_resource: The lowest rung.
        reduction_factor: η.
        bootstrap_count: Configurations stopped at each rung before Optuna's rule compares.
        maximize: Whether higher values are better.
        configs: Configurations that the one-epoch baseline chooses from.
    """

    max_resource: int
    min_resource: int = 1
    reduction_factor: int = 3
    bootstrap_count: int = 0
    maximize: bool = False
    configs: int = 256

    @property
    def rungs(self) -> dict[str, int]:
        """The settings that every scheduler with rungs takes, for use as arguments."""
        return {"min_resource": self.min_resource, "reduction_factor": self.reduction_factor}


_KEPT = 3  # by the one-epoch baseline, as in its paper


def _optuna(s: Settings) -> Scheduler:
    count, up = s.bootstrap_count, s.maximize
    low, eta = s.min_resource, s.reduction_factor
    return StoppingAsha(
        s.max_resource,
        min_resource=low,
        reduction_factor=eta,
        rule="optuna",
        bootstrap_count=count,
        maximize=up,
    )


def _one_epoch(s: Settings) -> Scheduler:
    keep, low = min(_KEPT, s.configs), s.min_resource
    return OneEpoch(s.max_resource, configs=s.configs, min_resource=low, keep=keep, maximize=s.maximize)


SCHEDULERS: dict[str, Callable[[Settings], Scheduler]] = {
    "asha": _optuna,
    "asha-quantile": lambda s: StoppingAsha(
        s.max_resource,
        min_resource=s.min_resource,
        reduction_factor=s.reduction_factor,
        maximize=s.maximize,
    ),
    "asha-promotion": lambda s: PromotionAsha(s.max_resource, **s.rungs, maximize=s.maximize),
    "pasha": lambda s: Pasha(s.max_resource, **s.rungs, maximize=s.maximize),
    "hyperband": lambda s: HyperbandStopping(s.max_resource, **s.rungs, maximize=s.maximize),
    "hyperband-promotion": lambda s: HyperbandPromotion(s.max_resource, **s.rungs, maximize=s.maximize),
    "hyperband-synchronous": lambda s: HyperbandSynchronous(s.max_resource, **s.rungs, maximize=s.maximize),
    "one-epoch": _one_epoch,
    "full": lambda s: StoppingAsha(s.max_resource, min_resource=s.max_resource, maximize=s.maximize),
}
