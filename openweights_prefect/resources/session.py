"""What every resource works with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from openweights_prefect.errors import InvalidParameterError
from openweights_prefect.files.store import FileStore
from openweights_prefect.ledger.protocol import Ledger, Row
from openweights_prefect.settings import Settings

MAX_ROWS = 1000
"""The most rows that one call asks the ledger for."""


@dataclass(frozen=True)
class Session:
    """One organization's ledger and files; safe to share between threads."""

    ledger: Ledger
    store: FileStore
    organization_id: str
    settings: Settings


def check_limit(limit: int) -> int:
    """Return `limit` if the ledger can be asked for that many rows."""
    if isinstance(limit, bool) or not isinstance(limit, int) or not 1 <= limit <= MAX_ROWS:
        raise InvalidParameterError(
            f"limit={limit!r} is not between 1 and {MAX_ROWS}; for more, pass the last id as `after`."
        )
    return limit


def check_choice(name: str, value: str | None, choices: tuple[str, ...]) -> str | None:
    """Return `value` if it is one of `choices` or None."""
    if value is not None and value not in choices:
        raise InvalidParameterError(f"{name}={value!r} is none of {', '.join(choices)}.")
    return value


def every_row(ledger: Ledger, function: str, *, key: str) -> Iterator[Row]:
    """All rows of a list of the ledger; `key` is the column that the next page starts behind."""
    after: str | None = None
    while True:
        rows = ledger.call(function, max_rows=MAX_ROWS, after_id=after)
        yield from rows
        if len(rows) < MAX_ROWS:
            return
        after = rows[-1][key]
