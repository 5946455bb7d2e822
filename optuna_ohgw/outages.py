"""Which errors say that a storage does not answer now, and may later."""

from __future__ import annotations

import sys
from typing import Any

import sqlalchemy.exc
from optuna.exceptions import StorageInternalError

from optuna_ohgw.reading import hide_passwords

# What will not go away by waiting, though databases report it by the same class of error.
_LASTING = (
    "no such table",
    "no such column",
    "does not exist",
    "unknown database",
    "access denied",
    "authentication failed",
    "no pg_hba.conf entry",
    "readonly database",
    "unable to open database file",
    "not a database",
)
# In the words of a proxy's server.
_DATABASE = "OperationalError", "InterfaceError", "QueuePool limit", "raised during the commit"


def is_outage(error: BaseException) -> bool:
    """Return whether an error says that a storage does not answer now, and may later."""
    if isinstance(error, StorageInternalError):
        return any(is_outage(under) for under in (error.__cause__, error.__context__) if under is not None)
    if isinstance(error, sqlalchemy.exc.TimeoutError | sqlalchemy.exc.PendingRollbackError):
        return True  # no connection came free, or it broke in the transaction before
    if isinstance(error, sqlalchemy.exc.DBAPIError):
        kinds = sqlalchemy.exc.OperationalError, sqlalchemy.exc.InterfaceError
        broken = error.connection_invalidated or isinstance(error, kinds)
        return broken and not _lasts(str(error.orig))
    return _is_rpc_outage(error)


def is_outage_of_driver(error: BaseException) -> bool:
    """Return the same of an error as a database's driver raises it, see PEP 249 for its classes."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return bool(kinds & {"OperationalError", "InterfaceError"}) and not _lasts(str(error))


def _is_rpc_outage(error: BaseException) -> bool:
    """Return whether a proxy does not answer, or tells that its database does not."""
    grpc = _grpc_of(error)
    if grpc is None:
        return False
    code, text = error.code(), str(error.details())  # type: ignore[attr-defined]
    if code == grpc.StatusCode.UNKNOWN:  # what its server raised
        return any(kind in text for kind in _DATABASE) and not _lasts(text)
    return code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


def _grpc_of(error: BaseException) -> Any:
    """Return the module of gRPC if an error is one of its calls; None where it was never imported."""
    grpc = sys.modules.get("grpc")
    return grpc if grpc is not None and isinstance(error, grpc.RpcError) else None


def reason_of(error: BaseException) -> str:
    """Return in a line, without passwords, what a storage's error says."""
    while isinstance(error, StorageInternalError) and error.__cause__ is not None:
        error = error.__cause__
    error = plain(error)
    text = str(getattr(error, "orig", None) or error).strip() or type(error).__name__
    return hide_passwords(" ".join(text.splitlines()[0].split()))[:200]


def plain(error: BaseException) -> BaseException:
    """Return an error of a call to a proxy as one that says in a line what came of it; else the error."""
    if _grpc_of(error) is None:
        return error
    return ConnectionError(error.details() or error.code().name)  # type: ignore[attr-defined]


def _lasts(text: str) -> bool:
    return any(lasting in text.lower() for lasting in _LASTING)
