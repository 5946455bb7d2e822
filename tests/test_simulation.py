"""What the paired statistics say of storages in which the truth is planted."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import optuna
import pandas as pd
import pytest

from optuna_ohgw import metrics
from optuna_ohgw.records import read_records
from optuna_ohgw.verdict import comparisons
from tests.planted import PAIR, planted_spec, planted_storage, planted_times

# Fixed before the first run.
SEED_OF_EFFECT = 101
SEED_OF_NULL = 102
SEED_OF_NULL_CENSORED = 103
SEED_OF_NULL_TIED = 104

SEEDS = 32
TARGET = 0.9

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield
    optuna.logging.set_verbosity(before)


def draws(rng: int, count: int, effect: float = 1.0, **planted: float | bool) -> Iterator[pd.DataFrame]:
    """Yield the times of ``count`` studies of 32 pairs, written to a storage and read back.

    One storage holds all studies, 32 seeds each, since writing is dear; each has a budget of its own.
    """
    generator = np.random.default_rng(rng)
    cells = {}
    for draw in range(count):
        t, budget = planted_times(generator, SEEDS, effect, **planted)
        for i in range(SEEDS):
            for j, variation in enumerate(PAIR):
                cells[variation, draw * SEEDS + i] = (t[i, j], budget)
    spec = planted_spec(PAIR, range(count * SEEDS), target=TARGET)
    records = read_records(planted_storage(cells, spec), spec)
    times = metrics.times(metrics.curves(records), records, [TARGET])
    for _, study in times.groupby(times["seed"] // SEEDS):
        yield study


def compared(study: pd.DataFrame) -> pd.Series:
    found = comparisons(study)
    row = found[found["budget"] == "mbu"].iloc[0]
    assert (len(found), row["pairs"], row["missing"]) == (3, SEEDS, 0)
    return row


def test_the_interval_covers_a_planted_effect() -> None:
    rows = [compared(study) for study in draws(SEED_OF_EFFECT, 200, effect=0.8)]
    assert all(row["unknown"] == 0 for row in rows)
    covered = np.mean([row["ratio_low"] <= 0.8 <= row["ratio_high"] for row in rows])
    print(f"interval covers 0.80 in {covered:.1%} of 200 draws")
    assert covered >= 0.9
    # The estimate itself is not biased: 200 draws know its mean to 0.5%.
    assert np.mean([row["ratio"] for row in rows]) == pytest.approx(0.8, rel=0.02)


@pytest.mark.parametrize(
    ("rng", "planted"),
    [
        (SEED_OF_NULL, {}),
        (SEED_OF_NULL_CENSORED, {"censored": 0.3}),
        (SEED_OF_NULL_TIED, {"ties": True}),
    ],
    ids=["plain", "censored", "tied"],
)
def test_no_effect_is_seldom_called_one(rng: int, planted: dict[str, float | bool]) -> None:
    rows = [compared(study) for study in draws(rng, 400, **planted)]
    censored = np.mean([(row["censored"] + row["reference_censored"]) / (2 * SEEDS) for row in rows])
    assert censored == pytest.approx(planted.get("censored", 0.0), abs=0.02)
    tied = np.mean([row["tied"] / SEEDS for row in rows])
    assert (tied > 0.1) == bool(planted.get("ties"))
    for p in ("p", "p_sign"):
        share = np.mean([row[p] < 0.05 for row in rows])
        print(f"{p} < 0.05 in {share:.2%} of 400 draws, {planted or 'plain'}; {tied:.0%} tied")
        assert share <= 0.08
        # A test that never rejects would pass too; the sign test, of few values, rejects least.
        assert share >= 0.01
