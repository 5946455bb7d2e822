from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from optuna_ohgw import figures
from optuna_ohgw.comparison import comparisons
from optuna_ohgw.figures.theme import count, log_ticks, ordered, rounded, safe, short, style
from optuna_ohgw.sensitivity import Sensitivity
from optuna_ohgw.spec_parts import RangeSpec
from optuna_ohgw.statistics import Estimate
from optuna_ohgw.variations import WARM_STARTS

VARIATIONS = [f"asha-{warm}" for warm in WARM_STARTS]
BASE, ONE, RANDOM = "asha-baseline", "asha-ohgw-1step", "asha-random-warm"
SOURCE = "studies/a<b>&$x$.yaml"
RANGES = {
    "lr": RangeSpec(low=1e-4, high=1.0, log=True),
    "momentum": RangeSpec(low=0.0, high=0.5),
}


def curves_of(cells: dict[tuple[str, int], Sequence[tuple[float, float]]]) -> pd.DataFrame:
    """Return curves from (budget, best so far) per (variation, seed)."""
    rows = [(v, s, m, b) for (v, s), points in cells.items() for m, b in points]
    table = pd.DataFrame(rows, columns=["variation", "seed", "cell_mbu", "best"]).astype({"best": float})
    return table.assign(cell_device_s=table["cell_mbu"] / 10, cell_wall_s=table["cell_mbu"] / 5)


def times_of(rows: Sequence[tuple[str, int, float, float]], target: float = 0.9) -> pd.DataFrame:
    """Return times from (variation, seed, T, C); T above C was not reached."""
    table = pd.DataFrame(rows, columns=["variation", "seed", "mbu", "budget_mbu"]).astype(
        {"mbu": float, "budget_mbu": float}
    )
    table["mbu"] = table["mbu"].where(table["mbu"] <= table["budget_mbu"], math.inf)
    for unit in ("device_s", "wall_s"):
        table[unit], table[f"budget_{unit}"] = table["mbu"], table["budget_mbu"]
    return table.assign(target=target, reached=np.isfinite(table["mbu"]))


def comparison_of(variation: str, **fields: Any) -> pd.DataFrame:
    row = {"target": 0.9, "variation": variation, "against": BASE, "budget": "mbu", "pairs": 4, "unknown": 1}
    row |= {"ratio": 0.8, "ratio_low": 0.7, "ratio_high": 0.95, "p_holm": 0.02, "enough": True, **fields}
    return pd.DataFrame([row])


def trial(variation: str = ONE, seed: int = 0, number: int = 0, **fields: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "variation": variation,
        "seed": seed,
        "trial": number,
        "config_index": number,
        "state": "COMPLETE",
        "counted": True,
        "start": 100.0,
        "end": 110.0,
        "worker": "host:1",
        "epochs": 9,
        "warm_starts": 1,
        "clipped": "",
        "suggested_lr": 0.01,
        "step_lr": 0.4,
        "suggested_momentum": 0.25,
        "step_momentum": -0.05,
    }
    return row | fields


def cells_of(*rows: tuple[str, int, float, float, float, float]) -> pd.DataFrame:
    """Return cell metrics from (variation, seed, overheads in mbu, seconds, FLOPs; peak memory)."""
    columns = ["variation", "seed", "overhead_mbu", "overhead_s", "overhead_flops", "peak_ram"]
    return pd.DataFrame(rows, columns=columns).assign(peak_vram=math.nan)


def steps_of(curves: dict[int, Sequence[float]], states: dict[int, str] | None = None) -> pd.DataFrame:
    rows = [
        (n, e, a, (states or {}).get(n, "COMPLETE"))
        for n, values in curves.items()
        for e, a in enumerate(values, start=1)
    ]
    table = pd.DataFrame(rows, columns=["trial", "epoch", "val_metric", "state"])
    return table.assign(variation=ONE, seed=0, config_index=table["trial"], counted=True)


def sweep(reason: str | None = None, points: int = 4) -> Sensitivity:
    etas = (1e-4, 1e-3)
    rows = [(e, s, math.log(r)) for s, r in ((0, 0.5), (1, 2.0)) for e in etas][:points]
    grid = np.array([]) if reason else np.array(etas)
    low, fit, high = (grid * 0 + v for v in (0.6, 0.9, 1.3))
    table = pd.DataFrame(rows, columns=["eta_h", "seed", "log_ratio"]).assign(unknown=False)
    return Sensitivity(table, grid, fit, low, high, Estimate(0.3, 0.1, 0.5), None, reason)


def by_name(figure: go.Figure, name: str) -> Any:
    (found,) = [t for t in figure.data if t.name == name]
    return found


def markers(figure: go.Figure) -> list[Any]:
    return [t for t in figure.data if t.mode == "markers"]


def words(figure: go.Figure) -> str:
    return " ".join([figure.layout.title.text, *(a.text for a in figure.layout.annotations)])


