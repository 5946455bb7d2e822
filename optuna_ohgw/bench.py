"""Measurements of this machine, as ratios of one run: what a warm start and an epoch cost."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from optuna.distributions import FloatDistribution
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from optuna_ohgw.hypergrad import exact, lean
from optuna_ohgw.space import SearchSpace
from optuna_ohgw.spec import AugmentationSpec, TaskSpec
from optuna_ohgw.tasks.data import split
from optuna_ohgw.tasks.image import ImageTask, autocast, load_image_arrays
from optuna_ohgw.training import TrainState, initial_state, load, state_loss, train_epoch
from optuna_ohgw.version import __version__
from optuna_ohgw.worker import resolve_device

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
EPOCH_BATCHES = 352


def warm_start(console: Console, device_name: str, repeats: int) -> None:
    """Print the cost of a horizon-1 warm start of five ψ on ResNet-20 against a training step."""
    device = resolve_device(device_name)
    task = _task(device, "resnet20", size=32, channels=3, batch_size=128)
    state = replace(initial_state(task, 0, 0, 200), psi=PSI)
    loss, z = state_loss(task, state, 0, 1), SPACE.to_search(PSI)
    step = _training_step(task, state)
    forms: dict[str, Callable[[], Any]] = {
        "training step": step,
        "lean warm start": lambda: lean(loss, SPACE, z),
        "exact warm start": lambda: exact(loss, SPACE, z),
    }
    times = _interleaved(forms, device, repeats)
    memory = {name: _peak_bytes(call, device) for name, call in forms.items()}
    table = Table(title="Horizon 1, five ψ, ResNet-20, batch 128", box=box.SIMPLE_HEAD, title_justify="left")
    for heading in ("", "ms", "steps", f"of {EPOCH_BATCHES} batches", "peak MB", "of a step's"):
        table.add_column(heading, justify="left" if not heading else "right")
    base = "training step"
    for name, values in times.items():
        ratios = [a / b for a, b in zip(values, times[base], strict=True)]
        ratio = statistics.median(ratios)
        table.add_row(
            name,
            f"{1e3 * statistics.median(values):.1f}",
            f"{ratio:.2f} ({min(ratios):.2f}–{max(ratios):.2f})",
            f"{ratio / EPOCH_BATCHES:.2%}",
            f"{memory[name] / 1e6:.0f}",
            f"{memory[name] / memory[base]:.2f}",
        )
    console.print(table)
    console.print(_machine(device, repeats))
    console.print(
        "Steps: median (range) of the ratio to the training step before it (augmentation, forward,\n"
        "backward, SGD). Peak: bytes allocated by torch during the call, above those held before it.",
        highlight=False,
    )


def train(console: Console, device_name: str, repeats: int) -> None:
    """Print an epoch of the training loop against torchvision's pipeline under a DataLoader."""
    device = resolve_device(device_name)
    table = Table(title="Seconds an epoch, same training", box=box.SIMPLE_HEAD, title_justify="left")
    for heading in ("task", "this loop", "DataLoader", "its workers", "ratio"):
        table.add_column(heading, justify="left" if heading == "task" else "right")
    cases: list[tuple[str, str, int | None, int | None, int]] = [
        ("digits, mlp, batch 32", "mlp", None, None, 32)
    ]
    if device.type == "cuda":
        cases.append(("32×32×3, resnet20, batch 128", "resnet20", 32, 3, 128))
    for title, model, size, channels, batch_size in cases:
        task = _task(device, model, size=size, channels=channels, batch_size=batch_size)
        state = replace(initial_state(task, 0, 0, 200), psi=PSI)
        workers = (0, 2) if device.type == "cpu" else (4, 8)
        forms: dict[str, Callable[[], Any]] = {"ours": lambda s=state, t=task: train_epoch(t, s)}  # type: ignore[misc]
        forms |= {str(n): _plain_epoch(task, state, n) for n in workers}
        times = _interleaved(forms, device, repeats)
        best = min((str(n) for n in workers), key=lambda n: statistics.median(times[n]))
        ratios = [a / b for a, b in zip(times[best], times["ours"], strict=True)]
        table.add_row(
            title,
            f"{statistics.median(times['ours']):.3f}",
            f"{statistics.median(times[best]):.3f}",
            best,
            f"{statistics.median(ratios):.1f} ({min(ratios):.1f}–{max(ratios):.1f})",
        )
    console.print(table)
    console.print(_machine(device, repeats))
    console.print(
        "DataLoader: torchvision.transforms.v2 an image (crop, RandAugment, Cutout), the faster number\n"
        "of workers, which persist. Ratio: median (range) over alternating epochs.",
        highlight=False,
    )


