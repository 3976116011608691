"""The double's connections: as the caller, the way PostgREST takes a role, and as the services themselves."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import psycopg
from psycopg import sql
from psycopg_pool import AsyncConnectionPool
from starlette.requests import Request

_TAKE_ROLE = """
    select set_config('search_path', %(search_path)s, true),
           set_config('role', %(role)s, true),
           set_config('request.jwt.claims', %(claims)s, true),
           set_config('request.method', %(method)s, true),
           set_config('request.path', %(path)s, true),
           set_config('request.headers', %(headers)s, true),
           set_config('statement_timeout', %(statement_timeout)s, true),
           set_config('storage.allow_delete_query', %(may_delete)s, true)
"""
_STATEMENT_TIMEOUT = {"anon": "3s"}  # The others have that of `authenticator`.


class Database:
    """Two pools on one database; each request is one transaction."""

    def __init__(self, url: str, admin_url: str, *, connections: int) -> None:
        def pool(url: str) -> AsyncConnectionPool:
            return AsyncConnectionPool(
                url, min_size=0, max_size=connections, open=False, timeout=5, kwargs={"autocommit": True}
            )

        self._callers = pool(url)
        self._services = pool(admin_url)

    async def open(self) -> None:
        await self._callers.open()
        await self._services.open()

    async def close(self) -> None:
        await self._callers.close()
        await self._services.close()

    @property
    def is_connected(self) -> bool:
        """Whether there is any connection for callers."""
        return self._callers.get_stats().get("pool_size", 0) > 0

    @asynccontextmanager
    async def as_caller(
        self, request: Request, claims: Mapping[str, Any], *, read_only: bool = False, storage: bool = False
    ) -> AsyncIterator[psycopg.AsyncConnection]:
        """A transaction with the rights of the claims' role."""
        headers = {name.lower(): value for name, value in request.headers.items() if name != "cookie"}
        settings = {
            "search_path": "storage, public, extensions" if storage else "public, extensions",
            "role": claims.get("role") or "anon",
            "claims": json.dumps(claims),
            "method": request.method,
            "path": request.url.path,
            "headers": json.dumps(headers),
            "statement_timeout": _STATEMENT_TIMEOUT.get(str(claims.get("role")), "8s"),
            "may_delete": "true" if storage else "",
        }
        async with self._callers.connection() as connection, connection.transaction():
            if read_only:
                await connection.execute("set transaction read only")
            await connection.execute(_TAKE_ROLE, settings)
            yield connection

    @asynccontextmanager
    async def as_service(self, role: str) -> AsyncIterator[psycopg.AsyncConnection]:
        """A transaction of GoTrue (`supabase_auth_admin`) or the storage service."""
        async with self._services.connection() as connection, connection.transaction():
            await connection.execute(sql.SQL("set local role {}").format(sql.Identifier(role)))
            yield connection
