"""Ships what a run leaves on disk, its log and its events, to the ledger: in order, each piece once.

The ledger keeps how far it got, so a batch that is sent twice is stored once. What is on disk but not yet
shipped survives everything but the loss of the pod's disk.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID

from openweights_prefect.errors import OpenWeightsError
from openweights_prefect.ledger.protocol import Ledger
from openweights_prefect.pod.outage import call_until_answered
from openweights_prefect.runtime import spool
from openweights_prefect.runtime.entrypoint import RunFolder

_LOOK_SECONDS = 0.1
_LOG_PIECE_BYTES = 256 * 1024

Observer = Callable[[list[dict[str, Any]], str], Awaitable[None]]


class StaleRun(OpenWeightsError):
    """The run is no longer ours: its lease was given away. Stop it, write nothing."""


class Shipper:
    """Ships one run. `observer(events, log_text)` sees everything after it is stored."""

    def __init__(
        self, *, ledger: Ledger, folder: RunFolder, run_id: UUID, boot: UUID, observer: Observer
    ) -> None:
        self._ledger = ledger
        self._folder = folder
        self._run_id = run_id
        self._boot = boot
        self._observer = observer
        self._log_offset = 0
        self._spool_offset = 0
        self._sequence = 0
        self._lock = asyncio.Lock()

    async def run(self, pace_seconds: float = 0.5) -> None:
        """Ship what appears until canceled; raises `StaleRun` when the ledger refuses it."""
        last = 0.0
        while True:
            if self._behind() and time.monotonic() - last >= pace_seconds:
                last = time.monotonic()
                await self.drain()
            await asyncio.sleep(_LOOK_SECONDS)

    async def drain(self) -> None:
        """Return when everything that was on disk at the time of the call is stored."""
        async with self._lock:
            while self._behind():
                events = await self._ship_events()
                text = await self._ship_log()
                if not events and not text:  # an unfinished last line
                    return
                await self._observer(events, text)

    def _behind(self) -> bool:
        return _size(self._folder.log) > self._log_offset or _size(self._folder.spool) > self._spool_offset

    async def _ship_events(self) -> list[dict[str, Any]]:
        events, offset = await asyncio.to_thread(spool.read_batch, self._folder.spool, self._spool_offset)
        if events:
            await self._store("append_events", first_sequence=self._sequence, batch=events)
            self._sequence += len(events)
            self._spool_offset = offset
        return events

    async def _ship_log(self) -> str:
        piece = await asyncio.to_thread(_read_piece, self._folder, self._log_offset)
        if not piece:
            return ""
        text = piece.decode("utf-8", "replace").replace("\x00", "\ufffd")
        end = self._log_offset + len(piece)
        await self._store("append_log", from_offset=self._log_offset, to_offset=end, piece=text)
        self._log_offset = end
        return text

    async def _store(self, function: str, **arguments: Any) -> None:
        answer = await call_until_answered(
            self._ledger, function, for_run=self._run_id, as_boot=self._boot, **arguments
        )
        if answer["outcome"] != "stored":
            raise StaleRun(f"Run {self._run_id} is not ours any more ({answer['outcome']}).")


def _size(path: Any) -> int:
    try:
        return int(path.stat().st_size)
    except FileNotFoundError:
        return 0


def _read_piece(folder: RunFolder, offset: int) -> bytes:
    """The next bytes of the log, cut after a line or, in a long line, between two characters."""
    with folder.log.open("rb") as stream:
        stream.seek(offset)
        piece = stream.read(_LOG_PIECE_BYTES)
    if (newline := piece.rfind(b"\n")) >= 0:
        return piece[: newline + 1]
    for cut in range(1, 4):  # a character's first byte without the rest of it
        if cut <= len(piece) and piece[-cut] >= 0xC0:
            needed = 2 if piece[-cut] < 0xE0 else 3 if piece[-cut] < 0xF0 else 4
            return piece[:-cut] if cut < needed else piece
    return piece
