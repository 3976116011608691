"""PostgreSQL's NOTIFY as wake-up calls. A lost one costs seconds, never work: every listener also polls."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator

import psycopg

logger = logging.getLogger(__name__)

_RECONNECT_SECONDS = 1.0
_WORTH_LISTENING_SECONDS = 0.4


async def notifications(url: str, channel: str) -> AsyncIterator[str]:
    """Yield the payloads of a channel for ever; reconnects, and yields "" once per (re)connection.

    Without a `url`, as over HTTP, there are none: it yields nothing and does not end.
    """
    if not url:
        await asyncio.Event().wait()
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


class JobListener:
    """Sleeps until a job has ended; on a connection of its own, opened at first use."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._lock = threading.Lock()
        self._connection: psycopg.Connection | None = None

    def sleep(self, job_id: str, seconds: float) -> None:
        """Sleep so long, or until the job is named. Of several threads one listens, the others just sleep."""
        deadline = time.monotonic() + seconds
        if seconds >= _WORTH_LISTENING_SECONDS and self._lock.acquire(blocking=False):
            try:
                if self._await(job_id, deadline):
                    return
            except psycopg.Error as exc:
                logger.debug("Listening for jobs was interrupted: %s", exc)
                self.close()
                self._connection = None
            finally:
                self._lock.release()
        time.sleep(max(0.0, deadline - time.monotonic()))

    def close(self) -> None:
        """Give back the connection; silent when there is none."""
        if self._connection is not None:
            self._connection.close()

    def _await(self, job_id: str, deadline: float) -> bool:
        if self._connection is None:
            left = max(1, round(deadline - time.monotonic()))
            self._connection = psycopg.connect(self._url, autocommit=True, connect_timeout=left)
            self._connection.execute("listen ow_job")
        while (left_seconds := deadline - time.monotonic()) > 0:
            for notification in self._connection.notifies(timeout=left_seconds, stop_after=1):
                if notification.payload == job_id:
                    return True
        return False
