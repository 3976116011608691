"""What an agent works with, as it sees it: so that it can also live in a world without processes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import NamedTuple, Protocol
from uuid import UUID

from openweights_prefect.ledger.protocol import Row

Ask = Callable[..., Awaitable[Row]]
"""Calls a function of the ledger and gives the first row of its answer; raises an `OpenWeightsError`."""

Hints = Callable[[], AsyncIterator[str]]
"""Yields the ids of pods that somebody has pointed at, or "" for all of them; never ends."""


class Verdict(NamedTuple):
    """Why a pod takes no more work."""

    why: str
    unusable: bool = False
    """Its machine is at fault: no other pod shall get it."""


class Zygote(Protocol):
    """What runs are forked from."""

    async def start(self) -> None:
        """Return when runs can be started."""
        ...

    async def stop(self) -> None:
        """End it, and every run with it."""
        ...


class Executing(Protocol):
    """One run on this pod."""

    @property
    def run_id(self) -> UUID:
        """Which one."""
        ...

    @property
    def gpu_suspected(self) -> bool:
        """It failed with an error that a broken GPU may have made."""
        ...

    async def execute(self) -> None:
        """Claim, open, run and finish it."""
        ...

    async def settle(self) -> None:
        """Remove what is left of it; another run may go on meanwhile."""
        ...

    def cancel(self, result: str = ..., why: str = ..., *, grace_seconds: float | None = None) -> None:
        """Ask it to end; repeated calls may only shorten the grace."""
        ...

    def kill(self) -> None:
        """End it at once, without a word to anybody."""
        ...


Executions = Callable[[UUID, UUID], Executing]
"""Makes the execution of a run, under the boot that holds the lease."""


class Machine(Protocol):
    """The machine under the pod."""

    async def check(self) -> str | None:
        """Why no work may be done on it, or None; takes a bounded time."""
        ...

    async def clean(self, run_id: UUID, *, suspected: bool) -> Verdict | None:
        """Make it as it was before the run; a verdict when that cannot be."""
        ...

    def heard_deadline(self, seconds_left: float) -> None:
        """Keep the pod's deadline where it outlives the agent."""
        ...

    def wants_to_end(self) -> bool:
        """Whether somebody on the machine asked the pod to end."""
        ...
