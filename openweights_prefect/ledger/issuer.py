"""The token exchange of installations without Supabase: an API token in, a JWT of at most 15 minutes out.

`python -m openweights_prefect.ledger.issuer` serves it. On Supabase the edge function `exchange` answers the
same requests in the same way.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import math
import re
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from openweights_prefect.errors import ConfigurationError, LedgerUnavailable, OpenWeightsError
from openweights_prefect.ledger.identity import ServiceIdentity, hash_secret
from openweights_prefect.ledger.postgres import PostgresLedger
from openweights_prefect.ledger.protocol import Ledger, Row
from openweights_prefect.ledger.signing import LONGEST_LIFETIME_SECONDS, SigningKey, verify
from openweights_prefect.settings import Settings

__all__ = ["SigningKey", "exchange_app", "main", "verify"]

logger = logging.getLogger(__name__)

_LONGEST_BODY = 1024
_BODY_SECONDS = 10
_LEDGER_SECONDS = 5
_MOST_CONNECTIONS = 256
_TOKEN = re.compile(r"(?:ow|owp)_[A-Za-z0-9_-]{43}")
_BOOTSTRAP = re.compile(r"owb_[A-Za-z0-9_-]{43}")
_HASH = re.compile(r"[0-9a-f]{64}")


def exchange_app(ledger: Ledger, key: SigningKey, *, issuer: str) -> Starlette:
    """An ASGI application with `POST /exchange` and `GET /.well-known/jwks.json`.

    `ledger` acts as `service_role`. An unknown, a revoked and an expired token get the same answer, 401. No
    token reaches a log.
    """
    exchange = _Exchange(ledger, key, issuer)
    return Starlette(
        routes=[
            Route("/exchange", exchange.answer, methods=["POST"]),
            Route("/.well-known/jwks.json", exchange.publish_keys, methods=["GET"]),
        ]
    )


class _Exchange:
    def __init__(self, ledger: Ledger, key: SigningKey, issuer: str) -> None:
        self._ledger = ledger
        self._key = key
        self._issuer = issuer

    async def answer(self, request: Request) -> JSONResponse:
        response = await self._answer(request)
        response.headers["Cache-Control"] = "no-store"
        return response

    async def publish_keys(self, request: Request) -> JSONResponse:
        return JSONResponse(self._key.jwks(), headers={"Cache-Control": "public, max-age=300"})

    async def _answer(self, request: Request) -> JSONResponse:
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                raw = await _read_body(request)
        except (TimeoutError, ClientDisconnect):
            return _error(408, "timeout")
        if raw is None:
            return _error(413, "too_large")
        body = _parse(raw)
        if body is None:
            return _error(400, "invalid_request")
        try:
            return await run_in_threadpool(self._decide, body, _source(request))
        except LedgerUnavailable as exc:
            logger.warning("A token could not be looked up: %s", exc)
            return _error(503, "unavailable", retry_after=1)
        except OpenWeightsError:
            logger.exception("A token could not be looked up.")
            return _error(500, "internal")

    def _decide(self, body: Mapping[str, str], source: str) -> JSONResponse:
        if "token" in body:
            return self._grant(body["token"], source)
        return self._redeem(body["bootstrap"], body["session_hash"], source)

    def _grant(self, secret: str, source: str) -> JSONResponse:
        if not _TOKEN.fullmatch(secret):
            return _refused()
        answer = self._call("exchange_token", hash=hash_secret(secret), source=source)
        if answer["outcome"] != "granted":
            return _not_granted(answer)
        claims = {**answer["claims"], "iss": self._issuer}
        token, expires_in = self._key.sign(claims), int(claims["exp"]) - int(time.time())
        return JSONResponse(
            {
                "access_token": token,
                "token_type": "bearer",
                "expires_in": min(expires_in, LONGEST_LIFETIME_SECONDS),
            }
        )

    def _redeem(self, bootstrap: str, session_hash: str, source: str) -> JSONResponse:
        if not _BOOTSTRAP.fullmatch(bootstrap) or not _HASH.fullmatch(session_hash):
            return _refused()
        answer = self._call(
            "redeem_bootstrap", hash=hash_secret(bootstrap), session_hash=session_hash, source=source
        )
        if answer["outcome"] != "redeemed":
            return _not_granted(answer)
        # No JWT: who knows only the hash of the session must not get one.
        return JSONResponse({name: answer[name] for name in ("worker_id", "organization_id")})

    def _call(self, function: str, **arguments: str) -> Row:
        rows = self._ledger.call(function, patience_seconds=_LEDGER_SECONDS, **arguments)
        return rows[0] if rows else {"outcome": "refused"}


async def _read_body(request: Request) -> bytes | None:
    """The body, or None when it is longer than any honest one."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > _LONGEST_BODY:
            return None
    return body


def _parse(raw: bytes) -> dict[str, str] | None:
    try:
        body = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(body, dict) or body.keys() not in ({"token"}, {"bootstrap", "session_hash"}):
        return None
    return body if all(isinstance(value, str) for value in body.values()) else None


def _source(request: Request) -> str:
    """Tells callers apart for the limit of failed attempts, without keeping their addresses."""
    return hash_secret(request.client.host) if request.client else ""


def _not_granted(answer: Row) -> JSONResponse:
    if answer["outcome"] == "limited":
        return _error(429, "too_many_attempts", retry_after=math.ceil(answer["retry_after"]))
    return _refused()


def _refused() -> JSONResponse:
    return _error(401, "invalid_token")


def _error(status: int, error: str, *, retry_after: int | None = None) -> JSONResponse:
    headers = {} if retry_after is None else {"Retry-After": str(max(retry_after, 1))}
    return JSONResponse({"error": error}, status_code=status, headers=headers)


def main() -> None:
    """Serve the exchange until SIGTERM or SIGINT, with the ledger of `OW_DATABASE_URL`."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    arguments = _arguments()
    try:
        url = Settings.load().database_url
        if not url:
            raise ConfigurationError(
                "The issuer needs the ledger's address. Set `OW_DATABASE_URL` to the login `authenticator`."
            )
        key = SigningKey.load(arguments.key) if arguments.key.exists() else SigningKey.create(arguments.key)
        ledger = PostgresLedger(url, identity=ServiceIdentity())
        listener = socket.create_server((arguments.host, arguments.port))
    except (OpenWeightsError, OSError) as exc:
        sys.exit(f"The issuer cannot start: {exc}")
    except ModuleNotFoundError as exc:
        sys.exit(f"The issuer needs {exc.name!r}. Run `pip install 'openweights-prefect[supabase]'`.")
    app = exchange_app(ledger, key, issuer=arguments.issuer)
    port = listener.getsockname()[1]
    print(json.dumps({"event": "listening", "port": port, "kid": key.kid}), flush=True)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan="off",
        proxy_headers=arguments.behind_proxy,
        limit_concurrency=_MOST_CONNECTIONS,
        timeout_graceful_shutdown=2,
    )
    try:
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        ledger.close()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m openweights_prefect.ledger.issuer", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=0, help="port to listen on; 0 takes a free one")
    parser.add_argument("--key", type=Path, required=True, help="file of the signing key; made if missing")
    parser.add_argument("--issuer", default="openweights", help="the claim `iss` of the tokens")
    parser.add_argument(
        "--behind-proxy", action="store_true", help="trust X-Forwarded-For of a proxy on this machine"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
