"""Hyperband: configurations begin at different rungs, in shares that do not depend on a study's name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from optuna_ohgw.schedulers.base import Decision
from optuna_ohgw.schedulers.promotion import PromotionAsha
from optuna_ohgw.schedulers.stopping import StoppingAsha


def bracket_shares(rungs: int, reduction_factor: int) -> list[float]:
    """Return the share of configurations that begin at each rung, the lowest first.

    Bracket k of Hyperband starts n ∝ S/(S - k)·η^(S - k - 1) configurations at rung k of S (Li et
    al. 2018, Algorithm 1).
    """
    sizes = [rungs / (rungs - k) * reduction_factor ** (rungs - k - 1) for k in range(rungs)]
    return [size / sum(sizes) for size in sizes]


def bracket_of(position: int, shares: Sequence[float]) -> int:
    """Return the bracket of the configuration at a position of a study.

    Each position goes to the bracket that is furthest behind its share, so that any prefix holds the
    shares within one, and every variation with the same seed has the same brackets.
    """
    counts, bracket = [0] * len(shares), 0
    for done in range(position + 1):
        behind = [share * (done + 1) - count for share, count in zip(shares, counts, strict=True)]
        bracket = max(range(len(shares)), key=lambda k: behind[k])
        counts[bracket] += 1
    return bracket


class _Brackets:
    """Brackets by the order in which configurations start, found one after the other."""

    def __init__(self, rungs: int, reduction_factor: int) -> None:
        self._shares = bracket_shares(rungs, reduction_factor)
        self._counts = [0] * rungs

    def peek(self) -> int:
        """Return the bracket of the next configuration."""
        done = sum(self._counts) + 1
        return max(range(len(self._counts)), key=lambda k: self._shares[k] * done - self._counts[k])

    def take(self) -> int:
        """Return the bracket of the next configuration, and go on to the one after."""
        bracket = self.peek()
        self._counts[bracket] += 1
        return bracket


class HyperbandStopping(StoppingAsha):
    """Asynchronous Hyperband over stopping successive halving; the rungs are shared by all brackets.

    Li et al. 2018 with the asynchronous rungs of Li et al. 2020. Arguments as of :class:`StoppingAsha`.
    """

    def __init__(self, max_resource: int, **options: object) -> None:
        super().__init__(max_resource, **options)  # type: ignore[arg-type]
        self._brackets = _Brackets(len(self.rungs), self.reduction_factor)

    @property
    def name(self) -> str:
        """Name of the rule in a decision."""
        return f"hyperband, {self.rule}"

    def suggest(self) -> Decision:
        """Return to start a new configuration, in its bracket."""
        bracket = self._brackets.peek()
        return Decision("start", None, self.name, until=self._until(bracket), bracket=bracket)

    def started(self, config: int) -> None:
        """Take note of a new configuration: its first rung is that of its bracket."""
        self._next[config] = self._brackets.take()


class HyperbandPromotion(PromotionAsha):
    """Asynchronous Hyperband over promotion successive halving; the rungs are shared by all brackets.

    Li et al. 2018 with Algorithm 2 of Li et al. 2020. Arguments as of :class:`PromotionAsha`.
    """

    name = "hyperband, promotion"

    def __init__(self, max_resource: int, *, reduction_factor: int = 3, **options: object) -> None:
        super().__init__(max_resource, reduction_factor=reduction_factor, **options)  # type: ignore[arg-type]
        self._brackets = _Brackets(len(self.rungs), reduction_factor)

    def suggest(self) -> Decision:
        """Return whom to promote, or to start a new configuration in its bracket."""
        decision = super().suggest()
        if decision.action == "resume":
            return decision
        bracket = self._brackets.peek()
        return replace(decision, until=self._until(bracket), bracket=bracket)

    def started(self, config: int) -> None:
        """Take note of a new configuration: its first rung is that of its bracket."""
        self._next[config] = self._brackets.take()
