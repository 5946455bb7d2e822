"""What training costs on this machine: one trial, its parts, and several at once."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import optuna
import torch
from rich.console import Console

from optuna_ohgw.bench.at_once import Job, Measured, Processes
from optuna_ohgw.bench.bound import bound, matrix_rate, matrix_type
from optuna_ohgw.bench.cases import DIGITS, Case, resnet20
from optuna_ohgw.bench.clock import cores, fastest, interleaved, machine, ratios, use
from optuna_ohgw.bench.extrapolated import CELL_EPOCHS, Trials, halved
from optuna_ohgw.bench.parts import timed_parts
from optuna_ohgw.bench.plain import bare_epoch, plain_epoch
from optuna_ohgw.bench.train_tables import (
    EVALUATION,
    OURS,
    OneTrial,
    hourly_rates,
    print_against,
    print_at_once,
    print_bound,
    print_parts,
    print_study,
)
from optuna_ohgw.device import resolve_device
from optuna_ohgw.mps import shared_gpu
from optuna_ohgw.training import train_epoch

_BATCHES = {"cpu": 5, "cuda": 88}  # ResNet-20's epoch here, of the 352 of CIFAR-10
_COUNTS = {"cpu": (1, 2, 4), "cuda": (1, 2, 4, 8)}
_FUSED = 8
_STUDIED = 8  # trials at once of studies/cifar10_day.yaml
# A process a job: this loop's epochs, the plain way's.
_EPOCHS = {"cpu": (20, 2), "cuda": (4, 1)}


def train(console: Console, device_name: str, repeats: int) -> None:
    """Print what one trial and several at once cost, against the hardware and plain PyTorch."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    device = resolve_device(device_name)
    use(device)
    kind = device.type
    rate = matrix_rate(device)
    cases = {
        DIGITS: halved(epochs=27, min_resource=3, reduction_factor=3, budget_trials=16),
        resnet20(_BATCHES[kind]): halved(budget_epochs=CELL_EPOCHS),
    }
    measured = [one_trial(case, trials, device, repeats, rate) for case, trials in cases.items()]
    at_once = DIGITS if kind == "cpu" else resnet20(_BATCHES[kind])
    jobs = _jobs(kind)
    jobs, rounds = _at_once(at_once, device, jobs, repeats)
    scale = at_once.scale(at_once.task(device))
    print_bound(console, measured)
    console.print()
    print_against(console, measured, on_gpu=kind == "cuda")
    console.print()
    print_parts(console, measured)
    console.print()
    print_at_once(console, at_once, scale, jobs, rounds, on_gpu=kind == "cuda")
    console.print()
    gain = 1.0
    if kind == "cuda":
        hourly = hourly_rates(at_once, scale, jobs, rounds)
        as_studied = [(j.mps, v) for j, v in zip(jobs, hourly, strict=True) if _is_as_studied(j)]
        gain = statistics.median(ratios(max(as_studied, key=lambda found: found[0])[1], hourly[0]))
    print_study(console, measured[1], gain)
    console.print()
    product = str(matrix_type(device)).removeprefix("torch.")
    console.print(f"Matrix product: {rate / 1e9:,.0f} GFLOP/s in {product}.", highlight=False)
    console.print(machine(device, repeats))
    console.print(
        "Ratios and shares: median (range) of what was measured in the same round.", highlight=False
    )


def one_trial(case: Case, trials: Trials, device: torch.device, repeats: int, rate: float) -> OneTrial:
    """Measure a case, all forms of an epoch in turns."""
    torch.set_num_threads(case.threads or cores())
    task = case.task(device)
    state = case.state(task)
    formats = {"channels last": torch.channels_last} if task.data.channels > 1 else {}
    bare = {"contiguous": torch.contiguous_format, **formats}
    workers, states = _loader_workers(device.type), case.states(task)
    forms: dict[str, Callable[[], Any]] = {
        OURS: lambda: train_epoch(task, next(states)),
        EVALUATION: lambda: task.evaluate("validation"),
    }
    forms |= {str(n): plain_epoch(task, state, n, evaluation=True) for n in workers}
    forms |= {name: bare_epoch(task, state, form) for name, form in bare.items()}
    times = interleaved(forms, device, repeats, unmeasured=1)
    return OneTrial(
        case,
        trials,
        pictures=len(task.data.train_images),
        scale=case.scale(task),
        times=times,
        plain=fastest({str(n): times[str(n)] for n in workers}),
        bare=fastest({name: times[name] for name in bare}),
        bound=bound(task, state, rate),
        parts=timed_parts(task, case.states(task), repeats=repeats, epochs=round(trials.epochs)),
    )


def _loader_workers(kind: str) -> tuple[int, ...]:
    """Return the numbers of DataLoader workers that the plain way tries."""
    return (0, 2) if kind == "cpu" else tuple(sorted({4, 8, cores()}))


def _jobs(kind: str) -> list[Job]:
    """Return this loop's jobs, one trial first, then the plain way's two."""
    own, plain = _EPOCHS[kind]
    # A GPU's trials share the cores for their loaders; a CPU's do without when each has a core.
    most = min(cores(), max(_COUNTS[kind]))
    count = max(n for n in _COUNTS[kind] if n <= most)
    workers = (cores(), cores() // count) if kind == "cuda" else (2, 0)
    jobs = [Job(n, own) for n in _COUNTS[kind]]
    jobs += [Job(n, own, mps=True) for n in _COUNTS[kind][1:] if kind == "cuda"]
    jobs += [Job(n, max(1, own // _FUSED), fused=_FUSED) for n in (1, min(cores(), 2))]
    return [*jobs, Job(1, plain, workers[0]), Job(count, plain, workers[1])]


def _is_as_studied(job: Job) -> bool:
    """Return whether a job runs as many trials at once as the study on a GPU does."""
    return job.workers is None and job.fused == 1 and job.processes == _STUDIED


def _at_once(
    case: Case, device: torch.device, jobs: Sequence[Job], repeats: int
) -> tuple[list[Job], list[list[Measured]]]:
    """Return the jobs that can be done here and the measurements of each, the first for its memory alone."""
    counts = _COUNTS[device.type]
    with contextlib.ExitStack() as stack:
        processes = {False: stack.enter_context(Processes(case, device, counts))}
        if device.type == "cuda" and stack.enter_context(shared_gpu()):
            processes[True] = stack.enter_context(Processes(case, device, counts))
        here = [job for job in jobs if job.mps in processes]
        rounds = [[processes[job.mps].run(job) for job in here] for _ in range(repeats + 1)]
    return here, [list(column) for column in zip(*rounds, strict=True)]
