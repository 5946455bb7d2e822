"""Tables: stratified parts, encoding by the training part, and bad data told with file and row."""

from __future__ import annotations

import datetime
import decimal

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from optuna_ohgw.errors import UserError
from optuna_ohgw.tasks.tables import SHIPPED, load_tables


@pytest.mark.parametrize("data", SHIPPED)
def test_shipped_tables_are_split_by_class_and_standardised(data):
    one, other = (load_tables(data, None, seed=s, validation=0.2, test=0.2) for s in (0, 1))
    total = sum(len(part.classes) for part in one[:3])
    assert len(one.test.classes) == pytest.approx(0.2 * total, abs=1)
    assert (one.test.classes == other.test.classes).all()
    assert not np.array_equal(one.validation.classes, other.validation.classes) or not np.array_equal(
        one.validation.features, other.validation.features
    )
    shares = [np.bincount(part.classes, minlength=len(one.labels)) / len(part.classes) for part in one[:3]]
    assert np.ptp(shares, axis=0).max() < 0.05
    varied = one.train.features.std(0) > 0
    np.testing.assert_allclose(one.train.features.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(one.train.features.std(0)[varied], 1, atol=1e-4)


@pytest.fixture
def table():
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "size": rng.normal(size=60),
            "colour": rng.choice(["red", "green", "blue"], 60),
            "kept": rng.random(60) < 0.5,
            "kind": np.repeat(["a", "b"], 30),
        }
    )


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_categories_are_a_column_a_level_and_parts_share_them(table, tmp_path, suffix):
    path = tmp_path / f"t.{suffix}"
    table.to_csv(path, index=False) if suffix == "csv" else table.to_parquet(path)
    found = load_tables(str(path), "kind", seed=0, validation=0.2, test=0.2)
    assert found.names[0] == "size"
    assert {n for n in found.names if "colour" in n} == {"colour=blue", "colour=green", "colour=red"}
    assert found.labels == ["a", "b"]
    assert found.train.features.shape[1] == found.test.features.shape[1] == len(found.names)


ARROW = pd.ArrowDtype
DAYS = np.array([0.0, 1.0, 2.5, 40.0, 7.25, 19.0] * 10)


