"""People who sign in with an email address and a password, through Supabase Auth."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import httpx
from filelock import FileLock
from filelock import Timeout as LockTimeout

from openweights_prefect.errors import (
    AuthenticationError,
    ConfigurationError,
    InvalidRequestError,
    OpenWeightsError,
)
from openweights_prefect.ledger.access import AccessToken, AccessUnavailable

if TYPE_CHECKING:
    from supabase_auth import SyncGoTrueClient
    from supabase_auth.types import AuthResponse

_TIMEOUT_SECONDS = 15
# What Supabase Auth calls the ends of a session, and a wrong password.
_NOT_SIGNED_IN = {
    "bad_jwt",
    "email_not_confirmed",
    "invalid_credentials",
    "no_authorization",
    "refresh_token_already_used",
    "refresh_token_not_found",
    "session_expired",
    "session_not_found",
    "user_banned",
    "user_not_found",
}


@dataclass(frozen=True)
class Session:
    """A person who is signed in; whoever has the refresh token is that person."""

    user_id: str
    email: str
    access_token: str = field(repr=False)
    refresh_token: str = field(repr=False)
    expires_at: float
    """Of the access token, in seconds since 1970 by this machine's clock."""


class SupabaseAuth:
    """Sign-up, sign-in and sign-out; remembers nothing between calls."""

    def __init__(self, url: str, key: str) -> None:
        self._http = httpx.Client(timeout=_TIMEOUT_SECONDS)
        self._url = f"{url.rstrip('/')}/auth/v1"
        self._headers = {"apikey": key, "Authorization": f"Bearer {key}"}

    def sign_up(self, email: str, password: str) -> Session | None:
        """Create an account; None when its address has to be confirmed before the first sign-in."""
        with _errors_named("sign up"):
            return _session(self._client().sign_up({"email": email, "password": password}))

    def sign_in(self, email: str, password: str) -> Session:
        """Open a session; raises `AuthenticationError` when address and password do not fit."""
        with _errors_named("sign in"):
            response = self._client().sign_in_with_password({"email": email, "password": password})
        return _opened(_session(response))

    def refresh(self, refresh_token: str) -> Session:
        """The same session with new tokens; the old refresh token is used up."""
        with _errors_named("refresh the session"):
            response = self._client().refresh_session(refresh_token)
        return _opened(_session(response))

    def sign_out(self, session: Session) -> None:
        """End the session on the server; silent when it has ended already."""
        try:
            with _errors_named("sign out"):
                self._client().admin.sign_out(session.access_token, "local")
        except AuthenticationError:
            return

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def _client(self) -> SyncGoTrueClient:
        """A client for one call: it would keep the session of the last one."""
        from supabase_auth import SyncGoTrueClient  # Half a second, which only people who sign in pay.

        return SyncGoTrueClient(
            url=self._url,
            headers=self._headers,
            http_client=self._http,
            persist_session=False,
            auto_refresh_token=False,
        )


class SessionFile:
    """Where a session outlives the process: a file that only its owner can read, shared between processes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = FileLock(f"{path}.lock", mode=0o600)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Let one process at a time refresh: a refresh token that is used twice ends the session."""
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            with self._lock.acquire(timeout=_TIMEOUT_SECONDS):
                yield
        except LockTimeout as exc:
            raise AccessUnavailable(f"Another process holds {self._lock.lock_file!r}. Try again.") from exc

    def load(self) -> Session | None:
        """The session, or None when nobody is signed in here."""
        try:
            return Session(**json.loads(self._path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError):
            problem = f"The session in {str(self._path)!r} cannot be read. Sign in again with `ow login`."
        raise AuthenticationError(problem)  # Outside the handler: a cause may quote the file.

    def save(self, session: Session) -> None:
        """Replace the session as a whole."""
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = self._path.with_name(f".{self._path.name}.{uuid4().hex}")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
                json.dump(asdict(session), stream)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(self._path)
        finally:
            temporary.unlink(missing_ok=True)

    def remove(self) -> None:
        """Forget the session; silent when there is none."""
        self._path.unlink(missing_ok=True)


class SessionRefresh:
    """Fetches access tokens for the person whose session is in a file."""

    def __init__(self, auth: SupabaseAuth, file: SessionFile) -> None:
        self._auth = auth
        self._file = file
        self._used = ""

    def __call__(self) -> AccessToken:
        """A token that we did not give before: the file's, if another process refreshed it, or a new one."""
        with self._file.exclusive():
            session = self._file.load()
            if session is None:
                raise AuthenticationError(
                    "Nobody is signed in. Run `ow login`, or set `OPENWEIGHTS_API_KEY`."
                )
            if session.access_token == self._used or session.expires_at <= time.time():
                session = self._auth.refresh(session.refresh_token)
                self._file.save(session)
        self._used = session.access_token
        return AccessToken(session.access_token, session.expires_at - time.time())


def _session(response: AuthResponse) -> Session | None:
    opened, user = response.session, response.user
    if opened is None or user is None:
        return None
    return Session(
        user_id=user.id,
        email=user.email or "",
        access_token=opened.access_token,
        refresh_token=opened.refresh_token,
        expires_at=time.time() + opened.expires_in,
    )


def _opened(session: Session | None) -> Session:
    if session is None:
        raise AuthenticationError("Supabase Auth opened no session. Confirm the email address, then sign in.")
    return session


@contextmanager
def _errors_named(action: str) -> Iterator[None]:
    from supabase_auth.errors import AuthApiError, AuthError, AuthRetryableError, AuthWeakPasswordError

    try:
        yield
    except (AuthApiError, AuthRetryableError, AuthWeakPasswordError) as exc:
        raise _failure(action, exc.status, exc.code, exc.message) from exc
    except AuthError as exc:
        raise AccessUnavailable(
            f"Cannot {action}: Supabase Auth did not answer as it should ({exc})."
        ) from exc


def _failure(action: str, status: int, code: str | None, message: str) -> OpenWeightsError:
    reason = f"Cannot {action}: {message.rstrip('.')}"
    if status in (0, 408, 429) or status >= 500:
        return AccessUnavailable(f"{reason} (status {status}). Try again in a moment.")
    if code in _NOT_SIGNED_IN:
        return AuthenticationError(f"{reason}. Sign in with `ow login`.")
    if status in (401, 404):
        return ConfigurationError(f"{reason}. Check `SUPABASE_URL` and `SUPABASE_ANON_KEY`.")
    return InvalidRequestError(f"{reason}.")
