"""Which way is better: one study planted as accuracy, and as its complement to be made small."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from planted import grown_storage, planted_spec

from optuna_ohgw.evidence import evidence_of
from optuna_ohgw.metric import ACCURACY, MEAN_RETURN, PERPLEXITY, Metric
from optuna_ohgw.records import read_records
from optuna_ohgw.spec_tasks import ImageSpec

LOSS = Metric("error", maximize=False, low=0.0, high=1.0)


def test_better_best_and_worst() -> None:
    assert ACCURACY.better(0.9, 0.8)
    assert PERPLEXITY.better(8.0, 9.0)
    assert not PERPLEXITY.better(8.0, 8.0)
    values = [3.0, None, 5.0, math.nan, 1.0]
    assert MEAN_RETURN.best(values) == 5.0
    assert PERPLEXITY.best(values) == 1.0
    assert math.isnan(ACCURACY.best([]))
    assert ACCURACY.best([None], default=-1.0) == -1.0
    for metric in (ACCURACY, PERPLEXITY):
        assert all(metric.better(v, metric.worst) for v in (-1e9, 0.0, 1e9))


def test_reached_is_at_the_target_or_better_and_never_nan() -> None:
    values = pd.Series([1.0, 2.0, 3.0, np.nan])
    assert MEAN_RETURN.reached(values, 2.0).tolist() == [False, True, True, False]
    assert PERPLEXITY.reached(values, 2.0).tolist() == [True, True, False, False]


@pytest.mark.parametrize(
    ("metric", "target", "told"),
    [
        (ACCURACY, 0.93, None),
        (ACCURACY, 1.0, None),
        (ACCURACY, 93.0, "is no accuracy above 0 and up to 1; give 0.93 for 93%"),
        (ACCURACY, 0.0, "is no accuracy above 0"),
        (PERPLEXITY, 60.0, None),
        (PERPLEXITY, 1.0, "is no perplexity above 1"),
        (MEAN_RETURN, -21.0, None),
    ],
)
def test_targets_that_cannot_be_reached_are_told(metric, target, told) -> None:
    found = metric.misplaced(target)
    assert found is None if told is None else (found is not None and told in found)


def test_a_study_of_errors_says_what_that_of_accuracies_says(monkeypatch: pytest.MonkeyPatch) -> None:
    variations = ("asha-baseline", "asha-random-warm", "asha-ohgw-1step")
    spec = planted_spec(variations, range(8), pilot_seeds=(1000, 1001), target=0.8)
    records = read_records(grown_storage(spec, effect={"asha-ohgw-1step": 0.6}), spec)
    plain = evidence_of(records, "study.yaml")

    monkeypatch.setattr(ImageSpec, "metric", LOSS)
    mirrored = replace(
        records,
        spec=spec.model_copy(update={"targets": (1 - 0.8,)}),
        cells=records.cells.assign(**{c: 1 - records.cells[c] for c in ("final_val", "final_test")}),
        trials=records.trials.assign(**{c: 1 - records.trials[c] for c in ("best", "last")}),
        steps=records.steps.assign(val_metric=1 - records.steps["val_metric"]),
    )
    other = evidence_of(mirrored, "study.yaml")
    assert other.primary == pytest.approx(1 - (plain.primary or 0))
    for column in ("mbu", "device_s", "wall_s", "reached"):
        assert other.times[column].tolist() == plain.times[column].tolist()
    assert plain.times["reached"].any()
    same = ["variation", "against", "faster", "slower", "tied", "ratio", "p_holm"]
    pd.testing.assert_frame_equal(other.comparisons[same], plain.comparisons[same])
    np.testing.assert_allclose(other.cells["best_val"], 1 - plain.cells["best_val"])
    outcomes = dict(zip(plain.verdicts["criterion"], plain.verdicts["outcome"], strict=True))
    mirrored_outcomes = dict(zip(other.verdicts["criterion"], other.verdicts["outcome"], strict=True))
    assert {k: v for k, v in outcomes.items() if k != "2"} == {
        k: v for k, v in mirrored_outcomes.items() if k != "2"
    }


def test_a_worse_final_error_fails_the_second_criterion(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = planted_spec(("asha-baseline", "asha-ohgw-1step"), range(8), target=0.8)
    records = read_records(grown_storage(spec), spec)
    monkeypatch.setattr(ImageSpec, "metric", LOSS)
    for factor, outcome in ((1.1, "fail"), (0.9, "pass"), (1.0, "pass")):
        own = records.cells["variation"] == "asha-ohgw-1step"
        base = records.cells.groupby("seed")["final_test"].transform("first")
        cells = records.cells.assign(final_test=np.where(own, base * factor, base))
        found = evidence_of(replace(records, cells=cells), "study.yaml").verdicts
        (row,) = found[found["criterion"] == "2"].to_dict("records")
        assert row["outcome"] == outcome
        assert row["what"] == "final test value at most 0.2% more"
