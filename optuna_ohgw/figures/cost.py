"""Figures of cost and of sensitivity: overhead and memory per variation, T@τ against η_h."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from optuna_ohgw.figures.theme import (
    ALARM,
    INK,
    SOFT,
    Panels,
    count,
    empty,
    faint,
    finish,
    ordered,
    rounded,
    short,
    style,
)
from optuna_ohgw.variations import baseline_among

if TYPE_CHECKING:
    from optuna_ohgw.sensitivity import Sensitivity


def overhead_bars(cells: pd.DataFrame, source: str, reference: str | None = None) -> go.Figure:
    """Return overhead in mbu, seconds and FLOPs and extra peak memory, per variation.

    Bars are medians over seeds, whiskers quartiles. Memory is against the baseline cell of the same seed.

    Args:
        cells: What ``metrics.cell_metrics`` returns.
        source: The study file.
        reference: What memory is compared with; None: the baseline.
    """
    title = "What a warm start costs"
    reference = reference or baseline_among(cells["variation"])
    own = cells[cells["variation"] != reference].copy()
    if own.empty:
        return empty(title, source, "no cell with a warm start has recorded an epoch yet")
    memory = "peak_vram" if own["peak_vram"].notna().any() else "peak_ram"
    base = cells[cells["variation"] == reference].set_index("seed")[memory]
    own["memory"] = own[memory] / own["seed"].map(base) - 1
    where = "GPU" if memory == "peak_vram" else "process"
    shown = {
        "overhead_mbu": ("mini-batch units", "over training", None),
        "overhead_s": ("device seconds", "over train + eval", 0.05),
        "overhead_flops": ("FLOPs", "over training", None),
        "memory": (f"peak memory ({where})", "over the baseline's", 0.10),
    }
    names = ordered(own["variation"])
    titles = [f"{name}<br>{than}" for name, than, _ in shown.values()]
    panels = Panels(
        titles, columns=4, height=40 + 30 * len(names), shared_yaxes=True, horizontal_spacing=0.06
    )
    figure = panels.figure
    for i, (column, (_, _, most)) in enumerate(shown.items()):
        place, values = panels.place(i), own.groupby("variation")[column]
        low, middle, high = (values.quantile(q).reindex(names) for q in (0.25, 0.5, 0.75))
        # "auto" needs a value, and a limit beside no bar would read as kept.
        if not middle.notna().any():
            panels.write(i, "not recorded", 0.5, 0.5, font={"color": SOFT})
            figure.update_xaxes(range=[0, 1], showticklabels=False, ticks="", showgrid=False, **place)
        figure.add_bar(
            x=rounded(middle),
            y=[short(n) for n in names],
            orientation="h",
            error_x={
                "type": "data",
                "symmetric": False,
                "array": rounded(high - middle),
                "arrayminus": rounded(middle - low),
                "color": INK,
                "thickness": 1.2,
                "width": 4,
            },
            marker={"color": [style(n)[0] for n in names]},
            showlegend=False,
            hovertemplate="%{y}: %{x:.2%}<extra></extra>",
            **place,
        )
        if not panels.leads(i):
            figure.update_yaxes(ticks="", **place)
        if most is not None and middle.notna().any():
            figure.add_vline(x=most, line={"color": ALARM, "dash": "dash", "width": 1.5}, **place)
            axis = "" if i == 0 else str(i + 1)
            label = {"text": f"limit {most:.0%}", "font": {"size": 11, "color": ALARM}, "showarrow": False}
            at = {"x": most, "y": 0, "xref": f"x{axis}", "yref": f"y{axis} domain", "yshift": -20}
            figure.add_annotation(**label, **at, yanchor="top")
    figure.update_xaxes(tickformat="~%", rangemode="tozero", nticks=3, tickangle=0)
    figure.update_yaxes(categoryorder="array", categoryarray=[short(n) for n in reversed(names)])
    seeds = count(own["seed"].nunique(), "seed")
    return finish(
        figure, title, source, plot=panels.plot, above=35, note=f"median and quartiles over {seeds}"
    )


def eta_sensitivity(sensitivity: Sensitivity, source: str) -> go.Figure:
    """Return T@τ over the baseline's against η_h: seeds, LOESS and its band.

    Args:
        sensitivity: What ``sensitivity.eta_sensitivity`` returns.
        source: Variation and study file.
    """
    title, points = "Time to target against the step size η_h", sensitivity.points
    if points.empty:
        return empty(title, source, sensitivity.reason or "no sweep has been run")
    figure, (color, _, _) = go.Figure(), style("ohgw-1step")
    if len(sensitivity.grid):
        x, edge = rounded(sensitivity.grid), {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
        figure.add_scatter(x=x, y=rounded(sensitivity.high), showlegend=False, **edge)
        fill = {"fill": "tonexty", "fillcolor": faint(color, 0.15), "name": "95% band over seeds"}
        figure.add_scatter(x=x, y=rounded(sensitivity.low), **fill, **edge)
        line = {"color": color, "width": 2}
        figure.add_scatter(x=x, y=rounded(sensitivity.fit), mode="lines", line=line, name="LOESS")
    symbols = ["circle-open" if unknown else "circle" for unknown in points["unknown"]]
    figure.add_scatter(
        x=rounded(points["eta_h"]),
        y=rounded(np.exp(points["log_ratio"].to_numpy(dtype=float))),
        mode="markers",
        marker={"color": INK, "size": 7, "opacity": 0.5, "symbol": symbols},
        name="a seed",
        text=[f"seed {int(s)}" for s in points["seed"]],
        hovertemplate="%{text}: %{y:.2f}<extra></extra>",
        cliponaxis=False,
    )
    figure.add_hline(y=1, line={"color": SOFT, "dash": "dot", "width": 1})
    etas = sorted(set(points["eta_h"]))
    figure.update_xaxes(title="step size η_h", type="log", tickvals=etas, ticktext=[f"{e:g}" for e in etas])
    figure.update_yaxes(title="T@τ over the baseline's (mbu / mbu)", type="log", nticks=6)
    curvature, seeds = sensitivity.curvature, count(points["seed"].nunique(), "seed")
    bent = f"curvature {curvature.value:.2f} [{curvature.low:.2f}, {curvature.high:.2f}] per decade²"
    unknown = int(points["unknown"].sum())
    open_ended = f"; hollow: {unknown} of {len(points)} pairs of unknown order" if unknown else ""
    return finish(figure, title, source, note=f"{seeds}; {sensitivity.reason or bent}{open_ended}")
