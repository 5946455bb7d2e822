"""The storage at a URL, opened so that it notices a server that is gone, and waits for it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from optuna.storages import BaseStorage, RDBStorage
from sqlalchemy import create_engine, inspect
from sqlalchemy.exc import ArgumentError, IntegrityError, ProgrammingError, SQLAlchemyError
from sqlalchemy.pool import NullPool
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_fixed

from optuna_ohgw.errors import StorageLost, UserError
from optuna_ohgw.outages import is_outage, is_outage_of_driver, reason_of
from optuna_ohgw.patience import Patience, make_patient
from optuna_ohgw.reading import hide_passwords

S = TypeVar("S", bound=BaseStorage)
PATIENCE_S = 10.0  # of a command that only looks
_DRIVERS = {"postgresql": "postgresql+psycopg", "mysql": "mysql+pymysql", "grpc": "grpc"}


def _is_told(record: logging.LogRecord) -> bool:
    """Return whether a message of a library under the storage is shown; outages are told by our own line."""
    if "Falling back to a slower alternative" in record.getMessage():
        return False
    told = [*(record.exc_info or ()), *(record.args if isinstance(record.args, tuple) else ())]
    return not any(isinstance(error, Exception) and is_outage_of_driver(error) for error in told)


_POOLS = "sqlalchemy.pool.impl.QueuePool", "sqlalchemy.pool.impl.NullPool"
for _name in ("optuna.storages._rdb.storage", *_POOLS, "psycopg"):
    logging.getLogger(_name).addFilter(_is_told)


def open_storage(
    url: str,
    *,
    create: bool,
    patience_s: float = PATIENCE_S,
    wait: bool = False,
    patience: Patience | None = None,
) -> BaseStorage:
    """Return the storage at a URL: a database, or at ``grpc://`` Optuna's proxy of one.

    Args:
        url: Its URL.
        create: Whether an SQLite file, and Optuna's tables in a database, may be made.
        patience_s: For how long a call waits for a server that does not answer.
        wait: Whether opening waits, too; else one that does not answer now is a mistake in the URL.
        patience: What waits, in place of ``patience_s``.

    Raises:
        UserError: If it cannot be opened, is no Optuna storage, or is of another schema version; if it
            would have to be made and may not.
        StorageLost: From any call, if the storage does not answer for too long.
    """
    patience = patience or Patience(patience_s, shown_url(url))
    return _open(url, partial(_connect_any, create=create), create=create, patience=patience, wait=wait)


def open_database(
    url: str, *, create: bool, patience_s: float = PATIENCE_S, wait: bool = False
) -> RDBStorage:
    """Return the database at a URL, see :func:`open_storage`."""
    patience = Patience(patience_s, shown_url(url))
    return _open(url, partial(_connect, create=create), create=create, patience=patience, wait=wait)


def for_trials(
    storage: BaseStorage, *, sole: bool, owner: Mapping[str, Any], patience: Patience
) -> BaseStorage:
    """Return an open storage for a process that runs trials.

    Args:
        storage: From :func:`open_storage`.
        sole: Whether no other process runs trials of the studies used here.
        owner: User attributes of every trial that runs here, from the moment that it runs.
        patience: How long it waits.
    """
    if isinstance(storage, RDBStorage):
        from optuna_ohgw.storage import BatchedStorage

        return BatchedStorage(storage, sole=sole, owner=owner, patience=patience)
    from optuna_ohgw.proxy import ProxyStorage

    assert isinstance(storage, ProxyStorage)
    own = storage.for_trials(sole=sole, owner=owner)
    make_patient(own, patience)
    return own


def _open(url: str, connect: Callable[[str], S], *, create: bool, patience: Patience, wait: bool) -> S:
    path = sqlite_path(url)
    if path is not None and not path.exists() and not create:
        raise UserError(f"storage: {path} does not exist; start the study with 'optuna-ohgw run' first")
    shown = shown_url(url)
    try:
        storage = patience.call(lambda: connect(url)) if wait else connect(url)
    except StorageLost:
        raise
    except ImportError:
        raise UserError(f"storage: {shown} needs a driver; {_driver(url)}") from None
    except Exception as error:
        kinds = SQLAlchemyError, RuntimeError, ValueError
        if not isinstance(error, kinds) and not is_outage(error):
            raise
        if isinstance(error, ArgumentError):
            remedy = "name one like postgresql+psycopg://USER@HOST/NAME or sqlite:///FILE by --storage URL"
        elif "schema" in str(error) or "version" in str(error):
            remedy = "upgrade it by 'optuna storage upgrade --storage URL', or name another"
        else:
            remedy = "name another by --storage URL"
        raise UserError(f"storage: {shown} cannot be used ({_first_line(error)}); {remedy}") from None
    make_patient(storage, patience)
    return storage


def _first_line(error: Exception) -> str:
    if isinstance(error, SQLAlchemyError | RuntimeError | ValueError):
        return hide_passwords(str(error).strip().splitlines()[0])
    return reason_of(error)


def _connect_any(url: str, *, create: bool) -> BaseStorage:
    if not url.startswith("grpc:"):
        return _connect(url, create=create)
    from optuna_ohgw import proxy

    return proxy.connect(url)


def shown_url(url: str) -> str:
    """Return what may be shown of a storage's URL: a file, or what comes after name and password."""
    path = sqlite_path(url)
    return str(path) if path is not None else hide_passwords(url.rsplit("@", maxsplit=1)[-1])


def _connect(url: str, *, create: bool) -> RDBStorage:
    """Return the storage; its connections notice a server that is gone in seconds, not minutes."""
    arguments: dict[str, Any] = {"timeout": 60} if url.startswith("sqlite") else {"connect_timeout": 10}
    if url.startswith("postgresql"):
        arguments |= {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3}
        arguments |= {"tcp_user_timeout": 20_000}  # milliseconds
    elif url.startswith("mysql"):
        arguments |= {"read_timeout": 60, "write_timeout": 60}
    options: dict[str, Any] = {"connect_args": arguments, "pool_pre_ping": not url.startswith("sqlite")}
    if url.startswith("postgresql+psycopg:"):
        from optuna_ohgw.postgresql import connector

        options["creator"] = connector(url, arguments)
    if not create:
        _check_tables(url, options)
    # Two machines may make the tables at the same moment.
    kinds = IntegrityError, ProgrammingError
    making = Retrying(retry=retry_if_exception_type(kinds), stop=stop_after_attempt(3), wait=wait_fixed(0.5))
    storage: RDBStorage = making(RDBStorage, url, engine_kwargs=options)
    return storage


def _check_tables(url: str, options: dict[str, Any]) -> None:
    """Raise a UserError if a database has no tables of Optuna's, which would make them to look at them."""
    engine = create_engine(url, poolclass=NullPool, **options)
    if not inspect(engine).has_table("studies"):
        raise UserError(
            f"storage: {shown_url(url)} holds no study; start one with 'optuna-ohgw run', or name another"
        )


def _driver(url: str) -> str:
    kind = url.split(":", maxsplit=1)[0].split("+", maxsplit=1)[0]
    if kind in _DRIVERS:
        return f"pip install 'optuna-ohgw[{kind}]' and write {_DRIVERS[kind]}://..."
    return "install that of its database"


def sqlite_path(url: str) -> Path | None:
    """Return the file of an SQLite URL, None for any other."""
    return Path(url.removeprefix("sqlite:///")) if url.startswith("sqlite:///") else None
