"""DyHPO and BOIL as Optuna samplers, with the pruner by which they pause what they did not choose."""

from __future__ import annotations

import json
import random
import time
import zlib
from abc import abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, distribution_to_json
from optuna.samplers import BaseSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from scipy.stats import qmc

from optuna_ohgw.history import RESUMED_FROM, SENT, retry_of, rising_time, whole
from optuna_ohgw.sampler import PairedSampler
from optuna_ohgw.schedulers.base import Decision
from optuna_ohgw.schedulers.chooser_pruner import ChooserPruner, sent
from optuna_ohgw.schedulers.choosers import check_installed
from optuna_ohgw.schedulers.choosing import Array, Chooser
from optuna_ohgw.schedulers.fold import Fold
from optuna_ohgw.schedulers.pruners import LOCK, PairedHyperbandPruner, SchedulerPruner
from optuna_ohgw.seeds import Purpose, derive_seed
from optuna_ohgw.unit_cube import features, from_unit

if TYPE_CHECKING:
    from optuna.study import Study

POOL, CLAIM = "ohgw:pool", "ohgw:claim"
_TRIES = 20
_BITS = 30  # of a coordinate
_NAP = 0.05  # seconds at most, before a claim is made again


class Pool(NamedTuple):
    """The candidates of a search space.

    Attributes:
        key: Tells pools of other spaces apart.
        space: Parameters that they have, by name.
        params: What each gives to its trial.
        points: The same ``[n, d]`` in the unit cube.
    """

    key: int
    space: dict[str, BaseDistribution]
    params: list[dict[str, Any]]
    points: Array


class ChooserSampler(BaseSampler):
    """What :class:`DyHPOSampler` and :class:`BoilSampler` share.

    Pass ``sampler.pruner`` to the study, and train by :func:`optuna_ohgw.epochs` or report every unit
    and obey ``should_prune``. A trial ends as pruned where the model would rather train another; a
    paused one goes on as a new trial with the attribute ``resumed_from``. With a pruner that only stops
    trials the sampler only chooses new configurations.

    The pool is a scrambled Sobol sequence over the parameters that all trials have which reported;
    the first trials, those that are enqueued, further parameters, and all when the pool is used up, are drawn
    at random. Any number of threads and processes may share the storage: no candidate is started twice and
    no paused trial resumed twice. Two processes may queue the same one at the same moment: ``epochs`` ends
    the second before it trains, a loop without it at its next decision. Give all the same seed, or none.

    Args:
        max_resource: Units of full training, such as epochs; reports are at 1, 2, …
        candidates: Size of the pool.
        seed: Seed of pool, model and random draws; 0 is valid; None: from the system, or the study's.

    Raises:
        ValueError: If the study has several objectives, was begun with another seed or pool, or has
            another pruner that pauses.
    """

    def __init__(self, max_resource: int, *, candidates: int, seed: int | None = None) -> None:
        if max_resource < 1 or candidates < 1:
            raise ValueError(f"max_resource {max_resource} and candidates {candidates} must be 1 or more")
        self.max_resource = max_resource
        self.candidates = candidates
        self.seed = seed
        self.pruner = _SamplerPruner(self)
        self._drawn = int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else seed
        self._pools: dict[tuple[int, int], Pool] = {}

    @abstractmethod
    def make(self, points: Array, *, maximize: bool, seed: int) -> Chooser:
        """Return a fresh scheduler of candidates ``[n, d]``."""

    @property
    def first(self) -> int:
        """Resource to which a trial is sent that was drawn at random."""
        return 1

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return the parameters that all trials have which reported, less those of one value."""
        _raise_if_several(study)
        return shared_space(whole(study).get_trials(deepcopy=False))

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Note that the trial is none of the pool, until it is chosen from there."""
        _raise_if_several(study)
        if RESUMED_FROM not in trial.user_attrs and retry_of(trial) is None:
            note = {"config": None, "until": self.first, "time": rising_time(), "rule": "random"}
            study._storage.set_trial_system_attr(trial._trial_id, SENT, note)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return the candidate that the model would start."""
        _raise_if_several(study)
        study = whole(study)
        pauses = isinstance(study.pruner, SchedulerPruner)
        if pauses and not isinstance(study.pruner, _SamplerPruner | PairedHyperbandPruner):
            raise ValueError(
                f"{type(study.pruner).__name__} pauses trials, too; pass pruner=sampler.pruner to the study"
            )
        given = trial.params.keys() | trial.system_attrs.get("fixed_params", {}).keys()
        known = shared_space(study.get_trials(deepcopy=False))
        if search_space and search_space == known and not given & search_space.keys():
            for _ in range(_TRIES):
                chosen = self.pruner.choose_start(study)
                if chosen is None:
                    break
                if self._claimed(study, trial, chosen.config):
                    pool = self.pool(study, search_space)
                    note = {**sent(chosen), "pool": pool.key}
                    study._storage.set_trial_system_attr(trial._trial_id, SENT, note)
                    assert chosen.config is not None
                    return dict(pool.params[chosen.config])
                time.sleep(random.uniform(0, _NAP))
        return {n: self.sample_independent(study, trial, n, d) for n, d in search_space.items()}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Return a random value."""
        _raise_if_several(study)
        random_draw = PairedSampler(self.settled_seed(study))
        return random_draw.sample_independent(study, trial, param_name, param_distribution)

    def reseed_rng(self) -> None:
        """Do nothing: no two trials share a draw, and a study's draws stay those of its seed."""

    def settled_seed(self, study: Study) -> int:
        """Return the seed of the study's pool, which the first process sets."""
        own = {"seed": self._drawn, "candidates": self.candidates, "max_resource": self.max_resource}
        kept = study._storage.get_study_system_attrs(study._study_id).get(POOL)
        if kept is None:
            study._storage.set_study_system_attr(study._study_id, POOL, own)
            return self._drawn
        if self.seed is None:
            own["seed"] = kept["seed"]
        if kept != own:
            raise ValueError(f"the study was begun with {kept}, this sampler has {own}; give the same")
        return int(kept["seed"])

    def pool(self, study: Study, space: dict[str, BaseDistribution]) -> Pool:
        """Return the candidates of a search space."""
        seed, key = self.settled_seed(study), _key(space)
        if (seed, key) not in self._pools:
            engine = qmc.Sobol(
                len(space), bits=_BITS, rng=np.random.default_rng(derive_seed(seed, Purpose.SUGGEST))
            )
            units = engine.random(2 ** max(self.candidates - 1, 1).bit_length())[: self.candidates]
            params = [
                {n: _value(d, u) for (n, d), u in zip(space.items(), row, strict=True)}
                for row in units.tolist()
            ]
            points = np.array([features(space, p) for p in params])
            self._pools[seed, key] = Pool(key, dict(space), params, points)
        return self._pools[seed, key]

    def _claimed(self, study: Study, trial: FrozenTrial, config: int | None) -> bool:
        """Claim a candidate; return False, without the claim, where another trial has or claims it.

        Every process writes before it reads. So of two that want the same at once one sees the other,
        or both do, and drop it.
        """
        write = study._storage.set_trial_system_attr
        write(trial._trial_id, CLAIM, config)
        for other in study.get_trials(deepcopy=False):
            known = other.system_attrs.get(CLAIM), other.system_attrs.get(SENT, {}).get("config")
            if other.number != trial.number and config in known:
                write(trial._trial_id, CLAIM, None)
                return False
        return True


