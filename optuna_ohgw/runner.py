"""Running a study: checks before anything is made, cells over processes, progress, resume."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import optuna
from filelock import FileLock, Timeout
from rich.console import Console

from optuna_ohgw import worker
from optuna_ohgw.cells import (
    Cell,
    cells_of,
    check_cells,
    create_cell,
    has_work,
    load_cell,
    open_storage,
    revive,
    share_done,
    sqlite_path,
    to_retry,
)
from optuna_ohgw.errors import UserError
from optuna_ohgw.mps import shared_gpu
from optuna_ohgw.processes import SIGNALS, context, deaf
from optuna_ohgw.progress import show_progress
from optuna_ohgw.reading import hide_passwords
from optuna_ohgw.spec import StudySpec
from optuna_ohgw.tasks.data import ImageData
from optuna_ohgw.tasks.image import load_image_arrays, split_images
from optuna_ohgw.tasks.models import build_model
from optuna_ohgw.tracking import check_tracking, send_cell

log = logging.getLogger("optuna_ohgw.runner")


class Stopped(Exception):
    """The run was stopped by a signal and can be continued."""


def run(spec: StudySpec, console: Console, level: int = logging.INFO) -> bool:
    """Run what is left of a study; return False if nothing was left.

    Everything that can be wrong is checked before the first study is made in the storage.

    Args:
        spec: The study.
        console: Where progress is shown.
        level: Level of the worker logs.

    Raises:
        UserError: If the folder, the data or the storage cannot be used.
        Stopped: After Ctrl-C or SIGTERM; the same call continues.
        RuntimeError: If a cell cannot go on.
    """
    try:
        return _run(spec, console, level)
    except KeyboardInterrupt:  # before the workers were started
        raise Stopped from None


def _run(spec: StudySpec, console: Console, level: int) -> bool:
    root = spec.folder
    with _checked_folder(root), _only_run(root):
        storage = None
        file = sqlite_path(spec.storage_url)
        if file is None or file.exists():
            storage = open_storage(spec.storage_url, create=True)
            known = check_cells(storage, spec)
            if len(known) == len(cells_of(spec)) and not _left(storage, spec, cells_of(spec)):
                return False
        check_device(spec.execution.device, "execution.device")
        check_tracking(spec)
        _check_data(spec, root)
        storage = storage or open_storage(spec.storage_url, create=True)
        environment = environment_record(spec)
        for cell in cells_of(spec):
            create_cell(storage, spec, cell, environment)
            _prepare_folder(spec, cell)
        left = _left(storage, spec, cells_of(spec))
        revived = sum(revive(load_cell(storage, spec, cell)) for cell in left)
        if revived:
            console.print(f"{revived} unfinished trials of an earlier run start again")
        _work(spec, left, storage, console, level)
    return True


def environment_record(spec: StudySpec) -> dict[str, Any]:
    """Return versions, commit and device, for the record."""
    packages = ("optuna-ohgw", "optuna", "torch", "torchvision", "timm", "kornia", "numpy")
    versions = {}
    for name in packages:
        with contextlib.suppress(ModuleNotFoundError):
            versions[name] = version(name)
    device = worker.resolve_device(spec.execution.device)
    return {
        "versions": versions,
        "python": sys.version.split()[0],
        "commit": _commit(),
        "device": str(device),
        "cpus": os.cpu_count(),
    }


def _work(spec: StudySpec, left: list[Cell], storage: Any, console: Console, level: int) -> None:
    device = worker.resolve_device(spec.execution.device)
    most = spec.execution.workers * min(spec.execution.cells_at_once, len(left))
    processes = context(device.type)
    stop, events, ordinal = processes.Event(), processes.Queue(), processes.Value("i", 0)
    workers, at_once = spec.execution.workers, spec.execution.cells_at_once
    pending = list(left)
    shares = {cell: share_done(load_cell(storage, spec, cell), spec) for cell in left}
    jobs: dict[Future[None], Cell] = {}
    open_slots: dict[Cell, int] = {}
    error: BaseException | None = None
    executor = ProcessPoolExecutor(
        max_workers=max(1, most),
        mp_context=processes,
        initializer=worker.start,
        initargs=(spec, stop, events, level, ordinal),
    )
    with (
        shared_gpu() if device.type == "cuda" and most > 1 else contextlib.nullcontext(),
        _stop_on_signal(stop) as signalled,
        show_progress(shares, console) as view,
        executor,
        _setting(stop),
    ):
        while jobs or (pending and not stop.is_set()):
            while pending and len(open_slots) < at_once and not stop.is_set():
                cell = pending.pop(0)
                open_slots[cell] = workers
                view.start(cell)
                for slot in range(workers):
                    jobs[_submit(executor, worker.search, cell, slot)] = cell
            done, _ = wait(jobs, timeout=0.2, return_when=FIRST_COMPLETED)
            view.drain(events)
            for job in done:
                cell = jobs.pop(job)
                error = error or job.exception()
                if error is not None:
                    stop.set()
                    continue
                open_slots[cell] -= 1
                if open_slots[cell] == 0 and not stop.is_set():
                    jobs[_submit(executor, worker.finish, cell)] = cell
                elif open_slots[cell] < 0:
                    del open_slots[cell]
                    view.finish(cell)
                    send_cell(storage, spec, cell)
        view.drain(events)
    if signalled.is_set():
        raise Stopped
    if error is not None:
        raise RuntimeError(f"{type(error).__name__}: {error}") from error


def _submit(executor: ProcessPoolExecutor, job: Callable[..., None], *arguments: Any) -> Future[None]:
    """Submit a job; a process that is started for it is deaf to signals until it can ignore them."""
    with deaf():
        return executor.submit(job, *arguments)


@contextlib.contextmanager
def _setting(stop: Any) -> Iterator[None]:
    """Set ``stop`` at the end, so that no worker goes on after an error here."""
    try:
        yield
    finally:
        stop.set()


def _left(storage: Any, spec: StudySpec, cells: list[Cell]) -> list[Cell]:
    known = {s.study_name for s in storage.get_all_studies()}
    left = []
    for cell in cells:
        if cell.name not in known:
            left.append(cell)
            continue
        study = load_cell(storage, spec, cell)
        finished = worker.FINAL in study.user_attrs
        if not finished and (has_work(study, spec) or worker.best_trial(study) or _unended(study)):
            left.append(cell)
    return left


def _unended(study: optuna.Study) -> bool:
    trials = study.get_trials(deepcopy=False)
    return any(not t.state.is_finished() for t in trials) or bool(to_retry(trials))


@contextlib.contextmanager
def _stop_on_signal(stop: Any) -> Iterator[threading.Event]:
    signalled = threading.Event()

    def ask_to_stop(number: int, frame: FrameType | None) -> None:
        signalled.set()
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield signalled
        return
    before = {s: signal.signal(s, ask_to_stop) for s in SIGNALS}
    try:
        yield signalled
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _only_run(root: Path) -> Iterator[None]:
    lock = FileLock(root / ".run.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"output: another run is at work in {root}; wait for it, or use another output"
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _checked_folder(root: Path) -> Iterator[None]:
    """Make the output folder; a user's mistake found afterwards takes away what is made and bare."""
    made = [folder for folder in (root, *root.parents) if not folder.exists()]
    _check_folder(root)
    try:
        yield
    except UserError:
        if made:
            (root / ".run.lock").unlink(missing_ok=True)
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


