"""Events from `log()` in a job to the ledger's table, beside PostgreSQL's own multi-row insert."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from uuid import UUID

from figures import Figure
from ledger_site import LedgerSite, Pod

import openweights_prefect
from openweights_prefect.ledger.postgres import PostgresLedger
from openweights_prefect.pod.shipping import Shipper
from openweights_prefect.runtime.entrypoint import RunFolder
from openweights_prefect.runtime.wire import JOB_VARIABLE, RUN_VARIABLE, SOCKET_VARIABLE, SPOOL_VARIABLE
from openweights_prefect.settings import LOCAL_ORGANIZATION_ID

_BATCH = 1000
_ROW = {"loss": 1.2345678, "learning_rate": 2e-5, "grad_norm": 0.731, "epoch": 0.25, "tokens": 81920}

# A job: standard library and our package only. Prints the median of single calls in microseconds.
_JOB = f"""
import statistics, sys, time
from openweights_prefect import OpenWeights
ow, row, seconds = OpenWeights(), {_ROW!r}, []
for step in range(int(sys.argv[1])):
    event = {{**row, "step": step}}
    started = time.perf_counter()
    ow.run.log(event)
    seconds.append(time.perf_counter() - started)
print(1e6 * statistics.median(seconds))
"""


def time_log(folder: Path, *, calls: int) -> dict[str, Figure]:
    """What a call costs the loop that makes it, in a job's process."""
    spool = folder / "log" / "events.jsonl"
    spool.parent.mkdir()
    job = _start_job(spool, calls)
    printed, _ = job.communicate()
    return {"log_p50_microseconds": round(float(printed), 1)}


def time_ingestion(site: LedgerSite, folder: Path, *, count: int) -> dict[str, Figure]:
    """From the start of a job that logs all the time until its last event is in the table."""
    site.make_waiting("ingest-", 1)
    [pod] = site.make_pods(10**6, 1)
    ledger = PostgresLedger(site.url, identity=pod)
    run = _open(ledger, pod)
    seconds = asyncio.run(_ship(ledger, RunFolder(folder / "ingest"), run, pod, count))
    with site.admin() as connection:
        stored = connection.execute(
            "select count(*), max(sequence) from ledger.events where run_id = %s", (run,)
        ).fetchone()
    assert stored == (count, count - 1), stored
    ledger.close()
    ours, bare = count / seconds, count / _insert_bare(site, run, count)
    site.clear()
    return {
        "ingest_per_second": round(ours),
        "bare_ingest_per_second": round(bare),
        "ingest_ratio": round(ours / bare, 3),
    }


async def _ship(ledger: PostgresLedger, folder: RunFolder, run: str, pod: Pod, count: int) -> float:
    folder.path.mkdir()
    folder.spool.touch()

    async def observe(_: list[dict[str, Any]], __: str) -> None: ...

    shipper = Shipper(ledger=ledger, folder=folder, run_id=UUID(run), boot=UUID(pod.boot), observer=observe)
    shipping = asyncio.create_task(shipper.run())
    started = time.perf_counter()
    job = _start_job(folder.spool, count)
    await asyncio.to_thread(job.communicate)
    await shipper.drain()
    seconds = time.perf_counter() - started
    shipping.cancel()
    return seconds


def _insert_bare(site: LedgerSite, run: str, count: int) -> float:
    """Seconds for the same rows, many in one statement, each statement a transaction."""
    rows = [(LOCAL_ORGANIZATION_ID, run, step, json.dumps({**_ROW, "step": step})) for step in range(count)]
    with site.admin() as connection:
        connection.execute("create table bare_events (like ledger.events including all)")
        statement = "insert into bare_events (organization_id, run_id, sequence, data) values "
        started = time.perf_counter()
        for first in range(0, count, _BATCH):
            batch = rows[first : first + _BATCH]
            values = ", ".join(["(%s, %s, %s, %s)"] * len(batch))
            connection.execute((statement + values).encode(), [value for row in batch for value in row])
        return time.perf_counter() - started


def _open(ledger: PostgresLedger, pod: Pod) -> str:
    lease: dict[str, Any] = {"for_worker": pod.worker_id, "as_boot": pod.boot}
    [found] = ledger.call("renew_lease", **lease, lease_seconds=86400, models=[])
    [answer] = ledger.call("open_run", for_run=found["next_run"], **lease)
    assert answer["outcome"] == "opened", answer
    return str(found["next_run"])


def _start_job(spool: Path, calls: int) -> subprocess.Popen[str]:
    """A job's process: its PYTHONPATH holds our package and nothing else."""
    library = spool.parent / "lib"
    library.mkdir()
    (library / "openweights_prefect").symlink_to(Path(openweights_prefect.__file__).parent)
    return subprocess.Popen(
        [sys.executable, "-S", "-c", _JOB, str(calls)],
        env={
            "PYTHONPATH": str(library),
            RUN_VARIABLE: "00000000-0000-0000-0000-000000000001",
            JOB_VARIABLE: "benchmark",
            SOCKET_VARIABLE: str(spool.parent / "no.sock"),
            SPOOL_VARIABLE: str(spool),
        },
        stdout=subprocess.PIPE,
        text=True,
    )
