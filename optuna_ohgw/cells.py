"""Cells in storage: one Optuna study each, made, checked, resumed and counted."""

from __future__ import annotations

import datetime
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from optuna_ohgw.errors import UserError
from optuna_ohgw.pruner import INTERRUPTED, RetryAwarePruner, is_interrupted
from optuna_ohgw.sampler import CONFIG_INDEX, OhgwSampler, PairedSampler
from optuna_ohgw.seeds import Purpose, derive_seed
from optuna_ohgw.spec import StudySpec
from optuna_ohgw.variations import BASELINE

RETRY_OF = "retry_of"
METRIC = "validation accuracy"


@dataclass(frozen=True)
class Cell:
    """One variation with one seed."""

    study: str
    variation: str
    seed: int
    pilot: bool = False

    @property
    def label(self) -> str:
        """The part of the name that tells the cell within its study."""
        return f"{'pilot' if self.pilot else self.variation}/seed-{self.seed:04d}"

    @property
    def name(self) -> str:
        """Name of the cell's Optuna study."""
        return f"{self.study}/{self.label}"

    def folder(self, root: Path) -> Path:
        """Return the cell's folder under the output folder."""
        return root / self.label


def cells_of(spec: StudySpec) -> list[Cell]:
    """Return the cells of a study: pilots first, then seed by seed, so that pairs run together."""
    pilots = [Cell(spec.name, BASELINE, seed, pilot=True) for seed in spec.pilot_seeds]
    return pilots + [Cell(spec.name, v, seed) for seed in spec.seeds for v in spec.variations]


