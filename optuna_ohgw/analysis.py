"""The analysis as functions on tables: read a study, measure, compare, draw; no torch, no training."""

from __future__ import annotations

from pathlib import Path

from optuna_ohgw.beside import Side, sides
from optuna_ohgw.censored import (
    TimeComparison,
    compare_times,
    kaplan_meier_median,
    restricted_mean,
)
from optuna_ohgw.comparison import comparisons
from optuna_ohgw.drift import benefit, benefit_correlation, divergence, knn_divergence, shift
from optuna_ohgw.evidence import Evidence, evidence_of, gather, summary_table
from optuna_ohgw.figures import (
    benefit_heatmap,
    best_value,
    learning_curves,
    overhead_bars,
    paired_times,
    psi_shift,
    survival,
    survival_of_times,
    workers,
)
from optuna_ohgw.figures import (
    eta_sensitivity as eta_figure,
)
from optuna_ohgw.metrics import cell_metrics, curves, pilot_target, times
from optuna_ohgw.opening import open_storage
from optuna_ohgw.records import Records, read_records
from optuna_ohgw.report import Page, open_page, write_report
from optuna_ohgw.sensitivity import Sensitivity, eta_sensitivity, kept_speedup, transfer
from optuna_ohgw.spec import load_spec
from optuna_ohgw.statistics import (
    Estimate,
    PairedDifference,
    hodges_lehmann,
    holm,
    paired_difference,
    sd_ratio,
    signed_rank,
)
from optuna_ohgw.verdict import across_studies, overall, verdicts

__all__ = [
    "Estimate",
    "Evidence",
    "Page",
    "PairedDifference",
    "Records",
    "Sensitivity",
    "Side",
    "TimeComparison",
    "across_studies",
    "benefit",
    "benefit_correlation",
    "benefit_heatmap",
    "best_value",
    "cell_metrics",
    "compare_times",
    "comparisons",
    "curves",
    "divergence",
    "eta_figure",
    "eta_sensitivity",
    "evidence_of",
    "gather",
    "hodges_lehmann",
    "holm",
    "kaplan_meier_median",
    "kept_speedup",
    "knn_divergence",
    "learning_curves",
    "open_page",
    "overall",
    "overhead_bars",
    "paired_difference",
    "paired_times",
    "pilot_target",
    "psi_shift",
    "read_records",
    "read_study",
    "restricted_mean",
    "sd_ratio",
    "shift",
    "sides",
    "signed_rank",
    "summary_table",
    "survival",
    "survival_of_times",
    "times",
    "transfer",
    "verdicts",
    "workers",
    "write_report",
]


def read_study(path: Path | str, overrides: tuple[str, ...] = ()) -> Records:
    """Return the tables of a study from its file, in one pass over its storage.

    Args:
        path: The study's YAML file.
        overrides: ``dotted.key=value`` pairs, as ``--set`` takes them.

    Raises:
        UserError: If the file is wrong or the storage is not there.
    """
    spec = load_spec(Path(path), overrides)
    return read_records(open_storage(spec.storage_url, create=False), spec)
