"""YAML to frozen, validated specs: everything a study is, before anything is made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from optuna_ohgw.errors import UserError
from optuna_ohgw.metric import Metric
from optuna_ohgw.reading import leaves, merge, read_file, read_override, shown
from optuna_ohgw.spec_checks import (
    check_freeze,
    check_pool,
    check_replay,
    check_space,
    check_storage,
    check_variations,
)
from optuna_ohgw.spec_errors import explain
from optuna_ohgw.spec_kinds import Task
from optuna_ohgw.spec_parts import (
    ENDLESS,
    BudgetSpec,
    ChoiceSpec,
    Entry,
    ExecutionSpec,
    RangeSpec,
    SchedulerSpec,
    Spec,
    WarmStartSpec,
)
from optuna_ohgw.spec_tasks import ImageSpec, ReplaySpec
from optuna_ohgw.variations import WARM_STARTS, scheduler_of, warm_start_of


class StudySpec(Spec):
    """A whole study: variations × paired seeds on one task in one storage."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    task: Task
    space: dict[str, Entry]
    sampler: Literal["random", "qmc", "tpe", "gp", "nsga2"] = "random"
    scheduler: SchedulerSpec = SchedulerSpec()
    variations: tuple[str, ...]
    warm_start: WarmStartSpec = WarmStartSpec()
    seeds: tuple[Annotated[int, Field(ge=0)], ...]
    pilot_seeds: tuple[Annotated[int, Field(ge=0)], ...] = ()
    targets: Annotated[tuple[float, ...], Field(min_length=1)]
    budget: BudgetSpec
    execution: ExecutionSpec = ExecutionSpec()
    beside: tuple[str, ...] = ()
    tracking: Literal["mlflow", "wandb"] | None = None
    output: str = ""
    storage: str = ""

    @field_validator("seeds", mode="before")
    @classmethod
    def _count(cls, value: Any) -> Any:
        count = isinstance(value, int) and not isinstance(value, bool) and value > 0
        if not count and not (isinstance(value, list | tuple) and value):
            raise ValueError(f"got {shown(value)}; give a number of seeds from 1, or a list of seeds")
        return tuple(range(value) if count else value)

    @field_validator("variations", mode="after")
    @classmethod
    def _whole_names(cls, names: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        """Put the scheduler's name before those that lack it."""
        scheduler = info.data["scheduler"].name if "scheduler" in info.data else "asha"
        lacking = {n for n in names if warm_start_of(n) and scheduler_of(n) is None}
        return tuple(f"{scheduler}-{n}" if n in lacking else n for n in names)

    @model_validator(mode="after")
    def _check(self) -> StudySpec:
        if isinstance(self.task, ReplaySpec):
            check_replay(self)
        check_space(self.space, self.task)
        check_freeze(self.warm_start, self.task)
        check_variations(self.variations, self.scheduler.name, self.warm_start.eta_h)
        for field in ("variations", "seeds", "pilot_seeds", "targets"):
            values = getattr(self, field)
            if len(set(values)) < len(values):
                raise ValueError(f"{field}: {list(values)} has one twice; name each once")
        if not self.variations:
            raise ValueError(f"variations: got []; name some of {', '.join(WARM_STARTS)}")
        both = set(self.seeds) & set(self.pilot_seeds)
        if both:
            raise ValueError(
                f"pilot_seeds: {sorted(both)} are among seeds; choose others, the pilot is apart"
            )
        for target in self.targets:
            if wrong := self.metric.misplaced(target):
                raise ValueError(f"targets: {target} {wrong}")
        if self.scheduler.min_resource > self.task.epochs:
            raise ValueError(
                f"scheduler.min_resource: {self.scheduler.min_resource} epochs is more than "
                f"task.epochs {self.task.epochs}; lower it"
            )
        check_pool(self)
        if self.scheduler.name == "hyperband-synchronous" and self.budget.trials is not None:
            least = self.scheduler.reduction_factor ** len(self.scheduler.rungs(self.task.epochs))
            if self.budget.trials < least:
                raise ValueError(
                    f"budget.trials: {self.budget.trials} do not fill the first bracket; give {least} or more"
                )
        check_storage(self.storage)
        return self

    @property
    def epochs_in_all(self) -> int | None:
        """Epochs after which a cell stops, of all its trials; None for no such limit.

        One that chooses among ``budget.trials`` configurations, epoch by epoch, would train all of
        them to the end. Without another limit it has what successive halving would take for them.
        """
        budget = self.budget
        other = budget.mbu or budget.device_hours or budget.wall_hours
        if budget.epochs or other or self.scheduler.name not in ENDLESS:
            return budget.epochs
        assert budget.trials is not None
        total, before, left = 0, 0, budget.trials
        for level in (*self.scheduler.rungs(self.task.epochs), self.task.epochs):
            total += left * (level - before)
            before, left = level, -(-left // self.scheduler.reduction_factor)
        return total

    @property
    def metric(self) -> Metric:
        """What the study is judged by."""
        return self.task.metric

    @property
    def image(self) -> ImageSpec:
        """The task, where it is one on images.

        Raises:
            TypeError: If it is another.
        """
        if not isinstance(self.task, ImageSpec):
            raise TypeError(f"a task on images is needed, this is {self.task.name!r}")
        return self.task

    @property
    def label_noise(self) -> float:
        """Share of the training labels that are replaced."""
        return self.task.label_noise if isinstance(self.task, ImageSpec) else 0.0

    @property
    def replays(self) -> bool:
        """Whether curves of a table stand in place of training."""
        return isinstance(self.task, ReplaySpec)

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(self.output or f"runs/{self.name}")

    @property
    def storage_url(self) -> str:
        """The Optuna storage URL; an SQLite file in the output folder unless one is named."""
        return self.storage or f"sqlite:///{self.folder / 'study.db'}"

    @property
    def ranges(self) -> dict[str, RangeSpec]:
        """The continuous hyper-parameters that are searched."""
        return {n: r for n, r in self.space.items() if isinstance(r, RangeSpec)}

    @property
    def choices(self) -> dict[str, ChoiceSpec]:
        """The structural parameters that are searched."""
        return {n: c for n, c in self.space.items() if isinstance(c, ChoiceSpec)}

    @property
    def constants(self) -> dict[str, float]:
        """Native values of the hyper-parameters that are not searched; the task's defaults unless named."""
        numbers = {n: float(v) for n, v in self.space.items() if isinstance(v, int | float)}
        known, defaults = self.task.limits, self.task.defaults
        return {n: numbers.get(n, defaults.get(n, 0.0)) for n in known if n not in self.ranges}

    def executed(self, **changes: Any) -> StudySpec:
        """Return the study with some settings of its execution changed, which changes no identity."""
        return self.model_copy(update={"execution": self.execution.model_copy(update=changes)})

    def identity(self) -> dict[str, Any]:
        """Return what a cell's result depends on, JSON-ready; a resumed study must agree in it."""
        cells = {"variations", "seeds", "pilot_seeds", "targets"}
        surroundings = {"execution", "beside", "tracking", "output", "storage"}
        return self.model_dump(mode="json", exclude=cells | surroundings)


def load_spec(
    path: Path, overrides: tuple[str, ...] = (), *, smoke: bool = False, storage: str | None = None
) -> StudySpec:
    """Return the validated spec of a YAML file.

    A file may name another under ``extends`` (relative to itself) and change some of it. Its
    ``smoke`` section holds the changes that make it a light run on the same code path.

    Args:
        path: The YAML file.
        overrides: ``dotted.key=value`` pairs, laid over the file.
        smoke: Lay the ``smoke`` section over the file first.
        storage: URL in place of that of the file.

    Raises:
        UserError: In one line, naming file, field, value and remedy.
    """
    data = read_file(path)
    if isinstance(data.get("studies"), list):
        raise UserError(f"{path}: names several studies; give one of them, {shown(data['studies'])}")
    light = data.pop("smoke", None) or {}
    if isinstance(data.get("beside"), list):
        data["beside"] = [str(path.parent / b) if isinstance(b, str) else b for b in data["beside"]]
    if smoke:
        if not isinstance(light, dict):
            raise UserError(f"{path}: smoke: got {shown(light)}; give a mapping of changes")
        if isinstance(data.get("name"), str):
            data["name"] += "-smoke"
        data = merge(data, light)
    for pair in overrides:
        data = merge(data, read_override(pair))
    if storage is not None:
        data["storage"] = storage
    for field, value in leaves(data):
        if not isinstance(value, str | int | float | None):
            raise UserError(f"{path}: {field}: {value!r} is of no plain YAML type; write it without a tag")
    try:
        return StudySpec.model_validate_json(json.dumps(data))
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error, StudySpec)}") from None
