"""What befalls an answer on the wire: resets, silence, half of it."""

from __future__ import annotations

import socket
import struct
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from openweights_prefect.simulator.clock import Clock
from openweights_prefect.simulator.faults import Rule

_PIECES = 10
_RESET_AT_CLOSE = struct.pack("ii", 1, 0)
"""SO_LINGER without a time: closing the socket sends RST."""

Connections = Callable[[], Any]
"""The server's open connections, each with the `client` and the `transport`."""


class Dropped(Response):
    """No answer: silence for a while, then the connection is reset."""

    def __init__(self, connections: Connections, clock: Clock, *, hold_seconds: float = 0) -> None:
        super().__init__()
        self._connections = connections
        self._clock = clock
        self._hold_seconds = hold_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer nothing."""
        await self._clock.sleep(self._hold_seconds)
        for connection in [*self._connections()]:
            if connection.client == scope["client"]:
                raw = connection.transport.get_extra_info("socket")
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_AT_CLOSE)
                connection.transport.abort()
        # Until the server has noticed: it would answer 500 for an answer that never came.
        while (await receive())["type"] != "http.disconnect":
            pass


def spoiled(response: Response, rule: Rule, clock: Clock) -> Response:
    """An answer as `slow_body` or `truncated_json` leave it; one that is a stream stays whole."""
    if isinstance(response, StreamingResponse):
        return response
    body = bytes(response.body)
    headers = dict(response.headers)
    if rule.name == "truncated_json":
        kept = body[: int(len(body) * rule.number("fraction", 0.5))]
        headers.pop("content-length", None)
        return Response(kept, response.status_code, headers)
    pieces = _pieces(body, rule.number("seconds", 5), clock)
    return StreamingResponse(pieces, response.status_code, headers)


async def _pieces(body: bytes, seconds: float, clock: Clock) -> AsyncIterator[bytes]:
    size = max(1, -(-len(body) // _PIECES))
    for start in range(0, len(body), size):
        await clock.sleep(seconds / _PIECES)
        yield body[start : start + size]
