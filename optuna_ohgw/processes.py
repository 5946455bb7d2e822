"""Worker processes that start with their imports done."""

from __future__ import annotations

import gc
import multiprocessing
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.context import BaseContext

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_PRELOADED = ["optuna_ohgw.preloaded"]
_FORKSERVER = "forkserver"


@contextmanager
def uncollected() -> Iterator[None]:
    """Import inside without the garbage collector, which finds nothing there in a fifth of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextmanager
def deaf() -> Iterator[None]:
    """Block signals, for processes that are started inside until they can ignore them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def prepare() -> None:
    """Begin the workers' imports in a process of their own, beside this one's work.

    The workers of :func:`context` are forked from it. Cost: one more process that waits.
    """
    if _FORKSERVER not in multiprocessing.get_all_start_methods():
        return
    from multiprocessing import forkserver, resource_tracker

    multiprocessing.set_forkserver_preload(_PRELOADED)
    resource_tracker.ensure_running()  # its start unblocks the signals again
    with deaf():
        forkserver.ensure_running()


def context(device_type: str) -> BaseContext:
    """Return the context in which to start workers.

    On a GPU they are started afresh: CUDA does not survive a fork of a process that asked for it.
    """
    if device_type != "cpu" or _FORKSERVER not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    prepare()
    return multiprocessing.get_context(_FORKSERVER)
