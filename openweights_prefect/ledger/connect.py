"""Chooses the transport and the identity that the settings name."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from openweights_prefect.errors import AuthenticationError, ConfigurationError, LedgerUnavailable
from openweights_prefect.ledger.identity import (
    Identity,
    LocalIdentity,
    Role,
    ServiceIdentity,
    hash_secret,
)
from openweights_prefect.ledger.postgres import PostgresLedger, token_identity
from openweights_prefect.ledger.protocol import Ledger
from openweights_prefect.settings import LOCAL_ORGANIZATION_ID, Settings

if TYPE_CHECKING:
    from openweights_prefect.ledger.access import AccessTokens

_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def connect(
    settings: Settings,
    *,
    role: Role = "authenticated",
    access: AccessTokens | None = None,
    patience_seconds: float = 30.0,
) -> Ledger:
    """The ledger for whoever the settings name: the holder of a token, else the local person.

    `role` is what the local person acts as; a token has a role of its own. `access` is from `access_tokens`,
    for whom something else shares it. Makes no request. Raises `ConfigurationError` when no ledger is
    configured, or a token is missing.
    """
    if settings.supabase_url:
        access = access or _exchanged(settings, settings.api_key)
        return supabase_ledger(settings, access, patience_seconds=patience_seconds)
    if not settings.database_url:
        raise ConfigurationError(
            "No ledger is configured. Run `ow up` to start the local stack, `ow login` to use one elsewhere, "
            "or set `OW_DATABASE_URL`."
        )
    identity: Identity = LocalIdentity(settings.organization_id, role)
    if settings.api_key:
        identity = token_identity(settings.database_url, settings.api_key)
    return PostgresLedger(settings.database_url, identity=identity, patience_seconds=patience_seconds)


def access_tokens(settings: Settings, secret: str = "") -> AccessTokens | None:
    """The JWTs of a Supabase project for an API token, or for `secret`; None for a ledger without HTTP."""
    return _exchanged(settings, secret or settings.api_key) if settings.supabase_url else None


def supabase_ledger(
    settings: Settings,
    access: AccessTokens,
    *,
    organization_id: str | None = None,
    patience_seconds: float = 30.0,
) -> Ledger:
    """The ledger of a Supabase project; `organization_id` is for people, whose tokens name none."""
    from openweights_prefect.ledger.supabase import SupabaseLedger  # Needs an extra, which only it needs.

    return SupabaseLedger(
        project_url(settings),
        settings.supabase_key,
        access=access,
        organization_id=organization_id,
        patience_seconds=patience_seconds,
    )


def connect_pod(settings: Settings, session: str, *, access: AccessTokens | None = None) -> Ledger:
    """The ledger as the pod sees it whose session secret this is."""
    if settings.supabase_url:
        return supabase_ledger(settings, access or _exchanged(settings, session))
    return PostgresLedger(settings.database_url, identity=token_identity(settings.database_url, session))


def redeem_bootstrap(settings: Settings, bootstrap: str, session: str) -> None:
    """Trade a pod's one-time token for the right to use `session`; it may be repeated with the same one.

    Raises `AuthenticationError` when somebody else has redeemed it, or the pod has ended, and
    `LedgerUnavailable` when it may work later.
    """
    if settings.supabase_url:
        from openweights_prefect.ledger.bootstrap import redeem_over_http  # Only pods need it.

        outcome = redeem_over_http(exchange_url(settings), settings.supabase_key, bootstrap, session)
    else:
        outcome = _redeem_in_database(settings.database_url, bootstrap, session)
    if outcome == "limited":
        raise LedgerUnavailable("Too many unknown tokens came from this address; it is to be tried later.")
    if outcome != "redeemed":
        raise AuthenticationError(
            f"The pod's one-time token is not accepted ({outcome}): somebody else has used it, or the pod "
            "has ended."
        )


def check_organization(settings: Settings, ledger: Ledger) -> str:
    """The organization that the ledger's caller acts for; raises when the settings ask for another one."""
    actual = ledger.organization_id
    if settings.organization_id not in (actual, LOCAL_ORGANIZATION_ID):
        raise AuthenticationError(
            f"The token belongs to organization {actual!r}, not to {settings.organization_id!r}. "
            "Leave `organization_id` (or OW_ORGANIZATION_ID) out, or use a token of that organization."
        )
    return actual


def project_url(settings: Settings) -> str:
    """The address of the Supabase project; raises `ConfigurationError` for one that gets no secrets."""
    url, parts = settings.supabase_url.rstrip("/"), urlsplit(settings.supabase_url)
    if parts.scheme not in ("https", "http") or not parts.hostname or parts.username or parts.query:
        raise ConfigurationError(
            f"SUPABASE_URL={url!r} is not the address of a project. Write it like https://<ref>.supabase.co."
        )
    if parts.scheme == "http" and parts.hostname not in _LOOPBACK:
        raise ConfigurationError(
            f"SUPABASE_URL={url!r} would send tokens unencrypted. Write it with https://; http:// is for "
            "this machine only."
        )
    if not settings.supabase_key:
        raise ConfigurationError(
            f"The Supabase project {url!r} (`supabase_url`) needs its publishable key. Set "
            "`SUPABASE_ANON_KEY` (or `supabase_key`); the dashboard has it under Project Settings, API Keys."
        )
    return url


def exchange_url(settings: Settings) -> str:
    """Where the project trades API tokens for short-lived JWTs."""
    return f"{project_url(settings)}/functions/v1/exchange"


def _exchanged(settings: Settings, secret: str) -> AccessTokens:
    url = exchange_url(settings)
    if not secret:
        raise ConfigurationError(
            f"The ledger at {settings.supabase_url!r} needs a token. Run `ow login`, or set "
            "`OPENWEIGHTS_API_KEY` (or `auth_token`) to one that `ow token create` made."
        )
    from openweights_prefect.ledger.access import AccessTokens, TokenExchange  # Slow: only HTTP needs it.

    return AccessTokens(TokenExchange(url, secret, key=settings.supabase_key))


def _redeem_in_database(url: str, bootstrap: str, session: str) -> str:
    service = PostgresLedger(url, identity=ServiceIdentity(), connections=1)
    try:
        [answer] = service.call(
            "redeem_bootstrap", hash=hash_secret(bootstrap), session_hash=hash_secret(session), source="local"
        )
    finally:
        service.close()
    return str(answer["outcome"])
