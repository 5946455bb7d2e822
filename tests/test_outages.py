"""A table of errors as databases and their drivers raise them."""

from __future__ import annotations

import grpc
import pytest
import sqlalchemy as sa
from optuna.exceptions import StorageInternalError

from optuna_ohgw.outages import is_outage, reason_of


def error_of(kind, text, *, invalidated=False):
    made = kind("SELECT", {}, Exception(text))
    made.connection_invalidated = invalidated
    return made


def internal(cause):
    made = StorageInternalError("An exception is raised during the commit.")
    made.__cause__ = cause
    return made


def meanwhile(context):
    made = StorageInternalError("An exception is raised during the commit.")
    made.__context__ = context
    return made


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (error_of(sa.exc.OperationalError, "connection refused"), True),
        (error_of(sa.exc.OperationalError, "the database system is starting up"), True),
        (error_of(sa.exc.OperationalError, "deadlock detected"), True),
        (error_of(sa.exc.OperationalError, "database is locked"), True),
        (error_of(sa.exc.OperationalError, "database or disk is full"), True),
        (error_of(sa.exc.InterfaceError, "connection already closed"), True),
        (error_of(sa.exc.DBAPIError, "terminating connection", invalidated=True), True),
        (internal(error_of(sa.exc.OperationalError, "connection refused")), True),
        (internal(internal(error_of(sa.exc.OperationalError, "connection refused"))), True),
        (sa.exc.TimeoutError("QueuePool limit"), True),
        (sa.exc.PendingRollbackError("Can't reconnect until invalid transaction is rolled back."), True),
        (internal(sa.exc.PendingRollbackError("Can't reconnect")), True),
        (meanwhile(error_of(sa.exc.OperationalError, "server closed the connection")), True),
        (error_of(sa.exc.OperationalError, "no such table: trials"), False),
        (error_of(sa.exc.OperationalError, 'password authentication failed for user "u"'), False),
        (error_of(sa.exc.OperationalError, 'no pg_hba.conf entry for host "h"'), False),
        (error_of(sa.exc.OperationalError, 'database "x" does not exist'), False),
        (error_of(sa.exc.OperationalError, "Access denied for user 'u'@'h'"), False),
        (error_of(sa.exc.OperationalError, "attempt to write a readonly database"), False),
        (error_of(sa.exc.IntegrityError, "UNIQUE constraint failed"), False),
        (error_of(sa.exc.DBAPIError, "value too long"), False),
        (internal(error_of(sa.exc.DataError, "value too long")), False),
        (StorageInternalError("?"), False),
        (ValueError("?"), False),
    ],
)
def test_what_goes_away_by_waiting(error, expected):
    assert is_outage(error) is expected


class Refused(grpc.RpcError):
    def __init__(self, code, details):
        super().__init__(f"<a call that\nended with {code}>")
        self._code, self._details = code, details

    def code(self):
        return self._code

    def details(self):
        return self._details


UNKNOWN = grpc.StatusCode.UNKNOWN


@pytest.mark.parametrize(
    ("code", "details", "expected"),
    [
        (grpc.StatusCode.UNAVAILABLE, "failed to connect to all addresses", True),
        (grpc.StatusCode.UNAVAILABLE, None, True),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded", True),
        (UNKNOWN, "Exception calling application: (psycopg.OperationalError) connection refused", True),
        (UNKNOWN, "Exception calling application: An exception is raised during the commit. This", True),
        (UNKNOWN, "Exception calling application: (sqlite3.OperationalError) no such table: studies", False),
        (UNKNOWN, "Exception calling application: list index out of range", False),
        (grpc.StatusCode.NOT_FOUND, "no such study", False),
        (grpc.StatusCode.UNIMPLEMENTED, "Method not found!", False),
    ],
)
def test_what_goes_away_by_waiting_behind_a_proxy(code, details, expected):
    assert is_outage(Refused(code, details)) is expected


def meanwhile(context):
    made = StorageInternalError("An exception is raised during the commit.")
    made.__context__ = context
    return made


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (Refused(UNKNOWN, "connection refused\nat all"), "connection refused"),
        (Refused(UNKNOWN, None), "UNKNOWN"),
        (error_of(sa.exc.OperationalError, "connection refused\n\tIs it running?"), "connection refused"),
        (internal(error_of(sa.exc.OperationalError, "a\tb  c")), "a b c"),
        (error_of(sa.exc.OperationalError, "no postgresql://u:secret@h/db"), "no postgresql://u:***@h/db"),
        (ValueError(""), "ValueError"),
        (ValueError("x" * 500), "x" * 200),
    ],
)
def test_the_reason_is_one_line_without_a_password(error, expected):
    assert reason_of(error) == expected
