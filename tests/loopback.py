"""Servers of a test on 127.0.0.1: an ASGI application in a thread, a program in a process."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

_START_SECONDS = 60
_STOP_SECONDS = 20


@contextlib.contextmanager
def serve(app: Any) -> Iterator[str]:
    """Serve an ASGI application meanwhile; gives its base URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(_STOP_SECONDS)
        listener.close()


@dataclass(frozen=True)
class Service:
    """A program that serves HTTP, and the file of all that it printed."""

    url: str
    output: Path

    def printed(self) -> str:
        return self.output.read_text(encoding="utf-8", errors="replace")


@contextlib.contextmanager
def run_service(
    command: Sequence[str | Path], *, output: Path, port: str, environment: Mapping[str, str]
) -> Iterator[Service]:
    """Run a program meanwhile; the regular expression `port` finds its port in what it prints."""
    with output.open("wb") as stream:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
        )
    try:
        number = _await_port(process, output, port)
        yield Service(f"http://127.0.0.1:{number}", output)
    finally:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _await_port(process: subprocess.Popen[bytes], output: Path, port: str) -> str:
    deadline = time.monotonic() + _START_SECONDS
    while True:
        text = output.read_text(encoding="utf-8", errors="replace")
        match = re.search(port, text)
        if match is not None:
            return match[1]
        assert process.poll() is None, text
        assert time.monotonic() < deadline, text
        time.sleep(0.02)
