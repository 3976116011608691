"""Chooses the transport and the identity that the settings name."""

from __future__ import annotations

from openweights_prefect.errors import AuthenticationError, ConfigurationError
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


def connect(settings: Settings, *, role: Role = "authenticated", patience_seconds: float = 30.0) -> Ledger:
    """The ledger for whoever the settings name: the holder of a token, else the local person.

    `role` is what the local person acts as; a token has a role of its own. Makes no request.
    Raises `ConfigurationError` when no ledger is configured.
    """
    if not settings.database_url:
        raise ConfigurationError(
            "No ledger is configured. Run `ow up` to start the local stack, or set `OW_DATABASE_URL`."
        )
    identity: Identity = LocalIdentity(settings.organization_id, role)
    if settings.api_key:
        identity = token_identity(settings.database_url, settings.api_key)
    return PostgresLedger(settings.database_url, identity=identity, patience_seconds=patience_seconds)


def connect_pod(settings: Settings, session: str) -> Ledger:
    """The ledger as the pod sees it whose session secret this is."""
    return PostgresLedger(settings.database_url, identity=token_identity(settings.database_url, session))


def redeem_bootstrap(settings: Settings, bootstrap: str, session: str) -> None:
    """Trade a pod's one-time token for the right to use `session`; it may be repeated with the same one.

    Raises `AuthenticationError` when somebody else has redeemed it, or the pod has ended.
    """
    service = PostgresLedger(settings.database_url, identity=ServiceIdentity(), connections=1)
    try:
        [answer] = service.call(
            "redeem_bootstrap", hash=hash_secret(bootstrap), session_hash=hash_secret(session), source="local"
        )
    finally:
        service.close()
    if answer["outcome"] != "redeemed":
        raise AuthenticationError(
            f"The pod's one-time token is not accepted ({answer['outcome']}): somebody else has used it, or "
            "the pod has ended."
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
