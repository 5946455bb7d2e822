"""A cell's Optuna study with the sampler and the pruner that its spec names."""

from __future__ import annotations

from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.storages import BaseStorage
from optuna.trial import TrialState, create_trial

from optuna_ohgw.cells import Cell, Ledger, config_index, has_work, is_surplus
from optuna_ohgw.history import CONFIG_INDEX, INTERRUPTED, SURPLUS
from optuna_ohgw.pruner import RetryAwarePruner
from optuna_ohgw.sampler import HISTORY_FREE, OhgwSampler, PairedSampler
from optuna_ohgw.schedulers import SCHEDULERS, Settings
from optuna_ohgw.schedulers.chooser_pruner import ChooserPruner
from optuna_ohgw.schedulers.choosers import CHOOSERS
from optuna_ohgw.schedulers.choosing import Array
from optuna_ohgw.schedulers.pruners import SchedulerPruner
from optuna_ohgw.seeds import Purpose, derive_seed
from optuna_ohgw.spec import StudySpec
from optuna_ohgw.tasks.replay import TableSampler, courses_of
from optuna_ohgw.unit_cube import features


def load_cell(storage: BaseStorage, spec: StudySpec, cell: Cell, slot: int = 0) -> optuna.Study:
    """Return the cell's study with its sampler and pruner."""
    study = optuna.load_study(study_name=cell.name, storage=storage, pruner=_pruner(spec, cell))
    if spec.replays:
        study.sampler = TableSampler(courses_of(spec, cell))
        return study
    known = 0 if spec.sampler in HISTORY_FREE else len(study.get_trials(deepcopy=False))
    study.sampler = OhgwSampler(_base_sampler(spec, cell.seed, slot, known))
    return study


def ask(study: optuna.Study, spec: StudySpec, ledger: Ledger) -> optuna.Trial | None:
    """Return the trial that a free worker trains; None where the cell has none for it."""
    if ledger.is_spent():
        return None
    if isinstance(study.pruner, SchedulerPruner) and not _waits(study):
        queued = study.pruner.queue(study)
        if isinstance(study.pruner, ChooserPruner) and not queued:
            return None
    while has_work(study, spec):
        trial = study.ask()
        trials = study.get_trials(deepcopy=False)
        if is_surplus(trials[trial.number], trials, spec):
            trial.set_user_attr("reason", INTERRUPTED)
            trial.set_user_attr(SURPLUS, True)
            study.tell(trial.number, state=TrialState.FAIL)
            continue
        if CONFIG_INDEX not in trial.user_attrs:
            trial.set_user_attr(CONFIG_INDEX, config_index(trials[trial.number], trials))
        return trial
    return None


def _waits(study: optuna.Study) -> bool:
    return any(t.state == TrialState.WAITING for t in study.get_trials(deepcopy=False))


def candidates(spec: StudySpec, cell: Cell) -> Array:
    """Return the suggestions of a cell, ``budget.trials`` of them, as points ``[n, d]`` in the unit cube.

    They are what a history-free sampler gives its configurations before any warm start, so all
    variations of a seed have the same.
    """
    seed = cell.seed
    if spec.replays:
        rows = courses_of(spec, cell)[: spec.budget.trials]
        return np.array([features(distributions(spec), row.suggested) for row in rows])
    space: dict[str, BaseDistribution] = dict(distributions(spec))
    space |= {n: CategoricalDistribution(list(c.choices)) for n, c in spec.choices.items()}
    study = optuna.create_study(sampler=_base_sampler(spec, seed, 0, 0))
    points = []
    for index in range(spec.budget.trials or 1):
        study.add_trial(create_trial(state=TrialState.WAITING, user_attrs={CONFIG_INDEX: index}))
        trial = study.ask()
        drawn: dict[str, Any] = {n: trial.suggest_categorical(n, c.choices) for n, c in spec.choices.items()}
        drawn |= {n: trial.suggest_float(n, r.low, r.high, log=r.log) for n, r in spec.ranges.items()}
        points.append(features(space, drawn))
    return np.array(points)


def distributions(spec: StudySpec) -> dict[str, FloatDistribution]:
    """Return Optuna's distributions of the continuous hyper-parameters."""
    return {n: FloatDistribution(r.low, r.high, log=r.log) for n, r in spec.ranges.items()}


def _pruner(spec: StudySpec, cell: Cell) -> optuna.pruners.BasePruner:
    scheduler = spec.scheduler
    if scheduler.name == "asha":
        return RetryAwarePruner(
            optuna.pruners.SuccessiveHalvingPruner(
                min_resource=scheduler.min_resource,
                reduction_factor=scheduler.reduction_factor,
                bootstrap_count=scheduler.bootstrap_count,
            )
        )
    settings = Settings(
        spec.task.epochs,
        min_resource=scheduler.min_resource,
        reduction_factor=scheduler.reduction_factor,
        maximize=spec.metric.maximize,
        configs=spec.budget.trials or 1,
    )
    if scheduler.name in CHOOSERS:
        return ChooserPruner(lambda _: CHOOSERS[scheduler.name](settings, candidates(spec, cell), cell.seed))
    return SchedulerPruner(lambda _: SCHEDULERS[scheduler.name](settings))


def _base_sampler(spec: StudySpec, seed: int, slot: int, trials: int) -> optuna.samplers.BaseSampler:
    if spec.sampler == "random":
        return PairedSampler(seed)
    if spec.sampler == "qmc":
        return PairedSampler(seed, names=tuple(spec.ranges))
    # A resumed run goes on with other draws than those it began with.
    own = derive_seed(seed, Purpose.SUGGEST, slot, trials) % 2**32
    if spec.sampler == "gp":
        return optuna.samplers.GPSampler(seed=own)
    if spec.sampler == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=own)
    return optuna.samplers.TPESampler(seed=own)
