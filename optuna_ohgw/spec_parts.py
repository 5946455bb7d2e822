"""The parts of a study's spec, each frozen and validated by itself."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PositiveFloat,
    PositiveInt,
    Tag,
    model_validator,
)

POOLED = ("bohb", "dyhpo", "boil")  # choose among configurations known beforehand
ENDLESS = ("dyhpo", "boil")  # would train all of them to the end


class Spec(BaseModel):
    """A frozen mapping of known keys and plain YAML types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class RangeSpec(Spec):
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


class ChoiceSpec(Spec):
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


class SchedulerSpec(Spec):
    """How long each configuration is trained; resources are epochs. ``bootstrap_count`` is asha's alone."""

    name: Literal[
        "asha",
        "asha-quantile",
        "asha-promotion",
        "pasha",
        "hyperband",
        "hyperband-promotion",
        "hyperband-synchronous",
        "one-epoch",
        "bohb",
        "dyhpo",
        "boil",
    ] = "asha"
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


class WarmStartSpec(Spec):
    """Settings shared by the warm starts of all variations; see ``WarmStart``."""

    eta_h: PositiveFloat = 1e-3
    horizon: PositiveInt = 1
    estimator: Literal["lean", "exact", "direct", "finite-difference"] | None = None
    radius: PositiveFloat = 0.2
    lengths: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (0.05, 0.1, 0.2, 0.4)
    grid: Annotated[tuple[float, ...], Field(min_length=1)] = (-0.4, -0.2, 0.2, 0.4)
    grid_horizon: PositiveInt = 5
    sigma: PositiveFloat = 0.01
    freeze: tuple[str, ...] = ()
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


class BudgetSpec(Spec):
    """When a cell stops: at the first of the limits named."""

    trials: PositiveInt | None = None
    epochs: PositiveInt | None = None
    mbu: PositiveFloat | None = None
    device_hours: PositiveFloat | None = None
    wall_hours: PositiveFloat | None = None

    @model_validator(mode="after")
    def _check(self) -> BudgetSpec:
        if not any((self.trials, self.epochs, self.mbu, self.device_hours, self.wall_hours)):
            raise ValueError("no limit is named; give trials, epochs, mbu, device_hours or wall_hours")
        return self


class ExecutionSpec(Spec):
    """How the work is spread over processes; it changes no result of a one-worker cell.

    ``workers`` are those of one cell at the most, on all machines together. A cell whose trials fail in
    more than a share of ``max_failed`` is given up. A running trial leaves a checkpoint at the end of an
    epoch when ``checkpoint_s`` have passed since the last. A storage that does not answer is waited for
    ``patience_s``. On a GPU a training step is replayed as one CUDA graph unless ``cuda_graphs`` is false.
    """

    workers: PositiveInt = 1
    cells_at_once: PositiveInt = 1
    max_failed: Annotated[float, Field(ge=0, le=1)] = 0.5
    checkpoint_s: Annotated[float, Field(ge=0)] = 30.0
    patience_s: Annotated[float, Field(ge=0)] = 600.0
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    threads: PositiveInt | None = None
    cuda_graphs: bool = True
