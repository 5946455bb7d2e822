"""One line of what the doctor finds, and the guard that keeps a broken check from ending the others."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from optuna_ohgw.errors import UserError
from optuna_ohgw.reading import hide_passwords

Outcome = Literal["ok", "info", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """What one check found.

    Attributes:
        group: What it belongs to: versions, devices, storage, data, disk or limits.
        name: What was checked.
        outcome: ``ok``; ``info``, nothing to mend; ``warn``, works but costs; ``fail``, mend it first.
        detail: What was found, without passwords.
        remedy: What to do, empty if nothing.
    """

    group: str
    name: str
    outcome: Outcome
    detail: str
    remedy: str = ""

    def __post_init__(self) -> None:
        for field in ("detail", "remedy"):
            text = " ".join(hide_passwords(getattr(self, field)).split())
            object.__setattr__(self, field, text)


def guarded(
    group: str, name: str, work: Callable[[], list[Check]], limit_s: float | None = None
) -> list[Check]:
    """Return what a group of checks finds; an error in it, or no end in time, is a ``fail`` of its own.

    Args:
        group: Group of the line that tells of an error.
        name: Name of that line.
        work: The checks.
        limit_s: Seconds to wait, in a thread that is left alone afterwards; None for no limit.
    """
    if limit_s is None:
        return _outcome(group, name, work)
    found: queue.Queue[list[Check]] = queue.Queue()
    threading.Thread(target=lambda: found.put(_outcome(group, name, work)), daemon=True).start()
    try:
        return found.get(timeout=limit_s)
    except queue.Empty:
        return [Check(group, name, "fail", f"no answer within {limit_s:g} s", "see why it hangs")]


def _outcome(group: str, name: str, work: Callable[[], list[Check]]) -> list[Check]:
    try:
        return work()
    except UserError as error:
        detail, _, remedy = str(error).rpartition("; ")
        return [Check(group, name, "fail", detail or remedy, remedy if detail else "")]
    except Exception as error:  # whatever it is, the other checks go on
        return [Check(group, name, "fail", f"could not be checked: {said(error)}")]


def said(error: BaseException) -> str:
    """Return the kind and the first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def size(count: float) -> str:
    """Return a number of bytes in words."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
