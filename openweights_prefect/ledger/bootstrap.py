"""The first request of a pod over HTTP: its one-time token for the right to use a session of its own."""

from __future__ import annotations

import httpx

from openweights_prefect.errors import ConfigurationError, LedgerUnavailable
from openweights_prefect.ledger.identity import hash_secret

_TIMEOUT_SECONDS = 10


def redeem_over_http(url: str, key: str, bootstrap: str, session: str) -> str:
    """Ask the token exchange at `url` once; the outcome as the ledger names it.

    The session secret stays here: only its hash is sent.
    """
    body = {"bootstrap": bootstrap, "session_hash": hash_secret(session)}
    try:
        response = httpx.post(url, json=body, headers={"apikey": key}, timeout=_TIMEOUT_SECONDS)
    except httpx.TransportError as exc:
        raise LedgerUnavailable(
            f"The token exchange at {url!r} did not answer ({type(exc).__name__}: {exc})."
        ) from exc
    if response.status_code == httpx.codes.OK:
        return "redeemed"
    if response.status_code == httpx.codes.TOO_MANY_REQUESTS:
        return "limited"
    if response.status_code == httpx.codes.UNAUTHORIZED and _says(response, "invalid_token"):
        return "refused"
    if response.status_code >= httpx.codes.INTERNAL_SERVER_ERROR:
        raise LedgerUnavailable(f"The token exchange at {url!r} answered {response.status_code}.")
    raise ConfigurationError(
        f"There is no token exchange at {url!r}: it answered {response.status_code}. Check `SUPABASE_URL`, "
        "`SUPABASE_ANON_KEY`, and that the edge function `exchange` is deployed."
    )


def _says(response: httpx.Response, error: str) -> bool:
    """Whether the exchange itself answered; the gateway before it names no `error`."""
    try:
        answer = response.json()
    except ValueError:
        return False
    return isinstance(answer, dict) and answer.get("error") == error
