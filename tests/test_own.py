"""Tasks behind the contract: equal after freezing, untouched by a loss, gradients that are differences."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from optuna_ohgw.cell_study import distributions
from optuna_ohgw.hypergrad import exact, finite_difference, lean
from optuna_ohgw.lookahead import LookaheadLoss
from optuna_ohgw.own import OwnWorkload, copied
from optuna_ohgw.space import SearchSpace
from optuna_ohgw.spec import load_spec
from optuna_ohgw.training import Interrupted
from optuna_ohgw.workloads import workload

STUDIES = Path(__file__).parents[1] / "studies"
SMALL = {
    "uci.yaml": ("task.hidden=8",),
    "xgboost.yaml": ("task.data=wine",),
    "wikitext2.yaml": (),
    "cartpole.yaml": (),
    "imagenet.yaml": ("task.model=resnet10t",),
}
each = pytest.mark.parametrize("file", SMALL)


def made(file: str, *more: str, device: str = "cpu") -> tuple[OwnWorkload, dict[str, float], SearchSpace]:
    """Return a workload of a study's light form, ψ in the middle of its space, and the space."""
    spec = load_spec(STUDIES / file, (*SMALL[file], *more), smoke=True)
    work = workload(spec, 0, spec.task.structure, torch.device(device))
    assert isinstance(work, OwnWorkload)
    space = SearchSpace(distributions(spec))
    return work, {**spec.constants, **space.to_floats((space.low + space.high) / 2)}, space


def never() -> bool:
    return False


@each
def test_same_seed_same_start_and_other_configurations_differ(file: str) -> None:
    work, _, _ = made(file)
    digests = [work.start(seed, index).digest() for seed, index in ((0, 0), (0, 0), (0, 1), (1, 0))]
    orders = [work.order_digest(seed, index) for seed, index in ((0, 0), (0, 0), (0, 1), (1, 0))]
    for found in (digests, orders) if file != "xgboost.yaml" else (orders,):  # no tree yet, wherever
        assert found[0] == found[1]
        assert len(set(found)) == 3


@each
def test_frozen_and_thawed_in_another_process_trains_on_to_the_same_bits(file: str) -> None:
    work, psi, _ = made(file)
    first, _ = work.train(replace(work.start(0, 0), psi=psi), never)
    kept = io.BytesIO()
    torch.save(first.content(), kept)
    straight, loss = work.train(first, never)
    value = work.evaluate(straight, "validation")

    other, _, _ = made(file)
    other.start(0, 7)  # it holds something else
    kept.seek(0)
    thawed, again = other.train(other.restore(torch.load(kept, weights_only=True)), never)
    assert (thawed.digest(), again) == (straight.digest(), loss)
    assert other.evaluate(thawed, "validation") == value
    assert math.isfinite(loss)


@each
def test_a_warm_start_that_moves_nothing_changes_no_bit(file: str) -> None:
    work, psi, space = made(file)
    state = replace(work.start(0, 0), psi=psi)
    plain, loss = work.train(state, never)
    value = work.evaluate(plain, "validation")
    found = work.loss(state, 0, 1)
    found(space.to_native(space.to_search(psi)))
    (lean if isinstance(found, LookaheadLoss) else exact)(found, space, space.to_search(psi))
    again, same = work.train(state, never)
    assert (again.digest(), same) == (plain.digest(), loss)
    assert work.evaluate(again, "validation") == value


@each
def test_a_loss_repeats_itself_and_its_draws_differ(file: str) -> None:
    work, psi, space = made(file)
    loss = work.loss(replace(work.start(0, 0), psi=psi), 0, 1)
    at = space.to_native(space.to_search(psi))
    with torch.no_grad():
        values = [float(loss.draw(k)(at)) for k in (0, 1, 0, 1)]
    assert values[:2] == values[2:]
    assert values[0] != values[1]


@pytest.mark.parametrize("file", ["uci.yaml", "wikitext2.yaml", "cartpole.yaml"])
@pytest.mark.parametrize("horizon", [1, 2])
def test_hyper_gradient_is_the_central_difference(file: str, horizon: int) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        work, psi, space = made(file, *(["task.activation=tanh"] if file == "uci.yaml" else []))
        state, _ = work.train(replace(work.start(0, 0), psi=psi), never)
        loss, z = work.loss(state, 0, horizon), space.to_search(psi)
        found = (lean if isinstance(loss, LookaheadLoss) else exact)(loss, space, z)
        # Differences of dropout are no derivative, and are checked where they are taken.
        smooth = [i for i, n in enumerate(space.names) if found.methods[n] != "finite-difference"]
        wanted = finite_difference(loss, space, z, step_unit=1e-5).gradient
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(smooth) >= 4
    torch.testing.assert_close(found.gradient[smooth], wanted[smooth], rtol=2e-3, atol=1e-7)
    if file == "cartpole.yaml" and horizon == 1:
        named = dict(zip(space.names, found.gradient.tolist(), strict=True))
        assert abs(named["clip"]) < 1e-12
        assert abs(named["value"]) < 1e-12
        assert all(named[name] != 0 for name in ("lr", "entropy", "gamma", "gae_lambda"))


