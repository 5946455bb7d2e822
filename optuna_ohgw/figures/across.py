"""Figures across variations: best value, paired times, survival of cells, cost, sensitivity."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots
from scipy import stats

from optuna_ohgw.figures.theme import INK, SOFT, empty, faint, finish, ordered, rounded, safe, style
from optuna_ohgw.records import PILOT
from optuna_ohgw.variations import BASELINE

if TYPE_CHECKING:
    from optuna_ohgw.sensitivity import Sensitivity

UNITS = {"mbu": "mini-batch units", "device_s": "device seconds", "wall_s": "wall-clock seconds"}
_GRID = 120


def best_value(curves: pd.DataFrame, source: str, targets: list[float], budget: str = "mbu") -> go.Figure:
    """Return best validation accuracy against budget: median and quartiles over seeds.

    A line stops where fewer than half of its cells were observed.

    Args:
        curves: What ``metrics.curves`` returns; pilots are left out.
        source: The study file.
        targets: τ, shown as lines.
        budget: ``mbu``, ``device_s`` or ``wall_s``.
    """
    title, column = "Best validation accuracy so far", f"cell_{budget}"
    own = curves[(curves["variation"] != PILOT) & curves["best"].notna()]
    if own.empty:
        return empty(title, source, "no epoch with a finite accuracy has been recorded yet")
    figure, seeds = go.Figure(), own["seed"].nunique()
    first = own.groupby(["variation", "seed"])[column].min().median()
    grid = np.geomspace(max(first, 1e-9), own[column].max(), _GRID)
    for variation in ordered(own["variation"]):
        mine = own[own["variation"] == variation]
        cells = [c for _, c in mine.groupby("seed")]
        values = np.stack([_on_grid(c[column].to_numpy(), c["best"].to_numpy(), grid) for c in cells])
        enough = np.isfinite(values).sum(axis=0) * 2 >= len(cells)
        if not enough.any():
            continue
        low, middle, high = np.nanquantile(values[:, enough], [0.25, 0.5, 0.75], axis=0)
        x, (color, dash, _) = rounded(grid[enough], 4), style(variation)
        band = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False}
        group = {"legendgroup": variation}
        figure.add_scatter(x=x, y=rounded(high, 4), **band, **group)
        figure.add_scatter(
            x=x, y=rounded(low, 4), fill="tonexty", fillcolor=faint(color, 0.12), **band, **group
        )
        line = {"color": color, "dash": dash, "width": 2}
        figure.add_scatter(x=x, y=rounded(middle, 4), mode="lines", line=line, name=safe(variation), **group)
    for target in targets:
        figure.add_hline(y=target, line={"color": SOFT, "dash": "dot", "width": 1})
        label = {"text": f"τ = {target:.4g}", "showarrow": False, "xanchor": "left", "yanchor": "bottom"}
        figure.add_annotation(x=0, xref="paper", y=target, **label, font={"size": 11, "color": SOFT})
    figure.update_xaxes(title=f"budget of the cell ({UNITS[budget]})", type="log")
    figure.update_yaxes(title="best validation accuracy")
    return finish(figure, title, source, note=f"median and quartiles over {_count(seeds, 'seed')}")


def paired_times(
    times: pd.DataFrame, comparisons: pd.DataFrame, source: str, target: float, against: str = BASELINE
) -> go.Figure:
    """Return T@τ (mbu) of each variation against the reference cell of the same seed.

    Below the diagonal is sooner. A censored cell stands at the pair's shared budget, hollow, its triangle
    pointing to where its time lies. The band is the Hodges-Lehmann ratio with its interval.

    Args:
        times: What ``metrics.times`` returns.
        comparisons: What ``comparison.comparisons`` returns.
        source: The study file.
        target: τ.
        against: The reference.
    """
    title = f"Time to {target:.4g}, paired by seed"
    at = times[times["target"] == target]
    chosen = comparisons[
        (comparisons["target"] == target)
        & (comparisons["budget"] == "mbu")
        & (comparisons["against"] == against)
        & (comparisons["pairs"] > 0)
    ]
    pairs = {variation: _pairs(at, variation, against) for variation in ordered(chosen["variation"])}
    pairs = {variation: table for variation, table in pairs.items() if len(table)}
    if not pairs:
        return empty(title, source, f"no seed has both a variation's cell and that of {against}")
    columns = min(3, len(pairs))
    rows = math.ceil(len(pairs) / columns)
    figure = make_subplots(
        rows=rows,
        cols=columns,
        subplot_titles=[safe(v) for v in pairs],
        horizontal_spacing=0.09,
        vertical_spacing=0.28 / rows,
    )
    every = np.concatenate([t[["x", "y"]].to_numpy().ravel() for t in pairs.values()])
    low, high = every.min() / 1.25, every.max() * 1.25
    facts = chosen.set_index("variation")
    for i, (variation, table) in enumerate(pairs.items()):
        place = {"row": i // columns + 1, "col": i % columns + 1}
        color, _, _ = style(variation)
        row: Any = facts.loc[variation]
        if math.isfinite(row["ratio_low"]):
            y = [
                low * row["ratio_low"],
                high * row["ratio_low"],
                high * row["ratio_high"],
                low * row["ratio_high"],
            ]
            area = {"fill": "toself", "fillcolor": faint(color, 0.15), "line": {"width": 0}, "mode": "lines"}
            figure.add_scatter(
                x=rounded([low, high, high, low]),
                y=rounded(y),
                **area,
                hoverinfo="skip",
                showlegend=False,
                **place,
            )
        lines = ((1.0, SOFT, "dot"), (float(row["ratio"]), color, "solid"))
        for ratio, ink, dash in lines:
            figure.add_scatter(
                x=rounded([low, high]),
                y=rounded([low * ratio, high * ratio]),
                mode="lines",
                line={"color": ink, "dash": dash, "width": 1.5},
                hoverinfo="skip",
                showlegend=False,
                **place,
            )
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
            showlegend=False,
            **place,
        )
        p = f"p = {row['p_holm']:.2g} (Holm)" if row["enough"] else "too few pairs for a test"
        ends = (
            f" [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]" if math.isfinite(row["ratio_low"]) else ""
        )
        counts = f"{row['pairs']} pairs, {row['unknown']} of unknown order"
        text = f"ratio {row['ratio']:.2f}{ends}<br>{counts}<br>{p}"
        axis = "" if i == 0 else str(i + 1)
        figure.add_annotation(
            text=text,
            x=0.03,
            y=0.97,
            xref=f"x{axis} domain",
            yref=f"y{axis} domain",
            showarrow=False,
            align="left",
            xanchor="left",
            yanchor="top",
            font={"size": 11},
        )
    span = rounded([math.log10(low), math.log10(high)])
    ticks = _ticks(low, high)
    for update in (figure.update_xaxes, figure.update_yaxes):
        update(type="log", range=span, tickvals=ticks, ticktext=[f"{t:,.4g}" for t in ticks], tickangle=0)
    for i in range(len(pairs)):
        figure.update_xaxes(title=f"{safe(against)} (mbu)", row=i // columns + 1, col=i % columns + 1)
        if i % columns == 0:
            figure.update_yaxes(title="variation (mbu)", row=i // columns + 1, col=1)
    note = "below the dotted line is sooner; hollow: not reached within the shared budget"
    figure = finish(figure, title, source, height=130 + 330 * rows, note=note)
    figure.update_layout(margin={"t": 110, "b": 60})
    return figure


def survival_of_times(times: pd.DataFrame, source: str, target: float) -> go.Figure:
    """Return the Kaplan-Meier share of cells that have not reached τ yet, against mbu.

    Args:
        times: What ``metrics.times`` returns.
        source: The study file.
        target: τ.
    """
    title = f"Cells that have not reached {target:.4g} yet"
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
        shared = {"legendgroup": variation}
        line = {"color": color, "dash": dash, "width": 2, "shape": "hv"}
        figure.add_scatter(
            x=rounded(x), y=rounded(y), mode="lines", line=line, name=safe(variation), **shared
        )
        if late.any():
            ticks = {"symbol": "line-ns", "size": 10, "line": {"color": color, "width": 1.5}}
            figure.add_scatter(
                x=rounded(c[late]),
                y=rounded(curve.evaluate(c[late])),
                mode="markers",
                marker=ticks,
                hovertemplate="given up at %{x:.0f} mbu<extra></extra>",
                showlegend=False,
                **shared,
            )
    figure.update_xaxes(title="budget of the cell (mini-batch units)", rangemode="tozero")
    figure.update_yaxes(title="share of cells", range=[-0.03, 1.05])
    seeds = _count(at["seed"].nunique(), "seed")
    return finish(figure, title, source, note=f"Kaplan-Meier, {seeds}; ticks: cells whose budget ended")


def overhead_bars(cells: pd.DataFrame, source: str, reference: str = BASELINE) -> go.Figure:
    """Return overhead in mbu, seconds and FLOPs and extra peak memory, per variation.

    Bars are medians over seeds, whiskers quartiles. Memory is against the baseline cell of the same seed.

    Args:
        cells: What ``metrics.cell_metrics`` returns.
        source: The study file.
        reference: The baseline.
    """
    title = "What a warm start costs"
    own = cells[cells["variation"] != reference].copy()
    if own.empty:
        return empty(title, source, "no cell with a warm start has recorded an epoch yet")
    memory = "peak_vram" if own["peak_vram"].notna().any() else "peak_ram"
    base = cells[cells["variation"] == reference].set_index("seed")[memory]
    own["memory"] = own[memory] / own["seed"].map(base) - 1
    panels = {
        "overhead_mbu": ("mini-batch units", None),
        "overhead_s": ("device seconds", 0.05),
        "overhead_flops": ("FLOPs", None),
        "memory": ("peak memory (GPU)" if memory == "peak_vram" else "peak memory (process)", 0.10),
    }
    figure = make_subplots(
        rows=1, cols=4, subplot_titles=[name for name, _ in panels.values()], horizontal_spacing=0.07
    )
    for i, (column, (_, bar)) in enumerate(panels.items()):
        place = {"row": 1, "col": i + 1}
        values = own.groupby("variation")[column]
        names = ordered(own["variation"])
        middle = values.median().reindex(names)
        if not middle.notna().any():
            axis = "" if i == 0 else str(i + 1)
            figure.add_annotation(
                text="not recorded",
                x=0.5,
                y=0.5,
                xref=f"x{axis} domain",
                yref=f"y{axis} domain",
                showarrow=False,
                font={"color": SOFT},
            )
        low, high = (values.quantile(q).reindex(names) for q in (0.25, 0.75))
        whiskers = {
            "type": "data",
            "symmetric": False,
            "array": rounded(high - middle),
            "arrayminus": rounded(middle - low),
            "color": INK,
            "thickness": 1.2,
        }
        figure.add_bar(
            x=[safe(n.removeprefix("asha-")) for n in names],
            y=rounded(middle),
            error_y=whiskers,
            marker={"color": [style(n)[0] for n in names]},
            showlegend=False,
            hovertemplate="%{x}: %{y:.1%}<extra></extra>",
            **place,
        )
        if bar is not None:
            figure.add_hline(
                y=bar,
                line={"color": "#a33b00", "dash": "dash", "width": 1.5},
                annotation_text=f"bar {bar:.0%}",
                annotation_position="top right",
                annotation_bgcolor="rgba(255,255,255,0.85)",
                annotation_font={"size": 11, "color": "#a33b00"},
                **place,
            )
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    figure.update_yaxes(title="over training", col=1)
    figure.update_xaxes(tickangle=-40)
    note = f"median and quartiles over {_count(own['seed'].nunique(), 'seed')}"
    figure = finish(figure, title, source, height=480, note=note)
    figure.update_layout(margin={"t": 115, "b": 70})
    return figure


def eta_sensitivity(sensitivity: Sensitivity, source: str) -> go.Figure:
    """Return T@τ over the baseline's against η_h: seeds, LOESS and its band.

    Args:
        sensitivity: What ``sensitivity.eta_sensitivity`` returns.
        source: Variation and study file.
    """
    title, points = "Sensitivity to the step size η_h", sensitivity.points
    if points.empty:
        return empty(title, source, sensitivity.reason or "no sweep has been run")
    figure, (color, _, _) = go.Figure(), style("asha-ohgw-1step")
    if len(sensitivity.grid):
        x = rounded(sensitivity.grid)
        band = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False}
        figure.add_scatter(x=x, y=rounded(sensitivity.high), **band)
        figure.add_scatter(
            x=x,
            y=rounded(sensitivity.low),
            fill="tonexty",
            fillcolor=faint(color, 0.15),
            **{**band, "showlegend": True},
            name="95% band over seeds",
        )
        figure.add_scatter(
            x=x, y=rounded(sensitivity.fit), mode="lines", line={"color": color, "width": 2}, name="LOESS"
        )
    figure.add_scatter(
        x=rounded(points["eta_h"]),
        y=rounded(np.exp(points["log_ratio"].to_numpy(dtype=float))),
        mode="markers",
        marker={"color": INK, "size": 6, "opacity": 0.55},
        name="a seed",
        text=[f"seed {int(s)}" for s in points["seed"]],
        hovertemplate="%{text}: %{y:.2f}<extra></extra>",
    )
    figure.add_hline(y=1, line={"color": SOFT, "dash": "dot", "width": 1})
    etas = sorted(set(points["eta_h"]))
    figure.update_xaxes(title="η_h", type="log", tickvals=etas, ticktext=[f"{e:g}" for e in etas])
    figure.update_yaxes(title="T@τ over the baseline's (mbu)", type="log")
    curvature = sensitivity.curvature
    note = (
        sensitivity.reason
        or f"curvature {curvature.value:.2f} [{curvature.low:.2f}, {curvature.high:.2f}] per decade²"
    )
    return finish(figure, title, source, note=f"{_count(points['seed'].nunique(), 'seed')}; {note}")


def _on_grid(budget: np.ndarray, best: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Return the best value at each grid point, NaN before the first and after the cell's last."""
    index = np.searchsorted(budget, grid * (1 + 1e-9), side="right") - 1
    values = np.where(index >= 0, best[np.clip(index, 0, None)], np.nan)
    return np.where(grid <= budget[-1] * (1 + 1e-9), values, np.nan)


