"""What DyHPO's next choice takes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from optuna_ohgw.bench.clock import Spread

if TYPE_CHECKING:
    from optuna_ohgw.schedulers.deep_kernel import State
    from optuna_ohgw.schedulers.dyhpo import Dyhpo

BAR = 1.0
CANDIDATES, STARTED, DIMENSION, RESOURCE = 600, 500, 8, 50
AFTER, ELSEWHERE, SCRATCH = "after one report", "in a new process, from the state", "without a state"


def print_choices(console: Console, repeats: int) -> None:
    """Print the seconds of a choice, where the model goes on and where it is trained anew."""
    table = Table(title="DyHPO's next choice", box=box.SIMPLE_HEAD, title_justify="left")
    for heading in ("", "s", "n", "bar, s"):
        table.add_column(heading, justify="right" if heading else "left")
    for what, seconds in choices(repeats).items():
        table.add_row(
            what, Spread.of(seconds).text(), f"{len(seconds)}", f"{BAR:g}" if what != SCRATCH else ""
        )
    console.print(table)
    console.print(
        f"{STARTED} of {CANDIDATES} candidates started, {DIMENSION} hyper-parameters; median (range).\n"
        "A new process tells its scheduler all events and hands it the weights that the last one left.",
        highlight=False,
    )


class Pool:
    """Candidates, and all that happened to them."""

    def __init__(self, candidates: int) -> None:
        self._rng = np.random.default_rng(0)
        self._points = self._rng.random((candidates, DIMENSION))
        self._losses = (self._points[:, :3] ** 2).sum(axis=1)
        self._length: dict[int, int] = {}
        self._events: list[tuple[int, int, list[float]]] = []

    def begin(self, started: int) -> None:
        """Train the first candidates for one to three epochs."""
        for config in range(started):
            self.train(config, int(self._rng.integers(1, 4)))

    def train(self, config: int, until: int) -> None:
        """Train a candidate further."""
        epochs = range(self._length.get(config, 0) + 1, until + 1)
        noise = 0.05 * self._rng.normal(size=len(epochs))
        values = [float(self._losses[config] + 1 / e + n) for e, n in zip(epochs, noise, strict=True)]
        self._length[config] = until
        self._events.append((config, until, values))

    def scheduler(self, state: State | None) -> Dyhpo:
        """Return a scheduler that was told of nothing yet."""
        from optuna_ohgw.schedulers.dyhpo import Dyhpo

        return Dyhpo(RESOURCE, self._points, state=state)

    def tell(self, scheduler: Dyhpo, last: int | None = None) -> None:
        """Tell a scheduler all that happened, or the last of it."""
        for config, until, values in self._events if last is None else self._events[-last:]:
            known = scheduler.courses.get(config)
            (scheduler.started if known is None else scheduler.resumed)(config, until)
            for epoch, value in enumerate(values, start=until - len(values) + 1):
                scheduler.report(config, epoch, value)


def choices(repeats: int, started: int = STARTED, candidates: int = CANDIDATES) -> dict[str, list[float]]:
    """Return seconds of choices where so many candidates have reported up to three times, by kind.

    Raises:
        RuntimeError: If a new process chooses another candidate.
    """
    pool, seconds = Pool(candidates), {kind: list[float]() for kind in (AFTER, ELSEWHERE, SCRATCH)}
    pool.begin(started)
    here = pool.scheduler(None)
    pool.tell(here)
    choice = here.choose()
    for _ in range(repeats):
        assert choice is not None
        state = here.state
        pool.train(choice.config, choice.until)
        pool.tell(here, last=1)
        before = time.perf_counter()
        choice = here.choose()
        seconds[AFTER].append(time.perf_counter() - before)
        for kind, known in ((ELSEWHERE, state), (SCRATCH, None)):
            before = time.perf_counter()
            fresh = pool.scheduler(known)
            pool.tell(fresh)
            found = fresh.choose()
            seconds[kind].append(time.perf_counter() - before)
            if kind == ELSEWHERE and found != choice:
                raise RuntimeError(f"bench: a new process chose {found}, this one {choice}")
    return seconds
