"""A run as the ledger holds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, get_args

from openweights_prefect.types.job import known_columns

RunStatus = Literal[
    "pending",  # -> in_progress, canceled, failed
    "in_progress",  # -> completed, failed, canceled, lost
    "completed",
    "failed",
    "canceled",
    "lost",  # its pod died; the job goes on with a new run
]
RUN_STATUSES: tuple[RunStatus, ...] = get_args(RunStatus)


@dataclass(frozen=True, kw_only=True, eq=False)
class RunColumns:
    """The columns of one row of `runs`; times are aware UTC."""

    id: str
    """Also the id of its Prefect flow run."""
    job_id: str
    attempt: int
    status: RunStatus
    worker_id: str | None
    log_bytes: int
    """How much of its log the ledger was given."""
    log_file: str | None
    """File id of the whole log, once the run has ended."""
    error: str | None
    created_at: datetime
    updated_at: datetime
    started_at: datetime | None
    finished_at: datetime | None

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> RunColumns:
        """Read a row of the ledger; columns that this version does not know are ignored."""
        return cls(**known_columns(cls, row))
