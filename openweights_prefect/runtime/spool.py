"""The event spool: a JSON-lines file that `log()` appends to and the agent ships from.

Each record is one `write` with a line feed at both ends: what a killed process or a full disk tore is closed
by the next record. A torn record's `append` never returned, or it was written again.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from openweights_prefect.types.canonical import decode_event, encode_event

MAX_EVENT_BYTES = 16 * 1024 * 1024
_KEPT_BYTES = 64 * 1024 * 1024
_LONGEST_LINE = MAX_EVENT_BYTES + 1000
_SHOWN_CHARACTERS = 1000
_LATEST = 253_402_300_799  # The last second of the year 9999.

_START = '{"at":'
_encode = json.JSONEncoder(ensure_ascii=True, separators=(",", ":")).encode
_encode_strictly = json.JSONEncoder(allow_nan=False).encode
_PathLike = str | os.PathLike[str]


def append(spool: _PathLike, data: Mapping[str, Any], *, file: str | None = None) -> None:
    """Append one event; it is whole in the file when this returns. Any number of processes may append.

    A disk that is full, or refuses otherwise, does not raise: the event is kept in memory, up to 64 MB of
    them, and is written with the next one, by `settle`, or when the process ends. stderr says so once.
    """
    body = _encode(encode_event(data))
    if len(body) > MAX_EVENT_BYTES:
        _say(f"An event of {len(body)} bytes was logged; only its start is kept. Log it as a file.")
        body = _encode({"oversized_event": body[:_SHOWN_CHARACTERS], "bytes": len(body)})
    record = f'\n{_START}{time.time()!r},"data":{body},"file":{_encode(file) if file else "null"}}}\n'
    _backlog.write(os.fspath(spool), record.encode())


def settle() -> bool:
    """Write what the disk refused earlier; False when it still refuses."""
    return _backlog.settle()


class _Backlog:
    """Records of this process that the disk refused, in order."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # A signal handler may log, too.
        self._records: deque[tuple[str, bytes]] = deque()
        self._bytes = 0
        self._lost = 0
        self._warned = False

    def write(self, spool: str, record: bytes) -> None:
        if self._records:
            with self._lock:
                self._keep(spool, record, None)
                self.settle()
            return
        rest, error = _write(spool, record)
        if rest:
            with self._lock:
                self._keep(spool, rest, error)

    def settle(self) -> bool:
        with self._lock:
            while self._records:
                spool, record = self._records.popleft()
                rest, _ = _write(spool, record)
                if rest:
                    self._records.appendleft((spool, rest))
                    return False
                self._bytes -= len(record)
            self._bytes = 0
            return True

    def forget(self) -> None:
        """In a forked child: the records are the parent's, and another thread may have held the lock."""
        self.__init__()  # type: ignore[misc]  # a new process begins as the first one did

    def end(self) -> None:
        """Try a last time when the process ends."""
        if not self.settle() or self._lost:
            _say(f"{len(self._records) + self._lost} events were lost: the disk refused them to the end.")

    def _keep(self, spool: str, record: bytes, error: OSError | None) -> None:
        if not self._warned:
            self._warned = True
            _say(f"Events cannot be written to {spool!r} ({error}); they are kept in memory until they can.")
        if self._bytes + len(record) > _KEPT_BYTES:
            self._lost += 1
            return
        self._bytes += len(record)
        self._records.append((spool, record))


