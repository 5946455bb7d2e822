"""T@τ of every variation against the baseline and its gradient-free controls, in figures and words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import pandas as pd

from optuna_ohgw.censored import compare_times, kaplan_meier_median, restricted_mean
from optuna_ohgw.metrics import BUDGETS
from optuna_ohgw.statistics import Array, holm
from optuna_ohgw.variations import baseline_among, eta_of, scheduler_of, warm_start_of

ALPHA = 0.05

# For each gradient variation its gradient-free counterparts; of each group the first that was run.
CONTROLS: dict[str, tuple[tuple[str, ...], ...]] = {
    "ohgw-1step": (("random-warm",), ("lr-grid",)),
    "ohgw-3step": (("random-3step", "random-warm"), ("lr-grid",)),
    "ohgw-trust": (("random-trust",), ("lr-grid",)),
    "ohgw-linesearch": (("random-linesearch",), ("lr-grid",)),
}

COMPARISON_COLUMNS = [
    *("target", "variation", "against", "kind", "budget", "pairs", "missing"),
    *("faster", "slower", "tied", "unknown", "censored", "reference_censored"),
    *("km_median", "km_median_reference", "rmst", "rmst_reference", "horizon"),
    *("ratio", "ratio_low", "ratio_high", "ratio_least"),
    *("p", "p_holm", "p_sign", "p_floor", "p_floor_holm", "enough", "says"),
]


def controls_of(variation: str, present: list[str]) -> list[str]:
    """Return the gradient-free counterparts of a variation among those present.

    Of a variation with its own η_h they are the ones with the same η_h, else the plain ones.
    """
    found, scheduler = [], scheduler_of(variation)
    for group in CONTROLS.get(warm_start_of(variation) or "", ()):
        for eta in dict.fromkeys([eta_of(variation), None]):
            wanted = [(scheduler, warm, eta) for warm in group]
            same = [v for w in wanted for v in present if (scheduler_of(v), warm_start_of(v), eta_of(v)) == w]
            if same:
                found.append(same[0])
                break
    return found


def comparisons(times: pd.DataFrame, reference: str | None = None) -> pd.DataFrame:
    """Return every variation's T@τ against the reference and against its controls, paired by seed.

    Args:
        times: What ``metrics.times`` returns.
        reference: The variation that all others are compared with; None: the baseline.

    Returns:
        One row a target, variation, ``against`` and ``budget`` (``mbu``, ``device_s`` or ``wall_s``):
        ``kind`` (``baseline`` or ``control``); ``pairs`` and ``missing`` (seeds of the study without
        the pair); the fields of ``statistics.TimeComparison``; ``km_median`` and ``rmst`` of both over
        their own cells, in the budget's unit, ``horizon`` that of ``rmst``: the smallest budget of a
        cell of the study that did not reach the target, else the largest budget; ``p_holm`` and
        ``p_floor_holm``, Holm over the rows of one target, budget and kind; ``enough``, whether an
        adjusted p below 0.05 was in reach at all; ``says``, the row in words.
    """
    present = list(dict.fromkeys(times["variation"]))
    reference = reference or baseline_among(present)
    rows = []
    for target, at_target in times.groupby("target", sort=False):
        for variation in present:
            against = {reference: "baseline"} | dict.fromkeys(controls_of(variation, present), "control")
            against.pop(variation, None)
            rows += [
                {"target": target, "variation": variation, "against": other, "kind": kind, "budget": budget}
                | _row(at_target, variation, other, budget)
                for other, kind in against.items()
                if variation != reference
                for budget in BUDGETS
            ]
    table = pd.DataFrame(rows, columns=COMPARISON_COLUMNS)
    for _, family in table.groupby(["target", "budget", "kind"]):
        table.loc[family.index, "p_holm"] = holm(family["p"])
        table.loc[family.index, "p_floor_holm"] = holm(family["p_floor"])
    table["enough"] = table["p_floor_holm"].astype(float) < ALPHA
    table["says"] = [_says(row) for row in table.to_dict("records")]
    return table


def _row(times: pd.DataFrame, variation: str, other: str, budget: str) -> dict[str, object]:
    own, theirs = (times[times["variation"] == v] for v in (variation, other))
    result = compare_times(*paired(times, variation, other, budget))
    row = asdict(result) | {
        f"ratio{suffix}": getattr(result.ratio, end)
        for suffix, end in (("", "value"), ("_low", "low"), ("_high", "high"))
    }
    until = horizon(times, budget)
    for suffix, cells in (("", own), ("_reference", theirs)):
        # A cell without an epoch was never observed.
        observed = cells[cells[f"budget_{budget}"] > 0]
        data = observed[budget].to_numpy(), observed[f"budget_{budget}"].to_numpy()
        row[f"km_median{suffix}"] = kaplan_meier_median(*data)
        row[f"rmst{suffix}"] = restricted_mean(*data, until)
    return row | {"missing": times["seed"].nunique() - result.pairs, "horizon": until}


def horizon(times: pd.DataFrame, budget: str) -> float:
    """Return the budget to which every cell was observed, for restricted means.

    The smallest budget of a cell that did not reach the target, else the largest of all. Cells
    without an epoch were never observed.

    Args:
        times: What ``metrics.times`` returns, of one target.
        budget: ``mbu``, ``device_s`` or ``wall_s``.
    """
    spent = times.loc[times[f"budget_{budget}"] > 0, ["reached", f"budget_{budget}"]]
    unreached = spent.loc[~spent["reached"].astype(bool), f"budget_{budget}"]
    return float(unreached.min() if len(unreached) else spent[f"budget_{budget}"].max())


def paired(times: pd.DataFrame, variation: str, other: str, budget: str) -> tuple[Array, Array, Array, Array]:
    """Return T@τ and budget of a variation, then of another, over the seeds that have both.

    Args:
        times: What ``metrics.times`` returns, of one target.
        variation: The variation.
        other: The one it is compared with.
        budget: ``mbu``, ``device_s`` or ``wall_s``.
    """
    columns = [budget, f"budget_{budget}"]
    own, theirs = (times[times["variation"] == v].set_index("seed")[columns] for v in (variation, other))
    both = own.join(theirs.add_prefix("other_"), how="inner")
    t, own_budget, r, their_budget = (both[column].to_numpy(dtype=float) for column in both.columns)
    return t, own_budget, r, their_budget


def faster(row: Mapping[Any, Any]) -> bool:
    """Return whether a row of ``comparisons`` leans to the variation; by counts where censoring hides it."""
    if row["ratio"] == 1:
        return bool(row["faster"] > row["slower"])
    return bool(row["ratio"] < 1)


def figure(row: Mapping[Any, Any]) -> str:
    """Return the ratio of a row of ``comparisons`` with its interval, in words."""
    if math.isnan(row["ratio"]):
        return f"no ratio ({_pairs(row)})"
    if 2 * row["unknown"] >= row["pairs"]:
        return f"ratio not known ({_pairs(row)})"
    if math.isnan(row["ratio_low"]):
        return f"ratio {row['ratio']:.2f} (no interval)"
    return f"ratio {row['ratio']:.2f} [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]"


def _says(row: Mapping[Any, Any]) -> str:
    if row["pairs"] == 0:
        return f"nothing to compare: no seed has both it and {row['against']}"
    if row["unknown"] == row["pairs"]:
        return f"nothing can be said: of {_pairs(row)}"
    if row["tied"] + row["unknown"] == row["pairs"]:
        return f"no difference seen: {row['tied']} tied of {_pairs(row)}"
    if not row["enough"]:
        adjusted = f", {_p(row['p_floor_holm'])} after Holm" if row["p_floor_holm"] > row["p_floor"] else ""
        floor = f"p cannot be below {_p(row['p_floor'])}{adjusted}"
        return f"too few pairs to show anything ({_pairs(row)}; {floor}); {figure(row)}"
    p = f"p {'<' if row['p_holm'] < 0.001 else '='} {_p(row['p_holm'])} after Holm, {_pairs(row)}"
    if row["p_holm"] >= ALPHA:
        return f"nothing shown: {figure(row)}, {p}"
    low, high = row["ratio_low"], row["ratio_high"]
    if faster(row):
        change, value, ends = "shorter", 1 - row["ratio"], (1 - high, 1 - low)
    else:
        change, value, ends = "longer", row["ratio"] - 1, (low - 1, high - 1)
    counts = f", {row['faster']} faster and {row['slower']} slower" if row["unknown"] else ""
    interval = "" if math.isnan(low) else f" [{ends[0]:.0%}, {ends[1]:.0%}]"
    return f"time to target {change} by {value:.0%}{interval}, {p}{counts}"


def _pairs(row: Mapping[Any, Any]) -> str:
    parts = [count(row["pairs"], "pair")]
    if row["unknown"]:
        parts.append(f"{row['unknown']} of unknown order")
    half_known = row["censored"] + row["reference_censored"] - 2 * row["unknown"]
    if half_known:
        parts.append(f"{half_known} with one time censored")
    if row["missing"]:
        parts.append(f"{count(row['missing'], 'seed')} without the pair")
    return ", ".join(parts)


def _p(p: float) -> str:
    return "0.001" if p < 0.001 else f"{p:.3g}"


def count(n: int, what: str) -> str:
    """Return a number of things in words."""
    return f"{n} {what}{'' if n == 1 else 's'}"
