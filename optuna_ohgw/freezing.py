"""Freeze and thaw: a trial that a scheduler pauses goes on later from a checkpoint, bit for bit."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from optuna.artifacts import download_artifact, upload_artifact
from optuna.trial import TrialState

from optuna_ohgw.history import RESUMED_FROM, is_duplicate, paused_at

CHECKPOINT = "checkpoint"
_STREAMS = "streams"


def epochs(trial: optuna.Trial, total: int, store: Any, **parts: Any) -> Iterator[int]:
    """Yield the epochs that a trial has left, 1 to ``total``; freeze it where the pruner pauses it.

    Report each epoch inside the loop. A pruner of this package that pauses a trial ends the loop
    by ``TrialPruned`` after a checkpoint is made; a resumed trial, whose number is new and whose
    ``resumed_from`` attribute is the old one, begins after the epoch of the checkpoint, with every
    part as it was. On a CPU it goes on as if it had never been paused, bit for bit, if ``parts``
    and the random streams below are all that training depends on. Checkpoints are artifacts of
    their trial; that of a resumed trial is deleted when its next one is made or it reaches
    ``total``, so that there is at most one for each configuration.

    Args:
        trial: The running trial.
        total: Epochs of full training, the pruner's ``max_resource``.
        store: An Optuna artifact store, such as ``FileSystemArtifactStore``.
        parts: What is saved, by name: whatever has ``state_dict`` and ``load_state_dict`` (network,
            optimizer, schedule, scaler) or is a ``torch.Generator``. The default streams of torch,
            CUDA, NumPy and ``random`` are saved with them.

    Yields:
        Epoch numbers from 1.

    Raises:
        optuna.TrialPruned: Where the pruner stops or pauses the trial, or where another trial is
            already at work on the same checkpoint.
        ValueError: If the checkpoint holds other parts.
    """
    first, earlier = 1, trial.user_attrs.get(CHECKPOINT)
    if RESUMED_FROM in trial.user_attrs:
        trials = trial.study.get_trials(deepcopy=False)
        if is_duplicate(trials[trial.number], trials):
            raise optuna.TrialPruned(f"trial {trial.user_attrs[RESUMED_FROM]} is resumed by another")
        first = _thaw(trial, store, parts) + 1
    for epoch in range(first, total + 1):
        yield epoch
        pruned = trial.should_prune()  # also at the end: a worker is free for a paused trial then
        if pruned and epoch < total:
            if paused_at(trial.study.get_trials(deepcopy=False)[trial.number], epoch):
                _freeze(trial, epoch, store, parts)
                _delete(store, earlier)
            raise optuna.TrialPruned
    _delete(store, earlier)


def checkpoint_bytes(study: optuna.Study) -> int:
    """Return what the checkpoints of a study's paused trials take on disk."""
    trials = study.get_trials(deepcopy=False)
    made = [t.user_attrs[CHECKPOINT] for t in trials if CHECKPOINT in t.user_attrs]
    sizes = {checkpoint["artifact"]: int(checkpoint["bytes"]) for checkpoint in made}
    for trial in trials:
        source = trial.user_attrs.get(RESUMED_FROM)
        if source is None or trial.state not in (TrialState.COMPLETE, TrialState.PRUNED):
            continue
        if (trial.last_step or 0) > (trials[source].last_step or 0):  # else a duplicate
            sizes.pop(trials[source].user_attrs[CHECKPOINT]["artifact"], None)
    return sum(sizes.values())


def _freeze(trial: optuna.Trial, epoch: int, store: Any, parts: Mapping[str, Any]) -> None:
    content = {"epoch": epoch, _STREAMS: _streams(), "parts": {n: _state(p) for n, p in parts.items()}}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"trial-{trial.number}-epoch-{epoch}.pt"
        torch.save(content, file)
        size = file.stat().st_size
        identifier = upload_artifact(artifact_store=store, file_path=str(file), study_or_trial=trial)
    trial.set_user_attr(CHECKPOINT, {"artifact": identifier, "epoch": epoch, "bytes": size})


def _thaw(trial: optuna.Trial, store: Any, parts: Mapping[str, Any]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "checkpoint.pt"
        identifier = trial.user_attrs[CHECKPOINT]["artifact"]
        download_artifact(artifact_store=store, file_path=str(file), artifact_id=identifier)
        content = torch.load(file, weights_only=True, map_location="cpu")
    if content["parts"].keys() != parts.keys():
        raise ValueError(
            f"the checkpoint of trial {trial.user_attrs[RESUMED_FROM]} holds {sorted(content['parts'])}, "
            f"asked for {sorted(parts)}; pass the same parts as when it was made"
        )
    for name, part in parts.items():
        state = content["parts"][name]
        if isinstance(part, torch.Generator):
            part.set_state(state)
        else:
            part.load_state_dict(state)
    _restore(content[_STREAMS])
    return int(content["epoch"])


def _delete(store: Any, checkpoint: Mapping[str, Any] | None) -> None:
    if checkpoint is not None:
        store.remove(checkpoint["artifact"])


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
