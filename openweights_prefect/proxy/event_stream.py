"""Events over WebSockets: each message of a pod is judged like a request, each answer is its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
from starlette.websockets import WebSocket, WebSocketDisconnect
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as connect_upstream
from websockets.exceptions import WebSocketException
from websockets.typing import Subprotocol

from openweights_prefect.errors import LedgerUnavailable
from openweights_prefect.proxy.gate import Gate, NotAlive
from openweights_prefect.proxy.pods import token_of
from openweights_prefect.proxy.rules import Refused, demand_of_event, parsed

logger = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 2 << 20
_PROTOCOL = "prefect"
_POLICY_VIOLATION = 1008
_TRY_AGAIN = 1013
_WATCHED = "prefect.flow-run."
_ALIVE_SECONDS = 2.0
_ANSWER_SECONDS = 30.0
_TROUBLE = (WebSocketException, OSError, LedgerUnavailable, httpx.HTTPError)

Way = Callable[[str, WebSocket, ClientConnection], Awaitable[None]]


class EventStream:
    """The two event sockets of Prefect: `take_in` of what pods emit, `give_out` of what they wait for."""

    def __init__(self, *, gate: Gate, url: str, token: str) -> None:
        self._gate = gate
        self._url = "ws" + url.removeprefix("http")
        self._token = token

    async def take_in(self, socket: WebSocket) -> None:
        """Pass on events about the pod's own flow runs; others are left out, and the pod goes on."""
        await self._serve(socket, "/events/in", self._pass_in, _discard)

    async def give_out(self, socket: WebSocket) -> None:
        """Let a flow watch for events about itself: Prefect's engine does, to be suspended."""
        await self._serve(socket, "/events/out", self._ask, self._pass_out)

    async def _serve(self, socket: WebSocket, path: str, up: Way, down: Way) -> None:
        try:
            token = await self._accepted(socket)
            if token is None:
                return
            async with connect_upstream(
                self._url + path,
                subprotocols=[Subprotocol(_PROTOCOL)],
                max_size=MAX_MESSAGE_BYTES,
                proxy=None,
                open_timeout=_ANSWER_SECONDS,
            ) as upstream:
                await self._introduce(upstream)
                await socket.send_json({"type": "auth_success"})
                ways = (up(token, socket, upstream), down(token, socket, upstream), self._outlive(token))
                await _until_first(ways)
            await _close(socket, _TRY_AGAIN)
        except WebSocketDisconnect:
            return
        except Refused as exc:
            logger.info("Refused on %s: %s", path, exc)
            await _close(socket, _POLICY_VIOLATION)
        except _TROUBLE as exc:
            logger.info("A socket of %s ends: %s", path, type(exc).__name__)
            await _close(socket, _TRY_AGAIN)

    async def _accepted(self, socket: WebSocket) -> str | None:
        """Do Prefect's handshake; the token of a living pod, or None when it was turned away."""
        if _PROTOCOL not in socket.scope.get("subprotocols", []):
            await socket.close(_POLICY_VIOLATION)
            return None
        await socket.accept(subprotocol=_PROTOCOL)
        said = await _received(socket)
        token = said.get("token") if said.get("type") == "auth" else None
        for candidate in (token, token_of(socket.headers.get("authorization"))):
            if isinstance(candidate, str):
                with contextlib.suppress(NotAlive):
                    await self._gate.caller(candidate)
                    return candidate
        await socket.close(_POLICY_VIOLATION, "The token is not one of a living pod.")
        return None

    async def _introduce(self, upstream: ClientConnection) -> None:
        await upstream.send(json.dumps({"type": "auth", "token": self._token or None}))
        async with asyncio.timeout(_ANSWER_SECONDS):
            answer = json.loads(await upstream.recv())
        if answer.get("type") != "auth_success":
            raise OSError("Prefect does not accept the proxy's credential")

    async def _outlive(self, token: str) -> None:
        """A pod that has ended may not say so: return never, raise then."""
        while True:
            await asyncio.sleep(_ALIVE_SECONDS)
            await self._gate.caller(token)

    async def _pass_in(self, token: str, socket: WebSocket, upstream: ClientConnection) -> None:
        while True:
            text = await socket.receive_text()
            try:
                event = parsed(text)
                await self._gate.admit(token, demand_of_event(event))
            except NotAlive:
                raise
            except Refused as exc:
                logger.info("An event was left out: %s", exc)
                continue
            await upstream.send(json.dumps(event))  # Not their text: what was judged is what is sent.

    async def _ask(self, token: str, socket: WebSocket, upstream: ClientConnection) -> None:
        """Send the pod's filter on, narrowed to its own flow runs; then the pod has nothing more to say."""
        wanted = (await _received(socket)).get("filter")
        if not isinstance(wanted, dict):
            raise Refused("A filter was expected.")
        caller = await self._gate.caller(token)
        kept = {name: wanted[name] for name in ("occurred", "event", "order") if wanted.get(name)}
        # An empty list would mean all of them.
        resources = [f"{_WATCHED}{run_id}" for run_id in caller.run_ids] or [_WATCHED]
        await upstream.send(json.dumps({"type": "filter", "filter": {**kept, "resource": {"id": resources}}}))
        while True:
            await socket.receive_text()

    async def _pass_out(self, token: str, socket: WebSocket, upstream: ClientConnection) -> None:
        async for message in upstream:
            event = json.loads(message).get("event") or {}
            resource = str(event.get("resource", {}).get("prefect.resource.id", ""))
            caller = await self._gate.caller(token)
            if resource in {f"{_WATCHED}{run_id}" for run_id in caller.run_ids}:
                await socket.send_json({"type": "event", "event": event})


async def _discard(_: str, __: WebSocket, upstream: ClientConnection) -> None:
    async for _message in upstream:
        pass


async def _until_first(ways: tuple[Awaitable[None], ...]) -> None:
    """Until one of them ends or fails; its error is raised."""
    tasks = [asyncio.ensure_future(way) for way in ways]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _received(socket: WebSocket) -> dict[str, Any]:
    async with asyncio.timeout(_ANSWER_SECONDS):
        said = parsed(await socket.receive_text())
    if not isinstance(said, dict):
        raise Refused("An object was expected.")
    return said


async def _close(socket: WebSocket, code: int) -> None:
    with contextlib.suppress(RuntimeError, WebSocketDisconnect):  # It may be closed already.
        await socket.close(code)
