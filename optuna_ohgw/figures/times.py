"""Figures of time-to-target: best value against budget, pairs on the diagonal, cells still waiting."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from scipy import stats

from optuna_ohgw.figures.theme import (
    SOFT,
    Panels,
    count,
    empty,
    faint,
    finish,
    log_ticks,
    ordered,
    rounded,
    safe,
    short,
    style,
)
from optuna_ohgw.metric import ACCURACY, Metric
from optuna_ohgw.records import PILOT
from optuna_ohgw.variations import baseline_among

UNITS = {"mbu": "mini-batch units", "device_s": "device seconds", "wall_s": "wall-clock seconds"}
_GRID = 120
# Whether the variation's cell and the reference's missed τ: the triangle points to where the times lie.
_SYMBOLS = {
    (False, False): "circle",
    (True, False): "triangle-up-open",
    (False, True): "triangle-right-open",
    (True, True): "triangle-ne-open",
}


def best_value(
    curves: pd.DataFrame,
    source: str,
    targets: list[float],
    budget: str = "mbu",
    metric: Metric = ACCURACY,
) -> go.Figure:
    """Return the best validation value against budget: median and quartiles over seeds.

    Median and quartiles are over the cells observed that far; a line stops where they are fewer than half.

    Args:
        curves: What ``metrics.curves`` returns; pilots are left out.
        source: The study file.
        targets: τ, shown as lines.
        budget: ``mbu``, ``device_s`` or ``wall_s``.
        metric: What is measured.
    """
    title, column = f"Best validation {metric.name} so far", f"cell_{budget}"
    own = curves[(curves["variation"] != PILOT) & (curves[column] > 0)]
    if not own["best"].notna().any():
        return empty(title, source, "no epoch with a value has been recorded yet")
    figure = go.Figure()
    first, last = own.groupby(["variation", "seed"])[column].min().median(), own[column].max()
    wide = last > 20 * first
    grid = np.geomspace(first, last, _GRID) if wide else np.linspace(first, last, _GRID)
    for variation in ordered(own["variation"]):
        cells = [cell for _, cell in own[own["variation"] == variation].groupby("seed")]
        values = np.stack([_on_grid(c[column].to_numpy(), c["best"].to_numpy(), grid) for c in cells])
        enough = np.isfinite(values).sum(axis=0) * 2 >= len(cells)
        if not enough.any():
            continue
        low, middle, high = np.nanquantile(values[:, enough], [0.25, 0.5, 0.75], axis=0)
        x, (color, dash, _) = rounded(grid[enough], 4), style(variation)
        band = {"mode": "lines", "hoverinfo": "skip", "showlegend": False, "legendgroup": variation}
        edge = {"width": 0, "shape": "hv"}
        figure.add_scatter(x=x, y=rounded(high, 4), line=edge, **band)
        fill = {"fill": "tonexty", "fillcolor": faint(color, 0.12)}
        figure.add_scatter(x=x, y=rounded(low, 4), line=edge, **fill, **band)
        line = {"color": color, "dash": dash, "width": 2, "shape": "hv"}
        named = {"name": safe(variation), "legendgroup": variation}
        # A cell's first epoch alone is a point, of which a line shows nothing.
        mode = "lines" if len(set(x)) > 1 else "markers"
        figure.add_scatter(x=x, y=rounded(middle, 4), mode=mode, line=line, **named, marker={"color": color})
    for i, target in enumerate(sorted(targets)):
        figure.add_hline(y=target, line={"color": SOFT, "dash": "dot", "width": 1})
        # Labels of targets close to each other stand side by side, the lowest below its line.
        above = "top" if i == 0 and len(targets) > 1 else "bottom"
        place = {"x": 0.09 * (i % 4), "xref": "paper", "xanchor": "left", "yanchor": above}
        label = {"text": f"τ = {target:.4g}", "showarrow": False, "font": {"size": 11, "color": SOFT}}
        figure.add_annotation(y=target, **place, **label)
    figure.update_xaxes(title=f"budget of the cell ({UNITS[budget]})")
    if wide:
        figure.update_xaxes(type="log", tickvals=log_ticks(first, last, 8), tickformat="~s")
    figure.update_yaxes(title=f"best validation {metric.axis}")
    seeds = count(own["seed"].nunique(), "seed")
    return finish(figure, title, source, note=f"median and quartiles over {seeds}")


def paired_times(
    times: pd.DataFrame, comparisons: pd.DataFrame, source: str, target: float, against: str | None = None
) -> go.Figure:
    """Return T@τ (mbu) of each variation against the reference cell of the same seed.

    Below the diagonal is sooner. A censored cell stands at the pair's shared budget, hollow, its triangle
    pointing to where its time lies. The band is the Hodges-Lehmann ratio with its interval.

    Args:
        times: What ``metrics.times`` returns.
        comparisons: What ``comparison.comparisons`` returns.
        source: The study file.
        target: τ.
        against: The reference; None: the baseline.
    """
    title = f"Budget until {target:.4g} is reached, paired by seed"
    at = times[times["target"] == target]
    against = against or baseline_among(times["variation"])
    kind = (comparisons["budget"] == "mbu") & (comparisons["against"] == against)
    chosen = comparisons[(comparisons["target"] == target) & kind & (comparisons["pairs"] > 0)]
    pairs = {variation: _pairs(at, variation, against) for variation in ordered(chosen["variation"])}
    pairs = {variation: table for variation, table in pairs.items() if len(table)}
    if not pairs:
        return empty(title, source, f"no seed has both a variation's cell and that of {against}")
    facts = chosen.set_index("variation")
    titles = [f"<b>{short(v)}</b><br>{_says(facts.loc[v])}" for v in pairs]
    panels = Panels(titles, height=250, gap=150, stretch=False)
    figure = panels.figure
    figure.update_annotations(font={"size": 11})
    every = np.concatenate([table[["x", "y"]].to_numpy().ravel() for table in pairs.values()])
    low, high = every.min() / 1.25, every.max() * 1.25
    ends, ticks = rounded([low, high]), log_ticks(low, high, 4)
    for i, (variation, table) in enumerate(pairs.items()):
        place, (color, _, _) = panels.place(i), style(variation)
        quiet = {"mode": "lines", "hoverinfo": "skip", "showlegend": False, **place}
        row: Any = facts.loc[variation]
        if math.isfinite(row["ratio_low"]):
            corners = zip((low, high, high, low), ("low", "low", "high", "high"), strict=True)
            y = rounded([x * row[f"ratio_{end}"] for x, end in corners])
            area = {"fill": "toself", "fillcolor": faint(color, 0.15), "line": {"width": 0}}
            figure.add_scatter(x=[*ends, *ends[::-1]], y=y, **area, **quiet)
        for ratio, ink, dash in ((1.0, SOFT, "dot"), (float(row["ratio"]), color, "solid")):
            line = {"color": ink, "dash": dash, "width": 1.5}
            figure.add_scatter(x=ends, y=rounded([low * ratio, high * ratio]), line=line, **quiet)
        figure.add_scatter(
            x=rounded(table["x"]),
            y=rounded(table["y"]),
            mode="markers",
            marker={
                "symbol": table["symbol"].tolist(),
                "color": color,
                "size": 9,
                "line": {"width": 1.5, "color": color},
            },
            text=[f"seed {s}" for s in table["seed"]],
            hovertemplate="%{text}: %{y:.0f} against %{x:.0f} mbu<extra></extra>",
            cliponaxis=False,
            showlegend=False,
            **place,
        )
        figure.update_xaxes(title=f"{short(against, 18)} (mbu)", **place)
        if panels.leads(i):
            figure.update_yaxes(title="variation (mbu)", **place)
    shared = {"type": "log", "range": rounded([math.log10(low), math.log10(high)]), "tickvals": ticks}
    figure.update_xaxes(tickformat="~s", tickangle=0, **shared)
    figure.update_yaxes(tickformat="~s", **shared)
    note = "below the dotted line: sooner; hollow: not reached by then, its time lies where it points"
    return finish(figure, title, source, plot=panels.plot, above=65, note=note)


def survival_of_times(times: pd.DataFrame, source: str, target: float) -> go.Figure:
    """Return the Kaplan-Meier share of cells that have not reached τ yet, against mbu.

    Args:
        times: What ``metrics.times`` returns.
        source: The study file.
        target: τ.
    """
    title = f"Share of cells that have not reached {target:.4g} yet"
    at = times[(times["target"] == target) & (times["budget_mbu"] > 0)]
    if at.empty:
        return empty(title, source, "no cell has recorded an epoch yet")
    figure = go.Figure()
    for variation in ordered(at["variation"]):
        own = at[at["variation"] == variation]
        color, dash, _ = style(variation)
        t, c = own["mbu"].to_numpy(dtype=float), own["budget_mbu"].to_numpy(dtype=float)
        late = ~(t <= c)
        curve = stats.ecdf(stats.CensoredData.right_censored(np.minimum(t, c), late)).sf
        x, y = np.append(0.0, curve.quantiles), np.append(1.0, curve.probabilities)
        line = {"color": color, "dash": dash, "width": 2, "shape": "hv"}
        named = {"name": safe(variation), "legendgroup": variation}
        figure.add_scatter(x=rounded(x), y=rounded(y), mode="lines", line=line, **named)
        if late.any():
            figure.add_scatter(
                x=rounded(c[late]),
                y=rounded(curve.evaluate(c[late])),
                mode="markers",
                marker={"symbol": "line-ns", "size": 10, "line": {"color": color, "width": 1.5}},
                hovertemplate="given up at %{x:.0f} mbu<extra></extra>",
                showlegend=False,
                legendgroup=variation,
            )
    figure.update_xaxes(title="budget of the cell (mini-batch units)", rangemode="tozero")
    figure.update_yaxes(title="share of cells", range=[-0.03, 1.05])
    seeds = count(at["seed"].nunique(), "seed")
    return finish(figure, title, source, note=f"Kaplan-Meier, {seeds}; ticks: cells whose budget ended")


def _on_grid(budget: np.ndarray, best: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Return the best value at each grid point, NaN before the first and after the cell's last."""
    index = np.searchsorted(budget, grid * (1 + 1e-9), side="right") - 1
    values = np.where(index >= 0, best[np.clip(index, 0, None)], np.nan)
    return np.where(grid <= budget[-1] * (1 + 1e-9), values, np.nan)