def test_trees_are_told_by_differences_and_more_rounds_cost_more() -> None:
    work, psi, space = made("xgboost.yaml")
    loss = work.loss(replace(work.start(0, 0), psi=psi), 0, 2)
    found = exact(loss, space, space.to_search(psi))
    assert set(found.methods.values()) == {"finite-difference"}
    assert found.cost_mbu == pytest.approx((1 + 2 * len(space.names)) * loss.cost_mbu)
    assert (
        dict(zip(space.names, found.gradient.tolist(), strict=True))["lr"] < 0
    )  # two trees learn too little
    assert loss.with_horizon(5).cost_mbu == pytest.approx(5 + 1 / 3)


def test_flops_of_a_mini_batch_hold_no_evaluation() -> None:
    work, psi, space = made("uci.yaml")
    counted = work.flops(work.start(0, 0), space, None, 1, psi)["batch"]
    sizes = [m.weight.numel() for m in work.own.network.modules() if isinstance(m, torch.nn.Linear)]
    # 2 a weight and row forward, as much for its own gradient and for its inputs', but for the first.
    assert counted == 2 * work.own.batch_size * (3 * sum(sizes) - sizes[0])


def test_flops_of_a_mini_batch_share_the_roll_out_that_they_are_taken_from() -> None:
    few, more = (made("cartpole.yaml", f"task.passes={n}") for n in (2, 16))
    counted = [w.flops(w.start(0, 0), space, None, 1, psi)["batch"] for w, psi, space in (few, more)]
    assert counted[1] < counted[0] < 2 * counted[1]


def test_trees_go_on_from_those_there_are() -> None:
    work, psi, _ = made("xgboost.yaml")
    state = replace(work.start(0, 0), psi=psi)
    for epoch in (1, 2, 3):
        state, _ = work.train(state, never)
        assert work.own.booster.num_boosted_rounds() == 2 * epoch


@each
def test_training_learns_and_beats_what_knows_nothing(file: str) -> None:
    longer = {
        "uci.yaml": ("task.epochs=5", 5, 0.2),
        "xgboost.yaml": ("task.epochs=5", 3, 0.2),
        "wikitext2.yaml": ("task.batches=60", 2, 15.0),
        "cartpole.yaml": ("task.rollouts=6", 3, 5.0),
        "imagenet.yaml": ("task.batches=1", 0, 0.0),  # tests/tasks/test_pictures.py trains it
    }
    change, epochs, margin = longer[file]
    work, psi, _ = made(file, change)
    if not epochs:
        return
    lr = {"uci.yaml": 0.2, "xgboost.yaml": 0.3, "wikitext2.yaml": 1e-2, "cartpole.yaml": 3e-3}[file]
    state = replace(work.start(0, 0), psi={**psi, "lr": lr})
    for _ in range(epochs):
        state, _ = work.train(state, never)
    _, trivial = work.own.trivial()
    found = work.evaluate(state, "validation").metric
    better = trivial - found if work.own.metric.name == "perplexity" else found - trivial
    assert better > margin


def test_stops_between_mini_batches() -> None:
    work, psi, _ = made("uci.yaml")
    state, asked = replace(work.start(0, 0), psi=psi), []

    def stop() -> bool:
        asked.append(1)
        return len(asked) > 3

    with pytest.raises(Interrupted):
        work.train(state, stop)
    assert len(asked) == 4
    plain, _ = made("uci.yaml")[0].train(state, never)  # by one that was not built yet
    assert work.train(state, never)[0].digest() == plain.digest()


def test_state_of_other_things_than_tensors_and_plain_values_is_refused() -> None:
    assert copied({"a": [1, (2.0, None)], 3: torch.ones(2), "b": b"x"})["a"] == [1, (2.0, None)]
    with pytest.raises(TypeError, match="state_dict holds 'set'; give tensors, numbers, texts"):
        copied({"a": {1, 2}})


def test_global_random_streams_go_on_as_if_nothing_was_drawn() -> None:
    import random

    import numpy as np

    work, psi, _ = made("cartpole.yaml")
    torch.manual_seed(5), random.seed(5), np.random.seed(5)  # noqa: NPY002
    wanted = torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002
    torch.manual_seed(5), random.seed(5), np.random.seed(5)  # noqa: NPY002
    state, _ = work.train(replace(work.start(0, 0), psi=psi), never)
    work.evaluate(state, "test")
    work.loss(state, 0, 1)({"lr": torch.tensor(0.01)})
    assert (torch.rand(1), random.random(), np.random.rand()) == wanted  # noqa: NPY002


@pytest.mark.gpu
@each
def test_on_a_gpu_it_trains_from_the_same_start_and_thaws_to_the_same(file: str) -> None:
    (cpu, psi, space), (gpu, _, _) = made(file), made(file, device="cuda")
    assert gpu.start(0, 0).digest() == cpu.start(0, 0).digest()
    assert gpu.order_digest(0, 0) == cpu.order_digest(0, 0)
    state = replace(gpu.start(0, 0), psi=psi)
    loss = gpu.loss(state, 0, 1)
    value = loss(space.to_native(space.to_search(psi)))
    assert math.isfinite(float(value.detach()))
    first, _ = gpu.train(state, never)
    kept = io.BytesIO()
    torch.save(first.content(), kept)
    straight, trained = gpu.train(first, never)
    kept.seek(0)
    thawed, again = gpu.train(gpu.restore(torch.load(kept, weights_only=True, map_location="cpu")), never)
    assert math.isfinite(trained)
    assert again == pytest.approx(trained, rel=1e-2)
    assert thawed.epoch == straight.epoch == 2