def axes(figure: go.Figure, which: str) -> list[Any]:
    return [figure.layout[key] for key in figure.layout if key.startswith(which)]


CURVES = curves_of({(v, s): [(10, 0.2), (100, 0.5), (1000, 0.91)] for v in (BASE, ONE) for s in range(3)})
TIMES = times_of([(v, s, 100.0 + s, 500.0) for v in (BASE, ONE) for s in range(3)])
CELLS = cells_of((BASE, 0, 0, 0, 0, 100), (ONE, 0, 0.1, 0.2, 0.3, 130))
TRIALS = pd.DataFrame([trial(BASE, warm_starts=0, epochs=27), trial(ONE)])
BENEFIT = pd.DataFrame(
    [(ONE, 0, 0, 10.0, 0.1), (ONE, 0, 1, 0.1, -0.2)],
    columns=["variation", "seed", "config_index", "gradient_norm", "benefit"],
)
STEPS = steps_of({0: [0.1, 0.6], 1: [0.2]}, {1: "PRUNED"})

# Each figure with data, and with none.
FIGURES: dict[str, tuple[Callable[[], go.Figure], Callable[[], go.Figure]]] = {
    "best": (
        lambda: figures.best_value(CURVES, SOURCE, [0.9]),
        lambda: figures.best_value(CURVES.iloc[:0], SOURCE, [0.9]),
    ),
    "paired": (
        lambda: figures.paired_times(TIMES, comparison_of(ONE), SOURCE, 0.9),
        lambda: figures.paired_times(TIMES.iloc[:0], comparison_of(ONE).iloc[:0], SOURCE, 0.9),
    ),
    "survival of times": (
        lambda: figures.survival_of_times(TIMES, SOURCE, 0.9),
        lambda: figures.survival_of_times(TIMES.iloc[:0], SOURCE, 0.9),
    ),
    "overhead": (
        lambda: figures.overhead_bars(CELLS, SOURCE),
        lambda: figures.overhead_bars(CELLS.iloc[:1], SOURCE),
    ),
    "psi": (
        lambda: figures.psi_shift(TRIALS, RANGES, SOURCE),
        lambda: figures.psi_shift(TRIALS.iloc[:1], RANGES, SOURCE),
    ),
    "benefit": (
        lambda: figures.benefit_heatmap(BENEFIT, SOURCE),
        lambda: figures.benefit_heatmap(BENEFIT.iloc[:0], SOURCE),
    ),
    "survival": (
        lambda: figures.survival(TRIALS, (3, 9), SOURCE),
        lambda: figures.survival(TRIALS.iloc[:0], (3, 9), SOURCE),
    ),
    "curves": (
        lambda: figures.learning_curves(STEPS, SOURCE),
        lambda: figures.learning_curves(STEPS.iloc[:0], SOURCE),
    ),
    "workers": (
        lambda: figures.workers(TRIALS, SOURCE),
        lambda: figures.workers(TRIALS.iloc[:0], SOURCE),
    ),
    "eta": (
        lambda: figures.eta_sensitivity(sweep(), SOURCE),
        lambda: figures.eta_sensitivity(sweep("no sweep of η_h was run", 0), SOURCE),
    ),
}


class TestEveryFigure:
    @pytest.fixture(params=FIGURES, ids=str)
    def made(self, request: pytest.FixtureRequest) -> tuple[go.Figure, go.Figure]:
        full, none = FIGURES[request.param]
        return full(), none()

    def test_the_title_is_bold_and_the_study_file_is_below_it_as_it_is(self, made: Any) -> None:
        for figure in made:
            title, _, below = figure.layout.title.text.partition("<br>")
            assert title.startswith("<b>")
            assert title.endswith("</b>")
            assert "a&lt;b&gt;&amp;&#36;x&#36;.yaml" in below
            assert SOURCE not in figure.layout.title.text

    def test_an_empty_one_has_no_axes_and_says_why(self, made: Any) -> None:
        full, none = made
        assert len(full.data) > 0
        assert len(none.data) == 0
        (why,) = none.layout.annotations
        assert len(why.text.split()) >= 4
        assert none.layout.xaxis.visible is False
        assert none.layout.height < 300

    def test_size(self, made: Any) -> None:
        for figure in made:
            assert figure.layout.width is None
            assert 200 < figure.layout.height < 700
            assert len(figure.to_json()) < 12_000

    def test_the_height_is_that_of_plot_and_margins(self, made: Any) -> None:
        for figure in made:
            margin = figure.layout.margin
            assert figure.layout.height - margin.t - margin.b >= 60

    def test_no_default_template_travels_along(self, made: Any) -> None:
        assert len(made[0].layout.template.data.to_plotly_json()) == 0


