"""What is in a study's way on this machine, and how to mend it."""

from __future__ import annotations

from optuna_ohgw.doctor.check import Check, guarded
from optuna_ohgw.spec import StudySpec

__all__ = ["Check", "diagnose"]

_SECONDS = 60.0  # for any group but the data, which may have to be decoded or downloaded


def diagnose(spec: StudySpec | None, workers: int | None = None) -> list[Check]:
    """Return what the checks find, in the order in which things are mended; nothing is trained.

    A check that fails by an error of its own, or does not end, is a line like the others.

    Args:
        spec: The study; without one its machine alone is looked at.
        workers: Workers on this machine; as the study says unless given.
    """
    checks = guarded("versions", "versions", lambda: _versions(spec), _SECONDS)
    checks += guarded("devices", "devices", _machine, _SECONDS)
    if spec is None:
        return checks + guarded("disk", "disk", lambda: _disk(None, None, 1), _SECONDS)
    counted: list[int] = []
    count = workers or _workers(spec)
    checks += guarded("devices", "device", lambda: _execution(spec, count), _SECONDS)
    checks += guarded("storage", "storage", lambda: _storage(spec), _SECONDS)
    checks += guarded("data", "data", lambda: _data(spec, counted))
    checks += guarded("disk", "disk", lambda: _disk(spec, max(counted, default=None), count), _SECONDS)
    return checks + guarded("limits", "limits", lambda: _limits(count), _SECONDS)


def _workers(spec: StudySpec) -> int:
    from optuna_ohgw.cells import cells_of

    return spec.execution.workers * min(spec.execution.cells_at_once, len(cells_of(spec)))


# Imported inside, so that a package that cannot be imported is a line, too.


def _versions(spec: StudySpec | None) -> list[Check]:
    from optuna_ohgw.doctor.versions import check_versions

    return check_versions(spec)


def _machine() -> list[Check]:
    from optuna_ohgw.doctor.devices import check_machine
    from optuna_ohgw.doctor.host import measure

    return check_machine(measure())


def _execution(spec: StudySpec, workers: int) -> list[Check]:
    from optuna_ohgw.doctor.devices import check_execution
    from optuna_ohgw.doctor.host import measure

    return check_execution(spec, measure(), workers)


def _storage(spec: StudySpec) -> list[Check]:
    from optuna_ohgw.doctor.storage import check_storage

    return check_storage(spec.storage_url, spec.folder)


def _data(spec: StudySpec, counted: list[int]) -> list[Check]:
    from optuna_ohgw.doctor.data import check_data

    return check_data(spec, counted)


def _disk(spec: StudySpec | None, parameters: int | None, workers: int) -> list[Check]:
    from optuna_ohgw.doctor.disk import check_disk
    from optuna_ohgw.tasks.data import cache_folder

    return check_disk(spec, cache_folder(), parameters, workers)


def _limits(workers: int) -> list[Check]:
    from optuna_ohgw.doctor.limits import check_limits

    return check_limits(workers)
