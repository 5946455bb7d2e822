"""Whether the k-th trials of a seed are pairs: recomputed from storage, not believed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import optuna
import torch
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, create_trial

from optuna_ohgw.cell_study import distributions
from optuna_ohgw.cells import cells_of, config_index
from optuna_ohgw.history import CONFIG_INDEX, superseded
from optuna_ohgw.sampler import HISTORY_FREE, PairedSampler
from optuna_ohgw.spec import StudySpec
from optuna_ohgw.trial import structure_of
from optuna_ohgw.workload import Workload
from optuna_ohgw.workloads import workload


@dataclass
class PairingReport:
    """What was compared and what did not agree."""

    pairing: str
    trials: int = 0
    recomputed: int = 0
    faults: list[str] = field(default_factory=list)

    @property
    def intact(self) -> bool:
        """Whether nothing disagreed and something was compared."""
        return not self.faults and self.trials > 0

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain values, for JSON."""
        return {**asdict(self), "intact": self.intact}

    def text(self) -> str:
        """Return the report in a line, and a line for each fault."""
        broken = f"broken in {len(self.faults)} places" if self.faults else "nothing to compare yet"
        verdict = "intact" if self.intact else broken
        counts = f"{self.trials} trials compared, {self.recomputed} recomputed"
        return "\n".join([f"pairing ({self.pairing}): {verdict}; {counts}", *self.faults[:20]])


def check_pairing(storage: BaseStorage, spec: StudySpec) -> PairingReport:
    """Recompute every trial's suggestion, initial weights and data order; compare within seeds.

    Suggestions are recomputed for history-free samplers (random, qmc); for others only weights
    and data order are paired, which the report calls "seed-paired only". Every ``config_index``
    may be trained once; interrupted trials that were retried do not count.
    """
    if spec.replays:
        return _check_replay(storage, spec)
    free = spec.sampler in HISTORY_FREE
    report = PairingReport("paired" if free else "seed-paired only")
    known = {s.study_name for s in storage.get_all_studies()}
    tasks: dict[tuple[Any, ...], Workload] = {}
    seen: dict[tuple[int, int], dict[str, Any]] = {}
    for cell in cells_of(spec):
        if cell.name not in known:
            continue
        study = optuna.load_study(study_name=cell.name, storage=storage)
        trials = study.get_trials(deepcopy=False)
        retried, gone = {t.user_attrs.get("retry_of") for t in trials}, superseded(trials)
        own: set[int] = set()
        for trial in trials:
            streams = trial.user_attrs.get("streams")
            if streams is None or trial.number in retried or trial.number in gone:
                continue
            index, where = config_index(trial, trials), f"{cell.label} trial {trial.number}"
            if index in own:
                report.faults.append(f"{where}: configuration {index} is there twice")
            own.add(index)
            report.trials += 1
            expected = _streams(spec, tasks, cell.seed, index, structure_of(trial, spec))
            report.recomputed += 1
            found = {"weights": streams["weights"], "order": streams["order"]}
            suggested = _suggested(trial)
            if free and suggested is not None:
                drawn = _draw(spec, cell.seed, index)
                expected, found = {**expected, "suggestion": drawn}, {**found, "suggestion": suggested}
            for key, value in found.items():
                if value != expected[key]:
                    report.faults.append(f"{where} (configuration {index}): {key} is not what its seed gives")
            first = seen.setdefault((cell.seed, index), found)
            for key in sorted(set(first) & set(found)):
                if first[key] != found[key]:
                    report.faults.append(f"{where} (configuration {index}): {key} differs from its pair's")
    return report


def _check_replay(storage: BaseStorage, spec: StudySpec) -> PairingReport:
    """Compare what the table says was suggested, within seeds."""
    report = PairingReport("replayed: suggestions as in the table")
    known = {s.study_name: s._study_id for s in storage.get_all_studies()}
    seen: dict[tuple[int, int], dict[str, float]] = {}
    for cell in cells_of(spec):
        trials = storage.get_all_trials(known[cell.name], deepcopy=False) if cell.name in known else []
        gone = superseded(trials)
        for trial in trials:
            suggested = _suggested(trial)
            if suggested is None or trial.number in gone:
                continue
            index = int(trial.user_attrs[CONFIG_INDEX])
            report.trials += 1
            if seen.setdefault((cell.seed, index), suggested) != suggested:
                report.faults.append(
                    f"{cell.label} configuration {index}: suggestion differs from its pair's"
                )
    return report


def _streams(
    spec: StudySpec,
    tasks: dict[tuple[Any, ...], Workload],
    seed: int,
    index: int,
    structure: dict[str, Any],
) -> dict[str, Any]:
    key = (seed, *structure.values())
    if key not in tasks:
        tasks.clear()
        tasks[key] = workload(spec, seed, structure, torch.device("cpu"))
    state = tasks[key].start(seed, index)
    return {"weights": state.digest(), "order": tasks[key].order_digest(seed, index)}


def _draw(spec: StudySpec, seed: int, index: int) -> dict[str, float]:
    sampler = PairedSampler(seed, names=tuple(spec.ranges) if spec.sampler == "qmc" else ())
    study = optuna.create_study(sampler=sampler, direction="maximize")
    study.add_trial(create_trial(state=optuna.trial.TrialState.WAITING, user_attrs={CONFIG_INDEX: index}))
    trial = study.ask()
    return {n: trial.suggest_float(n, d.low, d.high, log=d.log) for n, d in distributions(spec).items()}


def _suggested(trial: FrozenTrial) -> dict[str, float] | None:
    records = trial.user_attrs.get("ohgw")
    return dict(records[0]["suggested"]) if records else None
