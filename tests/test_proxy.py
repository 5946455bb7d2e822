"""Studies behind Optuna's gRPC proxy. Oracle: the same on the database itself."""

from __future__ import annotations

import contextlib
import shutil
import time

import grpc
import optuna
import pytest
from command_runs import Run, assert_same_outcome, assert_whole, run_in_process, spec_of
from optuna.storages._grpc.server import make_server
from optuna.trial import TrialState, create_trial
from proxy_server import free_port, proxy_of
from test_patience import kept, opened, search
from test_storage import operate, study_on, view

from optuna_ohgw.doctor.storage import check_storage
from optuna_ohgw.errors import StorageLost, UserError
from optuna_ohgw.opening import for_trials, open_storage
from optuna_ohgw.patience import Patience, make_patient
from optuna_ohgw.proxy import ProxyStorage


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    file = tmp_path_factory.mktemp("empty") / "study.db"
    optuna.storages.RDBStorage(f"sqlite:///{file}").engine.dispose()
    return file


@contextlib.contextmanager
def served(file):
    """Yield the port of a server before an SQLite file."""
    port = free_port()
    server = make_server(optuna.storages.get_storage(opened(file)), "127.0.0.1", port)
    server.start()
    try:
        yield port
    finally:
        server.stop(None).wait()


@pytest.fixture
def port(tmp_path, empty):
    with served(shutil.copy(empty, tmp_path / "study.db")) as one:
        yield one


@pytest.mark.parametrize("seed", range(2))
def test_shows_and_stores_what_the_database_does(tmp_path, empty, port, seed):
    plain = opened(shutil.copy(empty, tmp_path / "plain.db"))
    expected = operate(study_on(plain), seed)
    assert operate(study_on(ProxyStorage("127.0.0.1", port)), seed) == expected
    there = [view(s.get_all_trials(1)) for s in (plain, opened(tmp_path / "study.db"))]
    assert there[0] == there[1]


class Broken(grpc.RpcError):
    """What a client raises whose server is gone."""

    def code(self):
        return grpc.StatusCode.UNAVAILABLE

    def details(self):
        return "failed to connect to all addresses"


class Faults:
    """Lets the chosen one of all calls to the server fail, before or after it is carried out."""

    def __init__(self):
        self.calls, self.at, self.after = 0, -1, False

    def into(self, storage):
        for holder, name in ((storage, "_stub"), (storage._cache, "grpc_client")):
            setattr(holder, name, _Stub(getattr(holder, name), self))


class _Stub:
    def __init__(self, stub, faults):
        self._plain, self._faults = stub, faults

    def __getattr__(self, name):
        plain, faults = getattr(self._plain, name), self._faults

        def call(request):
            number, faults.calls = faults.calls, faults.calls + 1
            if number == faults.at and not faults.after:
                raise Broken
            answer = plain(request)
            if number == faults.at:
                raise Broken
            return answer

        return call


def faulty(port, *, sole):
    storage, faults = ProxyStorage("127.0.0.1", port, sole=sole, owner={"worker": {"claim": 3}}), Faults()
    faults.into(storage)
    make_patient(storage, Patience(60, "db"))
    return storage, faults


@pytest.mark.parametrize(("sole", "takes"), [(True, True), (False, False)])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("step", [17, pytest.param(1, marks=pytest.mark.slow)])
def test_whichever_call_breaks_a_search_leaves_the_same(
    tmp_path, empty, sole, takes, after, step, monkeypatch
):
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda _: None)
    file, calm = tmp_path / "broken.db", tmp_path / "calm.db"
    with served(shutil.copy(empty, calm)) as port:
        storage, faults = faulty(port, sole=sole)
        seen = search(storage, takes=takes)
    expected, count = kept(calm), faults.calls
    for at in range(0, count, step):
        with served(shutil.copy(empty, file)) as port:
            storage, faults = faulty(port, sole=sole)
            faults.at, faults.after = at, after
            assert search(storage, takes=takes) == seen, at
        assert kept(file) == expected, at