def _write(spool: str, record: bytes) -> tuple[bytes, OSError | None]:
    """What is still to be written, and why: nothing, all of it once more, or the line feed that closes it.

    The file is opened each time. To know that a descriptor kept open is still the spool, after a fork, after
    a `closerange` or when the file was replaced, takes two calls that cost as much.
    """
    try:
        descriptor = os.open(spool, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            while record:
                written = os.write(descriptor, record)
                # The rest cannot follow: another process may have written meanwhile.
                record = b"" if written == len(record) else b"\n" if written == len(record) - 1 else record
        finally:
            os.close(descriptor)
    except OSError as exc:
        return record or b"\n", exc
    return b"", None


_backlog = _Backlog()
atexit.register(_backlog.end)
os.register_at_fork(after_in_child=_backlog.forget)


class Batch(NamedTuple):
    """Some events, in order, and the position after them."""

    events: list[dict[str, Any]]
    end: int


class SpoolReader:
    """Reads a spool from where it stopped; one that was deleted to its end, then the one in its place.

    Positions count the bytes of all its files. Memory is bounded by the batch, whatever the spool holds.
    """

    def __init__(self, spool: _PathLike, *, max_events: int = 5000, max_bytes: int = 2_000_000) -> None:
        self._path = Path(spool)
        self._max_events = max_events
        self._max_bytes = max_bytes
        self._descriptor = -1
        self._close: Callable[[], object] = lambda: None
        self._identity: tuple[int, int] | None = None
        self._offset = 0  # within the file that is open
        self._passed = 0  # bytes of the files before it

    def end(self) -> int:
        """The position where the spool ends now."""
        self._follow()
        return self._passed + self._size()

    def read(self) -> Batch:
        """What comes next, up to the last whole line; without one, the position stays where it was."""
        self._follow()
        lines = self._lines()
        self._offset += sum(map(len, lines)) + len(lines)
        events = [event for line in lines if line and (event := _parse(line)) is not None]
        return Batch(events, self._passed + self._offset)

    def _lines(self) -> list[bytes]:
        if self._descriptor < 0:
            return []
        chunk = os.pread(self._descriptor, self._max_bytes, self._offset)
        if len(chunk) == self._max_bytes and b"\n" not in chunk:
            chunk = os.pread(self._descriptor, _LONGEST_LINE, self._offset)
            if len(chunk) == _LONGEST_LINE and b"\n" not in chunk:
                return [chunk[:-1]]  # No line of ours is that long: it is taken piece by piece.
        return chunk.split(b"\n", 2 * self._max_events)[:-1]

    def _follow(self) -> None:
        """Open the file, or the one that took its place once the old one is read."""
        size = self._size()
        try:
            status = self._path.stat()
            if _identity(status) == self._identity:
                if size < self._offset:  # Somebody emptied it.
                    self._passed, self._offset = self._passed + self._offset, 0
                return
            if self._lines():
                return
            descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        self._close()
        self._close = weakref.finalize(self, os.close, descriptor)
        self._descriptor, self._identity = descriptor, _identity(os.fstat(descriptor))
        self._passed, self._offset = self._passed + size, 0

    def _size(self) -> int:
        return os.fstat(self._descriptor).st_size if self._descriptor >= 0 else 0


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _parse(line: bytes) -> dict[str, Any] | None:
    """The event in a line, safe to store; None for a torn record of ours."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None if line.startswith(_START.encode()) else _unreadable(line)
    try:
        data, at, file = record["data"], float(record["at"]), record.get("file")
        if not isinstance(data, dict) or not _is_plain(data):
            data = encode_event(decode_event(data if isinstance(data, dict) else {"value": data}))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return _unreadable(line)
    return {
        "at": at if 0 <= at <= _LATEST else time.time(),
        "data": data,
        "file": file if isinstance(file, str) and file.isascii() and file.isprintable() else None,
    }


def _is_plain(data: dict[str, Any]) -> bool:
    """Whether it can be stored as it is: a job may write U+0000 or 1e999 into its spool without us."""
    try:
        return "\\u" not in _encode_strictly(data)
    except (ValueError, RecursionError):
        return False


def _unreadable(line: bytes) -> dict[str, Any]:
    """What is not an event is kept as text."""
    text = line[:_SHOWN_CHARACTERS].decode("utf-8", "replace")
    return {"at": time.time(), "data": encode_event({"unreadable_event": text}), "file": None}


def _say(text: str) -> None:
    # stderr may be on the same full disk.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print(f"openweights: {text}", file=sys.stderr, flush=True)
