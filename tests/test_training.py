from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from optuna.distributions import FloatDistribution
from safetensors.torch import save_file
from torch import nn
from torch.func import functional_call, vmap

from optuna_ohgw.space import SearchSpace
from optuna_ohgw.spec_tasks import AugmentationSpec, ImageSpec
from optuna_ohgw.tasks.base import Task
from optuna_ohgw.tasks.image import ImageTask, load_image_arrays, split_images
from optuna_ohgw.training import (
    Interrupted,
    StateStack,
    TrainState,
    cosine,
    initial_state,
    load,
    state_loss,
    train_epoch,
)
from optuna_ohgw.warmstart import WarmStart, warm_start

PSI = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, "magnitude": 3.0, "label_smoothing": 0.1}
SPACE = SearchSpace(
    {
        "lr": FloatDistribution(1e-4, 1.0, log=True),
        "weight_decay": FloatDistribution(1e-6, 1e-1, log=True),
        "momentum": FloatDistribution(0.0, 0.99),
        "magnitude": FloatDistribution(0.0, 10.0),
        "label_smoothing": FloatDistribution(0.0, 0.3),
    }
)
EPOCHS = 5
SEED, INDEX = 0, 2


def build(model: str) -> ImageTask:
    """Return digits for ``mlp`` (one channel) or ``resnet20`` (three: channels-last memory)."""
    small = model == "resnet20"
    spec = ImageSpec(
        data="digits",
        model=model,
        epochs=EPOCHS,
        batch_size=32,
        train_images=66 if small else 300,  # the last mini-batch is a small one
        validation_images=40,
        test_images=40,
        size=8,
        channels=3 if small else 1,
        augmentation=AugmentationSpec(flip=False, crop_padding=1, operations=1, cutout=2),
    )
    data = split_images(spec, load_image_arrays(spec, None), SEED, torch.device("cpu"))
    return ImageTask(spec, data, model, spec.batch_size)


@pytest.fixture(scope="module", params=["mlp", "resnet20"])
def task(request: pytest.FixtureRequest) -> ImageTask:
    return build(request.param)


@pytest.fixture(scope="module")
def mlp() -> ImageTask:
    return build("mlp")


@pytest.fixture(scope="module")
def resnet() -> ImageTask:
    return build("resnet20")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def fresh(task: Task, **psi: float) -> TrainState:
    return replace(initial_state(task, SEED, INDEX, EPOCHS), psi={**PSI, **psi})


def trained(task: Task, epochs: int, state: TrainState | None = None) -> TrainState:
    state = state or fresh(task)
    for _ in range(epochs):
        state, _ = train_epoch(task, state)
    return state


def assert_same(first: TrainState, second: TrainState) -> None:
    """Assert that two states agree in every bit."""
    a, b = first.tensors(), second.tensors()
    assert a.keys() == b.keys()
    differing = [name for name in a if not torch.equal(a[name], b[name])]
    assert not differing
    bare = [replace(s, weights={}, buffers={}, velocity={}, psi=dict(s.psi)) for s in (first, second)]
    assert bare[0] == bare[1]


class TestInitialState:
    def test_is_that_of_the_task_at_rest(self, task: ImageTask) -> None:
        state = initial_state(task, SEED, INDEX, EPOCHS)
        network = task.initialize(SEED, INDEX)
        assert dict(state.weights).keys() == dict(network.named_parameters()).keys()
        assert all(torch.equal(p, state.weights[n]) for n, p in network.named_parameters())
        assert all(torch.equal(b, state.buffers[n]) for n, b in network.named_buffers())
        assert not any(v.any() for v in state.velocity.values())
        assert (state.epoch, state.epochs, state.seed, state.config_index) == (0, EPOCHS, SEED, INDEX)
        assert state.psi == {}

    def test_shares_no_memory_with_the_network(self, mlp: ImageTask) -> None:
        state = fresh(mlp)
        before = state.digest()
        for weight in mlp.network().parameters():
            weight.data.zero_()
        assert state.digest() == before


