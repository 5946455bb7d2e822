"""What there is to choose from in a study file, a line each."""

from __future__ import annotations

import importlib.util
import inspect
from typing import get_args

from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table

from optuna_ohgw.spec_kinds import TASKS, ContractSpec
from optuna_ohgw.spec_parts import SchedulerSpec
from optuna_ohgw.variations import WARM_STARTS

SCHEDULERS = {
    "asha": "Optuna's SuccessiveHalvingPruner: asynchronous halving that stops trials",
    "asha-quantile": "the same by the cut-off of syne-tune's stopping ASHA",
    "asha-promotion": "ASHA of the paper: trials pause at rungs, the best go on",
    "pasha": "promotion ASHA whose longest rung grows only while the ranking changes",
    "hyperband": "stopping ASHA in several brackets, paired over variations",
    "hyperband-promotion": "the same with trials that pause",
    "hyperband-synchronous": "the paper's: rungs that wait for each other",
    "one-epoch": "all for one epoch, then the best to the end: a strong baseline",
    "bohb": "Hyperband's rungs, configurations chosen by a density model",
    "dyhpo": "the next epoch goes to whom a deep kernel of curves promises most",
    "boil": "the next stretch by a Gaussian process over curves and their cost",
}
RULES = {
    "baseline": "no warm start",
    "ohgw-1step": "one step of η_h against the hyper-gradient, as published",
    "ohgw-3step": "three such steps, each on a fresh mini-batch",
    "random-warm": "control: a random step as long as that of ohgw-1step",
    "random-3step": "control: three random steps as long as those of ohgw-3step",
    "gaussian": "control: a normal step of fixed size",
    "ohgw-trust": "a step to a radius in unit coordinates",
    "random-trust": "control: a random step to that radius",
    "ohgw-linesearch": "the best of several lengths along the hyper-gradient",
    "random-linesearch": "control: the same along a random direction",
    "lr-grid": "control: the best of a few learning rates after short training, no gradient",
}
ESTIMATORS = {
    "lean": "look-ahead losses: adjoint form, no double backward at horizon 1 (their default)",
    "exact": "reverse-mode through all steps (the default of other losses)",
    "direct": "of the training loss at the present weights; zero in learning rate and momentum",
    "finite-difference": "central differences with common random numbers; for any loss",
}
_OWN_MODELS = {
    "resnet20": "CIFAR's ResNet of 20 layers, 0.27 M parameters",
    "mlp": "two hidden layers of 128, for pictures as small as digits",
    "any of timm": "by name: resnet50, vit_tiny_patch16_224, …; a stem for pictures up to 64 pixels",
}


def print_choices(console: Console) -> None:
    """Print tasks, models, schedulers, estimators and step rules."""
    console.print(
        Group(
            _table("Tasks (task.name)", _tasks()),
            _table("Models (task.model of image and pictures)", _OWN_MODELS),
            _table("Schedulers (scheduler.name)", {n: SCHEDULERS[n] for n in scheduler_names()}),
            _table("Estimators (warm_start.estimator)", ESTIMATORS),
            _table("Step rules (variations)", {name: RULES[name] for name in WARM_STARTS}),
        )
    )


def scheduler_names() -> tuple[str, ...]:
    """Return the schedulers that a study may name."""
    return get_args(SchedulerSpec.model_fields["name"].annotation)


def _tasks() -> dict[str, str]:
    lines = {}
    for name, kind in TASKS.items():
        what = inspect.cleandoc(kind.__doc__ or "").splitlines()[0].rstrip(".").replace("``", "")
        shown = "module:Class" if name == "own" else name
        if issubclass(kind, ContractSpec) and kind.needs is not None:
            module, extra = kind.needs
            there = importlib.util.find_spec(module) is not None
            what += f" [{'' if there else 'not installed: '}optuna-ohgw[{extra}]]"
        lines[shown] = what
    return lines


def _table(title: str, lines: dict[str, str]) -> Table:
    table = Table(title=title, title_justify="left", box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for name, what in lines.items():
        table.add_row(f"  {escape(name)}", escape(what))
    return table
