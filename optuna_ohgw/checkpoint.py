"""Checkpoints of a trial as artifacts: written whole or not at all, checked before they are used."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import pickle
import random
import shutil
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import optuna
import torch
from optuna.artifacts import FileSystemArtifactStore
from optuna.artifacts.exceptions import ArtifactNotFound

from optuna_ohgw.history import (
    CHECKPOINT,
    COMPLETED,
    CURVE,
    LOST,
    RECORD,
    RESUMED_FROM,
    RETRY_OF,
    chain,
    seconds_after,
)

FELL_BACK = "fell_back"
_STREAMS = "streams"
_DIGEST = 64  # hexadecimal digits of a SHA-256
_UNUSABLE = (ArtifactNotFound, OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError)
log = logging.getLogger("optuna_ohgw.checkpoint")


class CheckpointStore(FileSystemArtifactStore):
    """Checkpoints in a folder, which is made for the first; each is there whole or not at all.

    Args:
        folder: Where they are.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder = folder

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        """Keep a file."""
        self.folder.mkdir(exist_ok=True)
        partial = self.folder / f"{artifact_id}.partial"
        try:
            with partial.open("wb") as file:
                shutil.copyfileobj(content_body, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self.folder / artifact_id)
        finally:
            partial.unlink(missing_ok=True)


def save(
    trial: optuna.Trial,
    epoch: int,
    store: Any,
    parts: Mapping[str, Any],
    *,
    warm_starts: int | None = None,
    wall: float | None = None,
) -> bool:
    """Keep a checkpoint of a trial, and the one before; return whether it could be written.

    The trial's ``checkpoint`` attribute names it once it is whole: artifact, epoch, its Unix time, bytes,
    SHA-256, how many warm starts and rungs of the trial came before it, and the same of the previous one.
    Where it cannot be written, as on a full disk, a warning says so and the previous one stays.

    Args:
        trial: The running trial.
        epoch: Epochs that it was trained.
        store: An Optuna artifact store.
        parts: What is saved, by name; see :func:`optuna_ohgw.epochs`.
        warm_starts: Of the trial's warm starts those before the checkpoint; None: all.
        wall: Unix seconds at the end of the epoch; None: now.
    """
    earlier = trial.user_attrs.get(CHECKPOINT)
    content = {"epoch": epoch, _STREAMS: _streams(), "parts": {n: _state(p) for n, p in parts.items()}}
    stream, artifact = io.BytesIO(), str(uuid.uuid4())
    torch.save(content, stream)
    written = stream.getvalue()
    try:
        # Not by upload_artifact: it notes the artifact first, in an attribute for each.
        store.write(artifact, io.BytesIO(written))
    except OSError as error:
        log.warning("trial %d: no checkpoint at epoch %d (%s)", trial.number, epoch, error)
        with contextlib.suppress(ArtifactNotFound, OSError):
            store.remove(artifact)
        return False
    frozen = trial.study.get_trials(deepcopy=False)[trial.number]
    made = {
        "artifact": artifact,
        "epoch": epoch,
        "wall": round(time.time() if wall is None else wall, 3),
        "bytes": len(written),
        "sha256": hashlib.sha256(written).hexdigest(),
        "warm_starts": len(trial.user_attrs.get(RECORD, [])) if warm_starts is None else warm_starts,
        "rungs": sum(name.startswith(COMPLETED) for name in frozen.system_attrs),
        "previous": None,
    }
    if earlier is not None:
        made["previous"] = {**earlier, "previous": None}
    trial.set_user_attr(CHECKPOINT, made)
    if earlier is not None:
        delete(store, earlier["previous"])
    return True


