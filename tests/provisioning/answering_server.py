"""A server on the loopback address that gives prepared answers, and keeps what it was asked."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any


def answer(status: int, body: object = "", *, headers: Mapping[str, str] | None = None) -> str:
    """A whole answer; a body that is no text is sent as JSON."""
    text = body if isinstance(body, str) else json.dumps(body)
    lines = [f"HTTP/1.1 {status} Said", f"Content-Length: {len(text.encode())}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join([*lines, "", text])


def problem(status: int, detail: str, *, headers: Mapping[str, str] | None = None) -> str:
    """An error as RunPod writes it."""
    return answer(status, {"title": "x", "status": status, "detail": detail}, headers=headers)


class AnsweringServer:
    """Reads one request on each connection and gives the next answer, the last one again and again.

    With `stays_open` the connection is not closed after the answer: an event stream that goes on.
    """

    def __init__(self, *answers: str, stays_open: bool = False) -> None:
        self.heads: list[str] = []
        self.bodies: list[Any] = []
        self.url = ""
        self._answers: Sequence[str] = answers
        self._stays_open = stays_open
        self._over = asyncio.Event()

    async def __aenter__(self) -> AnsweringServer:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v2"
        return self

    async def __aexit__(self, *error: object) -> None:
        self._over.set()
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = next(
            (
                int(line.split(":")[1])
                for line in head.splitlines()
                if line.lower().startswith("content-length")
            ),
            0,
        )
        body = await reader.readexactly(length)
        self.heads.append(head)
        self.bodies.append(json.loads(body) if body else None)
        writer.write(self._answers[min(len(self.heads), len(self._answers)) - 1].encode())
        await writer.drain()
        if self._stays_open:
            await self._over.wait()
        writer.close()
