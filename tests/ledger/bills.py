"""Pods with a past: intervals at chosen times, written as the database's owner."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import psycopg

from openweights_prefect.ledger.identity import LOCAL_USER_ID, hash_secret
from openweights_prefect.settings import LOCAL_ORGANIZATION_ID

START = datetime(2026, 3, 1, 22, tzinfo=UTC)
"""Two hours before midnight, when a bill begins unless it says otherwise."""


class Bills:
    """Writes what the ledger would have written, had the time passed."""

    def __init__(self, connection: psycopg.Connection, organization_id: str) -> None:
        self.connection = connection
        self.organization_id = organization_id

    def token(self, name: str, user_id: str = LOCAL_USER_ID) -> str:
        row = self.connection.execute(
            "insert into ledger.api_tokens (organization_id, name, role, prefix, token_hash, created_by)"
            " values (%s, %s, 'user', 'ow_x', %s, %s) returning id::text",
            [self.organization_id, name, hash_secret(name), user_id],
        ).fetchone()
        assert row is not None
        return str(row[0])

    def member(self, email: str) -> str:
        user_id = str(uuid.uuid4())
        self.connection.execute(
            "insert into ledger.members (organization_id, user_id, role, email) values (%s, %s, 'user', %s)",
            [self.organization_id, user_id, email],
        )
        return user_id

    def job(self, name: str, token_id: str | None = None, status: str = "completed") -> str:
        self.connection.execute(
            "insert into ledger.jobs (organization_id, id, type, status, entrypoint, docker_image,"
            " created_by, token_id) values (%s, %s, 'probe', %s, 'true', 'image', %s, %s)",
            [self.organization_id, name, status, LOCAL_USER_ID, token_id],
        )
        return name

    def pod(
        self, name: str, *, price: float = 1.0, bought_for: str | None = None, alive: bool = False
    ) -> str:
        """A pod without intervals."""
        self.connection.execute(
            "insert into ledger.worker (organization_id, id, status, pod_id, docker_image, hardware,"
            " gpu_type, gpu_count, vram_gb, cloud, price_per_hour, bought_for, bootstrap_hash, deadline_at)"
            " values (%s, %s, %s, %s, 'image', '1x L4', 'NVIDIA L4', 1, 19, 'SECURE', %s, %s, %s, now())",
            [
                self.organization_id,
                name,
                "active" if alive else "terminated",
                f"provider-{name}",
                price,
                bought_for,
                hash_secret(name + self.organization_id),
            ],
        )
        self.connection.execute(
            "delete from ledger.pod_intervals where organization_id = %s and worker_id = %s",
            [self.organization_id, name],
        )
        return name

    def run(self, job: str, pod: str, *, attempt: int = 1, token_id: str | None = None) -> str:
        run_id = str(uuid.uuid4())
        self.connection.execute(
            "insert into ledger.runs (id, organization_id, job_id, attempt, status, worker_id, token_id)"
            " values (%s, %s, %s, %s, 'completed', %s, %s)",
            [run_id, self.organization_id, job, attempt, pod, token_id],
        )
        return run_id

    def spell(
        self,
        pod: str,
        kind: str,
        begin: float,
        end: float | None,
        *,
        run: str | None = None,
        price: float = 1.0,
        start: datetime = START,
    ) -> None:
        """An interval; `begin` and `end` are minutes after `start`."""
        self.connection.execute(
            "insert into ledger.pod_intervals (organization_id, worker_id, kind, run_id, price_per_hour,"
            " started_at, ended_at) values (%s, %s, %s, %s, %s, %s, %s)",
            [self.organization_id, pod, kind, run, price, start + timedelta(minutes=begin),
             None if end is None else start + timedelta(minutes=end)],
        )  # fmt: skip


@contextmanager
def open_bills(ledger_url: str, organization_id: str = LOCAL_ORGANIZATION_ID) -> Iterator[Bills]:
    """`ledger_url` is the `authenticator`'s."""
    url = ledger_url.replace("authenticator@", "postgres@")
    with psycopg.connect(url, autocommit=True) as connection:
        yield Bills(connection, organization_id)
