"""The published criteria: what a study's comparisons and costs pass, fail or leave undecided."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from optuna_ohgw.comparison import ALPHA, CONTROLS, comparisons, count, faster, figure, paired
from optuna_ohgw.statistics import Estimate, paired_difference, sd_ratio
from optuna_ohgw.variations import baseline_among, eta_of, scheduler_of, warm_start_of

__all__ = ["CONTROLS", "across_studies", "comparisons", "overall", "verdicts"]

# With five pairs neither the signed-rank test nor the range of the pairs reaches 95%.
FEWEST_PAIRS = 6
SHARE_OF_STUDIES = 0.75
VERDICT_COLUMNS = ["variation", "criterion", "what", "bar", "figure", "low", "high", "n", "outcome", "why"]


def verdicts(
    table: pd.DataFrame,
    cells: pd.DataFrame,
    times: pd.DataFrame,
    target: float | None,
    budget: str = "mbu",
    reference: str | None = None,
    *,
    maximize: bool = True,
) -> pd.DataFrame:
    """Return the published criteria of every variation against the reference.

    Args:
        table: What ``comparisons`` returns.
        cells: What ``metrics.cell_metrics`` returns.
        times: What ``metrics.times`` returns.
        target: The target that the verdict is on; None gives an empty table.
        budget: Unit of T@τ.
        reference: The variation that all others are compared with; None: the baseline.
        maximize: Whether a higher final value is better.

    Returns:
        One row a variation and criterion: ``criterion`` (1, 2, 3a, 3b, 4), ``what`` is asked,
        ``bar``, ``figure`` with its interval ``low`` to ``high`` (all relative to the reference: -0.15
        is 15% less), ``n`` pairs, ``outcome`` (pass, fail or undecided) and ``why``. Criterion 1 has the
        ratio of Kaplan-Meier medians as its figure and the Hodges-Lehmann ratio's interval.
    """
    rows, worse = [], -0.002 if maximize else 0.002
    chosen = table[(table["target"] == target) & (table["budget"] == budget) & (table["kind"] == "baseline")]
    at_target = times[times["target"] == target]
    reference = reference or baseline_among(times["variation"])
    for comparison in chosen.to_dict("records"):
        variation = comparison["variation"]
        pair = at_target, variation, reference
        rows += [
            {"variation": variation} | row
            for row in (
                _time_criterion(comparison),
                _cost_criterion(cells, variation, reference, "2", "final test value", "final_test", worse),
                _cost_criterion(
                    cells, variation, reference, "3a", "device time an epoch", "device_s_per_epoch", 0.05
                ),
                _memory_criterion(cells, variation, reference),
                _spread_criterion(*pair, budget),
            )
        ]
    return pd.DataFrame(rows, columns=VERDICT_COLUMNS)


def across_studies(studies: Mapping[str, pd.DataFrame], criterion: str = "1") -> pd.DataFrame:
    """Return in which share of several studies a variation passes a criterion, against the bar of 75%.

    Args:
        studies: What ``verdicts`` returns, by study.
        criterion: The criterion asked about.

    Returns:
        One row a variation: numbers of ``studies`` that ran it, ``passed``, ``failed`` and ``undecided``;
        ``share`` passed; ``bar``; ``outcome``: undecided while the undecided ones could change it.
    """
    parts = [v.assign(study=name) for name, v in studies.items()]
    columns = ["variation", "studies", "passed", "failed", "undecided", "share", "bar", "outcome"]
    if not parts:
        return pd.DataFrame(columns=columns)
    every = pd.concat(parts, ignore_index=True)
    rows = []
    for variation, own in every[every["criterion"] == criterion].groupby("variation", sort=False):
        ran = len(own)
        passed, failed, undecided = (int((own["outcome"] == o).sum()) for o in ("pass", "fail", "undecided"))
        outcome = "undecided"
        if passed >= SHARE_OF_STUDIES * ran:
            outcome = "pass"
        elif passed + undecided < SHARE_OF_STUDIES * ran:
            outcome = "fail"
        share = passed / ran
        rows.append((variation, ran, passed, failed, undecided, share, SHARE_OF_STUDIES, outcome))
    return pd.DataFrame(rows, columns=columns)


def overall(
    table: pd.DataFrame, criteria: pd.DataFrame, target: float | None, budget: str = "mbu"
) -> list[str]:
    """Return one sentence a variation, with its gradient-free control's figure beside.

    Args:
        table: What ``comparisons`` returns.
        criteria: What ``verdicts`` returns.
        target: The target that the verdict is on.
        budget: Unit of T@τ.
    """
    chosen = table[(table["target"] == target) & (table["budget"] == budget)]
    baseline = {r["variation"]: r for r in chosen[chosen["kind"] == "baseline"].to_dict("records")}
    controls = chosen[chosen["kind"] == "control"]
    sentences = []
    for variation, row in baseline.items():
        own = criteria[criteria["variation"] == variation]
        outcomes = dict(zip(own["criterion"], own["outcome"], strict=True))
        decided = set(outcomes.values()) != {"undecided"}
        parts = [f"{variation}, T@{target:.4g}: {row['says']}", _outcomes(outcomes) if decided else ""]
        mine = controls[controls["variation"] == variation].to_dict("records")
        if warm_start_of(variation) in CONTROLS:
            parts += _beside(mine, baseline, passed=outcomes.get("1") == "pass")
        sentences.append("; ".join(filter(None, parts)) + ".")
    return sentences


def _criterion(
    key: str, what: str, bar: float, estimate: Estimate, n: int, outcome: str, why: str
) -> dict[str, object]:
    ends = {"figure": estimate.value, "low": estimate.low, "high": estimate.high}
    return {"criterion": key, "what": what, "bar": bar, **ends, "n": n, "outcome": outcome, "why": why}


def _time_criterion(row: Mapping[Any, Any]) -> dict[str, object]:
    """Return criterion 1: passes by the medians and p, fails by the interval of the ratio."""
    bar, median, other = -0.15, row["km_median"], row["km_median_reference"]
    # A median that was not reached is above the horizon, to which every cell was observed.
    at_most = math.isinf(other) and math.isfinite(median)
    change = median / (row["horizon"] if at_most else other) - 1 if math.isfinite(median) else math.nan
    estimate = Estimate(change, row["ratio_low"] - 1, row["ratio_high"] - 1)
    n, lower = int(row["pairs"]), f"{'more than ' * at_most}{-change:.1%}"
    shown = row["p_holm"] < ALPHA and faster(row)
    outcome = "undecided"
    above = row["ratio_low"] > 1 + bar
    if n >= FEWEST_PAIRS and row["tied"] == n:
        above = True
    if change <= bar and shown:
        outcome = "pass"
        why = f"the median is {lower} lower, p = {row['p_holm']:.2g} after Holm"
    elif n < FEWEST_PAIRS or (not row["enough"] and not above):
        why = str(row["says"])
    elif above and row["ratio_least"] > 1 + bar:
        outcome, why = "fail", "the interval of the ratio lies above 0.85"
    elif above:
        why = f"the baseline is censored in {count(row['reference_censored'], 'pair')}, which may hide a gain"
    elif math.isnan(change):
        why = "too few cells reached the target to know the medians"
    elif shown:
        why = f"it is faster, but its median is {lower} lower"
    else:
        why = f"p = {row['p_holm']:.2g} after Holm, and the interval does not exclude a ratio of 0.85"
    return _criterion("1", "median T@τ at least 15% lower", bar, estimate, n, outcome, why)


def _cost_criterion(
    cells: pd.DataFrame, variation: str, reference: str, key: str, what: str, column: str, bar: float
) -> dict[str, object]:
    """Return a criterion on the paired relative difference of a column; a bar below 0 bounds from below."""
    ask = f"{what} at most {abs(bar):.1%} {'less' if bar < 0 else 'more'}"
    if column not in cells.columns:
        return _criterion(key, ask, bar, Estimate(math.nan), 0, "undecided", f"{column} was not recorded")
    values = cells.pivot_table(index="seed", columns="variation", values=column, dropna=False)
    values = values.reindex(columns=[variation, reference])
    result = paired_difference(values[variation], values[reference], relative=True)
    return _by_interval(key, ask, bar, result.estimate, result.pairs)


def _by_interval(key: str, ask: str, bar: float, estimate: Estimate, n: int) -> dict[str, object]:
    if n < FEWEST_PAIRS or not math.isfinite(estimate.value):
        why = f"{count(n, 'pair')}: too few for a 95% interval, which takes {FEWEST_PAIRS}"
        if n == 0:
            why = "no seed has it in both cells"
        elif n >= FEWEST_PAIRS:
            why = "not defined: the baseline's is 0"
        return _criterion(key, ask, bar, estimate, n, "undecided", why)
    alike = math.isnan(estimate.low)
    low, high = (estimate.value,) * 2 if alike else (estimate.low, estimate.high)
    inside, outside = (low >= bar, high < bar) if bar < 0 else (high <= bar, low > bar)
    outcome = "pass" if inside else "fail" if outside else "undecided"
    where = "within the bar" if inside else "beyond the bar" if outside else "on both sides of the bar"
    why = f"{'every pair is alike and' if alike else 'the interval lies'} {where}"
    return _criterion(key, ask, bar, estimate, n, outcome, why)


def _memory_criterion(cells: pd.DataFrame, variation: str, reference: str) -> dict[str, object]:
    what, column = _which_memory(cells, variation, reference)
    row = _cost_criterion(cells, variation, reference, "3b", what, column, 0.10)
    if column == "peak_ram" and row["n"]:
        row["why"] = f"{row['why']}; it is the whole process, in which a small difference does not show"
    return row


def _which_memory(cells: pd.DataFrame, variation: str, reference: str) -> tuple[str, str]:
    if "peak_vram" in cells.columns:
        own = cells[cells["variation"].isin([variation, reference])]
        if own.groupby("variation")["peak_vram"].count().min() > 0:
            return "peak memory of the GPU", "peak_vram"
    return "peak memory of the process", "peak_ram"


def _spread_criterion(times: pd.DataFrame, variation: str, reference: str, budget: str) -> dict[str, object]:
    t, own, r, theirs = paired(times, variation, reference, budget)
    shared = np.minimum(own, theirs)
    censored = int(np.sum((t > shared) | (r > shared)))
    ratio = sd_ratio(np.minimum(t, shared), np.minimum(r, shared))
    row = _by_interval(
        "4", "standard deviation of T@τ at most 10.0% more", 0.10, ratio.map(lambda x: x - 1), len(t)
    )
    if censored and len(t) >= FEWEST_PAIRS:
        why = (
            f"in {censored} of {len(t)} pairs a time is censored: the figure is of times cut at their budget"
        )
        row |= {"outcome": "undecided", "why": why}
    return row


def _outcomes(outcomes: dict[str, str]) -> str:
    names = {"1": "time", "2": "final value", "3a": "device time", "3b": "memory", "4": "spread"}
    parts = []
    for outcome, word in (("pass", "passed"), ("fail", "failed"), ("undecided", "undecided")):
        those = [name for key, name in names.items() if outcomes.get(key) == outcome]
        if those:
            parts.append(f"{word}: {', '.join(those)}")
    return "criteria " + ", ".join(parts) if parts else ""


def _beside(
    mine: list[dict[Hashable, Any]], baseline: Mapping[str, Mapping[Any, Any]], *, passed: bool
) -> list[str]:
    if not mine:
        return ["no gradient-free control was run, so nothing is shown about the gradient"]
    parts, unbeaten = [], []
    for row in mine:
        control = row["against"]
        if row["unknown"] == row["pairs"]:
            parts.append(f"no more is known of its gradient-free control {control}")
            continue
        own = f", which has {figure(baseline[control])} to the baseline" if control in baseline else ""
        parts.append(f"{figure(row)} to its gradient-free control {control}{_unlike(row)}{own}")
        if not row["ratio_high"] < 1:
            unbeaten.append(control)
    if passed and unbeaten:
        parts.append(f"it does not beat {' nor '.join(unbeaten)}, so the gradient is not what helps")
    return parts


def _unlike(row: Mapping[Any, Any]) -> str:
    """Return in what a control differs from its twin, where none that is alike was run."""
    variation, control = str(row["variation"]), str(row["against"])
    own, other = warm_start_of(variation), warm_start_of(control)
    if (own, other) == ("ohgw-3step", "random-warm"):
        return f" (one step; {scheduler_of(variation)}-random-3step was not run)"
    if eta_of(variation) is not None and eta_of(control) is None and other != "lr-grid":
        return " (at the study's own η_h)"
    return ""
