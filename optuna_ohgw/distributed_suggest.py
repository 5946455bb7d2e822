"""``ohgw_suggest_distributed``: the warm start of a trial that several ranks train."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from optuna import TrialPruned
from optuna.distributions import FloatDistribution
from optuna.trial import BaseTrial

from optuna_ohgw.distributed import RankError, Ranks, distributed_loss, ranks_of
from optuna_ohgw.space import SearchSpace
from optuna_ohgw.suggest import PUBLISHED_RULE, suggest_by
from optuna_ohgw.warmstart import Warmed, WarmStart, warm_start


@dataclass(frozen=True)
class _Order:
    """A warm start that rank 0 begins and the others take part in."""

    distributions: dict[str, FloatDistribution]
    suggested: dict[str, float]
    settings: WarmStart
    seed: int
    frozen: tuple[str, ...]

    def obey(self, loss: Any) -> Warmed:
        if loss is None:
            raise ValueError("loss is None but rank 0 warms; give every rank its loss")
        generator = torch.Generator().manual_seed(self.seed)
        space = SearchSpace(self.distributions)
        return warm_start(loss, space, self.suggested, self.settings, generator, frozen=self.frozen)


def ohgw_suggest_distributed(
    trial: BaseTrial | None,
    space: Mapping[str, FloatDistribution],
    loss: Any = None,
    settings: WarmStart | None = PUBLISHED_RULE,
    *,
    every_rung: bool = False,
    seed: int = 0,
    group: dist.ProcessGroup | None = None,
) -> dict[str, float]:
    """Return the native values to train with, on every rank of a group the same, bit for bit.

    What :func:`ohgw_suggest` does with the mean of the ranks' losses, see :func:`distributed_loss`. All
    ranks call it at the same point. Rank 0 has the trial, and its arguments count; the others give their
    loss. An error on one rank is raised on all: on the others as :class:`RankError` with its message, or
    as ``TrialPruned`` where it was that.

    Args:
        trial: The running trial on rank 0 of the group, None on the others.
        space: Continuous parameters by name.
        loss: This rank's loss: on its part of every mini-batch.
        settings: What to do; None: suggest only and record that.
        every_rung: Warm again at each later call.
        seed: Seed of random controls, which also depend on the trial's position.
        group: The process group; None: the default one.

    Raises:
        RankError: If another rank failed, or the ranks do different things.
        ValueError: If there is no process group, a rank other than 0 has a trial, rank 0 has none, or
            as :func:`ohgw_suggest`.
    """
    ranks = ranks_of(loss, group)
    try:
        with ranks.together():
            shared = None if loss is None else distributed_loss(loss, group)
            if (ranks.rank == 0) != (trial is not None):
                given = "a trial" if trial is not None else "no trial"
                raise ValueError(
                    f"rank {ranks.rank} has {given}; give the trial to rank 0 and None to others"
                )
            if trial is None:
                return _follow(ranks, shared)
            return _lead(ranks, shared, trial, space, settings, every_rung=every_rung, seed=seed)
    except RankError as error:
        if "TrialPruned" in error.kinds:
            raise TrialPruned(str(error)) from error
        raise


def _lead(
    ranks: Ranks,
    loss: Any,
    trial: BaseTrial,
    space: Mapping[str, FloatDistribution],
    settings: WarmStart | None,
    *,
    every_rung: bool,
    seed: int,
) -> dict[str, float]:
    def warm(
        loss: Any,
        space: SearchSpace,
        suggested: Mapping[str, float],
        settings: WarmStart,
        generator: torch.Generator,
        *,
        frozen: Collection[str],
    ) -> Warmed:
        distributions, seed = dict(space.distributions), generator.initial_seed()
        order = _Order(distributions, dict(suggested), settings, seed, tuple(sorted(frozen)))
        ranks.tell(order)
        return order.obey(loss)

    psi = suggest_by(warm, trial, space, loss, settings, every_rung=every_rung, seed=seed)
    ranks.tell(psi)
    return psi


def _follow(ranks: Ranks, loss: Any) -> dict[str, float]:
    told = ranks.hear()
    while isinstance(told, _Order):
        told.obey(loss)
        told = ranks.hear()
    psi: dict[str, float] = told
    return psi