def load(trial: optuna.Trial, store: Any, parts: Mapping[str, Any]) -> int:
    """Bring every part to the state of the trial's last good checkpoint; return its epoch, 0 without one.

    One that is missing, altered or unreadable is passed over for the previous one and, without that, for
    the trial's start, where the parts stay as they are. A warning says so, and the attribute
    ``fell_back``. Nothing is unpickled but tensors and plain values.

    Raises:
        ValueError: If the checkpoint holds other parts.
    """
    reasons = []
    for made in chain(trial.user_attrs.get(CHECKPOINT)):
        try:
            content = _read(made, store)
        except _UNUSABLE as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            reasons.append(f"epoch {made['epoch']}: {reason}")
            continue
        if content["parts"].keys() != parts.keys():
            source = trial.user_attrs.get(RESUMED_FROM, trial.user_attrs.get(RETRY_OF, trial.number))
            raise ValueError(
                f"the checkpoint of trial {source} holds {sorted(content['parts'])}, "
                f"asked for {sorted(parts)}; pass the same parts as when it was made"
            )
        for name, part in parts.items():
            state = content["parts"][name]
            if isinstance(part, torch.Generator):
                part.set_state(state)
            else:
                part.load_state_dict(state)
        _restore(content[_STREAMS])
        _say_fall(trial, reasons, int(content["epoch"]))
        if reasons:
            trial.set_user_attr(CHECKPOINT, made)
            _lose(trial, made["epoch"])
            if RECORD in trial.user_attrs:
                # Those after it are made anew; the next checkpoint counts what is there.
                trial.set_user_attr(RECORD, trial.user_attrs[RECORD][: made["warm_starts"]])
        return int(content["epoch"])
    _say_fall(trial, reasons, 0)
    if reasons:
        trial.set_user_attr(CHECKPOINT, None)
        _lose(trial, 0)
    return 0


def keep(store: CheckpointStore, name: str, of: Any, part: Any) -> bool:
    """Keep the state of what is no trial, in place of the one before; return whether it could be written.

    Args:
        store: Where.
        name: Of its file.
        of: What it is the state of, as plain values; see :func:`take`.
        part: Has ``state_dict``.
    """
    torch.save({"of": of, "state": part.state_dict()}, stream := io.BytesIO())
    written = stream.getvalue()
    try:
        store.write(name, io.BytesIO(hashlib.sha256(written).hexdigest().encode() + written))
    except OSError as error:
        log.warning("no checkpoint %s (%s)", name, error)
        return False
    return True


def take(store: CheckpointStore, name: str, of: Any, part: Any) -> bool:
    """Bring a part to the state that was kept of it; return whether there was one of the same, unharmed."""
    try:
        written = (store.folder / name).read_bytes()
        if hashlib.sha256(written[_DIGEST:]).hexdigest().encode() != written[:_DIGEST]:
            raise ValueError("its content is not what was written")
        content = torch.load(io.BytesIO(written[_DIGEST:]), weights_only=True, map_location="cpu")
    except FileNotFoundError:
        return False
    except _UNUSABLE as error:
        log.warning("checkpoint %s cannot be used: %s", name, (str(error).strip() or "?").splitlines()[0])
        return False
    if content["of"] == of:
        part.load_state_dict(content["state"])
    return bool(content["of"] == of)


def delete(store: Any, checkpoint: Mapping[str, Any] | None) -> None:
    """Delete a checkpoint and those before it; one that is gone already is none."""
    for made in chain(checkpoint):
        try:
            store.remove(made["artifact"])
        except ArtifactNotFound:
            continue


def _read(made: Mapping[str, Any], store: Any) -> dict[str, Any]:
    with store.open_reader(made["artifact"]) as reader:
        written = reader.read()
    if hashlib.sha256(written).hexdigest() != made["sha256"]:
        raise ValueError("its content is not what was written")
    content: dict[str, Any] = torch.load(io.BytesIO(written), weights_only=True, map_location="cpu")
    return content


def _say_fall(trial: optuna.Trial, reasons: list[str], epoch: int) -> None:
    if reasons:
        where = f"epoch {epoch}" if epoch else "its start"
        log.warning("trial %d goes on from %s: %s", trial.number, where, "; ".join(reasons))
        trial.set_user_attr(FELL_BACK, {"epoch": epoch, "why": reasons})


def _lose(trial: optuna.Trial, epoch: int) -> None:
    """Count what was trained after an epoch as lost."""
    lost = seconds_after(trial.user_attrs.get(CURVE) or {}, epoch) + trial.user_attrs.get(LOST, 0.0)
    if lost:
        trial.set_user_attr(LOST, round(lost, 4))


def _state(part: Any) -> Any:
    return part.get_state() if isinstance(part, torch.Generator) else part.state_dict()


def _streams() -> dict[str, Any]:
    """Return the default random streams, as tensors and plain values."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 - what users' code draws from
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    numpy = [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest]
    return {"torch": torch.get_rng_state(), "cuda": cuda, "numpy": numpy, "random": random.getstate()}


def _restore(streams: Mapping[str, Any]) -> None:
    torch.set_rng_state(streams["torch"])
    if streams["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(streams["cuda"])
    name, keys, *rest = streams["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    random.setstate(streams["random"])
