"""The peak memory of a trial, of its process and on a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from pathlib import Path

import psutil
import torch

_SAMPLE_SECONDS = 0.01
_PROC = Path("/proc/self")
_measuring: list[PeakMemory] = []


class PeakMemory:
    """The peak memory of this process while a ``with`` block runs.

    ``ram``: resident bytes of the whole process, libraries and data included. On Linux the kernel
    keeps the peak, exactly; elsewhere a thread samples every 10 ms. ``vram``: bytes that torch
    allocated on the GPU. ``nvml``: bytes of this process on the GPU as NVML sees it, CUDA's context
    and torch's cache included, at the end of the block (the cache only grows in it). The last two
    are None without a GPU; so is ``nvml`` where the driver does not tell it, as in most containers.

    A process returns freed memory to the system at the beginning of the block as far as it can.

    Attributes:
        captured: Bytes that a CUDA graph uses when it is replayed, which torch does not count.
        peaks: ``ram``, ``vram`` and ``nvml``, filled at the end of the block.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peaks: dict[str, int | None] = {"ram": None, "vram": None, "nvml": None}
        self.captured = 0
        self._allocated = 0
        self._sampler: _Sampler | None = None

    def __enter__(self) -> PeakMemory:
        _measuring.append(self)
        _trim()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        if not _reset_kernel_peak():
            self._sampler = _Sampler()
        return self

    def note(self) -> None:
        """Keep what torch allocated so far."""
        if self.device.type == "cuda":
            replayed = torch.cuda.memory_allocated(self.device) + self.captured
            counted = torch.cuda.max_memory_allocated(self.device)
            self._allocated = max(self._allocated, counted, replayed)

    def __exit__(self, *_: object) -> None:
        """Fill ``peaks``."""
        _measuring.remove(self)
        self.note()
        self.peaks["ram"] = self._sampler.end() if self._sampler else _kernel_peak()
        if self.device.type == "cuda":
            self.peaks["vram"] = self._allocated
            self.peaks["nvml"] = _nvml_bytes(self.device)


class _Sampler:
    """A thread that keeps the largest resident size seen."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._peak = self._process.memory_info().rss
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(_SAMPLE_SECONDS):
            self._peak = max(self._peak, self._process.memory_info().rss)

    def end(self) -> int:
        """Stop; return the peak in bytes."""
        self._ended.set()
        self._thread.join()
        return int(max(self._peak, self._process.memory_info().rss))


def _reset_kernel_peak() -> bool:
    """Let the kernel's peak of resident memory start from now; False where it cannot."""
    try:
        (_PROC / "clear_refs").write_text("5")
        return "VmHWM:" in (_PROC / "status").read_text()
    except OSError:
        return False


def _kernel_peak() -> int:
    status = (_PROC / "status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def _trim() -> None:
    """Give freed memory back to the system, where the C library can (glibc)."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _nvml_bytes(device: torch.device) -> int | None:
    import pynvml  # type: ignore[import-untyped]

    try:
        pynvml.nvmlInit()
        try:
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            running = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return None
    own = [p.usedGpuMemory for p in running if p.pid == os.getpid()]
    return int(own[0]) if own and own[0] is not None else None


def restart_peak(device: torch.device) -> None:
    """Reset torch's peak of a GPU, for a measurement within others, which keep what they have."""
    for memory in _measuring:
        memory.note()
    torch.cuda.reset_peak_memory_stats(device)
