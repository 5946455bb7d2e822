"""What the command prints: tables for a console of 100 columns."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from optuna_ohgw.sampler import HISTORY_FREE

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from rich.console import Console

    from optuna_ohgw.evidence import Evidence
    from optuna_ohgw.report import Page

_CRITERIA = {
    "1": "At least 15% sooner",
    "2": "Final value at most 0.2% worse",
    "3a": "Device time at most 5% more",
    "3b": "Peak memory at most 10% more",
    "4": "Standard deviation at most 10% more",
}
_OUTCOMES = {"pass": "pass", "fail": "fail", "undecided": "?"}


def print_summary(page: Page, console: Console) -> None:
    """Print one row a variation and the sentence on each."""
    from optuna_ohgw.report.blocks import sentences

    evidence = page.evidence
    spec = evidence.records.spec
    pairing = "paired" if spec.sampler in HISTORY_FREE else "seed-paired only"
    title = f"{spec.name}: medians over {len(spec.seeds)} {pairing} seeds"
    shown = _table(title)
    shown.add_column("variation", no_wrap=True)
    for target in evidence.targets:
        star = "*" if target == evidence.pilot else ""
        shown.add_column(f"T@τ{star} (mbu)\nτ{star}={target:.4g}", justify="right", no_wrap=True)
    for name in ("best\nvalid.", "\ntest", "warm\nmbu", "start\nsec.", "\npruned"):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in evidence.table.to_dict("records"):
        failed = f", {row['failed']} failed" if row["failed"] else ""
        shown.add_row(
            row["variation"],
            *(_time(row, target) for target in evidence.targets),
            _number(row["best_val"], ".4f"),
            _number(row["final_test"], ".4f"),
            _number(row["overhead_mbu"], ".1%"),
            _number(row["overhead_s"], ".1%"),
            f"{row['pruned']}/{row['trials']}{failed}",
        )
    console.print(shown)
    console.print(
        "T@τ: mini-batch units until a cell first reaches τ, Kaplan-Meier median (seeds that did / seeds);\n"
        "-: not known, too few did. Warm start: its cost over that of training, in mbu and in seconds."
    )
    if evidence.pilot is not None:
        console.print("τ*: the hardest target that at least 90% of the pilot's seeds reach.")
    for line in ["", *sentences(page), *evidence.missing]:
        console.print(line, highlight=False, markup=False)


def print_comparison(studies: Sequence[Evidence], console: Console) -> None:
    """Print the published criteria of several studies, and in which share of them the first is passed.

    Where a study sweeps η_h, the ratio at the first study's η_h, untuned, stands beside each best one.
    """
    from optuna_ohgw.sensitivity import eta_sensitivity, transfer
    from optuna_ohgw.verdict import across_studies

    for one in studies:
        at = f"τ={one.primary:.4g}" if one.primary is not None else "no target yet"
        shown = _table(f"{one.spec.name}, {at}: T@τ (mbu) over the baseline's, and the published criteria")
        shown.add_column("variation", no_wrap=True)
        for name in ("pairs", "ratio [95%]", "p (Holm)", "time", "value", "device", "memory", "spread"):
            shown.add_column(name, justify="right", no_wrap=True)
        table = one.comparisons
        chosen = table[(table["target"] == one.primary) & (table["budget"] == "mbu")]
        for row in chosen[chosen["kind"] == "baseline"].to_dict("records"):
            own = one.verdicts[one.verdicts["variation"] == row["variation"]]
            outcome = dict(zip(own["criterion"], own["outcome"], strict=True))
            ends = f"[{_number(row['ratio_low'], '.2f')}, {_number(row['ratio_high'], '.2f')}]"
            shown.add_row(
                row["variation"],
                str(row["pairs"]),
                f"{_number(row['ratio'], '.2f')} {ends}",
                _number(row["p_holm"], ".2g") if row["enough"] else "too few",
                *(_OUTCOMES[outcome.get(key, "undecided")] for key in ("1", "2", "3a", "3b", "4")),
            )
        console.print(shown)
        for line in [*one.sentences, *one.missing, ""]:
            console.print(line, highlight=False, markup=False)
    tasks = [one.spec.task for one in studies]
    if any(tasks.count(task) > 1 for task in tasks):
        print_lines(["Some of these are forms of one task: they are not independent studies."], console)
    for key, what in _CRITERIA.items():
        shares = across_studies({one.spec.name: one.verdicts for one in studies}, key)
        lines = [
            f"  {r['variation']}: passed in {r['passed']} of {r['studies']} studies, "
            f"{r['undecided']} undecided; {r['outcome']}"
            for r in shares.to_dict("records")
        ]
        print_lines([f"{what} (asked in 75% of the studies):", *lines], console)
    eta = studies[0].spec.warm_start.eta_h
    sweeps = {
        one.spec.name: eta_sensitivity(
            one.times, one.primary, one.spec.warm_start.eta_h, base=f"{one.spec.scheduler.name}-ohgw-1step"
        )
        for one in studies
    }
    if any(sweep.points["eta_h"].nunique() > 1 for sweep in sweeps.values()):
        print_lines(["", f"ohgw-1step at an untuned η_h of {eta:g}, beside the best of each sweep:"], console)
        for r in transfer(sweeps, eta).to_dict("records"):
            ends = f"[{_number(r['low'], '.2f')}, {_number(r['high'], '.2f')}]"
            best = f"best {_number(r['best_ratio'], '.2f')} at {r['best_eta'] or math.nan:g}"
            print_lines([f"  {r['study']}: ratio {_number(r['ratio'], '.2f')} {ends}; {best}"], console)


def print_lines(lines: Sequence[str], console: Console) -> None:
    """Print lines as they are, passwords in URLs hidden."""
    from optuna_ohgw.reading import hide_passwords

    for line in lines:
        console.print(hide_passwords(line), highlight=False, markup=False, soft_wrap=True)


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)


def _time(row: dict[Any, Any], target: float) -> str:
    return f"{_number(row[f'T@{target:.6g}_mbu'], ',.0f')} ({row[f'reached@{target:.6g}']}/{row['cells']})"


def _number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "-"


def print_comparison_of_schedulers(runs: pd.DataFrame, workers: int, console: Console) -> None:
    """Print one row a scheduler over tables of learning curves."""
    from optuna_ohgw.replays import comparison

    tables, seeds = runs["table"].nunique(), runs["seed"].nunique()
    shown = _table(f"{tables} tables × {seeds} seeds, {workers} workers")
    shown.add_column("scheduler", no_wrap=True)
    for name in (
        "\nslices",
        "trained\nto the end",
        "selection\nregret",
        "best drawn\nreturned",
        "\nt5",
        "\nt1",
    ):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in comparison(runs).to_dict("records"):
        shown.add_row(
            row["scheduler"],
            f"{row['slices']:,.0f}",
            f"{row['reached_end']:g}",
            f"{row['selection_regret']:.3f}",
            f"{row['best_drawn']:.2f}",
            _number(row["t5"], ",.0f"),
            _number(row["t1"], ",.0f"),
        )
    console.print(shown)
    console.print(
        "Medians over tables and seeds, means of selection regret and best drawn. Slices: units of\n"
        "training. Regret: (final value of what is returned - best) / (median - best), less that of the\n"
        "best drawn. t5, t1: time until a value as good as the best 5% and 1% of the table's final ones.",
        highlight=False,
    )


def print_replays(runs: pd.DataFrame, target: float, workers: int, console: Console) -> None:
    """Print one row a variation and scheduler over the cells of a study."""
    shown = _table(f"Replayed, medians over seeds, {workers} workers")
    for name in ("variation", "scheduler"):
        shown.add_column(f"\n{name}", no_wrap=True)
    for name in ("\nepochs", "trained\nto the end", "\nbest", f"epochs to\n{target:.4g}", "asked\nbeyond"):
        shown.add_column(name, justify="right", no_wrap=True)
    for (variation, scheduler), own in runs.groupby(["variation", "scheduler"], sort=False):
        reached = own["time_to_target"][own["time_to_target"] < math.inf]
        time = f"{own['time_to_target'].median():,.0f}" if 2 * len(reached) > len(own) else "-"
        shown.add_row(
            str(variation),
            str(scheduler),
            f"{own['slices'].median():,.0f}",
            f"{own['reached_end'].median():g}",
            _number(own["best"].median(), ".4f"),
            f"{time} ({len(reached)}/{len(own)})",
            f"{own['beyond'].sum()}/{own['configs'].sum()}",
        )
    console.print(shown)
    console.print(
        "From recorded learning curves, no training. Asked beyond: configurations that the scheduler\n"
        "would have trained further than the study did; it got no more of them, so its epochs are too\n"
        "few and its best may be short of it. A study with scheduler.min_resource = task.epochs knows all;\n"
        "then give the rungs to ask for by --min-resource.",
        highlight=False,
    )
