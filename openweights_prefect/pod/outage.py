"""Calls that outlast outages of the ledger and of the file store: an outage ends a run only by its lease."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from openweights_prefect.errors import LedgerUnavailable
from openweights_prefect.files.store import FileStoreError
from openweights_prefect.ledger.protocol import Ledger, Row, ask
from openweights_prefect.pod.library import Library

logger = logging.getLogger(__name__)

_STORE_SECONDS = 600.0
_PAUSE_SECONDS = 2.0


async def call_until_answered(ledger: Ledger, function: str, **arguments: Any) -> Row:
    """The first row of the answer, however long the ledger is away.

    Whoever calls it holds a lease: when the ledger is back and gave that away, the answer says so.
    """
    return (await rows_until_answered(ledger, function, **arguments))[0]


async def rows_until_answered(ledger: Ledger, function: str, **arguments: Any) -> list[Row]:
    """All rows of the answer, likewise."""
    while True:
        try:
            return await ask(ledger, function, **arguments)
        except LedgerUnavailable as exc:
            logger.warning("%s", exc)


async def upload_until_stored(library: Library, path: str, *, purpose: str, name: str) -> Row:
    """Store a file, however often it takes; raises `FileStoreError` when that fails for ten minutes."""
    clock = asyncio.get_running_loop().time
    deadline = clock() + _STORE_SECONDS
    while True:
        try:
            return await asyncio.to_thread(library.upload, path, purpose=purpose, name=name)
        except FileStoreError as exc:
            if clock() > deadline:
                raise
            logger.warning("%r is not stored yet: %s", name, exc)
        await asyncio.sleep(_PAUSE_SECONDS)