UNITS = {
    "best": ("(mini-batch units)", "(share)"),
    "paired": ("(mbu)", "(mbu)"),
    "survival of times": ("(mini-batch units)", "share of cells"),
    "psi": ("suggested", "(share of range)"),
    "benefit": ("log10", "accuracy (share)"),
    "survival": ("(epochs trained)", "share of the cell's trials"),
    "curves": ("(epochs)", "(share)"),
    "workers": ("(seconds)", None),
    "eta": ("η_h", "(mbu / mbu)"),
}


@pytest.mark.parametrize("name", UNITS)
def test_axis_titles_have_units(name: str) -> None:
    figure = FIGURES[name][0]()
    x, y = UNITS[name]
    titles = [axis.title.text for axis in axes(figure, "xaxis") if axis.title.text]
    assert titles
    assert all(x in title for title in titles)
    if y is not None:
        assert y in figure.layout.yaxis.title.text


class TestTheme:
    def test_every_variation_has_its_own_look(self) -> None:
        looks = {name: style(name) for name in VARIATIONS}
        assert len({color for color, _, _ in looks.values()}) == len(VARIATIONS)
        assert len({symbol for _, _, symbol in looks.values()}) == len(VARIATIONS)

    def test_controls_are_grey_and_gradient_steps_are_coloured(self) -> None:
        def chroma(name: str) -> int:
            values = [int(style(name)[0][i : i + 2], 16) for i in (1, 3, 5)]
            return max(values) - min(values)

        assert all(chroma(n) <= 20 for n in VARIATIONS if "random" in n or n == BASE)
        assert all(chroma(n) >= 70 for n in VARIATIONS if "ohgw" in n)

    def test_step_sizes_of_a_rule_are_told_apart(self) -> None:
        names = [f"{ONE}@{eta}" for eta in ("1e-4", "3e-4", "1e-3", "3e-3")]
        assert len({style(n)[0] for n in names}) == 4
        assert len({style(n)[1] for n in names}) == 4
        lightness = [sum(int(style(n)[0][i : i + 2], 16) for i in (1, 3, 5)) for n in names]
        assert lightness == sorted(lightness, reverse=True)
        assert style(f"{ONE}@1e-3")[0] == style(ONE)[0]

    def test_order(self) -> None:
        names = [f"{ONE}@1e-3", "zz", f"{ONE}@3e-4", RANDOM, BASE, ONE, ONE]
        assert ordered(names) == [BASE, RANDOM, ONE, f"{ONE}@3e-4", f"{ONE}@1e-3", "zz"]

    def test_texts(self) -> None:
        assert safe("<a href='x'>&$y$</a>") == "&lt;a href='x'&gt;&amp;&#36;y&#36;&lt;/a&gt;"
        assert short("abcdef<", 5) == "abcd…"
        assert short("<b>", 5) == "&lt;b&gt;"
        assert (count(1, "seed"), count(1200, "pair")) == ("1 seed", "1,200 pairs")

    def test_rounded(self) -> None:
        assert rounded([1.23456789, math.nan, math.inf, 0.0]) == [1.2346, None, None, 0.0]

    @pytest.mark.parametrize(
        ("low", "high", "ticks"),
        [
            (90, 1100, [100, 200, 500, 1000]),
            (1500, 2600, [1500, 2000]),
            (1e-6, 1e-1, [1e-6, 1e-4, 1e-2]),
            (0.9, 1.1, [1.0]),
            (2.1, 2.2, [2.1, 2.2]),
        ],
    )
    def test_log_ticks(self, low: float, high: float, ticks: list[float]) -> None:
        assert log_ticks(low, high, 4) == pytest.approx(ticks)


NAMES = (BASE, RANDOM, ONE, "asha-ohgw-3step")


class TestSameLookInAnySubset:
    @pytest.mark.parametrize("names", [c for k in (1, 2, 3, 4) for c in itertools.combinations(NAMES, k)])
    def test_lines(self, names: tuple[str, ...]) -> None:
        curves = curves_of({(v, 0): [(10, 0.2), (100, 0.5)] for v in reversed(names)})
        times = times_of([(v, 0, 50, 100) for v in reversed(names)])
        trials = pd.DataFrame([trial(v) for v in reversed(names)])
        for figure in (
            figures.best_value(curves, "s", []),
            figures.survival_of_times(times, "s", 0.9),
            figures.survival(trials, (3,), "s"),
        ):
            assert [t.name for t in figure.data if t.name] == [n for n in NAMES if n in names]
            for name in names:
                line = by_name(figure, name).line
                assert (line.color, line.dash) == style(name)[:2]
            assert figure.layout.showlegend


