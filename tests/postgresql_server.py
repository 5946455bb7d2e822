"""A PostgreSQL server of its own on loopback, for tests that need a real one."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from proxy_server import free_port

USER, PASSWORD = "ohgw", "not-to-be-shown"


def binaries():
    """Return the folder of the newest server's programs, None if there is none."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda p: float(p.parts[-3]))
    on_path = shutil.which("postgres")
    return found[-1].parent if found else Path(on_path).parent if on_path else None


class Server:
    """A server with its data in a folder of its own; on 127.0.0.1 alone, and it asks for a password.

    Under root it runs as the user postgres. The folder is none of pytest's, which another session of
    pytest makes root's alone when it starts.
    """

    def __init__(self):
        programs = binaries()
        if programs is None:
            raise FileNotFoundError("no PostgreSQL server: apt-get install postgresql")
        self.programs, self.folder = programs, Path(tempfile.mkdtemp(prefix="postgresql-"))
        secret = self.folder / "password"
        secret.write_text(PASSWORD)
        if os.geteuid() == 0:
            for path in (self.folder, secret):
                shutil.chown(path, "postgres")
        options = ("--auth=scram-sha-256", f"--pwfile={secret}", "--encoding=UTF8", "--no-sync")
        _run(programs / "initdb", "-D", self.folder / "data", "-U", USER, *options)
        self.port = free_port()

    @property
    def url(self):
        return f"postgresql+psycopg://{USER}:{PASSWORD}@127.0.0.1:{self.port}/postgres"

    @property
    def plain_url(self):
        return self.url.replace("+psycopg", "")

    @property
    def pid(self):
        return int((self.folder / "data" / "postmaster.pid").read_text().split()[0])

    def start(self):
        options = f"-p {self.port} -h 127.0.0.1 -c unix_socket_directories='' -c fsync=off"
        self._control("-l", self.folder / "log", "-w", "-o", options, "start")

    def stop(self, mode="immediate"):
        self._control("-m", mode, "-w", "stop")

    def _control(self, *arguments):
        _run(self.programs / "pg_ctl", "-D", self.folder / "data", *arguments)


@contextlib.contextmanager
def server():
    """Yield a running server, and leave nothing of it."""
    one = Server()
    try:
        one.start()
        yield one
    finally:
        with contextlib.suppress(subprocess.CalledProcessError):  # a test may have left it stopped
            one.stop()
        shutil.rmtree(one.folder)


def _run(*command):
    as_other = ("runuser", "-u", "postgres", "--") if os.geteuid() == 0 else ()
    subprocess.run(
        [*as_other, *map(str, command)],
        check=True,
        cwd="/",
        env={**os.environ, "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
