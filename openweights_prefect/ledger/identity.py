"""Who a caller of the ledger is: claims, as a verified JWT would carry them."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

from openweights_prefect.errors import AuthenticationError

Claims = Mapping[str, Any]
Role = Literal["authenticated", "ow_worker", "ow_pod", "service_role"]

LOCAL_USER_ID = "00000000-0000-0000-0000-00000000a001"
"""The one person of a local installation, who is whoever may open its database."""

_REFRESH_SECONDS = 60.0
_LONGEST_SECONDS = 900.0


class Identity(Protocol):
    """Gives the claims of a call: `role` is the database role, the rest says for whom."""

    def claims(self) -> Claims:
        """Claims that are valid now; may make a request. Raises `AuthenticationError`."""
        ...


class LocalIdentity:
    """The local person in one organization, with a person's rights or the control plane's."""

    def __init__(self, organization_id: str, role: Role = "authenticated") -> None:
        self._claims = {
            "role": role,
            "aud": "authenticated",
            "sub": LOCAL_USER_ID,
            "organization_id": organization_id,
        }

    def claims(self) -> Claims:
        """Always the same."""
        return self._claims


class ServiceIdentity:
    """The token exchange: no person and no organization."""

    def claims(self) -> Claims:
        """Always the same."""
        return {"role": "service_role", "aud": "authenticated"}


class TokenIdentity:
    """An API token or a pod's session secret; `exchange` turns its hash into claims of a few minutes.

    Exchanged a minute before the claims end, by one thread at a time. The secret is never sent anywhere.
    """

    def __init__(self, token: str, exchange: Callable[[str], Claims]) -> None:
        self._hash = hash_secret(token)
        self._exchange = exchange
        self._lock = threading.Lock()
        self._current: Claims = {}
        self._fresh_until = 0.0

    def claims(self) -> Claims:
        """The claims of the token; the first call, and one every few minutes, makes a request."""
        with self._lock:
            if time.monotonic() >= self._fresh_until:
                self._current = self._exchange(self._hash)
                # By our clock only how long they last, never when: it may differ from the server's.
                lasts = min(self._current["exp"] - self._current["iat"], _LONGEST_SECONDS)
                self._fresh_until = time.monotonic() + lasts - min(_REFRESH_SECONDS, lasts / 4)
            return self._current


def hash_secret(secret: str) -> str:
    """SHA-256 in hex: all that the ledger ever sees of a token of 256 random bits."""
    return hashlib.sha256(secret.encode()).hexdigest()


def granted(answer: Mapping[str, Any]) -> Claims:
    """The claims in an answer of `exchange_token`; raises `AuthenticationError` for a refusal."""
    if answer["outcome"] == "limited":
        raise AuthenticationError(
            f"Too many unknown tokens came from here; wait {answer['retry_after']} s and try again."
        )
    if answer["outcome"] != "granted":
        raise AuthenticationError(
            "The token is unknown, expired or revoked. Check `OPENWEIGHTS_API_KEY`, or run `ow login`."
        )
    claims: Claims = answer["claims"]
    return claims
