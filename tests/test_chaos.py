"""Workers killed at random moments. Oracle: the run that nobody disturbed."""

from __future__ import annotations

import random
import time

import psutil
import pytest
from command_runs import Run, assert_same_outcome, assert_whole, run_in_process, spec_of, trials_of
from optuna.trial import TrialState

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # on a busy machine
KILLS = 30
STUDY = (
    "seeds=[3,4,5,6]",
    "budget.trials=6",
    "execution={workers: 1, cells_at_once: 4, threads: 1, device: cpu, checkpoint_s: 0.3}",
)


def workers_of(run: Run) -> list[psutil.Process]:
    """Return the worker processes: what the fork server of the command forked."""
    try:
        return [w for child in psutil.Process(run.process.pid).children() for w in child.children()]
    except psutil.NoSuchProcess:
        return []


def test_thirty_kills_lose_nothing_and_double_nothing(tmp_path):
    calm = spec_of(tmp_path / "calm", *STUDY)
    run_in_process(calm)
    run = Run(tmp_path / "chaos", *STUDY)
    try:
        run.wait_until(
            lambda trials: any(t.state == TrialState.RUNNING for own in trials.values() for t in own)
        )
        draws, killed = random.Random(0), 0
        while killed < KILLS and run.process.poll() is None:
            time.sleep(draws.uniform(0, 1.5))
            workers = workers_of(run)
            if len(workers) > 1:  # the others are at work, or starting
                draws.choice(workers).kill()
                killed += 1
        status, out, err = run.result()
    finally:
        run.end()
    assert (status, err) == (0, "")
    assert killed == KILLS
    assert out.count("ended by signal 9 (SIGKILL); another takes its place") >= KILLS - 4
    assert_whole(run.spec)
    assert_same_outcome(run.spec, calm)
    again = [t for own in trials_of(run.spec).values() for t in own if t.state == TrialState.FAIL]
    assert len(again) > KILLS / 3, "too few kills came while a trial was trained"
