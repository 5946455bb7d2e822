"""One GPU for several processes at the same time, by NVIDIA's Multi-Process Service."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

CONTROL = "nvidia-cuda-mps-control"
PIPE, LOG = "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"
_PROBE = "import torch; torch.zeros(1, device='cuda')"
_SECONDS = 60.0
_folders: set[str] = set()  # of daemons of this process
log = logging.getLogger("optuna_ohgw.mps")


@contextmanager
def shared_gpu() -> Iterator[bool]:
    """Let the processes started inside compute on a GPU side by side; yield whether they do.

    Without the service the GPU does one process's kernels at a time. A daemon of its own is
    started, with its files in a temporary folder, tried by a process, and ended with the block;
    the GPU's settings stay. Where it is absent or refused, processes take turns as ever. A service
    that the user has set up, by ``CUDA_MPS_PIPE_DIRECTORY``, is left to the user, unchecked.

    Cost: some 5 s.
    """
    if PIPE in os.environ:
        yield True
        return
    control = shutil.which(CONTROL)
    if control is None:
        log.info("%s is not installed; processes take turns on the GPU", CONTROL)
        yield False
        return
    # Short: the path of a socket is limited.
    with tempfile.TemporaryDirectory(prefix="mps-", ignore_cleanup_errors=True) as folder:
        own = {**os.environ, PIPE: folder, LOG: folder}
        # The daemon would count the GPUs that it sees anew, and its clients' numbers be others.
        unhidden = {name: value for name, value in own.items() if name != "CUDA_VISIBLE_DEVICES"}
        _folders.add(folder)
        try:
            # What the daemon says is not waited for: it may keep the pipe.
            started = _run([control, "-d"], unhidden, heard=False) is not None
            # A process that does not find the daemon computes without it: there must be a server.
            probe = started and _run([sys.executable, "-c", _PROBE], own) is not None
            works = probe and bool((_run([control], own, "get_server_list\n") or "").strip())
            if works:
                os.environ.update({PIPE: folder, LOG: folder})
            else:
                log.warning("%s cannot be used here; processes take turns on the GPU", CONTROL)
            yield works
        finally:
            _folders.discard(folder)
            for name in (PIPE, LOG):
                os.environ.pop(name, None)
            _run([control], own, "quit\n")


def end_now() -> None:
    """End the daemon of this process, if there is one: for a process that leaves no other way."""
    control = shutil.which(CONTROL)
    if control is None:
        return
    for folder in _folders:
        _run([control], {**os.environ, PIPE: folder, LOG: folder}, "quit\n", seconds=5.0)
        shutil.rmtree(folder, ignore_errors=True)


def _run(
    command: list[str],
    environment: dict[str, str],
    text: str = "",
    *,
    heard: bool = True,
    seconds: float = _SECONDS,
) -> str | None:
    """Run a command; return what it printed where that is ``heard``, None if it failed or took too long."""
    try:
        ended = subprocess.run(
            command,
            env=environment,
            input=text,
            text=True,
            timeout=seconds,
            check=False,
            stdout=subprocess.PIPE if heard else subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (ended.stdout or "") if ended.returncode == 0 else None
