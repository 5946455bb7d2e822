"""The study's storage: reached in time, written, of this Optuna's schema, with a clock that agrees."""

from __future__ import annotations

import contextlib
import secrets
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import sqlalchemy as sa
from optuna.storages import BaseStorage, RDBStorage
from optuna.study import StudyDirection
from sqlalchemy.engine import URL, make_url
from sqlalchemy.pool import NullPool

from optuna_ohgw.doctor.check import Check
from optuna_ohgw.doctor.disk import existing, file_system, is_network
from optuna_ohgw.doctor.remedies import explain
from optuna_ohgw.proxy import ProxyStorage, connect, ping

CONNECT_S = 5
_ROUND_TRIPS = 7
_SLOW_MS = 100.0
_SKEW_WARN_S, _SKEW_FAIL_S = 1.0, 60.0
_UPGRADE = "optuna storage upgrade --storage URL"
# Seconds since 1970 by the server's clock.
_CLOCKS = {
    "postgresql": "SELECT extract(epoch FROM clock_timestamp())",
    "mysql": "SELECT unix_timestamp(now(6))",
    "mariadb": "SELECT unix_timestamp(now(6))",
}
_ANSWERS = {
    "psycopg": {"connect_timeout": CONNECT_S},
    "psycopg2": {"connect_timeout": CONNECT_S},
    "pymysql": dict.fromkeys(("connect_timeout", "read_timeout", "write_timeout"), CONNECT_S),
    "mysqldb": dict.fromkeys(("connect_timeout", "read_timeout", "write_timeout"), CONNECT_S),
    "pysqlite": {"timeout": CONNECT_S},
}


def check_storage(url: str, made_by_run: Path) -> list[Check]:
    """Return lines on a storage, the first failure last.

    A scratch study with a random name is made and deleted in it. In an empty database Optuna's
    tables are made, as ``run`` would; an SQLite file that is not there is not made.

    Args:
        url: Optuna storage URL.
        made_by_run: Folder that ``run`` makes, where an SQLite file may be told to be.
    """
    try:
        parsed = make_url(url)
    except (sa.exc.ArgumentError, ValueError):
        remedy = "write it like postgresql+psycopg://USER@HOST/NAME or sqlite:///FILE"
        return [_check("URL", "fail", "is no storage URL", remedy)]
    with contextlib.ExitStack() as stack:
        checks: list[Check] = []
        file, shown = sqlite_file(parsed), parsed.render_as_string(hide_password=True)
        if file is not None:
            checks.append(judge_file_system(file, file_system(file)))
            if not file.exists():
                checks.append(judge_absent(file, made_by_run))
                if checks[-1].outcome == "fail":
                    return checks
                # What the folder allows is tried on another file.
                file = stack.enter_context(_scratch_file(existing(file.parent)))
                parsed, shown = make_url(f"sqlite:///{file}"), f"a scratch file in {file.parent}"
        for name, step in _steps(parsed, file):
            try:
                found = step()
            except Exception as error:  # drivers raise what they like
                found = _check(name, "fail", *explain(error))
            detail = f"{shown}: {found.detail}" if name == "reachable" else found.detail
            checks.append(replace(found, detail=_without(detail, parsed)))
            if found.outcome == "fail":
                break
    return checks


def _steps(url: URL, file: Path | None) -> list[tuple[str, Callable[[], Check]]]:
    if url.drivername == "grpc":
        return [("reachable", lambda: _reach_proxy(url)), ("writable", lambda: _write(_proxy(url)))]
    driver: list[tuple[str, Callable[[], Check]]] = [("driver", lambda: _driver(url))]
    return (driver if file is None else []) + [
        ("reachable", lambda: _reach(url)),
        ("schema", lambda: _schema(url)),
        ("writable", lambda: _write_database(url)),
        ("clock", lambda: _clock(url, file)),
    ]


def judge_file_system(file: Path, kind: str) -> Check:
    """Return whether an SQLite file is on a file system whose locks can be trusted."""
    if is_network(kind):
        remedy = "put it on a local disk, or use PostgreSQL for workers on several machines"
        return _check("file system", "warn", f"SQLite on {kind}, whose locks may fail: {file}", remedy)
    return _check("file system", "ok", f"SQLite on {kind or 'an unknown file system'}: {file}")


def judge_absent(file: Path, made_by_run: Path) -> Check:
    """Return whether an SQLite file that is not there can be made: its folder is, or ``run`` makes it."""
    folder, own = file.parent.absolute(), made_by_run.absolute()
    if folder.is_dir() or folder == own or folder in own.parents:
        return _check("file", "ok", f"{file} is not there yet; run makes it")
    return _check("file", "fail", f"{file}: its folder does not exist", f"mkdir -p {file.parent}")


def judge_latency(seconds: float) -> Check:
    """Return whether a round trip is short against the few that a trial takes."""
    found = f"answers in {1000 * seconds:.2g} ms (median of {_ROUND_TRIPS})"
    if 1000 * seconds > _SLOW_MS:
        return _check("reachable", "warn", f"{found}; each trial waits for several", "use a nearer server")
    return _check("reachable", "ok", found)


def judge_schema(current: str, head: str, known: list[str], version: str) -> Check:
    """Return whether a storage's schema is that of the Optuna installed here.

    Args:
        current: Revision of the storage.
        head: Newest revision that this Optuna knows.
        known: All that it knows.
        version: Its version.
    """
    if current == head:
        return _check("schema", "ok", f"{current}, that of Optuna {version}")
    if current in known:
        return _check("schema", "fail", f"{current}, older than Optuna {version}'s {head}", _UPGRADE)
    detail = f"{current}, newer than Optuna {version}'s {head}"
    return _check("schema", "fail", detail, "pip install --upgrade optuna")


