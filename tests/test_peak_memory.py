from __future__ import annotations

import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pynvml
import pytest
import torch
from optuna.distributions import FloatDistribution

from optuna_ohgw import peak_memory as module
from optuna_ohgw import warmstart
from optuna_ohgw.peak_memory import PeakMemory, restart_peak
from optuna_ohgw.space import SearchSpace
from optuna_ohgw.warmstart import WarmStart, warm_start

CPU = torch.device("cpu")
MIB = 2**20


def hold(mebibytes: int) -> int:
    """Fill so much memory and let it go; return a byte of it."""
    return int(np.ones(mebibytes * MIB, dtype=np.uint8)[-1])


def fake_nvml(monkeypatch: pytest.MonkeyPatch, running: list[tuple[int, int | None]]) -> list[str]:
    """Put a driver in place on which such (process, bytes) run; return what it is asked for."""
    asked: list[str] = []
    processes = [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in running]
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"of-{device}")
    )
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: asked.append("shut down"))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", asked.append)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", lambda handle: processes)
    return asked


class TestMemory:
    @pytest.fixture(params=["kernel", "sampled"])
    def way(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
        if request.param == "sampled":
            monkeypatch.setattr(module, "_reset_kernel_peak", lambda: False)
        elif not module._reset_kernel_peak():
            pytest.skip("this system keeps no peak of a process that can be reset")
        return str(request.param)

    def test_is_what_was_resident_at_the_most_in_the_block(self, way: str) -> None:
        hold(400)  # before it: must not count
        with PeakMemory(CPU) as idle:
            pass
        with PeakMemory(CPU) as busy:
            block = np.ones(200 * MIB, dtype=np.uint8)
            threading.Event().wait(0.1)
            del block
        before, peak = idle.peaks["ram"], busy.peaks["ram"]
        assert before is not None
        assert peak is not None
        # Some other memory may come and go; the sampler misses nothing that stays for 100 ms.
        assert 190 * MIB < peak - before < 230 * MIB
        assert idle.peaks["vram"] is None
        assert idle.peaks["nvml"] is None

    def test_is_read_when_the_block_fails(self, way: str) -> None:
        memory = PeakMemory(CPU)
        with pytest.raises(KeyError), memory:
            raise KeyError
        assert (memory.peaks["ram"] or 0) > 10 * MIB

    def test_leaves_no_thread(self, way: str) -> None:
        count = threading.active_count()
        with PeakMemory(CPU):
            assert threading.active_count() == count + (way == "sampled")
        assert threading.active_count() == count

    def test_of_a_system_without_proc_is_sampled(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(module, "_PROC", tmp_path / "none")
        with PeakMemory(CPU) as memory:
            assert memory._sampler is not None
        assert (memory.peaks["ram"] or 0) > 10 * MIB

    def test_nvml_tells_the_bytes_of_this_process_and_of_no_other(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = fake_nvml(monkeypatch, [(os.getpid() + 1, 5), (os.getpid(), 7)])
        assert module._nvml_bytes(torch.device("cuda:1")) == 7
        assert asked == ["GPU-of-cuda:1", "shut down"]

    @pytest.mark.parametrize("running", [[], [(1, 5)], [(os.getpid(), None)]])
    def test_nvml_that_does_not_tell_gives_none(
        self, running: list[tuple[int, int | None]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fake_nvml(monkeypatch, running)
        assert module._nvml_bytes(torch.device("cuda:0")) is None

    @pytest.mark.parametrize("call", ["nvmlInit", "nvmlDeviceGetHandleByUUID"])
    def test_a_driver_that_fails_gives_none(self, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*args: Any) -> None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_UNKNOWN)

        fake_nvml(monkeypatch, [(os.getpid(), 7)])
        monkeypatch.setattr(pynvml, call, fail)
        assert module._nvml_bytes(torch.device("cuda:0")) is None

    @pytest.mark.parametrize("by", ["hand", "warm start"])
    def test_a_measurement_within_a_block_takes_nothing_from_it(
        self, monkeypatch: pytest.MonkeyPatch, by: str
    ) -> None:
        now, most = 0, 0

        def allocate(amount: int) -> None:
            nonlocal now, most
            now += amount
            most = max(most, now)

        def reset(device: torch.device) -> None:
            nonlocal most
            most = now

        cuda = torch.device("cuda")
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: now)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: most)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        monkeypatch.setattr(module, "_nvml_bytes", lambda device: None)
        with PeakMemory(cuda) as outer, PeakMemory(cuda) as inner:
            for amount in (300, -300):
                allocate(amount)
            if by == "hand":
                restart_peak(cuda)
            else:
                monkeypatch.setattr(warmstart, "_device", lambda loss: cuda)
                settings, space = WarmStart("gaussian"), SearchSpace({"a": FloatDistribution(0.0, 1.0)})
                warm_start(lambda psi: psi["a"], space, {"a": 0.5}, settings, torch.Generator())
            assert most == 0
            for amount in (20, -20):
                allocate(amount)
        assert (outer.peaks["vram"], inner.peaks["vram"]) == (300, 300)
        restart_peak(cuda)  # of none that has ended
        assert outer.peaks["vram"] == 300

    @pytest.mark.gpu
    def test_on_a_gpu_counts_what_was_allocated_through_a_reset_of_the_statistics(self) -> None:
        device = torch.device("cuda")
        with PeakMemory(device) as memory:
            block = torch.ones(300 * MIB, dtype=torch.uint8, device=device)
            del block
            restart_peak(device)
            torch.ones(100 * MIB, dtype=torch.uint8, device=device)
        assert 300 * MIB <= (memory.peaks["vram"] or 0) < 310 * MIB
        assert memory.peaks["nvml"] is None or memory.peaks["nvml"] >= memory.peaks["vram"]
