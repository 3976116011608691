"""Behind `/functions/v1/exchange`: the ledger as `service_role`, and the tokens that a test grants."""

from __future__ import annotations

import secrets
import time
from typing import Any

from openweights_prefect.ledger.identity import Claims, ServiceIdentity, hash_secret
from openweights_prefect.ledger.postgres import PostgresLedger
from openweights_prefect.ledger.protocol import Row


class ExchangeLedger:
    """A `Ledger` for the token exchange; a granted token needs no row in the database."""

    organization_id = ""

    def __init__(self, url: str) -> None:
        self.exchanges = 0
        self._ledger = PostgresLedger(url, identity=ServiceIdentity(), connections=2)
        self._granted: dict[str, tuple[Claims, int]] = {}

    def grant(self, claims: Claims, *, lifetime_seconds: int = 900) -> str:
        """A new API token whose JWTs carry these claims and live so long."""
        token = f"ow_{secrets.token_urlsafe(32)}"
        self._granted[hash_secret(token)] = (claims, lifetime_seconds)
        return token

    def call(self, function: str, *, patience_seconds: float | None = None, **arguments: Any) -> list[Row]:
        """Answer from the granted tokens, or ask the database."""
        self.exchanges += 1
        if function == "exchange_token" and arguments["hash"] in self._granted:
            claims, lifetime_seconds = self._granted[arguments["hash"]]
            expires_at = int(time.time()) + lifetime_seconds
            return [{"outcome": "granted", "claims": {**claims, "exp": expires_at}}]
        return self._ledger.call(function, patience_seconds=patience_seconds, **arguments)

    def close(self) -> None:
        """Close the connections to the database."""
        self._ledger.close()
