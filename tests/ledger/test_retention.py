"""Old events go, oldest first, from ended runs alone; what the run came to stays."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import psycopg
import pytest

from openweights_prefect.settings import Settings
from openweights_prefect.worker import observer
from openweights_prefect.worker.observer import Observer
from tests.callers import Callers, bootstrap_hash
from tests.ledger.test_transitions import POD, a_job, boot, flow_run_for, submit


def a_run(ledger: Callers, number: int, *, ended: bool) -> str:
    """A run of a job of its own with three events."""
    job, pod = f"probe-{number}", f"pod-{number}"
    submit(ledger, a_job(job))
    run = flow_run_for(ledger, job)
    ledger.call(
        "intend_pod", pod={"id": pod, **POD}, bootstrap_hash=bootstrap_hash(pod), ttl_seconds=60, max_pods=9
    )
    process = boot(ledger, pod)
    ledger.call("open_run", for_run=run, for_worker=pod, as_boot=process)
    batch: list[dict[str, Any]] = [{"at": time.time(), "data": {"n": n}, "file": None} for n in range(3)]
    ledger.call("append_events", for_run=run, as_boot=process, first_sequence=0, batch=batch)
    if ended:
        ledger.call("finish_run", for_run=run, as_boot=process, result="completed")
    return str(run)


@pytest.fixture
def runs(ledger: Callers, ledger_url: str) -> dict[str, str]:
    """An old run that has ended, a new one that has, and an old one that still goes on."""
    runs = {
        "old": a_run(ledger, 1, ended=True),
        "new": a_run(ledger, 2, ended=True),
        "live": a_run(ledger, 3, ended=False),
    }
    with psycopg.connect(ledger_url.replace("authenticator@", "postgres@"), autocommit=True) as connection:
        back = "now() - interval '8 days'"
        old = [[runs["old"], runs["live"]]]
        connection.execute(
            f"update ledger.events set created_at = {back} where run_id = any (%s::uuid[])", old
        )
        connection.execute(f"update ledger.runs set finished_at = {back} where id = %s", [runs["old"]])
    return runs


def kept(ledger: Callers, run: str) -> list[int]:
    return [event["data"]["n"] for event in ledger.call("list_events", for_run=run)]


def test_only_old_events_of_ended_runs_go(ledger: Callers, runs: dict[str, str]) -> None:
    assert ledger.call("expire_events", older_than_days=7, max_rows=2) == [{"deleted": 2}]
    assert kept(ledger, runs["old"]) == [2]
    assert ledger.call("expire_events", older_than_days=7) == [{"deleted": 1}]
    assert ledger.call("expire_events", older_than_days=7) == [{"deleted": 0}]
    assert [kept(ledger, runs[name]) for name in ("old", "new", "live")] == [[], [0, 1, 2], [0, 1, 2]]
    assert ledger.call("latest_events", for_run=runs["old"]) == [{"n": 2}]
    assert ledger.call("get_job", job_id="probe-1")[0]["outputs"] == {"n": 2}


@pytest.mark.parametrize(("days", "left"), [(0, 3), (7, 0)])
def test_the_worker_expires_what_the_setting_says(
    ledger: Callers,
    runs: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    days: int,
    left: int,
) -> None:
    """In as many batches as it takes; not at all by default."""
    monkeypatch.setattr(observer, "_EXPIRE_ROWS", 2)
    settings = Settings(home=tmp_path, event_retention_days=days)
    nothing: Any = None
    worker = Observer(
        ledger=ledger.control, flow_runs=nothing, purchases=nothing, fleet=nothing, settings=settings
    )
    asyncio.run(worker.expire_once())
    assert len(kept(ledger, runs["old"])) == left