class TestBestValue:
    def test_median_and_quartiles_by_hand(self) -> None:
        best = {0: 0.1, 1: 0.2, 2: 0.4, 3: 0.8}
        curves = curves_of({(ONE, s): [(10, b), (20, b + 0.01)] for s, b in best.items()})
        high, low, middle = figures.best_value(curves, "s", []).data
        # Quartiles of 0.1, 0.2, 0.4, 0.8: 0.175, 0.3, 0.5.
        assert (low.y[0], middle.y[0], high.y[0]) == pytest.approx((0.175, 0.3, 0.5))
        assert (low.y[-1], middle.y[-1], high.y[-1]) == pytest.approx((0.185, 0.31, 0.51))
        assert (middle.x[0], middle.x[-1]) == (10, 20)
        assert middle.line.shape == "hv"

    def test_stops_where_fewer_than_half_are_observed(self) -> None:
        ends = {0: 100, 1: 200, 2: 300, 3: 1000, 4: 2000}
        curves = curves_of({(ONE, s): [(10, 0.1 * (s + 1)), (end, 0.9)] for s, end in ends.items()})
        middle = by_name(figures.best_value(curves, "s", []), ONE)
        # Three of five cells go on until 300, two until 1000.
        assert 280 < middle.x[-1] <= 300
        beyond = [y for x, y in zip(middle.x, middle.y, strict=True) if 105 < x < 195]
        assert beyond == pytest.approx([0.35] * len(beyond))
        assert beyond

    def test_a_cell_that_only_diverged_counts_as_not_observed(self) -> None:
        cells = {(ONE, s): [(10, math.nan), (100, math.nan)] for s in (0, 1, 2)}
        curves = curves_of({**cells, (ONE, 3): [(10, 0.5), (100, 0.6)], (BASE, 0): [(10, 0.5), (100, 0.6)]})
        assert {t.name for t in figures.best_value(curves, "s", []).data if t.name} == {BASE}

    def test_a_single_epoch_is_a_point(self) -> None:
        point = by_name(figures.best_value(curves_of({(ONE, 0): [(10, 0.2)]}), "s", []), ONE)
        assert (point.mode, set(point.x), set(point.y)) == ("markers", {10}, {0.2})
        assert point.marker.color == style(ONE)[0]

    def test_pilots_are_left_out(self) -> None:
        curves = curves_of({("pilot", 9): [(1, 0.3)], (ONE, 0): [(10, 0.2), (15, 0.5)]})
        figure = figures.best_value(curves, "s", [])
        assert [t.name for t in figure.data if t.name] == [ONE]
        assert "1 seed" in figure.layout.title.text

    def test_targets_are_labelled_lines(self) -> None:
        figure = figures.best_value(CURVES, "s", [0.95, 0.9])
        assert sorted(s.y0 for s in figure.layout.shapes) == [0.9, 0.95]
        labels = {a.text: a for a in figure.layout.annotations}
        assert set(labels) == {"τ = 0.9", "τ = 0.95"}
        assert labels["τ = 0.9"].yanchor == "top"
        assert labels["τ = 0.9"].x != labels["τ = 0.95"].x

    def test_other_budgets_and_scales(self) -> None:
        seconds = figures.best_value(CURVES, "s", [], budget="device_s")
        assert seconds.layout.xaxis.title.text.endswith("(device seconds)")
        assert by_name(seconds, ONE).x[-1] == pytest.approx(100)
        assert seconds.layout.xaxis.type == "log"
        near = figures.best_value(curves_of({(ONE, 0): [(10, 0.2), (20, 0.5)]}), "s", [])
        assert near.layout.xaxis.type is None


