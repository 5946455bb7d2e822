"""What a warm start costs against a training step."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from optuna_ohgw.bench.cases import PSI, SPACE, resnet20
from optuna_ohgw.bench.clock import Spread, interleaved, machine, ratios, use
from optuna_ohgw.device import resolve_device
from optuna_ohgw.hypergrad import exact, lean
from optuna_ohgw.steps import captured_bytes, step_for
from optuna_ohgw.tasks.image import ImageTask
from optuna_ohgw.training import TrainState, load, state_loss, train_epoch

EPOCH_BATCHES = 352
_BATCHES = {"cpu": 5, "cuda": EPOCH_BATCHES}  # of the epoch that a step is a part of
_STEP = "training step"


def warm_start(console: Console, device_name: str, repeats: int) -> None:
    """Print the cost of a horizon-1 warm start of five ψ on ResNet-20 against a training step."""
    device = resolve_device(device_name)
    use(device)
    batches = _BATCHES[device.type]
    case = resnet20(batches)
    task = case.task(device)
    state = case.state(task)
    loss, z = state_loss(task, state, 0, 1), SPACE.to_search(PSI)
    forms: dict[str, Callable[[], Any]] = {
        "lean warm start": lambda: lean(loss, SPACE, z),
        "exact warm start": lambda: exact(loss, SPACE, z),
    }
    states = case.states(task)
    times = interleaved({_STEP: lambda: train_epoch(task, next(states)), **forms}, device, repeats)
    times[_STEP] = [seconds / batches for seconds in times[_STEP]]
    memory = {name: _peak_bytes(call, device) for name, call in forms.items()}
    step = _training_step(task, state)
    step()  # what is allocated once a process is no part of it
    memory[_STEP] = _peak_bytes(step, device)
    # A captured step's memory is a pool of its own, which the allocator's peak leaves out.
    memory[_STEP] += captured_bytes(task.network())
    table = Table(title="Horizon 1, five ψ, ResNet-20, batch 128", box=box.SIMPLE_HEAD, title_justify="left")
    for heading in ("", "ms", "steps", f"of {EPOCH_BATCHES} batches", "peak MB", "of a step's"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, values in times.items():
        steps = Spread.of(ratios(values, times[_STEP]))
        table.add_row(
            name,
            f"{1e3 * statistics.median(values):.1f}",
            steps.text(),
            f"{steps.median / EPOCH_BATCHES:.2%}",
            f"{memory[name] / 1e6:.0f}",
            f"{memory[name] / memory[_STEP]:.2f}",
        )
    console.print(table)
    console.print(machine(device, repeats))
    console.print(
        f"Training step: an epoch of {batches} mini-batches, as a trial trains it, over {batches}.\n"
        "Steps: median (range) of the ratio to the step of the same round. Peak: bytes allocated by torch\n"
        "during the call, above those held before it; of the step, of one mini-batch alone.\n"
        f"Bars, on an H200: at most 1% of {EPOCH_BATCHES} batches, 1.10 of a step's peak.",
        highlight=False,
    )


def _training_step(task: ImageTask, state: TrainState) -> Callable[[], None]:
    """Return one mini-batch's augmentation and the step that training takes: captured on a GPU."""
    network = load(task, state)
    train = step_for(task, network, PSI, state.velocity, {})
    raw, target = task.warm_batches(0, 0, 0)(0)
    magnitude = torch.tensor(PSI["magnitude"], device=task.device)

    def step() -> None:
        with torch.no_grad():
            inputs = task.augment(raw, magnitude)
        train(inputs, target, PSI["lr"])

    return step


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
