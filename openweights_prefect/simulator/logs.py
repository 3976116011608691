"""What a pod says: the system's lines in memory, the container's in a file."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

from openweights_prefect.simulator.model import iso

_SYSTEM_LINES = 500
_POLL_SECONDS = 0.2
_KEEPALIVE_SECONDS = 15.0


@dataclass(frozen=True)
class LogLine:
    """One line of a pod's log."""

    at: float
    source: str
    text: str

    def event(self, number: int) -> str:
        """As a server-sent event."""
        stamp = iso(self.at)
        data = json.dumps({"ts": stamp, "source": self.source, "line": self.text})
        return f"id: {stamp}/{number:012}\ndata: {data}\n\n"


class PodLogs:
    """The system lines of all pods."""

    def __init__(self) -> None:
        self._lines: dict[str, deque[LogLine]] = {}

    def system(self, pod_id: str, text: str) -> None:
        """Add a line of the host."""
        lines = self._lines.setdefault(pod_id, deque(maxlen=_SYSTEM_LINES))
        lines.append(LogLine(time.time(), "system", text))

    def lines(self, pod_id: str) -> list[LogLine]:
        """The host's lines on a pod."""
        return [*self._lines.get(pod_id, ())]

    def forget(self, pod_id: str) -> None:
        """Drop the lines of a pod that is gone."""
        self._lines.pop(pod_id, None)


async def follow(
    *, system: Callable[[], list[LogLine]], container: Path, source: str, tail: int, alive: Callable[[], bool]
) -> AsyncIterator[str]:
    """Server-sent events: the last `tail` lines of each source, then new ones until the pod is gone."""
    file = _FileTail(container)
    said = [] if source == "container" else system()
    printed = [] if source == "system" else file.new_lines()
    number, told, idle_since = 0, len(said), time.monotonic()
    lines = sorted([*said[-tail:], *printed[-tail:]] if tail else [], key=lambda line: line.at)
    while True:
        for line in lines:
            number += 1
            yield line.event(number)
        if lines:
            idle_since = time.monotonic()
        elif time.monotonic() - idle_since > _KEEPALIVE_SECONDS:
            idle_since = time.monotonic()
            yield ": keepalive\n\n"
        if not alive():
            return
        await asyncio.sleep(_POLL_SECONDS)
        said = [] if source == "container" else system()[told:]
        told += len(said)
        lines = [*said, *([] if source == "system" else file.new_lines())]


def move_if_large(log: Path, limit_bytes: int) -> None:
    """Copy a log to `container.log.1` and empty it; the container keeps writing to the same file."""
    if log.exists() and log.stat().st_size > limit_bytes:
        shutil.copyfile(log, log.with_name(log.name + ".1"))
        with log.open("r+b") as file:
            file.truncate(0)


class _FileTail:
    """Reads the whole lines that were added to a file since the last time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0

    def new_lines(self) -> list[LogLine]:
        if not self._path.exists():
            return []
        if self._path.stat().st_size < self._position:
            self._position = 0
        with self._path.open("rb") as file:
            file.seek(self._position)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._position += len(whole)
        now = time.time()
        return [LogLine(now, "container", text) for text in whole.decode(errors="replace").splitlines()]