class _SamplerPruner(ChooserPruner):
    """The pruner of a :class:`ChooserSampler`; the sampler starts, this pauses and resumes."""

    def __init__(self, sampler: ChooserSampler) -> None:
        self._folds: dict[int, Fold] = {}
        self._gone: dict[int, set[int]] = {}
        self._sampler = sampler
        self._known: dict[int, tuple[int, ...]] = {}

    def choose_start(self, study: Study) -> Decision | None:
        """Return which candidate a new trial trains, after queueing a paused one that comes first."""
        with LOCK:
            trials = study.get_trials(deepcopy=False)
            fold = self._fold(study, trials)
            chosen = self._suggest(study, fold)
            if chosen.action == "start":
                return chosen if chosen.config is not None else None
            if study.pruner is self:
                self._resume(study, fold, chosen, trials)
            assert isinstance(fold.scheduler, Chooser)
            start = fold.scheduler.suggest_start()
            if start is None:
                return None
            return Decision("start", start.config, start.rule, until=start.until, value=start.score)

    def _decide(self, study: Study, trial: FrozenTrial, step: int) -> bool:
        return bool(shared_space(study.get_trials(deepcopy=False))) and super()._decide(study, trial, step)

    def _start(self, study: Study, chosen: Decision) -> bool:
        return False

    def _stranger_ends(self, trial: FrozenTrial) -> bool:
        return trial.system_attrs.get(SENT, {}).get("config") is not None

    def _fold(self, study: Study, trials: list[FrozenTrial]) -> Fold:
        space = shared_space(trials)
        known = _key(space), *(t.number for t in strangers(trials, space))
        if self._known.get(study._study_id) != known:
            self._known[study._study_id] = known
            self._folds.pop(study._study_id, None)
        return super()._fold(study, trials)

    def _fresh(self, study: Study, trials: list[FrozenTrial]) -> Fold:
        space = shared_space(trials)
        pool, others = self._sampler.pool(study, space), strangers(trials, space)
        points = np.vstack([pool.points, *(features(space, t.params) for t in others)])
        maximize, seed = study.direction == StudyDirection.MAXIMIZE, self._sampler.settled_seed(study)
        made = self._sampler.make(points, maximize=maximize, seed=seed)
        return Fold(made, {t.number: len(pool.points) + place for place, t in enumerate(others)})


