"""The look-ahead loss against real ``torch.optim.SGD`` steps, and what a call leaves untouched."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from optuna.distributions import FloatDistribution
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from optuna_ohgw.hypergrad import direct, exact, finite_difference, lean
from optuna_ohgw.lookahead import LookaheadLoss, lookahead_loss, uniform_cross_entropy
from optuna_ohgw.space import SearchSpace

CLASSES, FEATURES = 3, 5
PSI = {"lr": 0.3, "momentum": 0.7, "weight_decay": 0.02, "label_smoothing": 0.15, "magnitude": 0.8}
SPACE = SearchSpace(
    {
        "lr": FloatDistribution(1e-3, 10.0, log=True),
        "momentum": FloatDistribution(0.0, 0.99),
        "weight_decay": FloatDistribution(1e-5, 1.0, log=True),
        "label_smoothing": FloatDistribution(0.0, 0.5),
        "magnitude": FloatDistribution(0.0, 2.0),
    }
)


class Tied(nn.Module):
    """Two layers that share one weight."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(FEATURES, FEATURES)
        self.second = nn.Linear(FEATURES, FEATURES)
        self.second.weight = self.first.weight
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, x):
        return self.head(self.second(torch.tanh(self.first(x))))


def linear():
    return nn.Linear(FEATURES, CLASSES)


def batch_norm():
    return nn.Sequential(
        nn.Linear(FEATURES, 6, bias=False), nn.BatchNorm1d(6), nn.SiLU(), nn.Linear(6, CLASSES)
    )


def half_frozen():
    model = batch_norm()
    model[0].weight.requires_grad_(False)
    return model


def dropout():
    return nn.Sequential(
        nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.SiLU(), nn.Dropout(0.5), nn.Linear(8, CLASSES)
    )


def build(make, dtype=torch.float64):
    torch.manual_seed(0)
    return make().to(dtype)


def batch(position, dtype=torch.float64):
    generator = torch.Generator().manual_seed(position + 100)
    inputs = torch.randn(7, FEATURES, generator=generator, dtype=dtype)
    return inputs, torch.randint(CLASSES, (7,), generator=generator)


def shift(inputs, magnitude):
    return inputs + magnitude * torch.linspace(-1, 1, FEATURES, dtype=inputs.dtype)


def jitter(inputs, magnitude):
    return inputs + magnitude * torch.randn_like(inputs)


def native(**changes):
    return {n: torch.tensor(v, dtype=torch.float64) for n, v in {**PSI, **changes}.items()}


