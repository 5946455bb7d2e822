"""Cores, memory and GPUs against what a study asks of them."""

from __future__ import annotations

import os
import shutil
import warnings
from dataclasses import dataclass
from typing import Any

from optuna_ohgw.doctor.check import Check, size
from optuna_ohgw.doctor.host import Host
from optuna_ohgw.spec import StudySpec

# Resident bytes of a worker with its libraries, data aside: 0.50 GiB on a CPU (imports shared by a fork),
# 0.70 GiB of one started afresh, as on a GPU, and CUDA's on top.
WORKER_BYTES = {"cpu": 2**29, "cuda": 2**30}
_BFLOAT16 = (8, 0)
_FREE_SHARE = 0.5  # of a GPU's memory, below which another process is likely to be in the way


@dataclass(frozen=True)
class Gpu:
    """A GPU as the driver sees it; ``total`` and ``free`` in bytes."""

    name: str
    total: int
    free: int
    capability: tuple[int, int]


@dataclass(frozen=True)
class Torch:
    """What torch sees: its CUDA version (None if built without), its GPUs, what it warned of."""

    cuda: str | None
    gpus: int
    warning: str = ""


def check_machine(host: Host) -> list[Check]:
    """Return lines on cores, memory and GPUs."""
    driver, gpus = read_gpus()
    memory = f"{size(host.free)} free of {size(host.memory)} ({host.limits[1]})"
    return [
        Check("devices", "cores", "ok", f"{host.cores:g} to use ({host.limits[0]})"),
        Check("devices", "memory", "ok", memory),
        judge_gpus(read_torch(), len(gpus), driver, os.environ.get("CUDA_VISIBLE_DEVICES")),
        *(judge_gpu(number, gpu) for number, gpu in enumerate(gpus)),
    ]


def check_execution(spec: StudySpec, host: Host, workers: int) -> list[Check]:
    """Return lines on a study's device and on its workers, threads and memory.

    Raises:
        UserError: If the device is not there.
    """
    import torch

    from optuna_ohgw.device import check_device, resolve_device

    named = spec.execution.device
    check_device(named, "execution.device")
    kind = resolve_device(named).type
    threads = spec.execution.threads or torch.get_num_threads()
    checks = [
        Check("devices", "device", "ok", f"{named} is {kind}" if named == "auto" else named),
        judge_threads(workers, threads if kind == "cpu" else 1, host.cores),
        judge_memory(workers, WORKER_BYTES[kind], host.free),
    ]
    gpus = 1 if ":" in named else torch.cuda.device_count()
    if kind == "cuda" and workers > gpus:
        checks.append(judge_sharing(workers, gpus, _has_mps()))
    return checks


def judge_threads(workers: int, threads: int, cores: float) -> Check:
    """Return whether workers × threads go beyond the cores."""
    found = f"{workers} workers of {threads} threads on {cores:g} cores"
    if workers * threads <= max(1, cores):
        return Check("devices", "threads", "ok", found)
    if workers > max(1, cores):
        remedy = f"lower execution.workers or execution.cells_at_once to {max(1, int(cores))} at once"
        remedy += "" if threads == 1 else ", with execution.threads=1"
    else:
        remedy = f"--set execution.threads={max(1, int(cores // workers))}"
    return Check("devices", "threads", "warn", f"{found} slow each other down", remedy)


def judge_memory(workers: int, each: int, free: int) -> Check:
    """Return whether the free memory is enough for the workers' libraries; data come on top."""
    need = workers * each
    found = f"{size(free)} free, {workers} workers take some {size(need)} before any data"
    if need > free:
        return Check("devices", "workers' memory", "fail", found, "use fewer workers at once, or free memory")
    if need > free / 2:
        return Check("devices", "workers' memory", "warn", found, "watch it, or use fewer workers at once")
    return Check("devices", "workers' memory", "ok", found)


def judge_gpus(seen: Torch, present: int, driver: str, visible: str | None) -> Check:
    """Return whether torch sees the GPUs that the driver has.

    Args:
        seen: What torch sees.
        present: GPUs of the driver.
        driver: Its version, or why there is none.
        visible: ``CUDA_VISIBLE_DEVICES``, None if it is not set.
    """
    hiding = "" if visible is None else f", CUDA_VISIBLE_DEVICES={visible!r}"
    built = f"torch for CUDA {seen.cuda}" if seen.cuda else "torch without CUDA"
    if seen.gpus:
        some = f"torch sees {seen.gpus} of {present}" if present else f"torch sees {seen.gpus}"
        return Check("devices", "GPUs", "ok", f"{some}; driver {driver}, {built}{hiding}")
    if not present:
        return Check("devices", "GPUs", "info", f"none ({driver}); studies run on the CPU")
    found = f"torch sees none of {present}; driver {driver}, {built}{hiding}"
    if seen.cuda is None:
        return Check("devices", "GPUs", "warn", found, "install torch for CUDA, see pytorch.org")
    if visible is not None:
        return Check("devices", "GPUs", "warn", found, "unset CUDA_VISIBLE_DEVICES, or name those to use")
    found += f" ({seen.warning})" if seen.warning else ""
    remedy = "update the driver, or install torch for an older CUDA"
    return Check("devices", "GPUs", "fail", found, remedy)


def judge_gpu(number: int, gpu: Gpu) -> Check:
    """Return whether a GPU has memory free, and in what numbers it trains."""
    numbers = "bfloat16" if gpu.capability >= _BFLOAT16 else "float16"
    found = (
        f"{gpu.name}, {size(gpu.free)} free of {size(gpu.total)}, compute capability "
        f"{gpu.capability[0]}.{gpu.capability[1]}: trains in {numbers}"
    )
    if gpu.free < _FREE_SHARE * gpu.total:
        return Check(
            "devices", f"GPU {number}", "warn", found, "see what else is on it by nvidia-smi, or use another"
        )
    return Check("devices", f"GPU {number}", "ok", found)


def judge_sharing(workers: int, gpus: int, mps: bool) -> Check:
    """Return whether workers that share a GPU do so at the same time."""
    found = f"{workers} workers on {gpus} GPUs"
    if mps:
        return Check("devices", "MPS", "ok", f"{found} share them by NVIDIA's MPS")
    remedy = "install nvidia-cuda-mps-control, or use one worker a GPU"
    return Check("devices", "MPS", "warn", f"{found} take turns, MPS is not there", remedy)


def read_gpus() -> tuple[str, list[Gpu]]:
    """Return the driver's version, or why there is none, and its GPUs."""
    import pynvml  # type: ignore[import-untyped]

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return f"no NVIDIA driver: {error}", []
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return str(pynvml.nvmlSystemGetDriverVersion()), [_read_gpu(pynvml, handle) for handle in handles]
    finally:
        pynvml.nvmlShutdown()


def _read_gpu(nvml: Any, handle: Any) -> Gpu:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    return Gpu(str(nvml.nvmlDeviceGetName(handle)), int(memory.total), int(memory.free), (major, minor))


def read_torch() -> Torch:
    """Return what torch sees; it warns where a driver does not fit."""
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    warning = str(caught[0].message).strip().splitlines()[0] if caught else ""
    return Torch(torch.version.cuda, gpus, warning)


def _has_mps() -> bool:
    from optuna_ohgw.mps import CONTROL, PIPE

    return PIPE in os.environ or shutil.which(CONTROL) is not None