class TestTrainEpoch:
    @pytest.mark.parametrize("psi", [{}, {"momentum": 0.0, "label_smoothing": 0.0, "weight_decay": 0.0}])
    def test_is_the_plain_pytorch_loop_at_a_cosine_rate(self, task: ImageTask, psi: dict[str, float]) -> None:
        epochs = 2
        state = fresh(task, **psi)
        losses = []
        for _ in range(epochs):
            state, loss = train_epoch(task, state)
            losses.append(loss)

        psi = {**PSI, **psi}
        network = task.initialize(SEED, INDEX)
        network.train()
        optimizer = torch.optim.SGD(
            network.parameters(), psi["lr"], psi["momentum"], weight_decay=psi["weight_decay"], fused=False
        )
        total = EPOCHS * task.batches_per_epoch
        criterion = nn.CrossEntropyLoss(label_smoothing=psi["label_smoothing"])
        expected = []
        for epoch in range(epochs):
            sums = []
            for inputs, target in task.epoch(SEED, INDEX, epoch, psi["magnitude"]):
                step = epoch * task.batches_per_epoch + len(sums)
                # the closed form of torch.optim.lr_scheduler.CosineAnnealingLR with eta_min 0
                optimizer.param_groups[0]["lr"] = psi["lr"] * (1 + math.cos(math.pi * step / total)) / 2
                optimizer.zero_grad()
                loss = criterion(network(inputs), target)
                loss.backward()
                optimizer.step()
                sums.append(float(loss.detach()))
            expected.append(np.mean(sums))
        # float32, two kernels: differences grow over the steps, most in a network with BatchNorm
        near = {"rtol": 1e-5, "atol": 1e-5}
        for name, weight in network.named_parameters():
            torch.testing.assert_close(state.weights[name], weight.detach(), **near)
            if psi["momentum"]:
                momentum = optimizer.state[weight]["momentum_buffer"]
                torch.testing.assert_close(state.velocity[name], momentum, **near)
        for name, buffer in network.named_buffers():
            torch.testing.assert_close(state.buffers[name], buffer, **near)
        assert losses == pytest.approx(expected, rel=1e-5)
        assert state.epoch == epochs

    def test_the_rate_is_torchs_cosine_schedule(self) -> None:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
        for step in range(20):
            assert cosine(step, 20) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
            optimizer.step()
            schedule.step()

    def test_changes_weights_buffers_and_momentum_but_not_the_given_state(self, resnet: ImageTask) -> None:
        state = trained(resnet, 1)
        before = {n: t.clone() for n, t in state.tensors().items()}
        after, _ = train_epoch(resnet, state)
        assert all(torch.equal(t, before[n]) for n, t in state.tensors().items())
        assert state.epoch == 1
        moved = {n.split(".")[0] for n, t in after.tensors().items() if not torch.equal(t, before[n])}
        assert moved == {"weights", "buffers", "velocity"}

    def test_shares_no_memory_between_states_and_network(self, resnet: ImageTask) -> None:
        first = trained(resnet, 1)
        before = {n: t.clone() for n, t in first.tensors().items()}
        trained(resnet, 1, first)
        for tensor in resnet.network().state_dict().values():
            tensor.zero_()
        assert all(torch.equal(t, before[n]) for n, t in first.tensors().items())

    def test_leaves_the_network_at_the_new_state(self, task: ImageTask) -> None:
        state = trained(task, 1)
        named = task.network().state_dict()
        assert all(torch.equal(named[n], t) for n, t in {**state.weights, **state.buffers}.items())

    def test_depends_on_the_state_alone(self, task: ImageTask) -> None:
        state = trained(task, 1)
        expected = trained(task, 1, state)
        torch.manual_seed(77)
        task.initialize(5, 5)
        task.evaluate("validation")
        trained(task, 1, fresh(task, lr=0.3))
        assert_same(trained(task, 1, state), expected)

    def test_leaves_global_random_states_alone(self, task: ImageTask) -> None:
        torch.manual_seed(3)
        np.random.seed(3)  # noqa: NPY002 - the global state is what is meant
        random.seed(3)
        before = torch.random.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
        state = trained(task, 1)
        loss = state_loss(task, state, 1, 1)
        settings = WarmStart(random=True)
        warm_start(loss, SPACE, dict(state.psi), settings, torch.Generator().manual_seed(0))
        assert torch.equal(torch.random.get_rng_state(), before[0])
        assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), before[1], strict=True))  # noqa: NPY002
        assert random.getstate() == before[2]

    def test_random_layers_draw_from_a_stream_of_their_own(self, mlp: ImageTask) -> None:
        """A dropout mask depends on (seed, configuration, epoch), not on what ran before."""
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Dropout(0.5))
        pictures = SimpleNamespace(
            device=mlp.device,
            batches_per_epoch=mlp.batches_per_epoch,
            network=lambda: network,
            epoch=mlp.epoch,
            training_loss=mlp.training_loss,
        )
        weights = {n: p.detach().clone() for n, p in network.named_parameters()}
        velocity = {n: torch.zeros_like(p) for n, p in weights.items()}
        state = TrainState(weights, {}, velocity, PSI, 0, EPOCHS, SEED, INDEX)
        torch.manual_seed(1)
        first = train_epoch(pictures, state)[0]
        torch.manual_seed(2)
        assert_same(train_epoch(pictures, state)[0], first)
        apart = train_epoch(pictures, replace(state, config_index=INDEX + 1))[0]
        assert apart.digest() != first.digest()

    @pytest.mark.parametrize("batches", [0, 3])
    def test_stop_interrupts_between_mini_batches(self, mlp: ImageTask, batches: int) -> None:
        calls = iter(range(100))
        with pytest.raises(Interrupted):
            train_epoch(mlp, fresh(mlp), stop=lambda: next(calls) >= batches)
        assert next(calls) == batches + 1

    def test_a_diverged_loss_is_returned_as_it_is(self, mlp: ImageTask) -> None:
        assert not math.isfinite(train_epoch(mlp, fresh(mlp, lr=1e30))[1])


