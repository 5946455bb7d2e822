"""The task sections of a study: what is trained, on which data, by which hyper-parameters."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field, PositiveInt

from optuna_ohgw.metric import ACCURACY, Metric
from optuna_ohgw.spec_parts import Spec


class Limits(NamedTuple):
    """Between which native values a hyper-parameter may lie; ``open``: the upper end is excluded."""

    low: float
    high: float
    open: bool = False


COMMON = {
    "lr": Limits(0.0, math.inf),
    "weight_decay": Limits(0.0, math.inf),
    "momentum": Limits(0.0, 1.0, open=True),
    "label_smoothing": Limits(0.0, 1.0),
}
PICTURES = {"lr": COMMON["lr"], "weight_decay": COMMON["weight_decay"], "momentum": COMMON["momentum"]} | {
    "magnitude": Limits(0.0, 10.0),
    "label_smoothing": COMMON["label_smoothing"],
}


class TrainingSpec(Spec):
    """What every task section has: how long, which hyper-parameters, what is measured."""

    structural: ClassVar[tuple[str, ...]] = ()
    epochs: PositiveInt

    @property
    def metric(self) -> Metric:
        """What is measured."""
        return ACCURACY

    @property
    def limits(self) -> Mapping[str, Limits]:
        """The continuous hyper-parameters that there are, with their limits."""
        return PICTURES

    @property
    def defaults(self) -> Mapping[str, float]:
        """Native values of those that the space does not name; 0 for the others."""
        return {}

    @property
    def structure(self) -> dict[str, Any]:
        """The structural parameters, which may have choices, with their values."""
        return {name: getattr(self, name) for name in self.structural}

    @property
    def required(self) -> str | None:
        """A hyper-parameter that is always searched, if there is one."""
        return None

    @property
    @abstractmethod
    def summary(self) -> str:
        """What is trained, in words."""


class AugmentationSpec(Spec):
    """Static settings of the image augmentation; its magnitude is in the space."""

    flip: bool = True
    crop_padding: Annotated[int, Field(ge=0)] = 4
    operations: Annotated[int, Field(ge=0)] = 2
    cutout: Annotated[int, Field(ge=0)] = 16


class ImageSpec(TrainingSpec):
    """Image classification: data, network, length."""

    structural: ClassVar[tuple[str, ...]] = ("model", "batch_size")
    name: Literal["image"] = "image"
    data: str
    model: str
    activation: Literal["relu", "silu"] = "relu"
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

    @property
    def required(self) -> str | None:
        """The learning rate."""
        return "lr"

    @property
    def summary(self) -> str:
        """What is trained, in words."""
        return f"{self.model} on {self.data}, {self.epochs} epochs, label noise {self.label_noise:g}"


class ReplaySpec(TrainingSpec):
    """Learning curves of a table in place of training, on a simulated clock; see ``tasks.replay``.

    ``workers`` are simulated: configurations trained at the same time in a cell.
    """

    name: Literal["replay"]
    data: str
    value: str = "val_metric"
    skip: Annotated[int, Field(ge=0)] = 0
    workers: PositiveInt = 1

    @property
    def summary(self) -> str:
        """What is replayed, in words."""
        return f"replay of {self.data} up to {self.epochs} epochs, {self.workers} simulated workers"