def trainable(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def momentum_buffers(model):
    generator = torch.Generator().manual_seed(9)
    return {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in trainable(model).items()}


def trained_by_sgd(model, horizon, velocity, lr, momentum):
    """Return the validation loss of a copy of the model after real SGD steps."""
    model = copy.deepcopy(model).train()
    parameters = trainable(model)
    optimizer = torch.optim.SGD(
        parameters.values(), lr=lr, momentum=momentum, weight_decay=PSI["weight_decay"]
    )
    for name, parameter in parameters.items():
        if velocity is not None:
            optimizer.state[parameter]["momentum_buffer"] = velocity[name].clone()
    for step in range(horizon):
        inputs, target = batch(step)
        output = model(shift(inputs, PSI["magnitude"]))
        optimizer.zero_grad()
        F.cross_entropy(output, target, label_smoothing=PSI["label_smoothing"]).backward()
        optimizer.step()
    inputs, target = batch(horizon)
    with torch.no_grad():
        return float(F.cross_entropy(model(inputs), target))


@pytest.mark.parametrize("lr_scale", [1.0, 0.25])
@pytest.mark.parametrize("with_velocity", [False, True])
@pytest.mark.parametrize("horizon", [1, 2, 5])
@pytest.mark.parametrize("make", [linear, batch_norm, half_frozen, Tied])
def test_the_steps_are_those_of_sgd(make, horizon, with_velocity, lr_scale):
    model = build(make)
    velocity = momentum_buffers(model) if with_velocity else None
    loss = lookahead_loss(model, batch, horizon=horizon, augment=shift, velocity=velocity, lr_scale=lr_scale)
    lr, momentum = PSI["lr"] * lr_scale, PSI["momentum"]
    if horizon == 1 and velocity is None:
        lr, momentum = lr / (1 - momentum), 0.0
    expected = trained_by_sgd(model, horizon, velocity, lr, momentum)
    # the same float64 operations in nearly the same order; five steps magnify ε by little
    assert float(loss(native())) == pytest.approx(expected, rel=1e-12)


def test_momentum_from_rest_acts_through_its_steady_state_at_horizon_one_only():
    model = build(linear)
    for horizon, velocity, steady in [
        (1, None, True),
        (1, momentum_buffers(model), False),
        (2, None, False),
    ]:
        loss = lookahead_loss(model, batch, horizon=horizon, velocity=velocity)
        assert loss.steady_state is steady
        with_momentum = float(loss(native(lr=0.2, momentum=0.75)))
        longer_step = float(loss(native(lr=0.8, momentum=0.0)))
        assert (with_momentum == pytest.approx(longer_step, rel=1e-13)) is steady


def test_what_psi_does_not_hold_comes_from_fixed_and_psi_goes_first():
    model = build(batch_norm)
    in_psi = lookahead_loss(model, batch, horizon=2, augment=shift)
    in_fixed = lookahead_loss(model, batch, horizon=2, augment=shift, fixed=PSI)
    expected = float(in_psi(native()))
    assert float(in_fixed({})) == expected
    assert float(in_fixed({"lr": torch.tensor(0.3, dtype=torch.float64)})) == expected
    assert float(in_fixed(native(lr=0.1))) == float(in_psi(native(lr=0.1))) != expected
    only_lr = {"lr": torch.tensor(0.3, dtype=torch.float64)}
    nothing = native(momentum=0.0, weight_decay=0.0, label_smoothing=0.0, magnitude=0.0)
    assert float(in_psi(only_lr)) == pytest.approx(float(in_psi(nothing)), rel=1e-14)


def test_the_value_is_the_same_with_and_without_a_graph():
    loss = lookahead_loss(build(dropout), batch, horizon=3, augment=jitter)
    plain = loss(native())
    with_graph = loss({n: v.requires_grad_() for n, v in native().items()})
    with torch.no_grad():
        under_no_grad = loss({n: v.requires_grad_() for n, v in native().items()})
    assert not plain.requires_grad
    assert not under_no_grad.requires_grad
    assert with_graph.requires_grad
    assert float(plain) == float(under_no_grad) == pytest.approx(float(with_graph.detach()), rel=1e-14)


def test_the_value_does_not_depend_on_the_calls_before_it():
    model = build(dropout)
    loss = lookahead_loss(model, batch, horizon=2, augment=jitter)
    first = float(loss(native()))
    other_draw = float(loss.draw(3)(native()))
    loss(native(lr=0.1, magnitude=0.2))
    loss.with_horizon(5)(native())
    exact(loss, SPACE, SPACE.to_search(PSI))
    torch.manual_seed(12345)
    torch.rand(11)
    model.eval()
    assert float(loss(native())) == first
    assert float(loss.draw(0)(native())) == first
    assert float(loss.draw(3)(native())) == other_draw != first


def test_random_numbers_are_common_to_all_psi_and_fresh_in_every_step_and_draw():
    def noise_of(loss, psi):
        seen = []

        def recorded(inputs, magnitude):
            seen.append(torch.randn(4))
            return inputs + magnitude * torch.randn_like(inputs)

        with_recorder = LookaheadLoss(**{**vars(loss), "augment": recorded})
        with_recorder(psi)
        return seen

    loss = lookahead_loss(build(linear), batch, horizon=2)
    first, second = noise_of(loss, native())
    assert not torch.equal(first, second)
    assert all(map(torch.equal, noise_of(loss, native(lr=2.0, magnitude=0.1)), (first, second)))
    assert not any(map(torch.equal, noise_of(loss.draw(1), native()), (first, second)))


@pytest.mark.parametrize(
    "call",
    [
        lambda loss: loss(native()),
        lambda loss: loss({n: v.requires_grad_() for n, v in native().items()}),
        lambda loss: exact(loss, SPACE, SPACE.to_search(PSI)),
        lambda loss: lean(loss, SPACE, SPACE.to_search(PSI)),
        lambda loss: direct(loss, SPACE, SPACE.to_search(PSI)),
        lambda loss: finite_difference(loss, SPACE, SPACE.to_search(PSI)),
    ],
    ids=["value", "value with graph", "exact", "lean", "direct", "finite difference"],
)
def test_a_call_touches_nothing(call):
    model = build(dropout)
    model[1].eval()
    model[4].bias.requires_grad_(False)
    model(batch(50)[0]).sum().backward()
    model[4].weight.grad = None
    velocity = momentum_buffers(model)

    def state():
        named = dict(model.named_parameters())
        return {
            "tensors": {n: t.clone() for n, t in model.state_dict().items()},
            "gradients": {n: None if p.grad is None else p.grad.clone() for n, p in named.items()},
            "identity": {n: (id(p), id(p.grad), p.data_ptr(), p.requires_grad) for n, p in named.items()},
            "buffers": {n: id(b) for n, b in model.named_buffers()},
            "modes": [m.training for m in model.modules()],
            "velocity": {n: v.clone() for n, v in velocity.items()},
            "generator": torch.get_rng_state(),
            "grad mode": torch.is_grad_enabled(),
        }

    before = state()
    loss = lookahead_loss(model, batch, horizon=2, augment=jitter, velocity=velocity)
    call(loss)
    after = state()
    for part in ("tensors", "gradients", "velocity"):
        assert after[part].keys() == before[part].keys()
        for name, value in before[part].items():
            assert (value is None) == (after[part][name] is None)
            assert value is None or torch.equal(value, after[part][name]), (part, name)
    assert torch.equal(after["generator"], before["generator"])
    for part in ("identity", "buffers", "modes", "grad mode"):
        assert after[part] == before[part], part


def test_training_flags_are_restored_when_the_forward_pass_fails():
    class Broken(nn.Linear):
        def forward(self, x):
            raise RuntimeError("no forward pass")

    model = nn.Sequential(Broken(FEATURES, CLASSES), nn.Dropout()).eval()
    model[1].train()
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="no forward pass"):
        lookahead_loss(model, lambda p: batch(p, torch.float32))(native())
    assert [m.training for m in model.modules()] == [False, False, True]
    assert torch.equal(torch.get_rng_state(), state)


