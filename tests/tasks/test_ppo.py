"""PPO's parts against their definitions."""

from __future__ import annotations

import pytest
import torch

from optuna_ohgw.errors import UserError
from optuna_ohgw.tasks.environments import make_environments, shape_of
from optuna_ohgw.tasks.ppo import Ppo, RollOut, advantages, surrogate

PSI = {"lr": 1e-3, "entropy": 0.01, "value": 0.5, "clip": 0.2, "gae_lambda": 0.95, "gamma": 0.99}


def roll_of(rewards, ends, bootstrap, values, last):
    as_column = [torch.tensor(x, dtype=torch.float64)[:, None] for x in (rewards, ends, bootstrap, values)]
    steps = len(rewards)
    zeros = torch.zeros(steps, 1, dtype=torch.float64)
    return RollOut(
        zeros[..., None], zeros.long(), *as_column[:3], zeros, as_column[3], torch.tensor([last]).double(), []
    )


def by_definition(roll, gamma, lam):
    """The sum of discounted TD errors up to the end of the episode, term by term."""
    rewards, ends, boot, values = (
        x[:, 0].tolist() for x in (roll.rewards, roll.ends, roll.bootstrap, roll.values)
    )
    following = [*values[1:], float(roll.last)]
    found = []
    for t in range(len(rewards)):
        total = 0.0
        for k in range(t, len(rewards)):
            delta = rewards[k] + gamma * (boot[k] + (1 - ends[k]) * following[k]) - values[k]
            total += (gamma * lam) ** (k - t) * delta
            if ends[k]:
                break
        found.append(total)
    return found


def test_advantages_are_their_definition_and_differentiable():
    roll = roll_of([1.0, 2, 0.5, -1, 3], [0, 1, 0, 1, 0], [0, 0, 0, 0.7, 0], [0.3, -0.2, 0.9, 0.1, 0.4], 0.6)
    gamma, lam = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.9, 0.8))
    found, target = advantages(roll, gamma, lam)
    wanted = torch.tensor(by_definition(roll, 0.9, 0.8), dtype=torch.float64)
    torch.testing.assert_close(found[:, 0].detach(), wanted)
    torch.testing.assert_close(target, found + roll.values)
    slopes = torch.autograd.grad(found[0, 0], (gamma, lam))
    h = 1e-6
    for slope, up, down in zip(
        slopes, ((0.9 + h, 0.8), (0.9, 0.8 + h)), ((0.9 - h, 0.8), (0.9, 0.8 - h)), strict=True
    ):
        difference = (by_definition(roll, *up)[0] - by_definition(roll, *down)[0]) / (2 * h)
        assert float(slope) == pytest.approx(difference, rel=1e-6)


def test_the_clip_cuts_what_gains_and_nothing_else():
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    chance = torch.log(torch.tensor([[0.5], [0.5]], dtype=torch.float64))
    roll = RollOut(*[torch.zeros(2, 1)] * 7, torch.zeros(1), [])._replace(
        actions=torch.zeros(2, 1, dtype=torch.int64), log_chances=chance
    )
    advantage = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    rows = torch.arange(2)
    ratio = torch.softmax(logits, 1)[:, 0] / 0.5
    own = advantage[:, 0] / advantage[:, 0].std()
    free = -(own * ratio).mean()
    torch.testing.assert_close(surrogate(logits, roll, rows, advantage, None), free)
    cut = ratio.clamp(0.9, 1.1)
    clipped = -torch.minimum(own * ratio, own * cut).mean()
    torch.testing.assert_close(surrogate(logits, roll, rows, advantage, torch.tensor(0.1).double()), clipped)
    assert clipped > free


@pytest.fixture
def task():
    made = Ppo(
        seed=0,
        device=torch.device("cpu"),
        epochs=2,
        environment="CartPole-v1",
        environments=3,
        steps=40,
        episodes=7,
    )
    made.build(0)
    return made


def test_returns_of_cartpole_are_the_lengths_of_its_episodes(task):
    torch.manual_seed(0)
    roll, _ = task.roll_out(task._reset(1), 200)
    assert len(roll.returns) > 3
    for column in range(3):
        ends = torch.nonzero(roll.ends[:, column])[:, 0].tolist()
        lengths = [b - a for a, b in zip([-1, *ends], ends, strict=False)]
        for length in lengths:
            assert float(length) in roll.returns
    assert sum(roll.returns) == sum(
        (torch.nonzero(roll.ends[:, c])[-1, 0] + 1).item() for c in range(3) if roll.ends[:, c].any()
    )


def test_plays_as_many_episodes_as_asked_and_repeats_them(task):
    first = task.play(3)
    assert len(first) == 7
    assert task.play(3) == first != task.play(4)


def test_unknown_environments_and_other_actions_are_refused():
    with pytest.raises(UserError, match=r"task\.environment: 'Nothing-v0' cannot be made"):
        make_environments("Nothing-v0", 2, None)
    with pytest.raises(UserError, match=r"'nowhere:It-v0' cannot be made \(No module named 'nowhere'"):
        make_environments("nowhere:It-v0", 2, None)
    with pytest.raises(UserError, match=r"'Pendulum-v1' has observations .* one choice to make"):
        shape_of(make_environments("Pendulum-v1", 1, None), "Pendulum-v1")
    with pytest.raises(ValueError, match="do not fill 9"):
        Ppo(
            seed=0,
            device=torch.device("cpu"),
            epochs=1,
            environment="CartPole-v1",
            environments=2,
            steps=4,
            minibatches=9,
        )


def test_pong_is_seen_as_four_frames_of_84_pixels():
    environments = make_environments("ALE/Pong-v5", 2, 30)
    assert shape_of(environments, "ALE/Pong-v5") == ((4, 84, 84), 6)
    seen, _ = environments.reset(seed=[1, 2])
    assert seen.shape == (2, 4, 84, 84)
    assert 0 <= seen.min() < seen.max() <= 1


def test_what_ataris_pictures_need_is_told_with_its_extra(monkeypatch):
    import gymnasium

    def without(*args, **options):
        raise gymnasium.error.DependencyNotInstalled("opencv-python package not installed")

    monkeypatch.setattr(gymnasium.wrappers, "AtariPreprocessing", without)
    with pytest.raises(UserError, match=r"opencv-python .*; pip install 'optuna-ohgw\[rl\]'"):
        make_environments("ALE/Pong-v5", 1, None)
