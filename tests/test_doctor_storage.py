"""The doctor on storages: real SQLite and PostgreSQL, good and broken, and its judgements."""

from __future__ import annotations

import contextlib
import os
import socket
import sqlite3
import tempfile
import time
from pathlib import Path

import optuna
import pytest
import sqlalchemy as sa
from optuna.storages import RDBStorage
from postgresql_server import PASSWORD, binaries, server
from sqlalchemy.engine import make_url
from sqlalchemy.pool import NullPool

from optuna_ohgw.doctor import storage
from optuna_ohgw.doctor.remedies import explain
from optuna_ohgw.doctor.storage import (
    check_storage,
    judge_absent,
    judge_clock,
    judge_file_system,
    judge_latency,
    judge_schema,
    median_skew,
    sqlite_file,
)

ALL = {"reachable": "ok", "schema": "ok", "writable": "ok", "clock": "ok"}


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    """Wait less than a user has to."""
    monkeypatch.setitem(storage._ANSWERS, "pysqlite", {"timeout": 0.2})
    monkeypatch.setitem(storage._ANSWERS, "psycopg", {"connect_timeout": 2})


@pytest.fixture
def database(tmp_path):
    """Return the file of a storage with one study."""
    file = tmp_path / "study.db"
    optuna.create_study(study_name="kept", storage=RDBStorage(f"sqlite:///{file}"))
    return file


def outcomes(checks):
    return {check.name: check.outcome for check in checks}


def last(checks):
    """Return the failure that ended the checks."""
    assert [c.outcome for c in checks].count("fail") == 1
    assert checks[-1].outcome == "fail"
    return checks[-1]


def test_good_file_passes_and_keeps_what_it_held(database):
    before = set(database.parent.iterdir())
    checks = check_storage(f"sqlite:///{database}", database.parent)
    assert outcomes(checks) == {"file system": "ok", **ALL}
    assert set(database.parent.iterdir()) == before
    assert optuna.get_all_study_names(f"sqlite:///{database}") == ["kept"]


@pytest.mark.parametrize("folder", ["", "runs", "runs/small"])
def test_absent_file_is_tried_on_another_and_not_made(tmp_path, folder):
    checks = check_storage(f"sqlite:///{tmp_path / folder / 'x.db'}", tmp_path / "runs" / "small")
    assert outcomes(checks) == {"file system": "ok", "file": "ok", **ALL}
    assert list(tmp_path.iterdir()) == []


def test_absent_folder_that_run_does_not_make_fails(tmp_path):
    found = last(check_storage(f"sqlite:///{tmp_path}/elsewhere/x.db", tmp_path / "runs"))
    assert (found.name, found.remedy) == ("file", f"mkdir -p {tmp_path}/elsewhere")


def test_file_opened_for_reading_alone_is_not_writable(database):
    found = last(check_storage(f"sqlite:///file:{database}?mode=ro&uri=true", database.parent))
    assert found.name == "writable"
    assert found.remedy == "mend the rights of file and folder"


def test_file_of_another_user_is_not_writable():
    # root may write anything, so it takes another user's rights for the while
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        file = Path(folder) / "study.db"
        optuna.create_study(storage=RDBStorage(f"sqlite:///{file}"))
        file.chmod(0o444)
        file.parent.chmod(0o555)
        if os.geteuid() == 0:
            os.seteuid(65534)
            stack.callback(os.seteuid, 0)
            if not os.access(optuna.__file__, os.R_OK, effective_ids=True):
                pytest.skip("the installed packages are closed to other users")
        found = last(check_storage(f"sqlite:///{file}", file.parent))
        assert (found.name, found.remedy) == ("writable", "mend the rights of file and folder")
        stack.close()
        file.parent.chmod(0o755)


@pytest.mark.parametrize(
    ("version", "remedy"),
    [("v2.6.0.a", "optuna storage upgrade --storage URL"), ("v99.0.0.a", "pip install --upgrade optuna")],
)
def test_schema_of_another_optuna_fails_and_is_left_alone(database, version, remedy):
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = ?", (version,))
    before = database.read_bytes()
    found = last(check_storage(f"sqlite:///{database}", database.parent))
    assert (found.name, found.remedy) == ("schema", remedy)
    assert version in found.detail
    assert database.read_bytes() == before


