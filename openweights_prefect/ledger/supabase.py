"""The ledger over supabase-py: functions of a Supabase project, called through its Data API."""

from __future__ import annotations

import base64
import json
import math
import random
import threading
import time
from datetime import date, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from uuid import UUID

import httpx

from openweights_prefect.errors import (
    AuthenticationError,
    ConfigurationError,
    ConflictError,
    InvalidRequestError,
    LedgerUnavailable,
    OpenWeightsError,
    PermissionDeniedError,
)
from openweights_prefect.ledger.access import AccessTokens, AccessUnavailable, retry_after_seconds
from openweights_prefect.ledger.protocol import Row

if TYPE_CHECKING:
    from supabase import Client

# Beginnings of SQLSTATEs and of PostgREST's codes.
_TRANSIENT = ("08", "40", "53", "55P03", "57", "58030", "PGRST000", "PGRST001", "PGRST002", "PGRST003")
_TOKEN_REFUSED = {"PGRST301", "PGRST303"}
_NO_SUCH_FUNCTION = {"42883", "PGRST202", "PGRST203"}
_SHORTEST_TIMEOUT_SECONDS = 0.1
_MOST_ROWS = 1000


class SupabaseLedger:
    """Calls SQL functions as whoever the access tokens say; safe to share between threads."""

    def __init__(
        self,
        url: str,
        key: str,
        *,
        access: AccessTokens,
        organization_id: str | None = None,
        patience_seconds: float = 30.0,
        connections: int = 8,
    ) -> None:
        """`organization_id` is for people: their tokens, unlike API tokens, name no organization."""
        self._url = url
        self._access = access
        self._organization_id = organization_id
        self._patience_seconds = patience_seconds
        self._wire = _Wire()
        headers = {"x-organization-id": organization_id} if organization_id else {}
        self._http = httpx.Client(
            headers=headers,
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
            event_hooks={"request": [self._wire.prepare], "response": [self._wire.note]},
        )
        self._client = _connect(url, key, self._http)

    @property
    def organization_id(self) -> str:
        """The organization that the caller acts for; the first access token says so."""
        if self._organization_id is None:
            self._organization_id = _claimed_organization(self._access.bearer())
        return self._organization_id

    def call(self, function: str, *, patience_seconds: float | None = None, **arguments: Any) -> list[Row]:
        """Call a function and return its rows: at most 1000, which is all that PostgREST gives at once.

        What may pass is tried again until the patience runs out: functions are written so that a repeated
        call has no second effect. `patience_seconds` shortens it for this call.

        Raises:
            AuthenticationError: Who we say to be was refused, also with a new access token.
            PermissionDeniedError: The caller may not do this.
            LedgerUnavailable: The ledger did not answer in time.
            InvalidRequestError: The ledger refused the arguments.
        """
        values = {name: _json_value(value) for name, value in arguments.items()}
        own = self._patience_seconds
        patience = own if patience_seconds is None else min(own, patience_seconds)
        deadline = time.monotonic() + patience
        pause = 0.05
        while True:
            try:
                return _checked(self._call(function, values, deadline), function, values)
            except LedgerUnavailable as exc:
                wished = exc.retry_after_seconds if isinstance(exc, AccessUnavailable) else 0
                if time.monotonic() + max(pause, wished) > deadline:
                    raise LedgerUnavailable(
                        f"The ledger at {self._url!r} did not answer `{function}` in {patience:.3g} s "
                        f"({exc}). Check the network, and in Supabase's dashboard that the project is not "
                        "paused."
                    ) from exc
            time.sleep(max(pause * random.uniform(0.5, 1.0), wished))
            pause = min(pause * 2, 2.0)

    def close(self) -> None:
        """Close all connections; silent when already closed."""
        self._http.close()

    def _call(self, function: str, values: dict[str, Any], deadline: float) -> list[Row]:
        """Once, or twice when the first access token is refused: it may have ended on the way."""
        token = self._access.bearer()
        try:
            return self._request(function, values, token, deadline)
        except _TokenRefused:
            token = self._access.renew(token)
        except AuthenticationError:
            # PostgREST takes a token for 30 s after its end, the ledger does not, and then knows nobody.
            if not self._access.may_have_ended(token):
                raise
            token = self._access.renew(token)
        try:
            return self._request(function, values, token, deadline)
        except _TokenRefused as exc:
            raise AuthenticationError(
                f"Supabase refused a new access token for `{function}`: {exc}. Does the project trust the "
                "token exchange's keys, and are `SUPABASE_URL` and `SUPABASE_ANON_KEY` this project's?"
            ) from exc

    def _request(self, function: str, values: dict[str, Any], token: str, deadline: float) -> list[Row]:
        from postgrest import APIError

        self._wire.expect(deadline - time.monotonic())
        builder = self._client.rpc(function, values)
        builder.request.headers["Authorization"] = f"Bearer {token}"
        try:
            answer: Any = builder.execute().data
        except httpx.TransportError as exc:
            raise AccessUnavailable(f"{type(exc).__name__}: {exc}") from exc
        except UnicodeEncodeError as exc:
            raise InvalidRequestError(
                f"An argument of `{function}` is no valid Unicode: {exc.reason}."
            ) from exc
        except APIError as exc:
            code, message = exc.code or "", exc.message or "no reason given"
        else:
            return list(answer) if isinstance(answer, list) else [answer]
        # Outside the handler: an API error may quote the row that was refused.
        raise _failure(function, self._wire, code, message)


