"""The page of a report: evidence, the studies beside it and figures, in the order of reading."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pandas as pd

from optuna_ohgw import drift, figures
from optuna_ohgw.beside import Side
from optuna_ohgw.evidence import Evidence
from optuna_ohgw.sampler import HISTORY_FREE
from optuna_ohgw.sensitivity import Sensitivity, eta_sensitivity, kept_speedup
from optuna_ohgw.variations import base_of, eta_of, is_baseline

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True)
class Page:
    """What a report shows of a study.

    Attributes:
        evidence: The study.
        sides: The studies beside it.
    """

    evidence: Evidence
    sides: tuple[Side, ...] = ()

    @cached_property
    def shift(self) -> pd.DataFrame:
        """How ψ moved, per variation and parameter."""
        return drift.shift(self.evidence.records.trials, self.evidence.spec.ranges)

    @cached_property
    def divergence(self) -> pd.DataFrame:
        """Divergence between suggested, trained and promoted configurations."""
        spec = self.evidence.spec
        rungs = spec.scheduler.rungs(spec.task.epochs)
        first = rungs[0] if rungs else spec.task.epochs
        return drift.divergence(self.evidence.records.trials, spec.ranges, first_rung=first)

    @cached_property
    def benefit(self) -> pd.DataFrame:
        """Paired trial differences beside the size of the hyper-gradient."""
        return drift.benefit(
            self.evidence.records.steps,
            self.evidence.records.trials,
            maximize=self.evidence.spec.metric.maximize,
        )

    @cached_property
    def correlation(self) -> pd.DataFrame:
        """Rank correlation of size and benefit, per variation."""
        return drift.benefit_correlation(self.benefit)

    @cached_property
    def sensitivities(self) -> list[tuple[str, str, Sensitivity]]:
        """Source, base variation and result of each η_h sweep: this study's or one's beside it."""
        found = []
        for one in self.with_role("eta"):
            bases = dict.fromkeys(base_of(v) for v in one.spec.variations if eta_of(v) is not None)
            for base in bases:
                eta = one.spec.warm_start.eta_h
                result = eta_sensitivity(one.times, one.primary, eta, base=base)
                found.append((one.source, base, result))
        return found

    @cached_property
    def noise(self) -> pd.DataFrame:
        """Share of the speed-up that is kept under label noise, per variation and noisy study."""
        rows = []
        for other in self.with_role("noise"):
            # This study may be the noisy one, and the clean one stand beside it.
            clean, noisy = sorted((self.evidence, other), key=lambda one: one.spec.label_noise)
            for variation in clean.spec.variations:
                if is_baseline(variation) or variation not in noisy.spec.variations:
                    continue
                kept, why = kept_speedup(
                    _at(clean.times, clean.primary), _at(noisy.times, noisy.primary), variation
                )
                rows.append(
                    {
                        "clean": clean.source,
                        "source": noisy.source,
                        "variation": variation,
                        **asdict(kept),
                        "why": why,
                    }
                )
        return pd.DataFrame(rows, columns=["clean", "source", "variation", "value", "low", "high", "why"])

    def sensitivity_summary(self) -> list[dict[str, Any]]:
        """Return the sweeps as plain values."""
        return [
            {
                "source": source,
                "variation": base,
                "points": result.points,
                "eta_h": list(result.grid),
                "ratio": list(result.fit),
                "ratio_low": list(result.low),
                "ratio_high": list(result.high),
                "curvature": asdict(result.curvature),
                "best_eta_h": result.best_eta,
                "reason": result.reason,
            }
            for source, base, result in self.sensitivities
        ]

    def with_role(self, role: str) -> list[Evidence]:
        """Return the studies beside this one with a role; an η_h sweep may be this one itself."""
        own = role == "eta" and any(eta_of(v) is not None for v in self.evidence.spec.variations)
        beside = [side.evidence for side in self.sides if side.role == role and side.evidence is not None]
        return [self.evidence, *beside] if own else beside

    def subtitle(self) -> str:
        """Return what the study is, in a line."""
        spec = self.evidence.spec
        pairing = "paired" if spec.sampler in HISTORY_FREE else "seed-paired only"
        search = "learning curves of a table" if spec.replays else f"{spec.sampler} search"
        halving = spec.scheduler
        how = (
            f", bootstrap_count {halving.bootstrap_count}" if halving.name == "asha" else f", {halving.name}"
        )
        return (
            f"{self.evidence.source}: {len(spec.seeds)} {pairing} seeds, {len(spec.variations)} variations, "
            f"{search}{how}"
        )

    @cached_property
    def figures(self) -> dict[str, go.Figure]:
        """The figures across variations, by name."""
        e, spec = self.evidence, self.evidence.spec
        target = e.primary if e.primary is not None else e.targets[0]
        rungs = spec.scheduler.rungs(spec.task.epochs)
        variation, seed = self._shown_cell()
        steps, trials = (_cell(t, variation, seed) for t in (e.records.steps, e.records.trials))
        where = f"{variation}, seed {seed} ({e.source})"
        drawn = {
            "best-value": figures.best_value(e.curves, e.source, e.targets, metric=spec.metric),
            "paired-times": figures.paired_times(e.times, e.comparisons, e.source, target),
            "survival-of-times": figures.survival_of_times(e.times, e.source, target),
            "overhead": figures.overhead_bars(e.cells, e.source),
            "psi-shift": figures.psi_shift(e.records.trials, spec.ranges, e.source),
            "gradient-benefit": figures.benefit_heatmap(self.benefit, e.source, metric=spec.metric),
            "survival": figures.survival(e.records.trials, rungs, e.source),
            "learning-curves": figures.learning_curves(steps, where, spec.metric),
            "workers": figures.workers(trials, where),
        }
        for source, base, result in self.sensitivities:
            name = "eta-sensitivity" + (f"-{base}" if "eta-sensitivity" in drawn else "")
            drawn[name] = figures.eta_sensitivity(result, f"{base}: {source}")
        return drawn

    def _shown_cell(self) -> tuple[str, int]:
        """Return the cell shown as an example: that with the best validation value."""
        cells = self.evidence.cells.dropna(subset=["best_val"])
        if cells.empty:
            return self.evidence.spec.variations[0], self.evidence.spec.seeds[0]
        best = cells.sort_values("best_val", kind="stable").iloc[
            -1 if self.evidence.spec.metric.maximize else 0
        ]
        return str(best["variation"]), int(best["seed"])

    def cell_figures(self) -> dict[str, dict[str, go.Figure]]:
        """Return the figures of every cell with an epoch, by the name of its Optuna study."""
        records, spec, drawn = self.evidence.records, self.evidence.spec, {}
        steps = dict(tuple(records.steps.groupby(["variation", "seed"])))
        trials = dict(tuple(records.trials.groupby(["variation", "seed"])))
        for (variation, seed), own in steps.items():
            where = f"{variation}, seed {seed} ({self.evidence.source})"
            name = f"{spec.name}/{variation}/seed-{seed:04d}"
            drawn[name] = {
                "learning-curves": figures.learning_curves(own, where, spec.metric),
                "workers": figures.workers(trials[variation, seed], where),
                "psi-shift": figures.psi_shift(trials[variation, seed], spec.ranges, where),
            }
        return drawn


def _cell(table: pd.DataFrame, variation: str, seed: int) -> pd.DataFrame:
    return table[(table["variation"] == variation) & (table["seed"] == seed)]


def _at(times: pd.DataFrame, target: float | None) -> pd.DataFrame:
    return times[times["target"] == target]