BENCHMARKS: dict[str, Callable[[Console, str, int], None]] = {"warm-start": warm_start, "train": train}


def _task(device: torch.device, model: str, *, size: int | None, channels: Any, batch_size: int) -> ImageTask:
    spec = TaskSpec(
        data="digits",
        model=model,
        epochs=200,
        batch_size=batch_size,
        validation_images=360,
        size=size,
        channels=channels,
        augmentation=AugmentationSpec(flip=False, crop_padding=(size or 8) // 8, cutout=(size or 8) // 2),
    )
    data = split(load_image_arrays(spec, None), validation_images=360, seed=0, device=device)
    return ImageTask(spec, data, model, batch_size)


def _training_step(task: ImageTask, state: TrainState) -> Callable[[], None]:
    network = load(task, state)
    optimizer = _sgd(network, fused=True)
    raw, target = task.warm_batches(0, 0, 0)(0)
    magnitude = torch.tensor(PSI["magnitude"], device=task.device)

    def step() -> None:
        with torch.no_grad():
            inputs = task.augment(raw, magnitude)
        optimizer.zero_grad()
        with autocast(task.device):
            loss = task.training_loss(network(inputs), target, PSI["label_smoothing"])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def _plain_epoch(task: ImageTask, state: TrainState, workers: int) -> Callable[[], None]:
    from torch.utils.data import DataLoader
    from torchvision.transforms import v2

    size, settings = task.data.height, task.settings
    transforms = v2.Compose(
        [
            v2.ToPILImage(),
            v2.RandomCrop(size, padding=settings.crop_padding),
            v2.RandAugment(num_ops=settings.operations, magnitude=int(3 * PSI["magnitude"])),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            _ZScore(),
            v2.RandomErasing(p=1.0, scale=(0.25, 0.25), ratio=(1.0, 1.0)),
        ]
    )
    pictures = _Pictures(task.data.train_images.cpu(), task.data.train_labels.cpu(), transforms)
    loader = DataLoader(
        pictures,
        batch_size=task.batch_size,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=task.device.type == "cuda",
    )
    network = load(task, state)
    optimizer = _sgd(network, fused=False)

    def epoch() -> None:
        for inputs, target in loader:
            optimizer.zero_grad()
            with autocast(task.device):
                output = network(inputs.to(task.device, non_blocking=True))
                loss = F.cross_entropy(
                    output, target.to(task.device, non_blocking=True), label_smoothing=PSI["label_smoothing"]
                )
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    return epoch


def _sgd(network: nn.Module, *, fused: bool) -> torch.optim.SGD:
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


def _interleaved(
    forms: dict[str, Callable[[], Any]], device: torch.device, repeats: int
) -> dict[str, list[float]]:
    """Return seconds a call, each form in turn, after two rounds that do not count."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for round_ in range(repeats + 2):
        for name, call in forms.items():
            _synchronize(device)
            started = time.perf_counter()
            call()
            _synchronize(device)
            if round_ >= 2:
                times[name].append(time.perf_counter() - started)
    return times


def _peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - held
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    return max(_running_total(profile))


def _running_total(profile: Any) -> Iterator[int]:
    total = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        yield total


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _machine(device: torch.device, repeats: int) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu()
    return (
        f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"optuna-ohgw {__version__}, {time.strftime('%Y-%m-%d')}, {repeats} repeats"
    )
