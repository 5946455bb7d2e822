"""Variations of a study, ``SCHEDULER-WARM_START[@η_h]``, and what each does beside ``warm_start``."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

# Settings of WarmStart; None: no warm start.
WARM_STARTS: dict[str, dict[str, Any] | None] = {
    "baseline": None,
    "random-warm": {"rule": "raw", "random": True},
    "ohgw-1step": {"rule": "raw"},
    "ohgw-3step": {"rule": "raw", "steps": 3},
    "random-3step": {"rule": "raw", "steps": 3, "random": True},
    "gaussian": {"rule": "gaussian"},
    "ohgw-trust": {"rule": "trust-region"},
    "random-trust": {"rule": "trust-region", "random": True},
    "ohgw-linesearch": {"rule": "line-search"},
    "random-linesearch": {"rule": "line-search", "random": True},
    "lr-grid": {"rule": "lr-grid"},
}
BASELINE = "baseline"

_ETA = re.compile(r"(\d+(\.\d+)?|\.\d+)([eE][+-]?\d+)?")


def base_of(variation: str) -> str:
    """Return a variation's name without a step size of its own: ``asha-ohgw-1step@3e-4`` is a 1step."""
    return variation.partition("@")[0]


def warm_start_of(variation: str) -> str | None:
    """Return the warm start of a variation, ``ohgw-1step`` of ``asha-ohgw-1step@3e-4``; None: unknown."""
    base = base_of(variation)
    return next((warm for warm in WARM_STARTS if base == warm or base.endswith(f"-{warm}")), None)


def take_gradients(variations: Iterable[str]) -> bool:
    """Return whether any variation's warm start takes a gradient."""
    rules = {(WARM_STARTS[warm_start_of(v) or BASELINE] or {}).get("rule") for v in variations}
    return bool(rules - {None, "gaussian", "lr-grid"})


def scheduler_of(variation: str) -> str | None:
    """Return the scheduler of a variation, ``pasha`` of ``pasha-baseline``; None: it names none."""
    base, warm = base_of(variation), warm_start_of(variation)
    return None if warm is None or base == warm else base.removesuffix(f"-{warm}")


def baseline_among(variations: Iterable[object]) -> str:
    """Return the name of the baseline of variations, which have one scheduler."""
    named = filter(None, (scheduler_of(str(v)) for v in variations))
    return f"{next(named, 'asha')}-{BASELINE}"


def is_baseline(variation: str) -> bool:
    """Return whether a variation has no warm start."""
    return warm_start_of(variation) == BASELINE


def eta_of(variation: str) -> float | None:
    """Return the step size η_h that a variation's name carries, None without one.

    Raises:
        ValueError: If what follows the ``@`` is no positive number.
    """
    _, at, text = variation.partition("@")
    if not at:
        return None
    eta = float(text) if _ETA.fullmatch(text) else math.nan
    if not 0 < eta < math.inf:
        raise ValueError(f"{variation!r} has no positive number after the @; give one such as 3e-4")
    return eta


def takes_eta(variation: str) -> bool:
    """Return whether a variation's rule has the step size η_h."""
    return (WARM_STARTS.get(warm_start_of(variation) or "") or {}).get("rule") == "raw"
