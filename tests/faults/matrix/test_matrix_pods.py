"""Rows 8, 11, 12, 16, 18, 23, 27 and 50-52, on a whole stack: pods that break or are cut off."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import pytest
from local_stack import Stack, eventually
from prefect.client.schemas.objects import State, StateType

from openweights_prefect import JobFailed, OpenWeights
from openweights_prefect.resources.job import Job

pytestmark = pytest.mark.stack

_SAVES = "trap 'echo saved; exit 0' TERM; echo begun; sleep 600 & wait"
_KILLS_ITS_AGENT = """python - <<'END'
import os, pathlib, signal
pid = os.getpid()
while pid > 1:
    command = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\\0")
    if b"openweights_prefect.pod" in command:
        os.kill(pid, signal.SIGKILL)
    pid = int(pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
END
sleep 600"""


def image(stack: Stack, row: str) -> str:
    """An image that no pod has yet."""
    return f"openweights/{stack.tag(row)}:latest"


def begun(job: Job) -> bool:
    """The job has printed its first line."""
    return job.refresh().status == "in_progress" and "begun" in [*job.logs()]


def said(stack: Stack, run_id: str) -> list[str]:
    """The lines of one run that are in the ledger."""
    pieces = "select content from ledger.log_chunks where run_id = %s order by start_offset"
    return "".join(content for (content,) in stack.select(pieces, run_id)).splitlines()


def strike(stack: Stack, job: Job, fault: str, **params: float) -> None:
    """Let something befall the pod of a job."""
    match = {"podId": stack.pod_of(job)["pod_id"]}
    stack.simulator("POST", "faults", name=fault, match=match, params=params)


def pod_with(stack: Stack, docker_image: str) -> dict[str, Any]:
    """The pod that was bought first of those with an image, as the simulator knows it."""

    def look() -> dict[str, Any] | None:
        pods = [pod for pod in stack.simulator("GET", "state")["pods"] if pod["image"] == docker_image]
        return pods[0] if pods else None

    found = eventually(look, 30, "a pod is bought")
    assert found is not None
    return found


@contextlib.contextmanager
def taken_out(stack: Stack, host: str) -> Iterator[None]:
    """Meanwhile a machine sells nothing: otherwise the simulated market would always give the same one."""
    stack.simulator("PATCH", f"hosts/{host}", offline=True)
    yield
    stack.simulator("PATCH", f"hosts/{host}", offline=False)


def test_row_08_a_pod_without_its_gpu(row: Stack, ow: OpenWeights) -> None:
    """Its agent finds out before it takes work: another machine runs the first attempt."""
    mine = image(row, "row-8")
    row.simulator("POST", "faults", name="zero_gpu", match={"image": mine})
    job = ow.command.create(tag=row.tag("gpu"), command="true", docker_image=mine)
    broken = pod_with(row, mine)
    with taken_out(row, broken["host"]):
        job.wait(timeout=90, progress=False)
    assert [run.status for run in job.runs] == ["completed"]
    [(worker, reason)] = row.select("select id, reason from ledger.worker where pod_id = %s", broken["id"])
    assert reason.startswith("unusable host: "), reason
    assert worker != job.worker_id


def test_row_11_a_pod_is_preempted(row: Stack, ow: OpenWeights) -> None:
    """The job saves what it has in the grace, what it logged meanwhile is kept, another pod goes on."""
    job = ow.command.create(tag=row.tag("preempt"), command=_SAVES)
    eventually(lambda: begun(job), 60, "it runs")
    first = job.runs[0].id
    strike(row, job, "preempt", grace_s=3)
    eventually(
        lambda: len(job.runs) == 2 and job.runs[1].status == "in_progress", 90, "the second attempt runs"
    )
    assert job.runs[0].status == "lost"
    chunks = row.select(
        "select content from ledger.log_chunks where run_id = %s order by start_offset", first
    )
    assert "".join(content for (content,) in chunks).splitlines() == ["begun", "saved"]
    job.cancel()
    eventually(lambda: job.refresh().status == "canceled", 20, "it is canceled")


def test_row_12_a_pod_stands_still_for_a_moment(row: Stack, ow: OpenWeights) -> None:
    """Shorter than its lease: nothing happens."""
    job = row.running(ow.steady.create(tag=row.tag("still"), events=100, seconds=3))
    strike(row, job, "freeze", seconds=4)
    row.holds(job, attempts=1)


def test_row_16_the_disk_is_full(row: Stack, ow: OpenWeights) -> None:
    """The job fails of its own and its log says why; it is not tried again, and the pod is of use."""
    mine = image(row, "row-16")
    row.simulator("POST", "faults", name="disk_full", match={"image": mine}, params={"megabytes": 3})
    job = ow.command.create(
        tag=row.tag("disk"), command="dd if=/dev/zero of=large bs=1M count=9", docker_image=mine
    )
    with pytest.raises(JobFailed):
        job.wait(timeout=90, progress=False)
    assert [run.status for run in job.runs] == ["failed"]
    assert any(
        "File too large" in line or "limit exceeded" in line for line in job.logs()
    ) or "signal" in str(job.error)
    following = ow.command.create(tag=row.tag("disk"), command="true", docker_image=mine)
    following.wait(timeout=90, progress=False)


def test_row_18_a_job_that_kills_its_pods(row: Stack, ow: OpenWeights) -> None:
    """It fails after three, with the reason, and other jobs go on."""
    mine = image(row, "row-18")
    poison = ow.command.create(tag=row.tag("poison"), command=_KILLS_ITS_AGENT, docker_image=mine)
    with pytest.raises(JobFailed, match="Lost 3 pods in a row"):
        poison.wait(timeout=120, progress=False)
    assert [run.status for run in poison.runs] == ["lost"] * 3
    ow.command.create(tag=row.tag("good"), command="true", docker_image=mine).wait(timeout=90, progress=False)


def test_row_23_the_worker_stands_still(row: Stack, ow: OpenWeights) -> None:
    """Pods finish what they have; when it wakes up it condemns nobody, and takes up what came meanwhile."""
    job = row.running(ow.steady.create(tag=row.tag("paused"), events=100, seconds=3))
    worker = row.own(row.pid("worker"))
    worker.suspend()
    try:
        job.wait(timeout=30, progress=False)
        later = ow.command.create(tag=row.tag("later"), command="true")
    finally:
        worker.resume()
    row.holds(job, attempts=1)
    later.wait(timeout=60, progress=False)


@pytest.mark.parametrize("end", [StateType.CRASHED, StateType.FAILED])
def test_row_27_prefect_says_that_a_living_run_ended(row: Stack, ow: OpenWeights, end: StateType) -> None:
    """The ledger decides: the job goes on, and in the end Prefect shows what it came to."""
    job = row.running(ow.steady.create(tag=row.tag("crashed"), events=100, seconds=3))
    with row.prefect() as client:
        client.set_flow_run_state(UUID(job.runs[0].id), State(type=end), force=True)
    row.holds(job, attempts=1)


def test_row_50_an_agent_is_cut_off_for_a_moment(row: Stack, ow: OpenWeights) -> None:
    """The job writes on to its disk; all of it arrives when the agent is back, once and in order."""
    job = row.running(ow.steady.create(tag=row.tag("cut"), events=100, seconds=3))
    agent = row.own(row.agent_of(job))
    entrypoint = row.entrypoint_of(job)
    agent.suspend()
    try:
        eventually(
            lambda: not entrypoint.is_running() or entrypoint.status() == "zombie",
            30,
            "the program has ended",
        )
        assert job.refresh().status == "in_progress"
    finally:
        agent.resume()
    row.holds(job, attempts=1)


def test_row_50_a_pod_without_a_network(row: Stack, ow: OpenWeights) -> None:
    """It runs and reaches nobody: when its start-up budget is used up, another one has the job."""
    mine = image(row, "row-50")
    row.simulator("POST", "faults", name="network_cut", match={"image": mine})
    job = ow.command.create(tag=row.tag("alone"), command="true", docker_image=mine)
    alone = pod_with(row, mine)
    recorded = "select id from ledger.worker where pod_id = %s"
    eventually(lambda: row.select(recorded, alone["id"]), 10, "it is recorded")
    with taken_out(row, alone["host"]):
        row.sql(
            "update ledger.worker set created_at = created_at - make_interval(secs => %s) where pod_id = %s",
            row.settings.boot_seconds + 1,
            alone["id"],
        )
        job.wait(timeout=60, progress=False)
    assert [run.status for run in job.runs] == ["completed"]


def test_row_51_nothing_gets_in(row: Stack, ow: OpenWeights) -> None:
    """Nobody ever calls a pod."""
    job = row.running(ow.steady.create(tag=row.tag("unreachable"), events=100, seconds=3))
    strike(row, job, "host_unreachable")
    row.holds(job, attempts=1)


@pytest.mark.parametrize(
    "seconds",
    [
        pytest.param(0, id="for a moment"),
        pytest.param(15, id="for longer"),
    ],
)
def test_row_52_heartbeats_pass_and_uploads_fail(row: Stack, ow: OpenWeights, seconds: float) -> None:
    """The job is not completed before its log is stored; when it can be, it completes."""
    logs = row.home / "files" / "organizations" / row.settings.organization_id / "log"
    job = row.running(ow.steady.create(tag=row.tag("uploads"), events=100, seconds=3))
    first = job.runs[0].id
    logs.mkdir(exist_ok=True)
    aside = logs.with_name("log-aside")
    logs.rename(aside)
    logs.write_text("a file where a folder should be")
    try:
        eventually(lambda: "done" in said(row, first), 30, "its program has ended")
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert job.refresh().status in ("pending", "in_progress"), job.error
            time.sleep(0.2)
        assert job.refresh().status != "completed"
    finally:
        logs.unlink()
        aside.rename(logs)
    job.wait(timeout=90, progress=False)
    assert said(row, first)[:101] == [*(f"line {number}" for number in range(100)), "done"]
