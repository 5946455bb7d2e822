"""The same training the plain PyTorch way, and the network's bare forward and backward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optuna_ohgw.bench.cases import PSI
from optuna_ohgw.tasks.image import ImageTask
from optuna_ohgw.tasks.models import build_model
from optuna_ohgw.tasks.precision import autocast
from optuna_ohgw.training import TrainState


def plain_epoch(
    task: ImageTask, state: TrainState, workers: int, *, evaluation: bool = False
) -> Callable[[], None]:
    """Return an epoch with torchvision's transforms an image, a DataLoader and plain SGD.

    With ``evaluation`` it ends with the validation accuracy, by a DataLoader too. Its network, in the
    contiguous memory format, and its random stream are its own.
    """
    from torch.utils.data import DataLoader
    from torchvision.transforms import v2

    size, settings = task.data.height, task.settings
    erased = (settings.cutout / size) ** 2
    scaled = [v2.ToDtype(torch.float32, scale=True), _ZScore()]
    transforms = v2.Compose(
        [
            v2.ToPILImage(),
            v2.RandomCrop(size, padding=settings.crop_padding),
            *([v2.RandomHorizontalFlip()] if settings.flip else []),
            v2.RandAugment(num_ops=settings.operations, magnitude=int(3 * PSI["magnitude"])),
            v2.PILToTensor(),
            *scaled,
            v2.RandomErasing(p=1.0, scale=(erased, erased), ratio=(1.0, 1.0)),
        ]
    )
    pictures = _Pictures(task.data.train_images.cpu(), task.data.train_labels.cpu(), transforms)
    held_out = _Pictures(
        task.data.validation_images.cpu(), task.data.validation_labels.cpu(), v2.Compose(scaled)
    )
    loader = DataLoader(
        pictures,
        batch_size=task.batch_size,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=task.device.type == "cuda",
        generator=torch.Generator().manual_seed(0),
    )
    validation = DataLoader(
        held_out,
        batch_size=1000,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=task.device.type == "cuda",
    )
    network = own_network(task, state)
    optimizer = sgd(network, fused=False)

    def epoch() -> None:
        network.train()
        for inputs, target in loader:
            optimizer.zero_grad()
            with autocast(task.device):
                output = network(inputs.to(task.device, non_blocking=True))
                loss = F.cross_entropy(
                    output, target.to(task.device, non_blocking=True), label_smoothing=PSI["label_smoothing"]
                )
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        if evaluation:
            evaluate()

    def evaluate() -> float:
        correct = torch.zeros((), device=task.device)
        network.eval()
        with torch.inference_mode(), autocast(task.device):
            for inputs, target in validation:
                output = network(inputs.to(task.device, non_blocking=True))
                correct += (output.argmax(1) == target.to(task.device, non_blocking=True)).sum()
        return float(correct) / len(held_out)

    return epoch


def bare_epoch(task: ImageTask, state: TrainState, memory_format: torch.memory_format) -> Callable[[], None]:
    """Return the forward and backward passes of an epoch in float32, on one and the same mini-batch.

    No data, no augmentation, no autocast, no optimizer; as many pictures as in an epoch.
    """
    network = own_network(task, state).to(memory_format=memory_format)
    raw, target = task.warm_batches(0, 0, 0)(0)
    inputs = task.prepare(raw).contiguous(memory_format=memory_format)
    whole, left = divmod(len(task.data.train_images), len(inputs))
    sizes = [len(inputs)] * whole + [left] * (left > 1)

    def epoch() -> None:
        for size in sizes:
            network.zero_grad()
            F.cross_entropy(network(inputs[:size]), target[:size]).backward()  # type: ignore[no-untyped-call]

    return epoch


def own_network(task: ImageTask, state: TrainState) -> nn.Module:
    """Return a second network of the task's kind, contiguous, in training mode, holding the state."""
    data = task.data
    network = build_model(
        task.model_name,
        channels=data.channels,
        size=data.height,
        classes=data.classes,
        activation=task.spec.activation,
    )
    network.load_state_dict({**state.weights, **state.buffers}, strict=True)
    return network.to(task.device).train()


def sgd(network: nn.Module, *, fused: bool) -> torch.optim.SGD:
    """Return SGD at the benchmark's hyper-parameters; not fused is torch's default."""
    lr, momentum, decay = PSI["lr"], PSI["momentum"], PSI["weight_decay"]
    return torch.optim.SGD(
        network.parameters(), lr=lr, momentum=momentum, weight_decay=decay, fused=fused or None
    )


class _ZScore(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return (image - image.mean()) / (image.std() + 1e-6)


class _Pictures(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, images: Tensor, labels: Tensor, transforms: Callable[[Tensor], Tensor]) -> None:
        self.images, self.labels, self.transforms = images, labels, transforms

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.transforms(self.images[index]), self.labels[index]
