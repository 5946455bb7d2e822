"""Hyperband: configurations begin at different rungs, in shares that do not depend on a study's name."""

from __future__ import annotations

from dataclasses import replace

from optuna_ohgw.schedulers.base import Decision, check_new
from optuna_ohgw.schedulers.promotion import PromotionAsha
from optuna_ohgw.schedulers.stopping import StoppingAsha


def bracket_shares(rungs: int, reduction_factor: int) -> list[float]:
    """Return the share of configurations that begin at each rung, the lowest first.

    With full training as the last of S levels, bracket s of Hyperband starts n = ⌊S/(s + 1)⌋·η^s
    configurations at level S - 1 - s: Li et al. 2018, Algorithm 1, with S in place of B/R and rounded
    down before, not after, η^s is applied.
    """
    count = rungs + 1
    sizes = [count // (s + 1) * reduction_factor**s for s in range(count - 1, -1, -1)]
    return [size / sum(sizes) for size in sizes]


class Brackets:
    """The bracket of each position of a study: position k is the same in every study.

    Each position goes to the bracket that is furthest behind its share, so that any prefix holds the
    shares within one.
    """

    def __init__(self, rungs: int, reduction_factor: int) -> None:
        self._shares = bracket_shares(rungs, reduction_factor)
        self._counts = [0] * len(self._shares)
        self._found: list[int] = []

    def __getitem__(self, position: int) -> int:
        while len(self._found) <= position:
            due = len(self._found) + 1
            behind = [s * due - c for s, c in zip(self._shares, self._counts, strict=True)]
            bracket = max(range(len(behind)), key=lambda k: behind[k])
            self._counts[bracket] += 1
            self._found.append(bracket)
        return self._found[position]


class HyperbandStopping(StoppingAsha):
    """Asynchronous Hyperband over stopping successive halving; the rungs are shared by all brackets.

    Li et al. 2018 with the asynchronous rungs of Li et al. 2020. Arguments as of :class:`StoppingAsha`.
    """

    def __init__(self, max_resource: int, **options: object) -> None:
        super().__init__(max_resource, **options)  # type: ignore[arg-type]
        self._brackets = Brackets(len(self.rungs), self.reduction_factor)

    @property
    def name(self) -> str:
        """Name of the rule in a decision."""
        return f"hyperband, {self.rule}"

    def suggest(self) -> Decision:
        """Return to start a new configuration, in its bracket."""
        bracket = self._brackets[len(self._next)]
        return Decision("start", None, self.name, until=self._until(bracket), bracket=bracket)

    def started(self, config: int) -> None:
        """Take note of a new configuration: its first rung is that of its bracket."""
        check_new(config, self._next)
        self._next[config] = self._brackets[config]

    def _decide(self, config: int, resource: int, value: float) -> Decision:
        return replace(super()._decide(config, resource, value), bracket=self._brackets[config])


class HyperbandPromotion(PromotionAsha):
    """Asynchronous Hyperband over promotion successive halving; the rungs are shared by all brackets.

    Li et al. 2018 with Algorithm 2 of Li et al. 2020. Arguments as of :class:`PromotionAsha`.
    """

    name = "hyperband, promotion"

    def __init__(self, max_resource: int, *, reduction_factor: int = 3, **options: object) -> None:
        super().__init__(max_resource, reduction_factor=reduction_factor, **options)  # type: ignore[arg-type]
        self._brackets = Brackets(len(self.rungs), reduction_factor)

    def suggest(self) -> Decision:
        """Return whom to promote, or to start a new configuration in its bracket."""
        decision = super().suggest()
        if decision.config is not None:
            return replace(decision, bracket=self._brackets[decision.config])
        bracket = self._brackets[len(self._next)]
        return replace(decision, until=self._until(bracket), bracket=bracket)

    def started(self, config: int) -> None:
        """Take note of a new configuration: its first rung is that of its bracket."""
        check_new(config, self._next)
        self._next[config] = self._brackets[config]

    def _decide(self, config: int, resource: int, value: float) -> Decision:
        return replace(super()._decide(config, resource, value), bracket=self._brackets[config])