def test_batch_norm_uses_the_statistics_of_the_mini_batch_even_in_an_evaluation_model():
    model = build(batch_norm)
    loss = lookahead_loss(model, batch, horizon=2)
    expected = float(loss(native()))
    model[1].running_mean.add_(5.0)
    model[1].running_var.mul_(9.0)
    model.eval()
    assert float(loss(native())) == expected


def test_the_present_weights_are_read_at_every_call():
    model = build(linear)
    loss = lookahead_loss(model, batch)
    before = float(loss(native()))
    with torch.no_grad():
        model.weight.mul_(2.0)
    changed = float(loss(native()))
    assert changed != before
    assert changed == float(lookahead_loss(copy.deepcopy(model), batch)(native()))


def test_frozen_parameters_are_neither_stepped_nor_decayed():
    model = build(half_frozen)
    loss = lookahead_loss(model, batch, horizon=2)
    assert set(loss.params()) == {"1.weight", "1.bias", "3.weight", "3.bias"}
    hidden = []
    model[0].register_forward_hook(lambda m, i, o: hidden.append(m.weight.detach().clone()))
    loss(native(weight_decay=0.5))
    assert len(hidden) == 3
    assert all(torch.equal(w, model[0].weight) for w in hidden)


def test_parts_of_the_loss_see_the_mini_batches_they_should():
    seen = []

    def recorded(position):
        seen.append(position)
        return batch(position)

    loss = lookahead_loss(build(linear), recorded, horizon=3)
    for draw, expected in [(0, [0, 1, 2, 3]), (1, [4, 5, 6, 7]), (5, [20, 21, 22, 23])]:
        seen.clear()
        loss.draw(draw)(native())
        assert seen == expected
    seen.clear()
    loss.with_horizon(1).draw(2)(native())
    assert seen == [4, 5]


