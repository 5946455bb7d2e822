from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from optuna_ohgw import mps
from optuna_ohgw.mps import CONTROL, LOG, PIPE, shared_gpu

DAEMON = """#!/bin/sh
said=$(cat)
echo "$1 $said $CUDA_MPS_PIPE_DIRECTORY $CUDA_VISIBLE_DEVICES" >> {calls}
[ "$1" = -d ] && sleep 30 &
[ "$said" = get_server_list ] && printf '{servers}'
exit {status}
"""


@pytest.fixture(autouse=True)
def _no_service(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(PIPE, raising=False)
    monkeypatch.delenv(LOG, raising=False)
    monkeypatch.setattr(
        mps, "_PROBE", "import os; assert os.path.isdir(os.environ['CUDA_MPS_PIPE_DIRECTORY'])"
    )


def control(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int = 0, servers: str = "4711\\n"
) -> Path:
    """Put a control program on the path that notes how it was called."""
    calls, program = tmp_path / "calls", tmp_path / CONTROL
    program.write_text(DAEMON.format(calls=calls, status=status, servers=servers))
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return calls


def test_is_started_tried_and_ended_with_the_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = control(tmp_path, monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    with shared_gpu() as shared:
        folder = os.environ[PIPE]
        assert shared
        assert os.environ[LOG] == folder
        assert Path(folder).is_dir()
        # The daemon sees all GPUs: else its clients' numbers would be counted from those that it sees.
        begun = [f"-d  {folder} ", f" get_server_list {folder} 2,3"]
        assert calls.read_text().splitlines() == begun
    assert calls.read_text().splitlines() == [*begun, f" quit {folder} 2,3"]
    assert PIPE not in os.environ
    assert LOG not in os.environ
    assert not Path(folder).exists()


def test_is_ended_by_a_process_that_leaves_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = control(tmp_path, monkeypatch)
    mps.end_now()  # there is none
    assert not calls.exists()
    with shared_gpu():
        folder = os.environ[PIPE]
        mps.end_now()
        assert calls.read_text().splitlines()[-1].startswith(f" quit {folder}")
        assert not Path(folder).exists()


def test_is_ended_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = control(tmp_path, monkeypatch)
    with pytest.raises(KeyError), shared_gpu():
        raise KeyError
    assert "quit" in calls.read_text()
    assert PIPE not in os.environ


def test_without_the_program_processes_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with shared_gpu() as shared:
        assert not shared
        assert PIPE not in os.environ


def test_a_daemon_that_does_not_start_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = control(tmp_path, monkeypatch, status=1)
    with shared_gpu() as shared:
        assert not shared
        assert PIPE not in os.environ
    assert "quit" in calls.read_text()  # it may have started all the same


@pytest.mark.parametrize(("probe", "servers"), [("raise SystemExit(1)", "4711\\n"), ("", "")])
def test_a_daemon_through_which_no_gpu_is_reached_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, probe: str, servers: str
) -> None:
    """Also where a process computed, but by no server of it."""
    calls = control(tmp_path, monkeypatch, servers=servers)
    monkeypatch.setattr(mps, "_PROBE", probe)
    with shared_gpu() as shared:
        assert not shared
        assert PIPE not in os.environ
    assert "quit" in calls.read_text()


def test_the_user_s_own_service_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = control(tmp_path, monkeypatch)
    monkeypatch.setenv(PIPE, "/tmp/own")
    with shared_gpu() as shared:
        assert shared
        mps.end_now()
    assert os.environ[PIPE] == "/tmp/own"
    assert not calls.exists()
