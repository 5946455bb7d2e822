"""Waiting for a storage that does not answer: a server that restarts, a cut network, a full disk."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import sqlalchemy as sa
from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages._rdb import models
from optuna.storages._rdb.storage import _create_scoped_session
from optuna.trial import FrozenTrial, TrialState, create_trial
from tenacity import RetryCallState, Retrying, nap, retry_if_exception, wait_random_exponential

from optuna_ohgw.errors import StorageLost
from optuna_ohgw.outages import is_outage, reason_of

T = TypeVar("T")
MADE = "ohgw:made"  # system attribute: tells a trial from any other, before its number is known
_LONGEST_WAIT_S = 5.0
_LAST_S, _SLICE_S = 3.0, 0.25  # for how long a process waits that is to stop, and how soon it notices
# Calls that reach the database; others are made of these. The last ones are those of Optuna's cache.
_CALLS = (
    "create_new_study",
    "delete_study",
    "set_study_user_attr",
    "set_study_system_attr",
    "get_study_id_from_name",
    "get_study_name_from_id",
    "get_study_directions",
    "get_study_user_attrs",
    "get_study_system_attrs",
    "get_all_studies",
    "set_trial_param",
    "set_trial_state_values",
    "set_trial_intermediate_value",
    "set_trial_user_attr",
    "set_trial_system_attr",
    "get_trial",
    "get_all_trials",
    "get_n_trials",
    "get_trial_id_from_study_id_trial_number",
    "_get_trials",
    "_get_best_trial_id",
    "_set_trial_param",
)
_inside = threading.local()  # a call that waits: those that it makes do not
_stops: list[threading.Event] = []
log = logging.getLogger("optuna_ohgw.patience")


@contextlib.contextmanager
def hurried_by(stop: threading.Event) -> Iterator[None]:
    """Let no call of this process wait for long once ``stop`` is set, while inside."""
    _stops.append(stop)
    try:
        yield
    finally:
        _stops.remove(stop)


class Patience:
    """Repeats what failed since the storage did not answer, with growing waits, for a time.

    Once the storage is lost no call waits again before it answers: who gives up makes a few more.

    Args:
        seconds: For how long; then :class:`StorageLost` is raised.
        where: The storage as it may be shown.
    """

    def __init__(self, seconds: float, where: str) -> None:
        self.seconds, self.where = seconds, where
        self._lost = False

    def call(self, function: Callable[[], T], again: Callable[[], T] | None = None) -> T:
        """Return what a function returns, repeated while the storage does not answer.

        A call that failed may have been carried out: its answer, not its work, may be lost.

        Args:
            function: What to do.
            again: What to do from the second time on, where it is not the same.

        Raises:
            StorageLost: If the storage does not answer for too long.
        """
        if getattr(_inside, "it", False):
            return function()
        _inside.it = True
        try:
            retrying = Retrying(
                retry=retry_if_exception(self._is_away),
                wait=wait_random_exponential(multiplier=0.1, max=_LONGEST_WAIT_S),
                stop=self._is_over,
                sleep=_sleep,
                before_sleep=self._begin,
                retry_error_callback=self._give_up,
            )
            began, tries = time.monotonic(), 0

            def attempt() -> T:
                nonlocal tries
                tries += 1
                return function() if tries == 1 or again is None else again()

            found = retrying(attempt)
            self._lost = False
            if tries > 1:
                log.info("%s answers again after %.1f s", self.where, time.monotonic() - began)
            return found
        finally:
            _inside.it = False

    @staticmethod
    def once(function: Callable[[], T], again: Callable[[], T] | None = None) -> T:
        """Return what a function returns, without patience."""
        return function()

    def _is_away(self, error: BaseException) -> bool:
        away = is_outage(error)
        self._lost = self._lost and away
        return away

    def _is_over(self, state: RetryCallState) -> bool:
        limit = min(self.seconds, _LAST_S) if _is_stopping() else self.seconds
        return self._lost or (state.seconds_since_start or 0.0) >= limit

    def _begin(self, state: RetryCallState) -> None:
        if state.attempt_number == 1:
            log.warning("%s does not answer (%s); waiting", self.where, reason_of(_error(state)))

    def _give_up(self, state: RetryCallState) -> Any:
        self._lost = True
        error = _error(state)
        waited = f"{state.seconds_since_start or 0.0:.0f} s"
        raise StorageLost(
            f"storage: {self.where} did not answer for {waited} ({reason_of(error)}); "
            "run the same command to continue"
        ) from error


def make_patient(storage: BaseStorage, patience: Patience) -> None:
    """Let the calls of a storage wait for it, each carried out once even where its answer was lost."""
    for name in _CALLS:
        if hasattr(storage, name):
            setattr(storage, name, _patient(storage, name, patience))
    if isinstance(storage, RDBStorage):
        once = functools.partial(_create_once, storage)
        storage._create_new_trial = _patient_creation(  # type: ignore[method-assign]
            storage, once, patience, lambda trial: trial
        )
    else:
        storage.create_new_trial = _patient_creation(  # type: ignore[method-assign]
            storage, storage.create_new_trial, patience, lambda trial: trial._trial_id
        )


def _patient(storage: BaseStorage, name: str, patience: Patience) -> Callable[..., Any]:
    plain = getattr(storage, name)
    again = _AGAIN.get(name)

    @functools.wraps(plain)
    def call(*arguments: Any, **options: Any) -> Any:
        repeat = None if again is None else functools.partial(again, storage, plain, *arguments, **options)
        return patience.call(functools.partial(plain, *arguments, **options), repeat)

    return call


def _patient_creation(
    storage: BaseStorage,
    plain: Callable[[int, FrozenTrial], T],
    patience: Patience,
    answer: Callable[[FrozenTrial], T],
) -> Callable[..., T]:
    """Return a function that makes one trial: it bears a mark, which is looked for before a repeat."""

    def call(study_id: int, template_trial: FrozenTrial | None = None) -> T:
        marked = copy.copy(template_trial or create_trial(state=TrialState.RUNNING))
        mark = uuid.uuid4().hex
        marked.system_attrs = {**marked.system_attrs, MADE: mark}

        def again() -> T:
            trials = storage.get_all_trials(study_id, deepcopy=False)
            there = next((t for t in trials if t.system_attrs.get(MADE) == mark), None)
            return plain(study_id, marked) if there is None else answer(there)

        return patience.call(lambda: plain(study_id, marked), again)

    return call


def _create_once(storage: RDBStorage, study_id: int, template: FrozenTrial) -> FrozenTrial:
    """Make a trial by Optuna's own steps, without its own five tries, each of which may make one.

    All attributes go in one statement, not each in a look and a statement of its own.
    """
    bare = copy.copy(template)
    bare.user_attrs, bare.system_attrs = {}, {}
    kinds = {models.TrialUserAttributeModel: template.user_attrs}
    kinds |= {models.TrialSystemAttributeModel: template.system_attrs}
    with _create_scoped_session(storage.scoped_session) as session:
        models.StudyModel.find_or_raise_by_id(study_id, session, for_update=True)
        row = storage._get_prepared_new_trial(study_id, bare, session)
        for model, attributes in kinds.items():
            rows = [
                {"trial_id": row.trial_id, "key": key, "value_json": json.dumps(value)}
                for key, value in attributes.items()
            ]
            if rows:
                session.execute(sa.insert(model), rows)
        trial = copy.deepcopy(template)
        trial.number, trial._trial_id = int(row.number), int(row.trial_id)
        trial.datetime_start = row.datetime_start
        return trial


def _study_again(
    storage: BaseStorage, plain: Callable[..., int], directions: Any, study_name: str | None = None
) -> int:
    """Make a study unless the first try did; callers take one that is there for their own."""
    try:
        return plain(directions, study_name)
    except DuplicatedStudyError:
        if study_name is None:
            raise
        return storage.get_study_id_from_name(study_name)


def _delete_again(storage: BaseStorage, plain: Callable[..., None], study_id: int) -> None:
    """Delete a study unless the first try did."""
    if any(study._study_id == study_id for study in storage.get_all_studies()):
        plain(study_id)


def _state_again(
    storage: BaseStorage,
    plain: Callable[..., bool],
    trial_id: int,
    state: TrialState,
    values: Any = None,
) -> bool:
    """Set a state unless the first try did."""
    try:
        return plain(trial_id, state, values)
    except UpdateFinishedTrialError:
        if storage.get_trial(trial_id).state == state:
            return True
        raise


_AGAIN: dict[str, Callable[..., Any]] = {
    "create_new_study": _study_again,
    "delete_study": _delete_again,
    "set_trial_state_values": _state_again,
}


def _is_stopping() -> bool:
    return any(stop.is_set() for stop in _stops)


def _sleep(seconds: float) -> None:
    """Sleep, but not much longer than until this process is to stop."""
    stopping = _is_stopping()
    while seconds > 0 and _is_stopping() == stopping:
        nap.sleep(min(seconds, _SLICE_S))
        seconds -= _SLICE_S


def _error(state: RetryCallState) -> BaseException:
    assert state.outcome is not None
    error = state.outcome.exception()
    assert error is not None
    return error
