"""A PostgreSQL connection that does not wait for ever: libpq limits the network, but not an answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from typing import Any

from sqlalchemy.engine import make_url

_ANSWER_S = 60.0  # as on other databases


def connector(url: str, arguments: dict[str, Any]) -> Callable[[], Any]:
    """Return what makes the connections of an engine: each ends where the server is silent for a minute.

    A server that is frozen, or whose disk is, takes what it is sent and says nothing; its machine keeps
    the connection up.

    Args:
        url: Of a database, for psycopg.
        arguments: Of the driver, beside those of the URL.

    Raises:
        ImportError: If psycopg is missing.
    """
    import psycopg

    class Connection(psycopg.Connection[Any]):
        def wait(self, gen: Any, *args: Any, **options: Any) -> Any:
            return super().wait(self._limited(gen), *args, **options)

        def _limited(self, gen: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
            """Yield what a generator of psycopg waits for, until it ends or time is over."""
            over = time.monotonic() + _ANSWER_S
            try:
                wanted = next(gen)
                while True:
                    try:
                        ready = yield wanted
                    except BaseException as error:
                        wanted = gen.throw(error)
                        continue
                    if ready:
                        over = time.monotonic() + _ANSWER_S
                    elif time.monotonic() > over:
                        self.close()  # or the next call would wait for the same answer
                        raise psycopg.OperationalError(f"no answer within {_ANSWER_S:g} s")
                    wanted = gen.send(ready)
            except StopIteration as end:
                return end.value

    made = make_url(url)
    positional, named = made.get_dialect()().create_connect_args(made)
    return lambda: Connection.connect(*positional, **{**named, **arguments})
