"""Figures of one cell: learning curves and workers."""

from __future__ import annotations

import math

import pandas as pd
import plotly.graph_objects as go

from optuna_ohgw.figures.theme import SOFT, count, empty, finish, rounded
from optuna_ohgw.metric import ACCURACY, Metric

_STATES = {"COMPLETE": "#009e73", "PRUNED": "#b8bec5", "RUNNING": "#56b4e9", "FAIL": "#d55e00"}
_FRONT = "#0072b2"
# More say no more and weigh on the page.
_MOST_CURVES, _MOST_POINTS, _MOST_NUMBERS = 60, 1000, 40


def learning_curves(steps: pd.DataFrame, source: str, metric: Metric = ACCURACY) -> go.Figure:
    """Return the learning curves of one cell, the best one in front.

    Args:
        steps: ``Records.steps`` of the cell.
        source: The cell and its study file.
        metric: What is measured.
    """
    title = "Learning curves of a cell"
    own = steps[steps["counted"] & steps["val_metric"].notna()]
    if own.empty:
        return empty(title, source, "no epoch with a value has been recorded yet")
    figure, seen = go.Figure(), set()
    own = own.assign(score=metric.sign * own["val_metric"])
    best = int(own["trial"].to_numpy()[own["score"].to_numpy().argmax()])
    total = own["trial"].nunique()
    kept = [int(t) for t in own.groupby("trial")["score"].max().sort_values().index[-_MOST_CURVES:]]
    own = own[own["trial"].isin(kept)]
    stride = math.ceil(len(own) / _MOST_POINTS)
    for trial in [*(t for t in kept if t != best), best]:
        mine = own[own["trial"] == trial].sort_values("epoch")
        epochs = mine["epoch"].to_numpy()
        peak = epochs[mine["score"].to_numpy().argmax()]
        mine = mine[((epochs - 1) % stride == 0) | (epochs == peak) | (epochs == epochs[-1])]
        state = str(mine["state"].iloc[0])
        name, line = state.lower(), {"color": _STATES.get(state, SOFT), "width": 1.2}
        if trial == best:
            name, line = f"best: trial {trial} ({state.lower()})", {"color": _FRONT, "width": 3}
        figure.add_scatter(
            x=mine["epoch"].tolist(),
            y=rounded(mine["val_metric"], 4),
            mode="lines+markers",
            name=name,
            line=line,
            marker={"size": 4},
            legendgroup=name,
            showlegend=name not in seen,
            hovertemplate=f"trial {trial}, epoch %{{x}}: %{{y:.4f}}<extra></extra>",
        )
        seen.add(name)
    figure.update_xaxes(title="time trained (epochs)", rangemode="tozero")
    figure.update_yaxes(title=f"validation {metric.axis}")
    if metric.low is not None and metric.high is not None:
        margin = 0.05 * (metric.high - metric.low)
        figure.update_yaxes(minallowed=metric.low - margin, maxallowed=metric.high + margin)
    if own["epoch"].max() <= 10:
        figure.update_xaxes(dtick=1)
    shown = f"the best {len(kept)} of {count(total, 'trial')}" if len(kept) < total else count(total, "trial")
    thinned = f"; every {stride} epochs and the best" if stride > 1 else ""
    return finish(figure, title, source, note=shown + thinned)


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
    # A running trial reaches as far as anything known.
    own["until"] = own["end"].fillna(own[["start", "end"]].max(axis=None))
    begin = own["start"].min()
    span = float(own["until"].max() - begin)
    units = (("hours", 3600.0), ("minutes", 60.0))
    unit, seconds = next((u for u in units if span > 3 * u[1]), ("seconds", 1.0))
    figure, names = go.Figure(), sorted(set(own["worker"]))
    labels = {name: f"worker {i + 1}" for i, name in enumerate(names)}
    numbered = len(own) <= _MOST_NUMBERS
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
            customdata=mine["trial"].tolist(),
            texttemplate="%{customdata}" if numbered else None,
            textposition="inside",
            insidetextanchor="middle",
            textangle=0,
            textfont={"size": 10},
            hovertemplate=f"trial %{{customdata}}, {state.lower()}<extra></extra>",
        )
    figure.update_xaxes(title=f"time since the cell began ({unit})")
    figure.update_yaxes(categoryorder="array", categoryarray=[labels[n] for n in reversed(names)])
    figure.update_layout(barmode="overlay", bargap=0.3, uniformtext={"minsize": 8, "mode": "hide"})
    return finish(figure, title, source, plot=40 + 40 * len(names), note=count(len(own), "trial"))