def test_only_training_inputs_are_augmented_and_only_held_out_inputs_prepared():
    calls = []

    def augment(inputs, magnitude):
        calls.append(("augment", float(inputs[0, 0]), float(magnitude)))
        return inputs

    def prepare(inputs):
        calls.append(("prepare", float(inputs[0, 0]), None))
        return inputs * 2.0

    model = build(linear)
    loss = lookahead_loss(model, batch, horizon=2, augment=augment, prepare=prepare)
    prepared = float(loss(native()))
    first = [float(batch(p)[0][0, 0]) for p in range(3)]
    assert calls == [("augment", first[0], 0.8), ("augment", first[1], 0.8), ("prepare", first[2], None)]

    def doubled(position):
        inputs, target = batch(position)
        return (inputs * 2.0 if position == 2 else inputs), target

    assert prepared == float(lookahead_loss(model, doubled, horizon=2)(native()))


def test_an_iterable_of_mini_batches_is_repeated_from_its_start():
    model = build(dropout)
    three = [batch(p) for p in range(3)]
    from_list = lookahead_loss(model, three, horizon=4)
    from_iterator = lookahead_loss(model, iter(three), horizon=4)
    from_function = lookahead_loss(model, lambda p: batch(p % 3), horizon=4)
    for draw in (0, 1, 7, 0):
        expected = float(from_function.draw(draw)(native()))
        assert float(from_list.draw(draw)(native())) == expected
        assert float(from_iterator.draw(draw)(native())) == expected


def test_an_iterable_is_read_no_further_than_needed():
    read = []
    endless = (read.append(p) or batch(p) for p in itertools.count())
    loss = lookahead_loss(build(linear), endless, horizon=2)
    assert read == []
    loss(native())
    loss(native())
    assert read == [0, 1, 2]
    loss.draw(1)(native())
    assert read == [0, 1, 2, 3, 4, 5]


def test_a_shuffling_data_loader_leaves_the_random_state_alone():
    inputs, target = batch(0)
    loss = lookahead_loss(build(linear), DataLoader(TensorDataset(inputs, target), 3, shuffle=True))
    state = torch.get_rng_state()
    loss(native())
    assert torch.equal(torch.get_rng_state(), state)


def test_random_transforms_of_a_data_loader_differ_between_mini_batches():
    class Transformed(Dataset):
        def __len__(self):
            return 9

        def __getitem__(self, index):
            return torch.randn(FEATURES, dtype=torch.float64), index % CLASSES

    model, seen = build(linear), []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    loss = lookahead_loss(model, DataLoader(Transformed(), 3))
    state = torch.get_rng_state()
    loss(native())
    assert torch.equal(torch.get_rng_state(), state)
    assert len(seen) == 2
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@torch.no_grad()
def test_label_smoothing_is_that_of_cross_entropy(smoothing):
    model = build(batch_norm)
    loss = lookahead_loss(model, batch)
    inputs, target = batch(2)
    expected = F.cross_entropy(copy.deepcopy(model)(inputs), target, label_smoothing=smoothing)
    smoothed = loss.training_loss(loss.params(), native(label_smoothing=smoothing), 2)
    assert float(smoothed) == pytest.approx(float(expected), rel=1e-14)
    fixed = lookahead_loss(model, batch, fixed={"label_smoothing": smoothing})
    assert float(fixed.training_loss(fixed.params(), {}, 2)) == pytest.approx(float(expected), rel=1e-14)


