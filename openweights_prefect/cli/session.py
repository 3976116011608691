"""What the commands work with: the user's environment, the client, the ledger."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager

from openweights_prefect.client import OpenWeights
from openweights_prefect.errors import ConfigurationError
from openweights_prefect.ledger.postgres import PostgresLedger
from openweights_prefect.settings import Settings


def user_environment() -> Mapping[str, str]:
    """The environment that `ow` was called with, for the services that it starts."""
    return os.environ


@contextmanager
def open_ledger() -> Iterator[PostgresLedger]:
    """The ledger itself, for what the client does not offer."""
    settings = Settings.load()
    if not settings.database_url:
        raise ConfigurationError(
            "No ledger is configured. Run `ow up` to start the local stack, or set `OW_DATABASE_URL`."
        )
    with closing(PostgresLedger(settings.database_url, organization_id=settings.organization_id)) as ledger:
        yield ledger


def open_client() -> OpenWeights:
    """The client that the settings name; a context manager."""
    return OpenWeights()
