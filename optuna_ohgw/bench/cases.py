"""What is measured: two tasks that need no download, and one set of hyper-parameters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Literal

import torch
from optuna.distributions import FloatDistribution
from torch import Tensor

from optuna_ohgw.space import SearchSpace
from optuna_ohgw.spec_tasks import AugmentationSpec, ImageSpec
from optuna_ohgw.tasks.data import split
from optuna_ohgw.tasks.image import ImageTask, load_image_arrays
from optuna_ohgw.training import TrainState, initial_state

PSI = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "magnitude": 5.3, "label_smoothing": 0.1}
SPACE = SearchSpace(
    {
        "lr": FloatDistribution(1e-4, 1.0, log=True),
        "weight_decay": FloatDistribution(1e-6, 1e-2, log=True),
        "momentum": FloatDistribution(0.0, 0.99),
        "magnitude": FloatDistribution(0.0, 10.0),
        "label_smoothing": FloatDistribution(0.0, 0.3),
    }
)
CIFAR_PICTURES = 45_000
_DIGITS_VALIDATION = 360


@dataclass(frozen=True)
class Case:
    """A training task of the benchmark, made of scikit-learn's digits.

    Attributes:
        name: What the tables call it.
        model: Name of the network.
        batch_size: Pictures a mini-batch.
        epochs: Epochs of a trial.
        size: Height and width that the digits are resized to; None: 8.
        channels: 1 or 3; None: 1.
        pictures: Training pictures, the digits over again if need be; None: all the digits once.
        full: Training pictures of the epoch that this one stands for; None: it is one itself.
        threads: Threads of one trial, as in its study; None: as many as there are cores.
        augmentation: As in its study.
    """

    name: str
    model: str
    batch_size: int
    epochs: int
    size: int | None = None
    channels: Literal[1, 3] | None = None
    pictures: int | None = None
    full: int | None = None
    threads: int | None = None
    augmentation: AugmentationSpec = field(default_factory=AugmentationSpec)

    def task(self, device: torch.device) -> ImageTask:
        """Return the task on a device, with a network of its own."""
        spec = ImageSpec(
            data="digits",
            model=self.model,
            epochs=self.epochs,
            batch_size=self.batch_size,
            validation_images=_DIGITS_VALIDATION,
            size=self.size,
            channels=self.channels,
            augmentation=self.augmentation,
        )
        arrays = load_image_arrays(spec, None)
        data = split(arrays, validation_images=_DIGITS_VALIDATION, seed=0, device=device)
        if self.pictures is not None:
            train = _take(data.train_images, data.train_labels, self.pictures)
            # As many to a training picture as on CIFAR-10, 5,000 to 45,000.
            part = _take(data.validation_images, data.validation_labels, self.pictures // 9)
            data = replace(
                data,
                train_images=train[0],
                train_labels=train[1],
                validation_images=part[0],
                validation_labels=part[1],
            )
        return ImageTask(spec, data, self.model, self.batch_size)

    def state(self, task: ImageTask) -> TrainState:
        """Return the state before training, with ψ."""
        return replace(initial_state(task, 0, 0, self.epochs), psi=PSI)

    def states(self, task: ImageTask) -> Iterator[TrainState]:
        """Yield that state at one epoch after another, so that each draws its own random numbers."""
        first = self.state(task)
        return (replace(first, epoch=i % self.epochs) for i in count())

    def scale(self, task: ImageTask) -> float:
        """Return how many of the task's epochs make a full one."""
        pictures = len(task.data.train_images)
        return (self.full or pictures) / pictures


DIGITS = Case(
    "digits, MLP, batch 32",
    "mlp",
    batch_size=32,
    epochs=27,
    threads=1,
    augmentation=AugmentationSpec(flip=False, crop_padding=1, operations=2, cutout=3),
)


def resnet20(batches: int | None = None) -> Case:
    """Return ResNet-20 on 32×32×3 with epochs of some full mini-batches; None: the digits once."""
    return Case(
        "32×32×3, ResNet-20, batch 128",
        "resnet20",
        batch_size=128,
        epochs=200,
        size=32,
        channels=3,
        pictures=None if batches is None else 128 * batches,
        full=CIFAR_PICTURES,
    )


def _take(images: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    rows = torch.arange(count, device=images.device) % len(images)
    return images[rows], labels[rows]
