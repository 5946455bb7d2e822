"""The doctor: judgements as tables, what it reads of a machine, and that nothing ends it early."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from test_cli import STUDY, command, held, refused

from optuna_ohgw import doctor
from optuna_ohgw.doctor import devices, disk, host, limits, versions
from optuna_ohgw.doctor.check import Check, guarded, size
from optuna_ohgw.doctor.devices import Gpu, Torch
from optuna_ohgw.doctor.disk import Need, Room, need_of
from optuna_ohgw.errors import UserError
from optuna_ohgw.spec import load_spec

GIB = 2**30
GPU = Gpu("A", 80 * GIB, 79 * GIB, (9, 0))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Return a working folder with ``study.yaml`` in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    Path("study.yaml").write_text(STUDY)
    return tmp_path


def spec_of(*changes):
    return load_spec(Path("study.yaml"), changes)


def broken():
    raise ValueError("postgresql://me:hidden@h/x\nand more")


def mistaken():
    raise UserError("field: value, and more; do this")


# name, check, outcome, what its remedy holds
JUDGED = [
    (versions.judge_version("x", "2.6.1", ">=2.6", "r"), "ok", ""),
    (versions.judge_version("x", "2.6.0+cu124", ">=2.6", "r"), "ok", ""),
    (versions.judge_version("x", "3.0.0rc1", ">=2.6", "r"), "ok", ""),
    (versions.judge_version("x", "2.5.9", ">=2.6", "r"), "fail", "r"),
    (versions.judge_version("x", None, ">=2.6", "r"), "fail", "r"),
    (versions.judge_version("x", None, ">=2.6", "r", absent="info"), "info", "r"),
    (devices.judge_threads(1, 1, 1), "ok", ""),
    (devices.judge_threads(4, 2, 8), "ok", ""),
    (devices.judge_threads(1, 1, 0.5), "ok", ""),
    (devices.judge_threads(4, 4, 8), "warn", "execution.threads=2"),
    (devices.judge_threads(16, 1, 8), "warn", "to 8 at once"),
    (devices.judge_threads(16, 2, 8), "warn", "execution.threads=1"),
    (devices.judge_memory(4, GIB, 8 * GIB), "ok", ""),
    (devices.judge_memory(5, GIB, 8 * GIB), "warn", "fewer workers"),
    (devices.judge_memory(9, GIB, 8 * GIB), "fail", "fewer workers"),
    (devices.judge_gpus(Torch("12.6", 2), 2, "570", None), "ok", ""),
    (devices.judge_gpus(Torch("12.6", 1), 2, "570", "1"), "ok", ""),
    (devices.judge_gpus(Torch(None, 1), 0, "no driver", None), "ok", ""),
    (devices.judge_gpus(Torch(None, 0), 0, "no driver", None), "info", ""),
    (devices.judge_gpus(Torch(None, 0), 2, "570", None), "warn", "torch for CUDA"),
    (devices.judge_gpus(Torch("12.6", 0), 2, "570", ""), "warn", "unset CUDA_VISIBLE_DEVICES"),
    (devices.judge_gpus(Torch("12.6", 0, "too old"), 2, "470", None), "fail", "update the driver"),
    (devices.judge_gpu(0, GPU), "ok", ""),
    (devices.judge_gpu(0, Gpu("A", 80 * GIB, 39 * GIB, (9, 0))), "warn", "nvidia-smi"),
    (devices.judge_sharing(8, 1, True), "ok", ""),
    (devices.judge_sharing(8, 1, False), "warn", "nvidia-cuda-mps-control"),
    (disk.judge_writable("x", Path("x"), ""), "ok", ""),
    (disk.judge_writable("x", Path("x"), "Permission denied"), "fail", "rights"),
    (limits.judge_files(1024, 4096, 120), "ok", ""),
    (limits.judge_files(1024, 4096, 121), "fail", "ulimit -n 1032"),
    (limits.judge_files(1024, 1024, 121), "fail", "ask for a hard limit of 1032"),
    (limits.judge_files(1024, -1, 121), "fail", "ulimit -n 1032"),
    (limits.judge_files(-1, -1, 10**6), "ok", ""),
    (limits.judge_shared(GIB, 2), "ok", ""),
    (limits.judge_shared(2**20, 2), "warn", "--shm-size"),
    (limits.judge_shared(0, 2), "fail", "--shm-size"),
    (limits.judge_shared(None, 2), "fail", "--shm-size"),
]


@pytest.mark.parametrize(("check", "outcome", "remedy"), JUDGED)
def test_judgements(check, outcome, remedy):
    assert check.outcome == outcome
    assert remedy in check.remedy
    assert outcome == "info" or bool(check.remedy) == (outcome != "ok")


@pytest.mark.parametrize(
    ("capability", "numbers"), [((7, 5), "float16"), ((8, 0), "bfloat16"), ((12, 0), "bfloat16")]
)
def test_capability_tells_the_numbers(capability, numbers):
    assert devices.judge_gpu(0, Gpu("A", 1, 1, capability)).detail.endswith(f"trains in {numbers}")


@pytest.mark.parametrize(
    ("room", "need", "outcomes"),
    [
        (Room(9 * GIB, 10**6), Need(GIB, 10, "x"), ["ok"]),
        (Room(9 * GIB, None), Need(GIB, 10**9, "x"), ["ok"]),
        (Room(9 * GIB, 10**6), Need(5 * GIB, 10, "x"), ["warn"]),
        (Room(9 * GIB, 10**6), Need(10 * GIB, 10, "x"), ["fail"]),
        (Room(9 * GIB, 15_000), Need(GIB, 10_000, "x"), ["ok", "warn"]),
        (Room(9 * GIB, 5_000), Need(GIB, 10_000, "x"), ["ok", "fail"]),
        (Room(GIB // 2, 10**6), None, ["warn"]),
        (Room(0, 0), None, ["warn", "warn"]),
    ],
)
def test_room(room, need, outcomes):
    checks = disk.judge_room("x", room, need)
    assert [c.outcome for c in checks] == outcomes
    assert all(bool(c.remedy) == (c.outcome != "ok") for c in checks)


def test_need_is_parameters_times_tensors_times_checkpoints(place):
    checkpoint, weights = 12 * 1000, 4 * 1000
    # two cells; one at work with one worker keeps two checkpoints, and every paused trial has two
    assert need_of(spec_of(), 1000, 1).count == 2 * checkpoint + 2 * weights
    pausing = ("scheduler.name=pasha", "variations=[baseline, ohgw-1step]", "budget.trials=16")
    assert need_of(spec_of(*pausing), 1000, 1).count == 34 * checkpoint + 2 * weights
    assert need_of(spec_of(*pausing), 1000, 6).count == 2 * (2 * 16 + 6) * checkpoint + 2 * weights
    at_once = (*pausing, "execution.cells_at_once=9")
    assert need_of(spec_of(*at_once), 1000, 1).count == 2 * (2 * 16 + 1) * checkpoint + 2 * weights
    assert need_of(spec_of(*pausing), None, 1) is None
    hours = ("scheduler.name=pasha", "variations=[baseline]", "budget={device_hours: 1, trials: null}")
    assert need_of(spec_of(*hours), 1000, 1) is None


@pytest.mark.parametrize(
    ("kind", "remote"),
    [
        ("ext4", False),
        ("tmpfs", False),
        ("overlay", False),
        ("fuseblk", False),
        ("fuse.lxcfs", False),
        ("", False),
        ("nfs", True),
        ("nfs4", True),
        ("NFS", True),
        ("cifs", True),
        ("smb3", True),
        ("lustre", True),
        ("beegfs", True),
        ("fuse.sshfs", True),
        ("fuse.glusterfs", True),
    ],
)
def test_network_file_systems(kind, remote):
    assert disk.is_network(kind) is remote


def test_file_system_is_that_of_the_nearest_mount(monkeypatch):
    mounts = {"/": "ext4", "/mnt": "nfs4", "/mnt/a b": "xfs"}
    parts = [SimpleNamespace(mountpoint=m, fstype=t) for m, t in mounts.items()]
    monkeypatch.setattr(disk.psutil, "disk_partitions", lambda all: parts)
    monkeypatch.setattr(disk, "existing", lambda path: path)
    found = [disk.file_system(Path(p)) for p in ("/x", "/mnt/x", "/mnt/a b/x", "/mntx")]
    assert found == ["ext4", "nfs4", "xfs", "ext4"]


def tree(root, files):
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")


V2 = {
    "proc/self/cgroup": "0::/job/step",
    "sys/fs/cgroup/job/cpu.max": "150000 100000",
    "sys/fs/cgroup/job/step/cpu.max": "max 100000",
    "sys/fs/cgroup/job/memory.max": f"{4 * GIB}",
    "sys/fs/cgroup/job/memory.current": f"{3 * GIB}",
    "sys/fs/cgroup/job/memory.stat": f"anon 1\ninactive_file {GIB}",
    "sys/fs/cgroup/job/step/memory.max": "max",
}
V1 = {
    "proc/self/cgroup": "5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n1:name=systemd:/\n0::/",
    "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "50000",
    "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2 * GIB}",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GIB}",
    "sys/fs/cgroup/memory/memory.stat": "cache 5\ntotal_inactive_file 0",
}
FREE = {
    "proc/self/cgroup": "5:memory:/\n4:cpu:/",
    "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
    "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
}


@pytest.mark.parametrize(
    ("files", "limits"),
    [
        (V2, host.Cgroup(1.5, 4 * GIB, 2 * GIB)),
        (V1, host.Cgroup(0.5, 2 * GIB, GIB)),
        (FREE, host.Cgroup()),
        ({}, host.Cgroup()),
    ],
)
def test_limits_of_control_groups(tmp_path, files, limits):
    tree(tmp_path, files)
    assert host.read_cgroup(tmp_path) == limits


def test_least_limit_counts(tmp_path):
    tree(tmp_path, V1)
    alone = host.measure({}, tmp_path)
    assert (alone.cores, alone.memory) == (0.5, 2 * GIB)
    assert alone.free <= GIB
    slurm = {"SLURM_CPUS_PER_TASK": "1", "SLURM_MEM_PER_NODE": "512"}
    in_a_job = host.measure(slurm, tmp_path / "none")
    assert (in_a_job.cores, in_a_job.memory) == (1.0, 2**29)
    assert in_a_job.limits == ("SLURM_CPUS_PER_TASK 1", "Slurm's memory")
    per_cpu = {"SLURM_MEM_PER_CPU": "100", "SLURM_CPUS_ON_NODE": "2", "SLURM_MEM_PER_NODE": "0"}
    assert host.measure(per_cpu, tmp_path / "none").memory == 200 * 2**20


def test_gpus_are_read_from_the_driver(monkeypatch):
    nvml = ModuleType("pynvml")
    nvml.NVMLError = type("NVMLError", (Exception,), {})
    nvml.nvmlInit = nvml.nvmlShutdown = lambda: None
    nvml.nvmlDeviceGetCount = lambda: 2
    nvml.nvmlDeviceGetHandleByIndex = lambda index: index
    nvml.nvmlSystemGetDriverVersion = lambda: "570.1"
    nvml.nvmlDeviceGetMemoryInfo = lambda handle: SimpleNamespace(total=10, free=10 - handle)
    nvml.nvmlDeviceGetCudaComputeCapability = lambda handle: (9, handle)
    nvml.nvmlDeviceGetName = lambda handle: f"GPU of {handle}"
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    expected = [Gpu("GPU of 0", 10, 10, (9, 0)), Gpu("GPU of 1", 10, 9, (9, 1))]
    assert devices.read_gpus() == ("570.1", expected)

    def absent():
        raise nvml.NVMLError("Driver Not Loaded")

    nvml.nvmlInit = absent
    assert devices.read_gpus() == ("no NVIDIA driver: Driver Not Loaded", [])


def test_sizes():
    assert [size(n) for n in (0, 1023, 1536, 3 * GIB, 5 * 2**40)] == [
        "0 bytes",
        "1023 bytes",
        "1.5 KiB",
        "3.0 GiB",
        "5.0 TiB",
    ]


def test_broken_check_is_a_failure_that_names_it():
    for limit in (None, 5.0):
        (check,) = guarded("group", "name", broken, limit)
        assert (check.group, check.name, check.outcome) == ("group", "name", "fail")
        assert check.detail == "could not be checked: ValueError: postgresql://me:***@h/x"


def test_mistake_is_a_failure_with_its_remedy():
    assert guarded("g", "n", mistaken) == [Check("g", "n", "fail", "field: value, and more", "do this")]


def test_check_that_hangs_ends():
    begun = time.monotonic()
    (check,) = guarded("g", "n", lambda: time.sleep(30) or [], 0.2)
    assert time.monotonic() - begun < 5
    assert (check.outcome, check.detail) == ("fail", "no answer within 0.2 s")


def test_no_password_gets_into_a_check():
    check = Check("g", "n", "fail", "mysql://a:hidden@h/x", "not\nmysql://h/x?password=hidden")
    assert (check.detail, check.remedy) == ("mysql://a:***@h/x", "not mysql://h/x?password=***")


@pytest.mark.parametrize(
    ("study", "changes", "extras"),
    [
        ("digits", (), ()),
        ("xgboost", (), ("trees",)),
        ("cartpole", (), ("rl",)),
        ("wikitext2", ("tracking=wandb",), ("text", "wandb")),
        ("digits", ("scheduler={name: dyhpo}", "variations=[baseline]"), ("models",)),
        ("digits", ("storage=postgresql+psycopg://u@h/d",), ("postgresql",)),
        ("digits", ("storage=mysql+pymysql://u@h/d",), ("mysql",)),
        ("digits", ("storage=mysql+mysqldb://u@h/d",), ()),  # another driver
        ("digits", ("storage=grpc://h:1",), ("grpc",)),
    ],
)
def test_the_extras_that_a_study_needs(study, changes, extras):
    folder = Path(__file__).parents[1] / "studies"
    assert versions.needed_extras(load_spec(folder / f"{study}.yaml", changes)) == extras


def test_versions_of_this_installation(place, monkeypatch):
    found = {c.name: c.outcome for c in versions.check_versions(None)}
    named = ("python", "optuna", "torch", "torchvision", "timm", "kornia", "datasets", "others")
    assert {found[name] for name in named} == {"ok"}
    assert "gpytorch" not in found
    monkeypatch.setattr(versions, "installed", lambda name: None if name in ("gpytorch", "kaleido") else "99")
    lacking = spec_of("scheduler.name=dyhpo", "variations=[baseline]", "budget.trials=8")
    checks = {c.name: c for c in versions.check_versions(lacking)}
    assert checks["gpytorch"].outcome == "fail"
    assert checks["gpytorch"].remedy == "pip install 'optuna-ohgw[models]'"
    assert (checks["botorch"].outcome, checks["kaleido"].outcome) == ("ok", "info")


def test_machine_alone(place):
    done = command("doctor", "--json")
    checks = json.loads(done.out)
    assert (done.status, done.err) == (0, "")
    assert {c["group"] for c in checks} == {"versions", "devices", "disk"}
    assert set(checks[0]) == {"group", "name", "outcome", "detail", "remedy"}


def test_good_study_makes_nothing(place):
    done = command("doctor", "study.yaml")
    assert (done.status, done.err) == (0, "")
    for line in ("storage   writable", "data      networks", "limits    open files", "devices   threads"):
        assert f"ok    {line}" in done.out
    assert held(place) == ["study.yaml"]


def test_study_with_faults_names_each(place):
    Path("runs").write_text("a file where the output folder should be")
    storage = "storage=postgresql+psycopg://me:hidden@127.0.0.1:1/x"
    done = command(
        "doctor", "study.yaml", "--json", *sets(storage, "task.data=./no", "execution.device=cuda:99")
    )
    failed = {(c["group"], c["name"]) for c in json.loads(done.out) if c["outcome"] == "fail"}
    expected = {("devices", "device"), ("storage", "reachable"), ("data", "data"), ("disk", "output folder")}
    assert (done.status, failed) == (1, expected)
    assert "hidden" not in done.out + done.err
    text = command("doctor", "study.yaml", *sets(storage))
    assert text.status == 1
    assert "me:***@" in text.out
    assert "hidden" not in text.out + text.err


def test_one_broken_group_leaves_the_others(place, monkeypatch):
    expected = [c.group for c in doctor.diagnose(spec_of())]
    monkeypatch.setattr(disk, "check_disk", lambda *_: broken())
    monkeypatch.setattr(versions, "check_versions", lambda *_: broken())
    checks = doctor.diagnose(spec_of())
    assert [(c.group, c.name) for c in checks if c.outcome == "fail"] == [
        ("versions", "versions"),
        ("disk", "disk"),
    ]
    assert {c.group for c in checks} == set(expected)


def test_workers_are_those_of_the_study_unless_given(place):
    at_once = spec_of("execution.workers=3", "execution.cells_at_once=9")  # two cells
    for workers, found in ((None, "6 workers of 1 threads"), (4, "4 workers of 1 threads")):
        threads = [c.detail for c in doctor.diagnose(at_once, workers) if c.name == "threads"]
        assert threads[0].startswith(found)


def test_mistakes_are_one_line(place):
    assert refused("doctor", "--workers", "2") == "--workers: is for a study; name its file"
    assert refused("doctor", "--smoke") == "--smoke: is for a study; name its file"
    assert refused("doctor", *sets("seeds=2")) == "--set: is for a study; name its file"
    assert "no such file" in refused("doctor", "absent.yaml")


def sets(*pairs):
    return [part for pair in pairs for part in ("--set", pair)]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity here")
def test_cores_follow_affinity(tmp_path):
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert host.measure({}, tmp_path).cores == 1
    finally:
        os.sched_setaffinity(0, before)
