"""One visual language: colours, dashes and symbols of variations, text, axes, panels, empty states."""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Iterable, Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from optuna_ohgw.variations import eta_of, warm_start_of

INK, SOFT, GRID, ALARM = "#1b1f24", "#57606a", "#e3e6ea", "#a33b00"
_SOLID, _DASH, _DOT = "solid", "8px,3px", "2px,3px"
_DASHDOT, _LONG, _LONGDOT = "8px,3px,2px,3px", "16px,4px", "16px,3px,2px,3px"
# Okabe and Ito (2008), told apart by colour-blind people; controls are greys, each with its own dash.
_STYLES = {
    "baseline": ("#1b1f24", _SOLID, "circle"),
    "random-warm": ("#7f868d", _DASH, "square"),
    "random-3step": ("#99a0a7", _DOT, "square-open"),
    "random-trust": ("#666d74", _DASHDOT, "diamond-open"),
    "random-linesearch": ("#b1b7bd", _LONG, "cross"),
    "gaussian": ("#a08f6f", _LONGDOT, "x"),
    "lr-grid": ("#e69f00", _DASH, "star"),
    "ohgw-1step": ("#0072b2", _SOLID, "diamond"),
    "ohgw-3step": ("#d55e00", _LONG, "triangle-up"),
    "ohgw-trust": ("#009e73", _DASHDOT, "triangle-right"),
    "ohgw-linesearch": ("#cc79a7", _LONGDOT, "hexagon"),
}
_OTHER = (SOFT, _DOT, "asterisk-open")
_ETA_DASHES = (_DOT, _DASH, _SOLID, _LONG, _DASHDOT)
_AXIS = {
    "gridcolor": GRID,
    "showline": True,
    "linecolor": SOFT,
    "ticks": "outside",
    "tickcolor": SOFT,
    "zeroline": False,
    "automargin": True,
    "title": {"font": {"size": 13}},
}
TEMPLATE = go.layout.Template(
    layout={
        "font": {"family": "system-ui, 'Helvetica Neue', Arial, sans-serif", "size": 12, "color": INK},
        "colorway": [SOFT],
        "paper_bgcolor": "#fff",
        "plot_bgcolor": "#fff",
        "hoverlabel": {"bgcolor": "#fff", "font": {"color": INK}},
        "modebar": {"remove": ["select", "lasso", "pan", "zoomIn", "zoomOut", "autoScale"]},
        "xaxis": _AXIS,
        "yaxis": _AXIS,
    }
)
# Heights in px: above the plot, of the x axis, of a row of the legend (three entries where it is narrow).
_TOP, _AXIS_ROOM, _LEGEND_ROW = 78, 64, 28
_SUBTITLE = 88


def style(variation: str) -> tuple[str, str, str]:
    """Return colour, dash and marker symbol of a variation, the same in every figure.

    A variation with its own η_h has the colour of its rule, darker the larger η_h is.
    """
    color, dash, symbol = _STYLES.get(warm_start_of(variation) or "", _OTHER)
    eta = eta_of(variation)
    if eta is not None:
        dash = _ETA_DASHES[round(2 * math.log10(eta)) % len(_ETA_DASHES)]
        color = _shade(color, math.log10(eta) + 3)
    return color, dash, symbol


def ordered(variations: Iterable[object]) -> list[str]:
    """Return the variations once each, in the same order in every figure."""
    place = {warm: i for i, warm in enumerate(_STYLES)}
    names = {str(v) for v in variations}
    return sorted(names, key=lambda n: (place.get(warm_start_of(n) or "", len(place)), eta_of(n) or 0, n))


def faint(color: str, alpha: float) -> str:
    """Return a colour with transparency."""
    red, green, blue = _rgb(color)
    return f"rgba({red},{green},{blue},{alpha})"


def safe(text: str) -> str:
    """Return a text that plotly shows as it is: no markup, no TeX."""
    return html.escape(str(text), quote=False).replace("$", "&#36;")


def short(text: str, most: int = 26) -> str:
    """Return a text that plotly shows as it is, cut where it would run into its neighbour."""
    return safe(text if len(text) <= most else text[: most - 1] + "…")


def count(n: int, what: str) -> str:
    """Return a number of things in words."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def rounded(values: Iterable[float], digits: int = 5) -> list[float | None]:
    """Return values for a figure's data: few digits, None for what is not finite."""
    return [float(f"{v:.{digits}g}") if math.isfinite(v) else None for v in map(float, values)]


