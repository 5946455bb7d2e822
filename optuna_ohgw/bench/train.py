"""What training costs on this machine: one trial, its parts, and several at once."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from optuna_ohgw.bench.at_once import Job, Measured, Processes, trials_per_hour
from optuna_ohgw.bench.bound import Bound, bound, matrix_rate, matrix_type
from optuna_ohgw.bench.cases import DIGITS, Case, resnet20
from optuna_ohgw.bench.clock import Spread, cores, fastest, interleaved, machine, ratios, use
from optuna_ohgw.bench.extrapolated import AROUND_SECONDS, CELL_EPOCHS, Trials, device_hours, halved
from optuna_ohgw.bench.parts import PARTS, WARM_START, full_epoch, shares, timed_parts
from optuna_ohgw.bench.plain import bare_epoch, plain_epoch
from optuna_ohgw.mps import shared_gpu
from optuna_ohgw.training import train_epoch
from optuna_ohgw.worker import resolve_device

_OURS, _EVALUATION = "ours", "evaluation"
_BATCHES = {"cpu": 5, "cuda": 88}  # ResNet-20's epoch here, of the 352 of CIFAR-10
_COUNTS = {"cpu": (1, 2, 4), "cuda": (1, 2, 4, 8)}
_FUSED = 8
# A process a job: this loop's epochs, the plain way's.
_EPOCHS = {"cpu": (20, 2), "cuda": (4, 1)}


@dataclass(frozen=True)
class OneTrial:
    """What was measured of one case: seconds an epoch by form, the bound, seconds by part.

    ``trials`` is the mean trial of its study.
    """

    case: Case
    trials: Trials
    pictures: int
    scale: float
    times: dict[str, list[float]]
    plain: str
    bare: str
    bound: Bound
    parts: list[dict[str, float]]

    @property
    def evaluated(self) -> list[float]:
        """Seconds of an epoch with the evaluation after it."""
        return [a + b for a, b in zip(self.times[_OURS], self.times[_EVALUATION], strict=True)]


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
    _print_bound(console, measured)
    console.print()
    _print_against(console, measured, on_gpu=kind == "cuda")
    console.print()
    _print_parts(console, measured)
    console.print()
    _print_at_once(console, at_once, scale, jobs, rounds, on_gpu=kind == "cuda")
    console.print()
    best = 1.0
    if kind == "cuda":
        hourly = _hourly(at_once, scale, jobs, rounds)
        own = [v for job, v in zip(jobs, hourly, strict=True) if job.workers is None and job.fused == 1]
        best = max(statistics.median(ratios(values, hourly[0])) for values in own)
    _print_study(console, measured[1], best)
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
        _OURS: lambda: train_epoch(task, next(states)),
        _EVALUATION: lambda: task.evaluate("validation"),
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


def _print_bound(console: Console, measured: Sequence[OneTrial]) -> None:
    table = _table(
        "One trial",
        "",
        "threads",
        "images/s",
        "s/epoch",
        "s, eval. too",
        "s/45,000 images, same",
        "bound, s/epoch",
        "by",
        "of the bound",
    )
    for one in measured:
        seconds = statistics.median(one.times[_OURS])
        table.add_row(
            one.case.name,
            str(one.case.threads or cores()),
            f"{one.pictures / seconds:,.0f}",
            f"{seconds:.3g}",
            f"{statistics.median(one.evaluated):.3g}",
            f"{statistics.median(one.evaluated) * one.scale:.3g}" if one.case.full else "",
            f"{one.bound.seconds:.2g}",
            one.bound.limit,
            Spread.of([one.bound.seconds / s for s in one.times[_OURS]]).text(".0%"),
        )
    console.print(table)
    sizes = ", ".join(f"{one.pictures:,}" for one in measured)
    rates = ", ".join(f"{one.bound.bandwidth / 1e9:.0f}" for one in measured)
    work = ", ".join(
        f"{one.bound.flops / 1e9:.3g} GFLOP and {one.bound.traffic / 1e9:.2g} GB" for one in measured
    )
    console.print(
        f"An epoch here: {sizes} pictures, augmentation included; 45,000 by proportion. Bound: the\n"
        "longer of FLOPs / matrix rate (below) and bytes / copy bandwidth, where an epoch here takes\n"
        f"{work}; bandwidth {rates} GB/s.\n"
        "Bytes, a low estimate: weights four times, gradients and momentum twice a step, and what the\n"
        "forward pass keeps for the backward pass three times (written, read forward, read backward).\n"
        "Bandwidth: the faster of a copy of a step's working set, in cache or not, and of 256 MB.",
        highlight=False,
    )


def _print_against(console: Console, measured: Sequence[OneTrial], *, on_gpu: bool) -> None:
    bars = {measured[1].case.name: "≥ 8" if on_gpu else "≥ 1.25", DIGITS.name: ""}
    table = _table(
        "Against plain PyTorch and a bare network, s/epoch",
        "",
        "this loop",
        "plain",
        "workers",
        "plain / this loop",
        "bar",
        "bare",
        "of the bare rate",
    )
    for one in measured:
        own, plain, bare = (one.times[name] for name in (_OURS, one.plain, one.bare))
        whole = one.evaluated
        table.add_row(
            one.case.name,
            *(f"{statistics.median(whole):.3g}", f"{statistics.median(plain):.3g}", one.plain),
            Spread.of(ratios(plain, whole)).text(),
            bars[one.case.name],
            f"{statistics.median(bare):.3g}",
            Spread.of(ratios(bare, own)).text(".0%"),
        )
    console.print(table)
    if on_gpu:
        seconds = Spread.of([s * measured[1].scale for s in measured[1].evaluated]).text()
        console.print(
            f"Epoch of 45,000 with evaluation: {seconds} s. Bar: at most 1.0 s on an H200.", highlight=False
        )
    console.print(
        "This loop and plain: an epoch with augmentation, then the validation part. Plain:\n"
        "torchvision.transforms.v2 an image (crop, flip where the study flips, RandAugment, Cutout) under\n"
        "a DataLoader, the fastest number of workers, contiguous memory format, SGD not fused, the same\n"
        "autocast. Bare: forward and backward alone, float32, one mini-batch over and over, the faster\n"
        "memory format "
        f"({', '.join(one.bare for one in measured)}), against training without evaluation. Bar: 70%.",
        highlight=False,
    )


def _print_parts(console: Console, measured: Sequence[OneTrial]) -> None:
    table = _table("Share of an epoch's time", "", *(one.case.name for one in measured))
    columns = []
    for one in measured:
        epochs = [
            full_epoch(s, scale=one.scale, epochs=one.trials.epochs, warm_starts=1.0) for s in one.parts
        ]
        columns.append([shares(epoch) for epoch in epochs])
    for name in PARTS:
        table.add_row(name, *(Spread.of([s[name] for s in column]).text(".1%") for column in columns))
    console.print(table)
    whole = " and ".join(
        f"{1e3 * statistics.median([s[WARM_START] for s in one.parts]):.0f} ms" for one in measured
    )
    lengths = " and ".join(f"{one.trials.epochs:.1f}" for one in measured)
    console.print(
        "The same loop, eager on a GPU too, with a clock (there a wait) between its parts, so slower than\n"
        "the captured step that trains there. ResNet-20: parts that grow with\n"
        "the number of pictures scaled to 45,000. Warm start: one a trial, lean, horizon 1, five ψ\n"
        f"({whole}), the mean of the four variations, and storage, one trial's in SQLite, both\n"
        f"spread over the mean trial of the study, simulated under its halving: {lengths} epochs.",
        highlight=False,
    )


def _print_at_once(
    console: Console,
    case: Case,
    scale: float,
    jobs: Sequence[Job],
    rounds: Sequence[Sequence[Measured]],
    *,
    on_gpu: bool,
) -> None:
    hourly = _hourly(case, scale, jobs, rounds)
    plain = [values for job, values in zip(jobs, hourly, strict=True) if job.workers is not None]
    best_plain = max(plain, key=statistics.median)
    table = _table(
        f"Trials at once, {case.name}",
        *("", "processes", "threads", "trials/hour", "to one", "to the best plain", "MB a trial"),
    )
    for job, values, column in zip(jobs, hourly, rounds, strict=True):
        own = job.workers is None
        table.add_row(
            job.label,
            *(str(job.processes), str(job.threads), f"{statistics.median(values):,.0f}"),
            Spread.of(ratios(values, hourly[0])).text() if own else "",
            Spread.of(ratios(values, best_plain)).text(),
            f"{max(column[0].memory) / job.fused / 1e6:,.0f}" if own else "",
        )
    console.print(table)
    memory = (
        "allocated by torch on the GPU" if on_gpu else "resident in a process at its peak, libraries included"
    )
    own_epochs, plain_epochs = jobs[0].epochs, jobs[-1].epochs
    console.print(
        f"A trial: {case.epochs} epochs of training alone, extrapolated from {own_epochs} epochs a process "
        f"({plain_epochs} the plain way),\n"
        f"from the first start behind a barrier to the last end. Fused: as one batched network under\n"
        f"torch.func.vmap. Memory: {memory}.\n"
        "Bar: digits on 2 cores, this loop's best at least 6 times the best plain way.",
        highlight=False,
    )


def _hourly(
    case: Case, scale: float, jobs: Sequence[Job], rounds: Sequence[Sequence[Measured]]
) -> list[list[float]]:
    """Return the trials an hour, job by job."""
    return [
        [trials_per_hour(job, m.seconds, scale=scale, trial_epochs=case.epochs) for m in column[1:]]
        for job, column in zip(jobs, rounds, strict=True)
    ]


def _print_study(console: Console, one: OneTrial, at_once: float) -> None:
    warm = statistics.median([s[WARM_START] for s in one.parts])
    hours = device_hours([s * one.scale for s in one.evaluated], warm, at_once)
    table = _table("The CIFAR-10 study here, extrapolated", "", "device-hours")
    for name, spread in hours.items():
        table.add_row(name, spread.text(",.1f"))
    console.print(table)
    console.print(
        "Not run: seconds of a ResNet-20 epoch of 45,000 pictures above, evaluated, a cell of\n"
        f"{CELL_EPOCHS:,} epochs (880,000 mini-batches), divided by {at_once:.2f}, the gain of the best\n"
        "number of trials at once.\n"
        f"A trial trains {one.trials.epochs:.2f} epochs in the mean, by simulation of the study's halving,\n"
        f"and costs beside them {1e3 * AROUND_SECONDS:.0f} ms (bench run, 2 cores) and its warm starts, of "
        f"{1e3 * warm:.0f} ms each:\nbaseline and random 0, one step 1, three steps 3.\n"
        "Bar: the search at most 24 hours of one H200.",
        highlight=False,
    )


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left", overflow="fold")
    return table