class TestPairedTimes:
    TIMES = times_of(
        [
            *((BASE, 0, 1000, 5000), (ONE, 0, 800, 4000)),  # both reached
            *((BASE, 1, 1000, 5000), (ONE, 1, 9000, 4000)),  # the variation did not
            *((BASE, 2, 9000, 3000), (ONE, 2, 900, 4000)),  # the baseline did not
            *((BASE, 3, 9000, 3000), (ONE, 3, 9000, 4000)),  # neither did
            *((BASE, 4, 3500, 5000), (ONE, 4, 700, 2000)),  # the baseline only beyond the shared budget
            *((BASE, 6, 600, 3000), (ONE, 6, 3500, 4000)),  # the variation only beyond it
            (ONE, 5, 800, 4000),  # no pair
        ]
    )

    def test_points_are_where_they_belong(self) -> None:
        (points,) = markers(figures.paired_times(self.TIMES, comparison_of(ONE), "s", 0.9))
        found = list(zip(points.text, points.x, points.y, points.marker.symbol, strict=True))
        assert found == [
            ("seed 0", 1000, 800, "circle"),
            ("seed 1", 1000, 4000, "triangle-up-open"),
            ("seed 2", 3000, 900, "triangle-right-open"),
            ("seed 3", 3000, 3000, "triangle-ne-open"),
            ("seed 4", 2000, 700, "triangle-right-open"),
            ("seed 6", 600, 3000, "triangle-up-open"),
        ]
        assert points.marker.color == style(ONE)[0]

    def test_ratio_band_and_diagonal(self) -> None:
        figure = figures.paired_times(self.TIMES, comparison_of(ONE), "s", 0.9)
        band, diagonal, ratio = figure.data[:3]
        assert np.array(diagonal.y) == pytest.approx(np.array(diagonal.x))
        assert np.array(ratio.y) / np.array(ratio.x) == pytest.approx(0.8, rel=1e-3)
        shares = np.array(band.y, dtype=float) / np.array(band.x, dtype=float)
        assert shares == pytest.approx([0.7, 0.7, 0.95, 0.95], rel=1e-3)
        assert band.fill == "toself"
        # Both axes show the same span, so that the diagonal is one.
        assert figure.layout.xaxis.range == figure.layout.yaxis.range
        assert figure.layout.xaxis.type == figure.layout.yaxis.type == "log"

    def test_the_panel_says_what_was_found(self) -> None:
        figure = figures.paired_times(self.TIMES, comparison_of(ONE), "s", 0.9)
        (panel,) = figure.layout.annotations
        for part in (f"<b>{ONE}</b>", "ratio 0.80 [0.70, 0.95]", "4 pairs, 1 unordered", "p = 0.02 (Holm)"):
            assert part in panel.text

    def test_too_few_pairs_and_no_interval(self) -> None:
        few = comparison_of(ONE, enough=False, ratio_low=math.nan, ratio_high=math.nan, pairs=1, unknown=0)
        figure = figures.paired_times(self.TIMES, few, "s", 0.9)
        text = figure.layout.annotations[0].text
        assert "ratio 0.80<br>1 pair<br>too few pairs for a test" in text
        assert "p =" not in text
        assert all(t.fill is None for t in figure.data)

    def test_only_this_target_budget_and_reference_are_shown(self) -> None:
        rows = [
            comparison_of(ONE),
            comparison_of(ONE, target=0.8, ratio=7.0),
            comparison_of(ONE, budget="wall_s", ratio=7.0),
            comparison_of(ONE, against=RANDOM, ratio=7.0),
            comparison_of(RANDOM, pairs=0, ratio=7.0),
        ]
        figure = figures.paired_times(self.TIMES, pd.concat(rows), "s", 0.9)
        assert len(markers(figure)) == 1
        assert "7.0" not in words(figure)

    def test_against_a_control(self) -> None:
        times = times_of([(RANDOM, 0, 400, 900), (ONE, 0, 300, 900)])
        figure = figures.paired_times(times, comparison_of(ONE, against=RANDOM), "s", 0.9, against=RANDOM)
        (points,) = markers(figure)
        assert (points.x, points.y) == ((400,), (300,))
        assert figure.layout.xaxis.title.text == f"{RANDOM} (mbu)"

    def test_with_the_real_comparisons(self) -> None:
        rows = [(v, s, 1000 + 37 * s, 5000) for v in VARIATIONS for s in range(8)]
        times = times_of(rows)
        figure = figures.paired_times(times, comparisons(times), SOURCE, 0.9)
        assert len(markers(figure)) == len(VARIATIONS) - 1
        assert all("ratio 1.00" in a.text for a in figure.layout.annotations)


class TestSurvivalOfTimes:
    def test_product_limit_by_hand(self) -> None:
        times = times_of([(ONE, 0, 10, 99), (ONE, 1, 999, 20), (ONE, 2, 30, 99), (ONE, 3, 999, 40)])
        curve, ticks = figures.survival_of_times(times, "s", 0.9).data
        # 1, then 3/4 at 10; censored at 20; 3/4 · 1/2 at 30; censored at 40.
        assert curve.x == (0, 10, 20, 30, 40)
        assert curve.y == pytest.approx((1, 0.75, 0.75, 0.375, 0.375))
        assert curve.line.shape == "hv"
        assert (ticks.x, ticks.y) == ((20, 40), (0.75, 0.375))

    def test_no_ticks_where_all_arrived(self) -> None:
        figure = figures.survival_of_times(times_of([(ONE, 0, 10, 99)]), "s", 0.9)
        assert len(figure.data) == 1
        assert figure.data[0].y == (1, 0)

    def test_other_targets_and_cells_without_an_epoch_do_not_count(self) -> None:
        rows = pd.concat(
            [
                times_of([(ONE, 0, 10, 99), (ONE, 1, math.inf, 0)]),
                times_of([(RANDOM, 0, 10, 99)], target=0.5),
            ]
        )
        figure = figures.survival_of_times(rows, "s", 0.9)
        assert [t.name for t in figure.data] == [ONE]
        assert "1 seed" in figure.layout.title.text


