"""The update rules against ``torch.optim``, and their hyper-gradients against central differences."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from optuna.distributions import FloatDistribution
from torch import nn

from optuna_ohgw.hypergrad import exact, finite_difference, lean
from optuna_ohgw.lookahead import gradient_of, lookahead_loss
from optuna_ohgw.space import SearchSpace
from optuna_ohgw.updates import UPDATES, slots_of

PSI = {
    "lr": 0.03,
    "momentum": 0.8,
    "weight_decay": 0.02,
    "beta1": 0.85,
    "beta2": 0.95,
    "label_smoothing": 0.1,
}
RULES = sorted(UPDATES)
STEPS = 5


def optimizer_of(name, model):
    lr, decay = PSI["lr"], PSI["weight_decay"]
    if name in ("sgd", "nesterov"):
        nesterov = name == "nesterov"
        return torch.optim.SGD(model.parameters(), lr, PSI["momentum"], weight_decay=decay, nesterov=nesterov)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    return kind(model.parameters(), lr, betas=(PSI["beta1"], PSI["beta2"]), weight_decay=decay)


@pytest.fixture
def model():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Dropout(0.0), nn.Linear(7, 4)).double()


def batches(position):
    generator = torch.Generator().manual_seed(position)
    inputs = torch.randn(16, 5, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(4, (16,), generator=generator)


def train(model, optimizer, steps, first=0):
    for position in range(first, first + steps):
        inputs, target = batches(position)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), target, label_smoothing=PSI["label_smoothing"])
        loss.backward()
        optimizer.step()


def space_of(*names):
    known = {
        "lr": FloatDistribution(1e-3, 1.0, log=True),
        "weight_decay": FloatDistribution(1e-4, 1.0, log=True),
        "momentum": FloatDistribution(0.0, 0.99),
        "beta1": FloatDistribution(0.0, 0.99),
        "beta2": FloatDistribution(0.5, 0.999),
        "label_smoothing": FloatDistribution(0.0, 0.5),
        "dropout": FloatDistribution(0.0, 0.9),
        "final": FloatDistribution(0.0, 1.0),
    }
    return SearchSpace({name: known[name] for name in names})


@pytest.mark.parametrize("warm", [0, 2], ids=["rest", "moving"])
@pytest.mark.parametrize("name", RULES)
def test_steps_are_those_of_torch(name, warm, model):
    optimizer = optimizer_of(name, model)
    train(model, optimizer, warm, first=100)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    psi = {n: torch.tensor(v, dtype=torch.float64) for n, v in PSI.items()}
    loss = lookahead_loss(model, batches, update=name, slots=slots_of(optimizer, model), horizon=STEPS)
    slots = loss.begin()
    for step in range(STEPS):
        leaves = {n: w.detach().requires_grad_() for n, w in weights.items()}
        gradients = gradient_of(loss.training_loss(leaves, psi, step), leaves)
        weights, slots = loss.step(weights, gradients, slots, psi, step)
    train(model, optimizer, STEPS)
    for n, p in model.named_parameters():
        torch.testing.assert_close(weights[n], p.detach(), rtol=0, atol=1e-12)
    for slot, named in slots_of(optimizer, model).items():
        for n, value in named.items():
            torch.testing.assert_close(slots[slot][n].double(), value.double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("warm", [0, 3], ids=["rest", "moving"])
@pytest.mark.parametrize("horizon", [1, 3])
@pytest.mark.parametrize("name", RULES)
def test_gradient_is_the_central_difference(name, horizon, warm, model):
    optimizer = optimizer_of(name, model)
    train(model, optimizer, warm, first=100)
    names = ["lr", "label_smoothing", *UPDATES[name].reads]
    loss = lookahead_loss(
        model, batches, update=name, slots=slots_of(optimizer, model), horizon=horizon, fixed=PSI
    )
    space = space_of(*names)
    z = space.to_search({n: PSI[n] for n in names})
    wanted = finite_difference(loss, space, z, step_unit=1e-6)
    for estimator in (lean, exact):
        found = estimator(loss, space, z)
        torch.testing.assert_close(found.gradient, wanted.gradient, rtol=2e-5, atol=2e-8)
        assert found.loss == pytest.approx(wanted.loss, abs=1e-12)
    if name != "sgd":
        assert set(lean(loss, space, z).methods.values()) <= {"lean", "zero"}


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_betas_do_nothing_in_the_first_step_from_rest(name, model):
    space = space_of("lr", "beta1", "beta2")
    loss = lookahead_loss(model, batches, update=name, fixed=PSI)
    gradient = lean(loss, space, space.to_search({n: PSI[n] for n in space.names})).gradient
    assert abs(gradient[0]) > 1e-3
    assert gradient[1:].abs().max() < 1e-7


@pytest.mark.parametrize("estimator", [lean, exact])
def test_a_weight_without_a_gradient_gives_no_nan(estimator):
    model = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(12, 3)).double()

    def tokens(position):
        generator = torch.Generator().manual_seed(position)
        return torch.randint(3, (6, 3), generator=generator), torch.randint(3, (6,), generator=generator)

    space = space_of("lr", "beta1", "beta2", "weight_decay")
    loss = lookahead_loss(model, tokens, update="adamw", horizon=2)
    found = estimator(loss, space, space.to_search({n: PSI[n] for n in space.names}))
    assert torch.isfinite(found.gradient).all()
    assert (found.gradient != 0).all()


def test_dropout_is_set_in_training_alone_and_put_back(model):
    model[2].p = 0.3
    seen = []
    model[2].register_forward_pre_hook(lambda module, _: seen.append(module.p))
    loss = lookahead_loss(model, batches, update="adamw", horizon=2)
    loss({"lr": torch.tensor(0.01), "dropout": torch.tensor(0.6)})
    assert seen == [pytest.approx(0.6), pytest.approx(0.6), 0.0]
    assert model[2].p == 0.3
    space = space_of("lr", "dropout")
    found = lean(loss, space, space.to_search({"lr": 0.01, "dropout": 0.5}))
    assert found.methods == {"lr": "lean", "dropout": "finite-difference"}
    assert found.cost_mbu == pytest.approx(loss.exact_cost_mbu + 2 * loss.cost_mbu)
    assert found.gradient[1] != 0


@dataclasses.dataclass(frozen=True)
class Final:
    """Falls linearly over ten steps to a final share of the rate."""

    reads: tuple[str, ...] = ("final",)

    def __call__(self, psi, step):
        return 1 - (1 - psi["final"]) * (step + 1) / 10


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("horizon", [1, 2])
def test_parameters_of_the_schedule_are_differentiated(name, horizon, model):
    space = space_of("lr", "final")
    loss = lookahead_loss(model, batches, update=name, schedule=Final(), horizon=horizon, fixed=PSI)
    z = space.to_search({"lr": 0.05, "final": 0.4})
    wanted = finite_difference(loss, space, z, step_unit=1e-6)
    torch.testing.assert_close(lean(loss, space, z).gradient, wanted.gradient, rtol=2e-5, atol=1e-8)
    assert wanted.gradient[1] != 0


def test_unknown_update_and_both_states_are_refused(model):
    with pytest.raises(ValueError, match="one of sgd, nesterov, adam, adamw but got 'lion'"):
        lookahead_loss(model, batches, update="lion")
    with pytest.raises(ValueError, match="both given"):
        lookahead_loss(model, batches, velocity={}, slots={"momentum_buffer": {}})