def _pairs(at: pd.DataFrame, variation: str, against: str) -> pd.DataFrame:
    """Return one row a seed: x and y, min(T, C) of the reference and of the variation, and the symbol."""
    columns = ["mbu", "budget_mbu"]
    own, other = (at[at["variation"] == v].set_index("seed")[columns] for v in (variation, against))
    both = own.join(other.add_suffix("_other"), how="inner").reset_index()
    shared = both[["budget_mbu", "budget_mbu_other"]].min(axis=1)
    late_y, late_x = ~(both["mbu"] <= shared), ~(both["mbu_other"] <= shared)
    table = pd.DataFrame(
        {"seed": both["seed"], "x": both["mbu_other"].clip(upper=shared), "y": both["mbu"].clip(upper=shared)}
    )
    table["symbol"] = [_SYMBOLS[bool(y), bool(x)] for y, x in zip(late_y, late_x, strict=True)]
    return table[shared > 0]


def _says(row: Any) -> str:
    ends = f" [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]" if math.isfinite(row["ratio_low"]) else ""
    unknown = f", {row['unknown']} unordered" if row["unknown"] else ""
    p = f"p = {row['p_holm']:.2g} (Holm)" if row["enough"] else "too few pairs for a test"
    ratio = f"ratio {row['ratio']:.2f}{ends}" if math.isfinite(row["ratio"]) else "no ratio"
    return f"{ratio}<br>{count(int(row['pairs']), 'pair')}{unknown}<br>{p}"