class DyHPOSampler(ChooserSampler):
    """DyHPO, Wistuba, Kadra and Grabocka 2022: see :class:`optuna_ohgw.schedulers.dyhpo.Dyhpo`.

    Needs ``optuna-ohgw[models]``. A choice takes 0.1 to 0.6 s up to 1,500 reports.

    Args:
        max_resource: Units of full training, such as epochs; reports are at 1, 2, …
        candidates: Size of the pool.
        step: Units by which a configuration goes on.
        seed: Seed of pool, model and random draws; 0 is valid; None: from the system, or the study's.
    """

    def __init__(
        self, max_resource: int, *, candidates: int = 500, step: int = 1, seed: int | None = None
    ) -> None:
        check_installed("dyhpo", "DyHPOSampler")
        super().__init__(max_resource, candidates=candidates, seed=seed)
        self.step = step

    @property
    def first(self) -> int:
        """Resource to which a trial is sent that was drawn at random."""
        return min(self.step, self.max_resource)

    def make(self, points: Array, *, maximize: bool, seed: int) -> Chooser:
        """Return the scheduler."""
        from optuna_ohgw.schedulers.dyhpo import Dyhpo

        return Dyhpo(self.max_resource, points, maximize=maximize, seed=seed, step=self.step)


class BoilSampler(ChooserSampler):
    """BOIL, Nguyen, Schulze and Osborne 2020: see :class:`optuna_ohgw.schedulers.boil.Boil`.

    Needs ``optuna-ohgw[models]``. The time of a choice grows with the square of the trials, times
    candidates.

    Args:
        max_resource: Units of full training, such as epochs; reports are at 1, 2, …
        candidates: Size of the pool.
        seed: Seed of pool, model and random draws; 0 is valid; None: from the system, or the study's.
    """

    def __init__(self, max_resource: int, *, candidates: int = 200, seed: int | None = None) -> None:
        check_installed("boil", "BoilSampler")
        super().__init__(max_resource, candidates=candidates, seed=seed)

    def make(self, points: Array, *, maximize: bool, seed: int) -> Chooser:
        """Return the scheduler."""
        from optuna_ohgw.schedulers.boil import Boil

        return Boil(self.max_resource, points, maximize=maximize, seed=seed)


def shared_space(trials: Iterable[FrozenTrial]) -> dict[str, BaseDistribution]:
    """Return the parameters that all trials have which reported or ended well, less those of one value."""
    known = [t for t in trials if _tells(t)]
    if not known:
        return {}
    first, *rest = (t.distributions for t in known)
    same = {n: d for n, d in first.items() if all(other.get(n) == d for other in rest)}
    return {n: same[n] for n in sorted(same) if not same[n].single()}


def strangers(trials: Iterable[FrozenTrial], space: dict[str, BaseDistribution]) -> list[FrozenTrial]:
    """Return the trials that tell something but are none of the pool, the first of each configuration."""
    key = _key(space)
    return [
        t
        for t in trials
        if _tells(t)
        and RESUMED_FROM not in t.user_attrs
        and retry_of(t) is None
        and SENT in t.system_attrs
        and (t.system_attrs[SENT]["config"] is None or t.system_attrs[SENT]["pool"] != key)
    ]


def _tells(trial: FrozenTrial) -> bool:
    if trial.state in (TrialState.WAITING, TrialState.FAIL):
        return False
    return trial.state == TrialState.COMPLETE or bool(trial.intermediate_values)


def _key(space: dict[str, BaseDistribution]) -> int:
    return zlib.crc32(json.dumps([[n, distribution_to_json(d)] for n, d in space.items()]).encode())


def _value(distribution: BaseDistribution, unit: float) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        count = len(distribution.choices)
        return distribution.choices[min(int(unit * count), count - 1)]
    return from_unit(distribution, unit)


def _raise_if_several(study: Study) -> None:
    if len(study.directions) > 1:
        raise ValueError(f"the sampler has one objective, but the study has {len(study.directions)}")
