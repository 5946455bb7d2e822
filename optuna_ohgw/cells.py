"""Cells in storage: one Optuna study each, made, checked, resumed and counted."""

from __future__ import annotations

import datetime
import json
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from optuna_ohgw.errors import AnotherStudy
from optuna_ohgw.history import (
    CHECKPOINT,
    CONFIG_INDEX,
    INTERRUPTED,
    RESUMED,
    RESUMED_FROM,
    RETRY_OF,
    SURPLUS,
    HasTrials,
    is_interrupted,
    kept_until,
    kills_in_vain,
    paused_at,
    retry,
    superseded,
)
from optuna_ohgw.spec import StudySpec
from optuna_ohgw.spec_parts import ENDLESS
from optuna_ohgw.variations import baseline_among

SPEC_FILE = "spec.yaml"  # in a cell's folder: what it was made with
_MOST_KILLS = 10  # of a trial in a row, with no checkpoint between


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
    baseline = baseline_among(spec.variations)
    pilots = [Cell(spec.name, baseline, seed, pilot=True) for seed in spec.pilot_seeds]
    return pilots + [Cell(spec.name, v, seed) for seed in spec.seeds for v in spec.variations]


def check_cells(storage: BaseStorage, spec: StudySpec) -> dict[str, int]:
    """Return the ids of the studies that exist, by name, after comparing their specs.

    A study without a spec and without trials, left by a run killed while it made its cells, counts
    as not there.

    Raises:
        AnotherStudy: If a study of the same name was made otherwise, naming the first difference.
    """
    names = {cell.name for cell in cells_of(spec)}
    studies = {s.study_name: s for s in storage.get_all_studies()}
    existing = {name: study._study_id for name, study in studies.items()}
    for name in sorted(names & set(existing)):
        stored = studies[name].user_attrs.get("spec")
        if stored is None and _is_blank(storage, existing[name], spec):
            del existing[name]
            continue
        if not isinstance(stored, dict):
            raise AnotherStudy(
                f"storage: study {name!r} exists but was not made by optuna-ohgw; "
                "name another by --set name=NAME or --set storage=URL"
            )
        difference = next(_differences(stored, spec.identity()), None)
        if difference is not None:
            field, before, now = difference
            raise AnotherStudy(
                f"storage: study {name!r} was made with {field} = {json.dumps(before)}, now "
                f"{json.dumps(now)}; restore it, or use run --force-new-name for a new study"
            )
    return {name: existing[name] for name in names & set(existing)}


def check_folder(spec: StudySpec) -> None:
    """Raise AnotherStudy if the output folder has cells of a study of another name, which would be lost."""
    import yaml

    for cell in cells_of(spec):
        file = cell.folder(spec.folder) / SPEC_FILE
        if not file.exists():
            continue
        found = yaml.safe_load(file.read_text())
        name = found.get("name") if isinstance(found, dict) else None
        if name is not None and name != spec.name:
            raise AnotherStudy(
                f"output: {spec.folder} holds study {name!r}; name another folder by --set output=FOLDER"
            )
        return


def create_cell(storage: BaseStorage, spec: StudySpec, cell: Cell, environment: dict[str, Any]) -> None:
    """Make the Optuna study of a cell, or keep the one there is."""
    study = optuna.create_study(
        study_name=cell.name, storage=storage, direction=spec.metric.direction, load_if_exists=True
    )
    if "spec" not in study.user_attrs:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names([f"validation {spec.metric.name}"])
        study.set_user_attr("variation", cell.variation)
        study.set_user_attr("seed", cell.seed)
        study.set_user_attr("pilot", cell.pilot)
        study.set_user_attr("environment", environment)
        study.set_user_attr("spec", spec.identity())


