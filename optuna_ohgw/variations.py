"""What each variation of a study does beside its ``warm_start`` section."""

from __future__ import annotations

import math
import re
from typing import Any

# Settings of WarmStart; None: no warm start.
VARIATIONS: dict[str, dict[str, Any] | None] = {
    "asha-baseline": None,
    "asha-random-warm": {"rule": "raw", "random": True},
    "asha-ohgw-1step": {"rule": "raw"},
    "asha-ohgw-3step": {"rule": "raw", "steps": 3},
    "asha-random-3step": {"rule": "raw", "steps": 3, "random": True},
    "asha-gaussian": {"rule": "gaussian"},
    "asha-ohgw-trust": {"rule": "trust-region"},
    "asha-random-trust": {"rule": "trust-region", "random": True},
    "asha-ohgw-linesearch": {"rule": "line-search"},
    "asha-random-linesearch": {"rule": "line-search", "random": True},
    "asha-lr-grid": {"rule": "lr-grid"},
}
BASELINE = "asha-baseline"

_ETA = re.compile(r"(\d+(\.\d+)?|\.\d+)([eE][+-]?\d+)?")


def base_of(variation: str) -> str:
    """Return a variation's name without a step size of its own: ``asha-ohgw-1step@3e-4`` is a 1step."""
    return variation.partition("@")[0]


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
    return (VARIATIONS[base_of(variation)] or {}).get("rule") == "raw"
