"""What the parts of a spec must be to each other: ValueError with field, value and remedy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import ValidationError

from optuna_ohgw.reading import shown
from optuna_ohgw.spec_errors import nearest, remedy
from optuna_ohgw.spec_kinds import BoostingSpec, OwnSpec, PpoSpec
from optuna_ohgw.spec_parts import POOLED, ChoiceSpec, RangeSpec, WarmStartSpec
from optuna_ohgw.spec_tasks import ReplaySpec, TrainingSpec
from optuna_ohgw.variations import WARM_STARTS, base_of, eta_of, scheduler_of, takes_eta, warm_start_of

if TYPE_CHECKING:
    from optuna_ohgw.spec import StudySpec


def check_replay(spec: StudySpec) -> None:
    """Raise ValueError where a replay is given what it has no use for."""
    if spec.execution.workers > 1:
        raise ValueError(
            f"execution.workers: {spec.execution.workers} processes in a cell; a replay has one, "
            "give task.workers for simulated ones, execution.cells_at_once for processes"
        )
    if spec.sampler != "random":
        raise ValueError(f"sampler: {spec.sampler!r} draws nothing in a replay; leave it out")
    if spec.budget.wall_hours is not None:
        raise ValueError("budget.wall_hours: a replay has a simulated clock; give epochs or device_hours")
    if spec.choices:
        raise ValueError(f"space.{next(iter(spec.choices))}: choices are not replayed; leave them out")


def check_storage(url: str | None) -> None:
    """Raise ValueError for a storage that workers cannot share, or whose password would be misread."""
    if url in ("sqlite://", "sqlite:///:memory:"):
        raise ValueError(f"storage: {url} is in memory, which workers cannot share; give sqlite:///FILE")
    if url is None or url.startswith("sqlite"):
        return
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        host = make_url(url).host or ""
    except (ArgumentError, ValueError):
        return  # what opens it says so
    found = "an '@'" if "@" in host else "a space" if len(url.split()) > 1 else None
    if found is not None:  # not shown: it may hold the end of a password
        raise ValueError(f"storage: holds {found} unquoted; write %40 for '@', %20 for a space")


def check_space(space: dict[str, RangeSpec | ChoiceSpec | float], task: TrainingSpec) -> None:
    """Raise ValueError unless the names are the task's, inside their limits, and something is searched."""
    limits, structure = task.limits, task.structure
    if task.required is not None and not isinstance(space.get(task.required), RangeSpec):
        name = task.required
        received = f"{space[name]} is not a range" if name in space else "is missing"
        raise ValueError(f"space.{name}: {received}; give low and high, the learning rate is always searched")
    searched = not isinstance(task, ReplaySpec)
    if searched and not any(isinstance(entry, RangeSpec) for entry in space.values()):
        raise ValueError(f"space: nothing is searched; give low and high for some of {', '.join(limits)}")
    for name, entry in space.items():
        if isinstance(entry, ChoiceSpec):
            received = shown(list(entry.choices))
            if name not in structure:
                able = (
                    f"only {' and '.join(structure)} can have any" if structure else "none can have any here"
                )
                raise ValueError(f"space.{name}: choices {received}; {able}")
            for choice in entry.choices:
                try:
                    type(task).model_validate(task.model_dump(by_alias=True) | _chosen(task, name, choice))
                except ValidationError as error:
                    wanted = remedy(error.errors()[0]["msg"].removeprefix("Value error, "))
                    raise ValueError(f"space.{name}.choices: got {received}; {wanted} for each") from None
            if len(set(entry.choices)) < len(entry.choices):
                raise ValueError(f"space.{name}.choices: {received} has one twice; name each once")
            continue
        if name in structure:
            raise ValueError(f"space.{name}: {_shown(entry)}; give choices, or set task.{name}")
        if name not in limits:
            known = (*limits, *structure)
            raise ValueError(f"space.{name}: unknown key with value {_shown(entry)}{nearest(name, known)}")
        low, high, open_end = limits[name]
        ends = (entry.low, entry.high) if isinstance(entry, RangeSpec) else (entry, entry)
        if ends[0] < low or ends[1] > high or (open_end and ends[1] >= high):
            limit = f"{high:g}{' (excluded)' if open_end else ''}"
            raise ValueError(f"space.{name}: {_shown(entry)} leaves {low:g} to {limit}; keep it inside")


def _chosen(task: TrainingSpec, name: str, choice: str | int) -> dict[str, object]:
    if isinstance(task, OwnSpec):
        return {"options": {**task.options, name: choice}}
    return {name: choice}


def check_freeze(warm_start: WarmStartSpec, task: TrainingSpec) -> None:
    """Raise ValueError where a warm start names what the task does not have or cannot do."""
    for name in warm_start.freeze:
        if name not in task.limits:
            raise ValueError(f"warm_start.freeze: {name!r} is unknown{nearest(name, task.limits)}")
    own = isinstance(task, OwnSpec | BoostingSpec | PpoSpec)
    if own and warm_start.estimator in ("lean", "direct"):
        raise ValueError(
            f"warm_start.estimator: {warm_start.estimator!r} is of look-ahead losses; give exact or "
            "finite-difference, or leave it out"
        )


def check_pool(spec: StudySpec) -> None:
    """Raise ValueError where a scheduler chooses among configurations that are not known beforehand."""
    name = spec.scheduler.name
    chooses = name in POOLED
    if (chooses or name == "one-epoch") and spec.budget.trials is None:
        when = "chooses among so many configurations" if chooses else "chooses when all of them were trained"
        raise ValueError(f"budget.trials: is missing; {name} {when}")
    if chooses and spec.sampler not in ("random", "qmc"):
        raise ValueError(
            f"sampler: {spec.sampler!r} draws by what was seen, but {name} chooses among draws known "
            "beforehand; give random or qmc"
        )


def check_variations(variations: tuple[str, ...], scheduler: str, shared: float) -> None:
    """Raise ValueError where a name is unknown, of another scheduler or, with the shared η_h, there twice."""
    same: dict[tuple[str, float | None], str] = {}
    for name in variations:
        base, able = base_of(name), ", ".join(filter(takes_eta, WARM_STARTS))
        if warm_start_of(name) is None:
            known = [*WARM_STARTS, *(f"{scheduler}-{warm}" for warm in WARM_STARTS)]
            raise ValueError(f"variations: {name!r} is unknown{nearest(base, known)}")
        if scheduler_of(name) != scheduler:
            short = name.removeprefix(f"{scheduler_of(name)}-")
            raise ValueError(
                f"variations: {name!r} is of another scheduler than scheduler.name {scheduler!r}; "
                f"write {short!r}"
            )
        try:
            eta = eta_of(name)
        except ValueError as error:
            raise ValueError(f"variations: {error}") from None
        if eta is not None and not takes_eta(name):
            raise ValueError(f"variations: {name!r} has no step size eta_h; only {able} have one")
        key = base, (shared if eta is None else eta) if takes_eta(name) else None
        if key in same and same[key] != name:
            raise ValueError(
                f"variations: {same[key]!r} and {name!r} are the same with eta_h {key[1]:g}; name one of them"
            )
        same[key] = name


def _shown(entry: RangeSpec | float) -> str:
    return f"{entry.low} to {entry.high}" if isinstance(entry, RangeSpec) else str(entry)