def judge_clock(skew_s: float, against: str) -> Check:
    """Return whether two clocks agree; positive where the other one is ahead."""
    found = f"{against} is {abs(skew_s):.3f} s {'ahead' if skew_s > 0 else 'behind'}"
    remedy = "set both clocks by NTP (timedatectl set-ntp true)"
    if abs(skew_s) > _SKEW_FAIL_S:
        return _check("clock", "fail", found, remedy)
    if abs(skew_s) > _SKEW_WARN_S:
        return _check("clock", "warn", found, remedy)
    return _check("clock", "ok", found)


def median_skew(server: Callable[[], float], clock: Callable[[], float] = time.time) -> float:
    """Return the seconds by which a server's clock is ahead: the median over some round trips.

    It is taken to be read at half of the round trip (Cristian 1989).
    """
    skews = []
    for _ in range(_ROUND_TRIPS):
        begun = clock()
        told = server()
        skews.append(told - (begun + clock()) / 2)
    return statistics.median(skews)


def sqlite_file(url: URL) -> Path | None:
    """Return the file of an SQLite URL, None for any other; ``file:PATH?mode=ro`` is one, too."""
    if url.get_backend_name() != "sqlite":
        return None
    name = url.database or ""
    return Path(unquote(urlsplit(name).path)) if name.startswith("file:") else Path(name)


def _driver(url: URL) -> Check:
    module = url.get_dialect().import_dbapi()
    return _check("driver", "ok", f"{module.__name__} {getattr(module, '__version__', '')}")


def _reach(url: URL) -> Check:
    with _connected(url) as connection:
        sa.inspect(connection).get_table_names()  # SQLite opens its file at the first use
        return judge_latency(_median_s(lambda: connection.execute(sa.text("SELECT 1")).scalar()))


def _reach_proxy(url: URL) -> Check:
    storage = _proxy(url)
    return judge_latency(_median_s(lambda: ping(storage)))


def _proxy(url: URL) -> ProxyStorage:
    return connect(url.render_as_string(hide_password=False))


def _median_s(call: Callable[[], Any]) -> float:
    times = []
    for _ in range(_ROUND_TRIPS):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def _schema(url: URL) -> Check:
    import optuna

    with _connected(url) as connection:
        fresh = not sa.inspect(connection).has_table("version_info")
    storage = _storage(url, make_tables=fresh)
    try:
        manager = storage._version_manager
        current, head = storage.get_current_version(), storage.get_head_version()
        check = judge_schema(current, head, manager.get_all_versions(), optuna.__version__)
    finally:
        storage.engine.dispose()
    if fresh and url.get_backend_name() != "sqlite" and check.outcome == "ok":
        return _check("schema", "ok", f"{check.detail}; was empty, Optuna's tables were made")
    return check


def _write_database(url: URL) -> Check:
    storage = _storage(url)
    try:
        return _write(storage)
    finally:
        storage.engine.dispose()


def _write(storage: BaseStorage) -> Check:
    name = f"optuna-ohgw-doctor-{secrets.token_hex(8)}"
    begun = time.perf_counter()
    study = storage.create_new_study([StudyDirection.MAXIMIZE], name)
    try:
        trial = storage.create_new_trial(study)
        storage.set_trial_user_attr(trial, "doctor", name)
        kept = storage.get_trial(trial).user_attrs.get("doctor")
    finally:
        storage.delete_study(study)
    took = f"a scratch study was made and deleted in {time.perf_counter() - begun:.2g} s"
    if kept != name:
        return _check("writable", "fail", "a trial's attribute was not kept", "use another storage")
    return _check("writable", "ok", took)


def _clock(url: URL, file: Path | None) -> Check:
    if file is not None:
        return judge_clock(median_skew(lambda: _touched(file.parent)), "the file system")
    question = _CLOCKS.get(url.get_backend_name())
    if question is None:
        return _check("clock", "info", f"not compared: {url.get_backend_name()} is not asked for its clock")
    with _connected(url) as connection:
        skew = median_skew(lambda: float(connection.execute(sa.text(question)).scalar_one()))
    return judge_clock(skew, "the server")


def _touched(folder: Path) -> float:
    """Return the time that a file system gives to a file made now."""
    with _scratch_file(folder) as file:
        file.touch()
        return file.stat().st_mtime


def _storage(url: URL, *, make_tables: bool = False) -> RDBStorage:
    return RDBStorage(
        url.render_as_string(hide_password=False),
        engine_kwargs=_options(url),
        skip_compatibility_check=True,
        skip_table_creation=not make_tables,
    )


@contextlib.contextmanager
def _connected(url: URL) -> Iterator[sa.Connection]:
    engine = sa.create_engine(url, **_options(url))
    try:
        with engine.connect() as connection:
            yield connection
    finally:
        engine.dispose()


def _options(url: URL) -> dict[str, Any]:
    return {"connect_args": _ANSWERS.get(url.get_dialect().driver, {}), "poolclass": NullPool}


@contextlib.contextmanager
def _scratch_file(folder: Path) -> Iterator[Path]:
    file = folder / f".optuna-ohgw-doctor-{secrets.token_hex(8)}"
    try:
        yield file
    finally:
        for one in (file, *(file.with_name(f"{file.name}-{end}") for end in ("journal", "wal", "shm"))):
            one.unlink(missing_ok=True)


def _without(text: str, url: URL) -> str:
    """Return a text without the passwords of a URL, as a driver may repeat them."""
    values = [url.password, *(v for k, v in url.query.items() if "pass" in k.lower())]
    for value in values:
        text = text.replace(str(value), "***") if value else text
    return text


def _check(name: str, outcome: Any, detail: str, remedy: str = "") -> Check:
    return Check("storage", name, outcome, detail, remedy)
