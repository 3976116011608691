"""The one method through which everything reaches the ledger."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol, runtime_checkable

Row = dict[str, Any]


class Ledger(Protocol):
    """Calls the SQL functions of the ledger for one organization."""

    @property
    def organization_id(self) -> str:
        """The organization that the caller acts for; a token is exchanged to find out."""
        ...

    def call(self, function: str, *, patience_seconds: float | None = None, **arguments: Any) -> list[Row]:
        """Call a function and return its JSON rows. Repeating a call has no second effect.

        `patience_seconds` makes this call give up sooner than the ledger would.
        """
        ...

    def close(self) -> None:
        """Give back every connection."""
        ...


@runtime_checkable
class Notifying(Protocol):
    """A ledger that hears of changes as they happen."""

    def wait_for_change(self, job_id: str, seconds: float) -> None:
        """Sleep, less long when the job has ended meanwhile. A hint: its caller looks in any case."""
        ...


async def ask(ledger: Ledger, function: str, **arguments: Any) -> list[Row]:
    """Call a function without blocking the event loop."""
    return await asyncio.to_thread(ledger.call, function, **arguments)


async def ask_one(ledger: Ledger, function: str, **arguments: Any) -> Row:
    """The first row of the answer, likewise."""
    return (await ask(ledger, function, **arguments))[0]
