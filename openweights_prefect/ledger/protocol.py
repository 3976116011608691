"""The one method through which everything reaches the ledger."""

from __future__ import annotations

from typing import Any, Protocol

Row = dict[str, Any]


class Ledger(Protocol):
    """Calls the SQL functions of the ledger for one organization."""

    def call(self, function: str, **arguments: Any) -> list[Row]:
        """Call a function and return its JSON rows. Repeating a call has no second effect."""
        ...

    def close(self) -> None:
        """Give back every connection."""
        ...
