"""YAML to frozen, validated specs: everything a study is, before anything is made."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PositiveFloat,
    PositiveInt,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from optuna_ohgw.errors import UserError
from optuna_ohgw.reading import leaves, merge, read_file, read_override, shown
from optuna_ohgw.variations import VARIATIONS, base_of, eta_of, takes_eta

PSI = ("lr", "weight_decay", "momentum", "magnitude", "label_smoothing")
LIMITS = {
    "lr": (0.0, float("inf")),
    "weight_decay": (0.0, float("inf")),
    "momentum": (0.0, 1.0),
    "magnitude": (0.0, 10.0),
    "label_smoothing": (0.0, 1.0),
}
STRUCTURE = ("model", "batch_size")


# pydantic's words, in those of a YAML file
_WANTED = {
    "a valid integer": "a whole number",
    "a valid integer, got a number with a fractional part": "a whole number",
    "a valid number": "a number",
    "a valid string": "text, in quotes if it looks like a number",
    "a valid boolean": "true or false",
    "a valid array": "a list",
    "an object": "a mapping",
}


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class RangeSpec(_Spec):
    """A continuous hyper-parameter: bounds in native units, log10- or linearly distributed."""

    low: float
    high: float
    log: bool = False

    @model_validator(mode="after")
    def _check(self) -> RangeSpec:
        if self.low >= self.high:
            raise ValueError(f"low {self.low} is not below high {self.high}; give low < high")
        if self.log and self.low <= 0:
            raise ValueError(f"log needs low > 0 but low is {self.low}; raise low or drop log")
        return self


class ChoiceSpec(_Spec):
    """A structural parameter, passed through untouched by a warm start."""

    choices: Annotated[tuple[str | int, ...], Field(min_length=1)]


def _entry_kind(value: Any) -> str:
    if isinstance(value, ChoiceSpec) or (isinstance(value, dict) and "choices" in value):
        return "choices"
    return "range" if isinstance(value, RangeSpec | dict) else "number"


Entry = Annotated[
    Annotated[RangeSpec, Tag("range")]
    | Annotated[ChoiceSpec, Tag("choices")]
    | Annotated[float, Tag("number")],
    Discriminator(_entry_kind),
]


class AugmentationSpec(_Spec):
    """Static settings of the image augmentation; its magnitude is in the space."""

    flip: bool = True
    crop_padding: Annotated[int, Field(ge=0)] = 4
    operations: Annotated[int, Field(ge=0)] = 2
    cutout: Annotated[int, Field(ge=0)] = 16


class TaskSpec(_Spec):
    """What is trained: data, network, length."""

    name: Literal["image"] = "image"
    data: str
    model: str
    activation: Literal["relu", "silu"] = "relu"
    epochs: PositiveInt
    batch_size: PositiveInt = 128
    validation_images: PositiveInt
    train_images: PositiveInt | None = None
    test_images: PositiveInt | None = None
    size: PositiveInt | None = None
    channels: Literal[1, 3] | None = None
    label_noise: Annotated[float, Field(ge=0, lt=1)] = 0.0
    image_column: str = "img"
    label_column: str = "label"
    augmentation: AugmentationSpec = AugmentationSpec()


class SchedulerSpec(_Spec):
    """Asynchronous successive halving (stopping); resources are epochs."""

    name: Literal["asha"] = "asha"
    min_resource: PositiveInt = 1
    reduction_factor: Annotated[int, Field(ge=2)] = 4
    bootstrap_count: Annotated[int, Field(ge=0)] = 2

    def rungs(self, epochs: int) -> tuple[int, ...]:
        """Return the epochs after which the pruner decides, below ``epochs``."""
        rungs, milestone = [], self.min_resource
        while milestone < epochs:
            rungs.append(milestone)
            milestone *= self.reduction_factor
        return tuple(rungs)


class WarmStartSpec(_Spec):
    """Settings shared by the warm starts of all variations; see ``WarmStart``."""

    eta_h: PositiveFloat = 1e-3
    horizon: PositiveInt = 1
    estimator: Literal["lean", "exact", "direct", "finite-difference"] = "lean"
    radius: PositiveFloat = 0.2
    lengths: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (0.05, 0.1, 0.2, 0.4)
    grid: Annotated[tuple[float, ...], Field(min_length=1)] = (-0.4, -0.2, 0.2, 0.4)
    grid_horizon: PositiveInt = 5
    sigma: PositiveFloat = 0.01
    freeze: tuple[Literal["lr", "weight_decay", "momentum", "magnitude", "label_smoothing"], ...] = ()
    snr_batches: Annotated[int, Field(ge=0)] = 0
    min_snr: PositiveFloat | None = None
    every_rung: bool = False

    @model_validator(mode="after")
    def _check(self) -> WarmStartSpec:
        if self.snr_batches == 1 or (self.min_snr is not None and self.snr_batches == 0):
            raise ValueError(
                f"snr_batches is {self.snr_batches}; a ratio needs at least 2, or 0 with no min_snr"
            )
        return self


class BudgetSpec(_Spec):
    """When a cell stops: at the first of the limits named."""

    trials: PositiveInt | None = None
    mbu: PositiveFloat | None = None
    device_hours: PositiveFloat | None = None
    wall_hours: PositiveFloat | None = None

    @model_validator(mode="after")
    def _check(self) -> BudgetSpec:
        if not any((self.trials, self.mbu, self.device_hours, self.wall_hours)):
            raise ValueError("no limit is named; give trials, mbu, device_hours or wall_hours")
        return self


class ExecutionSpec(_Spec):
    """How the work is spread over processes; it changes no result of a one-worker cell."""

    workers: PositiveInt = 1
    cells_at_once: PositiveInt = 1
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    threads: PositiveInt | None = None


class StudySpec(_Spec):
    """A whole study: variations × paired seeds on one task in one storage."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    task: TaskSpec
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

    @model_validator(mode="after")
    def _check(self) -> StudySpec:
        _check_space(self.space)
        _check_variations(self.variations, self.warm_start.eta_h)
        for field in ("variations", "seeds", "pilot_seeds", "targets"):
            values = getattr(self, field)
            if len(set(values)) < len(values):
                raise ValueError(f"{field}: {list(values)} has one twice; name each once")
        if not self.variations:
            raise ValueError(f"variations: got []; name some of {', '.join(VARIATIONS)}")
        both = set(self.seeds) & set(self.pilot_seeds)
        if both:
            raise ValueError(
                f"pilot_seeds: {sorted(both)} are among seeds; choose others, the pilot is apart"
            )
        for target in self.targets:
            if not 0 < target <= 1:
                raise ValueError(
                    f"targets: {target} is not an accuracy above 0 and up to 1 (100%); give 0.93 for 93%"
                )
        if self.scheduler.min_resource > self.task.epochs:
            raise ValueError(
                f"scheduler.min_resource: {self.scheduler.min_resource} epochs is more than "
                f"task.epochs {self.task.epochs}; lower it"
            )
        if self.storage in ("sqlite://", "sqlite:///:memory:"):
            raise ValueError(
                f"storage: {self.storage} is in memory, which workers cannot share; give sqlite:///FILE"
            )
        return self

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
        """Native values of the hyper-parameters that are not searched; 0 unless named."""
        numbers = {n: float(v) for n, v in self.space.items() if isinstance(v, int | float)}
        return {n: numbers.get(n, 0.0) for n in PSI if n not in self.ranges}

    def identity(self) -> dict[str, Any]:
        """Return what a cell's result depends on, JSON-ready; a resumed study must agree in it."""
        cells = {"variations", "seeds", "pilot_seeds", "targets"}
        surroundings = {"execution", "beside", "tracking", "output", "storage"}
        return self.model_dump(mode="json", exclude=cells | surroundings)


