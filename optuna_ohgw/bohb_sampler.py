"""BOHB's model as an Optuna sampler."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.search_space import intersection_search_space
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from optuna_ohgw.history import logical
from optuna_ohgw.sampler import PairedSampler
from optuna_ohgw.schedulers.density import RANDOM_FRACTION, Array, fit_model, propose
from optuna_ohgw.seeds import Purpose, derive_seed
from optuna_ohgw.unit_cube import from_point, levels, to_point

if TYPE_CHECKING:
    from optuna.study import Study

END = math.inf  # the budget of a final value, where nothing was reported before it


class BohbSampler(BaseSampler):
    """Return a sampler that draws as BOHB does, Falkner et al. 2018, Algorithm 2.

    Intermediate values are modelled at the largest step that has enough of them, the whole relative
    search space jointly; a trial without any counts with its final value, at a step beyond all others.
    With probability 1/3, or without a model, and for parameters that not every trial has, it draws
    at random. Use it with a pruner: :class:`optuna_ohgw.PairedHyperbandPruner` makes it BOHB with
    asynchronous brackets. A trial that was paused and resumed is one trial.

    A draw depends on the seed, the trial's number and what the study holds alone, so no two trials
    share it in any number of threads or processes. Random draws are those of
    ``PairedSampler(seed)``.

    Departures: values that trials still running have reported count; trials that failed, or were
    pruned without a report, count as +∞ at the first step after their last that others reached.
    Integers and grids are numbers in equal parts of [0, 1]. Those of the model are said in
    :mod:`optuna_ohgw.schedulers.density`.

    Args:
        seed: Seed of all draws; 0 is valid; None: from the system.
    """

    def __init__(self, *, seed: int | None = None) -> None:
        self.seed = int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else seed
        self._random = PairedSampler(self.seed)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return the parameters that all complete and pruned trials have, less those of one value."""
        _raise_if_several(study)
        trials = logical(study).get_trials(deepcopy=False)
        space = intersection_search_space(trials, include_pruned=True)
        return {name: d for name, d in space.items() if not d.single()}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return the best of 64 samples around good trials, or a random draw."""
        _raise_if_several(study)
        if not search_space:
            return {}
        rng = np.random.default_rng(derive_seed(self.seed, Purpose.SUGGEST, trial.number))
        if rng.random() >= RANDOM_FRACTION:
            others = [t for t in logical(study).get_trials(deepcopy=False) if t.number != trial.number]
            observed = observations(others, search_space, study.direction == StudyDirection.MAXIMIZE)
            model = fit_model(observed, levels(search_space))
            if model is not None:
                return from_point(search_space, propose(model, rng)[0].tolist())
        return {n: self.sample_independent(study, trial, n, d) for n, d in search_space.items()}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Return a random value."""
        _raise_if_several(study)
        return self._random.sample_independent(study, trial, param_name, param_distribution)

    def reseed_rng(self) -> None:
        """Do nothing: no two trials share a draw, and a study's draws stay those of its seed."""


def observations(
    trials: Iterable[FrozenTrial], space: Mapping[str, BaseDistribution], maximize: bool
) -> dict[float, tuple[Array, Array]]:
    """Return points ``[n, d]`` and losses ``[n]`` by step, in the order of the trials.

    Args:
        trials: Trials of any state; those without the whole space are left out.
        space: The search space, which gives the order of the coordinates.
        maximize: Whether higher values are better.
    """
    sign = -1.0 if maximize else 1.0
    seen: dict[float, list[tuple[int, float]]] = {}
    points: list[list[float]] = []
    crashed: list[tuple[int, float]] = []
    for trial in trials:
        if any(trial.distributions.get(name) != d for name, d in space.items()):
            continue
        if trial.state == TrialState.WAITING:
            continue
        values: dict[float, float] = dict(trial.intermediate_values.items())
        if not values and trial.state == TrialState.COMPLETE and trial.value is not None:
            values = {END: trial.value}
        for step, value in values.items():
            seen.setdefault(step, []).append((len(points), sign * value))
        if trial.state == TrialState.FAIL or (trial.state == TrialState.PRUNED and not values):
            crashed.append((len(points), max(values, default=-math.inf)))
        points.append(to_point(space, trial.params))
    steps = sorted(seen)
    for index, last in crashed:
        after = next((step for step in steps if step > last), None)
        if after is not None:
            seen[after].append((index, math.inf))
    cube = np.array(points, dtype=float)
    return {
        step: (cube[[i for i, _ in sorted(pairs)]], np.array([loss for _, loss in sorted(pairs)]))
        for step, pairs in seen.items()
    }


def _raise_if_several(study: Study) -> None:
    if len(study.directions) > 1:
        raise ValueError(f"BohbSampler has one objective, but the study has {len(study.directions)}")
