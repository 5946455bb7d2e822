"""Versions: what is installed against what the package asks for."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, metadata, requires, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from optuna_ohgw.doctor.check import Check, Outcome
from optuna_ohgw.spec import StudySpec
from optuna_ohgw.spec_kinds import ContractSpec

DISTRIBUTION = "optuna-ohgw"
_DRIVERS = {"postgresql": "postgresql+psycopg", "mysql": "mysql+pymysql", "grpc": "grpc"}  # by extra
_NAMED = ("optuna", "torch", "torchvision", "timm", "kornia", "datasets")


def check_versions(spec: StudySpec | None) -> list[Check]:
    """Return a line for Python and each package that matters, and one for the others together."""
    try:
        asked = [Requirement(text) for text in requires(DISTRIBUTION) or ()]
        python = metadata(DISTRIBUTION)["Requires-Python"]
    except PackageNotFoundError:
        return [Check("versions", DISTRIBUTION, "warn", "is not installed", f"pip install {DISTRIBUTION}")]
    needed = needed_extras(spec)
    checks = [judge_version("python", platform.python_version(), python, remedy="install another Python")]
    others: list[Check] = []
    for one in asked:
        extra = next((e for e in (*needed, "pdf") if _is_of(one, e)), None)
        if extra is not None:
            remedy = f"pip install '{DISTRIBUTION}[{extra}]'"
            absent: Outcome = "fail" if extra in needed else "info"
            check = judge_version(one.name, installed(one.name), str(one.specifier), remedy, absent=absent)
            if extra == "pdf" and check.outcome == "info":
                check = Check(check.group, check.name, "info", "not installed; only report --pdf needs it")
            checks.append(check)
        elif _is_of(one, ""):
            remedy = f"pip install '{one.name}{one.specifier}'"
            check = judge_version(one.name, installed(one.name), str(one.specifier), remedy)
            (checks if one.name in _NAMED else others).append(check)
    return [*checks, *_in_one(others)]


def judge_version(
    name: str, found: str | None, wanted: str, remedy: str, *, absent: Outcome = "fail"
) -> Check:
    """Return whether a version is in a range; ``absent`` where there is none."""
    if found is None:
        return Check("versions", name, absent, f"not installed, {wanted or 'any version'} is needed", remedy)
    if not SpecifierSet(wanted).contains(found, prereleases=True):
        return Check("versions", name, "fail", f"{found}, but {wanted} is needed", remedy)
    return Check("versions", name, "ok", found)


def needed_extras(spec: StudySpec | None) -> tuple[str, ...]:
    """Return the extras of this package without which a study cannot run."""
    if spec is None:
        return ()
    models = ("models",) if spec.scheduler.name in ("dyhpo", "boil") else ()
    needs = spec.task.needs if isinstance(spec.task, ContractSpec) else None
    task = () if needs is None else (needs[1],)
    kind = spec.storage_url.partition(":")[0]
    storage = tuple(extra for extra, driver in _DRIVERS.items() if kind == driver)
    return (*models, *task, *storage, *((spec.tracking,) if spec.tracking else ()))


def installed(name: str) -> str | None:
    """Return the version of an installed distribution, None if it is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _is_of(one: Requirement, extra: str) -> bool:
    """Return whether a requirement holds for an extra alone, or for all if the extra is empty."""
    everywhere = one.marker is None or one.marker.evaluate({"extra": ""})
    if not extra or everywhere:
        return everywhere and not extra
    assert one.marker is not None
    return one.marker.evaluate({"extra": extra})


def _in_one(checks: Iterable[Check]) -> list[Check]:
    """Return the checks that found something, and one for those that did not."""
    checks = list(checks)
    bad = [c for c in checks if c.outcome != "ok"]
    good = len(checks) - len(bad)
    return [*bad, Check("versions", "others", "ok", f"{good} packages as asked for")] if good else bad
