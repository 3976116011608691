"""Chooses TCP ports of this machine."""

from __future__ import annotations

import contextlib
import errno
import socket
import time

import psutil

from openweights_prefect.errors import StackError

HOST = "127.0.0.1"
_NEXT_PORTS = 100
_FREE_SECONDS = 1.0


def is_free(port: int) -> bool:
    """Whether a server could listen on the port now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as exc:
            if exc.errno in (errno.EADDRINUSE, errno.EACCES):
                return False
            raise
    return True


def choose(wanted: int, *, variable: str, required: bool, taken: frozenset[int] = frozenset()) -> int:
    """`wanted` if it is free, else the next that is; `StackError` instead when it is required."""
    if not 1 <= wanted <= 65535:
        raise StackError(f"{variable}={wanted!r} is not a port. Set it to a number from 1 to 65535.")
    if wanted not in taken and _becomes_free(wanted):
        return wanted
    if required:
        raise StackError(
            f"Port {wanted} ({variable}) is in use{_by_whom(wanted)}. "
            f"End that process, or set {variable} to a free port."
        )
    for port in range(wanted + 1, min(wanted + _NEXT_PORTS, 65536)):
        if port not in taken and is_free(port):
            return port
    raise StackError(
        f"No port from {wanted} to {wanted + _NEXT_PORTS} is free. Set {variable} to a free port."
    )


def _becomes_free(port: int) -> bool:
    """A server that was just killed may hold its port for a moment."""
    deadline = time.monotonic() + _FREE_SECONDS
    while not (free := is_free(port)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return free


def _by_whom(port: int) -> str:
    # Other accounts' sockets can be looked up by root only.
    with contextlib.suppress(psutil.Error, RuntimeError):
        for connection in psutil.net_connections("tcp"):
            listens = connection.status == psutil.CONN_LISTEN and connection.laddr[1:2] == (port,)
            if listens and connection.pid:
                return f" by process {connection.pid} ({psutil.Process(connection.pid).name()})"
    return ""