class TestOverhead:
    CELLS = cells_of(
        *((BASE, s, 0, 0, 0, 100 * (s + 1)) for s in range(4)),
        *((ONE, s, o, 2 * o, 3 * o, 110 * (s + 1)) for s, o in enumerate((0.1, 0.2, 0.4, 0.8))),
    )

    def test_medians_and_quartiles_by_hand(self) -> None:
        figure = figures.overhead_bars(self.CELLS, "s")
        mbu, seconds, flops, memory = figure.data
        # Quartiles of 0.1, 0.2, 0.4, 0.8: 0.175, 0.3, 0.5.
        assert [b.x[0] for b in (mbu, seconds, flops)] == pytest.approx([0.3, 0.6, 0.9])
        assert (mbu.error_x.array[0], mbu.error_x.arrayminus[0]) == pytest.approx((0.2, 0.125))
        # Each cell against the baseline of its own seed.
        assert memory.x[0] == pytest.approx(0.1)
        assert memory.error_x.array[0] == pytest.approx(0, abs=1e-9)
        assert mbu.y == (ONE,)
        assert mbu.marker.color == (style(ONE)[0],)

    def test_limits_are_in_their_panels(self) -> None:
        figure = figures.overhead_bars(self.CELLS, "s")
        assert {(s.x0, s.xref) for s in figure.layout.shapes} == {(0.05, "x2"), (0.10, "x4")}
        labels = {a.text: a for a in figure.layout.annotations if "limit" in a.text}
        assert (labels["limit 5%"].xref, labels["limit 10%"].xref) == ("x2", "x4")
        assert "device seconds" in words(figure)
        assert "peak memory (process)" in words(figure)

    def test_graphics_memory_where_it_was_measured(self) -> None:
        cells = self.CELLS.assign(peak_vram=[100.0] * 4 + [150.0] * 4)
        figure = figures.overhead_bars(cells, "s")
        assert figure.data[3].x[0] == pytest.approx(0.5)
        assert "peak memory (GPU)" in words(figure)

    def test_a_panel_without_values_says_so_and_has_no_limit(self) -> None:
        cells = self.CELLS.assign(overhead_flops=math.nan, peak_ram=math.nan)
        figure = figures.overhead_bars(cells, "s")
        missing = [a for a in figure.layout.annotations if a.text == "not recorded"]
        assert [a.xref for a in missing] == ["x3 domain", "x4 domain"]
        assert {s.x0 for s in figure.layout.shapes} == {0.05}

    def test_no_baseline_no_memory(self) -> None:
        figure = figures.overhead_bars(self.CELLS[self.CELLS["variation"] == ONE], "s")
        assert figure.data[3].x == (None,)
        assert figure.data[0].x[0] == pytest.approx(0.3)


class TestEtaSensitivity:
    def test_values(self) -> None:
        figure = figures.eta_sensitivity(sweep(), "s")
        (dots,) = markers(figure)
        assert dots.x == (1e-4, 1e-3, 1e-4, 1e-3)
        assert dots.y == pytest.approx((0.5, 0.5, 2.0, 2.0))
        assert by_name(figure, "LOESS").y == (0.9, 0.9)
        assert by_name(figure, "95% band over seeds").y == (0.6, 0.6)
        assert by_name(figure, "95% band over seeds").fill == "tonexty"
        assert figure.data[0].y == (1.3, 1.3)
        assert "curvature 0.30 [0.10, 0.50]" in words(figure)
        assert figure.layout.xaxis.type == "log"

    def test_pairs_of_unknown_order_are_hollow_and_counted(self) -> None:
        given = sweep()
        given.points.loc[0, "unknown"] = True
        figure = figures.eta_sensitivity(given, "s.yaml")
        (points,) = markers(figure)
        assert list(points.marker.symbol) == ["circle-open", "circle", "circle", "circle"]
        assert "1 of 4 pairs of unknown order" in words(figure)

    def test_points_without_a_curve_say_why(self) -> None:
        figure = figures.eta_sensitivity(sweep("only two values of η_h < 4"), "s")
        assert len(figure.data) == 1
        assert "only two values of η_h &lt; 4" in words(figure)
        assert "curvature" not in words(figure)


class TestSurvival:
    def test_shares_by_hand(self) -> None:
        epochs = {0: (3, 3, 9, 27), 1: (3, 9, 9, 27), 2: (9, 27, 27, 27)}
        trials = pd.DataFrame(
            [trial(ONE, s, n, epochs=e) for s, own in epochs.items() for n, e in enumerate(own)]
        )
        (line,) = figures.survival(trials, (3, 9), "s").data
        # Beyond 3: 1/2, 3/4, 1; beyond 9: 1/4, 1/4, 3/4.
        assert line.y == (0.75, 0.25)
        assert line.error_y.array == pytest.approx((0.125, 0.25))
        assert line.error_y.arrayminus == pytest.approx((0.125, 0.0))

    def test_running_interrupted_and_pilot_trials_do_not_count(self) -> None:
        trials = pd.DataFrame(
            [
                trial(epochs=27),
                trial(number=1, epochs=1, state="RUNNING"),
                trial(number=2, epochs=1, counted=False, state="FAIL"),
                trial("pilot", epochs=1),
            ]
        )
        (line,) = figures.survival(trials, (3,), "s").data
        assert (line.name, line.y) == (ONE, (1.0,))

    def test_no_rung(self) -> None:
        assert "no rung" in words(figures.survival(TRIALS, (), "s"))


