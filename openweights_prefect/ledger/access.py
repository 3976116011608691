"""Short-lived access tokens for callers over HTTP: fetched when needed, by one thread for all."""

from __future__ import annotations

import contextlib
import copy
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx

from openweights_prefect.errors import (
    AuthenticationError,
    ConfigurationError,
    LedgerUnavailable,
    OpenWeightsError,
)

_EARLY_SECONDS = 60
_EARLY_SHARE = 0.1  # Of a lifetime so short that a minute would be most of it.
_EARLY_RETRY_SECONDS = 5
_UNSURE_SECONDS = 2
_TIMEOUT_SECONDS = 10


class AccessUnavailable(LedgerUnavailable):
    """No access token could be had just now; `retry_after_seconds` is the server's wish."""

    def __init__(self, message: str, *, retry_after_seconds: float = 0) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


@dataclass(frozen=True)
class AccessToken:
    """A JWT and how long it was good for when we got it; only durations count, so clocks may differ."""

    value: str = field(repr=False)
    lifetime_seconds: float
    _elapsing_since: float = field(default_factory=time.monotonic)
    _received_at: float = field(default_factory=time.time)

    @property
    def seconds_left(self) -> float:
        """What is left of the lifetime, by whichever clock ran faster: one of them stops in standby."""
        elapsed = max(time.monotonic() - self._elapsing_since, time.time() - self._received_at)
        return self.lifetime_seconds - elapsed

    @property
    def ends_soon(self) -> bool:
        """Whether it is time for the next one."""
        return self.seconds_left < min(_EARLY_SECONDS, self.lifetime_seconds * _EARLY_SHARE)

    @property
    def is_over(self) -> bool:
        """Whether it may be over before a request that we begin now arrives."""
        return self.seconds_left < min(_UNSURE_SECONDS, self.lifetime_seconds * _EARLY_SHARE / 2)

    @property
    def may_have_ended(self) -> bool:
        """Whether it may be over for who issued it: its times were cut to whole seconds."""
        return self.ends_soon or self.seconds_left < _UNSURE_SECONDS


class AccessTokens:
    """The token in use, replaced a minute before it ends; safe to share between threads.

    However many threads ask, one fetches; the others use the old token while it lasts. A fetch that fails for
    a reason that may pass goes unnoticed until then.
    """

    def __init__(self, fetch: Callable[[], AccessToken]) -> None:
        self._fetch = fetch
        self._lock = threading.Lock()
        self._token: AccessToken | None = None
        self._failures = 0
        self._failure: OpenWeightsError | None = None
        self._next_early_fetch = 0.0

    def bearer(self) -> str:
        """A token to use now.

        Raises:
            AuthenticationError: We are not who we say, or not any more.
            LedgerUnavailable: There is no answer, and no token that is still good.
        """
        token = self._token
        if token is None or token.is_over:
            return self._replace(token).value
        if token.ends_soon and self._lock.acquire(blocking=False):
            try:
                self._fetch_early(token)
            finally:
                self._lock.release()
        return (self._token or token).value

    def renew(self, refused: str) -> str:
        """Another token than the one that was refused; several threads may report the same one."""
        token = self._token
        if token is not None and token.value != refused:
            return token.value
        return self._replace(token).value

    def may_have_ended(self, bearer: str) -> bool:
        """Whether a token that was given may be over by now."""
        token = self._token
        return token is None or token.value != bearer or token.may_have_ended

    def _replace(self, stale: AccessToken | None) -> AccessToken:
        failures = self._failures
        with self._lock:
            if self._token is not None and self._token is not stale:
                return self._token
            if self._failure is not None and self._failures != failures:
                raise copy.copy(
                    self._failure
                )  # Of the thread that we waited for: the same would happen to us.
            try:
                self._token = self._fetch()
            except OpenWeightsError as exc:
                self._failures += 1
                self._failure = exc
                raise
            return self._token

    def _fetch_early(self, token: AccessToken) -> None:
        if self._token is token and time.monotonic() >= self._next_early_fetch:
            self._next_early_fetch = time.monotonic() + _EARLY_RETRY_SECONDS
            with contextlib.suppress(LedgerUnavailable):
                self._token = self._fetch()
                self._next_early_fetch = 0.0


class TokenExchange:
    """Fetches access tokens for an API token, or a pod's session secret, from a token exchange."""

    def __init__(self, url: str, token: str, *, key: str = "") -> None:
        """`url` is the exchange's own, `https://….supabase.co/functions/v1/exchange`; `key` the project's."""
        self._url = url
        self._token = token
        self._headers = {"apikey": key} if key else {}

    def __call__(self) -> AccessToken:
        """One exchange, once; raises as `AccessTokens.bearer` does."""
        asked = time.monotonic(), time.time()
        try:
            # No connection is kept: the next exchange is a quarter of an hour away.
            response = httpx.post(
                self._url, json={"token": self._token}, headers=self._headers, timeout=_TIMEOUT_SECONDS
            )
        except httpx.TransportError as exc:
            raise AccessUnavailable(
                f"The token exchange at {self._url!r} did not answer ({type(exc).__name__}: {exc})."
            ) from exc
        if response.status_code != httpx.codes.OK:
            raise self._failure(response)
        try:
            answer = response.json()
            return AccessToken(str(answer["access_token"]), float(answer["expires_in"]), *asked)
        except (ValueError, TypeError, KeyError):
            problem = "its answer is no access token"
        raise self._misplaced(problem)  # Outside the handler: a cause may quote the answer.

    def _failure(self, response: httpx.Response) -> OpenWeightsError:
        status = response.status_code
        if status in (408, 429) or status >= 500:
            return AccessUnavailable(
                f"The token exchange at {self._url!r} answered {status}.",
                retry_after_seconds=retry_after_seconds(response),
            )
        if status in (400, 401) and _names_an_error(response):
            return AuthenticationError(
                "The API token was refused: it is unknown, revoked or expired. Create another one with "
                "`ow token create` and set `OPENWEIGHTS_API_KEY`."
            )
        if status in (401, 403):
            return self._misplaced("it refused the project's key (`SUPABASE_ANON_KEY`)")
        return self._misplaced(f"it answered {status}")

    def _misplaced(self, problem: str) -> ConfigurationError:
        return ConfigurationError(
            f"There is no token exchange at {self._url!r}: {problem}. Check `SUPABASE_URL`, and that the "
            "edge function `exchange` is deployed."
        )


def retry_after_seconds(response: httpx.Response) -> float:
    """The header `Retry-After` in seconds; 0 where it is missing or a date."""
    value = response.headers.get("retry-after", "")
    return float(value) if value.isdigit() else 0.0


def _names_an_error(response: httpx.Response) -> bool:
    """Whether the exchange itself refused; the gateway before it has a `message` instead."""
    try:
        answer = response.json()
    except ValueError:
        return False
    return isinstance(answer, dict) and isinstance(answer.get("error"), str)
