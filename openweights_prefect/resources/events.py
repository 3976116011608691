"""`ow.events`: what runs logged."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from openweights_prefect.errors import ConfigurationError, InvalidParameterError, NotFoundError
from openweights_prefect.ledger.protocol import Row
from openweights_prefect.resources.patience import Pace, live_pause, patient, sleep_until_end
from openweights_prefect.resources.session import Session
from openweights_prefect.types.canonical import decode_event
from openweights_prefect.types.job import FINAL_STATUSES, parse_time

if TYPE_CHECKING:
    import pandas  # type: ignore[import-untyped,unused-ignore]  # without pandas-stubs

_PAGE_ROWS = 500  # Some tens of milliseconds, and round trips that do not count beside them.


class Event(TypedDict):
    """A JSON object that was logged during a run."""

    id: int
    """Grows with time; a cursor for `after`."""
    run_id: str
    sequence: int
    """Its number within the run, from 0."""
    created_at: datetime | None
    data: dict[str, Any]
    file: str | None
    """Id of the file that was logged with it."""


class Events:
    """Events of one job (all its runs) or of one run; name exactly one of `job_id` and `run_id`."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def list(self, job_id: str | None = None, run_id: str | None = None, *, after: int = 0) -> list[Event]:
        """All events in the order in which they were logged; `after` leaves out those up to that event id."""
        return list(read_events(self._session, _scope(job_id, run_id), after=after))

    def latest(
        self,
        fields: Literal["*"] | str | Sequence[str] = "*",
        job_id: str | None = None,
        run_id: str | None = None,
    ) -> dict[str, Any]:
        """The newest value that is not None, for each of `fields` that was ever logged."""
        return latest_values(self._session, _scope(job_id, run_id), fields)

    def frame(
        self, job_id: str | None = None, run_id: str | None = None, *, after: int = 0
    ) -> pandas.DataFrame:
        """One row per event: its columns, and one column per field; needs pandas."""
        try:
            import pandas  # Optional, and slow to import.
        except ImportError as exc:
            raise ConfigurationError("`ow.events.frame` needs pandas; run `pip install pandas`.") from exc
        own = ("id", "run_id", "sequence", "created_at", "file")
        rows = [
            {**{name: value for name, value in event.items() if name in own}, **_fields(event["data"], own)}
            for event in self.list(job_id, run_id, after=after)
        ]
        return pandas.DataFrame(rows, columns=None if rows else list(own))

    def stream(
        self,
        job_id: str | None = None,
        run_id: str | None = None,
        *,
        after: int = 0,
        timeout: float | None = None,
    ) -> Iterator[Event]:
        """Yield events as they come, until the job or run has ended, or for `timeout` seconds."""
        scope = _scope(job_id, run_id)
        sleep = sleep_until_end(self._session.ledger, job_id) if job_id is not None else time.sleep
        pace = Pace(timeout, rhythm=live_pause, sleep=sleep)
        session = patient(self._session, pace)
        while True:
            # Looked at first: what is final logs nothing more.
            final = _is_final(session, scope)
            for event in read_events(session, scope, after=after):
                after = event["id"]
                pace.news()
                yield event
            if final or not pace.pause():
                return


Scope = dict[str, Any]
"""Whose events: the argument of the ledger's functions."""


def read_events(session: Session, scope: Scope, *, after: int = 0) -> Iterator[Event]:
    """Read every event, page by page."""
    while True:
        rows = session.ledger.call("list_events", **scope, after_id=after, max_rows=_PAGE_ROWS)
        yield from map(_event, rows)
        if len(rows) < _PAGE_ROWS:
            return
        after = rows[-1]["id"]


def latest_values(session: Session, scope: Scope, fields: str | Sequence[str] = "*") -> dict[str, Any]:
    """The newest value of each field."""
    names = [fields] if isinstance(fields, str) else list(fields)
    arguments: dict[str, Any] = {} if names == ["*"] else {"fields": names}
    return decode_event(session.ledger.call("latest_events", **scope, **arguments)[0])


def run_scope(run_id: str) -> Scope:
    """The events of one run; raises `InvalidParameterError` for what cannot be the id of one."""
    try:
        return {"for_run": str(uuid.UUID(run_id))}
    except (ValueError, AttributeError, TypeError) as exc:
        raise InvalidParameterError(f"run_id={run_id!r} is not the id of a run, which is a UUID.") from exc


def _scope(job_id: str | None, run_id: str | None) -> Scope:
    if (job_id is None) == (run_id is None):
        raise InvalidParameterError(
            f"Pass either job_id or run_id, not job_id={job_id!r} and run_id={run_id!r}."
        )
    return {"for_job": job_id} if job_id is not None else run_scope(str(run_id))


def _is_final(session: Session, scope: Scope) -> bool:
    if "for_job" in scope:
        rows = session.ledger.call("get_job", job_id=scope["for_job"])
    else:
        rows = session.ledger.call("get_run", run_id=scope["for_run"])
    if not rows:
        raise NotFoundError(
            f"No job or run {next(iter(scope.values()))!r} in this organization; check the id."
        )
    return rows[0]["status"] in FINAL_STATUSES or rows[0]["status"] == "lost"


def _fields(data: dict[str, Any], taken: tuple[str, ...]) -> dict[str, Any]:
    return {f"data.{name}" if name in taken else name: value for name, value in data.items()}


def _event(row: Row) -> Event:
    return Event(
        id=row["id"],
        run_id=row["run_id"],
        sequence=row["sequence"],
        created_at=parse_time(row["created_at"]),
        data=decode_event(row["data"]),
        file=row["file"],
    )
