"""A MySQL server (MariaDB) of its own on loopback, for tests that need a real one."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import psutil
import pymysql
from proxy_server import free_port

USER, PASSWORD = "ohgw", "not-to-be-shown"
START_S = 60.0


def programs():
    """Return the server and the program that makes its data, None if they are not installed."""
    path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/usr/bin"))
    found = [shutil.which(name, path=path) for name in ("mariadbd", "mariadb-install-db")]
    return tuple(found) if all(found) else None


class Server:
    """A server with its data in a folder of its own; on 127.0.0.1 alone, and it asks for a password.

    Under root it runs as the user mysql.
    """

    def __init__(self):
        self.server, install = programs()
        self.folder, self.port, self.process = Path(tempfile.mkdtemp(prefix="mysql-")), free_port(), None
        self.user = ["--user=mysql"] if os.geteuid() == 0 else []
        if self.user:
            shutil.chown(self.folder, "mysql")
        options = [f"--datadir={self.folder / 'data'}", "--skip-test-db", "--skip-log-bin"]
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run([install, "--no-defaults", *self.user, *options], check=True, **quiet)
        (self.folder / "begin.sql").write_text(
            f"CREATE USER IF NOT EXISTS {USER}@'127.0.0.1' IDENTIFIED BY '{PASSWORD}';\n"
            f"GRANT ALL ON *.* TO {USER}@'127.0.0.1';\n"
        )
        if self.user:
            shutil.chown(self.folder / "begin.sql", "mysql")

    def url(self, database):
        return f"mysql+pymysql://{USER}:{PASSWORD}@127.0.0.1:{self.port}/{database}"

    def create(self, database):
        """Make a database; return its URL."""
        with self._connection() as connection:
            connection.cursor().execute(f"CREATE DATABASE {database}")
        return self.url(database)

    def start(self):
        options = [f"--datadir={self.folder / 'data'}", f"--port={self.port}", "--bind-address=127.0.0.1"]
        options += [f"--socket={self.folder / 'socket'}", f"--init-file={self.folder / 'begin.sql'}"]
        # 2: a commit outlives the process, which is what these tests end.
        options += ["--skip-name-resolve", "--innodb-flush-log-at-trx-commit=2"]
        with (self.folder / "log").open("ab") as log:
            self.process = psutil.Popen(
                [self.server, "--no-defaults", *self.user, *options], stdout=log, stderr=log
            )
        until = time.monotonic() + START_S
        while True:
            try:
                self._connection().close()
                return
            except pymysql.OperationalError:
                if time.monotonic() > until or self.process.poll() is not None:
                    raise RuntimeError((self.folder / "log").read_text()) from None
                time.sleep(0.1)

    def stop(self, number=signal.SIGKILL):
        self.process.send_signal(number)
        self.process.wait()

    def _connection(self):
        return pymysql.connect(host="127.0.0.1", port=self.port, user=USER, password=PASSWORD)


@contextlib.contextmanager
def server():
    """Yield a running server, and leave nothing of it."""
    one = Server()
    try:
        one.start()
        yield one
    finally:
        if one.process is not None and one.process.poll() is None:
            one.stop()
        shutil.rmtree(one.folder)
