"""Schedulers that choose by a model, by name; apart from the others, whose readers need no torch."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

from optuna_ohgw.errors import UserError
from optuna_ohgw.schedulers import Settings
from optuna_ohgw.schedulers.choosing import Array, Chooser


def _bohb(settings: Settings, candidates: Array, seed: int) -> Chooser:
    from optuna_ohgw.schedulers.bohb import Bohb

    return Bohb(settings.max_resource, candidates, **settings.rungs, maximize=settings.maximize, seed=seed)


def _dyhpo(settings: Settings, candidates: Array, seed: int) -> Chooser:
    from optuna_ohgw.schedulers.dyhpo import Dyhpo

    step = settings.min_resource
    return Dyhpo(settings.max_resource, candidates, maximize=settings.maximize, seed=seed, step=step)


def _boil(settings: Settings, candidates: Array, seed: int) -> Chooser:
    from optuna_ohgw.schedulers.boil import Boil

    return Boil(settings.max_resource, candidates, maximize=settings.maximize, seed=seed)


def check_installed(name: str, field: str) -> None:
    """Raise a UserError that names the field unless what a scheduler is made from is installed."""
    needed = {"dyhpo": ("gpytorch",), "boil": ("gpytorch", "botorch")}.get(name, ())
    missing = [module for module in needed if find_spec(module) is None]
    if missing:
        raise UserError(f"{field}: {name} needs {missing[0]}; pip install 'optuna-ohgw[models]'")


# Settings, candidates [n, d] in the unit cube and a seed ↦ a scheduler; imported when they are made.
CHOOSERS: dict[str, Callable[[Settings, Array, int], Chooser]] = {
    "bohb": _bohb,
    "dyhpo": _dyhpo,
    "boil": _boil,
}