@torch.no_grad()
def test_the_held_out_loss_is_not_smoothed():
    model = build(batch_norm)
    loss = lookahead_loss(model, batch, fixed={"label_smoothing": 0.4})
    inputs, target = batch(1)
    expected = F.cross_entropy(copy.deepcopy(model)(inputs), target)
    assert float(loss.validation_loss(loss.params())) == pytest.approx(float(expected), rel=1e-14)


def test_uniform_cross_entropy_by_closed_form():
    output = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]], dtype=torch.float64)
    target = torch.tensor([0, 1])
    # rows: log 2, and −½(log ¾ + log ¼)
    expected = (math.log(2.0) - 0.5 * (math.log(0.75) + math.log(0.25))) / 2
    assert float(uniform_cross_entropy(output, target)) == pytest.approx(expected, rel=1e-15)


def test_the_criterion_is_the_one_given():
    def squared(output, target):
        return (output.sum(1) - target).square().mean()

    model = build(linear)
    loss = lookahead_loss(model, batch, squared, fixed={"lr": 0.05})
    twin = copy.deepcopy(model)
    inputs, target = batch(0)
    squared(twin(inputs), target).backward()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter -= 0.05 * parameter.grad
        expected = squared(twin(batch(1)[0]), batch(1)[1])
    assert float(loss({})) == pytest.approx(float(expected), rel=1e-13)


@torch.no_grad()
def test_the_direct_loss_is_the_regularised_training_loss_at_the_present_weights():
    model = build(half_frozen)
    loss = lookahead_loss(model, batch, augment=shift, horizon=3)
    inputs, target = batch(0)
    output = copy.deepcopy(model)(shift(inputs, PSI["magnitude"]))
    squares = sum(float(p.square().sum()) for p in trainable(model).values())
    expected = float(F.cross_entropy(output, target, label_smoothing=PSI["label_smoothing"]))
    expected += 0.5 * PSI["weight_decay"] * squares
    assert float(loss.direct(native())) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize(("horizon", "value", "gradient"), [(1, 4 / 3, 4), (2, 7 / 3, 7), (5, 16 / 3, 16)])
def test_costs_in_mini_batch_units(horizon, value, gradient):
    loss = lookahead_loss(build(linear), batch).with_horizon(horizon)
    assert loss.cost_mbu == pytest.approx(value, rel=1e-15)
    assert loss.exact_cost_mbu == gradient


def test_float64_psi_reaches_float32_weights():
    loss = lookahead_loss(build(batch_norm, torch.float32), lambda p: batch(p, torch.float32), horizon=2)
    psi = {n: v.requires_grad_() for n, v in native().items()}
    value = loss(psi)
    assert value.dtype == torch.float32
    (gradient,) = torch.autograd.grad(value, psi["lr"])
    assert gradient.dtype == torch.float64


@pytest.mark.parametrize("horizon", [0, -2])
def test_a_horizon_below_one_is_refused(horizon):
    with pytest.raises(ValueError, match=f"horizon must be at least 1 but got {horizon}"):
        lookahead_loss(build(linear), batch, horizon=horizon)


def test_an_empty_iterable_is_refused():
    with pytest.raises(ValueError, match="batches is empty but at least one mini-batch is needed"):
        lookahead_loss(build(linear), [])(native())


def test_a_learning_rate_that_nobody_gave_is_refused():
    with pytest.raises(ValueError, match="'lr' is neither in ψ nor in fixed"):
        lookahead_loss(build(linear), batch)({"momentum": torch.tensor(0.5)})
