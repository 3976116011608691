"""One placement pass with 10,000 waiting jobs and 1,000 pods: the observer itself on a real ledger.

Run as a program it is the measured process: it prints one line of JSON.
"""

from __future__ import annotations

import asyncio
import gc
import json
import resource
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
from figures import Figure, p50
from ledger_site import LedgerSite, temporary_ledger

from openweights_prefect.ledger.identity import LocalIdentity
from openweights_prefect.ledger.postgres import PostgresLedger
from openweights_prefect.orchestration.flow_runs import FlowRuns
from openweights_prefect.provisioning.hardware import catalogue_offers
from openweights_prefect.provisioning.provider import Offer, PodRequest, ProviderPod
from openweights_prefect.settings import LOCAL_ORGANIZATION_ID, Settings
from openweights_prefect.worker.fleet import Fleet
from openweights_prefect.worker.observer import Observer
from openweights_prefect.worker.purchases import Purchases

JOBS = 10_000
PODS = 1_000
PASSES = 20

_ALIVE_AT_FIRST = 985
_CHILD_SECONDS = 300.0
_USERS = 20
_ENDING_PER_PASS = 25
"""Runs that end between two passes; so many pods are idle then, and so many new jobs wait."""

_FILL = """
insert into ledger.jobs (organization_id, id, type, model, docker_image, entrypoint, params, requires_vram_gb,
                         allowed_hardware, min_cuda, priority, created_by, created_at, status, started_at)
select %(org)s, 'scale-' || n, 'custom_job', 'model-' || n %% 12, 'openweights/benchmark:' || n %% 2, 'true',
       jsonb_build_object('validated_params', jsonb_build_object('n', n)),
       (array[16, 24, 40, 75])[1 + n %% 4],
       case when n %% 11 = 0 then array['1x A100'] end, case when n %% 5 = 0 then '12.8' end, n %% 3,
       ('00000000-0000-0000-0000-' || lpad((n %% %(users)s)::text, 12, '0'))::uuid,
       now() - n * interval '1 second',
       case when n <= %(busy)s then 'in_progress' else 'pending' end, case when n <= %(busy)s then now() end
from generate_series(1, %(busy)s + %(jobs)s) n
"""
_FILL_PODS = """
insert into ledger.worker (organization_id, id, pod_id, status, docker_image, hardware, gpu_type, gpu_count,
                           vram_gb, cloud, cuda, vcpu, ram_gb, price_per_hour, bootstrap_hash, session_hash,
                           boot, run_id, cached_models, lease_expires_at, active_at, idle_since, deadline_at)
select %(org)s, 'scale-pod-' || n, 'runpod-' || n,
       case when n <= %(busy)s then 'busy' when n %% 4 = 0 then 'starting' else 'active' end,
       'openweights/benchmark:' || n %% 2, case when n %% 2 = 0 then '1x A100' else '1x A40' end, 'GPU', 1,
       case when n %% 2 = 0 then 75 else 43 end, 'SECURE', '12.8', 8, 32, 0.4 + n %% 7 * 0.1,
       encode(sha256(('b' || n)::bytea), 'hex'), encode(sha256(('s' || n)::bytea), 'hex'), gen_random_uuid(),
       case when n <= %(busy)s then gen_random_uuid() end, array['model-' || n %% 12],
       now() + interval '1 day', now(),
       case when n > %(busy)s then now() end, now() + interval '1 day'
from generate_series(1, %(pods)s) n
"""
_FILL_RUNS = """
insert into ledger.runs (id, organization_id, job_id, attempt, status, worker_id, boot, started_at)
select w.run_id, w.organization_id, 'scale-' || substr(w.id, 11), 1, 'in_progress', w.id, w.boot, now()
from ledger.worker w where w.run_id is not null
"""
_CLAIM = """
with claimed as (
    update ledger.runs r set status = 'in_progress', worker_id = r.hinted_worker_id, started_at = now()
    where r.status = 'pending' and r.hinted_worker_id is not null
    returning r.id, r.job_id, r.worker_id),
held as (
    update ledger.worker w set status = 'busy', run_id = c.id, idle_since = null
    from claimed c where w.id = c.worker_id)
update ledger.jobs j set status = 'in_progress', started_at = now() from claimed c where j.id = c.job_id
"""
_END = """
with ending as (
    select w.id, w.run_id from ledger.worker w where w.status = 'busy' order by random() limit %(ending)s),
ended as (
    update ledger.runs r set status = 'completed', mirrored = true, finished_at = now() from ending e
    where r.id = e.run_id returning r.job_id),
freed as (
    update ledger.worker w set status = 'active', run_id = null, idle_since = now()
    from ending e where w.id = e.id)
update ledger.jobs j set status = 'completed', finished_at = now() from ended e where j.id = e.job_id
"""
_REFILL = """
insert into ledger.jobs (organization_id, id, type, model, docker_image, entrypoint, params, requires_vram_gb,
                         priority)
select %(org)s, 'late-' || gen_random_uuid(), 'custom_job', 'model-1', 'openweights/benchmark:' || n %% 2,
       'true', '{"validated_params": {}}', 24, n %% 3
from generate_series(1, %(jobs)s - (select count(*) from ledger.jobs where status = 'pending')) n
"""


