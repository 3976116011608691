"""The double as a server on 127.0.0.1, and the databases it needs."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

import psycopg
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount
from starlette.types import ASGIApp, Receive, Scope, Send

from openweights_prefect.ledger.access import AccessTokens, TokenExchange
from openweights_prefect.ledger.identity import Claims
from openweights_prefect.ledger.issuer import exchange_app
from openweights_prefect.ledger.signing import SigningKey
from openweights_prefect.ledger.supabase import SupabaseLedger
from tests.supabase_double.auth import GoTrue
from tests.supabase_double.database import Database
from tests.supabase_double.exchange import ExchangeLedger
from tests.supabase_double.keys import PUBLISHABLE_KEY, TrustedIssuers, is_project_key
from tests.supabase_double.objects import Objects, ObjectStore
from tests.supabase_double.rest import Rest
from tests.supabase_double.uploads import ResumableUploads

_FOLDER = Path(__file__).parent
_START_SECONDS = 10

Intercept = Callable[[Request], Response | None]


def prepare_server(admin_url: str) -> None:
    """Make the roles of a Supabase project; repeatable."""
    with psycopg.connect(admin_url, autocommit=True) as connection:
        connection.execute((_FOLDER / "roles.sql").read_bytes())


def prepare_project(admin_url: str) -> str:
    """Turn an empty database into a new project; returns the URL to migrate it with, no superuser's."""
    with psycopg.connect(admin_url) as connection:
        connection.execute((_FOLDER / "platform.sql").read_bytes())
    return f"{admin_url}&options={quote('-c role=project_owner')}"


class SupabaseDouble:
    """One project: `with SupabaseDouble(...) as double`, then `double.url` and `double.key`."""

    key = PUBLISHABLE_KEY

    def __init__(self, *, database_url: str, admin_url: str, folder: Path, connections: int = 16) -> None:
        """`database_url` is that of the login `authenticator`; bytes and signing keys are in `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.intercept: Intercept | None = None
        self.exchange = ExchangeLedger(database_url)
        self.exchange_key = SigningKey.create(folder / "exchange.jwk")
        self.exchange_issuer = f"{self.url}/functions/v1"
        session_key, session_issuer = SigningKey.create(folder / "sessions.jwk"), f"{self.url}/auth/v1"
        self.issuers = TrustedIssuers(
            {session_issuer: session_key.jwks(), self.exchange_issuer: self.exchange_key.jwks()}
        )
        self._database = Database(database_url, admin_url, connections=connections)
        self.rest = Rest(self._database, self.issuers)
        self.auth = GoTrue(self._database, session_key, session_issuer, self.issuers)
        self._store = ObjectStore(self._database, self.issuers, folder)
        config = uvicorn.Config(
            self._app(), log_level="warning", access_log=False, lifespan="on", timeout_graceful_shutdown=1
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._socket]}, name="supabase-double"
        )

    def __enter__(self) -> SupabaseDouble:
        self._thread.start()
        deadline = time.monotonic() + _START_SECONDS
        while not self._server.started and self._thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.005)
        assert self._server.started
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.should_exit = True
        self._thread.join(_START_SECONDS)
        self._socket.close()
        self.exchange.close()

    def access(self, token: str) -> AccessTokens:
        """Access tokens for an API token."""
        return AccessTokens(TokenExchange(f"{self.url}/functions/v1/exchange", token, key=self.key))

    def ledger(self, claims: Claims) -> SupabaseLedger:
        """The ledger over HTTP, as the caller of these claims."""
        return self.ledger_of(self.exchange.grant(claims))

    def ledger_of(self, token: str, *, patience_seconds: float = 30) -> SupabaseLedger:
        """The ledger over HTTP, as the holder of an API token."""
        access = self.access(token)
        return SupabaseLedger(
            self.url, self.key, access=access, patience_seconds=patience_seconds, connections=16
        )

    def _app(self) -> ASGIApp:
        @contextlib.asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            await self._database.open()
            yield
            await self._database.close()

        exchange = exchange_app(self.exchange, self.exchange_key, issuer=self.exchange_issuer)
        routes = [
            *self.rest.routes(),
            *self.auth.routes(),
            *Objects(self._store).routes(),
            *ResumableUploads(self._store).routes(),
            Mount("/functions/v1", exchange),
        ]
        return _Gateway(Starlette(routes=routes, lifespan=lifespan), self)


class _Gateway:
    """Asks for the project's key first, as Supabase's gateway does; tests may break requests here."""

    def __init__(self, app: ASGIApp, double: SupabaseDouble) -> None:
        self._app = app
        self._double = double

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        answer = self._double.intercept(request) if self._double.intercept else None
        if answer is None and not scope["path"].endswith("/jwks.json"):
            answer = _without_key(request.headers.get("apikey"))
        await (answer or self._app)(scope, receive, send)


def _without_key(apikey: str | None) -> Response | None:
    if apikey is None:
        message, hint = "No API key found in request", "No `apikey` request header or url param was found."
    elif not is_project_key(apikey):
        message, hint = "Invalid API key", "Double check your Supabase `anon` or `service_role` API key."
    else:
        return None
    return JSONResponse({"message": message, "hint": hint}, status_code=401)
