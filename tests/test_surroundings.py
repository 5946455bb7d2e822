"""What a batch job and the control groups tell, from the texts that kernels write."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import optuna
import pytest
import torch

from optuna_ohgw import trial as trials
from optuna_ohgw.surroundings import (
    Usage,
    byte_count,
    cgroup_record,
    cpu_seconds,
    read_usage,
    slurm_job,
    worker_record,
)

CPU_STAT = "usage_usec 2500000\nuser_usec 2000000\nsystem_usec 500000\nnr_periods 0\nnr_throttled 0\n"
VERSION_2 = {
    "proc/self/cgroup": "0::/system.slice/slurmstepd.scope/job_7/step_0/task_0\n",
    "job_7/memory.max": "4294967296\n",
    "job_7/memory.current": "900\n",
    "job_7/step_0/memory.max": "max\n",
    "job_7/step_0/memory.current": "800\n",
    "job_7/step_0/memory.peak": "1234\n",
    "job_7/step_0/task_0/cpu.stat": CPU_STAT,
}
V2 = "sys/fs/cgroup/system.slice/slurmstepd.scope/"
VERSION_1 = {
    "proc/self/cgroup": "9:cpu,cpuacct:/slurm/job_7\n5:memory:/slurm/job_7\n1:name=systemd:/\n0::/\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": "99999\n",
    "sys/fs/cgroup/memory/slurm/job_7/memory.limit_in_bytes": "2147483648\n",
    "sys/fs/cgroup/memory/slurm/job_7/memory.usage_in_bytes": "700\n",
    "sys/fs/cgroup/memory/slurm/job_7/memory.max_usage_in_bytes": "1500\n",
    "sys/fs/cgroup/cpu,cpuacct/slurm/job_7/cpu.stat": "nr_periods 3\nnr_throttled 0\nthrottled_time 0\n",
    "sys/fs/cgroup/cpu,cpuacct/slurm/job_7/cpuacct.usage": "3500000000\n",
    "sys/fs/cgroup/unified/cpu.stat": "usage_usec 99000000\n",  # of the whole machine
}


def laid_out(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / (name if name.startswith(("proc", "sys")) else V2 + name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "usage"),
    [
        (VERSION_2, Usage(memory=800, memory_peak=1234, memory_limit=2**32, cpu_s=2.5)),
        (VERSION_1, Usage(memory=700, memory_peak=1500, memory_limit=2**31, cpu_s=3.5)),
        ({"proc/self/cgroup": "0::/gone\n"}, Usage()),
        ({}, Usage()),
    ],
    ids=["version 2", "version 1", "nothing there", "no Linux"],
)
def test_usage_is_of_the_innermost_group_that_tells_and_the_limit_of_any(tmp_path, files, usage) -> None:
    assert read_usage(laid_out(tmp_path, files)) == usage


@pytest.mark.parametrize(
    ("text", "count"),
    [("4096\n", 4096), ("0\n", 0), ("max\n", None), ("9223372036854771712\n", None), ("", None)],
)
def test_byte_counts(text, count) -> None:
    assert byte_count(text) == count


@pytest.mark.parametrize(
    ("text", "seconds"),
    [(CPU_STAT, 2.5), ("3500000000\n", 3.5), ("nr_periods 3\nnr_throttled 0\n", None), ("", None)],
)
def test_processor_seconds(text, seconds) -> None:
    assert cpu_seconds(text) == seconds


@pytest.mark.parametrize(
    ("environment", "job"),
    [
        ({}, {}),
        ({"SLURM_JOB_ID": "812"}, {"slurm_job": "812"}),
        (
            {"SLURM_JOB_ID": "815", "SLURM_ARRAY_JOB_ID": "812", "SLURM_ARRAY_TASK_ID": "0"},
            {"slurm_job": "815", "slurm_array": "812_0"},
        ),
        ({"SLURM_JOB_ID": ""}, {}),
    ],
)
def test_a_slurm_job_is_named_where_there_is_one(environment, job) -> None:
    assert slurm_job(environment) == job


def test_a_worker_names_itself_and_its_job(monkeypatch) -> None:
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "812")
    own = {"host": socket.gethostname(), "pid": os.getpid(), "device": "cpu", "slurm_job": "812"}
    assert worker_record("cpu") == own


BEFORE = Usage(memory=5, memory_peak=20, cpu_s=10.0)
AFTER = Usage(memory=6, memory_peak=30, memory_limit=100, cpu_s=12.5)


@pytest.mark.parametrize(
    ("before", "after", "earlier", "record"),
    [
        (BEFORE, AFTER, {}, {"memory": 6, "memory_peak": 30, "memory_limit": 100, "cpu_s": 2.5}),
        (
            BEFORE,
            AFTER,
            {"memory_peak": 50, "cpu_s": 1.25},
            {"memory": 6, "memory_peak": 50, "memory_limit": 100, "cpu_s": 3.75},
        ),
        (Usage(), Usage(memory=6), {}, {"memory": 6}),
        (Usage(), Usage(), {}, {}),
    ],
)
def test_a_trial_used_what_came_between(before, after, earlier, record) -> None:
    assert cgroup_record(before, after, earlier) == record


@pytest.mark.parametrize("raised", [None, RuntimeError])
def test_a_trial_keeps_it_beside_its_memory_however_it_ends(monkeypatch, raised) -> None:
    seen = iter((BEFORE, AFTER))
    monkeypatch.setattr(trials, "read_usage", lambda: next(seen))
    trial = optuna.create_study().ask()
    try:
        with trials.recorded_memory(trial, torch.device("cpu")):
            if raised:
                raise raised
    except RuntimeError:
        pass
    assert trial.user_attrs["cgroup"] == cgroup_record(BEFORE, AFTER, {})
    assert trial.user_attrs["memory"]["ram"] > 0


def test_a_trial_without_control_groups_has_no_such_attribute(monkeypatch) -> None:
    monkeypatch.setattr(trials, "read_usage", Usage)
    trial = optuna.create_study().ask()
    with trials.recorded_memory(trial, torch.device("cpu")):
        pass
    assert "cgroup" not in trial.user_attrs
