"""What the doctor prints: a line a check and a count, or JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table
from rich.text import Text

from optuna_ohgw.doctor.check import Check, Outcome

_STYLES: dict[Outcome, str] = {"ok": "green", "info": "cyan", "warn": "yellow", "fail": "bold red"}


def print_checks(checks: Sequence[Check], console: Console) -> None:
    """Print one row a check, what to do behind an arrow, and how many came out how."""
    shown = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for column in range(4):
        shown.add_column(no_wrap=column < 3, overflow="fold")
    for check in checks:
        remedy = f" → {check.remedy}" if check.remedy else ""
        words = (check.group, check.name, f"{check.detail}{remedy}")
        shown.add_row(Text(check.outcome, style=_STYLES[check.outcome]), *map(Text, words))
    console.print(shown)
    counts = Counter(check.outcome for check in checks)
    text = ", ".join(f"{counts[outcome]} {outcome}" for outcome in _STYLES if counts[outcome])
    console.print(f"{len(checks)} checks: {text}", highlight=False, markup=False)


def as_json(checks: Sequence[Check]) -> str:
    """Return the checks as a JSON list of objects."""
    return json.dumps([asdict(check) for check in checks], indent=2, ensure_ascii=False)
