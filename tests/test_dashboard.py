from __future__ import annotations

import _thread
import io
import json
import logging
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults

import optuna
import plotly.graph_objects as go
import pytest
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.study import StudyDirection
from optuna_dashboard import wsgi
from planted import plant_cell, planted_spec, planted_trial

from optuna_ohgw import dashboard
from optuna_ohgw.cells import Cell, cells_of, check_cells
from optuna_ohgw.dashboard import attach, check_port, make_dashboard, serve, summary_name
from optuna_ohgw.errors import UserError
from optuna_ohgw.opening import open_storage
from optuna_ohgw.records import read_records

SPEC = planted_spec(seeds=(0, 1))
CELLS = [cell.name for cell in cells_of(SPEC)]


def bar(title: str, points: int = 3) -> go.Figure:
    return go.Figure(go.Bar(y=list(range(points))), layout={"title": {"text": title}})


def cell_figures(points: int = 3) -> dict[str, dict[str, go.Figure]]:
    return {name: {key: bar(f"{key} of {name}", points) for key in ("curves", "workers")} for name in CELLS}


@pytest.fixture(params=["memory", "sqlite"])
def storage(request: Any, tmp_path: Path) -> BaseStorage:
    made = InMemoryStorage() if request.param == "memory" else on_disk(tmp_path)
    for cell in cells_of(SPEC):
        plant_cell(made, cell, SPEC)
    return made


def on_disk(folder: Path) -> BaseStorage:
    return open_storage(f"sqlite:///{folder / 'study.db'}", create=True)


def ask(storage: BaseStorage, path: str) -> Any:
    """Return the answer of the dashboard's own API."""
    environment: dict[str, Any] = {"PATH_INFO": path, "wsgi.errors": io.StringIO()}
    setup_testing_defaults(environment)
    statuses: list[str] = []
    body = b"".join(wsgi(storage)(environment, lambda status, headers, error=None: statuses.append(status)))
    assert statuses == ["200 OK"]
    return json.loads(body)


def shown(storage: BaseStorage, name: str) -> tuple[dict[str, go.Figure], str]:
    """Return the figures by id and the note that the dashboard shows of a study."""
    detail = ask(storage, f"/api/studies/{storage.get_study_id_from_name(name)}")
    objects = detail["plotly_graph_objects"]
    figures = {entry["id"]: go.Figure(json.loads(entry["graph_object"])) for entry in objects}
    assert len(figures) == len(objects)
    return figures, detail["note"]["body"]


def test_the_dashboard_shows_what_was_attached(storage: BaseStorage) -> None:
    figures, summary = cell_figures(), {"best-value": bar("a < b & ü", 2000), "overhead": bar("Overhead")}
    assert attach(storage, SPEC, figures, summary, "**Faster**") == 2 * len(CELLS) + 3
    names = [study["study_name"] for study in ask(storage, "/api/studies")["study_summaries"]]
    assert sorted(names) == sorted([*CELLS, f"{SPEC.name}/summary"])
    for name in CELLS:
        assert shown(storage, name) == (figures[name], "")
    assert shown(storage, summary_name(SPEC)) == (summary, "**Faster**")


def test_a_second_time_writes_nothing_and_a_change_writes_only_itself(storage: BaseStorage) -> None:
    figures, summary = cell_figures(), {"best-value": bar("Best"), "overhead": bar("Overhead")}
    attach(storage, SPEC, figures, summary, "note")
    assert attach(storage, SPEC, cell_figures(), dict(summary), "note") == 0
    figures[CELLS[1]]["workers"] = bar("other workers")
    assert attach(storage, SPEC, figures, summary, "another note") == 2
    assert shown(storage, CELLS[1]) == (figures[CELLS[1]], "")
    assert shown(storage, summary_name(SPEC)) == (summary, "another note")


@pytest.mark.parametrize("lengths", [(3000, 3), (3, 3000), (3000, 3, 1500)])
def test_a_figure_of_another_length_reads_back_whole(storage: BaseStorage, lengths: tuple[int, ...]) -> None:
    for points in lengths:
        attach(storage, SPEC, cell_figures(points), {"f": bar("f", points)}, "x" * points * 3)
        assert shown(storage, CELLS[0])[0] == cell_figures(points)[CELLS[0]]
        assert shown(storage, summary_name(SPEC)) == ({"f": bar("f", points)}, "x" * points * 3)


