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
from torch import nn

from optuna_ohgw import cost
from optuna_ohgw.cost import PeakMemory, count_flops
from optuna_ohgw.space import SearchSpace
from optuna_ohgw.spec_tasks import AugmentationSpec, ImageSpec
from optuna_ohgw.tasks.data import ImageData
from optuna_ohgw.tasks.image import ImageTask
from optuna_ohgw.training import TrainState, initial_state
from optuna_ohgw.warmstart import WarmStart

CPU = torch.device("cpu")
LR = {"lr": FloatDistribution(1e-4, 1.0, log=True)}
SMOOTH = {"label_smoothing": FloatDistribution(0.0, 0.3)}
MAGNITUDE = {"magnitude": FloatDistribution(0.0, 10.0)}
CONSTANTS = {"momentum": 0.9, "weight_decay": 0.0, "label_smoothing": 0.1, "magnitude": 2.0}
BATCH, CLASSES = 8, 4
# A linear layer takes 2·B·in·out FLOPs forward, as many for the gradient of its weights and as many
# for that of its inputs, which the first layer's do not need.
LAYERS = {"linear": [(64, CLASSES)], "three layers": [(64, 32), (32, 16), (16, CLASSES)]}


def task_of(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> ImageTask:
    monkeypatch.setattr("optuna_ohgw.tasks.image.build_model", lambda *args, **options: model)
    generator = torch.Generator().manual_seed(0)

    def part(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        images = torch.randint(256, (n, 1, 8, 8), dtype=torch.uint8, generator=generator)
        return images, torch.arange(n) % CLASSES

    data = ImageData(*part(24), *part(8), *part(8), CLASSES)
    settings = AugmentationSpec(flip=False, crop_padding=1, operations=1, cutout=2)
    spec = ImageSpec(data="-", model="mlp", epochs=2, validation_images=8, augmentation=settings)
    return ImageTask(spec, data, "mlp", BATCH)


def network(layers: list[tuple[int, int]]) -> nn.Module:
    parts: list[nn.Module] = [nn.Flatten()]
    for inside, outside in layers:
        parts += [nn.Linear(inside, outside), nn.ReLU()]
    return nn.Sequential(*parts[:-1])


def forward(layers: list[tuple[int, int]]) -> int:
    return sum(2 * BATCH * inside * outside for inside, outside in layers)


def step(layers: list[tuple[int, int]]) -> int:
    """Return the FLOPs of a forward and a backward pass."""
    inside, outside = layers[0]
    return 3 * forward(layers) - 2 * BATCH * inside * outside


def state_of(task: ImageTask) -> TrainState:
    network = task.network()
    weights = {n: p.detach().clone() for n, p in network.named_parameters()}
    zeros = {n: torch.zeros_like(p) for n, p in weights.items()}
    return TrainState(weights, {}, zeros, {}, 0, 2, 0, 0)


@pytest.fixture(params=LAYERS)
def layers(request: pytest.FixtureRequest) -> list[tuple[int, int]]:
    return LAYERS[request.param]


@pytest.fixture
def counted(layers: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return (space, settings, horizon) ↦ counts of a network of linear layers."""
    task = task_of(network(layers), monkeypatch)
    state = state_of(task)

    def count(space: dict[str, FloatDistribution], settings: WarmStart | None, horizon: int = 1) -> Any:
        return count_flops(task, state, SearchSpace(space), settings, horizon, CONSTANTS)

    return count


class TestFlops:
    def test_of_a_mini_batch_are_one_forward_and_one_backward_pass(self, counted: Any, layers: Any) -> None:
        assert counted(LR, None) == {"batch": step(layers), "warm": 0}

    def test_of_the_lean_warm_start_are_those_of_its_parts(self, counted: Any, layers: Any) -> None:
        """At horizon 1: the training gradient and that of the loss after the step.

        Label smoothing brings one more training gradient, the magnitude two losses after a step.
        """
        settings, gradient = WarmStart(rule="raw"), step(layers)
        assert counted(LR, settings)["warm"] == 2 * gradient
        assert counted({**LR, **SMOOTH}, settings)["warm"] == 3 * gradient
        one = gradient + forward(layers)
        assert counted({**LR, **MAGNITUDE}, settings)["warm"] == 2 * gradient + 2 * one
        assert counted({**LR, **SMOOTH, **MAGNITUDE}, settings)["warm"] == 3 * gradient + 2 * one

    def test_of_several_steps_are_as_many_times_those_of_one(self, counted: Any) -> None:
        one, three = (counted(LR, WarmStart(steps=steps))["warm"] for steps in (1, 3))
        assert three == 3 * one

    def test_of_the_control_are_those_of_its_twin(self, counted: Any) -> None:
        found = [counted(LR, WarmStart(steps=2, random=random)) for random in (False, True)]
        assert found[0] == found[1]

    def test_of_a_line_search_add_one_loss_a_candidate(self, counted: Any, layers: Any) -> None:
        raw = counted(LR, WarmStart())["warm"]
        search = counted(LR, WarmStart(rule="line-search", lengths=(0.1, 0.2)))["warm"]
        assert search - raw == 3 * (step(layers) + forward(layers))

    def test_of_a_grid_are_its_losses_alone(self, counted: Any, layers: Any) -> None:
        settings = WarmStart(rule="lr-grid", grid=(-0.2, 0.2), grid_horizon=3)
        assert counted(LR, settings)["warm"] == 3 * (3 * step(layers) + forward(layers))

    def test_of_noise_are_none(self, counted: Any) -> None:
        assert counted(LR, WarmStart(rule="gaussian"))["warm"] == 0

    def test_see_through_the_double_backward(self, counted: Any, layers: Any) -> None:
        """The learning rate needs none at horizon 1; the smoothing and horizon 2 do."""
        exact = WarmStart(estimator="exact")
        none, double = (counted(space, exact)["warm"] for space in (LR, {**LR, **SMOOTH}))
        assert none == 2 * step(layers)
        assert none < double <= none + 2 * step(layers)
        # One more training gradient, and one for the Hessian product with a backward of its own.
        longer = counted(LR, WarmStart(), 2)["warm"] - counted(LR, WarmStart(), 1)["warm"]
        assert 2 * step(layers) < longer <= 4 * step(layers)

    def test_of_a_convolution(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """2·B·H·W·k²·in·out forward, and as many for the gradient of its weights."""
        model = nn.Sequential(nn.Conv2d(1, CLASSES, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        task = task_of(model, monkeypatch)
        found = count_flops(task, state_of(task), SearchSpace(LR), None, 1, CONSTANTS)
        assert found["batch"] == 2 * (2 * BATCH * 64 * 9 * CLASSES)

    def test_counting_changes_no_state_and_no_random_stream(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Dropout(0.5), nn.Linear(64, CLASSES))
        task = task_of(model, monkeypatch)
        state = initial_state(task, 0, 0, 2)
        before, numbers = state.digest(), torch.get_rng_state()
        count_flops(task, state, SearchSpace(LR), WarmStart(), 1, CONSTANTS)
        assert state.digest() == before
        assert torch.equal(torch.get_rng_state(), numbers)
        assert all(p.grad is None for p in model.parameters())


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
            monkeypatch.setattr(cost, "_reset_kernel_peak", lambda: False)
        elif not cost._reset_kernel_peak():
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
        monkeypatch.setattr(cost, "_PROC", tmp_path / "none")
        with PeakMemory(CPU) as memory:
            assert memory._sampler is not None
        assert (memory.peaks["ram"] or 0) > 10 * MIB

    def test_nvml_tells_the_bytes_of_this_process_and_of_no_other(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = fake_nvml(monkeypatch, [(os.getpid() + 1, 5), (os.getpid(), 7)])
        assert cost._nvml_bytes(torch.device("cuda:1")) == 7
        assert asked == ["GPU-of-cuda:1", "shut down"]

    @pytest.mark.parametrize("running", [[], [(1, 5)], [(os.getpid(), None)]])
    def test_nvml_that_does_not_tell_gives_none(
        self, running: list[tuple[int, int | None]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fake_nvml(monkeypatch, running)
        assert cost._nvml_bytes(torch.device("cuda:0")) is None

    @pytest.mark.parametrize("call", ["nvmlInit", "nvmlDeviceGetHandleByUUID"])
    def test_a_driver_that_fails_gives_none(self, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*args: Any) -> None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_UNKNOWN)

        fake_nvml(monkeypatch, [(os.getpid(), 7)])
        monkeypatch.setattr(pynvml, call, fail)
        assert cost._nvml_bytes(torch.device("cuda:0")) is None

    @pytest.mark.gpu
    def test_on_a_gpu_counts_what_was_allocated_through_a_reset_of_the_statistics(self) -> None:
        device = torch.device("cuda")
        with PeakMemory(device) as memory:
            block = torch.ones(300 * MIB, dtype=torch.uint8, device=device)
            del block
            memory.note()
            torch.cuda.reset_peak_memory_stats(device)
            torch.ones(100 * MIB, dtype=torch.uint8, device=device)
        assert 300 * MIB <= (memory.peaks["vram"] or 0) < 310 * MIB
        assert memory.peaks["nvml"] is None or memory.peaks["nvml"] >= memory.peaks["vram"]
