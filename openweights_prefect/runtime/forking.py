"""Asks the preloaded process of this pod for a job's process.

An order is one JSON line, `{"token", "module", "arguments", "folder", "environment"}`, with the descriptors
of standard output and error. The answer is `{"pid": n}` and later `{"exit": code}`, or `{"refused": why}`.
When the connection ends before the process does, that is killed with its group. Standard library only.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SOCKET_VARIABLE = "OW_PRELOADED_SOCKET"
TOKEN_VARIABLE = "OW_PRELOADED_TOKEN"
"""In the environment of a flow alone: jobs are not told."""

UNMARKED = "00000000-0000-0000-0000-000000000000"
"""The run in the environment that the preloaded process starts with: each child writes its own over it."""
ANSWER_SECONDS = 5.0

_OURS = re.compile(r"python -m (openweights_prefect(?:\.\w+)+)((?: \w+)*)")


class Forked:
    """A process that the preloaded one forked; its interface is that of asyncio's processes."""

    def __init__(self, connection: socket.socket, pid: int, received: bytes) -> None:
        self.pid = pid
        self._connection = connection
        self._received = received

    async def wait(self) -> int:
        """Its exit code, negative for a signal. To be awaited once; when that is cancelled, it is killed."""
        self._connection.setblocking(False)
        reader, writer = await asyncio.open_unix_connection(sock=self._connection)
        try:
            line = self._received
            if not line.endswith(b"\n"):
                line += await reader.readline()
        except ConnectionError:
            line = b""
        finally:
            writer.close()
        # Without an answer the preloaded process has died, and its children with it.
        return int(json.loads(line)["exit"]) if line else -signal.SIGKILL


def fork(command: str, *, folder: Path, environment: Mapping[str, str]) -> Forked | None:
    """Start a command as a fork, its output going where this process's goes.

    None when the command is none of ours, when there is no preloaded process, and when that refuses: it takes
    only what it has imported, for jobs without environment variables of their own.
    """
    path, token = os.environ.get(SOCKET_VARIABLE), os.environ.get(TOKEN_VARIABLE, "")
    ours = _OURS.fullmatch(command)
    if path is None or ours is None:
        return None
    order = {
        "token": token,
        "module": ours[1],
        "arguments": ours[2].split(),
        "folder": str(folder),
        "environment": dict(environment),
    }
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(ANSWER_SECONDS)
        connection.connect(path)
        data = json.dumps(order).encode() + b"\n"
        sent = socket.send_fds(connection, [data], [1, 2])
        connection.sendall(data[sent:])
        answer, rest = _read_line(connection)
        return Forked(connection, int(answer["pid"]), rest)
    except (OSError, ValueError, KeyError):
        connection.close()
        return None


def _read_line(connection: socket.socket) -> tuple[dict[str, Any], bytes]:
    data = b""
    while b"\n" not in data:
        more = connection.recv(4096)
        if not more:
            raise ConnectionResetError
        data += more
    line, rest = data.split(b"\n", 1)
    return dict(json.loads(line)), rest
