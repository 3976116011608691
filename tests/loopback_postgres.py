"""A PostgreSQL server on 127.0.0.1 with passwords, for clients that know no Unix sockets."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg

from openweights_prefect.ledger import embedded_layout
from openweights_prefect.ledger.binaries import PostgresBinaries, find_binaries

_START_SECONDS = 60


@dataclass(frozen=True)
class LoopbackPostgres:
    """The server; `superuser` is the name of its first role, as which everybody has the same password."""

    port: int
    password: str
    superuser: str = "supabase_admin"

    def url(self, *, database: str = "postgres", user: str | None = None) -> str:
        address = f"127.0.0.1:{self.port}/{database}"
        return f"postgresql://{user or self.superuser}:{self.password}@{address}?sslmode=disable"


@contextlib.contextmanager
def loopback_postgres(binaries: PostgresBinaries | None = None) -> Iterator[LoopbackPostgres]:
    """Run a server of its own meanwhile."""
    binaries = binaries or find_binaries()
    folder = Path(tempfile.mkdtemp(prefix="ow-test-tcp-"))
    folder.chmod(0o755)
    account = embedded_layout.locate(folder).account  # PostgreSQL refuses to run as root.
    home = folder / "home"
    home.mkdir(mode=0o700)
    server = LoopbackPostgres(_free_port(), secrets.token_hex(16))
    (home / "password").write_text(server.password, encoding="utf-8")
    for path in (home, home / "password"):
        os.chown(path, account.uid, account.gid)
    with (folder / "log").open("wb") as log:
        options = ["--auth=scram-sha-256", f"--pwfile={home / 'password'}", "--no-sync", "--encoding=UTF8"]
        made = account.spawn(
            [binaries.initdb, f"--pgdata={home / 'data'}", f"--username={server.superuser}", *options],
            output=log,
        )
        assert made.wait(timeout=_START_SECONDS) == 0, (folder / "log").read_text()
        settings = {"listen_addresses": "127.0.0.1", "port": server.port, "unix_socket_directories": ""}
        arguments = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        process = account.spawn(
            [binaries.postgres, "-D", home / "data", *arguments, "-c", "fsync=off"], output=log
        )
        try:
            _await_server(server, process, folder / "log")
            yield server
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=30)
            shutil.rmtree(folder)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _await_server(server: LoopbackPostgres, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            psycopg.connect(server.url(), connect_timeout=5).close()
            return
        except psycopg.OperationalError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