def load_spec(path: Path, overrides: tuple[str, ...] = (), *, smoke: bool = False) -> StudySpec:
    """Return the validated spec of a YAML file.

    A file may name another under ``extends`` (relative to itself) and change some of it. Its
    ``smoke`` section holds the changes that make it a light run on the same code path.

    Args:
        path: The YAML file.
        overrides: ``dotted.key=value`` pairs, laid over the file.
        smoke: Lay the ``smoke`` section over the file first.

    Raises:
        UserError: In one line, naming file, field, value and remedy.
    """
    data = read_file(path)
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
    for field, value in leaves(data):
        if not isinstance(value, str | int | float | None):
            raise UserError(f"{path}: {field}: {value!r} is of no plain YAML type; write it without a tag")
    try:
        return StudySpec.model_validate_json(json.dumps(data))
    except ValidationError as error:
        raise UserError(f"{path}: {_explain(error)}") from None


def _check_space(space: dict[str, RangeSpec | ChoiceSpec | float]) -> None:
    if not isinstance(space.get("lr"), RangeSpec):
        received = f"{space['lr']} is not a range" if "lr" in space else "is missing"
        raise ValueError(f"space.lr: {received}; give low and high, the learning rate is always searched")
    for name, entry in space.items():
        if isinstance(entry, ChoiceSpec):
            received = shown(list(entry.choices))
            if name not in STRUCTURE:
                raise ValueError(
                    f"space.{name}: choices {received}; only {' and '.join(STRUCTURE)} can have any"
                )
            if name == "model" and not all(isinstance(c, str) for c in entry.choices):
                raise ValueError(f"space.model.choices: got {received}; give names of models")
            if name == "batch_size" and not all(isinstance(c, int) and c > 0 for c in entry.choices):
                raise ValueError(f"space.batch_size.choices: got {received}; give whole numbers from 1")
            if len(set(entry.choices)) < len(entry.choices):
                raise ValueError(f"space.{name}.choices: {received} has one twice; name each once")
            continue
        if name in STRUCTURE:
            raise ValueError(f"space.{name}: {_shown_entry(entry)}; give choices, or set task.{name}")
        if name not in PSI:
            raise ValueError(
                f"space.{name}: unknown key with value {_shown_entry(entry)}"
                f"{_nearest(name, (*PSI, *STRUCTURE))}"
            )
        low, high = LIMITS[name]
        ends = (entry.low, entry.high) if isinstance(entry, RangeSpec) else (entry, entry)
        if ends[0] < low or ends[1] > high or (name == "momentum" and ends[1] >= 1):
            limit = f"{high:g}{' (excluded)' if name == 'momentum' else ''}"
            raise ValueError(f"space.{name}: {_shown_entry(entry)} leaves {low:g} to {limit}; keep it inside")