class TestPsiShift:
    def test_moves_are_in_unit_coordinates_and_signed(self) -> None:
        lr, momentum = figures.psi_shift(TRIALS, RANGES, "s").data
        # +0.4 decades of four; -0.05 of a width of 0.5.
        assert (lr.x, lr.y[0]) == ((0.01,), pytest.approx(math.asinh(0.1 / 1e-4), rel=1e-3))
        assert (momentum.x, momentum.y[0]) == ((0.25,), pytest.approx(-math.asinh(0.1 / 1e-4), rel=1e-3))

    def test_ticks_are_moves(self) -> None:
        axis = figures.psi_shift(TRIALS, RANGES, "s").layout.yaxis
        ticks = dict(zip(axis.ticktext, axis.tickvals, strict=True))
        assert ticks["0"] == 0
        assert ticks["0.1"] == pytest.approx(math.asinh(1000), rel=1e-3) == -ticks["-0.1"]
        assert axis.range[1] > ticks["0.1"]

    def test_what_ended_at_a_bound_is_an_open_circle(self) -> None:
        trials = pd.DataFrame([trial(), trial(number=1, clipped="momentum,x"), trial(number=2, clipped="mo")])
        lr, momentum = figures.psi_shift(trials, RANGES, "s").data
        assert lr.marker.symbol == style(ONE)[2]
        assert momentum.marker.symbol == ("diamond", "circle-open", "diamond")

    def test_no_step_is_no_move(self) -> None:
        lr, _ = figures.psi_shift(pd.DataFrame([trial(step_lr=math.nan)]), RANGES, "s").data
        assert lr.y == (0,)

    def test_axes_are_native_and_logarithmic_where_the_search_is(self) -> None:
        figure = figures.psi_shift(TRIALS, RANGES, "s")
        assert (figure.layout.xaxis.type, figure.layout.xaxis2.type) == ("log", None)
        assert figure.layout.xaxis.title.text == "suggested lr"
        assert figure.layout.xaxis.ticktext == ("0.0001", "0.01", "1")

    def test_parameters_that_are_markup_are_shown_as_they_are(self) -> None:
        name = "<i>x</i>"
        trials = pd.DataFrame([trial(**{f"suggested_{name}": 0.1, f"step_{name}": 0.0})])
        figure = figures.psi_shift(trials, {name: RANGES["momentum"]}, "s")
        assert figure.layout.xaxis.title.text == "suggested &lt;i&gt;x&lt;/i&gt;"

    def test_only_structural_parameters(self) -> None:
        assert "no continuous parameter" in words(figures.psi_shift(TRIALS, {}, "s"))


class TestBenefit:
    def test_counts_are_where_they_belong(self) -> None:
        (panel,) = figures.benefit_heatmap(BENEFIT, "s").data
        found = {
            (round(panel.x[j]), panel.y[i] > 0)
            for i, row in enumerate(panel.z)
            for j, n in enumerate(row)
            if n
        }
        # 10 ** 1 with a gain, 10 ** -1 with a loss.
        assert found == {(1, True), (-1, False)}
        assert sum(n for row in panel.z for n in row if n) == 2

    def test_extremes_are_in_the_last_rows_and_bad_values_nowhere(self) -> None:
        values = [*((1.0, 0.01 * (-1) ** i) for i in range(200)), (1.0, 5.0), (1.0, -5.0)]
        bad = [(0.0, 0.1), (math.inf, 0.1), (1.0, math.nan)]
        table = pd.DataFrame(values + bad, columns=["gradient_norm", "benefit"])
        (panel,) = figures.benefit_heatmap(table.assign(variation=ONE, seed=0, config_index=0), "s").data
        rows = [sum(n for n in row if n) for row in panel.z]
        assert sum(rows) == 202
        assert rows[0] >= 1
        assert rows[-1] >= 1
        assert max(panel.y) < 0.1

    def test_panels(self) -> None:
        table = pd.concat([BENEFIT, BENEFIT.assign(variation="<u>v</u>")])
        figure = figures.benefit_heatmap(table, "s")
        titles = [a.text for a in figure.layout.annotations]
        assert titles == [ONE, "&lt;u&gt;v&lt;/u&gt;"]
        assert "4 pairs" in figure.layout.title.text


