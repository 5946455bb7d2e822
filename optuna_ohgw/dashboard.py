"""The report's figures in optuna-dashboard, attached to the studies of the same storage."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import optuna
from optuna.storages import BaseStorage, RDBStorage
from optuna.study import StudyDirection

from optuna_ohgw.errors import UserError
from optuna_ohgw.spec import StudySpec

if TYPE_CHECKING:
    import plotly.graph_objects as go

SUMMARY = "summary"
_DIGESTS = "figures"
_CARD_PX = 470
_NOTE = ":note"  # no figure's name: those have no colon
_INTERVAL_S = 30.0
log = logging.getLogger("optuna_ohgw.dashboard")


def summary_name(spec: StudySpec) -> str:
    """Return the name of the study that holds the figures across variations."""
    return f"{spec.name}/{SUMMARY}"


def attach(
    storage: BaseStorage,
    spec: StudySpec,
    cell_figures: Mapping[str, Mapping[str, go.Figure]],
    summary_figures: Mapping[str, go.Figure],
    note: str,
) -> int:
    """Attach figures and a note to the studies of a storage; return how many of them were written.

    What is there under the same name is replaced; what did not change is not written again. A figure
    that is no longer drawn is replaced by one that says so: Optuna removes no attribute. A cell
    that has no Optuna study is left out.

    Args:
        storage: The study's storage.
        spec: The study.
        cell_figures: Figures by name (letters, digits, hyphens), by the name of the cell's Optuna study.
        summary_figures: Figures across variations, for the study ``NAME/summary``.
        note: Markdown for that study.

    Raises:
        UserError: If a study of that name is there which is not ours.
    """
    summary = _summary(storage, summary_name(spec))
    written = 0
    for name, figures in cell_figures.items():
        with contextlib.suppress(KeyError):
            written += _attach(storage, storage.get_study_id_from_name(name), name, figures, None)
    return written + _attach(storage, summary, summary_name(spec), summary_figures, note)


def _summary(storage: BaseStorage, name: str) -> int:
    """Return the id of the summary study, made if it is not there."""
    try:
        study_id = storage.get_study_id_from_name(name)
    except KeyError:
        with _one_commit(storage) as batch:
            study_id = batch.create_new_study([StudyDirection.MAXIMIZE], study_name=name)
            batch.set_study_user_attr(study_id, SUMMARY, True)
        return study_id
    if not storage.get_study_user_attrs(study_id).get(SUMMARY):
        raise UserError(
            f"storage: study {name!r} exists but was not made by optuna-ohgw; "
            "name another by --set name=NAME or --set storage=URL"
        )
    return study_id


def _attach(
    storage: BaseStorage, study_id: int, name: str, figures: Mapping[str, go.Figure], note: str | None
) -> int:
    from optuna_dashboard import save_note, save_plotly_graph_object

    before = dict(storage.get_study_user_attrs(study_id).get(_DIGESTS, {}))
    drawn = {**{gone: _no_longer(gone) for gone in before if gone not in (_NOTE, *figures)}, **figures}
    drawn = {key: _fitted(figure) for key, figure in drawn.items()}
    digests = {key: _digest(figure.to_json()) for key, figure in drawn.items()}
    if note is not None:
        digests[_NOTE] = _digest(note)
    changed = [key for key, digest in digests.items() if before.get(key) != digest]
    if not changed:
        return 0
    with _one_commit(storage) as batch:
        study = optuna.load_study(study_name=name, storage=batch)
        for key in changed:
            if key == _NOTE and note is not None:
                save_note(study, note)
            else:
                save_plotly_graph_object(study, drawn[key], graph_object_id=key)
        batch.set_study_user_attr(study_id, _DIGESTS, digests)
    return len(changed)


def _fitted(figure: go.Figure) -> go.Figure:
    """Return a figure no higher than the dashboard's cards, which cut what is below."""
    import plotly.graph_objects as go

    layout = figure.layout
    if layout.height is None or layout.height <= _CARD_PX:
        return figure
    margins = layout.margin.t + layout.margin.b
    fitted = go.Figure(figure)
    fitted.update_layout(height=_CARD_PX, title_y=1 - (1 - layout.title.y) * layout.height / _CARD_PX)
    if layout.legend.y is not None:
        fitted.update_layout(legend_y=layout.legend.y * (layout.height - margins) / (_CARD_PX - margins))
    return fitted


