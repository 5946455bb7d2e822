from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from optuna_ohgw import steps
from optuna_ohgw.errors import CaptureError
from optuna_ohgw.spec_tasks import AugmentationSpec, ImageSpec
from optuna_ohgw.steps import CapturedStep, EagerStep, Tensors, TensorStep, captured_bytes, step_for
from optuna_ohgw.tasks.image import ImageTask, load_image_arrays, split_images
from optuna_ohgw.training import initial_state, load, train_epoch

PSI = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-2, "label_smoothing": 0.1}
OTHER = {"lr": 0.2, "momentum": 0.3, "weight_decay": 1e-4, "label_smoothing": 0.0}
RATES = (0.05, 0.04, 0.01)


def build(model: str, device: str = "cpu", *, train_images: int = 80) -> ImageTask:
    spec = ImageSpec(
        data="digits",
        model=model,
        epochs=2,
        batch_size=16,
        train_images=train_images,  # 32 of them for validation
        validation_images=32,
        test_images=40,
        size=8,
        channels=3 if model == "resnet20" else 1,
        augmentation=AugmentationSpec(crop_padding=1, cutout=3),
    )
    data = split_images(spec, load_image_arrays(spec, None), 0, torch.device(device))
    return ImageTask(spec, data, model, spec.batch_size)


def prepared(
    model: str, dtype: torch.dtype, device: str = "cpu"
) -> tuple[ImageTask, nn.Module, Tensors, list[tuple[Tensor, Tensor]]]:
    """Return task, network, a velocity that is not zero, and three mini-batches."""
    task = build(model, device)
    network = load(task, initial_state(task, 0, 0, 2)).to(dtype)
    generator = torch.Generator().manual_seed(1)
    velocity = {
        n: 0.01 * torch.randn(w.shape, generator=generator, dtype=dtype).to(device)
        for n, w in network.named_parameters()
    }
    batches = [(x.to(dtype), y) for x, y in task.epoch(0, 0, 0, 3.0)]
    return task, network, velocity, batches


def reference(
    network: nn.Module,
    velocity: Tensors,
    batches: list[tuple[Tensor, Tensor]],
    psi: dict[str, float],
) -> list[float]:
    """Train in place by the formula of SGD with momentum, tensor by tensor."""
    losses = []
    for (inputs, target), rate in zip(batches, RATES, strict=True):
        loss = nn.functional.cross_entropy(network(inputs), target, label_smoothing=psi["label_smoothing"])
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        with torch.no_grad():
            for (name, weight), gradient in zip(network.named_parameters(), gradients, strict=True):
                velocity[name] = psi["momentum"] * velocity[name] + gradient + psi["weight_decay"] * weight
                weight -= rate * velocity[name]
        losses.append(float(loss.detach()))
    return losses


def eager(task: ImageTask, network: nn.Module, psi: dict[str, float], velocity: Tensors) -> EagerStep:
    return EagerStep(task, network, psi, velocity, {})


def as_tensors(task: ImageTask, network: nn.Module, psi: dict[str, float], velocity: Tensors) -> Any:
    """Return a TensorStep with the trial in place, called as an EagerStep is."""
    step = TensorStep(task, network)
    step.psi = {name: torch.tensor(psi[name], dtype=next(network.parameters()).dtype) for name in psi}
    for name, place in step.velocity.items():
        place.copy_(velocity[name])

    class Called:
        def __call__(self, inputs: Tensor, target: Tensor, rate: float) -> Tensor:
            step.psi["lr"].fill_(rate)
            return step(inputs, target)

        def velocity(self) -> Tensors:
            return step.velocity

    return Called()


@pytest.mark.parametrize("form", [eager, as_tensors])
@pytest.mark.parametrize("model", ["mlp", "resnet20"])
@pytest.mark.parametrize("psi", [PSI, OTHER])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_is_sgd_with_momentum(
    form: Any, model: str, psi: dict[str, float], dtype: torch.dtype, tolerance: float
) -> None:
    task, network, velocity, batches = prepared(model, dtype)
    _, twin, expected_velocity, _ = prepared(model, dtype)
    expected = reference(twin, expected_velocity, batches, psi)
    step = form(task, network, psi, velocity)

    losses = [float(step(x, y, rate)) for (x, y), rate in zip(batches, RATES, strict=True)]

    assert losses == pytest.approx(expected, abs=tolerance)
    for (name, got), want in zip(network.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=tolerance)
        torch.testing.assert_close(
            step.velocity()[name], expected_velocity[name], rtol=0, atol=10 * tolerance
        )
    for got, want in zip(network.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=tolerance)


