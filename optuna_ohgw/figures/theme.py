"""One visual language: colours, dashes and symbols of variations, axes, titles, empty states."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable

import plotly.graph_objects as go

from optuna_ohgw.variations import base_of, eta_of

INK, SOFT, GRID = "#1b1f24", "#57606a", "#e3e6ea"
# Okabe and Ito (2008), told apart by colour-blind people; controls are grey, each with its own dash.
_STYLES = {
    "asha-baseline": ("#1b1f24", "solid", "circle"),
    "asha-random-warm": ("#7f868d", "dash", "square"),
    "asha-random-3step": ("#7f868d", "dot", "square-open"),
    "asha-random-trust": ("#7f868d", "dashdot", "diamond-open"),
    "asha-random-linesearch": ("#7f868d", "longdash", "cross"),
    "asha-gaussian": ("#a89f91", "dot", "x"),
    "asha-lr-grid": ("#e69f00", "dash", "star"),
    "asha-ohgw-1step": ("#0072b2", "solid", "diamond"),
    "asha-ohgw-3step": ("#d55e00", "longdash", "triangle-up"),
    "asha-ohgw-trust": ("#009e73", "dashdot", "triangle-right"),
    "asha-ohgw-linesearch": ("#cc79a7", "longdashdot", "hexagon"),
}
_ETA_DASHES = ("dot", "dash", "solid", "longdash", "dashdot")


def style(variation: str) -> tuple[str, str, str]:
    """Return colour, dash and marker symbol of a variation, the same in every figure."""
    color, dash, symbol = _STYLES.get(base_of(variation), (SOFT, "solid", "circle"))
    eta = eta_of(variation)
    if eta is not None:
        dash = _ETA_DASHES[round(2 * math.log10(eta)) % len(_ETA_DASHES)]
    return color, dash, symbol


def ordered(variations: Iterable[object]) -> list[str]:
    """Return the variations once each, in the same order in every figure."""
    names, known = {str(v) for v in variations}, list(_STYLES)
    return sorted(
        names, key=lambda n: (known.index(base_of(n)) if base_of(n) in known else 99, eta_of(n) or 0, n)
    )


def faint(color: str, alpha: float) -> str:
    """Return a colour with transparency."""
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def safe(text: str) -> str:
    """Return a text that plotly shows as it is."""
    return html.escape(str(text), quote=False)


def finish(figure: go.Figure, title: str, source: str, *, height: int = 460, note: str = "") -> go.Figure:
    """Return the figure in the house style, with title, a line on what it is from, and axes."""
    below = " · ".join(part for part in (note, source) if part)
    text = f"<b>{safe(title)}</b><br><span style='font-size:12px;color:{SOFT}'>{safe(below)}</span>"
    figure.update_layout(
        template={"layout": {"colorway": [SOFT]}},
        title={
            "text": text,
            "x": 0,
            "xref": "paper",
            "xanchor": "left",
            "y": 1 - 28 / height,
            "yref": "container",
            "yanchor": "top",
        },
        font={"family": "system-ui, 'Helvetica Neue', Arial, sans-serif", "size": 13, "color": INK},
        paper_bgcolor="#fff",
        plot_bgcolor="#fff",
        height=height,
        margin={"l": 75, "r": 25, "t": 85, "b": 100},
        legend={"orientation": "h", "x": 0, "y": 0, "yref": "container", "yanchor": "bottom"},
        hoverlabel={"bgcolor": "#fff", "font": {"color": INK}},
    )
    axis = {"gridcolor": GRID, "linecolor": SOFT, "ticks": "outside", "zeroline": False, "automargin": True}
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    return figure


def empty(title: str, source: str, why: str) -> go.Figure:
    """Return a figure that says why there is nothing to show."""
    figure = go.Figure()
    figure.add_annotation(
        text=safe(why),
        x=0.5,
        y=0.5,
        xref="paper",
        yref="paper",
        showarrow=False,
        font={"size": 15, "color": SOFT},
    )
    finish(figure, title, source, height=260)
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    return figure


def rounded(values: Iterable[float], digits: int = 5) -> list[float | None]:
    """Return values for a figure's data: few digits, None for what is not finite."""
    return [float(f"{v:.{digits}g}") if math.isfinite(v) else None for v in map(float, values)]
