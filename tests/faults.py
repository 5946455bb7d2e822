"""A database that breaks at a chosen moment: before or after a transaction, or at a statement."""

from __future__ import annotations

import contextlib
import sqlite3

BEFORE, AFTER, STATEMENT = "before its commit", "after its commit", "at a statement"


class Faults:
    """Counts what an engine does, and lets the chosen one fail, once or several times in a row."""

    def __init__(self, engine):
        self.engine, self.commits, self.statements = engine, 0, 0
        self.kind, self.at, self.times, self.hit = None, -1, 1, 0

    def choose(self, kind, at, times=1):
        self.kind, self.at, self.times = kind, at, times

    @contextlib.contextmanager
    def inside(self):
        dialect = self.engine.dialect
        commit, execute = dialect.do_commit, dialect.do_execute

        def faulty_commit(connection):
            number, self.commits = self.commits, self.commits + 1
            self._fail(BEFORE, number)
            commit(connection)
            self._fail(AFTER, number)

        def faulty_execute(*arguments, **options):
            number, self.statements = self.statements, self.statements + 1
            self._fail(STATEMENT, number)
            return execute(*arguments, **options)

        dialect.do_commit, dialect.do_execute = faulty_commit, faulty_execute
        try:
            yield self
        finally:
            del dialect.do_commit, dialect.do_execute

    def _fail(self, kind, number):
        if kind == self.kind and self.at <= number < self.at + self.times:
            self.hit += 1
            raise sqlite3.OperationalError("server closed the connection unexpectedly")
