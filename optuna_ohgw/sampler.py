"""Samplers: trained values in ``trial.params``, and suggestions that pair studies."""

from __future__ import annotations

import threading
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler, CmaEsSampler, RandomSampler
from optuna.trial import FrozenTrial, TrialState

from optuna_ohgw.history import CONFIG_INDEX, logical
from optuna_ohgw.seeds import Purpose, derive_seed

if TYPE_CHECKING:
    from optuna.study import Study

_ACTIVE = threading.local()
HISTORY_FREE = ("random", "qmc")


@dataclass
class WarpRequest:
    """What ``ohgw_suggest`` asks of an :class:`OhgwSampler` for one trial.

    Attributes:
        distributions: The continuous parameters, in the order in which they are drawn.
        kept: Values that are set already, by the user or an interrupted trial; never drawn.
        relative: Values that the base sampler already drew jointly.
        warp: Takes the suggestion, returns the trained values.
        trained: Filled in when the first value is asked for.
    """

    distributions: Mapping[str, FloatDistribution]
    kept: Mapping[str, float]
    relative: Mapping[str, float]
    warp: Callable[[dict[str, float]], dict[str, float]]
    trained: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Make this the request of the calling thread."""
        _ACTIVE.request = self
        try:
            yield
        finally:
            del _ACTIVE.request

    def serve(self, base: BaseSampler, study: Study, trial: FrozenTrial, name: str) -> float:
        """Return the trained value of ``name``; the first call draws and warps all of them."""
        if not self.trained:
            suggested: dict[str, float] = {}
            for key, distribution in self.distributions.items():
                value: Any = self.kept.get(key)
                if value is None:
                    value = self.relative.get(key)
                    if value is None or not distribution._contains(value):
                        value = base.sample_independent(study, trial, key, distribution)
                suggested[key] = float(value)
            self.trained.update(self.warp(suggested))
        distribution = self.distributions[name]
        return min(max(self.trained[name], distribution.low), distribution.high)


class OhgwSampler(BaseSampler):
    """Return a sampler that draws as ``base`` does and records the value really trained.

    Without a call of :func:`ohgw_suggest` it is its base sampler. Under one, the suggestion is
    warped before Optuna records it, so ``trial.params``, ``best_params``, importances, the
    dashboard and the base sampler's own model all see the trained ψ; the suggestion is kept in
    the trial's ``ohgw`` attribute. The base sampler's draws are the same with and without it. A trial
    that was paused and resumed is one trial to the base sampler.

    Args:
        base: Any sampler. CMA-ES is told points that it did not propose, and says so.
    """

    def __init__(self, base: BaseSampler) -> None:
        if isinstance(base, CmaEsSampler):
            warnings.warn(
                "CmaEsSampler will be told warmed points that it did not propose; its covariance "
                "may adapt badly. Use TPESampler, GPSampler or RandomSampler.",
                UserWarning,
                stacklevel=2,
            )
        self.base = base

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return the base sampler's relative search space."""
        return self.base.infer_relative_search_space(logical(study), trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return the base sampler's joint draw."""
        # A copy: ``ohgw_suggest`` takes names out, and a base may return a dict of its own.
        return dict(self.base.sample_relative(logical(study), trial, search_space))

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Return the warmed value under a request of ``ohgw_suggest``, else the base's draw."""
        study = logical(study)
        request: WarpRequest | None = getattr(_ACTIVE, "request", None)
        if request is not None and param_name in request.distributions:
            return request.serve(self.base, study, trial, param_name)
        return self.base.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Call the base sampler's hook."""
        self.base.before_trial(study, trial)

    def after_trial(
        self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """Call the base sampler's hook."""
        self.base.after_trial(study, trial, state, values)

    def reseed_rng(self) -> None:
        """Reseed the base sampler."""
        self.base.reseed_rng()


class IndependentSampler(BaseSampler):
    """A sampler that draws every parameter on its own."""

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return an empty space: every parameter is drawn on its own."""
        return {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return nothing."""
        return {}


class PairedSampler(IndependentSampler):
    """Return a history-free sampler whose k-th suggestion depends on (seed, k, name) alone.

    Every study with the same seed gets the same k-th suggestion, whatever the number of workers,
    the order in which trials start or a restart. The position k is the trial's ``config_index``
    attribute, or its number without one.

    Args:
        seed: Seed of the sequence; 0 is valid.
        names: Continuous parameters drawn from a scrambled Sobol sequence (Owen 1998) in this
            order; empty: independent uniform draws. Others are always independent.
    """

    def __init__(self, seed: int, *, names: Sequence[str] = ()) -> None:
        self.seed = seed
        self.names = tuple(names)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Return the value of ``param_name`` at the trial's position."""
        position = int(trial.user_attrs.get(CONFIG_INDEX, trial.number))
        if (
            param_name in self.names
            and isinstance(param_distribution, FloatDistribution)
            and param_distribution.step is None
        ):
            return self._sobol(position, param_name, param_distribution)
        key = zlib.crc32(param_name.encode())
        base = RandomSampler(seed=derive_seed(self.seed, Purpose.SUGGEST, position, key) % 2**32)
        return base.sample_independent(study, trial, param_name, param_distribution)

    def _sobol(self, position: int, name: str, distribution: FloatDistribution) -> float:
        from scipy.stats import qmc

        rng = np.random.default_rng(derive_seed(self.seed, Purpose.SUGGEST))
        engine = qmc.Sobol(len(self.names), scramble=True, rng=rng)
        if position > 0:  # scipy's engine cannot be moved by 0
            engine.fast_forward(position)
        unit = float(engine.random(1)[0, self.names.index(name)])
        low, high = distribution.low, distribution.high
        if distribution.log:
            return float(min(max(low * (high / low) ** unit, low), high))
        return min(max(low + unit * (high - low), low), high)
