"""How a run ends before its time: SIGTERM, a grace, SIGKILL, and nothing of it is left."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import NamedTuple

from openweights_prefect.pod.processes import RunProcesses

_LOOK_SECONDS = 0.05
_FLOW_SECONDS = 3.0


class Intent(NamedTuple):
    """What is to become of a run that was told to end, in the ledger's words, and why."""

    result: str
    why: str


class Ending:
    """The end of one run's processes. `abandon` is called when its flow does not notice that end."""

    def __init__(self, processes: RunProcesses, *, abandon: Callable[[], None]) -> None:
        self.intent: Intent | None = None
        self._processes = processes
        self._abandon = abandon
        self._kill_at = math.inf
        self._carrying_out: asyncio.Task[None] | None = None

    def begin(self, result: str, why: str, *, grace_seconds: float) -> None:
        """SIGTERM now, SIGKILL after the grace. Repeated, only the grace may change, to a shorter one."""
        self._kill_at = min(self._kill_at, asyncio.get_running_loop().time() + grace_seconds)
        if self.intent is None:
            self.intent = Intent(result, why)
            self._carrying_out = asyncio.create_task(self._carry_out())

    def started(self, pid: int) -> None:
        """The entrypoint is there, perhaps later than the order to end it."""
        self._processes.leader = pid
        if self.intent is not None:
            self._processes.terminate()

    async def exited(self) -> None:
        """The entrypoint is gone; returns when everything that it started is.

        Told to end, they have the rest of the grace: a shell dies of SIGTERM at once, while the program
        that it waited for writes its checkpoint. Otherwise nothing may outlive the entrypoint.
        """
        while self.intent is not None and not self._is_over():
            if not await asyncio.to_thread(self._processes.left):
                break
            await asyncio.sleep(_LOOK_SECONDS)
        await asyncio.to_thread(self._processes.sweep)
        self._processes.leader = None  # its id may soon be another process's

    def kill(self) -> None:
        """SIGKILL to everything that is found now."""
        self._processes.kill_now()

    def close(self) -> None:
        """The run has ended; nothing more is to be done."""
        if self._carrying_out is not None:
            self._carrying_out.cancel()

    def _is_over(self) -> bool:
        return asyncio.get_running_loop().time() >= self._kill_at

    async def _carry_out(self) -> None:
        self._processes.terminate()
        while not self._is_over():
            await asyncio.sleep(_LOOK_SECONDS)
        await asyncio.to_thread(self._processes.sweep)
        await asyncio.sleep(_FLOW_SECONDS)
        self._abandon()
