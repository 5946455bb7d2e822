"""What to do about an error of a database or its driver."""

from __future__ import annotations

import sqlalchemy as sa

from optuna_ohgw.doctor.check import said
from optuna_ohgw.outages import plain

# Module of a driver ↦ what to install.
_PACKAGES = {"psycopg": "psycopg[binary]", "psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient"}
# What is in an error ↦ what to do.
_REMEDIES = (
    (("is locked",), "end the process that holds it, or wait for it and try again"),
    (("readonly database", "unable to open database"), "mend the rights of file and folder"),
    (("not a database", "malformed"), "restore the file from a copy, or name another by --set storage=URL"),
    (("no password", "password authentication", "access denied"), "mend user and password in the URL"),
    (("read-only transaction",), "name the primary server, this one is a copy of it"),
    (
        ("insufficientprivilege", "permission denied", "command denied"),
        "grant the user the right to make and write tables",
    ),
    (("bytes-like",), "use a database of encoding UTF8"),  # psycopg on one of SQL_ASCII
    (('" does not exist', "unknown database"), "create the database and the user on the server"),
    (
        (
            "timeout",
            "timed out",
            "refused",
            "failed to connect",
            "translate host",
            "resolve",
            "unreachable",
            "can't connect",
            "closed the connection",
        ),
        "check host, port and firewall, and that the server runs",
    ),
)


def explain(error: BaseException) -> tuple[str, str]:
    """Return what an error of a driver says in one line, and what to do."""
    if isinstance(error, ModuleNotFoundError):
        package = _PACKAGES.get(str(error.name), str(error.name))
        return f"the driver {error.name} is not installed", f"pip install '{package}'"
    while not isinstance(error, sa.exc.DBAPIError) and error.__cause__ is not None:
        error = error.__cause__
    found = said(error.orig if isinstance(error, sa.exc.DBAPIError) and error.orig else plain(error))
    for words, remedy in _REMEDIES:
        if any(word in found.lower() for word in words):
            return found, remedy
    return found, "mend it, or name another by --set storage=URL"
