"""What is left of a study, and whether its report is of today: answered without torch, in a second."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

from optuna.storages import BaseStorage

from optuna_ohgw.cells import Cell, cells_of, check_cells
from optuna_ohgw.claims import claims_of
from optuna_ohgw.history import FINAL
from optuna_ohgw.opening import open_storage, sqlite_path
from optuna_ohgw.spec import StudySpec
from optuna_ohgw.version import __version__


def left_of(storage: BaseStorage, spec: StudySpec) -> list[Cell]:
    """Return the cells that are not at their end."""
    ended = {s.study_name for s in storage.get_all_studies() if FINAL in s.user_attrs}
    return [cell for cell in cells_of(spec) if cell.name not in ended]


def is_finished(spec: StudySpec) -> bool:
    """Return whether every cell of a study is at its end.

    Raises:
        UserError: If the storage cannot be used, or holds another study of the same name.
    """
    file = sqlite_path(spec.storage_url)
    if file is not None and not file.exists():
        return False
    storage = open_storage(spec.storage_url, create=True)
    return len(check_cells(storage, spec)) == len(cells_of(spec)) and not left_of(storage, spec)


def has_report(spec: StudySpec, folder: Path) -> bool:
    """Return whether a folder holds the report of a finished study as it would be written now.

    What its other studies ``beside`` came to since is not looked at.
    """
    try:
        told = json.loads((folder / "summary.json").read_text())
        written = datetime.datetime.fromisoformat(told["written"])
        known = told["optuna_ohgw"], told["spec"], told["seeds"], {r["variation"] for r in told["variations"]}
        targets = set(told["targets"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    own = json.loads(json.dumps(spec.identity()))
    if known != (__version__, own, list(spec.seeds), set(spec.variations)) or not targets >= {*spec.targets}:
        return False
    claims = claims_of(open_storage(spec.storage_url, create=False), spec)
    ends = [claim.datetime_complete for claim in claims if claim.datetime_complete is not None]
    # The report tells whole seconds.
    return written.timestamp() + 1 >= max(end.timestamp() for end in ends) if ends else False
