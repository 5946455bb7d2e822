"""A storage that fails before or after it did what was asked. Oracle: one that never failed."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time

import optuna
import pytest
import sqlalchemy as sa
from command_runs import STUDY, in_process, spec_of
from faults import AFTER, BEFORE, STATEMENT, Faults
from optuna.distributions import FloatDistribution
from optuna.exceptions import DuplicatedStudyError, StorageInternalError, UpdateFinishedTrialError
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial
from rich.console import Console

from optuna_ohgw.errors import StorageLost
from optuna_ohgw.opening import open_storage
from optuna_ohgw.patience import MADE, Patience, hurried_by, make_patient
from optuna_ohgw.run_study import report_at_the_end
from optuna_ohgw.storage import BatchedStorage

OFF = sa.exc.OperationalError("SELECT", {}, Exception("server closed the connection unexpectedly"))


def database(folder):
    return optuna.storages.RDBStorage(f"sqlite:///{folder / 'study.db'}")


class Faulty:
    """Makes the next calls of a function fail, before or after they are carried out."""

    def __init__(self):
        self.left, self.after, self.count = 0, False, 0

    def next(self, times, *, after):
        self.left, self.after = times, after

    def around(self, function):
        def call(*arguments, **options):
            self.count += 1
            if self.left and not self.after:
                self.left -= 1
                raise OFF
            found = function(*arguments, **options)
            if self.left:
                self.left -= 1
                raise OFF
            return found

        return call


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda _: None)


@pytest.fixture
def shaky(tmp_path):
    """A patient storage with its faults, and a plain view of the same database."""
    storage, faults = database(tmp_path), Faulty()
    for name in ("create_new_study", "set_trial_state_values", "set_trial_user_attr"):
        setattr(storage, name, faults.around(getattr(storage, name)))
    make_patient(storage, Patience(60, "db"))
    return storage, faults, database(tmp_path)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("times", [1, 3])
def test_each_call_is_carried_out_once(shaky, after, times):
    storage, faults, plain = shaky
    faults.next(times, after=after)
    study = storage.create_new_study([StudyDirection.MAXIMIZE], "one")
    assert [s.study_name for s in plain.get_all_studies()] == ["one"]
    faults.next(0, after=False)
    with pytest.raises(DuplicatedStudyError):
        storage.create_new_study([StudyDirection.MAXIMIZE], "one")

    trial = storage.create_new_trial(study, create_trial(state=TrialState.WAITING))
    faults.next(times, after=after)
    # Who took it cannot be told: rather nobody, until it is queued again, than two.
    assert storage.set_trial_state_values(trial, TrialState.RUNNING) is not after
    faults.next(times, after=after)
    storage.set_trial_user_attr(trial, "a", 1)
    faults.next(times, after=after)
    assert storage.set_trial_state_values(trial, TrialState.COMPLETE, [0.5])
    there = plain.get_trial(trial)
    assert (there.state, there.value, there.user_attrs) == (TrialState.COMPLETE, 0.5, {"a": 1})
    with pytest.raises(UpdateFinishedTrialError):
        storage.set_trial_state_values(trial, TrialState.FAIL)


@pytest.mark.parametrize("sole", [True, False])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("times", [1, 2])
def test_what_a_trial_writes_together_is_written_once(tmp_path, sole, after, times):
    plain = database(tmp_path)
    optuna.create_study(study_name="s", storage=plain)
    backend, faults = database(tmp_path), Faulty()
    owner = {} if sole else {"worker": {"claim": 3}}
    storage = BatchedStorage(backend, sole=sole, owner=owner, patience=Patience(60, "db"))
    study = optuna.load_study(study_name="s", storage=storage)
    study.add_trial(create_trial(state=TrialState.WAITING, user_attrs={"k": 0}))
    begin = backend.engine.begin

    @contextlib.contextmanager
    def shaky():
        fails = faults.left > 0
        faults.left -= fails
        if fails and not after:
            raise OFF
        with begin() as connection:
            yield connection
        if fails:
            raise OFF

    backend.engine.begin = shaky
    try:
        faults.left = times
        taken = study.ask()
        assert taken.number == 0  # its own, though the answer was lost
        taken.suggest_float("x", 0, 1)
        taken.report(0.1, 1)
        faults.left = times
        storage.flush()
        taken.report(0.2, 2)
        taken.set_user_attr("k", 1)
        taken.set_user_attr("new", 2)
        faults.left = times
        study.tell(taken.number, 0.2)
    finally:
        del backend.engine.begin
    (there,) = plain.get_all_trials(study._study_id)
    assert (there.state, there.value, there.params) == (TrialState.COMPLETE, 0.2, taken.params)
    assert there.intermediate_values == {1: 0.1, 2: 0.2}
    assert there.user_attrs == {"k": 1, "new": 2, **owner}
    assert there.distributions == {"x": FloatDistribution(0, 1)}


def test_a_trial_that_another_took_is_not_ours(tmp_path):
    plain = database(tmp_path)
    study = optuna.create_study(study_name="s", storage=plain)
    study.add_trial(create_trial(state=TrialState.WAITING))
    backend = database(tmp_path)
    storage = BatchedStorage(backend, owner={"worker": {"claim": 3}}, patience=Patience(60, "db"))
    begin, first = backend.engine.begin, [True]

    def taken_meanwhile():
        if first.pop() if first else False:
            plain.set_trial_state_values(0 + study.get_trials()[0]._trial_id, TrialState.RUNNING)
            raise OFF
        return begin()

    backend.engine.begin = taken_meanwhile
    assert storage.set_trial_state_values(study.get_trials()[0]._trial_id, TrialState.RUNNING) is False
    assert study.get_trials()[0].user_attrs == {}


def test_after_its_time_the_storage_is_lost_in_one_line():
    faults = Faulty()
    faults.next(10**9, after=False)
    with pytest.raises(StorageLost) as caught:
        Patience(0.05, "127.0.0.1/db").call(faults.around(lambda: 7))
    text = str(caught.value)
    assert text.startswith("storage: 127.0.0.1/db did not answer for ")
    assert "(server closed the connection unexpectedly); run the same command to continue" in text
    assert "\n" not in text


def test_the_wait_is_told_once_and_so_is_its_end(monkeypatch):
    told, faults = [], Faulty()
    for level in ("warning", "info"):
        monkeypatch.setattr(
            f"optuna_ohgw.patience.log.{level}", lambda text, *parts: told.append(text % parts)
        )
    faults.next(4, after=False)
    assert Patience(60, "h/db").call(faults.around(lambda: 7)) == 7
    begin, end = told
    assert begin == "h/db does not answer (server closed the connection unexpectedly); waiting"
    assert end.startswith("h/db answers again after ")
    assert faults.count == 5


def test_a_lost_storage_is_not_waited_for_again_before_it_answers():
    patience, faults = Patience(0.05, "db"), Faulty()
    ask = faults.around(lambda: 7)
    faults.next(10**9, after=False)
    for _ in range(2):
        with pytest.raises(StorageLost):
            patience.call(ask)
        tries, faults.count = faults.count, 0
    assert tries == 1
    for answer, raised in ((lambda: 7, contextlib.nullcontext()), (lambda: {}[7], pytest.raises(KeyError))):
        with pytest.raises(StorageLost):
            patience.call(ask)
        with raised:
            patience.call(answer)
        faults.next(2, after=False)
        assert patience.call(ask) == 7
        faults.next(10**9, after=False)


def test_who_is_to_stop_waits_little(monkeypatch):
    monkeypatch.setattr("optuna_ohgw.patience._LAST_S", 0.05)
    stop, faults = threading.Event(), Faulty()
    faults.next(10**9, after=False)
    ask = faults.around(lambda: 7)
    threading.Timer(0.1, stop.set).start()
    with hurried_by(stop), pytest.raises(StorageLost):
        Patience(60, "db").call(ask)
    assert stop.is_set()
    faults.next(1, after=False)
    with hurried_by(stop):
        assert Patience(60, "db").call(ask) == 7  # a hiccup
    faults.next(10**9, after=False)
    began = time.monotonic()
    with pytest.raises(StorageLost):
        Patience(0.3, "db").call(ask)  # it is of those inside alone
    assert time.monotonic() - began >= 0.3


def test_a_worker_waits_for_its_storage_at_its_start_too(tmp_path, monkeypatch):
    optuna.create_study(study_name="s", storage=database(tmp_path))
    faults = Faulty()
    monkeypatch.setattr("optuna_ohgw.opening.RDBStorage", faults.around(optuna.storages.RDBStorage))
    faults.next(2, after=False)
    url = f"sqlite:///{tmp_path / 'study.db'}"
    assert open_storage(url, create=False, wait=True).get_all_studies()[0].study_name == "s"


def test_the_report_at_the_end_waits_for_its_storage(tmp_path, monkeypatch):
    class Reported(Exception):
        pass

    def report(*_, **__):
        raise Reported

    spec = spec_of(tmp_path)
    with in_process(spec):
        faults = Faulty()
    monkeypatch.setattr("optuna_ohgw.opening.RDBStorage", faults.around(optuna.storages.RDBStorage))
    monkeypatch.setattr("optuna_ohgw.report.report_study", report)
    faults.next(2, after=False)
    with pytest.raises(Reported):
        report_at_the_end(spec, STUDY, False, Console())


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    """A database with Optuna's tables: to make them takes longer than all that is tried here."""
    folder = tmp_path_factory.mktemp("empty")
    database(folder)
    return folder / "study.db"