def test_a_running_trial_has_an_owner_before_it_runs(tmp_path, port):
    plain = opened(tmp_path / "study.db")
    one, two = (
        for_trials(
            open_storage(f"grpc://127.0.0.1:{port}", create=False),
            sole=False,
            owner={"worker": {"claim": n}},
            patience=Patience(1, "db"),
        )
        for n in (1, 2)
    )
    study = optuna.create_study(study_name="s", storage=one)
    study.add_trial(create_trial(state=TrialState.WAITING))
    (waiting,) = study.get_trials()
    states = []
    write = one.set_trial_user_attr
    one.set_trial_user_attr = lambda *a: (states.append(plain.get_trial(waiting._trial_id).state), write(*a))
    assert one.set_trial_state_values(waiting._trial_id, TrialState.RUNNING)
    assert states == [TrialState.WAITING]
    assert not two.set_trial_state_values(waiting._trial_id, TrialState.RUNNING)
    assert optuna.load_study(study_name="s", storage=two).ask().number == 1
    assert [t.user_attrs["worker"]["claim"] for t in study.get_trials()] == [1, 2]


@pytest.mark.parametrize("url", ["grpc://", "grpc://u:secret@h:1", "grpc://h:1/db", "grpc://h:port"])
def test_another_url_is_told_how_to_be_written(url):
    with pytest.raises(UserError, match="name another by --storage URL") as caught:
        open_storage(url, create=False)
    assert "secret" not in str(caught.value)


def test_a_server_that_is_not_there_is_one_line():
    free = free_port()
    with pytest.raises(UserError) as caught:
        open_storage(f"grpc://127.0.0.1:{free}", create=False)
    text = str(caught.value)
    assert text.startswith(f"storage: grpc://127.0.0.1:{free} cannot be used (failed to connect to all ")
    assert "\n" not in text
    reachable = check_storage(f"grpc://127.0.0.1:{free}", None)[-1]
    assert (reachable.name, reachable.outcome) == ("reachable", "fail")
    assert reachable.remedy == "check host, port and firewall, and that the server runs"


def test_a_server_that_goes_is_lost_after_a_while(tmp_path, empty):
    with served(shutil.copy(empty, tmp_path / "study.db")) as port:
        storage = open_storage(f"grpc://127.0.0.1:{port}", create=False, patience_s=0.5)
    with pytest.raises(StorageLost, match="did not answer for "):
        storage.get_all_studies()


def test_the_doctor_looks_at_a_proxy(port):
    checks = check_storage(f"grpc://127.0.0.1:{port}", None)
    assert [(c.name, c.outcome) for c in checks] == [("reachable", "ok"), ("writable", "ok")]
    assert optuna.get_all_study_names(ProxyStorage("127.0.0.1", port)) == []


@pytest.mark.slow
def test_a_run_whose_proxy_is_killed_twice_ends_as_a_calm_one(tmp_path):
    calm = spec_of(tmp_path / "calm")
    run_in_process(calm)
    file, port = tmp_path / "study.db", free_port()
    server = proxy_of(f"sqlite:///{file}", port)
    run = Run(tmp_path / "run", f"storage=grpc://127.0.0.1:{port}")
    try:
        run.wait_until(
            lambda trials: any(t.state == TrialState.RUNNING for own in trials.values() for t in own)
        )
        for _ in range(2):
            time.sleep(1)
            server.kill()
            server.wait()
            time.sleep(2)
            server = proxy_of(f"sqlite:///{file}", port)
        status, _, err = run.result()
        assert status == 0, err
        assert all(" does not answer (" in line for line in err.splitlines()), err
        assert_whole(run.spec)
        assert_same_outcome(run.spec, calm)
    finally:
        run.end()
        server.kill()
        server.wait()