def _check_variations(variations: tuple[str, ...], shared: float) -> None:
    same: dict[tuple[str, float | None], str] = {}
    for name in variations:
        base, able = base_of(name), ", ".join(filter(takes_eta, VARIATIONS))
        if base not in VARIATIONS:
            raise ValueError(f"variations: {name!r} is unknown{_nearest(base, VARIATIONS)}")
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


def _shown_entry(entry: RangeSpec | float) -> str:
    return f"{entry.low} to {entry.high}" if isinstance(entry, RangeSpec) else str(entry)


def _explain(error: ValidationError) -> str:
    errors = error.errors(include_url=False)
    first = min(errors, key=lambda e: e["type"] != "extra_forbidden")
    tag = 2 if first["loc"][:1] == ("space",) else None
    where = ".".join(" ".join(str(part).split()) for i, part in enumerate(first["loc"]) if i != tag)
    received = shown(first["input"])
    if first["type"] == "extra_forbidden":
        known = _known_keys(first["loc"][:-1])
        return f"{where}: unknown key with value {received}{_nearest(str(first['loc'][-1]), known)}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{where}: {message}" if where else message
    if first["type"] == "missing":
        return f"{where}: is missing; add it"
    return f"{where}: got {received}; {_remedy(message)}"


def _remedy(message: str) -> str:
    """Return what to give, from a message of pydantic's on what should be."""
    subject, _, wanted = message.partition(" should ")
    wanted = wanted.removeprefix("be ")
    if subject in ("Tuple", "List"):
        return "give at least one"
    if subject == "String":
        return f"give text that {wanted.replace('match', 'matches', 1)}"
    number = "a number " if wanted.startswith(("greater", "less")) else ""
    return f"give {number}{_WANTED.get(wanted, wanted)}"


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    model: type[BaseModel] = StudySpec
    if len(location) == 3 and location[0] == "space":
        return list((RangeSpec if location[2] == "range" else ChoiceSpec).model_fields)
    for part in location:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(known)}" if known else "; remove it"
