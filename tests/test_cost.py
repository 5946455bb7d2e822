from __future__ import annotations

from typing import Any

import pytest
import torch
from optuna.distributions import FloatDistribution
from torch import nn

from optuna_ohgw.cost import count_flops
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
