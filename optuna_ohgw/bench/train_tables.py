"""What ``bench train`` prints of its measurements."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table

from optuna_ohgw.bench.at_once import Job, Measured, trials_per_hour
from optuna_ohgw.bench.bound import Bound
from optuna_ohgw.bench.cases import DIGITS, Case
from optuna_ohgw.bench.clock import Spread, cores, ratios
from optuna_ohgw.bench.extrapolated import AROUND_SECONDS, CELL_EPOCHS, STUDY_PARTS, Trials, device_hours
from optuna_ohgw.bench.parts import PARTS, WARM_START, full_epoch, shares

OURS, EVALUATION = "ours", "evaluation"
_WARM_STARTS = next(iter(STUDY_PARTS.values())).warm_starts


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
        return [a + b for a, b in zip(self.times[OURS], self.times[EVALUATION], strict=True)]


def print_bound(console: Console, measured: Sequence[OneTrial]) -> None:
    """Print what one trial takes beside the hardware's bound."""
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
        seconds = statistics.median(one.times[OURS])
        table.add_row(
            one.case.name,
            str(one.case.threads or cores()),
            f"{one.pictures / seconds:,.0f}",
            f"{seconds:.3g}",
            f"{statistics.median(one.evaluated):.3g}",
            f"{statistics.median(one.evaluated) * one.scale:.3g}" if one.case.full else "",
            f"{one.bound.seconds:.2g}",
            one.bound.limit,
            Spread.of([one.bound.seconds / s for s in one.times[OURS]]).text(".0%"),
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


def print_against(console: Console, measured: Sequence[OneTrial], *, on_gpu: bool) -> None:
    """Print one trial beside plain PyTorch and a bare network."""
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
        own, plain, bare = (one.times[name] for name in (OURS, one.plain, one.bare))
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


def print_parts(console: Console, measured: Sequence[OneTrial]) -> None:
    """Print the shares of an epoch."""
    table = _table("Share of an epoch's time", "", *(one.case.name for one in measured))
    columns = []
    for one in measured:
        epochs = [
            full_epoch(s, scale=one.scale, epochs=one.trials.epochs, warm_starts=_WARM_STARTS)
            for s in one.parts
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
        "the captured step that trains there. ResNet-20: parts that grow with the number of pictures\n"
        f"scaled to 45,000. Warm start: {_WARM_STARTS:g} a trial, the mean of the four variations, lean,\n"
        f"horizon 1, five ψ ({whole} each), and storage, one trial's in SQLite, both\n"
        f"spread over the mean trial of the study, simulated under its halving: {lengths} epochs.",
        highlight=False,
    )


def print_at_once(
    console: Console,
    case: Case,
    scale: float,
    jobs: Sequence[Job],
    rounds: Sequence[Sequence[Measured]],
    *,
    on_gpu: bool,
) -> None:
    """Print several trials at once."""
    hourly = hourly_rates(case, scale, jobs, rounds)
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
        + (
            "Bar, on an H200: several at least 4 times one."
            if on_gpu
            else "Bar: digits on 2 cores, this loop's best at least 6 times the best plain way."
        ),
        highlight=False,
    )


def print_study(console: Console, one: OneTrial, at_once: float) -> None:
    """Print the CIFAR-10 study, extrapolated."""
    warm = statistics.median([s[WARM_START] for s in one.parts])
    hours = device_hours([s * one.scale for s in one.evaluated], warm, at_once)
    table = _table("The CIFAR-10 study here, extrapolated", "", "device-hours")
    for name, spread in hours.items():
        table.add_row(name, spread.text(",.1f"))
    console.print(table)
    console.print(
        "Not run: seconds of a ResNet-20 epoch of 45,000 pictures above, evaluated, a cell of\n"
        f"{CELL_EPOCHS:,} epochs (880,000 mini-batches), divided by {at_once:.2f}, the gain of as\n"
        "many trials at once as studies/cifar10_day.yaml has (on a CPU, of one), training alone.\n"
        f"A trial trains {one.trials.epochs:.2f} epochs in the mean, by simulation of the study's halving,\n"
        f"and costs beside them {1e3 * AROUND_SECONDS:.0f} ms (bench run, 2 cores) and its warm starts, of "
        f"{1e3 * warm:.0f} ms each:\nbaseline 0, random and one step 1, three steps 3. Each study has the "
        "budget of the first, which\nthose beside get by --set.\n"
        "Bar: the search at most 24 hours of one H200.",
        highlight=False,
    )


def hourly_rates(
    case: Case, scale: float, jobs: Sequence[Job], rounds: Sequence[Sequence[Measured]]
) -> list[list[float]]:
    """Return the trials an hour, job by job."""
    return [
        [trials_per_hour(job, m.seconds, scale=scale, trial_epochs=case.epochs) for m in column[1:]]
        for job, column in zip(jobs, rounds, strict=True)
    ]


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left", overflow="fold")
    return table
