"""Tables for classification: scikit-learn's, a CSV or parquet file, or a data set of the hub."""

from __future__ import annotations

import datetime
import decimal
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from optuna_ohgw.errors import UserError
from optuna_ohgw.seeds import Purpose, derive_seed
from optuna_ohgw.tasks.sources import FIXED_STATE, load_hub, one_line

SHIPPED = ("breast-cancer", "digits", "iris", "wine")  # of the UCI repository, in scikit-learn
_MOST_LEVELS = 1000


class Part(NamedTuple):
    """Rows as features ``[n, d]`` (float32), and their classes ``[n]``."""

    features: NDArray[np.float32]
    classes: NDArray[np.int64]


class Tables(NamedTuple):
    """The parts of a table, with the names of features and classes."""

    train: Part
    validation: Part
    test: Part
    names: list[str]
    labels: list[str]


def load_tables(data: str, target: str | None, *, seed: int, validation: float, test: float) -> Tables:
    """Return the stratified parts of a table, standardised by the training part.

    Numbers, dates (as days) and durations are centred and divided by their standard deviation; what is
    none of them is one column a level. Dates in a CSV file are text. The test part is the same for
    every seed.

    Args:
        data: One of ``SHIPPED``, a ``.csv`` or ``.parquet`` file, or on the hub ``OWNER/NAME`` or
            ``OWNER/NAME:CONFIGURATION``.
        target: Column of the classes; None: the last one.
        seed: Study seed of the validation part.
        validation: Share of the validation part.
        test: Share of the test part.

    Raises:
        UserError: In one line, with file, row and column where they are known.
    """
    table, where = read_table(data)
    features, classes, labels = _columns(table, target, where)
    rest, tested = _split(np.arange(len(classes)), classes, test, FIXED_STATE, "test_share")
    state = derive_seed(seed, Purpose.SPLIT) % 2**32
    trained, validated = _split(rest, classes, validation, state, "validation_share")
    values, names = _encoded(features, trained)
    mean, deviation = values[trained].mean(0), values[trained].std(0)
    values = (values - mean) / np.where(deviation > 0, deviation, 1.0)
    train, held, last = (Part(values[r].astype(np.float32), classes[r]) for r in (trained, validated, tested))
    return Tables(train, held, last, names, labels)


def read_table(data: str) -> tuple[pd.DataFrame, str]:
    """Return a whole table, and its name for messages; the target is the last column where it is known."""
    if data in SHIPPED:
        import sklearn.datasets

        made = getattr(sklearn.datasets, f"load_{data.replace('-', '_')}")(as_frame=True)
        return made.frame.assign(target=made.target_names[made.target]), data
    path = Path(data).expanduser()
    if path.suffix in (".csv", ".parquet"):
        if not path.is_file():
            raise UserError(f"task.data: file {data} does not exist; give a .csv or .parquet file")
        try:
            table = _read_csv(path) if path.suffix == ".csv" else _read_parquet(path)
        except UnicodeDecodeError as error:
            raise UserError(f"task.data: {data} is not UTF-8 ({_wrong_line(path)}); convert it") from error
        except pd.errors.ParserWarning as error:
            raise UserError(
                f"task.data: {data} has rows of more values than its header; name every column"
            ) from error
        except (ValueError, OSError) as error:
            raise UserError(
                f"task.data: {data} cannot be read ({one_line(error)}); give an intact UTF-8 file"
            ) from error
        return table, data
    if data.count("/") != 1 or data.startswith((".", "/", "~")):
        shipped = ", ".join(SHIPPED)
        raise UserError(
            f"task.data: {data!r} is unknown; give one of {shipped}, a .csv or .parquet file, or "
            "OWNER/NAME[:CONFIGURATION]"
        )
    name, _, configuration = data.partition(":")
    loaded = load_hub(name, configuration or None)
    return pd.concat([loaded[part].to_pandas() for part in loaded], ignore_index=True), data


def _read_csv(path: Path) -> pd.DataFrame:
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)
        # Else a first column that has no name would be taken for names of the rows, and left out.
        return pd.read_csv(path, index_col=False)


def _read_parquet(path: Path) -> pd.DataFrame:
    table = pd.read_parquet(path)
    # An index that has a name was a column of the file; the target is still the last one.
    named = [name for name in table.index.names if name is not None]
    return table.reset_index(level=named) if named else table


def _wrong_line(path: Path) -> str:
    raw = path.read_bytes()
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        return f"line {line}"
    return "some line"