@contextlib.contextmanager
def _one_commit(storage: BaseStorage) -> Iterator[BaseStorage]:
    """Give the storage in a form whose writes are committed together at the end, if it is an RDB.

    The dashboard cuts a figure into pieces of 2 kB and Optuna commits each: minutes in SQLite, and
    whoever reads between two commits gets half a figure.
    """
    if type(storage) is not RDBStorage:
        yield storage
        return
    from sqlalchemy.orm import scoped_session, sessionmaker

    with storage.engine.begin() as connection:
        batch = RDBStorage.__new__(RDBStorage)  # a plain copy would connect and check the schema anew
        # Without the calls that wait for the storage: those are the whole storage's.
        batch.__dict__.update({k: v for k, v in storage.__dict__.items() if not hasattr(RDBStorage, k)})
        batch.scoped_session = scoped_session(
            sessionmaker(bind=connection, join_transaction_mode="rollback_only")
        )
        yield batch


def check_port(port: int, host: str = "127.0.0.1") -> None:
    """Raise a UserError if a port cannot be listened on."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise _unusable(port, host, error) from None


def serve(
    storage: BaseStorage,
    host: str,
    port: int,
    refresh: Callable[[], object] | None = None,
    interval_s: float = _INTERVAL_S,
) -> None:
    """Serve optuna-dashboard until Ctrl-C; attach anew whenever trials or cells have ended since.

    Args:
        storage: The study's storage.
        host: Address to bind.
        port: Port.
        refresh: Attaches the figures of the moment. An error in it is logged and tried again.
        interval_s: Seconds between two looks; the first one refreshes in any case, since what
            ended while the first figures were drawn is not in them.

    Raises:
        UserError: If the port cannot be listened on.
    """
    ended = threading.Event()
    with make_dashboard(storage, host, port) as server:
        if refresh is not None:
            threading.Thread(target=_follow, args=(storage, refresh, interval_s, ended), daemon=True).start()
        try:
            with contextlib.suppress(KeyboardInterrupt):  # how a user ends it
                server.serve_forever()
        finally:
            ended.set()


def make_dashboard(storage: BaseStorage, host: str, port: int) -> WSGIServer:
    """Return optuna-dashboard on a port (0: any free one), listening; requests are not logged."""
    from optuna_dashboard import wsgi

    try:
        return make_server(host, port, wsgi(storage), server_class=_Server, handler_class=_Silent)
    except OSError as error:
        raise _unusable(port, host, error) from None


class _Server(ThreadingMixIn, WSGIServer):
    """A thread a request: a browser keeps connections open that it does not use yet."""

    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Log what the base class prints: most often a browser that went away."""
        log.debug("a request was not answered", exc_info=True)


class _Silent(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        log.debug(format, *args)


def _unusable(port: int, host: str, error: OSError) -> UserError:
    return UserError(
        f"--port: {port} on {host} cannot be used ({error.strerror}); name another by --port NUMBER"
    )


def _follow(
    storage: BaseStorage, refresh: Callable[[], object], interval_s: float, ended: threading.Event
) -> None:
    seen = None
    while not ended.wait(interval_s):
        now = _progress(storage)
        if now is None or now == seen:
            continue
        try:
            refresh()
            seen = now
        except Exception as error:  # the server goes on with what it has
            log.warning("the figures could not be drawn anew: %s", error)


def _progress(storage: BaseStorage) -> list[tuple[int, int, bool]] | None:
    """Return each study's number of ended trials and whether it is final, None if the storage is busy."""
    states = tuple(state for state in optuna.trial.TrialState if state.is_finished())
    try:
        return [
            (s._study_id, storage.get_n_trials(s._study_id, state=states), "final" in s.user_attrs)
            for s in storage.get_all_studies()
        ]
    except Exception as error:
        log.warning("the storage could not be read: %s", error)
        return None


def _no_longer(name: str) -> go.Figure:
    import plotly.graph_objects as go

    text = f"{name}: no longer drawn"
    return go.Figure(
        layout={"title": {"text": text}, "xaxis": {"visible": False}, "yaxis": {"visible": False}}
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
