"""Optuna's gRPC proxy as a process on loopback."""

from __future__ import annotations

import contextlib
import random
import socket
import subprocess
import sys
import time

_SERVE = (
    "import sys, optuna; from optuna.storages import get_storage, run_grpc_proxy_server as run; "
    "run(get_storage(sys.argv[1]), host='127.0.0.1', port=int(sys.argv[2]))"
)


def free_port():
    """Return a port that no client is given: one that calls a stopped server may be connected to itself."""
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port
    raise OSError("no port is free")


def proxy_of(url, port):
    """Start a server before a database; return its process when it listens."""
    process = subprocess.Popen([sys.executable, "-c", _SERVE, url, str(port)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.1):
            return process
        time.sleep(0.05)
    process.kill()
    raise TimeoutError("the proxy's server did not start")