def _columns(
    table: pd.DataFrame, target: str | None, where: str
) -> tuple[pd.DataFrame, NDArray[np.int64], list[str]]:
    if table.empty or len(table.columns) < 2:
        raise UserError(
            f"task.data: {where} has {len(table)} rows and {len(table.columns)} columns; "
            "give a table with rows, features and a class"
        )
    name = table.columns[-1] if target is None else target
    if name not in table.columns:
        columns = ", ".join(map(str, table.columns[:20]))
        raise UserError(f"task.target: {where} has no column {name!r}, only {columns}; name one of them")
    for column in table.columns:
        wrong = table[column].isna() | _infinite(table[column])
        if wrong.any():
            row = int(np.flatnonzero(wrong.to_numpy())[0])
            raise UserError(
                f"task.data: {where}, row {row + 1}: column {str(column)!r} has no value "
                f"({int(wrong.sum())} such rows); fill or drop them"
            )
        _check_numbers(table[column], where)
    values = table[name]
    if values.dtype.kind == "f" and (values % 1 != 0).any():
        raise UserError(
            f"task.target: column {name!r} of {where} holds fractions, not classes; name another column"
        )
    labels, classes = np.unique(values.astype(str).to_numpy(), return_inverse=True)
    if len(labels) < 2:
        raise UserError(f"task.target: column {name!r} of {where} has one class only, {labels[0]!r}")
    return table.drop(columns=[name]), classes.astype(np.int64), [str(label) for label in labels]


def _check_numbers(column: pd.Series, where: str) -> None:
    """Raise UserError where most values of a column are numbers: one that is none would make all levels."""
    if column.dtype.kind in "fiub" or not isinstance(column.iloc[0], str | int | float):
        return
    numbers = pd.to_numeric(column, errors="coerce").notna().to_numpy()
    if 0.5 < numbers.mean() < 1:
        row = int(np.flatnonzero(~numbers)[0])
        raise UserError(
            f"task.data: {where}, row {row + 1}: column {str(column.name)!r} has {column.iloc[row]!r} among "
            f"numbers ({int((~numbers).sum())} such rows); mend them, or spell its levels without numbers"
        )


def _infinite(column: pd.Series) -> Any:
    return np.isinf(column) if column.dtype.kind == "f" else np.zeros(len(column), dtype=bool)


def _split(
    rows: NDArray[np.int64], classes: NDArray[np.int64], share: float, state: int, field: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    from sklearn.model_selection import train_test_split

    try:
        kept, drawn = train_test_split(rows, test_size=share, stratify=classes[rows], random_state=state)
    except ValueError as error:
        count = np.bincount(classes[rows])
        raise UserError(
            f"task.{field}: {share:g} of {len(rows)} rows cannot be drawn by class, the rarest has "
            f"{count[count > 0].min()} rows ({one_line(error)}); give another share or more rows"
        ) from error
    return np.sort(kept), np.sort(drawn)


def _as_numbers(column: pd.Series) -> pd.Series:
    """Return dates as days, durations too, and exact decimals as they are; any other column untouched."""
    if isinstance(column.dtype, pd.ArrowDtype) and column.dtype.type in (datetime.date, decimal.Decimal):
        column = column.astype(object)
    if column.dtype == object:
        kinds = set(map(type, column))
        if kinds == {decimal.Decimal}:
            return column.astype(np.float64)
        if kinds == {datetime.date}:
            return column.map(datetime.date.toordinal)
    if column.dtype.kind == "M":
        column = column - pd.Timestamp(0, tz=column.dt.tz)
    return column / pd.Timedelta(days=1) if column.dtype.kind == "m" else column


def _encoded(features: pd.DataFrame, trained: NDArray[np.int64]) -> tuple[NDArray[np.float64], list[str]]:
    """Return the columns as numbers; a level that the training part lacks is none of its columns."""
    columns, names = [], []
    for name in features.columns:
        column = _as_numbers(features[name])
        if column.dtype.kind in "fiu":
            columns.append(column.to_numpy(dtype=np.float64))
            names.append(str(name))
            continue
        levels = np.unique(column.iloc[trained].astype(str))
        if len(levels) > _MOST_LEVELS:
            raise UserError(
                f"task.data: column {str(name)!r} has {len(levels)} levels; drop it, or make it a number"
            )
        for level in levels:
            columns.append((column.astype(str) == level).to_numpy(dtype=np.float64))
            names.append(f"{name}={level}")
    return np.stack(columns, axis=1), names