class TestRoundTrips:
    def test_saving_between_two_epochs_changes_no_bit(self, task: ImageTask, tmp_path: Path) -> None:
        first = trained(task, 1)
        expected = trained(task, 1, first)
        path = tmp_path / "state.safetensors"
        first.save(path)
        back = TrainState.load(path)
        assert_same(back, first)
        assert back.psi == PSI
        assert_same(trained(task, 1, back), expected)
        assert [p.name for p in tmp_path.iterdir()] == [path.name]

    def test_every_float_of_psi_comes_back_exactly(self, mlp: ImageTask, tmp_path: Path) -> None:
        psi = {"lr": 0.1 + 0.2, "momentum": math.nextafter(0.9, 1), "weight_decay": 5e-324}
        state = replace(fresh(mlp), psi=psi, epoch=3)
        state.save(tmp_path / "s")
        assert TrainState.load(tmp_path / "s").psi == psi
        assert TrainState.load(tmp_path / "s").epoch == 3

    def test_saving_over_a_file_keeps_the_old_one_until_the_new_is_whole(
        self, mlp: ImageTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "s"
        fresh(mlp).save(path)

        def fails(*args: object, **kwargs: object) -> None:
            Path(str(args[1])).write_bytes(b"half")
            raise OSError("disk full")

        monkeypatch.setattr("safetensors.torch.save_file", fails)
        with pytest.raises(OSError, match="disk full"):
            trained(mlp, 1).save(path)
        assert_same(TrainState.load(path), fresh(mlp))

    @pytest.mark.parametrize("kind", ["empty", "text", "other", "names", "scalars", "json"])
    def test_a_file_that_is_no_state_is_refused(self, tmp_path: Path, kind: str) -> None:
        path = tmp_path / "file"
        tensors = {"weights.a": torch.zeros(2)}
        state = json.dumps({"psi": {}, "epoch": 0, "epochs": 1, "seed": 0, "config_index": 0})
        if kind in ("empty", "text"):
            path.write_bytes(b"" if kind == "empty" else b"not a state" * 20)
        elif kind == "other":
            save_file(tensors, path)
        elif kind == "names":
            save_file({"a": torch.zeros(2)}, path, metadata={"state": state})
        else:
            save_file(tensors, path, metadata={"state": '{"epoch": 1}' if kind == "scalars" else "{"})
        with pytest.raises(ValueError, match=r"file holds no training state; give a file that save"):
            TrainState.load(path)

    def test_a_missing_file_is_missing(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            TrainState.load(tmp_path / "none")

    def test_moving_to_a_device_and_back_changes_no_bit(self, task: ImageTask) -> None:
        state = trained(task, 1)
        assert_same(state.to("cpu"), state)
        meta = state.to("meta")
        assert {t.device.type for t in meta.tensors().values()} == {"meta"}
        assert (meta.psi, meta.epoch) == (state.psi, state.epoch)

    @pytest.mark.gpu
    def test_moving_to_a_gpu_and_back_changes_no_bit(self, task: ImageTask) -> None:
        state = trained(task, 1)
        assert_same(state.to("cuda").to("cpu"), state)

    def test_stacking_and_unstacking_changes_no_bit(self, task: ImageTask) -> None:
        states = [trained(task, 1), fresh(task, lr=0.2), trained(task, 2)]
        stack = StateStack.of(states)
        assert all(len(t) == 3 for group in (stack.weights, stack.velocity) for t in group.values())
        back = stack.unstack()
        for state, member in zip(states, back, strict=True):
            assert_same(member, state)
        assert_same(trained(task, 1, back[0]), trained(task, 1, states[0]))

    def test_a_stack_trains_under_vmap(self, resnet: ImageTask) -> None:
        states = [trained(resnet, 1), trained(resnet, 1, fresh(resnet, lr=0.2))]
        stack = StateStack.of(states)
        network = resnet.network().eval()
        inputs = resnet.prepare(resnet.data.validation_images[:8])
        together = vmap(lambda w, b: functional_call(network, ({**w, **b},), (inputs,)))(
            stack.weights, stack.buffers
        )
        for state, output in zip(states, together, strict=True):
            alone = functional_call(network, ({**state.weights, **state.buffers},), (inputs,))
            # grouped convolutions of float32 sum in another order
            torch.testing.assert_close(output, alone, rtol=1e-3, atol=1e-4)
        assert (together[0] - together[1]).abs().max() > 0.1

    def test_buffers_that_no_state_dict_holds_are_left_to_the_network(self, mlp: ImageTask) -> None:
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        network.register_buffer("table", torch.ones(2), persistent=False)
        network.register_buffer("count", torch.ones(2))
        other = SimpleNamespace(
            device=mlp.device,
            batches_per_epoch=mlp.batches_per_epoch,
            network=lambda: network,
            initialize=lambda seed, config_index: network,
            epoch=mlp.epoch,
            training_loss=mlp.training_loss,
        )
        state = replace(initial_state(other, SEED, INDEX, EPOCHS), psi=PSI)
        after, _ = train_epoch(other, state)
        assert state.buffers.keys() == after.buffers.keys() == {"count"}


class TestDigest:
    def test_sees_one_bit_of_weights_and_buffers_and_not_the_momentum(self, resnet: ImageTask) -> None:
        state = trained(resnet, 1)
        assert state.digest() == replace(state, velocity={}, epoch=0).digest()
        for group in ("weights", "buffers"):
            tensors = dict(getattr(state, group))
            name = next(n for n, t in tensors.items() if t.is_floating_point() and t.ndim == 1)
            changed = tensors[name].clone()
            changed[-1] = torch.nextafter(changed[-1], torch.tensor(9.0))
            assert replace(state, **{group: {**tensors, name: changed}}).digest() != state.digest()

    def test_does_not_depend_on_the_memory_format(self, resnet: ImageTask) -> None:
        state = trained(resnet, 1)
        plain = {n: t.contiguous() for n, t in state.weights.items()}
        assert replace(state, weights=plain).digest() == state.digest()


class TestNull:
    """A warm start that moves nothing leaves training as it is, bit for bit."""

    @staticmethod
    def run(task: Task, settings: WarmStart | None, rungs: tuple[int, ...], horizon: int) -> TrainState:
        state = fresh(task)
        for epoch in range(3):
            if settings is not None and epoch in rungs:
                loss = state_loss(task, state, rungs.index(epoch), horizon)
                generator = torch.Generator().manual_seed(epoch)
                warmed = warm_start(loss, SPACE, dict(state.psi), settings, generator)
                assert warmed.psi == state.psi
                assert set(warmed.record["step"].values()) == {0.0}
                state = replace(state, psi=warmed.psi)
            state, _ = train_epoch(task, state)
        return state

    @pytest.mark.parametrize("rungs", [(0,), (0, 1, 2)], ids=["once", "every-rung"])
    @pytest.mark.parametrize("estimator", ["lean", "exact", "direct", "finite-difference"])
    def test_all_frozen(self, task: ImageTask, estimator: str, rungs: tuple[int, ...]) -> None:
        settings = WarmStart(estimator=estimator, freeze=SPACE.names, eta_h=1.0)
        baseline = self.run(task, None, (), 1)
        assert_same(self.run(task, settings, rungs, horizon=1), baseline)

    @pytest.mark.parametrize("rule", ["gaussian", "lr-grid", "trust-region", "line-search"])
    @pytest.mark.parametrize("random_", [False, True])
    def test_all_frozen_under_every_rule(
        self, mlp: ImageTask, request: pytest.FixtureRequest, rule: str, random_: bool
    ) -> None:
        settings = WarmStart(rule=rule, random=random_, freeze=SPACE.names, grid_horizon=2, steps=2)
        baseline = self.run(mlp, None, (), 1)
        assert_same(self.run(mlp, settings, (0, 2), horizon=2), baseline)

    def test_the_test_can_fail(self, mlp: ImageTask) -> None:
        with pytest.raises(AssertionError):
            self.run(mlp, WarmStart(freeze=SPACE.names[1:]), (0,), horizon=1)


class TestStateLoss:
    @pytest.mark.parametrize("horizon", [1, 3])
    def test_after_an_epoch_is_the_loss_after_real_sgd_steps(self, task: ImageTask, horizon: int) -> None:
        """Momentum buffers, schedule, augmentation and smoothing are those of training."""
        state = trained(task, 2)
        psi = {**PSI, "lr": 0.02, "momentum": 0.7, "magnitude": 5.0}
        given = {n: torch.tensor(v, dtype=torch.float64) for n, v in psi.items()}
        with torch.no_grad():
            found = float(state_loss(task, state, 1, horizon)(given))

        network = load(task, state)
        rate = psi["lr"] * (1 + math.cos(math.pi * 2 / EPOCHS)) / 2
        optimizer = torch.optim.SGD(
            network.parameters(), rate, psi["momentum"], weight_decay=psi["weight_decay"]
        )
        for name, weight in network.named_parameters():
            optimizer.state[weight]["momentum_buffer"] = state.velocity[name].clone()
        batch = task.warm_batches(SEED, INDEX, 1)
        for step in range(horizon):
            raw, target = batch(step)
            optimizer.zero_grad()
            output = network(task.augment(raw, torch.tensor(psi["magnitude"])))
            task.training_loss(output, target, psi["label_smoothing"]).backward()
            optimizer.step()
        raw, target = batch(horizon)
        expected = float(task.criterion(network(task.prepare(raw)), target).detach())
        assert found == pytest.approx(expected, rel=1e-4)  # float32 through `horizon` steps

        at_rest = replace(state, velocity={n: torch.zeros_like(v) for n, v in state.velocity.items()})
        another_epoch = replace(state, epoch=4)
        for other in (at_rest, another_epoch):
            with torch.no_grad():
                assert abs(float(state_loss(task, other, 1, horizon)(given)) - expected) > 1e-3 * expected

    def test_at_the_start_momentum_acts_through_its_steady_state(self, mlp: ImageTask) -> None:
        state = fresh(mlp)
        with torch.no_grad():
            psi = {"lr": torch.tensor(0.02), "momentum": torch.tensor(0.8)}
            steady = {"lr": torch.tensor(0.1), "momentum": torch.tensor(0.0)}
            loss = state_loss(mlp, state, 0, 1)
            assert float(loss(psi)) == pytest.approx(float(loss(steady)), rel=1e-6)

    def test_reads_what_psi_lacks_from_the_state(self, mlp: ImageTask) -> None:
        state = trained(mlp, 1)
        with torch.no_grad():
            loss = state_loss(mlp, state, 1, 1)
            whole = {n: torch.tensor(v) for n, v in PSI.items()}
            assert float(loss({"lr": torch.tensor(PSI["lr"])})) == pytest.approx(float(loss(whole)), rel=1e-6)

    def test_rungs_see_mini_batches_of_their_own(self, mlp: ImageTask) -> None:
        state = trained(mlp, 1)
        with torch.no_grad():
            psi = {"lr": torch.tensor(0.1)}
            values = {float(state_loss(mlp, state, rung, 1)(psi)) for rung in (0, 1, 2)}
        assert len(values) == 3
