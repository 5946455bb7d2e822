"""Studies that a report shows beside its own: other bootstrap counts, η_h sweeps, label noise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from optuna_ohgw.cells import check_cells
from optuna_ohgw.errors import UserError
from optuna_ohgw.evidence import Evidence, gather
from optuna_ohgw.opening import open_storage
from optuna_ohgw.spec import StudySpec, load_spec
from optuna_ohgw.variations import eta_of

Role = Literal["bootstrap", "eta", "noise", "other"]


@dataclass(frozen=True)
class Side:
    """A study beside another.

    Attributes:
        source: Its study file.
        role: How it differs: another ``bootstrap_count``, variations with their own η_h, label
            noise, or otherwise.
        evidence: What it shows, None where it was not run.
        absent: Why it is not there.
    """

    source: str
    role: Role
    evidence: Evidence | None
    absent: str | None = None


def sides(spec: StudySpec, pilot: float | None = None, *, smoke: bool = False) -> Iterator[Side]:
    """Yield the studies that a spec names under ``beside``.

    Args:
        spec: The study.
        pilot: Its τ*, which those on the same task without pilots take over.
        smoke: Take the light form of each.

    Raises:
        UserError: If a file that it names is no study.
    """
    for name in spec.beside:
        other = load_spec(Path(name), smoke=smoke)
        kind = role(other, spec)
        try:
            storage = open_storage(other.storage_url, create=False)
            found = check_cells(storage, other)
        except UserError as error:
            yield Side(name, kind, None, f"{name} is not there ({error})")
            continue
        if not found:
            yield Side(name, kind, None, f"{name} was not run: no cell of it is in {other.storage_url}")
            continue
        shared = pilot if other.task == spec.task else None
        yield Side(name, kind, gather(storage, other, name, shared))


def role(other: StudySpec, spec: StudySpec) -> Role:
    """Return how a study differs from another."""
    if any(eta_of(v) is not None for v in other.variations):
        return "eta"
    if other.label_noise != spec.label_noise:
        return "noise"
    if other.scheduler.bootstrap_count != spec.scheduler.bootstrap_count:
        return "bootstrap"
    return "other"
