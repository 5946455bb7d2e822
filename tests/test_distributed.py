"""Two ranks on half a mini-batch each, against one process on the whole."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import distributed_jobs as jobs
import pytest
import torch
from optuna.distributions import FloatDistribution
from torch import multiprocessing, nn

from optuna_ohgw import distributed_loss, lookahead_loss, ohgw_suggest_distributed

PAGE = Path(__file__).parents[1] / "docs/library.md"
# Halves add up in another order than the whole: a few roundings of float64 through a few products.
ROUNDING = {"rtol": 1e-11, "atol": 1e-13}
# Differences of two losses near 1, over a step of a twentieth of the range: 2^-52 / 0.05, in a few sums.
DIFFERENCE = {"rtol": 1e-9, "atol": 1e-12}


pytestmark = pytest.mark.slow  # two processes that import torch


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    shown = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    example = "\n".join([*shown[:2], *(block for block in shown if "init_process_group" in block)])
    multiprocessing.spawn(jobs.main, (folder, example, jobs.free_port()), nprocs=jobs.RANKS)
    return [torch.load(folder / f"rank-{r}.pt", weights_only=False) for r in range(jobs.RANKS)]


def same(found: Any, wanted: Any) -> None:
    (loss, gradient, methods, cost), (whole_loss, whole, whole_methods, whole_cost) = found, wanted
    torch.testing.assert_close(loss, whole_loss, **ROUNDING)
    assert methods == whole_methods
    assert cost == whole_cost
    coarse = "finite-difference" in methods.values()
    torch.testing.assert_close(gradient, whole, **(DIFFERENCE if coarse else ROUNDING))


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    return jobs.gradients()


@pytest.mark.parametrize("estimator", list(jobs.ESTIMATORS))
@pytest.mark.parametrize("loss", list(jobs.LOSSES))
def test_every_estimator_gives_what_one_process_gives_on_the_whole(ranks, whole, loss, estimator) -> None:
    label = f"{loss} {estimator}"
    for rank in ranks:
        same(rank["gradients"][label], whole[label])
    assert torch.equal(*(rank["gradients"][label][1] for rank in ranks))
    assert whole[label][1].abs().max() > 1e-3


def test_a_half_alone_gives_something_else(whole) -> None:
    half = jobs.lookahead_loss(jobs.network(), jobs.batches(0), augment=jobs.augment)
    z = jobs.SPACE.to_search(jobs.PSI)
    gradient = jobs.ESTIMATORS["lean"](half, jobs.SPACE, z).gradient
    assert float((gradient - whole["1-at rest lean"][1]).abs().max()) > 1e-2


def test_every_rule_moves_as_one_process_does(ranks) -> None:
    for label, (psi, record) in jobs.warmed().items():
        for rank in ranks:
            found, account = rank["warmed"][label]
            assert found == pytest.approx(psi, rel=1e-9), label
            for field in ("cost_mbu", "cost_uncharged_mbu", "methods", "at_bound", "reason"):
                assert account[field] == record[field], label
            assert account["snr"] == (record["snr"] and pytest.approx(record["snr"], rel=1e-5))
        assert psi != record["suggested"]
        assert ranks[0]["warmed"][label][0] == ranks[1]["warmed"][label][0]


def test_any_loss_is_averaged_and_what_has_no_gradient_stays_without(ranks) -> None:
    wanted = jobs.plain()
    assert wanted["exact"][2]["momentum"] == "finite-difference"
    assert wanted["exact"][2]["weight_decay"] == "exact"
    for name, result in wanted.items():
        for rank in ranks:
            same(rank["plain"][name], result)


def test_all_ranks_get_the_same_psi_and_rank_0_has_the_trial(ranks) -> None:
    wanted = jobs.suggested()
    for label, trials in wanted.items():
        first, second = (rank["suggested"][label] for rank in ranks)
        assert [psi for psi, _ in first] == [psi for psi, _ in second]
        assert all(params is None for _, params in second)
        for (psi, params), (whole_psi, whole_params) in zip(first, trials, strict=True):
            assert psi == pytest.approx(whole_psi, rel=1e-9)
            assert params == pytest.approx(whole_params, rel=1e-9)
        assert first[0][0] != first[1][0]  # the second rung warms again
        assert first[2][0] != first[3][0]
        assert first[4][0] == first[5][0]  # without settings nothing does


FAILURES = {
    "reading": (1, "KeyError: 'no such shard'"),
    "differentiating": (1, "MemoryError: no room for a gradient"),
    "sampling": (0, "OSError: the sampler's disk is full"),
    "no trial": (0, "ValueError: rank 0 has no trial; give the trial to rank 0 and None to others"),
    "two trials": (1, "ValueError: rank 1 has a trial; give the trial to rank 0 and None to others"),
    "no loss on rank 1": (1, "ValueError: loss is None but rank 0 warms; give every rank its loss"),
}


@pytest.mark.parametrize("what", list(FAILURES))
def test_an_error_on_one_rank_reaches_the_others_with_its_message(ranks, what) -> None:
    failed, message = FAILURES[what]
    assert ranks[failed]["failures"][what] == message
    assert ranks[1 - failed]["failures"][what] == f"RankError: rank {failed} failed with {message}"


def test_it_does_so_wherever_the_other_waits(ranks) -> None:
    reached = 0
    for case, own in ranks[0]["anywhere"].items():
        failing, n = map(int, case.split())
        said = [own, ranks[1]["anywhere"][case]]
        if said == ["nothing", "nothing"]:  # it was over before
            continue
        reached += 1
        assert said[failing] == f"OSError: gone at {n}"
        assert said[1 - failing] == f"RankError: rank {failing} failed with OSError: gone at {n}"
    assert reached == 2 * 3 * (1 + 3)  # two steps and a held-out mini-batch, at a gradient and three points


def test_a_trial_pruned_on_one_rank_is_pruned_on_all(ranks) -> None:
    assert ranks[0]["failures"]["pruning"] == "TrialPruned: out of memory"
    assert ranks[1]["failures"]["pruning"].startswith("TrialPruned: rank 0 failed with TrialPruned")


def test_ranks_that_do_different_things_are_told(ranks) -> None:
    for rank in ranks:
        assert rank["failures"]["other models"].startswith("RankError: the ranks do different things")


def test_ranks_augment_differently_and_repeat_themselves(ranks) -> None:
    mean, again, alone = ranks[0]["noise"]
    assert mean == again == ranks[1]["noise"][0]
    assert abs(mean - alone) > 1e-4


def test_a_look_ahead_step_is_a_step_of_distributed_data_parallel(ranks) -> None:
    for rank in ranks:
        assert rank["trained"]["predicted"] == pytest.approx(rank["trained"]["reached"], rel=1e-12)


def test_the_example_of_the_page_trains_on_two_ranks(ranks) -> None:
    trials = ranks[0]["documented"]["trials"]
    assert [state for state, _ in trials] == ["COMPLETE"] * 3
    assert all(params.keys() == {"width", "lr", "weight_decay"} for _, params in trials)
    assert ranks[1]["documented"]["trials"] is None


def test_a_model_that_exchanges_by_itself_is_refused(ranks) -> None:
    message = "ValueError: the model has SyncBatchNorm, which is not supported; use BatchNorm"
    assert ranks[0]["failures"]["synchronised"] == ranks[1]["failures"]["synchronised"] == message


def test_without_a_process_group_it_says_what_to_do() -> None:
    loss = lookahead_loss(nn.Linear(2, 2), [])
    with pytest.raises(ValueError, match="init_process_group"):
        distributed_loss(loss)
    with pytest.raises(ValueError, match="init_process_group"):
        ohgw_suggest_distributed(None, {"lr": FloatDistribution(0.1, 1.0)}, loss)
