"""The value that a study is judged by: its name, which way is better, and what no value counts as."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd
    from optuna.study import StudyDirection


@dataclass(frozen=True)
class Metric:
    """What a task measures on its validation and test parts.

    Attributes:
        name: What it is called in tables and figures.
        maximize: Whether higher is better.
        low: The least value there can be, if any.
        high: The greatest value there can be, if any.
        unit: What a number of it means, for an axis.
        hint: How a target is given, to end a message on one that cannot be reached.
    """

    name: str = "accuracy"
    maximize: bool = True
    low: float | None = None
    high: float | None = None
    unit: str = ""
    hint: str = ""

    @property
    def direction(self) -> StudyDirection:
        """The direction of an Optuna study of it."""
        from optuna.study import StudyDirection

        return StudyDirection.MAXIMIZE if self.maximize else StudyDirection.MINIMIZE

    @property
    def sign(self) -> float:
        """1 where higher is better, else -1."""
        return 1.0 if self.maximize else -1.0

    @property
    def worst(self) -> float:
        """The infinity that every value is better than."""
        return -self.sign * math.inf

    @property
    def axis(self) -> str:
        """Name and unit, for an axis."""
        return f"{self.name} ({self.unit})" if self.unit else self.name

    def better(self, value: float, other: float) -> bool:
        """Return whether ``value`` is better than ``other``."""
        return self.sign * value > self.sign * other

    def best(self, values: Iterable[float | None], default: float = math.nan) -> float:
        """Return the best of the values that are there, ``default`` without any."""
        known = (v for v in values if v is not None and not math.isnan(v))
        return max(known, key=lambda v: self.sign * v, default=default)

    def reached(self, values: pd.Series, target: float) -> pd.Series:
        """Return where values are at the target or better; never where they are NaN."""
        return values >= target if self.maximize else values <= target

    def misplaced(self, target: float) -> str | None:
        """Return what is wrong with a target, in words; None if it is one that can be reached."""
        low, high = self.low, self.high
        if (low is None or target > low) and (high is None or target <= high):
            return None
        named = (("above", low), ("up to", high))
        ends = [f"{word} {end:g}" for word, end in named if end is not None]
        return f"is no {self.name} {' and '.join(ends)}{self.hint}"


ACCURACY = Metric("accuracy", maximize=True, low=0.0, high=1.0, unit="share", hint="; give 0.93 for 93%")
PERPLEXITY = Metric("perplexity", maximize=False, low=1.0)
MEAN_RETURN = Metric("mean return", maximize=True)
