"""Calls of the ledger that outlast its outages: an outage ends a run only by its lease."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from openweights_prefect.errors import LedgerUnavailable
from openweights_prefect.ledger.protocol import Ledger, Row

logger = logging.getLogger(__name__)


async def call_until_answered(ledger: Ledger, function: str, **arguments: Any) -> Row:
    """The first row of the answer, however long the ledger is away.

    Whoever calls it holds a lease: when the ledger is back and gave that away, the answer says so.
    """
    return (await rows_until_answered(ledger, function, **arguments))[0]


async def rows_until_answered(ledger: Ledger, function: str, **arguments: Any) -> list[Row]:
    """All rows of the answer, likewise."""
    while True:
        try:
            return await asyncio.to_thread(ledger.call, function, **arguments)
        except LedgerUnavailable as exc:
            logger.warning("%s", exc)
