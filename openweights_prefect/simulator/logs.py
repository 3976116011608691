"""What a pod says: the lines of its host, and those of its container's log file."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from openweights_prefect.simulator.clock import Clock
from openweights_prefect.simulator.model import iso

_MOST_LINES = 5000
_POLL_SECONDS = 0.2
_KEEPALIVE_SECONDS = 15.0


@dataclass(frozen=True)
class LogLine:
    """One line of a pod's log."""

    number: int
    """Of this pod, from 1; what a client goes on from."""
    at: float
    source: str
    text: str

    def event(self) -> str:
        """As a server-sent event."""
        stamp = iso(self.at)
        data = json.dumps({"ts": stamp, "source": self.source, "line": self.text})
        return f"id: {stamp}/{self.number:012}\ndata: {data}\n\n"


class PodLogs:
    """The latest lines of all pods."""

    def __init__(self, clock: Clock, folder: Callable[[str], Path]) -> None:
        self._clock = clock
        self._folder = folder
        self._pods: dict[str, _PodLog] = {}

    def system(self, pod_id: str, text: str) -> None:
        """Add a line of the host."""
        self._log(pod_id).add("system", text, self._clock.now())

    def lines(self, pod_id: str) -> list[LogLine]:
        """The lines on a pod, those of its container read up to now."""
        return self._log(pod_id).read(self._clock.now())

    def forget(self, pod_id: str) -> None:
        """Drop the lines of a pod that is gone."""
        self._pods.pop(pod_id, None)

    def _log(self, pod_id: str) -> _PodLog:
        if pod_id not in self._pods:
            self._pods[pod_id] = _PodLog(self._folder(pod_id) / "container.log")
        return self._pods[pod_id]


class _PodLog:
    def __init__(self, file: Path) -> None:
        self._file = _FileTail(file)
        self._lines: deque[LogLine] = deque(maxlen=_MOST_LINES)
        self._last = 0

    def add(self, source: str, text: str, now: float) -> None:
        self._last += 1
        self._lines.append(LogLine(self._last, now, source, text))

    def read(self, now: float) -> list[LogLine]:
        for text in self._file.new_lines():
            self.add("container", text, now)
        return [*self._lines]


async def follow(
    lines: Callable[[], list[LogLine]], *, source: str, tail: int, after: str, alive: Callable[[], bool]
) -> AsyncIterator[str]:
    """Server-sent events: the last `tail` lines, or all since `after`, then new ones until the pod is gone.

    `after` is the id of an event, or a time, of whose second nothing is told.
    """
    seen, idle_since = 0, time.monotonic()
    first = lines()
    wanted = [line for line in first if source in ("", line.source)]
    said = _since(wanted, after) if after else (wanted[-tail:] if tail else [])
    while True:
        for line in said:
            yield line.event()
        seen = max([seen, *(line.number for line in first)])
        if said:
            idle_since = time.monotonic()
        elif time.monotonic() - idle_since > _KEEPALIVE_SECONDS:
            idle_since = time.monotonic()
            yield ": keepalive\n\n"
        if not alive():
            return
        await asyncio.sleep(_POLL_SECONDS)
        first = lines()
        said = [line for line in first if line.number > seen and source in ("", line.source)]


def move_if_large(log: Path, limit_bytes: int) -> None:
    """Copy a log to `container.log.1` and empty it; the container keeps writing to the same file."""
    if log.exists() and log.stat().st_size > limit_bytes:
        shutil.copyfile(log, log.with_name(log.name + ".1"))
        with log.open("r+b") as file:
            file.truncate(0)


def _since(lines: list[LogLine], after: str) -> list[LogLine]:
    stamp, _, number = after.partition("/")
    if number.isdecimal():
        return [line for line in lines if line.number > int(number)]
    try:
        moment = int(datetime.fromisoformat(stamp.replace("Z", "+00:00")).timestamp())
    except ValueError:
        return lines
    return [line for line in lines if int(line.at) > moment]


class _FileTail:
    """Reads the whole lines that were added to a file since the last time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0

    def new_lines(self) -> list[str]:
        if not self._path.exists():
            return []
        size = self._path.stat().st_size
        if size < self._position:
            self._position = 0
        if size == self._position:
            return []
        with self._path.open("rb") as file:
            file.seek(self._position)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._position += len(whole)
        return whole.decode(errors="replace").splitlines()
