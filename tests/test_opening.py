"""What a user reads who names a storage that cannot be opened here."""

from __future__ import annotations

import logging
import re
import sqlite3
import sys
from pathlib import Path

import psycopg
import pymysql
import pytest
import sqlalchemy as sa

from optuna_ohgw.errors import UserError
from optuna_ohgw.opening import _DRIVERS, open_storage

PROJECT = (Path(__file__).parents[1] / "pyproject.toml").read_text()


@pytest.mark.parametrize("kind", _DRIVERS)
def test_a_missing_driver_is_told_with_an_extra_that_there_is(kind, monkeypatch):
    module = _DRIVERS[kind].rpartition("+")[2]
    monkeypatch.setitem(sys.modules, module, None)
    user = "" if kind == "grpc" else "u:secret@"
    with pytest.raises(UserError) as caught:
        open_storage(f"{_DRIVERS[kind]}://{user}127.0.0.1:1", create=True)
    extra = f"pip install 'optuna-ohgw[{kind}]' and write {_DRIVERS[kind]}://..."
    assert str(caught.value).endswith(f"127.0.0.1:1 needs a driver; {extra}")
    assert "secret" not in str(caught.value)
    assert re.search(rf'^{kind} = \["{module}', PROJECT, re.MULTILINE)


def test_an_outage_that_optuna_goes_round_is_not_told_twice(caplog) -> None:
    logger = logging.getLogger("optuna.storages._rdb.storage")
    logger.addHandler(caplog.handler)
    try:
        logger.error("Caught an error from sqlalchemy: x. Falling back to a slower alternative. ")
        logger.error("something else")
    finally:
        logger.removeHandler(caplog.handler)
    assert {record.getMessage() for record in caplog.records} == {"something else"}


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (pymysql.err.OperationalError(2013, "Lost connection to MySQL server during query"), False),
        (psycopg.errors.AdminShutdown("terminating connection due to administrator command"), False),
        (pymysql.err.ProgrammingError(1064, "You have an error in your SQL syntax"), True),
        (ValueError("no error of a database"), True),
    ],
)
def test_a_connection_that_broke_is_put_away_without_a_traceback(error, told, caplog, tmp_path):
    storage = open_storage(f"sqlite:///{tmp_path / 'study.db'}", create=True)

    def break_off(*_: object) -> None:
        raise error

    connection = storage.engine.connect()
    sa.event.listen(storage.engine.pool, "reset", break_off)
    connection.close()
    assert ["Exception during reset" in record.message for record in caplog.records] == [True] * told


@pytest.mark.parametrize(
    ("error", "told"),
    [(psycopg.OperationalError("the connection is lost"), []), (psycopg.DataError("odd"), ["ignored: odd"])],
)
def test_a_driver_says_no_more_of_an_outage(error, told, caplog):
    logging.getLogger("psycopg").warning("ignored: %s", error)
    assert [record.message for record in caplog.records] == told


def test_a_database_without_tables_is_told_and_gets_none(tmp_path):
    file = tmp_path / "empty.db"
    sqlite3.connect(file).close()
    with pytest.raises(UserError, match=r"empty\.db holds no study; start one with 'optuna-ohgw run'"):
        open_storage(f"sqlite:///{file}", create=False)
    assert file.read_bytes() == b""
