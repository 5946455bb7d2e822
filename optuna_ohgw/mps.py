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
log = logging.getLogger("optuna_ohgw.mps")


@contextmanager
def shared_gpu() -> Iterator[bool]:
    """Let the processes started inside compute on a GPU side by side; yield whether they do.

    Without the service the GPU does one process's kernels at a time. A daemon of its own is
    started, with its files in a temporary folder, tried by a process, and ended with the block;
    the GPU's settings stay. Where it is absent or refused, processes take turns as ever. A service
    that the user has set up, by ``CUDA_MPS_PIPE_DIRECTORY``, is left to the user.

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
    with tempfile.TemporaryDirectory(prefix="mps-") as folder:
        own = {**os.environ, PIPE: folder, LOG: folder}
        started = _done([control, "-d"], own)
        try:
            works = started and _done([sys.executable, "-c", _PROBE], own)
            if works:
                os.environ.update({PIPE: folder, LOG: folder})
            else:
                log.warning("%s cannot be used here; processes take turns on the GPU", CONTROL)
            yield works
        finally:
            for name in (PIPE, LOG):
                os.environ.pop(name, None)
            if started:
                _done([control], own, "quit\n")


def _done(command: list[str], environment: dict[str, str], text: str = "") -> bool:
    """Run a command; return whether it succeeded in time."""
    try:
        ended = subprocess.run(
            command,
            env=environment,
            input=text,
            text=True,
            timeout=_SECONDS,
            check=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return ended.returncode == 0
