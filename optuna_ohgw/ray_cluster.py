"""A Ray cluster to work on: one that is there, or one of this machine for the time of a run."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import secrets
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from multiprocessing.connection import Connection
from typing import Any
from urllib.parse import urlsplit

from optuna_ohgw.errors import UserError
from optuna_ohgw.processes import SIGNALS, deaf

_OBJECTS = 100 * 2**20  # bytes of shared memory, the least that Ray takes is 75 MB; a spec is a few kB
_CONNECT_S = 10.0
_SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
# Without it Ray listens on every interface of a Linux machine, whatever address it is given.
_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
_QUIET: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}


def check_ray() -> None:
    """Raise a UserError unless Ray is installed."""
    if find_spec("ray") is None:
        raise UserError("--engine: ray is not installed; pip install 'optuna-ohgw[ray]'")


@contextlib.contextmanager
def cluster_of_this_machine(cpus: int, gpus: int) -> Iterator[str]:
    """Start a cluster, yield its address, and end it; it is for this process alone, on 127.0.0.1.

    It belongs to a process in a session of its own. A signal to this one's group, such as Ctrl-C, would
    else end Ray's daemons before the workers have left a checkpoint; and that process ends the cluster
    when this one is gone, however it went. Cost: some 5 s, and a process that waits.

    Args:
        cpus: Processors that its workers may ask for, in all.
        gpus: GPUs, likewise.

    Raises:
        UserError: If it cannot be started.
    """
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    processes = multiprocessing.get_context("spawn")
    mine, theirs = processes.Pipe()
    host = processes.Process(target=_host, args=(theirs, cpus, gpus), name="optuna-ohgw-ray")
    with _environment({**_SETTINGS, **_LOOPBACK, **token}):
        with deaf():
            host.start()
        theirs.close()
        try:
            try:
                address, reason = mine.recv()
            except EOFError:
                address, reason = None, "its process ended"
            if address is None:
                raise UserError(f"--engine: ray cannot be started here ({reason}); use processes")
            yield address
        finally:
            mine.close()
            host.join()


@contextlib.contextmanager
def connected(address: str) -> Iterator[Any]:
    """Connect to the cluster at an address; yield Ray.

    Ray takes signals for itself when it connects: they wait meanwhile, and the handlers are put back.

    Raises:
        UserError: If no cluster that this process can use is there.
    """
    check_address(address)
    with _environment(_SETTINGS):
        import ray

        logging.getLogger("ray").setLevel(logging.ERROR)
        try:
            with deaf(), _handlers_kept():
                ray.init(address=address, **_QUIET)
        # SystemExit: Ray's own, after two minutes without an answer.
        except (ConnectionError, RuntimeError, ValueError, ImportError, SystemExit) as error:
            raise _no_cluster(address, _one_line(error)) from None
        try:
            yield ray
        finally:
            ray.shutdown()


@contextlib.contextmanager
def _handlers_kept() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables while inside."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def check_address(address: str) -> None:
    """Raise a UserError if nobody listens at a cluster's address: Ray would look for two minutes."""
    if address == "auto":
        return
    try:
        url = urlsplit(address if "://" in address else f"//{address}")
        if url.hostname is None or (url.port is None and "://" not in address):
            raise ValueError("it is no HOST:PORT, ray://HOST:PORT or auto")
        socket.create_connection((url.hostname, url.port or 10001), _CONNECT_S).close()
    except (OSError, ValueError) as error:
        raise _no_cluster(address, _one_line(error)) from None


def _no_cluster(address: str, reason: str) -> UserError:
    return UserError(
        f"--address: no cluster at {address!r} can be used ({reason}); start one by 'ray start', or drop "
        "the address"
    )


def _one_line(error: BaseException) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:300].rstrip(".")


def _host(pipe: Connection, cpus: int, gpus: int) -> None:
    """Hold a cluster until the other end of the pipe is closed."""
    os.setsid()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    import ray

    # Short, since the path of a socket is limited; not of others to read.
    root = os.environ.get("RAY_TMPDIR", "/tmp")
    try:
        with tempfile.TemporaryDirectory(prefix="ohgw-", dir=root, ignore_cleanup_errors=True) as folder:
            ray.init(
                address="local",
                num_cpus=cpus,
                num_gpus=gpus,
                object_store_memory=_OBJECTS,
                include_dashboard=False,
                _node_ip_address="127.0.0.1",
                _temp_dir=folder,
                **_QUIET,
            )
            with contextlib.suppress(EOFError, OSError):
                pipe.send((ray.get_runtime_context().gcs_address, ""))
                pipe.recv()
            ray.shutdown()
    except Exception as error:
        with contextlib.suppress(OSError):
            pipe.send((None, _one_line(error)))
