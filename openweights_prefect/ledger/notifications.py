"""PostgreSQL's NOTIFY as wake-up calls. A lost one costs seconds, never work: every listener also polls."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

import psycopg

logger = logging.getLogger(__name__)

_RECONNECT_SECONDS = 1.0


async def notifications(url: str, channel: str) -> AsyncIterator[str]:
    """Yield the payloads of a channel for ever; reconnects, and yields "" once per (re)connection."""
    while True:
        try:
            async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
                await connection.execute(psycopg.sql.SQL("listen {}").format(psycopg.sql.Identifier(channel)))
                yield ""
                async for notification in connection.notifies():
                    yield notification.payload
        except psycopg.OperationalError as exc:
            logger.info("Listening on %s was interrupted: %s", channel, exc)
        await asyncio.sleep(_RECONNECT_SECONDS)