class NoHostReads(TorchDispatchMode):
    """Fails where a tensor's value or a data-dependent shape is asked for, as a CUDA graph would."""

    BARRED = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        assert name not in self.BARRED, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("form", [eager, as_tensors])
def test_weights_that_share_a_gradient_are_each_trained_with_their_own_decay(form: Any) -> None:
    """The gradient of a + b is one tensor for both."""

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.a, self.b = (nn.Parameter(torch.randn(64, 10, dtype=torch.float64)) for _ in range(2))

        def forward(self, inputs: Tensor) -> Tensor:
            return inputs.flatten(1) @ (self.a + self.b)

    task, _, _, batches = prepared("mlp", torch.float64)
    network, twin = Sum(), Sum()
    zero = {name: torch.zeros_like(w) for name, w in network.named_parameters()}
    reference(twin, dict(zero), batches, PSI)
    step = form(task, network, PSI, zero)
    for (x, y), rate in zip(batches, RATES, strict=True):
        step(x, y, rate)
    for got, want in zip(network.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("model", ["mlp", "resnet20"])
def test_what_a_graph_replays_asks_the_host_nothing_and_stays_in_its_memory(model: str) -> None:
    task, network, _, batches = prepared(model, torch.float32)
    step = TensorStep(task, network)
    places = [*network.state_dict().values(), *step.velocity.values(), *step.psi.values()]
    where = [tensor.data_ptr() for tensor in places]
    before = [w.clone() for w in network.parameters()]
    for name, place in step.psi.items():
        place.fill_(PSI[name])
    with NoHostReads():
        for inputs, target in batches:
            step(inputs, target)
    with pytest.raises(AssertionError, match="waits for the device"), NoHostReads():
        torch.ones(1).item()
    now = [*network.state_dict().values(), *step.velocity.values(), *step.psi.values()]
    assert [tensor.data_ptr() for tensor in now] == where
    assert not any(torch.equal(w, b) for w, b in zip(network.parameters(), before, strict=True))


def test_the_given_velocity_is_not_changed() -> None:
    task, network, velocity, batches = prepared("mlp", torch.float32)
    before = {name: v.clone() for name, v in velocity.items()}
    EagerStep(task, network, PSI, velocity, {})(*batches[0], 0.1)
    for name, v in velocity.items():
        assert torch.equal(v, before[name])


def test_on_a_cpu_the_step_is_eager() -> None:
    task, network, velocity, _ = prepared("mlp", torch.float32)
    assert isinstance(step_for(task, network, PSI, velocity, {}), EagerStep)
    assert captured_bytes(network) == 0


class TestScaler:
    @pytest.fixture(autouse=True)
    def _half(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(steps, "needs_scaler", lambda device: True)
        monkeypatch.setattr(steps, "autocast", lambda device: torch.autocast("cpu", torch.float16))

    def test_scaled_float16_is_near_float32(self, monkeypatch: pytest.MonkeyPatch) -> None:
        task, network, velocity, batches = prepared("mlp", torch.float32)
        _, twin, expected_velocity, _ = prepared("mlp", torch.float32)
        reference(twin, expected_velocity, batches, PSI)
        step = EagerStep(task, network, PSI, velocity, {})
        for batch, rate in zip(batches, RATES, strict=True):
            step(*batch, rate)
        for got, want in zip(network.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=5e-3)

    def test_an_overflow_skips_the_step_and_halves_the_scale_for_the_next_epoch(self) -> None:
        task, network, velocity, batches = prepared("mlp", torch.float32)
        step = EagerStep(task, network, PSI, velocity, {})
        scale = step.scaler()["scale"]
        before = [w.detach().clone() for w in network.parameters()]
        step(torch.full_like(batches[0][0], 6e4), batches[0][1], 0.1)
        assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
        kept = step.scaler()
        assert kept["scale"] == scale / 2
        assert EagerStep(task, network, PSI, velocity, kept).scaler() == kept


class FakeGraph:
    """A CUDA graph that replays what was done while it was captured, on a CPU."""

    recorded: Any = None

    def replay(self) -> None:
        self.recorded()


class TestCaptured:
    """The bookkeeping around a graph, with a graph that calls the step again."""

    @pytest.fixture(autouse=True)
    def _cuda(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.replays, self.modes = 0, []
        steps._side_stream.cache_clear()
        outer = self

        class Graph(FakeGraph):
            def replay(self) -> None:
                outer.replays += 1
                super().replay()

        call, losses = TensorStep.__call__, {}

        @contextmanager
        def capture(graph: FakeGraph, stream: Any) -> Iterator[None]:
            def recording(step: TensorStep, inputs: Tensor, target: Tensor) -> Tensor:
                loss = call(step, inputs, target)
                losses[id(graph)] = loss
                graph.recorded = lambda: losses[id(graph)].copy_(call(step, inputs, target))
                return loss

            with monkeypatch.context() as patch:
                patch.setattr(TensorStep, "__call__", recording)
                yield

        class Stream:
            def __init__(self, device: Any = None) -> None: ...

            def wait_stream(self, other: Any) -> None:
                outer.waited.append((self, other))

        self.waited: list[Any] = []

        cuda = torch.cuda
        monkeypatch.setattr(cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(cuda, "graph", capture)
        monkeypatch.setattr(cuda, "Stream", Stream)
        monkeypatch.setattr(cuda, "current_stream", lambda device=None: Stream())
        monkeypatch.setattr(cuda, "stream", lambda stream: nullcontext())
        monkeypatch.setattr(cuda, "get_sync_debug_mode", lambda: 0)
        monkeypatch.setattr(cuda, "set_sync_debug_mode", self.modes.append)
        monkeypatch.setattr(cuda, "memory_allocated", lambda device=None: 100)
        monkeypatch.setattr(cuda, "max_memory_allocated", lambda device=None: 340)
        monkeypatch.setattr(cuda, "reset_peak_memory_stats", lambda device=None: None)

    def test_trains_one_trial_after_another_as_eager_steps_do(self) -> None:
        task, network, velocity, batches = prepared("resnet20", torch.float32)
        step = CapturedStep(task, network)
        for psi in (PSI, OTHER):
            _, twin, expected_velocity, _ = prepared("resnet20", torch.float32)
            expected = reference(twin, expected_velocity, batches, psi)
            load(task, initial_state(task, 0, 0, 2))
            step.begin(psi, velocity)
            losses = [float(step(x, y, rate)) for (x, y), rate in zip(batches, RATES, strict=True)]
            assert losses == pytest.approx(expected, abs=1e-5)
            for (name, got), want in zip(network.named_parameters(), twin.parameters(), strict=True):
                torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
                torch.testing.assert_close(step.velocity()[name], expected_velocity[name], rtol=0, atol=1e-4)
            for got, want in zip(network.buffers(), twin.buffers(), strict=True):
                torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
        assert self.replays == 6

    def test_each_shape_is_captured_once_and_the_velocity_handed_out_is_a_copy(self) -> None:
        task, network, velocity, batches = prepared("mlp", torch.float32)
        step = CapturedStep(task, network)
        step.begin(PSI, velocity)
        for inputs, target in batches:
            step(inputs, target, 0.1)
            step(inputs[:5], target[:5], 0.1)
        assert len(step._graphs) == 2
        handed = step.velocity()
        kept = {name: v.clone() for name, v in handed.items()}
        step(*batches[0], 0.1)
        assert all(torch.equal(handed[name], kept[name]) for name in kept)

    def test_captured_for_a_gpu_is_kept_with_the_network_until_its_memory_moves(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        task, network, velocity, _ = prepared("mlp", torch.float32)
        before = {n: t.clone() for n, t in network.state_dict().items()}
        step = step_on_gpu(monkeypatch, task, network, velocity)
        assert isinstance(step, CapturedStep)
        assert captured_bytes(network) == 240
        assert all(torch.equal(t, before[n]) for n, t in network.state_dict().items())
        assert step_on_gpu(monkeypatch, task, network, velocity) is step
        network.double().float()
        again = step_on_gpu(monkeypatch, task, network, velocity)
        assert isinstance(again, CapturedStep)
        assert again is not step

    def test_what_cannot_be_captured_is_trained_eagerly_and_said_once(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        task, network, velocity, _ = prepared("mlp", torch.float32)
        call = TensorStep.__call__

        def waiting(step: TensorStep, inputs: Tensor, target: Tensor) -> Tensor:
            if self.modes[-1:] == ["error"]:
                raise RuntimeError("called a synchronizing CUDA operation\nmore")
            return call(step, inputs, target)

        monkeypatch.setattr(TensorStep, "__call__", waiting)
        before = {n: t.clone() for n, t in network.state_dict().items()}
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                assert isinstance(step_on_gpu(monkeypatch, task, network, velocity), EagerStep)
        assert len(caplog.records) == 1
        assert "called a synchronizing CUDA operation" in caplog.text
        assert "more" not in caplog.text
        assert self.modes == ["error", 0]
        assert len(self.waited) == 2  # also after an error: what restores the weights comes after it
        assert all(torch.equal(t, before[n]) for n, t in network.state_dict().items())
        assert captured_bytes(network) == 0

    @pytest.mark.parametrize("memory", [True, False])
    @pytest.mark.parametrize("at", ["warm-up", "capture"])
    def test_what_fails_otherwise_is_not_hidden(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, at: str, memory: bool
    ) -> None:
        """In the capture the first error counts: its end raises another, as torch does."""
        task, network, velocity, _ = prepared("mlp", torch.float32)
        error = torch.OutOfMemoryError("CUDA out of memory") if memory else KeyError("odd")

        @contextmanager
        def broken(graph: FakeGraph, stream: Any) -> Iterator[None]:
            try:
                yield
            finally:
                raise RuntimeError("operation failed due to a previous error during capture")

        calls = iter(range(10))

        def fail(step: TensorStep, inputs: Tensor, target: Tensor) -> Tensor:
            if next(calls) == (0 if at == "warm-up" else 3):
                raise error
            return torch.zeros(())

        monkeypatch.setattr(torch.cuda, "graph", broken)
        monkeypatch.setattr(TensorStep, "__call__", fail)
        if at == "warm-up":
            with pytest.raises(type(error)):
                step_on_gpu(monkeypatch, task, network, velocity)
        else:
            with pytest.raises(CaptureError, match=r"\(.*(out of memory|odd).*\); use execution") as caught:
                step_on_gpu(monkeypatch, task, network, velocity)
            assert caught.value.memory is memory
        assert not caplog.records
        assert len(self.waited) == 2

    def test_an_error_that_the_network_handles_itself_is_not_the_reason(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        task, network, velocity, _ = prepared("mlp", torch.float32)
        calls = iter(range(10))

        def full(step: TensorStep, inputs: Tensor, target: Tensor) -> Tensor:
            if next(calls) == 3:
                try:
                    raise KeyError("not in the cache")
                except KeyError:
                    raise torch.OutOfMemoryError("CUDA out of memory")  # noqa: B904
            return torch.zeros(())

        monkeypatch.setattr(TensorStep, "__call__", full)
        monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: nullcontext())
        with pytest.raises(CaptureError, match=r"\(CUDA out of memory\)") as caught:
            step_on_gpu(monkeypatch, task, network, velocity)
        assert caught.value.memory
        again = pickle.loads(pickle.dumps(caught.value))  # Ray and pools hand it on
        assert (str(again), again.memory) == (str(caught.value), True)

    def test_can_be_turned_off(self, monkeypatch: pytest.MonkeyPatch) -> None:
        task, network, velocity, _ = prepared("mlp", torch.float32)
        monkeypatch.setattr(steps, "_graphs", True)
        steps.use_graphs(False)
        assert isinstance(step_on_gpu(monkeypatch, task, network, velocity), EagerStep)
        steps.use_graphs(True)
        assert isinstance(step_on_gpu(monkeypatch, task, network, velocity), CapturedStep)

    def test_the_streams_of_an_epoch_stay_as_they_are(self) -> None:
        """A network that drops units draws in the warm-up, which is none of the trial's."""
        task, network, velocity, batches = prepared("mlp", torch.float32)
        network.append(nn.Dropout(0.5))
        losses = []
        step = CapturedStep(task, network)
        for _ in range(2):
            load(task, initial_state(task, 0, 0, 2))
            step.begin(PSI, velocity)
            torch.manual_seed(5)
            losses.append(
                [float(step(x, y, 0.1)) for x, y in (*batches, (batches[0][0][:5], batches[0][1][:5]))]
            )
        assert losses[0] == losses[1]


def step_on_gpu(
    monkeypatch: pytest.MonkeyPatch, task: ImageTask, network: nn.Module, velocity: Tensors
) -> Any:
    """Return the step for a task that says it is on a GPU, its tensors staying on the CPU."""

    class OnGpu:
        device = torch.device("cuda")

        def __getattr__(self, name: str) -> Any:
            return getattr(task, name)

    with monkeypatch.context() as patch:
        patch.setattr(steps, "needs_scaler", lambda device: False)
        patch.setattr(steps, "autocast", lambda device: nullcontext())
        zeros = torch.zeros
        patch.setattr(torch, "zeros", lambda *shape, device=None: zeros(*shape))
        return step_for(OnGpu(), network, PSI, velocity, {})  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize(("half", "tolerance"), [(False, 1e-3), (True, 2e-2)])
@pytest.mark.parametrize("model", ["mlp", "resnet20"])
def test_on_a_gpu_the_captured_step_trains_as_the_eager_one(
    model: str, half: bool, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not half:
        monkeypatch.setattr(steps, "autocast", lambda device: nullcontext())  # float32 on both sides
    task, network, velocity, batches = prepared(model, torch.float32, "cuda")
    twin_task, twin, twin_velocity, _ = prepared(model, torch.float32, "cuda")
    for psi in (PSI, OTHER):
        captured = step_for(task, network, psi, velocity, {})
        assert isinstance(captured, CapturedStep)
        plain = EagerStep(twin_task, twin, psi, twin_velocity, {})
        for (inputs, target), rate in zip(batches, RATES, strict=True):
            loss = float(captured(inputs, target, rate))
            assert loss == pytest.approx(float(plain(inputs, target, rate)), abs=tolerance)
        for got, want in zip(network.state_dict().values(), twin.state_dict().values(), strict=True):
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    assert captured_bytes(network) > 0


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["mlp", "resnet20"])
def test_on_a_gpu_an_epoch_of_replays_is_an_eager_one_the_first_as_every_other(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autocast as in training, and a last mini-batch of another shape."""
    task = build(model, "cuda", train_images=88)
    state = replace(initial_state(task, 0, 0, 2), psi={**PSI, "magnitude": 2.0})
    (first, loss), (again, _) = train_epoch(task, state), train_epoch(task, state)
    monkeypatch.setattr(steps, "_graphs", False)
    eager, expected = train_epoch(build(model, "cuda", train_images=88), state)
    assert loss == pytest.approx(expected, abs=2e-2)
    for name, tensor in first.tensors().items():
        torch.testing.assert_close(tensor, again.tensors()[name], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(tensor, eager.tensors()[name], rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
def test_on_a_gpu_what_waits_for_the_device_is_trained_eagerly(caplog: pytest.LogCaptureFixture) -> None:
    """And the next network is captured: nothing of the first try is left over."""
    task, network, velocity, batches = prepared("mlp", torch.float32, "cuda")

    class Waits(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return inputs * (1.0 if inputs.sum().item() else 2.0)

    network.append(Waits())
    step = step_for(task, network, PSI, velocity, {})
    assert isinstance(step, EagerStep)
    assert "cannot be captured" in caplog.text
    step(*batches[0], 0.1)
    torch.cuda.empty_cache()
    task, network, velocity, _ = prepared("mlp", torch.float32, "cuda")
    assert isinstance(step_for(task, network, PSI, velocity, {}), CapturedStep)