def opened(file):
    storage = optuna.storages.RDBStorage(
        f"sqlite:///{file}", skip_compatibility_check=True, skip_table_creation=True
    )
    # Nothing here outlives a power cut.
    sa.event.listen(storage.engine, "connect", lambda c, _: c.execute("PRAGMA synchronous=OFF"))
    return storage


def search(storage, *, takes):
    """Do to a study what a search does; return what was seen on the way."""
    sampler = optuna.samplers.RandomSampler(seed=0)
    study = optuna.create_study(
        study_name="s", storage=storage, sampler=sampler, direction="maximize", load_if_exists=True
    )
    study.set_user_attr("seed", 3)
    if takes:
        study.add_trial(create_trial(state=TrialState.WAITING, user_attrs={"k": 0}, system_attrs={"a": 1}))
    for state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL):
        trial = study.ask()
        trial.suggest_float("x", 0, 1)
        trial.report(0.1, 1)
        trial.set_user_attr("k", trial.number)
        storage.set_trial_system_attr(trial._trial_id, "rung", 0.1)
        trial.report(0.2, 2)
        study.tell(trial.number, 0.2 if state == TrialState.COMPLETE else None, state)
    study.ask().suggest_float("x", 0, 1)
    study.add_trial(create_trial(state=TrialState.WAITING, user_attrs={"k": 0}))
    study.add_trial(create_trial(state=TrialState.WAITING, user_attrs={"k": 0}))  # another, though alike
    other = storage.create_new_study([StudyDirection.MINIMIZE], "other")
    storage.delete_study(other)
    return study.best_value, [t.state for t in study.get_trials()]


