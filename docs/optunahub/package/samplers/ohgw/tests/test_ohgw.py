"""The warm start against its closed form: the package is loaded as the hub loads it."""

from pathlib import Path

import optuna
import optunahub
import pytest
import torch
from optuna.distributions import FloatDistribution
from optuna.samplers import RandomSampler

ohgw = optunahub.load_local_module("samplers/ohgw", registry_root=str(Path(__file__).parents[3]))
SPACE = {"lr": FloatDistribution(1e-4, 1.0, log=True)}


def loss(psi):
    return (torch.log10(psi["lr"]) + 1) ** 2


@pytest.mark.parametrize("seed", range(3))
def test_the_recorded_value_is_the_suggestion_moved_against_its_gradient(seed):
    drawn = RandomSampler(seed=seed)
    plain = optuna.create_study(sampler=drawn).ask(SPACE).params["lr"]
    trial = optuna.create_study(sampler=ohgw.OhgwSampler(RandomSampler(seed=seed))).ask()
    psi = ohgw.ohgw_suggest(trial, SPACE, loss, ohgw.WarmStart(rule="raw", eta_h=0.1))
    z = torch.log10(torch.tensor(plain, dtype=torch.float64))
    expected = float(10 ** (z - 0.1 * 2 * (z + 1)))
    assert trial.user_attrs["ohgw"][0]["suggested"]["lr"] == plain
    assert psi == trial.params == {"lr": pytest.approx(min(max(expected, 1e-4), 1.0), rel=1e-5)}


def test_without_a_warm_start_it_is_its_base_sampler():
    own, base = (
        optuna.create_study(sampler=s)
        for s in (ohgw.OhgwSampler(RandomSampler(seed=0)), RandomSampler(seed=0))
    )
    assert [own.ask(SPACE).params for _ in range(5)] == [base.ask(SPACE).params for _ in range(5)]
