"""Figures of trials: survival per rung, moves of ψ, gradients and benefit, learning curves, workers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from optuna_ohgw.figures.theme import GRID, INK, SOFT, empty, finish, ordered, rounded, safe, style
from optuna_ohgw.records import PILOT
from optuna_ohgw.spec import RangeSpec

_STATES = {"COMPLETE": "#009e73", "PRUNED": "#b8bec5", "RUNNING": "#56b4e9", "FAIL": "#d55e00"}
# More points than this say no more and weigh on the page.
_MOST_POINTS = 600
_MOST_CURVES = 60


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
        return empty(
            title, source, "the scheduler has no rung below the last epoch: nothing is stopped early"
        )
    figure, names = go.Figure(), ordered(own["variation"])
    for variation in names:
        mine = own[own["variation"] == variation]
        shares = np.array([[(c["epochs"] > rung).mean() for rung in rungs] for _, c in mine.groupby("seed")])
        low, middle, high = np.quantile(shares, [0.25, 0.5, 0.75], axis=0)
        color, dash, symbol = style(variation)
        whiskers = {
            "type": "data",
            "symmetric": False,
            "array": rounded(high - middle),
            "arrayminus": rounded(middle - low),
        }
        # Side by side, so that whiskers do not cover each other.
        offset = (names.index(variation) - (len(names) - 1) / 2) * 0.04
        figure.add_scatter(
            x=rounded(np.arange(len(rungs)) + offset),
            y=rounded(middle),
            mode="lines+markers",
            name=safe(variation),
            line={"color": color, "dash": dash, "width": 1.5},
            marker={"symbol": symbol, "size": 9},
            error_y={**whiskers, "thickness": 1, "width": 3},
        )
    figure.update_xaxes(
        title="rung (epochs trained)", tickvals=list(range(len(rungs))), ticktext=[str(r) for r in rungs]
    )
    figure.update_yaxes(title="share of the cell's trials", rangemode="tozero", tickformat=".0%")
    return finish(
        figure, title, source, note=f"median and quartiles over {_count(own['seed'].nunique(), 'seed')}"
    )


def psi_shift(trials: pd.DataFrame, ranges: Mapping[str, RangeSpec], source: str) -> go.Figure:
    """Return the move of each parameter by the first warm start against its suggestion.

    Moves are in unit coordinates on an axis that is linear around 0 and logarithmic beyond (asinh); what
    ended at a bound is an open circle.

    Args:
        trials: ``Records.trials``.
        ranges: Searched parameters and their bounds.
        source: The study file.
    """
    title = "ψ before and after the warm start"
    own = trials[(trials["variation"] != PILOT) & trials["counted"] & (trials["warm_starts"] > 0)]
    if own.empty:
        return empty(title, source, "no trial has been warm-started")
    columns = min(3, len(ranges))
    rows = math.ceil(len(ranges) / columns)
    figure = make_subplots(
        rows=rows,
        cols=columns,
        horizontal_spacing=0.1,
        vertical_spacing=0.28 / rows,
    )
    names = ordered(own["variation"])
    for variation in names:
        mine = own[own["variation"] == variation]
        most = max(50, _MOST_POINTS // len(names))
        if len(mine) > most:
            mine = mine.iloc[np.linspace(0, len(mine) - 1, most).astype(int)]
        color, _, symbol = style(variation)
        for i, (name, bounds) in enumerate(ranges.items()):
            step = mine[f"step_{name}"].fillna(0.0).to_numpy(dtype=float)
            width = math.log10(bounds.high / bounds.low) if bounds.log else bounds.high - bounds.low
            clipped = [name in text.split(",") for text in mine["clipped"]]
            symbols = ["circle-open" if c else symbol for c in clipped]
            figure.add_scatter(
                x=rounded(mine[f"suggested_{name}"], 4),
                y=rounded(_squeeze(step / width), 4),
                mode="markers",
                marker={"color": color, "size": 5, "symbol": symbols, "opacity": 0.7},
                name=safe(variation),
                legendgroup=variation,
                showlegend=i == 0,
                hoverinfo="skip",
                row=i // columns + 1,
                col=i % columns + 1,
            )
    ticks = [0.0, *(s * 10.0**-k for k in (3, 2, 1, 0) for s in (1, -1))]
    for i, (name, bounds) in enumerate(ranges.items()):
        place = {"row": i // columns + 1, "col": i % columns + 1}
        figure.update_xaxes(
            title=f"suggested {safe(name)}",
            type="log" if bounds.log else "linear",
            nticks=6,
            exponentformat="power",
            **place,
        )
        figure.update_yaxes(
            tickvals=rounded(_squeeze(np.array(ticks))), ticktext=[f"{t:g}" for t in ticks], **place
        )
        if i % columns == 0:
            figure.update_yaxes(title="move (unit coordinates)", **place)
    figure = finish(figure, title, source, height=150 + 290 * rows, note="open circles ended at a bound")
    figure.update_layout(margin={"t": 110})
    return figure


def benefit_heatmap(benefit: pd.DataFrame, source: str) -> go.Figure:
    """Return hyper-gradient size against the paired trial difference, as counts.

    Args:
        benefit: What ``drift.benefit`` returns.
        source: The study file.
    """
    title = "Hyper-gradient size and benefit"
    own = benefit[(benefit["gradient_norm"] > 0) & np.isfinite(benefit["benefit"])]
    if own.empty:
        return empty(title, source, "no pair of trials with a known hyper-gradient has been recorded")
    names = ordered(own["variation"])
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure = make_subplots(
        rows=rows,
        cols=columns,
        subplot_titles=[safe(n) for n in names],
        horizontal_spacing=0.08,
        vertical_spacing=0.3 / rows,
        shared_yaxes=True,
    )
    size = np.log10(own["gradient_norm"].to_numpy(dtype=float))
    edges_x = np.linspace(np.floor(size.min()), max(np.ceil(size.max()), np.floor(size.min()) + 1), 13)
    reach = max(float(own["benefit"].abs().quantile(0.98)), 0.01)
    edges_y = np.linspace(-reach, reach, 16)
    for i, variation in enumerate(names):
        mine = own[own["variation"] == variation]
        counts, _, _ = np.histogram2d(
            np.clip(mine["benefit"], -reach, reach), np.log10(mine["gradient_norm"]), bins=(edges_y, edges_x)
        )
        figure.add_heatmap(
            x=rounded(_middles(edges_x)),
            y=rounded(_middles(edges_y)),
            z=np.where(counts > 0, counts, np.nan).tolist(),
            coloraxis="coloraxis",
            hovertemplate="10^%{x:.1f}, %{y:+.3f}: %{z} trials<extra></extra>",
            row=i // columns + 1,
            col=i % columns + 1,
        )
        figure.update_xaxes(title="log10 of the gradient's norm", row=i // columns + 1, col=i % columns + 1)
    figure.add_hline(y=0, line={"color": INK, "dash": "dot", "width": 1})
    for row in range(rows):
        figure.update_yaxes(title="benefit (validation accuracy)", row=row + 1, col=1)
    bar = {"title": {"text": "trials"}, "thickness": 14, "outlinewidth": 0}
    figure.update_layout(coloraxis={"colorscale": "Cividis", "reversescale": True, "colorbar": bar})
    pairs = _count(len(own), "pair")
    note = f"{pairs}; against the baseline's trial of the same configuration; ends hold all beyond"
    figure = finish(figure, title, source, height=130 + 300 * rows, note=note)
    figure.update_layout(margin={"t": 110, "b": 60})
    return figure


def learning_curves(steps: pd.DataFrame, source: str) -> go.Figure:
    """Return the learning curves of one cell, the best one in front.

    Args:
        steps: ``Records.steps`` of the cell.
        source: The cell and its study file.
    """
    title = "Learning curves of a cell"
    own = steps[steps["counted"] & steps["val_accuracy"].notna()]
    if own.empty:
        return empty(title, source, "no epoch with a finite accuracy has been recorded yet")
    figure = go.Figure()
    best = int(own.loc[own["val_accuracy"].idxmax(), "trial"])
    kept = [int(t) for t in own.groupby("trial")["val_accuracy"].max().sort_values().index[-_MOST_CURVES:]]
    seen: set[str] = set()
    for trial in kept:
        mine = own[own["trial"] == trial]
        state = str(mine["state"].iloc[0])
        name, color, width = state.lower(), _STATES.get(state, SOFT), 1.2
        if trial == best:
            name, color, width = f"best: trial {trial} ({state.lower()})", "#0072b2", 3.0
        figure.add_scatter(
            x=mine["epoch"].tolist(),
            y=rounded(mine["val_accuracy"], 4),
            mode="lines+markers",
            name=name,
            line={"color": color, "width": width},
            marker={"size": 4},
            legendgroup=name,
            showlegend=name not in seen,
            hovertemplate=f"trial {trial}, epoch %{{x}}: %{{y:.4f}}<extra></extra>",
        )
        seen.add(name)
    figure.update_xaxes(title="epochs", rangemode="tozero")
    figure.update_yaxes(title="validation accuracy")
    total = own["trial"].nunique()
    shown = f"best {len(kept)} of {total} trials" if len(kept) < total else _count(total, "trial")
    return finish(figure, title, source, note=shown)


def workers(trials: pd.DataFrame, source: str) -> go.Figure:
    """Return what each worker of a cell did when.

    Args:
        trials: ``Records.trials`` of the cell.
        source: The cell and its study file.
    """
    title = "Workers of a cell"
    own = trials[trials["start"].notna() & trials["worker"].notna()].copy()
    if own.empty:
        return empty(title, source, "no trial has begun yet")
    own["until"] = own["end"].fillna(max(own["end"].max(), own["start"].max()))
    begin = own["start"].min()
    span = float(own["until"].max() - begin)
    unit, seconds = next(
        (u for u in (("hours", 3600.0), ("minutes", 60.0)) if span > 3 * u[1]), ("seconds", 1.0)
    )
    figure, names = go.Figure(), sorted(set(own["worker"]))
    labels = {name: f"worker {i + 1}" for i, name in enumerate(names)}
    for state, color in _STATES.items():
        mine = own[own["state"] == state]
        if mine.empty:
            continue
        figure.add_bar(
            base=rounded((mine["start"] - begin) / seconds),
            x=rounded((mine["until"] - mine["start"]) / seconds),
            y=[labels[w] for w in mine["worker"]],
            orientation="h",
            name=state.lower(),
            marker={"color": color, "line": {"color": "#fff", "width": 0.5}},
            text=[str(n) for n in mine["trial"]] if len(own) <= 40 else None,
            textposition="inside",
            insidetextanchor="middle",
            textangle=0,
            textfont={"size": 10},
            hovertext=[f"trial {n}, {state.lower()}" for n in mine["trial"]],
            hoverinfo="text",
        )
    figure.update_xaxes(title=f"{unit} since the cell began", gridcolor=GRID)
    figure.update_yaxes(categoryorder="array", categoryarray=[labels[n] for n in reversed(names)])
    figure.update_layout(barmode="overlay", bargap=0.3)
    return finish(
        figure, title, source, height=220 + 40 * len(names), note=f"{_count(len(own), 'trial')}, numbered"
    )


def _squeeze(values: np.ndarray) -> np.ndarray:
    """Return asinh of values over 1e-4: linear within, logarithmic beyond."""
    return np.asarray(np.arcsinh(values / 1e-4))


def _middles(edges: np.ndarray) -> list[float]:
    return [(a + b) / 2 for a, b in pairwise(edges)]


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"
