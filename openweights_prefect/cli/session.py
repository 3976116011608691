"""What the commands work with: the user's environment, the client, the ledger."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager

from openweights_prefect.client import OpenWeights
from openweights_prefect.ledger.connect import connect
from openweights_prefect.ledger.protocol import Ledger
from openweights_prefect.settings import Settings


def user_environment() -> Mapping[str, str]:
    """The environment that `ow` was called with, for the services that it starts."""
    return os.environ


@contextmanager
def open_ledger() -> Iterator[Ledger]:
    """The ledger itself, for what the client does not offer."""
    with closing(connect(Settings.load())) as ledger:
        yield ledger


def open_client() -> OpenWeights:
    """The client that the settings name; a context manager."""
    return OpenWeights()
