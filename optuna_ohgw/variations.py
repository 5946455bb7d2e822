"""What each variation of a study does beside its ``warm_start`` section."""

from __future__ import annotations

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
