"""`/auth/v1/*`: the part of GoTrue for people with an email address and a password."""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from typing import Any
from uuid import UUID

import psycopg
from psycopg.rows import dict_row
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from openweights_prefect.ledger.signing import SigningKey
from tests.supabase_double.database import Database
from tests.supabase_double.keys import RefusedToken, TrustedIssuers

_SHORTEST_PASSWORD = 6
_REUSE_SECONDS = 10
_ADMIN = "supabase_auth_admin"


class Refusal(Exception):
    """An answer of GoTrue that is an error."""

    def __init__(self, status: int, code: str, message: str, **more: Any) -> None:
        super().__init__(message)
        self.response = JSONResponse(
            {"code": code, "message": message, **more},
            status_code=status,
            headers={"X-Supabase-Api-Version": "2024-01-01"},
        )


class GoTrue:
    """Sign-up without confirmation, passwords, rotating refresh tokens, sign-out."""

    def __init__(self, database: Database, key: SigningKey, issuer: str, issuers: TrustedIssuers) -> None:
        self.session_seconds = 3600
        self._database = database
        self._key = key
        self._issuer = issuer
        self._issuers = issuers

    def routes(self) -> list[Route]:
        async def guarded(request: Request) -> Response:
            try:
                return await answers[request.url.path](request)
            except Refusal as refusal:
                return refusal.response

        answers = {
            "/auth/v1/signup": self._sign_up,
            "/auth/v1/token": self._token,
            "/auth/v1/user": self._user,
            "/auth/v1/logout": self._sign_out,
            "/auth/v1/.well-known/jwks.json": self._keys,
        }
        return [Route(path, guarded, methods=["GET", "POST"]) for path in answers]

    async def _sign_up(self, request: Request) -> Response:
        body = await _json(request)
        email, password = str(body.get("email", "")).lower(), str(body.get("password", ""))
        if "@" not in email:
            raise Refusal(400, "validation_failed", "Unable to validate email address: invalid format")
        if len(password) < _SHORTEST_PASSWORD:
            message = f"Password should be at least {_SHORTEST_PASSWORD} characters."
            raise Refusal(422, "weak_password", message, weak_password={"reasons": ["length"]})
        async with self._database.as_service(_ADMIN) as connection:
            try:
                user = await _one(
                    connection,
                    "insert into auth.users (email, encrypted_password, email_confirmed_at, "
                    "raw_user_meta_data) values (%s, %s, now(), %s) returning *",
                    email, _hashed(password), json.dumps(body.get("data") or {}),
                )  # fmt: skip
            except psycopg.errors.UniqueViolation as exc:
                raise Refusal(422, "user_already_exists", "User already registered") from exc
            assert user is not None
            await connection.execute(
                "insert into auth.identities (user_id, provider, provider_id, identity_data) "
                "values (%s, 'email', %s, %s)",
                [user["id"], str(user["id"]), json.dumps({"sub": str(user["id"]), "email": email})],
            )
            return await self._open_session(connection, user)

    async def _token(self, request: Request) -> Response:
        body = await _json(request)
        if request.query_params.get("grant_type") == "refresh_token":
            return await self._refresh(str(body.get("refresh_token", "")))
        async with self._database.as_service(_ADMIN) as connection:
            email = str(body.get("email", "")).lower()
            user = await _one(connection, "select * from auth.users where email = %s", email)
            if user is None or not _fits(str(body.get("password", "")), user["encrypted_password"]):
                raise Refusal(400, "invalid_credentials", "Invalid login credentials")
            return await self._open_session(connection, user)

    async def _refresh(self, token: str) -> Response:
        """Rotate; a token that was used is answered once more for ten seconds, then it ends its session."""
        async with self._database.as_service(_ADMIN) as connection:
            row = await _one(
                connection,
                "select r.*, extract(epoch from now() - r.updated_at) as age, s.user_id, "
                "(select c.token from auth.refresh_tokens c where c.parent = r.token and not c.revoked) "
                "as child "
                "from auth.refresh_tokens r join auth.sessions s on s.id = r.session_id "
                "where r.token = %s for update of s",
                token,
            )
            if row is None:
                raise Refusal(
                    400, "refresh_token_not_found", "Invalid Refresh Token: Refresh Token Not Found"
                )
            user = await _one(connection, "select * from auth.users where id = %s", row["user_id"])
            assert user is not None
            if row["revoked"] and row["child"] and row["age"] < _REUSE_SECONDS:
                return JSONResponse(self._session(user, row["session_id"], row["child"]))
            await connection.execute(
                "update auth.refresh_tokens set revoked = true, updated_at = now() "
                "where token = %s or (%s and session_id = %s)",
                [token, row["revoked"], row["session_id"]],
            )
            if not row["revoked"]:
                new = await _add_refresh_token(connection, row["session_id"], parent=token)
                return JSONResponse(self._session(user, row["session_id"], new))
        raise Refusal(400, "refresh_token_already_used", "Invalid Refresh Token: Already Used")

    async def _user(self, request: Request) -> Response:
        claims = self._claims(request)
        async with self._database.as_service(_ADMIN) as connection:
            user = await _one(
                connection,
                "select u.* from auth.users u join auth.sessions s on s.user_id = u.id where s.id = %s",
                claims.get("session_id"),
            )
        if user is None:
            raise Refusal(403, "session_not_found", "Session from session_id claim in JWT does not exist")
        return JSONResponse(_public(user))

    async def _sign_out(self, request: Request) -> Response:
        claims = self._claims(request)
        everywhere = request.query_params.get("scope", "global") == "global"
        async with self._database.as_service(_ADMIN) as connection:
            await connection.execute(
                "delete from auth.sessions where id = %s or (%s and user_id = %s)",
                [claims.get("session_id"), everywhere, claims.get("sub")],
            )
        return Response(status_code=204)

    async def _keys(self, request: Request) -> Response:
        return JSONResponse(self._key.jwks())

    def _claims(self, request: Request) -> dict[str, Any]:
        try:
            claims = self._issuers.caller(
                request.headers.get("authorization", ""), request.headers["apikey"], leeway_seconds=0
            )
        except RefusedToken as exc:
            raise Refusal(403, "bad_jwt", f"invalid JWT: {exc}") from exc
        if claims.get("iss") != self._issuer:
            raise Refusal(403, "bad_jwt", "invalid JWT: not a session")
        return claims

    async def _open_session(self, connection: psycopg.AsyncConnection, user: dict[str, Any]) -> Response:
        row = await _one(
            connection, "insert into auth.sessions (user_id) values (%s) returning id", user["id"]
        )
        assert row is not None
        refresh_token = await _add_refresh_token(connection, row["id"], parent=None)
        return JSONResponse(self._session(user, row["id"], refresh_token))

    def _session(self, user: dict[str, Any], session_id: UUID, refresh_token: str) -> dict[str, Any]:
        expires_at = int(time.time()) + self.session_seconds
        claims = {
            "iss": self._issuer, "sub": str(user["id"]), "aud": "authenticated", "role": user["role"],
            "exp": expires_at, "email": user["email"], "phone": "", "aal": "aal1", "is_anonymous": False,
            "app_metadata": user["raw_app_meta_data"], "user_metadata": user["raw_user_meta_data"],
            "session_id": str(session_id),
        }  # fmt: skip
        return {
            "access_token": self._key.sign(claims), "token_type": "bearer",
            "expires_in": self.session_seconds, "expires_at": expires_at,
            "refresh_token": refresh_token, "user": _public(user),
        }  # fmt: skip


