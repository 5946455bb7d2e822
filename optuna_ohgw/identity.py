"""Which process this is, in words that a process on another machine can compare."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import psutil

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_PIDS = Path("/proc/self/ns/pid")


def identity() -> dict[str, Any]:
    """Return this process's host, boot, process number and when it was born (Unix seconds)."""
    return {**_place(), "pid": os.getpid(), "born": psutil.Process().create_time()}


def is_here(who: Mapping[str, Any]) -> bool:
    """Return whether a process numbers its processes as this one does: same machine, boot and container."""
    return all(who.get(name) == value for name, value in _place().items())


def lives(who: Mapping[str, Any]) -> bool:
    """Return whether a process of this machine is still there; its number may have been given again."""
    try:
        process = psutil.Process(int(who["pid"]))
        return process.create_time() == who["born"] and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@cache
def _place() -> dict[str, Any]:
    boot = _BOOT.read_text().strip() if _BOOT.exists() else psutil.boot_time()
    return {"host": socket.gethostname(), "boot": boot, "pids": os.readlink(_PIDS) if _PIDS.exists() else ""}
