"""The simulator's time: all stamps, bills, quotas and timers go by it, only processes run in real time."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

MANUAL_START = 1_800_000_000.0
"""Where a manual clock begins, so that two runs of one seed show the same stamps."""

_SETTLE_ROUNDS = 10


@dataclass(eq=False)
class _Sleeper:
    due: float
    future: asyncio.Future[None]
    timer: asyncio.TimerHandle | None = None


class Clock:
    """Runs `scale` times as fast as the real one; a manual one stands still between two `advance`."""

    def __init__(self, *, scale: float = 1.0, manual: bool = False) -> None:
        self._scale = scale
        self._manual = manual
        self._began = time.monotonic()
        self._start = MANUAL_START if manual else time.time()
        self._numbers = itertools.count()
        self._sleepers: dict[int, _Sleeper] = {}
        self._working = 0

    def now(self) -> float:
        """Epoch seconds."""
        if self._manual:
            return self._start
        return self._start + self._scale * (time.monotonic() - self._began)

    async def sleep(self, seconds: float) -> None:
        """Wait for so long by this clock."""
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        sleeper = _Sleeper(self.now() + seconds, asyncio.get_running_loop().create_future())
        number = next(self._numbers)
        self._sleepers[number] = sleeper
        self._set_timer(sleeper)
        try:
            await sleeper.future
        finally:
            del self._sleepers[number]
            if sleeper.timer is not None:
                sleeper.timer.cancel()

    async def advance(self, seconds: float) -> None:
        """Move on, and let every timer that falls due run at its own moment, in order."""
        target = self.now() + seconds
        await self._settle()
        while due := [s for s in self._sleepers.values() if s.due <= target and not s.future.done()]:
            first = min(due, key=lambda sleeper: sleeper.due)
            self._start += max(0.0, first.due - self.now())
            first.future.set_result(None)
            await self._settle()
        self._start += max(0.0, target - self.now())
        for sleeper in self._sleepers.values():
            self._set_timer(sleeper)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Around what takes real time: `advance` waits for its end, which so has a fixed moment."""
        self._working += 1
        try:
            yield
        finally:
            self._working -= 1

    async def _settle(self) -> None:
        for _ in range(_SETTLE_ROUNDS):
            await asyncio.sleep(0)
        while self._working:
            await asyncio.sleep(0.002)

    def _set_timer(self, sleeper: _Sleeper) -> None:
        if sleeper.timer is not None:
            sleeper.timer.cancel()
        if not self._manual:
            delay = max(0.0, sleeper.due - self.now()) / self._scale
            loop = asyncio.get_running_loop()
            sleeper.timer = loop.call_later(delay, _wake, sleeper.future)


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