def test_a_figure_that_is_no_longer_drawn_says_so(storage: BaseStorage) -> None:
    attach(storage, SPEC, {}, {"sweep": bar("Sweep", 2000), "best": bar("Best")}, "")
    assert attach(storage, SPEC, {}, {"best": bar("Best")}, "") == 1
    figures, _ = shown(storage, summary_name(SPEC))
    assert figures["sweep"].layout.title.text == "sweep: no longer drawn"
    assert not figures["sweep"].data
    assert figures["best"] == bar("Best")
    assert attach(storage, SPEC, {}, {"best": bar("Best")}, "") == 0
    attach(storage, SPEC, {}, {"sweep": bar("Sweep"), "best": bar("Best")}, "")
    assert shown(storage, summary_name(SPEC))[0]["sweep"] == bar("Sweep")


def test_a_study_of_that_name_that_is_not_ours_is_left_alone(storage: BaseStorage) -> None:
    storage.create_new_study([StudyDirection.MINIMIZE], study_name=summary_name(SPEC))
    with pytest.raises(UserError, match=r"^storage: study 'planted/summary' exists but was not made by"):
        attach(storage, SPEC, cell_figures(), {}, "")
    assert shown(storage, CELLS[0]) == ({}, "")


def test_a_cell_without_a_study_is_left_out(storage: BaseStorage) -> None:
    absent = Cell(SPEC.name, "asha-baseline", 9).name
    assert attach(storage, SPEC, {absent: {"curves": bar("none")}}, {}, "note") == 1
    assert absent not in {s.study_name for s in storage.get_all_studies()}


def test_the_study_itself_does_not_see_the_summary(storage: BaseStorage) -> None:
    before = read_records(storage, SPEC)
    attach(storage, SPEC, cell_figures(), {"f": bar("f")}, "note")
    after = read_records(storage, SPEC)
    assert before.cells.equals(after.cells)
    assert set(check_cells(storage, SPEC)) == set(CELLS)


def test_a_failure_in_the_middle_of_a_cell_leaves_it_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = on_disk(tmp_path)
    for cell in cells_of(SPEC):
        plant_cell(storage, cell, SPEC)
    attach(storage, SPEC, cell_figures(), {}, "")
    invalid = {CELLS[0]: {"curves": bar("new"), "not an id": bar("refused")}}
    with pytest.raises(ValueError, match="graph_object_id"):
        attach(storage, SPEC, invalid, {}, "")
    assert shown(storage, CELLS[0])[0] == cell_figures()[CELLS[0]]
    assert attach(storage, SPEC, {CELLS[0]: {"curves": bar("new")}}, {}, "") == 2


def test_attaching_and_reading_while_a_worker_writes(tmp_path: Path) -> None:
    storage = on_disk(tmp_path)
    for cell in cells_of(SPEC):
        plant_cell(storage, cell, SPEC)
    attach(storage, SPEC, cell_figures(), {"f": bar("f")}, "0")
    errors: list[BaseException] = []
    done = threading.Event()

    def work() -> None:
        try:
            own = on_disk(tmp_path)
            study_id = own.get_study_id_from_name(CELLS[0])
            for k in range(30):
                own.create_new_trial(study_id, template_trial=planted_trial(k, [0.5]))
        except BaseException as error:
            errors.append(error)
        finally:
            done.set()

    worker = threading.Thread(target=work)
    worker.start()
    rounds = 0
    while not (done.is_set() and rounds >= 3):
        rounds += 1
        figures = cell_figures(100 * (rounds % 3 + 1))
        attach(storage, SPEC, figures, {"f": bar("f", 100 * rounds)}, str(rounds))
        assert shown(storage, CELLS[0])[0] == figures[CELLS[0]]
        assert shown(storage, summary_name(SPEC)) == ({"f": bar("f", 100 * rounds)}, str(rounds))
    worker.join()
    assert errors == []
    assert len(optuna.load_study(study_name=CELLS[0], storage=storage).trials) == 30


def test_a_reader_never_meets_half_a_figure(tmp_path: Path) -> None:
    storage, reader = on_disk(tmp_path), on_disk(tmp_path)
    name = CELLS[0]
    plant_cell(storage, cells_of(SPEC)[0], SPEC)
    forms = [{name: {"curves": bar(f"{'long ' * 3000}{i}")}} for i in range(2)]
    attach(storage, SPEC, forms[0], {}, "")
    stop = threading.Event()

    def turn() -> None:
        for i in range(1, 12):
            attach(storage, SPEC, forms[i % 2], {}, "")
        stop.set()

    writer = threading.Thread(target=turn)
    writer.start()
    while not stop.is_set():
        assert shown(reader, name)[0] in [form[name] for form in forms]
    writer.join()


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Let an interrupt reach this process also where it was started deaf to it, in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_server_answers_and_ends_at_ctrl_c(storage: BaseStorage, ctrl_c: None) -> None:
    attach(storage, SPEC, {}, {"f": bar("f")}, "note")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers: list[Any] = []

    def visit() -> None:
        for _ in range(100):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/studies", timeout=5) as answer:
                    answers.append(json.load(answer))
                break
            except OSError:
                time.sleep(0.05)
        _thread.interrupt_main()

    visitor = threading.Thread(target=visit)
    visitor.start()
    serve(storage, "127.0.0.1", port)
    visitor.join()
    assert summary_name(SPEC) in {study["study_name"] for study in answers[0]["study_summaries"]}
    check_port(port)