def _check_data(spec: StudySpec, root: Path) -> None:
    arrays = load_image_arrays(spec.task, root / "data")
    data = split_images(spec.task, arrays, spec.seeds[0], worker.resolve_device("cpu"))
    models = spec.choices["model"].choices if "model" in spec.choices else (spec.task.model,)
    for model in models:
        _check_model(spec, data, str(model))


def _check_model(spec: StudySpec, data: ImageData, model: str) -> None:
    import torch

    network = build_model(
        model, channels=data.channels, size=data.height, classes=data.classes, activation=spec.task.activation
    )
    try:
        with torch.inference_mode():
            network.eval()(torch.zeros_like(data.train_images[:2], dtype=torch.float32))
    except (RuntimeError, ValueError, AssertionError) as error:
        shape = tuple(data.train_images.shape[1:])
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"task.model: {model!r} cannot take pictures of {shape} ({reason}); "
            "give another model or another task.size"
        ) from None


def check_device(name: str, field: str) -> None:
    """Raise a UserError that names the field unless the device is there."""
    import torch

    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise UserError(f"{field}: {name!r} is unknown; use auto, cpu, cuda or cuda:N")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"{field}: {name!r} is not available here; use auto or cpu")
    if name.startswith("cuda:") and int(name[5:]) >= torch.cuda.device_count():
        raise UserError(f"{field}: {name!r} is not among the {torch.cuda.device_count()} here; use cuda")


def _prepare_folder(spec: StudySpec, cell: Cell) -> None:
    from omegaconf import OmegaConf

    folder = cell.folder(spec.folder)
    folder.mkdir(parents=True, exist_ok=True)
    own = {"variations": (cell.variation,), "seeds": (cell.seed,), "pilot_seeds": ()}
    resolved = spec.model_copy(update={**own, "storage": hide_passwords(spec.storage)})
    (folder / "spec.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(resolved.model_dump(mode="json"))))


def _commit() -> str | None:
    here = Path(__file__).parent
    if not (here.parent / ".git").exists():
        return None
    command = ["git", "-C", str(here), "rev-parse", "HEAD"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or None
