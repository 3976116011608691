"""The ways into a pod: forwarded TCP ports, and the HTTP proxy."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable

import httpx
from starlette.requests import Request
from starlette.responses import Response

from openweights_prefect.simulator.clock import Clock
from openweights_prefect.simulator.model import Pod

_HOST = "127.0.0.1"
_PROXY_SECONDS = 100.0
"""RunPod's proxy gives up after this."""
_HOP_HEADERS = ("host", "connection", "transfer-encoding", "content-length", "content-encoding")


class Ports:
    """Where the containers listen, and what leads there."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._listen: dict[str, dict[str, int]] = {}
        self._servers: dict[str, list[asyncio.Server]] = {}

    async def open(self, pod: Pod) -> dict[str, int]:
        """Draw new ports for a pod; returns where the container must bind, by the port that it asked for."""
        self.close(pod.id)
        wanted = [text.partition("/") for text in pod.ports]
        listen = {private: _free_port() for private, _, _ in wanted}
        pod.public_ports = {}
        self._listen[pod.id], self._servers[pod.id] = listen, []
        for private, _, kind in wanted:
            if kind == "tcp":
                server = await asyncio.start_server(self._forward(pod, listen[private]), _HOST, 0)
                self._servers[pod.id].append(server)
                pod.public_ports[private] = server.sockets[0].getsockname()[1]
        return listen

    def listen(self, pod_id: str) -> dict[str, int]:
        """The ports that were drawn."""
        return self._listen.get(pod_id, {})

    def close(self, pod_id: str) -> None:
        """Nothing leads into the pod any more."""
        self._listen.pop(pod_id, None)
        for server in self._servers.pop(pod_id, []):
            server.close()

    async def proxy(self, pod: Pod | None, port: str, request: Request) -> Response:
        """The answer of `https://{podId}-{port}.proxy.runpod.net`."""
        if pod is None:
            return Response("404 page not found", 404)
        listen = self.listen(pod.id).get(port)
        if listen is None or f"{port}/http" not in pod.ports:
            return Response("Bad gateway", 502)
        ask = asyncio.create_task(_ask(listen, request, await request.body()))
        limit = asyncio.create_task(self._clock.sleep(_PROXY_SECONDS))
        waiting = {limit} if pod.has("host_unreachable", self._clock.now()) else {ask, limit}
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if ask in waiting and ask.done():
                return ask.result()
            return Response("A timeout occurred", 524)
        except httpx.HTTPError:
            return Response("Bad gateway", 502)
        finally:
            ask.cancel()
            limit.cancel()

    def _forward(
        self, pod: Pod, listen: int
    ) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], asyncio.Future[None]]:
        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> asyncio.Future[None]:
            return asyncio.ensure_future(self._pass_on(pod, listen, reader, writer))

        return accept

    async def _pass_on(
        self, pod: Pod, listen: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        with contextlib.suppress(OSError):
            if pod.has("host_unreachable", self._clock.now()):
                await reader.read()
            else:
                inner_reader, inner_writer = await asyncio.open_connection(_HOST, listen)
                await asyncio.gather(_copy(reader, inner_writer), _copy(inner_reader, writer))
        writer.close()


async def _ask(listen: int, request: Request, body: bytes) -> Response:
    headers = {k: v for k, v in request.headers.items() if k not in _HOP_HEADERS}
    url = f"http://{_HOST}:{listen}/{request.path_params['path']}"
    async with httpx.AsyncClient(trust_env=False, timeout=None) as client:
        answer = await client.request(
            request.method, url, params=request.query_params, content=body, headers=headers
        )
    kept = {k: v for k, v in answer.headers.items() if k not in _HOP_HEADERS}
    return Response(answer.content, answer.status_code, kept)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while block := await reader.read(65536):
            writer.write(block)
            await writer.drain()
    with contextlib.suppress(OSError):
        writer.write_eof()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        port: int = probe.getsockname()[1]
        return port
