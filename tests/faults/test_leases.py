"""Leases and deadlines of real pods, and logs that are seen while they are written."""

from __future__ import annotations

import time

import psutil
import pytest
from local_stack import LEASE_SECONDS, Stack, eventually

from openweights_prefect import OpenWeights

pytestmark = pytest.mark.stack


def test_a_frozen_pod_loses_its_run_and_changes_nothing_afterwards(stack: Stack, ow: OpenWeights) -> None:
    """Everything of a pod stops for longer than its lease: another pod does the work, and the first one,
    awake again, finds that it holds nothing."""
    job = stack.running(ow.steady.create(tag=stack.tag("frozen")))
    first, frozen_pod = job.runs[0], stack.pod_of(job)["id"]
    agent = stack.agent_of(job)
    frozen = [agent, *agent.children(recursive=True)]
    for process in frozen:
        stack.own(process).suspend()
    eventually(lambda: job.refresh().attempt == 2, LEASE_SECONDS + 20, "the lease runs out")
    before = len(ow.events.list(run_id=first.id))
    eventually(lambda: job.refresh().status == "completed", 90, "another pod completes it")
    for process in frozen:
        if process.is_running():
            process.resume()
    assert [run.status for run in job.runs] == ["lost", "completed"]
    assert job.runs[1].worker_id != frozen_pod
    assert len(ow.events.list(run_id=first.id)) == before
    assert [event["data"]["n"] for event in ow.events.list(run_id=job.runs[1].id)] == list(range(200))
    eventually(lambda: not any(map(psutil.Process.is_running, frozen)), 60, "the frozen pod has ended")
    stack.money_is_safe()


def test_a_pod_past_its_deadline_gives_its_run_back_and_ends(stack: Stack, ow: OpenWeights) -> None:
    """The job goes on elsewhere; nothing is lost but time."""
    job = stack.running(ow.steady.create(tag=stack.tag("deadline")))
    pod = stack.pod_of(job)["id"]
    stack.sql("update ledger.worker set deadline_at = now() where id = %s", pod)
    eventually(lambda: job.refresh().status == "completed", 90, "another pod completes it")
    assert [run.status for run in job.runs] == ["lost", "completed"]
    eventually(lambda: _ended(stack, pod), 60, "the pod has ended")


def _ended(stack: Stack, pod: str) -> bool:
    workers = stack.call("list_workers", with_status=["terminated"], max_rows=1000)
    return any(worker["id"] == pod for worker in workers)


def test_a_line_is_seen_within_two_seconds_while_the_job_runs(stack: Stack, ow: OpenWeights) -> None:
    """`job.logs(follow=True)` yields lines as they are printed."""
    job = ow.command.create(tag=stack.tag("follow"), command="date +%s.%N; sleep 8; echo end")
    lines = job.logs(follow=True)
    printed_at = float(next(lines))
    assert time.time() - printed_at < 2
    assert job.refresh().status == "in_progress"
    assert list(lines) == ["end"]
    assert stack.call("get_run", run_id=job.runs[0].id)[0]["job_id"] == job.id
