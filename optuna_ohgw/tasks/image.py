"""Image classification: uint8 pictures on the device, batched augmentation, a small network."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optuna_ohgw.seeds import Purpose, derive_seed
from optuna_ohgw.tasks.augment import Augmentation, Draws, augment, draw, normalize
from optuna_ohgw.tasks.base import Evaluation
from optuna_ohgw.tasks.data import ImageArrays, ImageData, load_arrays, split
from optuna_ohgw.tasks.models import build_model, initialize
from optuna_ohgw.tasks.precision import autocast

if TYPE_CHECKING:
    from optuna_ohgw.spec_tasks import ImageSpec

# Elements augmented in one call: on a CPU about what its caches hold.
_CHUNK = {"cpu": 2**19, "cuda": 2**26}
_EVALUATION_BATCH = 1000


class RawImages(NamedTuple):
    """uint8 pictures ``[B, C, H, W]`` and the draws of their augmentation."""

    images: Tensor
    draws: Draws


class ImageTask:
    """Image classification on one device; see :class:`optuna_ohgw.tasks.base.Task`.

    Args:
        spec: The task section of a study.
        data: Pictures and labels, on the device.
        model: Name of the network (a structural parameter may replace the spec's).
        batch_size: Pictures a mini-batch.
    """

    def __init__(self, spec: ImageSpec, data: ImageData, model: str, batch_size: int) -> None:
        self.spec = spec
        self.data = data
        self.model_name = model
        self.batch_size = batch_size
        self.device = data.train_images.device
        self.settings = Augmentation(**spec.augmentation.model_dump())
        self.batches_per_epoch = len(self._batch_bounds())
        self._drawn: tuple[tuple[int, int, int], Tensor, Draws] | None = None
        module = build_model(
            model,
            channels=data.channels,
            size=data.height,
            classes=data.classes,
            activation=spec.activation,
        )
        self._format = torch.channels_last if data.channels > 1 else torch.contiguous_format
        # The first call imports kornia, which must not be charged to a trial.
        self.augment(self.warm_batches(0, 0, 0)(0)[0], torch.tensor(0.0, device=self.device))
        self._network: nn.Module = module.to(  # type: ignore[call-overload]
            device=self.device, memory_format=self._format
        )

    def network(self) -> nn.Module:
        """Return the network to load a state into."""
        return self._network

    def initialize(self, seed: int, config_index: int) -> nn.Module:
        """Return the network with its initial weights (He-normal), the same on every device."""
        initialize(self._network, self.model_name, derive_seed(seed, Purpose.WEIGHTS, config_index))
        return self._network

    def epoch(
        self, seed: int, config_index: int, epoch: int, magnitude: float
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the augmented mini-batches of an epoch: float ``[B, C, H, W]`` and labels ``[B]``."""
        order, draws = self._draws(seed, config_index, epoch)
        order, draws = order.to(self.device), draws.to(self.device)
        bounds = self._batch_bounds()
        pixels = self.data.train_images[0].numel() * self.batch_size
        at_once = max(1, _CHUNK[self.device.type] // pixels)
        for first in range(0, len(bounds), at_once):
            chunk = bounds[first : first + at_once]
            rows = slice(chunk[0][0], chunk[-1][1])
            with torch.no_grad():
                raw = RawImages(self.data.train_images[order[rows]], draws.rows(rows))
                images = self.augment(raw, torch.tensor(magnitude, device=self.device))
                labels = self.data.train_labels[order[rows]]
            for start, stop in chunk:
                part = slice(start - rows.start, stop - rows.start)
                yield images[part], labels[part]

    def training_loss(self, output: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
        """Return the label-smoothed cross-entropy of logits ``[B, C]``."""
        return F.cross_entropy(output, target, label_smoothing=label_smoothing)

    def criterion(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the cross-entropy of logits ``[B, C]``."""
        return F.cross_entropy(output, target)

    def evaluate(self, part: str) -> Evaluation:
        """Return loss and accuracy of the network on the validation or test part."""
        images: Tensor = getattr(self.data, f"{part}_images")
        labels: Tensor = getattr(self.data, f"{part}_labels")
        loss, correct = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        self._network.eval()
        with torch.inference_mode(), autocast(self.device):
            for start in range(0, len(images), _EVALUATION_BATCH):
                rows = slice(start, start + _EVALUATION_BATCH)
                output = self._network(self.prepare(images[rows])).float()
                loss += F.cross_entropy(output, labels[rows], reduction="sum")
                correct += (output.argmax(1) == labels[rows]).sum()
        return Evaluation(float(loss) / len(images), float(correct) / len(images))

    def warm_batches(
        self, seed: int, config_index: int, rung: int
    ) -> Callable[[int], tuple[RawImages, Tensor]]:
        """Return position ↦ training mini-batch of ``batch_size`` distinct pictures, with draws."""
        pool = len(self.data.train_images)

        def batch(position: int) -> tuple[RawImages, Tensor]:
            key = derive_seed(seed, Purpose.WARM_START, config_index, rung, position)
            generator = torch.Generator().manual_seed(key)
            size = min(self.batch_size, pool)
            rows = torch.randperm(pool, generator=generator)[:size].to(self.device)
            draws = draw(self.settings, size, self.data.height, self.data.width, generator)
            raw = RawImages(self.data.train_images[rows], draws.to(self.device))
            return raw, self.data.train_labels[rows]

        return batch

    def augment(self, inputs: RawImages, magnitude: Tensor) -> Tensor:
        """Return augmented, normalised pictures, differentiable in the magnitude."""
        images = augment(inputs.images, magnitude, inputs.draws, self.settings)
        return images.contiguous(memory_format=self._format)

    def prepare(self, inputs: RawImages | Tensor) -> Tensor:
        """Return normalised pictures."""
        images = inputs.images if isinstance(inputs, RawImages) else inputs
        return normalize(images).contiguous(memory_format=self._format)

    def order_digest(self, seed: int, config_index: int) -> str:
        """Return a digest of the first epoch's data order and augmentation draws."""
        order, draws = self._draws(seed, config_index, 0)
        digest = hashlib.sha256()
        for tensor in (order, *draws):
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def _draws(self, seed: int, config_index: int, epoch: int) -> tuple[Tensor, Draws]:
        key = seed, config_index, epoch
        if self._drawn is None or self._drawn[0] != key:  # the first epoch's are asked for twice
            self._drawn = key, *self._draw(*key)
        return self._drawn[1:]

    def _draw(self, seed: int, config_index: int, epoch: int) -> tuple[Tensor, Draws]:
        n = len(self.data.train_images)
        order_seed = derive_seed(seed, Purpose.ORDER, config_index, epoch)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(order_seed))
        generator = torch.Generator().manual_seed(derive_seed(seed, Purpose.AUGMENT, config_index, epoch))
        return order, draw(self.settings, n, self.data.height, self.data.width, generator)

    def _batch_bounds(self) -> list[tuple[int, int]]:
        n = len(self.data.train_images)
        bounds = [(start, min(start + self.batch_size, n)) for start in range(0, n, self.batch_size)]
        # BatchNorm cannot use a mini-batch of one picture.
        return [b for b in bounds if b[1] - b[0] > 1] or bounds


def load_image_arrays(spec: ImageSpec, cache: Path | None) -> ImageArrays:
    """Return the decoded pictures that a task section names."""
    return load_arrays(
        spec.data,
        image_column=spec.image_column,
        label_column=spec.label_column,
        train_images=spec.train_images,
        test_images=spec.test_images,
        size=spec.size,
        channels=spec.channels,
        cache=cache,
    )


def split_images(spec: ImageSpec, arrays: ImageArrays, seed: int, device: torch.device) -> ImageData:
    """Return the training, validation and test parts of a study seed, on the device."""
    return split(
        arrays,
        validation_images=spec.validation_images,
        seed=seed,
        label_noise=spec.label_noise,
        device=device,
    )
