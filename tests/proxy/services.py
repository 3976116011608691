"""What the proxy stands between, as processes: a Prefect server with a password. And the proxy."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from openweights_prefect.stack import health
from openweights_prefect.stack.environment import QUIET_PREFECT, REFUSE_OUTSIDE

PASSWORD = "admin:the-password-of-the-server"
_START_SECONDS = 120


@contextmanager
def prefect_server(home: Path) -> Iterator[str]:
    """The address of the API of a server with a password, on SQLite."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {
        **_plain(home),
        **REFUSE_OUTSIDE,
        "PREFECT_SERVER_API_AUTH_STRING": PASSWORD,
        "PREFECT_API_AUTH_STRING": PASSWORD,
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{home / 'prefect.db'}",
        "PREFECT_SERVER_LOGGING_LEVEL": "ERROR",
    }
    command = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", port, "--no-ui"]
    url = f"http://127.0.0.1:{port}/api"
    with _running(command, environment, home / "server.log") as process:
        deadline = time.monotonic() + _START_SECONDS
        while not health.answers(f"{url}/health"):
            assert process.poll() is None, (home / "server.log").read_text()
            assert time.monotonic() < deadline, "the Prefect server did not start"
            time.sleep(0.1)
        yield url


@contextmanager
def proxy(home: Path, *, api_url: str, database_url: str) -> Iterator[str]:
    """The address that pods are given; `home / "proxy.log"` is all that the proxy says."""
    environment = {
        **_plain(home),
        "PREFECT_API_URL": api_url,
        "PREFECT_API_AUTH_STRING": PASSWORD,
        "OW_DATABASE_URL": database_url,
        "PYTHONUNBUFFERED": "1",
    }
    log = home / "proxy.log"
    with _running(["openweights_prefect.proxy", "--port", "0"], environment, log) as process:
        deadline = time.monotonic() + _START_SECONDS
        while not log.read_text().startswith("http://") or "\n" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, "the proxy did not start"
            time.sleep(0.05)
        yield log.read_text().splitlines()[0]


def _plain(home: Path) -> dict[str, str]:
    return {
        "PATH": os.defpath,
        "HOME": str(home),
        "OW_HOME": str(home / "openweights"),
        "PREFECT_HOME": str(home / "prefect"),
        **QUIET_PREFECT,
    }


@contextmanager
def _running(
    module: list[str], environment: Mapping[str, str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-P", "-m", *module]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, stdin=subprocess.DEVNULL
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