@pytest.mark.parametrize(("kind", "step"), [("EXCLUSIVE", "reachable"), ("IMMEDIATE", "writable")])
def test_locked_file_fails_in_time(database, kind, step):
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as holder:
        holder.execute(f"BEGIN {kind}")
        begun = time.monotonic()
        found = last(check_storage(f"sqlite:///{database}", database.parent))
        assert time.monotonic() - begun < 5
    assert found.name == step
    assert "locked" in found.detail
    assert "holds it" in found.remedy


def test_file_that_is_no_database_fails(tmp_path):
    file = tmp_path / "x.db"
    file.write_text("no database at all" * 100)
    found = last(check_storage(f"sqlite:///{file}", tmp_path))
    assert (found.name, "restore" in found.remedy) == ("reachable", True)


def test_server_that_never_answers_ends_in_time_without_the_password():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(1)
        port, begun = silent.getsockname()[1], time.monotonic()
        checks = check_storage(f"postgresql+psycopg://me:{PASSWORD}@127.0.0.1:{port}/x", Path("runs"))
        assert time.monotonic() - begun < 5
    found = last(checks)
    assert (found.name, found.remedy[:10]) == ("reachable", "check host")
    assert PASSWORD not in str(checks)
    assert storage.CONNECT_S == 5


def test_port_where_nobody_listens_fails_at_once():
    with socket.socket() as taken:  # bound, so that no one else listens there; not listening itself
        taken.bind(("127.0.0.1", 0))
        url = f"postgresql+psycopg://127.0.0.1:{taken.getsockname()[1]}/x?user=me&password={PASSWORD}"
        checks = check_storage(url, Path("runs"))
    assert last(checks).remedy.startswith("check host")
    assert PASSWORD not in str(checks)


@pytest.mark.parametrize(
    ("url", "name", "remedy"),
    [
        (f"nonsense {PASSWORD}", "URL", "write it like"),
        (f"postgresql+psycopg://a:{PASSWORD}@h:port/x", "URL", "write it like"),
        (f"redis://a:{PASSWORD}@h/x", "driver", "mend it"),
    ],
)
def test_url_that_is_none_fails_without_the_password(url, name, remedy):
    checks = check_storage(url, Path("runs"))
    found = last(checks)
    assert (found.name, found.remedy[: len(remedy)]) == (name, remedy)
    assert PASSWORD not in str(checks)


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (ModuleNotFoundError("no", name="psycopg"), "pip install 'psycopg[binary]'"),
        (ModuleNotFoundError("no", name="MySQLdb"), "pip install 'mysqlclient'"),
        (ModuleNotFoundError("no", name="pymysql"), "pip install 'pymysql'"),
        (OSError('FATAL: database "x" does not exist'), "create the database and the user on the server"),
        (OSError('password authentication failed for user "x"'), "mend user and password in the URL"),
        (
            OSError("Can't connect to MySQL server on 'h'"),
            "check host, port and firewall, and that the server runs",
        ),
        (OSError("what no one thought of"), "mend it, or name another by --set storage=URL"),
    ],
)
def test_errors_have_a_remedy(error, remedy):
    assert explain(error)[1] == remedy


def test_cause_of_an_error_is_what_is_said():
    cause = sa.exc.OperationalError("SELECT", {}, sqlite3.OperationalError("database is locked"))
    error = optuna.exceptions.StorageInternalError("Caught")
    error.__cause__ = cause
    assert explain(error)[0] == "OperationalError: database is locked"


