"""A Prefect server of a test, on SQLite."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from cryptography.fernet import Fernet

from openweights_prefect.settings import Settings
from openweights_prefect.stack import health
from openweights_prefect.stack.environment import QUIET_PREFECT, REFUSE_OUTSIDE

START_SECONDS = 120


class PrefectServer(NamedTuple):
    """A running server."""

    url: str
    database: Path
    home: Path

    @property
    def settings(self) -> Settings:
        """What a process that uses it reads."""
        return Settings.load(self.environment)

    @property
    def environment(self) -> dict[str, str]:
        """For a process that uses it, and has nothing else."""
        return {
            "PATH": os.defpath,
            "HOME": str(self.home),
            "OW_HOME": str(self.home / "openweights"),
            "PREFECT_API_URL": self.url,
            **QUIET_PREFECT,
        }


@contextmanager
def running(home: Path) -> Iterator[PrefectServer]:
    """A server meanwhile."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    server = PrefectServer(f"http://127.0.0.1:{port}/api", home / "prefect.db", home)
    environment = {
        **server.environment,
        **REFUSE_OUTSIDE,
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": "",
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{server.database}",
        "PREFECT_SERVER_ENCRYPTION_KEY": Fernet.generate_key().decode(),
        "PREFECT_SERVER_LOGGING_LEVEL": "ERROR",
    }
    command = [
        sys.executable,
        "-P",
        "-m",
        "prefect",
        "server",
        "start",
        "--host",
        "127.0.0.1",
        "--port",
        port,
    ]
    with (home / "server.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not health.answers(f"{server.url}/health"):
            assert process.poll() is None, (home / "server.log").read_text()
            assert time.monotonic() < deadline, "the Prefect server did not start"
            time.sleep(0.1)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
