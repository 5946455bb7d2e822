"""Room and rights in the folders that a run writes to."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import psutil

from optuna_ohgw.doctor.check import Check, Outcome, size
from optuna_ohgw.spec import StudySpec

# Schedulers that only stop trials; the others pause them, with a checkpoint.
_STOPPING = ("asha", "asha-quantile", "hyperband")
_TENSORS = 3  # in a checkpoint: weights, momentum, the best weights
_KEPT = 2  # checkpoints of a running or paused trial: the last and the one before
_LEAST = 2**30
_FILES = 4  # in a cell's folder, its workers' logs aside
_NETWORK = ("nfs", "cifs", "smb", "lustre", "gpfs", "beegfs", "ceph", "glusterfs", "afs", "9p", "pvfs")
_REMOTE_FUSE = ("sshfs", "glusterfs", "ceph", "s3fs", "gcsfuse", "rclone", "juicefs", "lustre", "moosefs")


@dataclass(frozen=True)
class Room:
    """Free bytes and free inodes of a folder's file system; None where it does not count inodes."""

    free: int
    inodes: int | None


@dataclass(frozen=True)
class Need:
    """What a run writes at most at a time, as far as it can be told beforehand."""

    count: int
    files: int
    words: str


def check_disk(spec: StudySpec | None, cache: Path, parameters: int | None, workers: int) -> list[Check]:
    """Return lines on the output, cache and temporary folders.

    Args:
        spec: The study, None for the folders that all share.
        cache: Folder of decoded pictures.
        parameters: Of the largest network; None if it is not known.
        workers: At work at once here.
    """
    checks = []
    if spec is not None:
        checks += [judge_writable("output folder", spec.folder, writing_error(spec.folder))]
        checks += judge_room("output", room(spec.folder), need_of(spec, parameters, workers))
    checks += [judge_writable("cache folder", cache, writing_error(cache))]
    checks += judge_room("cache", room(cache), None)
    temporary = Path(tempfile.gettempdir())
    checks += [judge_writable("temporary folder", temporary, writing_error(temporary))]
    each = _TENSORS * 4 * (parameters or 0)
    need = Need(each * workers, workers, f"a checkpoint of each of {workers} workers") if each else None
    return checks + judge_room("temporary", room(temporary), need)


def need_of(spec: StudySpec, parameters: int | None, workers: int) -> Need | None:
    """Return what checkpoints, best weights and logs of a study take, None if that cannot be told.

    A checkpoint is ``parameters`` × 3 tensors × 4 bytes. One is kept for each paused trial of the cells
    at work, two for each running one.
    """
    from optuna_ohgw.cells import cells_of

    cells = len(cells_of(spec))
    at_once = min(max(workers, spec.execution.cells_at_once), cells)
    files = cells * (_FILES + spec.execution.workers)
    if spec.replays:
        return Need(0, files, f"{cells} cells")
    paused = 0
    if spec.scheduler.name not in _STOPPING:
        limit = spec.epochs_in_all
        trials = spec.budget.trials or (limit // spec.scheduler.min_resource if limit else None)
        if trials is None:
            return None
        paused = trials * at_once
    if parameters is None:
        return None
    checkpoints = _KEPT * (paused + workers)
    each = _TENSORS * 4 * parameters
    words = f"{checkpoints} checkpoints of {size(each)} and the best weights of {cells} cells"
    return Need(checkpoints * each + cells * 4 * parameters, files + checkpoints, words)


def judge_room(name: str, here: Room, need: Need | None) -> list[Check]:
    """Return whether bytes and inodes are enough: ``fail`` below the need, ``warn`` below twice of it."""
    count, files = (need.count, need.files) if need else (0, 0)
    words = f"at most {size(count)} ({need.words})" if need else "the need cannot be told"
    found = f"{size(here.free)} free, {words}" if need else f"{size(here.free)} free"
    remedy = f"free {size(max(2 * count, _LEAST) - here.free)}, or name another folder"
    space = Check("disk", f"{name} space", "ok", found)
    if here.free < count:
        space = Check("disk", f"{name} space", "fail", found, remedy)
    elif here.free < max(2 * count, _LEAST):
        space = Check("disk", f"{name} space", "warn", found, remedy)
    if here.inodes is None or here.inodes >= 2 * max(files, 1000):
        return [space]
    found = f"{here.inodes} free, {files} files are made"
    outcome: Outcome = "fail" if here.inodes < files else "warn"
    remedy = "delete small files, or name another folder"
    return [space, Check("disk", f"{name} inodes", outcome, found, remedy)]


def judge_writable(name: str, folder: Path, error: str) -> Check:
    """Return whether files can be made in a folder; ``error`` is empty if they can."""
    if error:
        remedy = "mend its rights, or name another folder"
        return Check("disk", name, "fail", f"{folder} cannot be written ({error})", remedy)
    return Check("disk", name, "ok", f"{folder} can be written")


def room(folder: Path) -> Room:
    """Return what is free where a folder is or would be made."""
    here = os.statvfs(existing(folder))
    # Some file systems count no inodes: they say 0 of 0.
    return Room(here.f_bavail * here.f_frsize, here.f_favail if here.f_files else None)


def writing_error(folder: Path) -> str:
    """Return why no file can be made in a folder, or above it where it is not there yet; else nothing."""
    try:
        with tempfile.TemporaryFile(dir=existing(folder)) as file:
            file.write(b"\0")
    except OSError as error:
        return error.strerror or type(error).__name__
    return ""


def existing(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    folder = folder.expanduser().absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def file_system(path: Path) -> str:
    """Return the type of the file system that holds a path, such as ext4 or nfs4."""
    path = existing(path).resolve()
    mounts = {Path(p.mountpoint): p.fstype for p in psutil.disk_partitions(all=True)}
    around = [mount for mount in mounts if path.is_relative_to(mount)]
    return mounts[max(around, key=lambda mount: len(mount.parts))] if around else ""


def is_network(kind: str) -> bool:
    """Return whether a type of file system is one over a network."""
    kind = kind.lower()
    if kind.startswith("fuse."):
        return kind.removeprefix("fuse.").startswith(_REMOTE_FUSE)
    return kind.startswith(_NETWORK)