class TestLearningCurves:
    def test_best_in_front(self) -> None:
        steps = steps_of({0: [0.1, 0.6], 1: [0.2], 2: [0.3, 0.7, 0.5]}, {1: "PRUNED", 2: "PRUNED"})
        figure = figures.learning_curves(steps, "s")
        assert [t.name for t in figure.data] == ["pruned", "complete", "best: trial 2 (pruned)"]
        front = figure.data[-1]
        assert (front.x, front.y) == ((1, 2, 3), (0.3, 0.7, 0.5))
        assert front.line.width > figure.data[0].line.width
        assert "3 trials" in words(figure)

    def test_epochs_that_diverged_or_do_not_count_are_left_out(self) -> None:
        steps = steps_of({0: [0.1, math.nan, 0.2], 1: [0.9]})
        steps.loc[steps["trial"] == 1, "counted"] = False
        (line,) = figures.learning_curves(steps, "s").data
        assert (line.x, line.y) == ((1, 3), (0.1, 0.2))

    def test_a_large_cell_is_thinned_and_says_so(self) -> None:
        draw = np.random.default_rng(0)
        steps = steps_of({n: draw.uniform(0.1234, 0.8, 200).tolist() for n in range(100)})
        steps.loc[150, "val_metric"] = 0.987
        figure = figures.learning_curves(steps, SOURCE)
        assert len(figure.to_json()) < 30_000
        assert len(figure.data) == 60
        assert max(figure.data[-1].y) == 0.987
        assert all(t.x[-1] == 200 for t in figure.data)
        assert "the best 60 of 100 trials; every 12 epochs" in words(figure)


class TestWorkers:
    def test_bars(self) -> None:
        trials = pd.DataFrame(
            [
                trial(number=0, start=100, end=110, worker="b:2"),
                trial(number=1, start=102, end=105, worker="a:1", state="PRUNED"),
                trial(number=2, start=112, end=math.nan, worker="a:1", state="RUNNING"),
                trial(number=3, start=math.nan, end=math.nan, worker=None, state="WAITING"),
            ]
        )
        figure = figures.workers(trials, "s")
        bars = {t.name: (t.base[0], t.x[0], t.y[0], t.customdata[0]) for t in figure.data}
        assert bars == {
            "complete": (0, 10, "worker 2", 0),
            "pruned": (2, 3, "worker 1", 1),
            "running": (12, 0, "worker 1", 2),
        }
        assert figure.layout.yaxis.categoryarray == ("worker 2", "worker 1")
        assert len({t.marker.color for t in figure.data}) == 3

    @pytest.mark.parametrize(
        ("span", "unit", "shown"), [(170, "seconds", 170), (3600, "minutes", 60), (36_000, "hours", 10)]
    )
    def test_units(self, span: float, unit: str, shown: float) -> None:
        figure = figures.workers(pd.DataFrame([trial(start=5.0, end=5.0 + span)]), "s")
        assert figure.layout.xaxis.title.text == f"time since the cell began ({unit})"
        assert figure.data[0].x == (shown,)


@pytest.fixture(scope="module")
def many() -> pd.DataFrame:
    draw = np.random.default_rng(0)
    rows = [
        trial(v, s, n, suggested_lr=10 ** draw.uniform(-4, 0), step_lr=draw.normal(), clipped="lr")
        for v in (BASE, RANDOM, ONE, "asha-ohgw-3step")
        for s in range(32)
        for n in range(50)
    ]
    return pd.DataFrame(rows)


class TestSize:
    """Four variations, 32 seeds, 50 trials of 30 epochs; eleven variations; one cell of 50 trials."""

    def test_across_cells(self, many: pd.DataFrame) -> None:
        draw = np.random.default_rng(0)
        cells = {
            (v, s): list(zip(range(15, 16_000, 60), np.sort(draw.uniform(0.1, 1, 270)), strict=False))
            for v in VARIATIONS
            for s in range(32)
        }
        assert len(figures.best_value(curves_of(cells), SOURCE, [0.9]).to_json()) < 150_000
        rows = [(v, s, draw.uniform(10, 99_999), 60_000) for v in VARIATIONS for s in range(32)]
        times = times_of(rows)
        found = pd.concat([comparison_of(v) for v in VARIATIONS if v != BASE])
        assert len(figures.paired_times(times, found, SOURCE, 0.9).to_json()) < 60_000
        assert len(figures.survival_of_times(times, SOURCE, 0.9).to_json()) < 60_000
        figure = figures.psi_shift(many, RANGES, SOURCE)
        assert len(figure.to_json()) < 150_000
        assert "375 trials of each variation" in words(figure)

    def test_of_a_cell(self, many: pd.DataFrame) -> None:
        own = many[(many["variation"] == ONE) & (many["seed"] == 0)]
        draw = np.random.default_rng(0)
        steps = steps_of({n: draw.uniform(0.1, 0.9, 200).tolist() for n in range(50)})
        for figure in (
            figures.psi_shift(own, RANGES, SOURCE),
            figures.workers(own, SOURCE),
            figures.learning_curves(steps, SOURCE),
        ):
            assert len(figure.to_json()) < 30_000
