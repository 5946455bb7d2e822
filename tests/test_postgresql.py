"""Studies on a real PostgreSQL server that is restarted and cut off. Oracle: a calm run on SQLite."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import optuna
import psutil
import psycopg
import pytest
import sqlalchemy as sa
import test_cell_trials
import test_storage
from command_runs import Run, assert_same_outcome, assert_whole, run_in_process, spec_of, trials_of
from optuna.storages._cached_storage import _CachedStorage
from optuna.trial import TrialState
from postgresql_server import PASSWORD, binaries, server
from proxy_server import free_port, proxy_of

from optuna_ohgw.errors import StorageLost
from optuna_ohgw.opening import open_storage

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),  # on a busy machine
    pytest.mark.skipif(binaries() is None, reason="no PostgreSQL server is installed"),
]
STUDY = (
    "seeds=[3,4]",
    "budget.trials=6",
    "execution={workers: 1, cells_at_once: 2, threads: 1, device: cpu, checkpoint_s: 0.3}",
)


_ELSEWHERE = ("unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")


@pytest.fixture(scope="module")
def postgresql():
    with server() as one:
        yield one


@pytest.fixture(autouse=True)
def opened(monkeypatch):
    """Close what a test opens: a connection that is merely forgotten is a warning."""
    storages, begin = [], optuna.storages.RDBStorage.__init__

    def noted(self, *arguments, **options):
        begin(self, *arguments, **options)
        storages.append(self)

    monkeypatch.setattr(optuna.storages.RDBStorage, "__init__", noted)
    yield
    for one in storages:
        one.engine.dispose()


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    spec = spec_of(tmp_path_factory.mktemp("calm"), *STUDY)
    run_in_process(spec)
    return spec


def at_work(trials):
    return any(t.state == TrialState.RUNNING for own in trials.values() for t in own)


def named(postgresql, name, *overrides):
    return (*STUDY, f"name={name}", f"storage={postgresql.url}", *overrides)


def secrets_in(folder):
    return [f for f in folder.rglob("*") if f.is_file() and PASSWORD.encode() in f.read_bytes()]


def test_restarts_and_an_outage_of_20_s_change_nothing(tmp_path, postgresql, calm):
    run = Run(tmp_path, *named(postgresql, "outage"))
    try:
        run.wait_until(at_work)
        shown = [
            c.cmdline() + list(c.environ().values())
            for c in psutil.Process(run.process.pid).children(recursive=True)
        ]
        assert len(shown) >= 2
        assert not any(PASSWORD in word for words in shown for word in words)
        for seconds, mode in ((0, "immediate"), (0, "fast"), (20, "immediate")):
            time.sleep(1.5)
            assert run.process.poll() is None, run.process.communicate()
            postgresql.stop(mode)
            time.sleep(seconds)
            postgresql.start()
        status, out, err = run.result()
    finally:
        run.end()
    assert status == 0
    assert err.splitlines()
    assert all(" does not answer (" in line and line.endswith("; waiting") for line in err.splitlines()), err
    assert PASSWORD not in out + err
    assert not secrets_in(tmp_path)
    assert_whole(run.spec)
    assert_same_outcome(run.spec, calm)


def test_a_server_that_stays_away_ends_the_run_with_one_line(tmp_path, postgresql):
    patience = STUDY[-1].replace("checkpoint_s: 0.3", "checkpoint_s: 0.3, patience_s: 4")
    run = Run(tmp_path, *named(postgresql, "away", patience))
    try:
        run.wait_until(at_work)
        postgresql.stop()
        began = time.monotonic()
        status, out, err = run.result(120)
    finally:
        run.end()
        postgresql.start()
    assert status == 3
    assert time.monotonic() - began < 90
    *waiting, end = err.splitlines()
    assert waiting  # the parent may begin to wait, and again where the server still took a call
    assert all(w.startswith(f"127.0.0.1:{postgresql.port}/postgres ") for w in waiting), err
    assert end.startswith(f"error: storage: 127.0.0.1:{postgresql.port}/postgres did not answer for ")
    assert end.endswith("; run the same command to continue")
    assert PASSWORD not in out + err
    assert not secrets_in(tmp_path)
    again = Run(tmp_path, *named(postgresql, "away", patience))
    status, _, err = again.result()
    assert (status, err) == (0, "")
    assert_whole(again.spec)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_can_be_stopped_while_its_server_is_away(tmp_path, postgresql, number):
    name = f"stopped-{number}"
    run = Run(tmp_path, *named(postgresql, name))
    try:
        run.wait_until(at_work)
        postgresql.stop()
        time.sleep(3)  # by then all wait
        took = run.signal(number)
        status, _, err = run.result()
    finally:
        run.end()
        postgresql.start()
    assert (status, err.splitlines()[-1]) == (128 + number, "stopped; run the same command to continue")
    assert took < 15
    again = Run(tmp_path, *named(postgresql, name))
    status, _, err = again.result()
    assert (status, err) == (0, "")
    assert_whole(again.spec)


def test_a_second_signal_ends_a_run_whose_server_is_frozen(tmp_path, postgresql):
    """It takes what is sent and answers nothing, so that no wait for it ever ends."""
    run = Run(tmp_path, *named(postgresql, "frozen"))
    frozen = []
    try:
        run.wait_until(at_work)
        server = psutil.Process(postgresql.pid)
        frozen = [server, *server.children()]
        for process in frozen:
            process.suspend()
        time.sleep(3)  # by then all wait
        run.process.send_signal(signal.SIGINT)
        time.sleep(5)
        assert run.process.poll() is None  # else nothing is tested
        run.process.send_signal(signal.SIGINT)
        status, _, err = run.result(10)
    finally:
        for process in frozen:
            process.resume()
        run.end()
    assert (status, err) == (130, "stopped; run the same command to continue\n")
    again = Run(tmp_path, *named(postgresql, "frozen"))
    status, _, err = again.result()
    assert (status, err) == (0, "")
    assert_whole(again.spec)


def test_a_frozen_server_is_waited_for_as_one_that_is_away(postgresql, monkeypatch):
    """Each answer for a while, all together for as long as patience lasts; then it goes on."""
    monkeypatch.setattr("optuna_ohgw.postgresql._ANSWER_S", 1.0)
    storage = open_storage(postgresql.url, create=True, patience_s=4)
    held = storage.engine.connect()  # a transaction that has begun
    held.execute(sa.text("SELECT 1"))
    server = psutil.Process(postgresql.pid)
    frozen = [server, *server.children()]
    for process in frozen:
        process.suspend()
    began = time.monotonic()
    try:
        with pytest.raises(StorageLost, match="did not answer for"):
            storage.get_all_studies()
        with pytest.raises(sa.exc.OperationalError, match="no answer within 1 s") as caught:
            held.execute(sa.text("SELECT 1"))
    finally:
        for process in frozen:
            process.resume()
    assert caught.value.connection_invalidated
    assert 4 < time.monotonic() - began < 40  # connecting anew takes up to 10 s
    held.close()
    assert isinstance(storage.get_all_studies(), list)


def test_an_outage_behind_a_proxy_changes_nothing(tmp_path, postgresql, calm):
    port = free_port()
    proxy = proxy_of(postgresql.url, port)
    run = Run(tmp_path, *STUDY, "name=proxied", f"storage=grpc://127.0.0.1:{port}")
    try:
        run.wait_until(at_work)
        for seconds, mode in ((0, "fast"), (5, "immediate")):
            time.sleep(1.5)
            assert run.process.poll() is None, run.process.communicate()
            postgresql.stop(mode)
            time.sleep(seconds)
            postgresql.start()
        status, out, err = run.result()
        assert status == 0, err
        assert PASSWORD not in out + err
        assert not secrets_in(tmp_path)
        assert_whole(run.spec)
        assert_same_outcome(run.spec, calm)
    finally:
        run.end()
        proxy.kill()
        proxy.wait()


def test_two_machines_share_a_study_of_which_one_dies(tmp_path, postgresql, calm):
    """The second has a name, processes and folders of its own; it is killed, and so are its workers."""
    assert shutil.which("unshare"), "part of util-linux"
    overrides = named(postgresql, "machines", "seeds=[3,4,5]", "budget.trials=20")
    here = Run(tmp_path / "here", *overrides)
    flags = [part for pair in (*_settings(tmp_path / "there"), *overrides) for part in ("--set", pair)]
    command = "import socket; socket.sethostname('other'); from optuna_ohgw.cli import main; main()"
    study = Path(__file__).parents[1] / "studies" / "digits.yaml"
    there = subprocess.Popen(
        [*_ELSEWHERE, sys.executable, "-c", command, "run", str(study), *flags],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        here.wait_until(lambda trials: any(_ended_elsewhere(t) for own in trials.values() for t in own))
        there.kill()
        there.wait()
        status, _, err = here.result()
    finally:
        there.kill()
        here.end()
    assert (status, err) == (0, "")
    assert_whole(here.spec)
    ended = (t for own in trials_of(here.spec).values() for t in own if t.state != TrialState.FAIL)
    hosts = {_host(t) for t in ended}
    assert hosts == {"other", os.uname().nodename}


def _settings(folder):
    from command_runs import settings_of

    return settings_of(folder)


def _ended_elsewhere(trial):
    return trial.state.is_finished() and _host(trial) == "other"


def _host(trial):
    return trial.user_attrs.get("worker", {}).get("host")


@pytest.fixture
def databases(postgresql, monkeypatch):
    """Let the tests of :mod:`test_storage` have a database of this server wherever they name a file."""
    made = {}

    def url(folder, name="study"):
        if (folder, name) not in made:
            made[folder, name] = f"own_{uuid.uuid4().hex}"
            with psycopg.connect(postgresql.plain_url, autocommit=True) as connection:
                connection.execute(f"CREATE DATABASE {made[folder, name]}")
        return postgresql.url.replace("/postgres", f"/{made[folder, name]}")

    monkeypatch.setattr(test_storage, "url", url)


ALIKE = [
    (test_storage.test_shows_and_stores_what_optunas_own_does, (s, n)) for s in (True, False) for n in (0, 1)
]
ALIKE += [
    (test, ())
    for test in (
        test_storage.test_another_process_sees_a_rung_and_all_before_it,
        test_storage.test_a_trial_that_ended_takes_no_more,
        test_storage.test_a_trial_that_another_process_ended_keeps_its_end,
        test_storage.test_a_kind_that_another_process_gave_is_known,
        test_storage.test_a_queued_trial_is_taken_by_one,
        test_storage.test_a_waiting_trial_is_taken_once_however_late_its_state_was_read,
    )
]


@pytest.mark.parametrize(("test", "arguments"), ALIKE, ids=lambda part: getattr(part, "__name__", str(part)))
def test_batched_writing_is_the_same_on_postgresql(databases, tmp_path, test, arguments):
    """Values that are not finite, what is written twice, states, and who sees what."""
    test(tmp_path, *arguments)


def test_an_end_is_stored_in_utc_on_postgresql(databases, tmp_path, monkeypatch):
    test_storage.test_an_end_is_stored_in_utc_and_shown_in_local_time(tmp_path, monkeypatch)


def test_all_cells_are_read_at_once_from_postgresql(databases, tmp_path):
    database = optuna.storages.RDBStorage(test_storage.url(tmp_path))
    spec = test_cell_trials.planted_on(database, mbu=900.0)
    both = spec, database, _CachedStorage(database)
    test_cell_trials.test_what_tells_how_far_a_cell_is_agrees_with_optunas_reading(both)
    test_cell_trials.test_databases_and_other_storages_give_the_same_cells(both)


def test_a_missing_database_or_password_is_one_line(tmp_path, postgresql):
    for url in (
        postgresql.url.replace("/postgres", "/nothing"),
        postgresql.url.replace(PASSWORD, "wrong-" + PASSWORD),
    ):
        run = Run(tmp_path / "x", *STUDY, f"storage={url}")
        status, _, err = run.result()
        assert status == 2
        assert err.count("\n") == 1
        assert err.startswith("error: storage: 127.0.0.1:")
        assert PASSWORD not in err