def _pairs(at: pd.DataFrame, variation: str, against: str) -> pd.DataFrame:
    columns = ["mbu", "budget_mbu"]
    own, other = (at[at["variation"] == v].set_index("seed")[columns] for v in (variation, against))
    both = own.join(other.add_suffix("_other"), how="inner").reset_index()
    shared = both[["budget_mbu", "budget_mbu_other"]].min(axis=1)
    late_y, late_x = ~(both["mbu"] <= shared), ~(both["mbu_other"] <= shared)
    symbols = {
        (0, 0): "circle",
        (1, 0): "triangle-up-open",
        (0, 1): "triangle-right-open",
        (1, 1): "triangle-ne-open",
    }
    table = pd.DataFrame(
        {"seed": both["seed"], "x": both["mbu_other"].clip(upper=shared), "y": both["mbu"].clip(upper=shared)}
    )
    table["symbol"] = [symbols[int(y), int(x)] for y, x in zip(late_y, late_x, strict=True)]
    return table[shared > 0]


def _ticks(low: float, high: float) -> list[float]:
    """Return 1, 2, 5 times powers of ten between two ends, only the powers where they are many."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if len(decades) <= 3 else (1,)
    inside = [s * 10.0**d for d in decades for s in steps if low <= s * 10.0**d <= high]
    return inside or [low, high]


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"