def revive(study: optuna.Study, alive: Callable[[FrozenTrial], bool] = lambda _: False) -> int:
    """Queue again the trials that stopped or killed workers left; return their number.

    ``alive`` tells which running trials a living worker still trains.

    A retry goes on from the trial's last checkpoint, see :func:`optuna_ohgw.history.retry`. A trial
    that was killed after its scheduler had paused it and its checkpoint was made counts as paused. One
    that is killed again and again, as where memory does not suffice, has failed.
    """
    count = 0
    trials = study.get_trials(deepcopy=False)
    retried = {t.user_attrs[RETRY_OF] for t in trials if RETRY_OF in t.user_attrs}
    for trial in trials:
        running = trial.state == TrialState.RUNNING
        if running and alive(trial):
            continue
        if running and _is_frozen(trial):
            study.tell(trial.number, state=TrialState.PRUNED)
            continue
        if running and kills_in_vain(trial) >= _MOST_KILLS:
            why = f"killed {_MOST_KILLS} times in a row; too little memory?"
            study._storage.set_trial_user_attr(trial._trial_id, "reason", why)
            study.tell(trial.number, state=TrialState.FAIL)
            continue
        if (
            (running or is_interrupted(trial))
            and trial.number not in retried
            and SURPLUS not in trial.user_attrs
        ):
            retry(study, trial, config_index(trial, trials))
            count += 1
        if running:
            study._storage.set_trial_user_attr(trial._trial_id, "reason", INTERRUPTED)
            study.tell(trial.number, state=TrialState.FAIL)
    return count


def _is_frozen(trial: FrozenTrial) -> bool:
    last, made = trial.last_step, trial.user_attrs.get(CHECKPOINT)
    # One that was resumed, and trained nothing yet, carries the pause and the checkpoint of its source.
    own = last is not None and last > trial.system_attrs.get(RESUMED, {}).get("resource", 0)
    return last is not None and own and made is not None and made["epoch"] == last and paused_at(trial, last)


def config_index(trial: FrozenTrial, trials: list[FrozenTrial]) -> int:
    """Return a trial's position: its own attribute, else its number without what is none of its own."""
    if CONFIG_INDEX in trial.user_attrs:
        return int(trial.user_attrs[CONFIG_INDEX])
    return trial.number - sum(not _is_new(t) for t in trials[: trial.number])


def _is_new(trial: FrozenTrial) -> bool:
    """Return whether a trial is the first of its configuration, no retry and not resumed."""
    return RETRY_OF not in trial.user_attrs and RESUMED_FROM not in trial.user_attrs


def is_surplus(trial: FrozenTrial, trials: list[FrozenTrial], spec: StudySpec) -> bool:
    """Return whether two machines that asked at the same moment made one trial too many.

    One beyond the budget, or a second retry of the same trial: the later one, as all of them see it.
    """
    if RETRY_OF in trial.user_attrs:
        # A trial that goes on from a retry carries its attributes.
        own = _origin(trial)
        return any(_origin(t) == own for t in trials[: trial.number])
    return spec.budget.trials is not None and config_index(trial, trials) >= spec.budget.trials


def _origin(trial: FrozenTrial) -> tuple[Any, Any]:
    return trial.user_attrs.get(RETRY_OF), trial.user_attrs.get(RESUMED_FROM)