@pytest.mark.parametrize(
    ("check", "outcome"),
    [
        (judge_latency(0.0005), "ok"),
        (judge_latency(0.1), "ok"),
        (judge_latency(0.11), "warn"),
        (judge_clock(0.0, "x"), "ok"),
        (judge_clock(-1.0, "x"), "ok"),
        (judge_clock(1.1, "x"), "warn"),
        (judge_clock(-60.0, "x"), "warn"),
        (judge_clock(60.1, "x"), "fail"),
        (judge_clock(-61.0, "x"), "fail"),
        (judge_schema("b", "b", ["b", "a"], "5"), "ok"),
        (judge_schema("a", "b", ["b", "a"], "5"), "fail"),
        (judge_schema("c", "b", ["b", "a"], "5"), "fail"),
        (judge_file_system(Path("x"), "ext4"), "ok"),
        (judge_file_system(Path("x"), ""), "ok"),
        (judge_file_system(Path("x"), "nfs4"), "warn"),
        (judge_absent(Path("runs/a/x.db"), Path("runs/a")), "ok"),
        (judge_absent(Path("no/x.db"), Path("runs/a")), "fail"),
    ],
)
def test_judgements(check, outcome):
    assert check.outcome == outcome
    assert bool(check.remedy) == (outcome != "ok")


@pytest.mark.parametrize("skew", [-75.0, 0.0, 2.5])
def test_skew_is_that_of_the_server_whatever_the_round_trip(skew):
    now = [1000.0]

    def server():
        now[0] += 0.3  # there
        told = now[0] + skew
        now[0] += 0.3  # and back
        return told

    assert median_skew(server, lambda: now[0]) == pytest.approx(skew, abs=1e-9)


def test_one_slow_round_trip_does_not_move_the_median():
    now, slow = [0.0], iter([9.0, *[0.0] * 6])

    def server():
        told = now[0] + 1.5
        now[0] += next(slow)
        return told

    assert median_skew(server, lambda: now[0]) == pytest.approx(1.5, abs=1e-9)


def test_file_of_a_url():
    for url, file in (
        ("sqlite:///a/b.db", "a/b.db"),
        ("sqlite:////a/b.db", "/a/b.db"),
        ("sqlite+pysqlite:///b.db?timeout=3", "b.db"),
        ("sqlite:///file:/a/b%20c.db?mode=ro&uri=true", "/a/b c.db"),
    ):
        assert sqlite_file(make_url(url)) == Path(file)
    assert sqlite_file(make_url("postgresql://h/x")) is None


@pytest.mark.slow
@pytest.mark.skipif(binaries() is None, reason="needs a PostgreSQL server: apt-get install postgresql")
def test_real_server_passes_and_refusals_say_what_to_mend(tmp_path):
    with server() as running:
        url = running.url
        first, second = (check_storage(url, tmp_path) for _ in range(2))
        assert outcomes(first) == outcomes(second) == {"driver": "ok", **ALL}
        assert "tables were made" in str(first)
        assert "tables were made" not in str(second)

        engine = sa.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
        with engine.connect() as connection:
            assert connection.execute(sa.text("SELECT count(*) FROM studies")).scalar() == 0
            connection.execute(sa.text(f"CREATE ROLE reader LOGIN PASSWORD '{PASSWORD}'"))
            connection.execute(sa.text("GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader"))
            connection.execute(sa.text("CREATE DATABASE empty"))
            connection.execute(sa.text("CREATE DATABASE bytes ENCODING SQL_ASCII TEMPLATE template0"))
        reader = url.replace("//ohgw:", "//reader:")
        for broken, name, remedy in (
            (url.replace(PASSWORD, f"{PASSWORD}-wrong"), "reachable", "mend user and password in the URL"),
            (f"{url}-not-there", "reachable", "create the database and the user on the server"),
            (url.replace("/postgres", "/bytes"), "reachable", "use a database of encoding UTF8"),
            (reader, "writable", "grant the user the right to make and write tables"),
            (
                reader.replace("/postgres", "/empty"),
                "schema",
                "grant the user the right to make and write tables",
            ),
        ):
            checks = check_storage(broken, tmp_path)
            found = last(checks)
            assert (found.name, found.remedy) == (name, remedy)
            assert PASSWORD not in str(checks)

        with engine.connect() as connection:
            connection.execute(sa.text("UPDATE alembic_version SET version_num = 'v2.6.0.a'"))
        assert last(check_storage(url, tmp_path)).name == "schema"
    assert last(check_storage(url, tmp_path)).name == "reachable"
