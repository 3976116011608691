"""The event spool: a JSON-lines file that `log()` appends to and the agent ships from."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from openweights_prefect.types.canonical import encode_event


def append(spool: str | os.PathLike[str], data: Mapping[str, Any], *, file: str | None = None) -> None:
    """Append one event; it is whole on disk when this returns. Any number of processes may append."""
    record = {"at": time.time(), "data": encode_event(data), "file": file}
    line = json.dumps(record, ensure_ascii=True, separators=(",", ":")).encode() + b"\n"
    descriptor = os.open(spool, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        while line:
            line = line[os.write(descriptor, line) :]
    finally:
        os.close(descriptor)


def read_batch(
    spool: Path, offset: int, *, max_events: int = 500, max_bytes: int = 4_000_000
) -> tuple[list[dict[str, Any]], int]:
    """Whole events from byte `offset` on, and the offset after them; an unfinished last line waits."""
    try:
        with spool.open("rb") as stream:
            stream.seek(offset)
            chunk = stream.read(max_bytes)
            while b"\n" not in chunk and (more := stream.read(max_bytes)):
                chunk += more
    except FileNotFoundError:
        return [], offset
    lines = chunk.split(b"\n")[:-1][:max_events]
    return [_parse(line) for line in lines], offset + sum(len(line) + 1 for line in lines)


def _parse(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
        data = record["data"] if isinstance(record["data"], dict) else {"value": record["data"]}
        return {"at": float(record["at"]), "data": data, "file": record.get("file")}
    except (ValueError, KeyError, TypeError):
        # A job may write anything into its spool; what is not an event is kept as text.
        return {
            "at": time.time(),
            "data": {"unreadable_event": line.decode("utf-8", "replace")},
            "file": None,
        }
