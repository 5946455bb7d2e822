"""Reinforcement learning: proximal policy optimisation (Schulman et al. 2017), one file."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from optuna_ohgw.lookahead import gradient_of
from optuna_ohgw.metric import MEAN_RETURN
from optuna_ohgw.seeds import Purpose, derive_seed
from optuna_ohgw.tasks.environments import make_environments, shape_of
from optuna_ohgw.updates import UPDATES, Slots, load_slots, slots_of

_GAMMA, _LAMBDA = 0.99, 0.95  # of the outer loss, which no ψ may change
_MOST_NORM = 0.5
_TEST_SEED = 1_000_003


class RollOut(NamedTuple):
    """What a policy met in ``T`` steps of ``N`` environments.

    ``rewards``, ``ends`` (1 where an episode ended), ``bootstrap`` (the value of the last observation of
    one that was cut off, else 0), ``log_chances`` and ``values`` are ``[T, N]``, ``last`` ``[N]``.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    ends: Tensor
    bootstrap: Tensor
    log_chances: Tensor
    values: Tensor
    last: Tensor
    returns: list[float]


def advantages(roll: RollOut, gamma: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    """Return generalised advantages (Schulman et al. 2016) and value targets ``[T, N]``, differentiable."""
    following = torch.cat([roll.values[1:], roll.last[None]])
    alive = 1 - roll.ends
    delta = roll.rewards + gamma * (roll.bootstrap + alive * following) - roll.values
    found, sums = torch.zeros_like(roll.last), []
    for t in reversed(range(len(delta))):
        found = delta[t] + gamma * lam * alive[t] * found
        sums.append(found)
    advantage = torch.stack(sums[::-1])
    return advantage, advantage + roll.values


class Policy(nn.Module):
    """Observations ↦ logits of the actions and values; pictures are read by one network for both."""

    def __init__(self, shape: tuple[int, ...], actions: int, hidden: int) -> None:
        super().__init__()
        if len(shape) == 3:
            self.body = nn.Sequential(
                *(nn.Conv2d(shape[0], 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU()),
                *(nn.Conv2d(64, 64, 3, 1), nn.ReLU(), nn.Flatten(), nn.LazyLinear(hidden), nn.ReLU()),
            )
            self.body(torch.zeros(1, *shape))
        else:
            self.body, self.other = _perceptron(shape, hidden), _perceptron(shape, hidden)
        self.act, self.value = nn.Linear(hidden, actions), nn.Linear(hidden, 1)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                # Not orthogonal: that depends on the number of threads in its last bits.
                nn.init.normal_(module.weight, std=math.sqrt(2 / module.weight[0].numel()))
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        nn.init.normal_(self.act.weight, std=0.01 / math.sqrt(hidden))
        nn.init.normal_(self.value.weight, std=1 / math.sqrt(hidden))

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits ``[B, A]`` and values ``[B]``."""
        known = self.body(observations)
        judged = self.other(observations) if hasattr(self, "other") else known
        logits: Tensor = self.act(known)
        return logits, self.value(judged).squeeze(-1)


def _perceptron(shape: tuple[int, ...], hidden: int) -> nn.Sequential:
    read = nn.Flatten(), nn.Linear(math.prod(shape), hidden), nn.Tanh()
    return nn.Sequential(*read, nn.Linear(hidden, hidden), nn.Tanh())


def surrogate(logits: Tensor, roll: RollOut, rows: Tensor, advantage: Tensor, clip: Tensor | None) -> Tensor:
    """Return the policy's loss on some transitions; ``clip`` None: the unclipped one."""
    chosen = torch.log_softmax(logits, 1).gather(1, roll.actions.flatten()[rows, None]).squeeze(1)
    ratio = (chosen - roll.log_chances.flatten()[rows]).exp()
    own = advantage.flatten()[rows]
    own = (own - own.mean()) / (own.std() + 1e-8)
    if clip is None:
        return -(own * ratio).mean()
    cut = torch.minimum(torch.maximum(ratio, 1 - clip), 1 + clip)
    return -torch.minimum(own * ratio, own * cut).mean()


def ppo_loss(
    network: nn.Module, params: Mapping[str, Tensor], roll: RollOut, rows: Tensor, psi: Mapping[str, Tensor]
) -> Tensor:
    """Return PPO's loss on a mini-batch of transitions, differentiable in weights and ψ."""
    observations = roll.observations.flatten(0, 1)[rows]
    logits, values = functional_call(network, dict(params), (observations,))
    advantage, target = advantages(roll, psi["gamma"], psi["gae_lambda"])
    chances = torch.log_softmax(logits, 1)
    entropy = -(chances.exp() * chances).sum(1).mean()
    error = 0.5 * (values - target.flatten()[rows]).square().mean()
    loss: Tensor = surrogate(logits, roll, rows, advantage, psi["clip"])
    whole: Tensor = loss + psi["value"] * error - psi["entropy"] * entropy
    return whole


class Ppo:
    """PPO with Adam; see ``tasks.contract`` and, for the options, ``PpoSpec``.

    An epoch begins with new episodes and takes ``rollouts`` times ``steps`` steps in each of
    ``environments``, each roll-out trained on for ``passes`` passes of ``minibatches``. The metric on
    validation is the mean return of the last ``episodes`` training episodes that ended, on test that of as
    many new ones.
    """

    metric = MEAN_RETURN
    hyperparameters = {"lr": (0.0, 1.0)}  # noqa: RUF012 - a study's are those of PpoSpec
    stop: Callable[[], None] = staticmethod(lambda: None)

    def __init__(
        self,
        *,
        seed: int,
        device: torch.device,
        epochs: int,
        environment: str,
        environments: int = 8,
        steps: int = 128,
        rollouts: int = 1,
        minibatches: int = 4,
        passes: int = 4,
        hidden: int = 64,
        episodes: int = 20,
        episode_steps: int | None = None,
    ) -> None:
        if environments * steps < 2 * minibatches:
            raise ValueError(
                f"task.minibatches: {environments} x {steps} transitions do not fill {minibatches}; "
                "give fewer mini-batches"
            )
        self.device, self.seed, self.name, self.count = device, seed, environment, environments
        self.steps, self.rollouts, self.minibatches, self.passes = steps, rollouts, minibatches, passes
        self.hidden, self.episodes = hidden, episodes
        self.batches_per_epoch = rollouts * passes * minibatches
        self.counted_batches = passes * minibatches  # those that share a roll-out
        self.environments = make_environments(environment, environments, episode_steps)
        self.shape, self.actions = shape_of(self.environments, environment)
        self.recent = deque[float](maxlen=episodes)

    def build(self, seed: int) -> None:
        """Begin with new weights."""
        self.network: nn.Module = Policy(self.shape, self.actions, self.hidden).to(self.device)
        self.optimizer = self._optimizer()
        self.recent = deque[float](maxlen=self.episodes)

    def train(self, psi: Mapping[str, float], epoch: int, seed: int, batches: int | None = None) -> float:
        """Train an epoch; return the mean loss."""
        native = self._tensors(psi)
        self.optimizer.param_groups[0]["lr"] = psi["lr"]
        left, losses = batches or self.batches_per_epoch, list[Tensor]()
        observations = self._reset(seed)
        generator = torch.Generator().manual_seed(seed)
        while left > 0:
            roll, observations = self.roll_out(observations, self.steps)
            self.recent.extend(roll.returns)
            for _ in range(self.passes):
                for rows in self._rows(generator)[: max(0, left)]:
                    self.stop()
                    named = dict(self.network.named_parameters())
                    loss = ppo_loss(self.network, named, roll, rows, native)
                    self.optimizer.zero_grad()
                    loss.backward()  # type: ignore[no-untyped-call]
                    nn.utils.clip_grad_norm_(self.network.parameters(), _MOST_NORM)
                    self.optimizer.step()
                    losses.append(loss.detach())
                    left -= 1
        return float(torch.stack(losses).mean())

    def evaluate(self, part: str) -> tuple[float, float]:
        """Return the mean return, and its negative as the loss."""
        values = list(self.recent)
        if part == "test" or not values:
            values = self.play(_TEST_SEED if part == "test" else self.seed)
        return float(np.mean(values)), -float(np.mean(values))

    def loss(self, psi: Mapping[str, float], epoch: int, seed: int, horizon: int) -> PpoLoss:
        """Return the look-ahead loss on fresh roll-outs."""
        return PpoLoss(self, psi, slots_of(self.optimizer, self.network), seed, horizon)

    def trivial(self) -> tuple[str, float]:
        """Return the mean return of actions drawn at random."""
        return "random policy", float(np.mean(self.play(self.seed, at_random=True)))

    def state_dict(self) -> dict[str, Any]:
        """Return weights, what Adam keeps, and the last returns."""
        slots = slots_of(self.optimizer, self.network)
        return {"network": self.network.state_dict(), "optimizer": slots, "recent": list(self.recent)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over weights, what Adam keeps, and the last returns."""
        self.network.load_state_dict(state["network"])
        self.optimizer = self._optimizer()
        load_slots(self.optimizer, self.network, state["optimizer"])
        self.recent = deque(state["recent"], maxlen=self.episodes)

    @torch.no_grad()
    def roll_out(self, observations: Any, steps: int) -> tuple[RollOut, Any]:
        """Return what the policy meets from some observations on, and the last observations."""
        kept: dict[str, list[Tensor]] = {f: [] for f in RollOut._fields[:7]}
        returns = list[float]()
        for _ in range(steps):
            seen = self._seen(observations)
            logits, value = self.network(seen)
            action = torch.multinomial(logits.softmax(1), 1).squeeze(1)
            step = self.environments.step(action.cpu().numpy())
            observations, reward, terminated, truncated, info = step
            bootstrap = torch.zeros_like(value)
            self._scores += reward
            for i in np.flatnonzero(terminated | truncated):
                returns.append(float(self._scores[i]))
                self._scores[i] = 0.0
                if truncated[i] and not terminated[i]:
                    bootstrap[i] = self.network(self._seen(info["final_obs"][i][None]))[1]
            row = seen, action, reward, terminated | truncated, bootstrap
            chance = logits.log_softmax(1).gather(1, action[:, None]).squeeze(1)
            for name, found in zip(kept, (*row, chance, value), strict=True):
                kept[name].append(torch.as_tensor(found, device=self.device))
        stacked = {name: torch.stack(rows) for name, rows in kept.items()}
        for name in ("rewards", "ends"):
            stacked[name] = stacked[name].to(value.dtype)
        return RollOut(
            **stacked, last=self.network(self._seen(observations))[1], returns=returns
        ), observations

    @torch.no_grad()
    def play(self, seed: int, *, at_random: bool = False) -> list[float]:
        """Return the returns of ``episodes`` new episodes: those that begin first, however long."""
        own = torch.Generator().manual_seed(seed)
        observations, found = self._reset(seed), list[float]()
        wanted = [len(range(i, self.episodes, self.count)) for i in range(self.count)]
        while any(wanted):
            self.stop()
            logits = torch.zeros(self.count, self.actions)
            if not at_random:
                logits = self.network(self._seen(observations))[0].cpu()
            action = torch.multinomial(logits.softmax(1), 1, generator=own).squeeze(1)
            observations, reward, terminated, truncated, _ = self.environments.step(action.numpy())
            self._scores += reward
            for i in np.flatnonzero(terminated | truncated):
                if wanted[i]:
                    found.append(float(self._scores[i]))
                    wanted[i] -= 1
                self._scores[i] = 0.0
        return found

    def _reset(self, seed: int) -> Any:
        seeds = [derive_seed(seed, Purpose.ORDER, i) % 2**31 for i in range(self.count)]
        self._scores = np.zeros(self.count)
        return self.environments.reset(seed=seeds)[0]

    def _seen(self, observations: Any) -> Tensor:
        return torch.as_tensor(np.asarray(observations), device=self.device).to(torch.get_default_dtype())

    def _rows(self, generator: torch.Generator) -> list[Tensor]:
        order = torch.randperm(self.steps * self.count, generator=generator).to(self.device)
        return list(order.tensor_split(self.minibatches))

    def _tensors(self, psi: Mapping[str, float]) -> dict[str, Tensor]:
        dtype = torch.get_default_dtype()
        return {n: torch.tensor(float(v), dtype=dtype, device=self.device) for n, v in psi.items()}

    def _optimizer(self) -> torch.optim.Adam:
        return torch.optim.Adam(self.network.parameters(), lr=0.0, eps=1e-5)


@dataclass(frozen=True)
class PpoLoss:
    """The unclipped surrogate on a fresh roll-out, after ``horizon`` steps of Adam on PPO's loss.

    Both roll-outs are by the present policy. The outer loss holds γ = 0.99 and λ = 0.95 whatever ψ is, and
    neither value error nor entropy. Zero by construction: at horizon 1 the clip range, since the ratio is
    1 before the first step; the value coefficient, unless the networks are one (Atari). Gradients are not
    clipped by their norm here, and training clips them.

    Cost: K + 1/3 mbu an evaluation, 3K + 1 with its gradient; its two roll-outs are forward passes,
    a third of ``minibatches`` mbu each, beside their steps in the environments, which only seconds show.
    """

    task: Ppo
    psi: Mapping[str, float]
    slots: Slots
    seed: int
    horizon: int
    _rolls: list[tuple[RollOut, RollOut]] = field(default_factory=list)

    @property
    def cost_mbu(self) -> float:
        """Cost of an evaluation."""
        return self.horizon + 1 / 3

    @property
    def exact_cost_mbu(self) -> float:
        """Cost of the value with its gradient, and of the roll-outs."""
        return 3.0 * self.horizon + 1 + 2 * self.task.minibatches / 3

    def draw(self, position: int) -> PpoLoss:
        """Return the same on fresh roll-outs."""
        return replace(self, seed=derive_seed(self.seed, Purpose.WARM_START, position), _rolls=[])

    def with_horizon(self, horizon: int) -> PpoLoss:
        """Return the same after another number of steps."""
        return replace(self, horizon=horizon)

    def __call__(self, psi: Mapping[str, Tensor]) -> Tensor:
        """Return the loss at ψ, a scalar."""
        inner, outer = self._collected()
        task, dtype = self.task, torch.get_default_dtype()
        native = {**task._tensors(self.psi), **{n: v.to(task.device, dtype) for n, v in psi.items()}}
        differentiable = torch.is_grad_enabled() and any(v.requires_grad for v in native.values())
        weights = {n: p.detach().requires_grad_() for n, p in task.network.named_parameters()}
        betas = {"beta1": torch.tensor(0.9), "beta2": torch.tensor(0.999), "weight_decay": torch.tensor(0.0)}
        known = {n: v.to(task.device, dtype) for n, v in betas.items()}
        update, slots = replace(UPDATES["adam"], eps=1e-5), self.slots  # type: ignore[type-var]
        rows = task._rows(torch.Generator().manual_seed(self.seed))
        for step in range(self.horizon):
            with torch.enable_grad():
                loss = ppo_loss(task.network, weights, inner, rows[step % len(rows)], native)
                gradients = gradient_of(loss, weights, create_graph=differentiable)
                weights, slots = update(weights, gradients, slots, known, native["lr"])
            if not differentiable:
                weights = {n: w.detach().requires_grad_() for n, w in weights.items()}
        gamma, lam = (torch.tensor(v, dtype=dtype, device=task.device) for v in (_GAMMA, _LAMBDA))
        every = torch.arange(outer.actions.numel(), device=task.device)
        logits, _ = functional_call(task.network, weights, (outer.observations.flatten(0, 1),))
        return surrogate(logits, outer, every, advantages(outer, gamma, lam)[0], None)

    def _collected(self) -> tuple[RollOut, RollOut]:
        if not self._rolls:
            task = self.task
            with torch.random.fork_rng(devices=[task.device] if task.device.type == "cuda" else []):
                torch.manual_seed(self.seed)
                inner, observations = task.roll_out(task._reset(self.seed), task.steps)
                outer, _ = task.roll_out(observations, task.steps)
            self._rolls.append((inner, outer))
        return self._rolls[0]
