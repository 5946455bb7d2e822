"""Figures of trials: survival per rung, moves of ψ, hyper-gradient size and benefit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from optuna_ohgw.figures.theme import (
    INK,
    Panels,
    count,
    empty,
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
from optuna_ohgw.spec_parts import RangeSpec

# Markers in all panels together, of which each variation has a part: more say no more and weigh on the page.
_MOST_POINTS, _MOST_OF_ONE = 3000, 800
_LINEAR = 1e-4


def survival(trials: pd.DataFrame, rungs: tuple[int, ...], source: str) -> go.Figure:
    """Return the share of a cell's configurations that went on beyond each rung.

    Args:
        trials: ``Records.trials``; pilots are left out.
        rungs: Epochs at which the scheduler decides.
        source: The study file.
    """
    title = "Configurations that went on beyond each rung"
    own = trials[(trials["variation"] != PILOT) & trials["counted"] & (trials["state"] != "RUNNING")]
    if own.empty:
        return empty(title, source, "no trial has ended yet")
    if not rungs:
        why = "the scheduler has no rung below the last epoch: nothing is stopped early"
        return empty(title, source, why)
    figure, names = go.Figure(), ordered(own["variation"])
    for i, variation in enumerate(names):
        cells = [cell for _, cell in own[own["variation"] == variation].groupby("seed")]
        shares = np.array([[(cell["epochs"] > rung).mean() for rung in rungs] for cell in cells])
        low, middle, high = np.quantile(shares, [0.25, 0.5, 0.75], axis=0)
        color, dash, symbol = style(variation)
        spread = {"array": rounded(high - middle), "arrayminus": rounded(middle - low)}
        # Side by side, so that whiskers do not cover each other.
        offset = (i - (len(names) - 1) / 2) * 0.04
        figure.add_scatter(
            x=rounded(np.arange(len(rungs)) + offset),
            y=rounded(middle),
            mode="lines+markers",
            name=safe(variation),
            line={"color": color, "dash": dash, "width": 1.5},
            marker={"symbol": symbol, "size": 9},
            error_y={"type": "data", "symmetric": False, **spread, "thickness": 1, "width": 3},
            hovertemplate="%{y:.1%}",
            cliponaxis=False,
        )
    ticks = {"tickvals": list(range(len(rungs))), "ticktext": [str(rung) for rung in rungs]}
    figure.update_xaxes(title="rung (epochs trained)", range=[-0.4, len(rungs) - 0.6], **ticks)
    figure.update_yaxes(title="share of the cell's trials", rangemode="tozero", tickformat=".0%")
    seeds = count(own["seed"].nunique(), "seed")
    return finish(figure, title, source, note=f"median and quartiles over {seeds}")


def psi_shift(trials: pd.DataFrame, ranges: Mapping[str, RangeSpec], source: str) -> go.Figure:
    """Return the move of each parameter by the first warm start against its suggestion.

    Moves are in unit coordinates (1: the whole range) on an axis that is linear within ±1e-4 and
    logarithmic beyond (asinh); what ended at a bound is an open circle. A move of 0.1 to the right in the
    search coordinate is +0.1.

    Args:
        trials: ``Records.trials``.
        ranges: Searched parameters and their bounds.
        source: The study file.
    """
    title = "How far the warm start moved ψ"
    own = trials[(trials["variation"] != PILOT) & trials["counted"] & (trials["warm_starts"] > 0)]
    if own.empty or not ranges:
        why = "no trial has been warm-started" if own.empty else "no continuous parameter is searched"
        return empty(title, source, why)
    panels, names = Panels([""] * len(ranges), height=210, gap=75), ordered(own["variation"])
    figure, most = panels.figure, min(_MOST_OF_ONE, max(_MOST_POINTS // len(names), 100)) // len(ranges)
    moves = {name: _moves(own, name, bounds) for name, bounds in ranges.items()}
    for variation in names:
        mine = own[own["variation"] == variation]
        if len(mine) > most:
            mine = mine.iloc[np.linspace(0, len(mine) - 1, most).astype(int)]
        color, _, symbol = style(variation)
        for i, name in enumerate(ranges):
            clipped = np.array([name in text.split(",") for text in mine["clipped"]])
            symbols = np.where(clipped, "circle-open", symbol).tolist() if clipped.any() else symbol
            figure.add_scatter(
                x=rounded(mine[f"suggested_{name}"], 4),
                y=rounded(_squeeze(moves[name].loc[mine.index].to_numpy()), 4),
                mode="markers",
                marker={"color": color, "size": 6, "symbol": symbols, "opacity": 0.7},
                name=safe(variation),
                legendgroup=variation,
                showlegend=i == 0,
                hoverinfo="skip",
                **panels.place(i),
            )
    for i, (name, bounds) in enumerate(ranges.items()):
        place = panels.place(i)
        figure.update_xaxes(title=f"suggested {short(name, 18)}", nticks=5, tickangle=0, **place)
        if bounds.log:
            at = log_ticks(bounds.low, bounds.high, 4)
            figure.update_xaxes(type="log", tickvals=at, ticktext=[f"{t:g}" for t in at], **place)
        reach = max(float(moves[name].abs().max()), 10 * _LINEAR) * 1.6
        ticks = [s * 10.0**-k for k in range(4) for s in (1, -1)]
        shown = [0.0, *(t for t in ticks if abs(t) <= reach)]
        end = float(_squeeze(np.array([reach]))[0])
        at_y = {"tickvals": rounded(_squeeze(np.array(shown))), "ticktext": [f"{t:g}" for t in shown]}
        figure.update_yaxes(range=rounded([-end, end]), **at_y, **place)
        if panels.leads(i):
            figure.update_yaxes(title="move (share of range)", **place)
    part = f"{most} trials of each variation" if own["variation"].value_counts().max() > most else ""
    note = f"{part or count(len(own), 'trial')}; scale linear within 1e-4, then logarithmic; open: at a bound"
    return finish(figure, title, source, plot=panels.plot, note=note)


def benefit_heatmap(benefit: pd.DataFrame, source: str, metric: Metric = ACCURACY) -> go.Figure:
    """Return hyper-gradient size against the paired trial difference, as counts.

    Above 0 the variation's trial had the better value. The lowest and the highest row also count what
    lies beyond them.

    Args:
        benefit: What ``drift.benefit`` returns.
        source: The study file.
        metric: What is measured.
    """
    title = "Size of the hyper-gradient and benefit of its trial"
    norm = benefit["gradient_norm"].astype(float)
    own = benefit[(norm > 0) & np.isfinite(norm) & np.isfinite(benefit["benefit"].astype(float))]
    if own.empty:
        return empty(title, source, "no pair of trials with a known hyper-gradient has been recorded")
    names = ordered(own["variation"])
    panels = Panels(
        [short(n) for n in names], height=230, gap=100, shared_yaxes=True, horizontal_spacing=0.05
    )
    most = 0
    figure, size = panels.figure, np.log10(own["gradient_norm"].to_numpy(dtype=float))
    left = math.floor(size.min())
    edges_x = np.linspace(left, max(math.ceil(size.max()), left + 1), 13)
    reach = float(own["benefit"].abs().quantile(0.98))
    reach = max(reach, 0.01) if metric.high == 1 else reach or 1.0
    edges_y = np.linspace(-reach, reach, 16)
    for i, variation in enumerate(names):
        mine = own["variation"].to_numpy() == variation
        level = np.clip(own["benefit"].to_numpy(dtype=float)[mine], -reach, reach)
        counts, _, _ = np.histogram2d(level, size[mine], bins=(edges_y, edges_x))
        most = max(most, int(counts.max()))
        figure.add_heatmap(
            x=rounded(_middles(edges_x)),
            y=rounded(_middles(edges_y)),
            z=[[int(n) or None for n in row] for row in counts],
            coloraxis="coloraxis",
            hoverongaps=False,
            hovertemplate="10^%{x:.1f}, %{y:+.3f}: %{z} trials<extra></extra>",
            **panels.place(i),
        )
        figure.update_xaxes(title="log10 of gradient norm", nticks=6, tickangle=0, **panels.place(i))
        if panels.leads(i):
            figure.update_yaxes(title=f"benefit, {metric.axis}", **panels.place(i))
    figure.add_hline(y=0, line={"color": INK, "dash": "dot", "width": 1})
    bar = {"title": {"text": "trials"}, "thickness": 14, "outlinewidth": 0, "len": 230, "lenmode": "pixels"}
    bar |= {"y": 1, "yanchor": "top", **({"dtick": 1} if most <= 6 else {"nticks": 6})}
    scale = {"colorscale": "Cividis", "reversescale": True, "cmin": 1, "cmax": max(most, 2)}
    figure.update_layout(coloraxis={**scale, "colorbar": bar})
    note = f"{count(len(own), 'pair')} with the baseline's trial of the same seed and configuration"
    return finish(figure, title, source, plot=panels.plot, above=20, note=note)


def _moves(trials: pd.DataFrame, name: str, bounds: RangeSpec) -> pd.Series:
    """Return the moves of a parameter in unit coordinates; no step is no move."""
    width = math.log10(bounds.high / bounds.low) if bounds.log else bounds.high - bounds.low
    return trials[f"step_{name}"].astype(float).fillna(0.0) / width


def _squeeze(values: np.ndarray) -> np.ndarray:
    return np.asarray(np.arcsinh(values / _LINEAR))


def _middles(edges: np.ndarray) -> list[float]:
    return [(a + b) / 2 for a, b in pairwise(edges)]