class _TokenRefused(Exception):
    """The access token has ended, or its key is not known any more."""


class _Wire(threading.local):
    """What supabase-py does not pass on: the time left for a request, and the status of its answer."""

    timeout_seconds = _SHORTEST_TIMEOUT_SECONDS
    status = 0
    retry_after_seconds = 0.0

    def expect(self, timeout_seconds: float) -> None:
        self.timeout_seconds = max(timeout_seconds, _SHORTEST_TIMEOUT_SECONDS)
        self.status, self.retry_after_seconds = 0, 0.0

    def prepare(self, request: httpx.Request) -> None:
        request.extensions["timeout"] = httpx.Timeout(self.timeout_seconds).as_dict()

    def note(self, response: httpx.Response) -> None:
        self.status = response.status_code
        self.retry_after_seconds = retry_after_seconds(response)


def _connect(url: str, key: str, http: httpx.Client) -> Client:
    import supabase  # A second, which only those who use it pay.

    options = supabase.ClientOptions(
        httpx_client=http, persist_session=False, auto_refresh_token=False, postgrest_client_retry=False
    )
    try:
        return supabase.create_client(url, key, options)
    except supabase.SupabaseException as exc:
        raise ConfigurationError(
            f"`SUPABASE_URL`={url!r} and `SUPABASE_ANON_KEY` make no Supabase project ({exc}). The dashboard "
            "has both under Project Settings, API Keys; use the publishable key."
        ) from exc


def _checked(rows: list[Row], function: str, values: dict[str, Any]) -> list[Row]:
    """The rows, unless PostgREST cut them off without a word."""
    if len(rows) >= _MOST_ROWS and (values.get("max_rows") or 0) > _MOST_ROWS:
        raise InvalidRequestError(
            f"`{function}` cannot give max_rows={values['max_rows']!r} at once; ask for pages of at most "
            f"{_MOST_ROWS}."
        )
    return rows


def _claimed_organization(token: str) -> str:
    """The claim `organization_id` of a JWT, whose signature is for the server to check."""
    payload = token.split(".")[1]
    claims: dict[str, Any] = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    if "organization_id" not in claims:
        raise ConfigurationError(
            "The access token of a person names no organization. Set `OW_ORGANIZATION_ID`, or choose one "
            "with `ow org switch`."
        )
    return str(claims["organization_id"])


def _failure(function: str, wire: _Wire, code: str, message: str) -> Exception:
    """What an answer that is an error means: by PostgREST's code or the SQLSTATE, else by the HTTP status."""
    if len(code) < len("22P02"):  # None, or the HTTP status, where no JSON of PostgREST's came.
        return _failure_of_status(function, wire, message)
    if code.startswith(_TRANSIENT):
        return AccessUnavailable(f"{message} ({code})", retry_after_seconds=wire.retry_after_seconds)
    if code in _TOKEN_REFUSED:
        return _TokenRefused(message)
    if code in _NO_SUCH_FUNCTION:
        return ConflictError(
            f"The ledger has no function `{function}`: its schema is older or newer than this package. "
            "`ow db status` says which, `ow db migrate` brings it up to date."
        )
    if code.startswith("28"):
        return AuthenticationError(f"`{function}` was refused: {message}.")
    if code == "42501":
        return PermissionDeniedError(f"`{function}` was refused: {message}.")
    if code.startswith(("22", "23", "PGRST1")):
        return InvalidRequestError(f"The ledger refused the arguments of `{function}`: {message}.")
    return OpenWeightsError(f"The ledger failed in `{function}`: {message} ({code}).")


def _failure_of_status(function: str, wire: _Wire, message: str) -> Exception:
    status = wire.status
    if status in (408, 429) or status >= 500:
        reason = f"status {status}: {message}"
        return AccessUnavailable(reason, retry_after_seconds=wire.retry_after_seconds)
    if status == httpx.codes.UNAUTHORIZED:
        return _TokenRefused(message)
    if status == httpx.codes.FORBIDDEN:
        return PermissionDeniedError(f"`{function}` was refused: {message}.")
    return ConfigurationError(
        f"Supabase answered `{function}` with status {status}: {message}. Check `SUPABASE_URL`."
    )


def _json_value(value: Any) -> Any:
    """What JSON has no type for is text, which PostgreSQL turns into the type of the argument."""
    if isinstance(value, dict):
        return {str(name): _json_value(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(item) for item in value]
    if isinstance(value, date | datetime):
        return value.isoformat()
    if isinstance(value, UUID | Decimal):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise InvalidRequestError(f"{value!r} is no number that JSON can hold; leave it out or use None.")
    return value
