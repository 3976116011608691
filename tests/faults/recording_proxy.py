"""A TCP proxy that keeps what passes through it, to see what a client really sends."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from dataclasses import dataclass, field

_EXTENSIONS = re.compile(rb"\r\nsec-websocket-extensions:[^\r]*", re.IGNORECASE)
_WEBSOCKET = re.compile(rb"\r\nupgrade: *websocket", re.IGNORECASE)


@dataclass
class _Connection:
    """What one connection carried, each way."""

    sent: bytearray = field(default_factory=bytearray)
    received: bytearray = field(default_factory=bytearray)


class RecordingProxy:
    """Listens on a port of 127.0.0.1 and passes connections on to another one."""

    def __init__(self, port: int) -> None:
        self._target = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._connections: list[_Connection] = []
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def recorded(self) -> bytes:
        """Everything that passed so far; WebSocket messages of clients as they were before masking."""
        parts = []
        for connection in [*self._connections]:
            parts += [_unmasked(bytes(connection.sent)), bytes(connection.received)]
        return b"\n".join(parts)

    def close(self) -> None:
        """Take no more connections."""
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        connection = _Connection()
        self._connections.append(connection)
        with client, contextlib.suppress(OSError), socket.create_connection(self._target) as server:
            back = threading.Thread(target=_pump, args=(server, client, connection.received), daemon=True)
            back.start()
            head = b""
            while b"\r\n\r\n" not in head and (data := client.recv(65536)):
                head += data
            if _WEBSOCKET.search(head):
                head = _EXTENSIONS.sub(b"", head)  # nothing is compressed then
            connection.sent += head
            server.sendall(head)
            _pump(client, server, connection.sent)
            back.join()


def _pump(source: socket.socket, target: socket.socket, record: bytearray) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            record += data
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def _unmasked(sent: bytes) -> bytes:
    head, separator, frames = sent.partition(b"\r\n\r\n")
    if not _WEBSOCKET.search(head):
        return sent
    messages = [head, separator]
    while len(frames) >= 2:
        length, at = frames[1] & 0x7F, 2
        if length >= 126:
            size = 2 if length == 126 else 8
            length, at = int.from_bytes(frames[at : at + size], "big"), at + size
        mask, at = frames[at : at + 4], at + 4
        content = frames[at : at + length]
        key = int.from_bytes((mask * (len(content) // 4 + 1))[: len(content)], "big")
        messages.append((int.from_bytes(content, "big") ^ key).to_bytes(len(content), "big"))
        frames = frames[at + length :]
    return b"".join(messages)
