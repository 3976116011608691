"""The proxy as an ASGI application: who asks, what for, and on it goes with the server's own credential."""

from __future__ import annotations

import base64
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple

import httpx
from prefect.settings import get_current_settings
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute

from openweights_prefect.errors import LedgerUnavailable
from openweights_prefect.ledger.connect import connect
from openweights_prefect.ledger.protocol import Ledger
from openweights_prefect.proxy.event_stream import EventStream
from openweights_prefect.proxy.gate import Gate, NotAlive
from openweights_prefect.proxy.kinship import Kinship
from openweights_prefect.proxy.pods import Pods, token_of
from openweights_prefect.proxy.rules import Demand, Refused, demand_of, parsed
from openweights_prefect.settings import Settings

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 8 << 20
_PREFIX = "/api"
_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]
_PLAIN = ("content-type", "accept", "accept-encoding", "x-prefect-api-version", "user-agent")
_SENT_ON = (*_PLAIN, "prefect-csrf-token", "prefect-csrf-client")
_SENT_BACK = ("content-type", "content-encoding", "retry-after")
_UPSTREAM_SECONDS = 60.0


class Proxy:
    """One proxy before one Prefect API. Knows its pods from the ledger and keeps no state of its own."""

    def __init__(self, *, gate: Gate, upstream: httpx.AsyncClient, event_stream: EventStream) -> None:
        self._gate = gate
        self._upstream = upstream
        self._event_stream = event_stream

    def app(self) -> Starlette:
        """The application; whoever serves it closes what it was made of."""
        routes = [
            Route(f"{_PREFIX}/health", _health, methods=["GET"]),
            WebSocketRoute(f"{_PREFIX}/events/in", self._event_stream.take_in),
            WebSocketRoute(f"{_PREFIX}/events/out", self._event_stream.give_out),
            Route("/{path:path}", self._handle, methods=_METHODS),
        ]
        return Starlette(routes=routes)

    async def _handle(self, request: Request) -> Response:
        try:
            token = token_of(request.headers.get("authorization"))
            await self._gate.caller(token)
            content = await _content(request)
            demand = demand_of(request.method, _path(request), request.url.query, parsed(content))
            await self._gate.admit(token, demand)
            return await self._answer(request, demand, content)
        except NotAlive as exc:
            return _said(401, str(exc))
        except Refused as exc:
            logger.info("Refused %s: %s", request.method, exc)
            return _said(403, str(exc))
        except _TooLarge:
            return _said(413, f"A pod may send {MAX_BODY_BYTES} bytes at once.")
        except LedgerUnavailable:
            return _said(503, "The ledger does not answer; try again.")
        except httpx.HTTPError as exc:
            logger.warning("The Prefect API did not answer: %s", type(exc).__name__)
            return _said(503, "The Prefect API does not answer; try again.")

    async def _answer(self, request: Request, demand: Demand, content: bytes) -> Response:
        if demand.answer == "no_storage":
            # A default storage block would be read next, with its secrets.
            return JSONResponse({"default_result_storage_block_id": None})
        headers = {name: value for name in _SENT_ON if (value := request.headers.get(name))}
        query = f"?{request.url.query}" if request.url.query else ""
        sent = self._upstream.build_request(
            request.method, _path(request) + query, content=content or None, headers=headers
        )
        if demand.answer == "work_pool":
            return _without_template(await self._upstream.send(sent))
        answer = await self._upstream.send(sent, stream=True)
        return StreamingResponse(
            answer.aiter_raw(),
            status_code=answer.status_code,
            headers={name: value for name in _SENT_BACK if (value := answer.headers.get(name))},
            background=BackgroundTask(answer.aclose),
        )


@asynccontextmanager
async def serving(settings: Settings, *, ledger: Ledger | None = None) -> AsyncIterator[Starlette]:
    """The proxy that the settings describe; the credential is that of Prefect's own settings."""
    opened = ledger or connect(settings, role="ow_worker")
    credential = _credential()
    url = settings.prefect_api_url.rstrip("/")
    # Not by way of a proxy of the environment: the credential goes to this address only.
    async with httpx.AsyncClient(
        base_url=url, headers=credential.headers, timeout=_UPSTREAM_SECONDS, trust_env=False
    ) as upstream:
        gate = Gate(pods=Pods(opened), kinship=Kinship(upstream))
        stream = EventStream(gate=gate, url=url, token=credential.token)
        try:
            yield Proxy(gate=gate, upstream=upstream, event_stream=stream).app()
        finally:
            if ledger is None:
                opened.close()


class _Credential(NamedTuple):
    """What the Prefect server wants to see: `token` first in a WebSocket, `headers` in a request."""

    token: str
    headers: dict[str, str]


def _credential() -> _Credential:
    api = get_current_settings().api
    if api.auth_string is not None:
        token = api.auth_string.get_secret_value()
        return _Credential(token, {"authorization": f"Basic {base64.b64encode(token.encode()).decode()}"})
    if api.key is not None:
        token = api.key.get_secret_value()
        return _Credential(token, {"authorization": f"Bearer {token}"})
    return _Credential("", {})


class _TooLarge(Exception):
    """The body is larger than a pod may send."""


async def _content(request: Request) -> bytes:
    """The body, no more of it than is allowed."""
    parts = bytearray()
    async for part in request.stream():
        parts += part
        if len(parts) > MAX_BODY_BYTES:
            raise _TooLarge
    return bytes(parts)


def _path(request: Request) -> str:
    """The path below the prefix, as it came over the wire: nothing is decoded before it is judged."""
    raw: bytes = request.scope.get("raw_path") or b""
    path = raw.partition(b"?")[0].decode("latin-1")
    if not path.startswith(f"{_PREFIX}/"):
        raise Refused(f"The API is below {_PREFIX}.")
    return path.removeprefix(_PREFIX)


def _without_template(answer: httpx.Response) -> Response:
    """A work pool without what its owner wrote into its form: defaults there may be secret."""
    if answer.status_code != 200:
        return _said(answer.status_code, "The work pool cannot be read.")
    shown = {name: answer.json()[name] for name in ("id", "name", "type", "created", "updated")}
    return JSONResponse({**shown, "base_job_template": {}})


async def _health(_: Request) -> Response:
    return JSONResponse(True)


def _said(status: int, text: str) -> Response:
    return JSONResponse({"detail": text}, status_code=status)