@pytest.mark.parametrize(
    "column",
    [
        pd.Timestamp("1999-12-31 18:00") + pd.to_timedelta(DAYS, unit="D"),
        pd.Timestamp("2024-03-30", tz="Europe/Zurich") + pd.to_timedelta(DAYS, unit="D"),
        pd.to_timedelta(DAYS, unit="D"),
        [datetime.date(2020, 2, 27) + datetime.timedelta(days=int(4 * day)) for day in DAYS],
        [decimal.Decimal(f"{day:.2f}") for day in DAYS],
        pd.array([decimal.Decimal(f"{day:.2f}") for day in DAYS], dtype=ARROW(pa.decimal128(9, 2))),
        pd.array(
            pd.Timestamp("2001-09-09") + pd.to_timedelta(DAYS, unit="D"), dtype=ARROW(pa.timestamp("us"))
        ),
    ],
    ids=["time", "time of a zone", "duration", "date", "decimal", "decimal of Arrow", "time of Arrow"],
)
def test_dates_and_decimals_are_numbers(table, tmp_path, column):
    table.assign(size=column).to_parquet(tmp_path / "t.parquet")
    found = load_tables(str(tmp_path / "t.parquet"), "kind", seed=0, validation=0.2, test=0.2)
    table.assign(size=DAYS).to_parquet(tmp_path / "plain.parquet")
    plain = load_tables(str(tmp_path / "plain.parquet"), "kind", seed=0, validation=0.2, test=0.2)
    assert found.names == plain.names
    np.testing.assert_allclose(found.train.features, plain.train.features, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("arrow", [False, True])
def test_dates_go_to_the_end_of_time(table, tmp_path, arrow):
    """An open end is often written as the year 9999, which nanoseconds do not reach."""
    dates = pd.Series([datetime.date(1, 1, 1), datetime.date(9999, 12, 31)] * 30, dtype=object)
    table.assign(size=dates.astype(ARROW(pa.date32())) if arrow else dates).to_parquet(tmp_path / "t.parquet")
    found = load_tables(str(tmp_path / "t.parquet"), "kind", seed=0, validation=0.2, test=0.2)
    assert found.names[0] == "size"
    assert len(np.unique(found.train.features[:, 0])) == 2


def without(table, row, column):
    table = table.copy()
    table.loc[row, column] = np.nan
    return table


def typed(table, row, column, value):
    table = table.astype({column: object})
    table.loc[row, column] = value
    return table


def test_a_column_that_pandas_kept_as_index_is_a_column(table, tmp_path):
    table.set_index("size").to_parquet(tmp_path / "t.parquet")
    tables = load_tables(str(tmp_path / "t.parquet"), "kind", seed=0, validation=0.2, test=0.2)
    assert "size" in tables.names


@pytest.mark.parametrize(
    ("change", "target", "told"),
    [
        (lambda t: t, "sort", "no column 'sort', only size, colour, kept, kind"),
        (lambda t: without(t, 16, "size"), "kind", r"t.csv, row 17: column 'size' has no value"),
        (lambda t: t.assign(size=np.inf), "kind", r"row 1: column 'size' has no value \(60 such rows\)"),
        (lambda t: without(t, 3, "kind"), "kind", "row 4: column 'kind' has no value"),
        (lambda t: t.assign(kind="a"), "kind", "has one class only, 'a'"),
        (lambda t: typed(t, 4, "size", "?"), "kind", r"row 5: column 'size' has '\?' among numbers \(1 such"),
        (lambda t: t, "size", "holds fractions, not classes"),
        (lambda t: t.iloc[:0], "kind", "has 0 rows"),
        (lambda t: t[["kind"]], "kind", "1 columns"),
        (lambda t: t.iloc[28:31], "kind", "cannot be drawn by class, the rarest has 1 rows"),
    ],
)  # fmt: skip
def test_bad_tables_are_told_in_a_line(table, tmp_path, change, target, told):
    path = tmp_path / "t.csv"
    change(table).to_csv(path, index=False)
    with pytest.raises(UserError, match=told) as caught:
        load_tables(str(path), target, seed=0, validation=0.2, test=0.2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("none.csv", None, "does not exist"),
        ("bad.csv", b"a,b\n1,2\n\xff\xfe,1\n", r"bad.csv is not UTF-8 \(line 3\)"),
        ("wide.csv", b"a,b\n1,2,x\n3,4,y\n", "rows of more values than its header"),
        ("bad.parquet", b"nothing", "cannot be read"),
    ],
)
def test_files_that_cannot_be_read_are_told(tmp_path, name, content, told):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=told):
        load_tables(str(tmp_path / name), None, seed=0, validation=0.2, test=0.2)


@pytest.mark.parametrize("data", ["boston", "../x", "/nowhere", "a/b/c"])
def test_unknown_names_are_told_with_what_there_is(data):
    with pytest.raises(UserError, match="breast-cancer, digits, iris, wine"):
        load_tables(data, None, seed=0, validation=0.2, test=0.2)


def test_a_configuration_of_the_hub_is_asked_for(monkeypatch, table):
    datasets = pytest.importorskip("datasets")
    asked = []
    loaded = {"train": datasets.Dataset.from_pandas(table)}
    monkeypatch.setattr("optuna_ohgw.tasks.tables.load_hub", lambda *named: asked.append(named) or loaded)
    load_tables("some/tables:one", "kind", seed=0, validation=0.2, test=0.2)
    load_tables("some/tables", "kind", seed=0, validation=0.2, test=0.2)
    assert asked == [("some/tables", "one"), ("some/tables", None)]
