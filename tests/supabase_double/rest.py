"""`/rest/v1/rpc/{function}`: PostgREST's calls of functions."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql
from psycopg_pool import PoolTimeout
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.supabase_double.database import Database
from tests.supabase_double.keys import RefusedToken, TrustedIssuers

MAX_ROWS = 1000
_LEEWAY_SECONDS = 30

_FIND_FUNCTIONS = """
    select provolatile <> 'v', proretset, prorettype = 'void'::regtype, pronargs - pronargdefaults,
           coalesce(proargnames[1 : pronargs], '{}'),
           array(select format_type(oid, null)
                 from unnest(proargtypes) with ordinality as argument (oid, position) order by position)
    from pg_catalog.pg_proc
    where pronamespace = 'public'::regnamespace and proname = %s
"""
# The first that fits, by prefix of the SQLSTATE.
_HTTP_STATUS = {
    "08": 503, "09": 500, "0L": 403, "0P": 403, "23503": 409, "23505": 409, "25006": 405, "25": 500,
    "28": 403, "2D": 500, "38": 500, "39": 500, "3B": 500, "40": 500, "53400": 500, "53": 503, "54": 500,
    "55": 500, "57P01": 503, "57": 500, "58": 500, "F0": 500, "HV": 500, "P0001": 400, "P0": 500,
    "XX": 500, "42883": 404, "42P01": 404, "42P17": 500,
}  # fmt: skip


@dataclass(frozen=True)
class _Function:
    name: str
    read_only: bool
    returns_set: bool
    returns_void: bool
    required: int
    types: dict[str, str]

    def accepts(self, names: set[str]) -> bool:
        return names <= self.types.keys() and set(list(self.types)[: self.required]) <= names


class Rest:
    """The Data API of the schema `public`, without tables: the ledger exposes none."""

    def __init__(self, database: Database, issuers: TrustedIssuers) -> None:
        self.leeway_seconds: float = _LEEWAY_SECONDS
        self._database = database
        self._issuers = issuers
        self._known: dict[str, list[_Function]] = {}

    def routes(self) -> list[Route]:
        return [Route("/rest/v1/rpc/{function}", self.call, methods=["POST"])]

    async def call(self, request: Request) -> Response:
        """One call in one transaction; its errors in PostgREST's form."""
        try:
            claims = self._issuers.caller(
                request.headers.get("authorization", ""),
                request.headers["apikey"],
                leeway_seconds=self.leeway_seconds,
            )
        except RefusedToken as exc:
            return _error(401, exc.code, str(exc))
        try:
            arguments = json.loads(body) if (body := await request.body()) else {}
            if not isinstance(arguments, dict):
                raise ValueError
        except ValueError:
            return _error(400, "PGRST102", "Empty or invalid json")
        try:
            return await self._call(request, claims, set(arguments), body.decode() or "{}")
        except PoolTimeout:
            if self._database.is_connected:
                return _error(504, "PGRST003", "Timed out acquiring connection from connection pool.")
            return _error(503, "PGRST000", "Database connection error. Retrying the connection.")
        except psycopg.Error as exc:
            return _database_error(exc, anonymous=claims["role"] == "anon")

    async def _call(self, request: Request, claims: dict[str, Any], names: set[str], body: str) -> Response:
        name = request.path_params["function"]
        fitting = [function for function in await self._functions(name) if function.accepts(names)]
        if not fitting:
            signature = f"public.{name}({', '.join(sorted(names))})"
            return _error(404, "PGRST202", f"Could not find the function {signature} in the schema cache")
        if len(fitting) > 1:
            return _error(300, "PGRST203", f"Could not choose the best candidate function for {name}")
        function = fitting[0]
        async with self._database.as_caller(request, claims, read_only=function.read_only) as connection:
            cursor = await connection.execute(_statement(function, sorted(names)), {"body": body})
            row = await cursor.fetchone()
        assert row is not None
        if function.returns_void:
            return Response(status_code=204)
        content = row[0] if function.returns_set else json.dumps(json.loads(row[0])[0])
        return Response(content, media_type="application/json; charset=utf-8")

    async def _functions(self, name: str) -> list[_Function]:
        """From the schema cache; what is missing there is looked up again."""
        if name not in self._known:
            async with self._database.as_service("supabase_auth_admin") as connection:
                rows = await (await connection.execute(_FIND_FUNCTIONS, [name])).fetchall()
            found = [
                _Function(name, stable, is_set, is_void, required, dict(zip(names, types, strict=True)))
                for stable, is_set, is_void, required, names, types in rows
            ]
            if not found:
                return []
            self._known[name] = found
        return self._known[name]


def _statement(function: _Function, names: list[str]) -> sql.Composed:
    """The arguments come out of the JSON body with the types that the function declares."""
    source: sql.Composable = sql.SQL("")
    if names:
        columns = sql.SQL(", ").join(
            sql.SQL("{} {}").format(sql.Identifier(name), sql.SQL(function.types[name])) for name in names
        )
        source = sql.SQL("(select * from json_to_record(%(body)s::json) as _({})) body, ").format(columns)
    arguments = sql.SQL(", ").join(
        sql.SQL("{} => body.{}").format(sql.Identifier(name), sql.Identifier(name)) for name in names
    )
    return sql.SQL(
        "select coalesce(json_agg(value), '[]')::text from (select answer.value from {} "
        "lateral (select value from public.{}({}) value) answer limit {}) rows"
    ).format(source, sql.Identifier(function.name), arguments, sql.Literal(MAX_ROWS))


def _database_error(exc: psycopg.Error, *, anonymous: bool) -> JSONResponse:
    state = exc.sqlstate
    if state is None:
        return _error(503, "PGRST001", "Database client error. Retrying the connection.")
    status = next((status for prefix, status in _HTTP_STATUS.items() if state.startswith(prefix)), 400)
    if state == "42501":
        status = 401 if anonymous else 403
    diagnostics = exc.diag
    return _error(
        status, state, diagnostics.message_primary, diagnostics.message_detail, diagnostics.message_hint
    )


def _error(
    status: int, code: str, message: str | None, details: str | None = None, hint: str | None = None
) -> JSONResponse:
    content = {"code": code, "message": message, "details": details, "hint": hint}
    headers = {"Proxy-Status": f"PostgREST; error={code}"}
    if status == 401:
        headers["WWW-Authenticate"] = f'Bearer error="invalid_token", error_description="{message}"'
    return JSONResponse(content, status_code=status, headers=headers)
