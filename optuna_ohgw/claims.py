"""Who works on which cell: claims in the storage, so that any number of machines share a study."""

from __future__ import annotations

import copy
import logging
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from optuna_ohgw.cells import Cell, cells_of, has_work
from optuna_ohgw.history import FINAL, INTERRUPTED, WORKER
from optuna_ohgw.identity import identity, is_here, lives
from optuna_ohgw.schedulers.pruners import SchedulerPruner
from optuna_ohgw.spec import StudySpec

BEAT_S, GRACE_S = 10.0, 60.0
CELL, BEAT, ERROR, DONE, DEVICE = "cell", "beat", "error", "done", "device"
AT_MOST = "at_most"  # workers on the cell, as the claimant's own study file has it
_ALIVE, _DEAD, _UNKNOWN = "alive", "dead", "unknown"
_MADE_BY = "made_by"
log = logging.getLogger("optuna_ohgw.claims")


@dataclass(frozen=True)
class Claim:
    """A worker's right to work on a cell, until it is released."""

    cell: Cell
    number: int
    trial_id: int


class Pulse:
    """Tells which claims are those of living workers.

    One of this machine lives while its process does. One of another lives if its beat changes; it is
    dead when the beat has stood still for a while that this process watched, by its own clock, so no
    two clocks are compared, and a storage that was away for a time kills nobody.

    Args:
        grace: Seconds that a beat may stand still.
        clock: Seconds that only rise.
    """

    def __init__(self, grace: float = GRACE_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._grace, self._clock = grace, clock
        self._beats: dict[int, tuple[int, float]] = {}  # claim: its beat, and since when
        self._first: dict[int, int] = {}
        self._looked = clock()

    def of(self, claims: Iterable[FrozenTrial]) -> dict[int, str]:
        """Return by number whether each claim is ``alive``, ``dead`` or not ``unknown`` yet."""
        now = self._clock()
        if now - self._looked > self._grace / 2:
            self._beats.clear()  # nobody looked meanwhile
        self._looked = now
        return {claim.number: self._one(claim, now) for claim in claims}

    def _one(self, claim: FrozenTrial, now: float) -> str:
        if claim.state != TrialState.RUNNING:
            return _DEAD
        if is_here(claim.user_attrs):
            return _ALIVE if lives(claim.user_attrs) else _DEAD
        beat = int(claim.user_attrs.get(BEAT, 0))
        first = self._first.setdefault(claim.number, beat)
        known, since = self._beats.setdefault(claim.number, (beat, now))
        if known != beat:
            self._beats[claim.number] = beat, now
            since = now
        if now - since > self._grace:
            return _DEAD
        return _ALIVE if beat != first else _UNKNOWN


def claims_of(storage: BaseStorage, spec: StudySpec) -> list[FrozenTrial]:
    """Return all claims that were ever made, by number; none where no worker has begun."""
    try:
        study_id = storage.get_study_id_from_name(f"{spec.name}/workers")
    except KeyError:
        return []
    return storage.get_all_trials(study_id, deepcopy=False)


def as_left(
    trials: Iterable[FrozenTrial], claims: Iterable[FrozenTrial], how: Mapping[int, str], *, shared: bool
) -> list[FrozenTrial]:
    """Return a cell's trials, those that a dead worker left running as the interrupted ones they will be.

    One that does not tell its worker yet runs while the cell is held; one of a claim that is not among
    those given, too, as it was made since. Where a cell has one worker at a time, what it runs may bear
    the mark of whom it was taken over from until it is next written.

    Args:
        trials: Of the cell.
        claims: On the cell, all that were ever made.
        how: Of a :class:`Pulse`.
        shared: Whether several may hold the cell.
    """
    numbers = {claim.number for claim in claims}
    living = {number for number in numbers if how[number] != _DEAD}

    def is_left(trial: FrozenTrial) -> bool:
        own = trial.user_attrs.get(WORKER, {}).get("claim")
        if own is None or (living and not shared):
            return bool(numbers) and not living
        return own in numbers - living

    return [_interrupted(t) if t.state == TrialState.RUNNING and is_left(t) else t for t in trials]


def _interrupted(trial: FrozenTrial) -> FrozenTrial:
    left = copy.copy(trial)
    left.state, left.user_attrs = TrialState.FAIL, {**trial.user_attrs, "reason": INTERRUPTED}
    return left


def workers_study(storage: BaseStorage, spec: StudySpec) -> int:
    """Return the id of the study that holds the claims, ``NAME/workers``; made if it is not there."""
    name = f"{spec.name}/workers"
    try:
        return storage.create_new_study([StudyDirection.MAXIMIZE], name)
    except optuna.exceptions.DuplicatedStudyError:
        return storage.get_study_id_from_name(name)


class Claims:
    """A worker's view of all claims of a study, and its own.

    A claim is a running trial of the study ``NAME/workers``; numbers are given in one order that all
    processes see. A claim holds if fewer than ``execution.workers`` living ones on the same cell have a
    lower number; else it is withdrawn. So no lock is needed, and no two machines' clocks. Where runs
    differ in ``execution.workers`` the fewest hold: one that is alone writes as if nobody else did.

    Args:
        storage: The database, as it is (what waits in a worker's cache is not seen by others).
        spec: The study.
        device: What this worker trains on, for those who look.
        pulse: Which claims are those of living workers.
    """

    def __init__(
        self, storage: BaseStorage, spec: StudySpec, device: str, pulse: Pulse | None = None
    ) -> None:
        self._storage, self._spec, self._device = storage, spec, device
        self._study = workers_study(storage, spec)
        self._pulse = pulse or Pulse()
        self._left = cells_of(spec)
        self._limits: dict[int, int] = {}  # of the running claims: how many their workers let in
        self._idle: dict[Cell, tuple[int, int]] = {}  # how a cell was when nothing was found in it
        self._beats, self._me, self._own_id = 0, uuid.uuid4().hex, -1
        self._since = storage.get_n_trials(self._study)
        self.own: Claim | None = None

    def take(self) -> Claim | None:
        """Return a claim on the first cell that needs another worker; None where none does now."""
        pulses, errors = self.pulses(), self.errors()
        for cell in list(self._left):
            holders = self._holders(cell, pulses)
            full = len(holders) >= self._at_most(holders)
            if full or self._is_over(cell, errors) or not self._needs(cell, bool(holders)):
                continue
            claim = self._claim(cell)
            if claim is not None:
                return claim
        return None

    def may_need_me(self) -> bool:
        """Return whether a cell may yet need this worker: one is not full, or full of who may be dead."""
        pulses, errors = self.pulses(), self.errors()
        for cell in list(self._left):
            if self._is_over(cell, errors):
                continue
            known = [number for number, how in self._holders(cell, pulses).items() if how == _ALIVE]
            if len(known) < self._at_most(known):
                return True
        return False

    def release(self, *, done: bool = False, error: str | None = None) -> None:
        """Give the claim back: nothing to do in the cell, ``done`` to its end, or given up by an error."""
        claim, self.own = self.own, None
        assert claim is not None
        if not done and error is None:
            self._idle[claim.cell] = self._state(claim.cell)
        try:
            if done:
                self._storage.set_trial_user_attr(claim.trial_id, DONE, True)
            if error is not None:
                self._storage.set_trial_user_attr(claim.trial_id, ERROR, error)
            self._end(claim.trial_id, TrialState.PRUNED if error is None else TrialState.FAIL)
        except UpdateFinishedTrialError:
            log.warning("the claim on %s was taken for a dead worker's", claim.cell.label)

    def beat(self) -> bool:
        """Tell that this worker lives; return False if its claim was ended by another."""
        claim = self.own
        if claim is None:
            return True
        self._beats += 1
        try:
            self._storage.set_trial_user_attr(claim.trial_id, BEAT, self._beats)
        except UpdateFinishedTrialError:
            return claim is not self.own
        return True

    def pulses(self) -> dict[int, tuple[str, str]]:
        """Return the running claims: number ↦ (label of the cell, ``alive`` or ``unknown``).

        Those found dead are ended, so that a worker that only seemed so learns of it.
        """
        running = self._running()
        found = self._pulse.of(running)
        for claim in running:
            if claim.user_attrs.get(_MADE_BY) == self._me and claim._trial_id != self._own_id:
                found[claim.number] = _DEAD  # made twice, since the storage's answer was lost
        for claim in running:
            if found[claim.number] == _DEAD:
                try:
                    self._end(claim._trial_id, TrialState.FAIL)
                except UpdateFinishedTrialError:
                    continue  # it was given back meanwhile
                log.info("a worker of %s on %s is gone", claim.user_attrs[CELL], claim.user_attrs["host"])
        self._limits = {c.number: c.user_attrs[AT_MOST] for c in running if AT_MOST in c.user_attrs}
        return {c.number: (c.user_attrs[CELL], found[c.number]) for c in running if found[c.number] != _DEAD}

    def alive(self) -> Callable[[FrozenTrial], bool]:
        """Return trial ↦ whether another living worker trains it, as of now or of when it is asked.

        One whose claim was made since may have begun a trial before the caller read it.
        """
        own, before = self.own.number if self.own else None, self.pulses()

        def lives(trial: FrozenTrial) -> bool:
            claim = trial.user_attrs.get(WORKER, {}).get("claim")
            return claim is not None and claim != own and (claim in before or claim in self.pulses())

        return lives

    def is_sole(self) -> bool:
        """Return whether no other living worker holds the cell: between two trials one may yet go on."""
        assert self.own is not None
        return self._holders(self.own.cell, self.pulses()).keys() <= {self.own.number}

    def since(self, first: int) -> tuple[set[str], int]:
        """Return the cells that were claimed from a number on, and the next number."""
        claims = self._storage.get_all_trials(self._study, deepcopy=False)
        return {c.user_attrs[CELL] for c in claims[first:]}, len(claims)

    def errors(self) -> dict[str, str]:
        """Return the cells that were given up since this object was made, each with its last error."""
        failed = self._storage.get_all_trials(self._study, deepcopy=False, states=(TrialState.FAIL,))
        return {
            t.user_attrs[CELL]: t.user_attrs[ERROR]
            for t in failed
            if t.number >= self._since and ERROR in t.user_attrs
        }

    def _claim(self, cell: Cell) -> Claim | None:
        own = {CELL: cell.label, DEVICE: self._device, AT_MOST: self._spec.execution.workers}
        attributes = {**own, _MADE_BY: self._me, **identity()}
        template = create_trial(state=TrialState.RUNNING, user_attrs=attributes)
        trial_id = self._storage.create_new_trial(self._study, template)
        self._own_id = trial_id
        number = self._storage.get_trial(trial_id).number
        before = [n for n in self._holders(cell, self.pulses()) if n < number]
        if len(before) >= self._at_most(before) or self._is_over(cell, {}):
            self._end(trial_id, TrialState.PRUNED)
            return None
        self.own = Claim(cell, number, trial_id)
        return self.own

    def _holders(self, cell: Cell, pulses: Mapping[int, tuple[str, str]]) -> dict[int, str]:
        return {number: how for number, (label, how) in pulses.items() if label == cell.label}

    def _at_most(self, holders: Iterable[int]) -> int:
        """Return how many may work on a cell: the fewest that its holders and this worker let in."""
        own = self._spec.execution.workers
        return min([own, *(self._limits.get(number, own) for number in holders)])

    def _needs(self, cell: Cell, held: bool) -> bool:
        if not held:
            return True
        if self._state(cell) == self._idle.get(cell):
            return False
        from optuna_ohgw.cell_study import load_cell  # it imports pandas, which whoever only looks needs not

        study = load_cell(self._storage, self._spec, cell)
        return has_work(study, self._spec) or isinstance(study.pruner, SchedulerPruner)

    def _is_over(self, cell: Cell, errors: Mapping[str, str]) -> bool:
        try:
            attributes = self._storage.get_study_user_attrs(self._id(cell))
        except KeyError:
            return False  # a replay's, which is being made anew
        over = FINAL in attributes or cell.label in errors
        if over:
            self._left.remove(cell)
        return over

    def _id(self, cell: Cell) -> int:
        # Not kept: the cell of a replay is made anew.
        return self._storage.get_study_id_from_name(cell.name)

    def _state(self, cell: Cell) -> tuple[int, int]:
        trials = self._storage.get_all_trials(self._id(cell), deepcopy=False)
        return len(trials), sum(t.state.is_finished() for t in trials)

    def _running(self) -> list[FrozenTrial]:
        return self._storage.get_all_trials(self._study, deepcopy=False, states=(TrialState.RUNNING,))

    def _end(self, trial_id: int, state: TrialState) -> None:
        self._storage.set_trial_state_values(trial_id, state)