def open_storage(url: str, *, create: bool) -> RDBStorage:
    """Return the storage at a URL.

    Raises:
        UserError: If it cannot be opened, is no Optuna storage, or is of another schema version.
    """
    import sqlalchemy.exc

    path = sqlite_path(url)
    if path is not None and not path.exists() and not create:
        raise UserError(f"storage: {path} does not exist; start the study with 'optuna-ohgw run' first")
    try:
        options = {"connect_args": {"timeout": 60}} if path is not None else None
        return RDBStorage(url, engine_kwargs=options)
    except (sqlalchemy.exc.SQLAlchemyError, RuntimeError, ImportError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        shown = path if path is not None else url.rsplit("@", maxsplit=1)[-1]
        if "schema" in str(error) or "version" in str(error):
            remedy = "upgrade it by 'optuna storage upgrade --storage URL', or name another"
        else:
            remedy = "name another by --set storage=URL"
        raise UserError(f"storage: {shown} cannot be used ({first}); {remedy}") from None


def sqlite_path(url: str) -> Path | None:
    """Return the file of an SQLite URL, None for any other."""
    return Path(url.removeprefix("sqlite:///")) if url.startswith("sqlite:///") else None


def check_cells(storage: BaseStorage, spec: StudySpec) -> dict[str, int]:
    """Return the ids of the studies that exist, by name, after comparing their specs.

    A study without a spec and without trials, left by a run killed while it made its cells, counts
    as not there.

    Raises:
        UserError: If a study of the same name was made otherwise, naming the first difference.
    """
    names = {cell.name for cell in cells_of(spec)}
    existing = {s.study_name: s._study_id for s in storage.get_all_studies()}
    for name in sorted(names & set(existing)):
        stored = storage.get_study_user_attrs(existing[name]).get("spec")
        if stored is None and _is_blank(storage, existing[name]):
            del existing[name]
            continue
        if not isinstance(stored, dict):
            raise UserError(
                f"storage: study {name!r} exists but was not made by optuna-ohgw; "
                "name another by --set name=NAME or --set storage=URL"
            )
        difference = next(_differences(stored, spec.identity()), None)
        if difference is not None:
            field, before, now = difference
            raise UserError(
                f"storage: study {name!r} was made with {field} = {json.dumps(before)}, now "
                f"{json.dumps(now)}; restore it, or use --set name=NAME for a new study"
            )
    return {name: existing[name] for name in names & set(existing)}


def create_cell(storage: BaseStorage, spec: StudySpec, cell: Cell, environment: dict[str, Any]) -> None:
    """Make the Optuna study of a cell, or keep the one there is."""
    study = optuna.create_study(
        study_name=cell.name, storage=storage, direction=StudyDirection.MAXIMIZE, load_if_exists=True
    )
    if "spec" not in study.user_attrs:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names([METRIC])
        study.set_user_attr("variation", cell.variation)
        study.set_user_attr("seed", cell.seed)
        study.set_user_attr("pilot", cell.pilot)
        study.set_user_attr("environment", environment)
        study.set_user_attr("spec", spec.identity())


def load_cell(storage: BaseStorage, spec: StudySpec, cell: Cell, slot: int = 0) -> optuna.Study:
    """Return the cell's study with its sampler and pruner."""
    scheduler = spec.scheduler
    pruner = optuna.pruners.SuccessiveHalvingPruner(
        min_resource=scheduler.min_resource,
        reduction_factor=scheduler.reduction_factor,
        bootstrap_count=scheduler.bootstrap_count,
    )
    study = optuna.load_study(study_name=cell.name, storage=storage, pruner=RetryAwarePruner(pruner))
    study.sampler = OhgwSampler(_base_sampler(spec, cell.seed, slot, len(study.get_trials(deepcopy=False))))
    return study


def revive(study: optuna.Study) -> int:
    """Queue again the trials that a stopped or killed run left; return their number.

    A retry keeps its ``config_index``, and so its suggestion, weights and data order.
    """
    count = 0
    trials = study.get_trials(deepcopy=False)
    retried = {t.user_attrs[RETRY_OF] for t in trials if RETRY_OF in t.user_attrs}
    for trial in trials:
        running = trial.state == TrialState.RUNNING
        if (running or is_interrupted(trial)) and trial.number not in retried:
            attributes = {CONFIG_INDEX: config_index(trial, trials), RETRY_OF: trial.number}
            study.add_trial(create_trial(state=TrialState.WAITING, user_attrs=attributes))
            count += 1
        if running:
            study._storage.set_trial_user_attr(trial._trial_id, "reason", INTERRUPTED)
            study.tell(trial.number, state=TrialState.FAIL)
    return count


def config_index(trial: FrozenTrial, trials: list[FrozenTrial]) -> int:
    """Return a trial's position: its own attribute, else its number without the retries before it."""
    if CONFIG_INDEX in trial.user_attrs:
        return int(trial.user_attrs[CONFIG_INDEX])
    return trial.number - sum(RETRY_OF in t.user_attrs for t in trials[: trial.number])


class Ledger:
    """What a cell has used of its budget; what an ended trial cost is counted once.

    Interrupted trials, which are trained again, do not count, nor does the time between runs.

    Args:
        study: The cell's study.
        spec: The study that it belongs to.
    """

    def __init__(self, study: optuna.Study, spec: StudySpec) -> None:
        self._study, self._budget = study, spec.budget
        self._ended: dict[int, tuple[float, float]] = {}

    def share_done(self) -> float:
        """Return the share that is used up, 0 to 1 or a little over; of several limits the nearest."""
        if not self._budget.trials:
            return self._share_spent()
        ended = sum(t.state.is_finished() for t in self._trials())
        return max(ended / self._budget.trials, self._share_spent())

    def is_spent(self) -> bool:
        """Return whether the mbu, device-hours or wall-hours are used up. Cost without: none."""
        return self._share_spent() >= 1

    def _share_spent(self) -> float:
        budget, shares = self._budget, [0.0]
        if budget.mbu or budget.device_hours:
            costs = [self._cost(t) for t in self._trials()]
            mbu, seconds = (sum(column) for column in zip(*costs, strict=True)) if costs else (0.0, 0.0)
            shares += [mbu / budget.mbu] if budget.mbu else []
            shares += [seconds / 3600 / budget.device_hours] if budget.device_hours else []
        if budget.wall_hours:
            shares.append(_wall_seconds(self._trials()) / 3600 / budget.wall_hours)
        return max(shares)

    def _trials(self) -> list[FrozenTrial]:
        return [t for t in self._study.get_trials(deepcopy=False) if not is_interrupted(t)]

    def _cost(self, trial: FrozenTrial) -> tuple[float, float]:
        if trial.number in self._ended:
            return self._ended[trial.number]
        cost = _mbu(trial), _device_seconds(trial)
        if trial.state.is_finished():
            self._ended[trial.number] = cost
        return cost


def share_done(study: optuna.Study, spec: StudySpec) -> float:
    """Return the share of a cell's budget that is used up, see :class:`Ledger`."""
    return Ledger(study, spec).share_done()


def to_retry(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """Return the interrupted trials that are not queued again yet."""
    retried = {t.user_attrs.get(RETRY_OF) for t in trials}
    return [t for t in trials if is_interrupted(t) and t.number not in retried]


def has_work(study: optuna.Study, spec: StudySpec) -> bool:
    """Return whether a cell's budget of trials leaves one to start."""
    trials = study.get_trials(deepcopy=False)
    if any(t.state == TrialState.WAITING for t in trials):
        return True
    fresh = sum(RETRY_OF not in t.user_attrs for t in trials)
    return spec.budget.trials is None or fresh < spec.budget.trials


def _is_blank(storage: BaseStorage, study_id: int) -> bool:
    directions = storage.get_study_directions(study_id)
    return directions == [StudyDirection.MAXIMIZE] and not storage.get_all_trials(study_id, deepcopy=False)


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


def _mbu(trial: FrozenTrial) -> float:
    warm = sum(record["cost_mbu"] for record in trial.user_attrs.get("ohgw", []))
    # A diverged epoch is in the curve but was not reported; a running trial's curve may lag.
    epochs = max(len(trial.intermediate_values), len(trial.user_attrs.get("curve", {}).get("mbu", [])))
    return float(warm) + int(trial.user_attrs.get("batches_per_epoch", 0)) * epochs


def _device_seconds(trial: FrozenTrial) -> float:
    curve = trial.user_attrs.get("curve", {})
    return sum(sum(filter(None, curve.get(column, []))) for column in ("train_s", "warm_s", "eval_s"))


def _wall_seconds(trials: list[FrozenTrial]) -> float:
    now = datetime.datetime.now()
    spans = sorted((t.datetime_start, t.datetime_complete or now) for t in trials if t.datetime_start)
    total, reached = 0.0, None
    for start, end in spans:
        begin = start if reached is None or start > reached else reached
        total += max(0.0, (end - begin).total_seconds())
        reached = end if reached is None or end > reached else reached
    return total


def _differences(before: Any, now: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted({*before, *now}):
            yield from _differences(before.get(key), now.get(key), f"{prefix}{key}.")
    elif before != now:
        yield prefix.rstrip("."), before, now
