"""Ships what a run leaves on disk, its log and its events, to the ledger: in order, each piece once.

The ledger keeps how far it got, so a batch that is sent twice is stored once. What is on disk but not yet
shipped survives everything but the loss of the pod's disk.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID

from openweights_prefect.errors import OpenWeightsError
from openweights_prefect.ledger.protocol import Ledger
from openweights_prefect.pod.outage import call_until_answered
from openweights_prefect.pod.redaction import Redaction
from openweights_prefect.runtime.entrypoint import RunFolder
from openweights_prefect.runtime.spool import Batch, SpoolReader

_LOOK_SECONDS = 0.1
_LOG_PIECE_BYTES = 256 * 1024
_BATCHES_IN_MEMORY = 2  # One is stored while the next is read.

Observer = Callable[[list[dict[str, Any]], str], Awaitable[None]]


class StaleRun(OpenWeightsError):
    """The run is no longer ours: its lease was given away. Stop it, write nothing."""


class Shipper:
    """Ships one run. `observer(events, log_text)` sees everything after it is stored.

    What `redaction` knows, if anything, leaves the pod as `***`.
    """

    def __init__(
        self,
        *,
        ledger: Ledger,
        folder: RunFolder,
        run_id: UUID,
        boot: UUID,
        observer: Observer,
        redaction: Redaction | None = None,
    ) -> None:
        self._ledger = ledger
        self._folder = folder
        self._run_id = run_id
        self._boot = boot
        self._observer = observer
        self._redaction = redaction or None
        self._spool = SpoolReader(folder.spool)
        self._reading = threading.Lock()
        self._batches: deque[Batch] = deque()  # read, not yet stored
        self._read_to = 0
        self._stored_to = 0
        self._sequence = 0
        self._log_offset = 0
        self._lock = asyncio.Lock()

    async def run(self, pace_seconds: float = 0.5) -> None:
        """Ship what appears until canceled; raises `StaleRun` when the ledger refuses it."""
        while True:
            shipped = await self.drain()
            await asyncio.sleep(pace_seconds if shipped else _LOOK_SECONDS)

    async def drain(self, *, last: bool = False) -> bool:
        """Return when everything that was on disk at the time of the call is stored; False: it was.

        Unless it is the `last` time, an end of the log that may begin a secret's value waits for the rest.
        """
        log_end, spool_end = await asyncio.to_thread(self._ends)
        shipped = False
        async with self._lock:
            while True:
                events = await self._ship_events() if self._stored_to < spool_end else []
                text = await self._ship_log(log_end if last else None) if self._log_offset < log_end else ""
                if not events and not text:  # perhaps an unfinished last line
                    return shipped
                shipped = True
                await self._observer(events, text)

    def _ends(self) -> tuple[int, int]:
        with self._reading:
            return _size(self._folder.log), self._spool.end()

    async def _ship_events(self) -> list[dict[str, Any]]:
        if not self._batches:
            await asyncio.to_thread(self._read_ahead)
        if not self._batches:
            self._stored_to = self._read_to
            return []
        events, end = self._batches[0]
        await asyncio.gather(
            self._store("append_events", first_sequence=self._sequence, batch=events),
            asyncio.to_thread(self._read_ahead),
        )
        self._batches.popleft()
        self._sequence += len(events)
        self._stored_to = end
        return events

    def _read_ahead(self) -> None:
        """Read the next batch, unless enough of them wait. What is read stays here until it is stored."""
        with self._reading:
            if len(self._batches) >= _BATCHES_IN_MEMORY:
                return
            batch = self._spool.read()
            while batch.end > self._read_to and not batch.events:  # nothing but torn lines
                self._read_to = batch.end
                batch = self._spool.read()
            if batch.events:
                self._read_to = batch.end
                self._batches.append(self._redacted(batch))

    def _redacted(self, batch: Batch) -> Batch:
        if self._redaction is None:
            return batch
        redact = self._redaction.data
        return Batch([{**event, "data": redact(event["data"])} for event in batch.events], batch.end)

    async def _ship_log(self, last_end: int | None) -> str:
        piece = await asyncio.to_thread(_read_piece, self._folder, self._log_offset)
        end = self._log_offset + len(piece)
        if self._redaction is not None:
            is_last = last_end is not None and end >= last_end
            piece, taken = await asyncio.to_thread(self._redaction.piece, piece, last=is_last)
            end = self._log_offset + taken
        if not piece:
            return ""
        text = piece.decode("utf-8", "replace").replace("\x00", "\ufffd")
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