def kept(file):
    """Return what a search left in a database, without times and marks."""
    storage = opened(file)
    (study,) = storage.get_all_studies()
    found = []
    for trial in storage.get_all_trials(study._study_id):
        system = {name: value for name, value in trial.system_attrs.items() if name != MADE}
        own = trial.number, trial.state, trial.values, trial.params, trial.intermediate_values
        found.append((*own, trial.user_attrs, system))
    return study.study_name, study.user_attrs, found


def faulty(file, form):
    backend, patience = opened(file), Patience(60, "db")
    faults = Faults(backend.engine)
    make_patient(backend, patience)
    owner = {"worker": {"claim": 3}} if form == "shared" else {}
    if form == "plain":
        return backend, faults
    return BatchedStorage(backend, sole=form == "sole", owner=owner, patience=patience), faults


def sweeps():
    """Yield which form of storage breaks how, and how far apart the moments are."""
    for form in ("plain", "sole", "shared"):
        for kind, few, many in ((BEFORE, 9, 1), (AFTER, 9, 1), (STATEMENT, 47, 4)):
            if form != "plain":
                yield form, kind, few
            yield pytest.param(form, kind, many, marks=pytest.mark.slow)


@pytest.mark.parametrize(("form", "kind", "step"), list(sweeps()))
def test_wherever_the_database_breaks_a_search_leaves_the_same(tmp_path, empty, form, kind, step):
    """One commit or statement after the other is let fail, each in a search of its own."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    takes, calm = form != "plain", shutil.copy(empty, tmp_path / "calm.db")
    storage, faults = faulty(calm, form)
    with faults.inside():
        seen = search(storage, takes=takes)
    expected = kept(calm)
    count = faults.statements if kind == STATEMENT else faults.commits
    assert count > 20
    for at in range(0, count, step):
        file = shutil.copy(empty, tmp_path / "broken.db")
        storage, faults = faulty(file, form)
        faults.choose(kind, at, times=1 + at % 2)
        with faults.inside():
            assert search(storage, takes=takes) == seen, at
        assert faults.hit, at
        assert kept(file) == expected, at


def test_without_patience_an_error_is_what_it_is(tmp_path, empty):
    backend = opened(shutil.copy(empty, tmp_path / "study.db"))
    storage, faults = BatchedStorage(backend, sole=True), Faults(backend.engine)
    study = optuna.create_study(storage=storage)
    trial = study.ask()
    trial.report(0.5, 1)
    faults.choose(BEFORE, 0)
    with faults.inside(), pytest.raises(StorageInternalError, match="server closed the connection"):
        storage.flush()