def log_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return at most so many round numbers between two positive ends."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for steps in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        found = [s * 10.0**d for d in decades for s in steps if low <= s * 10.0**d <= high]
        if len(found) <= most:
            break
    return found[:: math.ceil(len(found) / most)] if found else [low, high]


class Panels:
    """Small figures side by side in rows, each with a title above it.

    Attributes:
        figure: The figure.
        plot: Height of all rows with the room between them, in px.
    """

    def __init__(
        self,
        titles: Sequence[str],
        *,
        columns: int = 3,
        height: int = 240,
        gap: int = 100,
        stretch: bool = True,
        **more: object,
    ) -> None:
        """Make panels ``height`` px tall with ``gap`` px between the rows.

        With ``stretch`` few panels fill the width, else there is room for all columns; ``more`` goes to
        ``make_subplots``.
        """
        self._columns = min(columns, len(titles)) if stretch else columns
        rows = math.ceil(len(titles) / self._columns)
        self.plot = rows * height + (rows - 1) * gap
        more = {"horizontal_spacing": 0.09 if self._columns > 1 else 0.0, **more}
        if rows > 1:
            more["vertical_spacing"] = gap / self.plot
        self.figure = make_subplots(rows=rows, cols=self._columns, **more)
        for i, title in enumerate(titles):
            self.write(i, title, 0.5, 1.0, xanchor="center", yanchor="bottom", yshift=4)

    def place(self, i: int) -> dict[str, int]:
        """Return row and column of a panel."""
        return {"row": i // self._columns + 1, "col": i % self._columns + 1}

    def leads(self, i: int) -> bool:
        """Return whether a panel is the first of its row."""
        return i % self._columns == 0

    def write(self, i: int, text: str, x: float, y: float, **more: object) -> None:
        """Write a text into a panel, at shares of its width and height."""
        axis = "" if i == 0 else str(i + 1)
        refs = {"xref": f"x{axis} domain", "yref": f"y{axis} domain"}
        self.figure.add_annotation(text=text, x=x, y=y, showarrow=False, **refs, **more)


def finish(
    figure: go.Figure, title: str, source: str, *, plot: int = 300, above: int = 0, note: str = ""
) -> go.Figure:
    """Return the figure in the house style, with a title and a line on what it is from.

    Args:
        figure: The figure; changed in place.
        title: What is shown.
        source: The study file, perhaps with the cell.
        plot: Height of the plot in px.
        above: Height of titles above the panels in px.
        note: How many seeds or trials there are, and how to read the figure.
    """
    parts = [safe(part) for part in (note, source) if part]
    lines = parts if len(" · ".join((note, source))) > _SUBTITLE else [" · ".join(parts)]
    small = f"<span style='font-size:12px;color:{SOFT}'>{'<br>'.join(lines)}</span>"
    entries = sum(bool(trace.name) and trace.showlegend is not False for trace in figure.data)
    top = _TOP + 16 * (len(lines) - 1) + above
    bottom = _AXIS_ROOM + _LEGEND_ROW * math.ceil(entries / 3)
    height = top + plot + bottom
    place = {"x": 0, "xref": "paper", "xanchor": "left", "yref": "container", "yanchor": "top"}
    figure.layout.template = TEMPLATE
    figure.update_layout(
        title={
            "text": f"<b>{safe(title)}</b><br>{small}",
            "font": {"size": 16},
            **place,
            "y": 1 - 20 / height,
        },
        height=height,
        margin={"l": 75, "r": 25, "t": top, "b": bottom},
        showlegend=entries > 0,
        legend={"orientation": "h", "x": 0, "y": -(_AXIS_ROOM - 8) / plot, "yanchor": "top", "itemwidth": 40},
    )
    return figure


def empty(title: str, source: str, why: str) -> go.Figure:
    """Return a figure that says why there is nothing to show."""
    figure = go.Figure()
    place = {"x": 0.5, "y": 0.5, "xref": "paper", "yref": "paper", "showarrow": False}
    text = "<br>".join(map(safe, textwrap.wrap(why, 60, break_on_hyphens=False)))
    figure.add_annotation(text=text, **place, font={"size": 15, "color": SOFT})
    finish(figure, title, source, plot=120)
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    return figure


def _rgb(color: str) -> tuple[int, ...]:
    return tuple(int(color[i : i + 2], 16) for i in (1, 3, 5))


def _shade(color: str, decades: float) -> str:
    """Return a colour mixed with white (below 0) or black (above), by half for a decade or more."""
    weight = min(abs(decades), 1.0) * 0.55
    ground = 255 if decades < 0 else 0
    return "#" + "".join(f"{round(c * (1 - weight) + ground * weight):02x}" for c in _rgb(color))