def test_an_idle_connection_does_not_hold_up_others(storage: BaseStorage) -> None:
    with make_dashboard(storage, "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = ("127.0.0.1", server.server_port)
        url = f"http://127.0.0.1:{address[1]}/api/studies"
        with socket.create_connection(address), urllib.request.urlopen(url, timeout=5) as answer:
            assert len(json.load(answer)["study_summaries"]) == len(CELLS)
        server.shutdown()


def test_a_port_in_use_is_named(storage: BaseStorage) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = rf"^--port: {port} on 127.0.0.1 cannot be used \(Address already in use\); name another by"
        with pytest.raises(UserError, match=message):
            check_port(port)
        with pytest.raises(UserError, match=message):
            serve(storage, "127.0.0.1", port)


def test_figures_are_drawn_anew_when_a_trial_or_a_cell_has_ended(
    storage: BaseStorage, caplog: pytest.LogCaptureFixture
) -> None:
    study_id = storage.get_study_id_from_name(CELLS[0])
    calls: list[int] = []
    ended = threading.Event()

    def refresh() -> None:
        calls.append(storage.get_n_trials(study_id))
        if len(calls) == 2:
            raise ValueError("half a record")

    def wait_for(number: int) -> None:
        deadline = time.monotonic() + 10
        while len(calls) < number and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)  # time to be called once too often
        assert len(calls) == number

    follower = threading.Thread(target=dashboard._follow, args=(storage, refresh, 0.02, ended))
    with caplog.at_level(logging.WARNING, "optuna_ohgw.dashboard"):
        follower.start()
        wait_for(1)
        storage.create_new_trial(study_id)
        wait_for(1)
        storage.create_new_trial(study_id, template_trial=planted_trial(1, [0.5]))
        wait_for(3)
        storage.set_study_user_attr(study_id, "final", {"val_metric": 0.5})
        wait_for(4)
        ended.set()
        follower.join()
    assert calls == [1, 2, 2, 2] or calls == [0, 2, 2, 2]
    assert [r.getMessage() for r in caplog.records] == ["the figures could not be drawn anew: half a record"]


def test_a_storage_that_cannot_be_read_is_tried_again(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, calls, ended = InMemoryStorage(), [], threading.Event()
    read, tries = storage.get_all_studies, iter(range(100))

    def locked() -> Any:
        if next(tries) == 0:
            raise optuna.exceptions.StorageInternalError("database is locked")
        return read()

    def refresh() -> None:
        calls.append(1)
        ended.set()

    monkeypatch.setattr(storage, "get_all_studies", locked)
    with caplog.at_level(logging.WARNING, "optuna_ohgw.dashboard"):
        dashboard._follow(storage, refresh, 0.01, ended)
    assert calls == [1]
    assert "database is locked" in caplog.text


def test_a_figure_higher_than_a_card_is_made_to_fit_it(storage: BaseStorage) -> None:
    tall = go.Figure(layout={"height": 1000, "margin": {"t": 80, "b": 120}})
    tall.update_layout(title={"y": 0.98}, legend={"y": -0.1})
    low = go.Figure(layout={"height": 300})
    attach(storage, SPEC, {}, {"tall": tall, "low": low}, "")
    (study_id,) = [s._study_id for s in storage.get_all_studies() if s.study_name == summary_name(SPEC)]
    from optuna_dashboard._custom_plot_data import get_plotly_graph_objects

    shown = get_plotly_graph_objects(storage.get_study_system_attrs(study_id))
    layout = json.loads(shown["tall"])["layout"]
    assert layout["height"] <= 480
    plot = layout["height"] - 200
    # The legend stays 80 px below the plot, the title 20 px below the top.
    assert layout["legend"]["y"] * plot == pytest.approx(-80)
    assert (1 - layout["title"]["y"]) * layout["height"] == pytest.approx(20)
    assert json.loads(shown["low"])["layout"]["height"] == 300
    assert tall.layout.height == 1000
