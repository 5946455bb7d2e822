"""Studies on a real MySQL server (MariaDB) that is killed. Oracle: a calm run on SQLite."""

from __future__ import annotations

import signal
import time
import uuid

import pytest
import test_storage
from command_runs import Run, assert_same_outcome, assert_whole, run_in_process, spec_of
from mysql_server import PASSWORD, programs, server
from test_postgresql import ALIKE, STUDY, at_work, opened, secrets_in

__all__ = ["opened"]  # a fixture
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),  # on a busy machine
    pytest.mark.skipif(programs() is None, reason="no MariaDB server is installed"),
]


@pytest.fixture(scope="module")
def mysql():
    with server() as one:
        yield one


@pytest.fixture
def databases(mysql, monkeypatch):
    """Let the tests of :mod:`test_storage` have a database of this server wherever they name a file."""
    made = {}

    def url(folder, name="study"):
        if (folder, name) not in made:
            made[folder, name] = mysql.create(f"own_{uuid.uuid4().hex}")
        return made[folder, name]

    monkeypatch.setattr(test_storage, "url", url)


def test_a_server_killed_and_stopped_in_mid_run_changes_nothing(tmp_path, mysql):
    calm = spec_of(tmp_path / "calm", *STUDY)
    run_in_process(calm)
    run = Run(tmp_path / "disturbed", *STUDY, "name=outage", f"storage={mysql.create('outage')}")
    try:
        run.wait_until(at_work)
        for seconds, number in ((0, signal.SIGKILL), (5, signal.SIGTERM)):
            time.sleep(1.5)
            assert run.process.poll() is None, run.process.communicate()
            mysql.stop(number)
            time.sleep(seconds)
            mysql.start()
        status, out, err = run.result()
    finally:
        run.end()
    assert status == 0, err
    assert all(" does not answer (" in line and line.endswith("; waiting") for line in err.splitlines()), err
    assert PASSWORD not in out + err
    assert not secrets_in(tmp_path)
    assert_whole(run.spec)
    assert_same_outcome(run.spec, calm)


@pytest.mark.parametrize(("test", "arguments"), ALIKE, ids=lambda part: getattr(part, "__name__", str(part)))
def test_batched_writing_is_the_same_on_mysql(databases, tmp_path, test, arguments):
    """Values that are not finite, what is written twice, states, and who sees what."""
    test(tmp_path, *arguments)
