"""A ledger of its own for a benchmark: a server with `fsync` on, the migrations, some organizations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

from openweights_prefect.ledger import embedded, migrator
from openweights_prefect.ledger.identity import LocalIdentity, Role, hash_secret
from openweights_prefect.ledger.postgres import PostgresLedger
from openweights_prefect.settings import LOCAL_ORGANIZATION_ID
from openweights_prefect.stack.databases import create_organization

ORGANIZATIONS = (
    LOCAL_ORGANIZATION_ID,
    *(f"00000000-0000-0000-0000-0000000000{number:02x}" for number in range(0x41, 0x44)),
)
"""The first one is measured; the others share its tables, as they do where many use one server."""

_DATABASE = "openweights"
_IMAGE = "openweights/benchmark:latest"


@dataclass(frozen=True)
class LedgerSite:
    """Where the ledger is."""

    admin_url: str
    url: str
    """As the transport opens it."""

    def admin(self) -> psycopg.Connection:
        """A connection of the superuser, for what PostgreSQL itself can do, and to fill tables."""
        return psycopg.connect(self.admin_url, autocommit=True)

    def ledger(self, role: Role = "authenticated", *, connections: int = 1) -> PostgresLedger:
        """The ledger as the local person or the control plane sees it."""
        identity = LocalIdentity(LOCAL_ORGANIZATION_ID, role)
        return PostgresLedger(self.url, identity=identity, connections=connections)

    def version(self) -> str:
        """PostgreSQL's."""
        with self.admin() as connection:
            return str(_value(connection, "show server_version")).split()[0]

    def clear(self) -> None:
        """Forget jobs and pods, so that no measurement meets the queue of the one before it."""
        with self.admin() as connection:
            connection.execute("truncate ledger.jobs, ledger.worker cascade")

    def make_pods(self, first: int, count: int) -> list[Pod]:
        """Pods that are booted and idle, with a lease of a day."""
        pods = [Pod(f"bench-{number}") for number in range(first, first + count)]
        with self.admin() as connection:
            connection.execute(
                "insert into ledger.worker (organization_id, id, status, docker_image, hardware, gpu_type,"
                " gpu_count, vram_gb, cloud, price_per_hour, bootstrap_hash, session_hash, boot,"
                " lease_expires_at, deadline_at)"
                " select %s, p.id, 'active', %s, '1x L4', 'L4', 1, 24, 'SECURE', 0.4, p.session, p.session,"
                " p.boot::uuid, now() + interval '1 day', now() + interval '1 day'"
                " from unnest(%s::text[], %s::text[], %s::text[]) as p (id, session, boot)",
                (
                    LOCAL_ORGANIZATION_ID,
                    _IMAGE,
                    [pod.worker_id for pod in pods],
                    [pod.session_hash for pod in pods],
                    [pod.boot for pod in pods],
                ),
            )
            connection.execute("analyze ledger.worker")
        return pods

    def make_waiting(self, prefix: str, count: int) -> None:
        """Jobs that wait for a pod, each with its run."""
        with self.admin() as connection, connection.transaction():
            connection.execute(
                "insert into ledger.jobs"
                " (organization_id, id, type, docker_image, entrypoint, params, priority)"
                " select %s, %s || n, 'benchmark', %s, 'true', jsonb_build_object('n', n), n %% 3"
                " from generate_series(1, %s) n",
                (LOCAL_ORGANIZATION_ID, prefix, _IMAGE, count),
            )
            connection.execute(
                "insert into ledger.runs (id, organization_id, job_id, attempt)"
                " select gen_random_uuid(), j.organization_id, j.id, 1 from ledger.jobs j"
                " where j.id like %s || '%%'",
                (prefix,),
            )
            connection.execute("analyze ledger.jobs, ledger.runs")


class Pod:
    """A booted pod, as an identity of the transport."""

    def __init__(self, worker_id: str) -> None:
        self.worker_id = worker_id
        self.boot = f"00000000-0000-0000-0000-{int(hash_secret(worker_id)[:12], 16):012x}"
        self.session_hash = hash_secret(f"owp_{worker_id}")

    def claims(self) -> Mapping[str, Any]:
        """What its session is exchanged for."""
        return {
            "role": "ow_pod",
            "aud": "authenticated",
            "organization_id": LOCAL_ORGANIZATION_ID,
            "worker_id": self.worker_id,
            "session": self.session_hash,
        }


class PodInTurn:
    """One connection's identity, which plays one pod after the other."""

    def __init__(self, pod: Pod) -> None:
        self.pod = pod

    def claims(self) -> Mapping[str, Any]:
        """Those of the pod whose turn it is."""
        return self.pod.claims()


@contextmanager
def temporary_ledger(folder: Path) -> Iterator[LedgerSite]:
    """A server in the folder, with the migrations and the organizations; gone afterwards."""
    server = embedded.start(folder / "postgres")
    try:
        migrator.ensure_database(server.url(database="postgres"), _DATABASE)
        site = LedgerSite(
            server.url(database=_DATABASE), server.url(database=_DATABASE, user="authenticator")
        )
        migrator.migrate(site.admin_url)
        for organization in ORGANIZATIONS:
            create_organization(site.url, organization)
        yield site
    finally:
        embedded.remove(folder / "postgres")


def a_job(job_id: str, number: int) -> dict[str, Any]:
    """A job of usual size, as the SDK submits it."""
    params = {
        "model": "unsloth/Qwen3-8B",
        "training_file": f"conversations:file-{number:012x}",
        "loss": "sft",
        "epochs": 1,
        "learning_rate": 1e-4,
        "r": 32,
        "meta": {"seed": number, "group": "benchmark"},
    }
    return {
        "id": job_id,
        "type": "benchmark",
        "model": params["model"],
        "params": params,
        "docker_image": _IMAGE,
        "entrypoint": "python train.py params.json",
        "requires_vram_gb": 24,
        "files": [],
    }


def _value(connection: psycopg.Connection, statement: str) -> Any:
    row = connection.execute(statement).fetchone()
    assert row is not None
    return row[0]