async def _json(request: Request) -> dict[str, Any]:
    try:
        body = await request.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise Refusal(400, "bad_json", "Could not parse request body as JSON")
    return body


async def _one(connection: psycopg.AsyncConnection, statement: str, *values: Any) -> dict[str, Any] | None:
    async with connection.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(statement.encode(), values)
        return await cursor.fetchone()


async def _add_refresh_token(
    connection: psycopg.AsyncConnection, session_id: UUID, parent: str | None
) -> str:
    token = secrets.token_urlsafe(9)
    await connection.execute(
        "insert into auth.refresh_tokens (token, parent, session_id) values (%s, %s, %s)",
        [token, parent, session_id],
    )
    return token


def _public(user: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": str(user["id"]), "aud": user["aud"], "role": user["role"], "email": user["email"], "phone": "",
        "email_confirmed_at": user["email_confirmed_at"].isoformat(), "is_anonymous": False,
        "app_metadata": user["raw_app_meta_data"], "user_metadata": user["raw_user_meta_data"],
        "created_at": user["created_at"].isoformat(), "updated_at": user["updated_at"].isoformat(),
    }  # fmt: skip


def _hashed(password: str) -> str:
    salt = secrets.token_bytes(8)
    return f"{salt.hex()}${_derive(password, salt)}"


def _fits(password: str, stored: str) -> bool:
    salt, _, digest = stored.partition("$")
    return secrets.compare_digest(_derive(password, bytes.fromhex(salt)), digest)


def _derive(password: str, salt: bytes) -> str:
    return hashlib.pbkdf2_hmac("sha256", password.encode(), salt, 1000).hex()
