"""Storages with cells and trials of the real record layout and what is planted in them."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import FloatDistribution
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from optuna_ohgw.cells import Cell
from optuna_ohgw.spec import StudySpec

START = 1_790_000_000.0
BATCHES = 10
COLUMNS = ("mbu", "wall", "train_s", "warm_s", "eval_s", "train_loss", "val_loss", "val_metric")
RANGES = {
    "lr": {"low": 1e-4, "high": 1.0, "log": True},
    "momentum": {"low": 0.0, "high": 0.99},
    "magnitude": {"low": 0.0, "high": 10.0},
}
PAIR = ("asha-baseline", "asha-ohgw-1step")
FOUR = ("asha-baseline", "asha-random-warm", "asha-ohgw-1step", "asha-ohgw-3step")


def planted_spec(
    variations: Sequence[str] = PAIR,
    seeds: Sequence[int] = tuple(range(8)),
    *,
    pilot_seeds: Sequence[int] = (),
    target: float = 0.9,
    name: str = "planted",
    epochs: int = 27,
    trials: int = 16,
    **more: Any,
) -> StudySpec:
    """Return a valid spec of a study on digits; ``more`` are further top-level fields."""
    fields = {
        "name": name,
        "task": {"data": "digits", "model": "mlp", "epochs": epochs, "validation_images": 360},
        "space": RANGES,
        "scheduler": {"min_resource": 3, "reduction_factor": 3, "bootstrap_count": 2},
        "variations": list(variations),
        "seeds": list(seeds),
        "pilot_seeds": list(pilot_seeds),
        "targets": [target],
        "budget": {"trials": trials},
        **more,
    }
    return StudySpec.model_validate_json(json.dumps(fields))


def planted_times(
    rng: np.random.Generator,
    seeds: int,
    effect: float = 1.0,
    *,
    censored: float = 0.0,
    ties: bool = False,
    sd_common: float = 0.4,
    sd_own: float = 0.25,
) -> tuple[np.ndarray, float]:
    """Return T of a pair of variations, shape (seeds, 2), log-normal in mbu, and their budget C.

    The second column is ``effect`` times as long in law. ``censored`` is the share of all times
    that lie above C; ``ties`` rounds them to a few values, as epochs of equal length do.
    """
    log_t = rng.normal(0.0, sd_common, (seeds, 1)) + rng.normal(0.0, sd_own, (seeds, 2))
    times = 1000.0 * np.exp(log_t) * np.array([1.0, effect])
    if ties:
        times = np.ceil(times / 200.0) * 200.0
    budget = float(np.quantile(times, 1 - censored)) if censored else float(times.max() * 1.2)
    return times, budget


def planted_storage(
    times: Mapping[tuple[str, int], tuple[float, float]],
    spec: StudySpec,
    storage: BaseStorage | None = None,
) -> BaseStorage:
    """Return a storage in which cell (variation, seed) reaches the spec's first target at T of its budget C.

    ``times`` maps (variation, seed) to (T, C) in mbu; T above C is censored. A cell is one trial
    of three epochs: below the target, at it (at T), and at the end of the budget.
    """
    storage = storage or InMemoryStorage()
    target = spec.targets[0]
    for (variation, seed), (reached_at, budget) in times.items():
        mbu, accuracy = [min(reached_at, budget) / 2], [target - 0.1]
        if reached_at <= budget:
            mbu, accuracy = [*mbu, reached_at], [*accuracy, target]
        if reached_at != budget:
            mbu, accuracy = [*mbu, budget], [*accuracy, accuracy[-1]]
        trial = planted_trial(0, accuracy, mbu=mbu, warm=variation != "asha-baseline")
        study_id = plant_cell(storage, Cell(spec.name, variation, seed), spec)
        storage.create_new_trial(study_id, template_trial=trial)
        _finish(storage, study_id, max(accuracy))
    return storage


def grown_storage(
    spec: StudySpec,
    storage: BaseStorage | None = None,
    *,
    trials: int = 16,
    epochs: int = 27,
    effect: Mapping[str, float] | None = None,
    workers: int = 1,
    rng: int = 0,
) -> BaseStorage:
    """Return a storage with all cells of the spec as a study leaves them.

    Trials are paired by (seed, k): the same suggestion and asymptote; halving at the spec's rungs;
    one in eight diverges. ``effect`` scales how many epochs a variation needs (0.8: a fifth less).
    """
    storage = storage or InMemoryStorage()
    effect = effect or {}
    cells = [Cell(spec.name, "asha-baseline", s, pilot=True) for s in spec.pilot_seeds]
    cells += [Cell(spec.name, v, s) for s in spec.seeds for v in spec.variations]
    rungs = spec.scheduler.rungs(epochs)
    for cell in cells:
        study_id = plant_cell(storage, cell, spec)
        clocks, best = [START] * workers, 0.0
        for k in range(trials):
            draw = np.random.default_rng((rng, cell.seed, k))
            quality, speed = draw.beta(4, 2), draw.uniform(1.0, 8.0) * effect.get(cell.variation, 1.0)
            unit = draw.uniform(size=len(RANGES))
            length = epochs if quality > 0.85 else [*rungs, epochs][min(int(quality * 4), len(rungs))]
            noise = draw.normal(0, 0.005, length)
            curve = 0.1 + 0.85 * quality * (1 - np.exp(-np.arange(1, length + 1) / speed)) + noise
            accuracy: list[float | None] = [round(float(min(a, 1.0)), 4) for a in curve]
            if draw.uniform() < 1 / 8:
                accuracy = [*accuracy[:1], None]
            state = TrialState.COMPLETE if len(accuracy) == epochs else TrialState.PRUNED
            worker = int(np.argmin(clocks))
            warm = cell.variation != "asha-baseline"
            trial = planted_trial(
                k,
                accuracy,
                start=clocks[worker],
                warm=warm,
                state=state,
                unit=unit,
                worker=worker,
                gradient=10.0 ** draw.normal(-1, 1) if warm else None,
            )
            clocks[worker] = trial.user_attrs["curve"]["wall"][-1]
            storage.create_new_trial(study_id, template_trial=trial)
            best = max([best, *(a for a in accuracy if a is not None)])
        _finish(storage, study_id, best)
    return storage


def planted_trial(
    k: int,
    accuracy: Sequence[float | None],
    *,
    mbu: Sequence[float] | None = None,
    start: float = START,
    seconds: float = 1.0,
    warm: bool = False,
    state: TrialState = TrialState.COMPLETE,
    unit: Sequence[float] | np.ndarray = (0.5, 0.5, 0.5),
    worker: int = 0,
    gradient: float | None = 0.1,
    **attributes: Any,
) -> FrozenTrial:
    """Return an ended trial with a curve; an accuracy of None is an epoch that diverged."""
    n = len(accuracy)
    warm_mbu, warm_s = (5.0, 0.5) if warm else (0.0, 0.0)
    mbu = mbu if mbu is not None else [BATCHES * (e + 1) + warm_mbu for e in range(n)]
    suggested = _native(unit)
    step = {name: -1e-3 * (gradient or 0.0) if warm else 0.0 for name in RANGES}
    trained = {
        "lr": suggested["lr"] * 10 ** step["lr"],
        **{p: suggested[p] + step[p] for p in ("momentum", "magnitude")},
    }
    distributions = {p: FloatDistribution(**r) for p, r in RANGES.items()}  # type: ignore[arg-type]
    trained = {p: min(max(v, RANGES[p]["low"]), RANGES[p]["high"]) for p, v in trained.items()}
    record = {
        "suggested": suggested,
        "trained": trained,
        "rule": "raw" if warm else None,
        "cost_mbu": warm_mbu,
        **({"gradient": dict.fromkeys(RANGES, gradient), "step": step} if warm else {}),
        **({"methods": {"lr": "lean", "momentum": "lean", "magnitude": "finite-difference"}} if warm else {}),
        "at_bound": [],
        "seconds": warm_s,
        "reason": None,
        "fixed": [],
    }
    durations = [seconds * 1.1 + (warm_s if e == 0 else 0.0) for e in range(n)]
    curve = {
        "mbu": list(mbu),
        "wall": [round(start + float(w), 3) for w in np.cumsum(durations)],
        "train_s": [seconds] * n,
        "warm_s": [warm_s if e == 0 else 0.0 for e in range(n)],
        "eval_s": [seconds / 10] * n,
        "train_loss": [None if a is None else 1.0 for a in accuracy],
        "val_loss": [None if a is None else 1.5 - a for a in accuracy],
        "val_metric": list(accuracy),
    }
    finite = {e: a for e, a in enumerate(accuracy, start=1) if a is not None}
    if len(finite) < n and state == TrialState.COMPLETE:
        state = TrialState.PRUNED
    end = start + sum(durations)
    trial = create_trial(
        state=state,
        value=max(finite.values()) if state == TrialState.COMPLETE else None,
        params=trained,
        distributions=distributions,
        intermediate_values=finite,
        user_attrs={
            "config_index": k,
            "streams": {"seed": 0, "config_index": k, "weights": "w", "order": "o"},
            "batches_per_epoch": BATCHES,
            "worker": {"host": "host", "pid": 100 + worker, "device": "cpu"},
            "ohgw": [record],
            "curve": curve,
            "flops": {"batch": 1000, "warm": 4000 if warm else 0},
            "memory": {"ram": 1_000_000_000 + 50_000_000 * warm, "vram": None, "nvml": None},
            **({"reason": f"diverged in epoch {n}"} if len(finite) < n else {}),
            **attributes,
        },
    )
    trial.datetime_start = datetime.datetime.fromtimestamp(start)
    if state.is_finished():
        trial.datetime_complete = datetime.datetime.fromtimestamp(end)
    return trial


def plant_cell(storage: BaseStorage, cell: Cell, spec: StudySpec) -> int:
    """Make the Optuna study of a cell as the runner does; return its id."""
    study_id = storage.create_new_study([StudyDirection.MAXIMIZE], study_name=cell.name)
    storage.set_study_system_attr(
        study_id, optuna.study.study._SYSTEM_ATTR_METRIC_NAMES, [f"validation {spec.metric.name}"]
    )
    attributes = {
        "variation": cell.variation,
        "seed": cell.seed,
        "pilot": cell.pilot,
        "environment": {"versions": {"torch": "2.6"}, "python": "3.11", "commit": None, "device": "cpu"},
        "spec": spec.identity(),
    }
    for key, value in attributes.items():
        storage.set_study_user_attr(study_id, key, value)
    return study_id


def _finish(storage: BaseStorage, study_id: int, best: float) -> None:
    final = {"trial": 0, "config_index": 0, "val_metric": best, "test_metric": best - 0.01}
    storage.set_study_user_attr(study_id, "final", {**final, "test_loss": 0.5, "seconds": 1.0})


def _native(unit: Sequence[float] | np.ndarray) -> dict[str, float]:
    values = {}
    for u, (name, r) in zip(unit, RANGES.items(), strict=True):
        low, high = (math.log10(r["low"]), math.log10(r["high"])) if "log" in r else (r["low"], r["high"])
        value = low + float(u) * (high - low)
        values[name] = 10**value if "log" in r else value
    return values