def time_passes(folder: Path) -> dict[str, Figure]:
    """Fill a ledger, and measure in a process of its own."""
    with temporary_ledger(folder) as site:
        fill(site)
        command = [sys.executable, __file__, site.url, site.admin_url]
        child = subprocess.run(command, stdout=subprocess.PIPE, timeout=_CHILD_SECONDS, check=True)
        seen = json.loads(child.stdout)
    seconds = seen["pass_seconds"]
    return {
        "waiting_jobs": seen["waiting"],
        "pods": seen["pods"],
        "pass_p50_seconds": round(p50(seconds), 3),
        "pass_max_seconds": round(max(seconds), 3),
        "first_pass_seconds": round(seconds[0], 3),
        "snapshot_p50_seconds": round(p50(seen["snapshot_seconds"]), 3),
        "passes": len(seconds),
        "hints": seen["hints"],
        "pods_bought": seen["bought"],
        "scheduler_memory_mb": seen["memory_mb"],
    }


def fill(site: LedgerSite) -> None:
    """Jobs of several classes and people that wait, and pods of which most are busy."""
    values = {
        "org": LOCAL_ORGANIZATION_ID,
        "jobs": JOBS,
        "pods": _ALIVE_AT_FIRST,
        "busy": _ALIVE_AT_FIRST * 4 // 5,
        "users": _USERS,
    }
    with site.admin() as connection:
        for statement in (_FILL, _FILL_PODS, _FILL_RUNS):
            connection.execute(statement, values)
        connection.execute("analyze ledger.jobs, ledger.worker, ledger.runs")


class StandInPrefect(FlowRuns):
    """A Prefect that answers at once; the real one is measured by `dispatch.py`."""

    def __init__(self) -> None:
        pass

    async def create(self, *_: Any, **__: Any) -> uuid.UUID:
        """The id of a flow run."""
        return uuid.uuid4()


class StandInProvider:
    """Refuses nothing, and has no machines."""

    def __init__(self) -> None:
        self.bought = 0

    async def create(self, request: PodRequest) -> ProviderPod:
        """A pod of which nothing but the row will exist."""
        self.bought += 1
        return ProviderPod(
            id=f"bought-{self.bought}",
            name=request.name,
            status="RUNNING",
            cost_per_hour=0.4,
            created_at=datetime.now(UTC),
            runtime_up=False,
            image=request.image,
            gpu_id=request.gpu_id,
            gpu_count=request.gpu_count,
        )

    async def offers(self) -> list[Offer]:
        """The packaged catalogue."""
        return [*catalogue_offers()]

    async def list(self) -> list[ProviderPod]:
        """Not asked here."""
        raise NotImplementedError

    async def get(self, pod_id: str) -> ProviderPod | None:
        """Not asked here."""
        raise NotImplementedError

    find_by_name = system_log = terminate = get


async def measure(url: str, admin_url: str) -> dict[str, Any]:
    """Passes one after the other, with a world that goes on between them."""
    ledger = PostgresLedger(url, identity=LocalIdentity(LOCAL_ORGANIZATION_ID, "ow_worker"))
    settings = Settings.load({"OW_DATABASE_URL": url, "OW_MAX_WORKERS": str(PODS)})
    provider = StandInProvider()

    def announce(kind: str, worker_id: str, details: Mapping[str, str]) -> None:
        pass

    parts: dict[str, Any] = {
        "provider": provider,
        "ledger": ledger,
        "settings": settings,
        "announce": announce,
    }
    purchases = Purchases(**parts)
    observer = Observer(
        ledger=ledger,
        flow_runs=StandInPrefect(),
        purchases=purchases,
        fleet=Fleet(**parts, purchases=purchases),
        settings=settings,
    )
    seconds, hints = [], 0
    with psycopg.connect(admin_url, autocommit=True) as admin:
        for _ in range(PASSES):
            gc.collect()
            started = time.perf_counter()
            await observer.place_once()
            seconds.append(time.perf_counter() - started)
            while purchases.under_way:
                await asyncio.sleep(0.05)
            hints += _go_on(admin)
        waiting, pods = (
            _count(admin, statement)
            for statement in (
                "select count(*) from ledger.jobs where status = 'pending'",
                "select count(*) from ledger.worker where status <> 'terminated'",
            )
        )
    snapshots = [_seconds_of(lambda: ledger.call("control_snapshot")) for _ in range(5)]
    ledger.close()
    memory_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "pass_seconds": seconds,
        "snapshot_seconds": snapshots,
        "hints": hints,
        "bought": provider.bought,
        "waiting": waiting,
        "pods": pods,
        "memory_mb": round(memory_mb, 1),
    }


def _go_on(admin: psycopg.Connection) -> int:
    """Pods claim what they were pointed at, other runs end, new jobs come. Returns how many were claimed."""
    claimed = admin.execute(_CLAIM).rowcount
    admin.execute(_END, {"ending": _ENDING_PER_PASS})
    admin.execute(_REFILL, {"org": LOCAL_ORGANIZATION_ID, "jobs": JOBS})
    return claimed


def _seconds_of(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _count(admin: psycopg.Connection, statement: str) -> int:
    row = admin.execute(statement).fetchone()
    assert row is not None
    return int(row[0])


if __name__ == "__main__":
    print(json.dumps(asyncio.run(measure(*sys.argv[1:3]))))
