"""Running a study: checks before anything is made, cells over processes, progress, resume."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock
from optuna.storages import RDBStorage
from optuna.storages._cached_storage import _CachedStorage
from optuna.trial import TrialState
from rich.console import Console

from optuna_ohgw.cell_study import load_cell
from optuna_ohgw.cells import SPEC_FILE, Cell, cells_of, check_cells, check_folder, create_cell, to_retry
from optuna_ohgw.claims import Claims
from optuna_ohgw.data_check import check_data
from optuna_ohgw.device import check_device, resolve_device
from optuna_ohgw.errors import StorageLost, UserError
from optuna_ohgw.finished import left_of
from optuna_ohgw.fleet import Crew, Stop, run_processes, stop_on_signal
from optuna_ohgw.mps import shared_gpu
from optuna_ohgw.opening import open_storage, sqlite_path
from optuna_ohgw.patience import hurried_by
from optuna_ohgw.progress import show_progress
from optuna_ohgw.ray_cluster import check_address, check_ray
from optuna_ohgw.ray_engine import places_of, run_actors
from optuna_ohgw.reading import hide_passwords
from optuna_ohgw.schedulers.choosers import check_installed
from optuna_ohgw.spec import StudySpec
from optuna_ohgw.tracking import check_tracking, send_cell

_ALONE = Crew()
log = logging.getLogger("optuna_ohgw.runner")


class Stopped(Exception):
    """The run was stopped by a signal, whose number is kept, and can be continued."""

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__(f"stopped by signal {number}")
        self.number = number


def run(
    spec: StudySpec,
    console: Console,
    level: int = logging.INFO,
    crew: Crew = _ALONE,
) -> bool:
    """Run what is left of a study; return False if nothing was left.

    Any number of runs, on any number of machines, may share the storage: their workers claim cells
    there. Everything that can be wrong is checked before the first study is made in the storage.

    Args:
        spec: The study.
        console: Where progress is shown.
        level: Level of the worker logs.
        crew: Who is to work.

    Raises:
        UserError: If the folder, the data or the storage cannot be used.
        Stopped: After Ctrl-C or SIGTERM; the same call continues.
        StorageLost: If the storage did not answer for too long.
        RuntimeError: If a cell cannot go on.
    """
    try:
        return _run(spec, console, level, crew)
    except KeyboardInterrupt:  # before the workers were started
        raise Stopped from None


def _run(spec: StudySpec, console: Console, level: int, crew: Crew) -> bool:
    with _checked_folder(spec.folder):
        storage, patience_s = None, spec.execution.patience_s
        file = sqlite_path(spec.storage_url)
        if file is None or file.exists():
            storage = open_storage(spec.storage_url, create=True, patience_s=patience_s)
            known = check_cells(storage, spec)
            if len(known) == len(cells_of(spec)) and not left_of(storage, spec):
                return False
        check_folder(spec)
        check_device(spec.execution.device, "execution.device")
        check_tracking(spec)
        check_installed(spec.scheduler.name, "scheduler.name")
        _check_crew(spec, crew)
        check_data(spec)
        stop = Stop()
        # From here on a signal is noted, not raised: an exception from nowhere may be lost in a library.
        with stop_on_signal(stop) as signals, hurried_by(stop), _away_is_no_matter(signals):
            with FileLock(spec.folder / ".start.lock"):  # of two that start at once one makes the tables
                storage = storage or open_storage(spec.storage_url, create=True, patience_s=patience_s)
                check_cells(storage, spec)
                environment = environment_record(spec)
                for cell in cells_of(spec):
                    create_cell(storage, spec, cell, environment)
                    _prepare_folder(spec, cell)
            _work(spec, storage, console, level, crew, stop)
    if signals:
        raise Stopped(signals[0])
    return True


def _check_crew(spec: StudySpec, crew: Crew) -> None:
    """Raise a UserError if a crew cannot be had here; of a Ray cluster that is there only Ray can tell."""
    if crew.engine == "ray":
        check_ray()
        if crew.address is None:
            places_of(spec, crew, len(cells_of(spec)), len(_gpus()), here=True)
        else:
            check_address(crew.address)
        return
    if crew.engine != "processes":
        raise UserError(f"--engine: {crew.engine!r} is unknown; use processes or ray")
    each = crew.trials_per_device
    if each is None:
        return
    device = resolve_device(spec.execution.device)
    if device.type != "cuda":
        raise UserError(f"--trials-per-device: {each}, but no GPU is used here; use --workers")
    if device.index is not None:
        raise UserError(
            f"--trials-per-device: {each}, but execution.device {spec.execution.device!r} names one GPU; "
            "use --workers, or cuda"
        )
    if crew.workers is not None and crew.workers > each * len(_gpus()):
        raise UserError(
            f"--workers: {crew.workers} are more than {each} on each of {len(_gpus())} GPUs; "
            "drop --workers or --trials-per-device"
        )


def _devices(spec: StudySpec, cells: int, crew: Crew) -> list[str | None]:
    """Return what each worker of this machine sees of its GPUs, round robin; None: what there is."""
    device, each = resolve_device(spec.execution.device), crew.trials_per_device
    usual = spec.execution.workers * min(spec.execution.cells_at_once, cells)
    if device.type != "cuda" or device.index is not None:
        return [None] * (crew.workers or usual)
    gpus = _gpus()
    count = crew.workers or (len(gpus) * each if each else usual)
    return [gpus[number % len(gpus)] for number in range(count)]


def _gpus() -> list[str]:
    """Return the GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them."""
    import torch

    count, shown = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return shown.split(",")[:count] if shown else [str(number) for number in range(count)]


def environment_record(spec: StudySpec) -> dict[str, Any]:
    """Return versions, commit and device, for the record."""
    packages = ("optuna-ohgw", "optuna", "torch", "torchvision", "timm", "kornia", "numpy")
    versions = {}
    for name in packages:
        with contextlib.suppress(ModuleNotFoundError):
            versions[name] = version(name)
    device = resolve_device(spec.execution.device)
    return {
        "versions": versions,
        "python": sys.version.split()[0],
        "commit": _commit(),
        "device": str(device),
        "cpus": os.cpu_count(),
    }


def _work(spec: StudySpec, storage: Any, console: Console, level: int, crew: Crew, stop: Stop) -> None:
    # Reads what is new, again and again; a proxy does so by itself.
    cached = _CachedStorage(storage) if isinstance(storage, RDBStorage) else storage
    claims = Claims(cached, spec, "")
    others = claims.pulses()
    waiting = sum(_to_start_again(load_cell(cached, spec, cell)) for cell in left_of(storage, spec))
    if waiting and not others:
        console.print(f"{waiting} unfinished trials of an earlier run start again")
    devices = _devices(spec, len(left_of(storage, spec)), crew) if crew.engine == "processes" else []
    device = resolve_device(spec.execution.device)
    shared = device.type == "cuda" and len(devices) > len(set(devices))
    if stop.is_set():
        return
    with (
        shared_gpu() if shared else contextlib.nullcontext(),
        show_progress(cached, spec, claims, console) as view,
    ):

        def look() -> None:
            for cell in view.look():
                send_cell(storage, spec, cell)

        def say(line: str) -> None:
            console.print(line, highlight=False)

        if crew.engine == "ray":
            run_actors(spec, crew, len(left_of(storage, spec)), level, stop, look, say)
        else:
            # Not ``auto``: a worker that finds no GPU must not go on without, a hundred times slower.
            run_processes(spec.executed(device=str(device)), devices, level, stop, look, say)
    if stop.is_set():
        return
    errors = claims.errors()
    if errors:
        cells = "; ".join(f"{cell}: {error}" for cell, error in errors.items())
        raise RuntimeError(f"{len(errors)} of {len(cells_of(spec))} cells could not go on: {cells}")
    held = {label for label, _ in claims.pulses().values()}
    if held:
        console.print(
            f"nothing is left to start; others still work on {', '.join(sorted(held))}. "
            "Run the same command again if they should die."
        )


@contextlib.contextmanager
def _away_is_no_matter(signals: list[int]) -> Iterator[None]:
    """Let a run that was told to stop end as such, though its storage does not answer."""
    try:
        yield
    except StorageLost:
        if not signals:
            raise


def _to_start_again(study: optuna.Study) -> int:
    trials = study.get_trials(deepcopy=False)
    return sum(t.state == TrialState.RUNNING for t in trials) + len(to_retry(trials))


@contextlib.contextmanager
def _checked_folder(root: Path) -> Iterator[None]:
    """Make the output folder; a user's mistake found afterwards takes away what is made and bare."""
    made = [folder for folder in (root, *root.parents) if not folder.exists()]
    _check_folder(root)
    try:
        yield
    except UserError:
        if made:
            (root / ".start.lock").unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()
        raise


def _check_folder(root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe = root / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"output: {root} cannot be written ({error.strerror}); name another by --set output=FOLDER"
        ) from None


def _prepare_folder(spec: StudySpec, cell: Cell) -> None:
    from omegaconf import OmegaConf

    folder = cell.folder(spec.folder)
    folder.mkdir(parents=True, exist_ok=True)
    own = {"variations": (cell.variation,), "seeds": (cell.seed,), "pilot_seeds": ()}
    resolved = spec.model_copy(update={**own, "storage": hide_passwords(spec.storage)})
    (folder / SPEC_FILE).write_text(OmegaConf.to_yaml(OmegaConf.create(resolved.model_dump(mode="json"))))


def _commit() -> str | None:
    here = Path(__file__).parent
    if not (here.parent / ".git").exists():
        return None
    command = ["git", "-C", str(here), "rev-parse", "HEAD"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or None
