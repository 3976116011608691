"""A job as the ledger holds it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, get_args

from openweights_prefect.types.canonical import decode_event

JobStatus = Literal[
    "pending",  # -> in_progress, canceled, failed (when it can never run)
    "in_progress",  # -> completed, failed, canceled; pending when its pod is lost
    "completed",  # for ever
    "failed",  # -> pending, when it is submitted again or restarted
    "canceled",  # -> pending, likewise
]
JOB_STATUSES: tuple[JobStatus, ...] = get_args(JobStatus)
FINAL_STATUSES = frozenset(JOB_STATUSES) - {"pending", "in_progress"}


@dataclass(frozen=True, kw_only=True, eq=False)
class JobColumns:
    """The columns of one row of `jobs`; times are aware UTC."""

    id: str
    organization_id: str
    type: str
    status: JobStatus
    model: str | None
    params: dict[str, Any]
    """`validated_params`, and `mounted_files`: target path -> file id."""
    mounts: dict[str, str]
    """Target path -> file id."""
    entrypoint: str | None
    docker_image: str
    requires_vram_gb: int
    allowed_hardware: list[str] | None
    max_price_per_hour: float | None
    priority: int
    timeout_seconds: int | None
    retries: int
    outputs: dict[str, Any] | None
    """The newest value of every event field, once the job is completed."""
    error: str | None
    pending_reason: str | None
    """Why it has not started."""
    attempt: int
    """The attempt that is wanted or running, from 1."""
    created_at: datetime
    updated_at: datetime
    started_at: datetime | None
    finished_at: datetime | None

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> JobColumns:
        """Read a row of the ledger; columns that this version does not know are ignored."""
        outputs = row["outputs"]
        return cls(**known_columns(cls, {**row, "outputs": outputs and decode_event(outputs)}))


def known_columns(cls: type, row: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the dataclass `cls` that are in a row, times (`..._at`) parsed."""
    names = [spec.name for spec in dataclasses.fields(cls)]
    return {name: parse_time(row[name]) if name.endswith("_at") else row[name] for name in names}


def parse_time(text: str | None) -> datetime | None:
    """A time of the ledger as aware UTC."""
    return None if text is None else datetime.fromisoformat(text).astimezone(UTC)