class Ledger:
    """What a cell has used of its budget; what an ended trial cost is counted once.

    A trial that was paused and resumed is one. What interrupted trials trained after their last
    checkpoint, which is trained again, does not count, nor does the time between runs.

    Args:
        study: The cell's study.
        spec: The study that it belongs to.
    """

    def __init__(self, study: HasTrials, spec: StudySpec) -> None:
        self._study, self._budget, self._epochs = study, spec.budget, spec.epochs_in_all
        self._endless = spec.scheduler.name in ENDLESS
        self._ended: dict[int, tuple[float, float]] = {}

    def share_done(self) -> float:
        """Return the share that is used up, 0 to 1 or a little over; of several limits the nearest."""
        if not self._budget.trials or self._endless:
            return self._share_spent()
        ended = sum(t.state.is_finished() for t in self._logical())
        return max(ended / self._budget.trials, self._share_spent())

    def is_spent(self) -> bool:
        """Return whether the epochs, mbu, device-hours or wall-hours are used up. Cost without: none."""
        return self._share_spent() >= 1

    def _share_spent(self) -> float:
        budget, shares = self._budget, [0.0]
        if budget.mbu or budget.device_hours:
            costs = [self._cost(t) for t in self._logical()]
            mbu, seconds = (sum(column) for column in zip(*costs, strict=True)) if costs else (0.0, 0.0)
            shares += [mbu / budget.mbu] if budget.mbu else []
            shares += [seconds / 3600 / budget.device_hours] if budget.device_hours else []
        if self._epochs:
            shares.append(sum(map(_epochs, self._logical())) / self._epochs)
        if budget.wall_hours:
            trials = self._study.get_trials(deepcopy=False)
            shares.append(_wall_seconds(trials) / 3600 / budget.wall_hours)
        return max(shares)

    def _trials(self) -> list[FrozenTrial]:
        return [t for t in self._study.get_trials(deepcopy=False) if not is_interrupted(t)]

    def _logical(self) -> list[FrozenTrial]:
        gone = superseded(self._study.get_trials(deepcopy=False))
        return [t for t in self._trials() if t.number not in gone]

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
    return [
        t for t in trials if is_interrupted(t) and t.number not in retried and SURPLUS not in t.user_attrs
    ]


def has_work(study: optuna.Study, spec: StudySpec) -> bool:
    """Return whether a cell's budget of trials leaves one to start."""
    trials = study.get_trials(deepcopy=False)
    if any(t.state == TrialState.WAITING for t in trials):
        return True
    fresh = sum(map(_is_new, trials))
    return spec.budget.trials is None or fresh < spec.budget.trials


def _is_blank(storage: BaseStorage, study_id: int, spec: StudySpec) -> bool:
    directions = storage.get_study_directions(study_id)
    return directions == [spec.metric.direction] and not storage.get_all_trials(study_id, deepcopy=False)


def _mbu(trial: FrozenTrial) -> float:
    warm = sum(record["cost_mbu"] for record in trial.user_attrs.get("ohgw", []))
    return float(warm) + int(trial.user_attrs.get("batches_per_epoch", 0)) * _epochs(trial)


def _epochs(trial: FrozenTrial) -> int:
    # A diverged epoch is in the curve but was not reported; a running trial's curve may lag.
    return max(len(trial.intermediate_values), len(trial.user_attrs.get("curve", {}).get("mbu", [])))


def _device_seconds(trial: FrozenTrial) -> float:
    curve = trial.user_attrs.get("curve", {})
    return sum(sum(filter(None, curve.get(column, []))) for column in ("train_s", "warm_s", "eval_s"))


def _wall_seconds(trials: list[FrozenTrial]) -> float:
    now = datetime.datetime.now()
    spans = sorted((t.datetime_start, ended_at(t) or now) for t in trials if t.datetime_start)
    total, reached = 0.0, None
    for start, end in spans:
        begin = start if reached is None or start > reached else reached
        total += max(0.0, (end - begin).total_seconds())
        reached = end if reached is None or end > reached else reached
    return total


def ended_at(trial: FrozenTrial) -> datetime.datetime | None:
    """Return when a trial ended; an interrupted one when the last was done that is kept; None if it runs."""
    if not is_interrupted(trial):
        return trial.datetime_complete
    kept = kept_until(trial)
    return trial.datetime_start if math.isnan(kept) else datetime.datetime.fromtimestamp(kept)


def _differences(before: Any, now: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted({*before, *now}):
            yield from _differences(before.get(key), now.get(key), f"{prefix}{key}.")
    elif before != now:
        yield prefix.rstrip("."), before, now
