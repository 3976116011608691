"""Cancel, time out, retry: from the SDK and from Prefect, and the pod is whole afterwards."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from uuid import UUID

import psutil
import pytest
from local_stack import Stack, eventually
from prefect.client.schemas.objects import State, StateType

from openweights_prefect import OpenWeights
from openweights_prefect.errors import JobFailed
from openweights_prefect.resources.job import Job

pytestmark = pytest.mark.stack

CANCEL_SECONDS = 8
STUBBORN = "trap '' TERM; sleep 600 & sleep 600"  # a trap of '' is inherited
IMPOSSIBLE = {"min_cuda": "99.0"}  # of no host


def by_sdk(stack: Stack, job: Job) -> None:
    """`job.cancel()`."""
    job.cancel()


def by_prefect(stack: Stack, job: Job) -> None:
    """As the cancel button of Prefect does."""
    with stack.prefect() as client:
        client.set_flow_run_state(UUID(job.runs[-1].id), State(type=StateType.CANCELLING), force=True)


either_way = pytest.mark.parametrize("cancel", [by_sdk, by_prefect])
Cancel = Callable[[Stack, Job], None]


def assert_canceled(stack: Stack, job: Job, since: float) -> None:
    """Both sides say so in time."""
    remaining = since + CANCEL_SECONDS - time.monotonic()
    eventually(
        lambda: job.refresh().status == "canceled" and stack.state_of(job.runs[-1].id) == "CANCELLED",
        remaining,
        "the ledger and Prefect say canceled",
    )
    assert [run.status for run in job.runs] == ["canceled"]


@either_way
def test_a_waiting_job_is_canceled(stack: Stack, ow: OpenWeights, cancel: Cancel) -> None:
    """It never reaches a pod, and its flow run is not left waiting."""
    job = ow.command.create(tag=stack.tag("waiting"), command="true", **IMPOSSIBLE)
    eventually(lambda: job.runs, 10, "the flow run is created")
    since = time.monotonic()
    cancel(stack, job)
    assert_canceled(stack, job, since)
    assert job.runs[-1].worker_id is None


@either_way
@pytest.mark.parametrize("command", ["sleep 600", STUBBORN], ids=["obedient", "stubborn"])
def test_a_running_job_is_canceled(stack: Stack, ow: OpenWeights, cancel: Cancel, command: str) -> None:
    """Also one that ignores SIGTERM: its whole process group ends, and the pod takes the next job."""
    job = ow.command.create(tag=stack.tag("running"), command=f"echo begun; {command}")
    eventually(lambda: job.refresh().status == "in_progress" and "begun" in [*job.logs()], 60, "it runs")
    pod = job.worker_id
    entrypoint = stack.entrypoint_of(job)
    family = [entrypoint, *entrypoint.children(recursive=True)]
    since = time.monotonic()
    cancel(stack, job)
    assert_canceled(stack, job, since)
    assert [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []
    following = ow.command.create(tag=stack.tag("next"), command="true").wait(timeout=30, progress=False)
    assert following.worker_id == pod
    stack.money_is_safe()


def test_a_canceled_job_runs_again(stack: Stack, ow: OpenWeights) -> None:
    """Submitting it again is a new attempt with a flow run of its own."""
    tag = stack.tag("again")
    job = ow.command.create(tag=tag, command="echo hello", **IMPOSSIBLE)
    eventually(lambda: job.runs, 10, "the flow run is created")
    job.cancel()
    again = ow.command.create(tag=tag, command="echo hello", **IMPOSSIBLE)
    assert (again.id, again.status) == (job.id, "pending")
    eventually(lambda: len(again.runs) == 2, 10, "the second flow run is created")
    again.cancel()
    eventually(
        lambda: [stack.state_of(run.id) for run in again.runs] == ["CANCELLED"] * 2, 10, "both are canceled"
    )


def test_a_job_that_takes_too_long_fails(stack: Stack, ow: OpenWeights) -> None:
    """The reason is its timeout, not the signal that ended it."""
    job = ow.command.create(tag=stack.tag("timeout"), command="sleep 600", timeout=2)
    with pytest.raises(JobFailed, match="longer than its timeout of 2 s"):
        job.wait(timeout=60, progress=False)
    assert [run.status for run in job.runs] == ["failed"]
    stack.agrees(job)


def test_a_failing_job_is_retried_as_often_as_it_says(stack: Stack, ow: OpenWeights) -> None:
    """Failures of its own: one further attempt, then the exit code is the reason."""
    job = ow.command.create(tag=stack.tag("retries"), command="echo attempt; exit 1", retries=1)
    with pytest.raises(JobFailed, match="exited with code 1"):
        job.wait(timeout=60, progress=False)
    assert [run.status for run in job.runs] == ["failed", "failed"]
    assert [*job.logs()][:1] == ["attempt"]
    stack.agrees(job)


def test_canceling_while_it_is_claimed(stack: Stack, ow: OpenWeights) -> None:
    """Canceled at any moment between submit and start, it ends canceled on both sides."""
    jobs = [ow.command.create(tag=stack.tag("moment"), command="sleep 600") for _ in range(4)]

    def cancel_later(job: Job, seconds: float) -> None:
        time.sleep(seconds)  # another moment for each: that is the point
        job.cancel()

    threads = [threading.Thread(target=cancel_later, args=(job, 0.15 * n)) for n, job in enumerate(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    since = time.monotonic()
    for job in jobs:
        eventually(
            lambda job=job: job.refresh().status == "canceled",  # type: ignore[misc]
            since + CANCEL_SECONDS - time.monotonic(),
            "the job is canceled",
        )
        stack.agrees(job)
