"""SIGKILL to every process of the path, one a test, while a job runs: nothing is lost, nothing is doubled."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import psutil
import pytest
from local_stack import IDLE_SECONDS, Stack, eventually

from openweights_prefect import OpenWeights
from openweights_prefect.errors import JobFailed

pytestmark = pytest.mark.stack


def test_the_submitting_script_right_after_create(stack: Stack, ow: OpenWeights, tmp_path: Path) -> None:
    """A job does not need the process that submitted it."""
    extra = tmp_path / "extra"
    extra.write_text("data")
    with stack.submit_script(stack.tag("script"), extra) as script:
        assert script.stdout is not None
        assert script.stdout.readline() == "creating\n"
        job_id = script.stdout.readline().strip()
        script.kill()
    stack.holds(ow.jobs.retrieve(job_id), attempts=1)


def test_the_submitting_script_during_create(stack: Stack, ow: OpenWeights, tmp_path: Path) -> None:
    """Killed at any moment of create, it leaves nothing half-made: the next submit gives one job."""
    extra = tmp_path / "extra"
    extra.write_bytes(b"much data " * 500_000)
    tag = stack.tag("during")
    for milliseconds in (0, 8, 16, 24, 40, 60):
        _kill_after(stack.submit_script(tag, extra), milliseconds)
    with stack.submit_script(tag, extra) as script:
        assert script.stdout is not None
        assert script.stdout.readline() == "creating\n"
        job = ow.jobs.retrieve(script.stdout.readline().strip())
        stack.holds(job, attempts=1)
        assert script.wait(30) == 0
    assert [each.id for each in ow.jobs.find(tag=tag)] == [job.id]


def _kill_after(script: subprocess.Popen[str], milliseconds: int) -> None:
    with script:
        assert script.stdout is not None
        assert script.stdout.readline() == "creating\n"
        time.sleep(milliseconds / 1000)  # where it is then differs each time: that is the point
        script.kill()


def test_the_worker(stack: Stack, ow: OpenWeights) -> None:
    """The pods go on without it; jobs that wait are taken up by the next worker, each with one flow run."""
    running = stack.running(ow.steady.create(tag=stack.tag("worker")))
    waiting = [ow.steady.create(tag=stack.tag("waits"), seconds=1, job_id_suffix="before") for _ in range(3)]
    eventually(lambda: waiting[0].runs, 10, "the first flow run is created")
    stack.kill(stack.pid("worker"))
    waiting.append(ow.steady.create(tag=stack.tag("waits"), seconds=1, job_id_suffix="after"))
    stack.up()
    stack.holds(running, attempts=1)
    for job in waiting:
        stack.holds(job, attempts=1)


def test_the_agent(stack: Stack, ow: OpenWeights) -> None:
    """The provider restarts the container; the run is lost at once and a second attempt completes."""
    job = stack.running(ow.steady.create(tag=stack.tag("agent")))
    stack.kill(stack.agent_of(job))
    stack.holds(job, attempts=2)


def test_the_entrypoint(stack: Stack, ow: OpenWeights) -> None:
    """A dead child is the job's own failure: it fails with the true reason, and keeps what it logged."""
    job = stack.running(ow.steady.create(tag=stack.tag("entrypoint")))
    stack.kill(stack.entrypoint_of(job))
    with pytest.raises(JobFailed, match=r"signal 9 \(SIGKILL\)"):
        job.wait(timeout=20, progress=False)
    assert [run.status for run in job.runs] == ["failed"]
    numbers = [event["data"]["n"] for event in job.events()]
    assert numbers == list(range(len(numbers)))
    assert [line for line in job.logs() if line.startswith("line ")][-1] in (
        f"line {numbers[-1]}",
        f"line {numbers[-1] - 1}",
    )
    stack.agrees(job)
    stack.money_is_safe()


def test_the_flow_process(stack: Stack, ow: OpenWeights) -> None:
    """The entrypoint ends with it, the run is lost, and a second attempt completes on the same pod."""
    job = stack.running(ow.steady.create(tag=stack.tag("flow")))
    entrypoint, pod = stack.entrypoint_of(job), job.worker_id
    stack.kill(stack.flow_process_of(job))
    psutil.wait_procs([entrypoint], timeout=5)
    assert not entrypoint.is_running()
    stack.holds(job, attempts=2)
    assert job.worker_id == pod


def test_an_attempt_that_died_between_its_result_and_its_end(stack: Stack, ow: OpenWeights) -> None:
    """The work is not done again: the next attempt takes the result, with all events and outputs."""
    job = ow.steady.create(tag=stack.tag("result"), events=40, seconds=1)
    first = job.wait(timeout=60, progress=False).runs[-1].id
    outputs = job.outputs
    stack.sql("update ledger.runs set status = 'lost', mirrored = false where id = %s", first)
    pending = "status = 'pending', attempt = 2, outputs = null, finished_at = null"
    stack.sql(f"update ledger.jobs set {pending} where id = %s", job.id)
    job.refresh().wait(timeout=60, progress=False)
    assert [run.status for run in job.runs] == ["lost", "completed"]
    assert job.outputs == outputs
    for run in job.runs:
        events = ow.events.list(run_id=run.id)
        assert [event["data"] for event in events] == [{"n": number} for number in range(40)]
    assert first in " ".join(job.logs())
    stack.agrees(job)


def test_the_preloaded_process(stack: Stack, ow: OpenWeights) -> None:
    """Its children end with it; the agent starts another one and goes on."""
    job = stack.running(ow.steady.create(tag=stack.tag("zygote")))
    entrypoint, pod = stack.entrypoint_of(job), job.worker_id
    stack.kill(stack.zygote_of(job))
    psutil.wait_procs([entrypoint], timeout=5)
    assert not entrypoint.is_running()
    stack.holds(job, attempts=2)
    [(status,)] = stack.select("select status from ledger.worker where id = %s", pod)
    assert status in ("active", "busy")


def test_the_process_group_of_the_pod(stack: Stack, ow: OpenWeights) -> None:
    """As when the container runs out of memory: it is restarted, and a second attempt completes."""
    job = stack.running(ow.steady.create(tag=stack.tag("group")))
    stack.kill_group(stack.agent_of(job))
    stack.holds(job, attempts=2)


def test_the_host(stack: Stack, ow: OpenWeights) -> None:
    """The pod is gone from one moment to the next: another one runs the second attempt."""
    job = stack.running(ow.steady.create(tag=stack.tag("host")))
    pod = stack.pod_of(job)
    stack.simulator("POST", f"pods/{pod['pod_id']}/kill", mode="host_lost")
    stack.holds(job, attempts=2)
    assert job.worker_id != pod["id"]


def test_the_prefect_server(stack: Stack, ow: OpenWeights) -> None:
    """A job completes without it; what it missed is told to it when it is back."""
    job = stack.running(ow.steady.create(tag=stack.tag("prefect")))
    stack.kill(stack.pid("prefect"))
    job.wait(timeout=30, progress=False)
    stack.up()
    stack.holds(job, attempts=1)


def test_postgresql(stack: Stack, ow: OpenWeights) -> None:
    """An outage shorter than the lease costs nothing; whatever it cost, the job ends whole."""
    job = stack.running(ow.steady.create(tag=stack.tag("postgres")))
    stack.kill(stack.pid("postgres"))
    stack.up()
    stack.holds(job)


def test_the_provider(stack: Stack, ow: OpenWeights) -> None:
    """All pods die at once and start again: a second attempt completes."""
    job = stack.running(ow.steady.create(tag=stack.tag("provider")))
    stack.kill(stack.pid("simulator"))
    stack.up()
    stack.holds(job, attempts=2)


def test_stopping_and_starting_the_stack(stack: Stack, ow: OpenWeights) -> None:
    """`ow down` in the middle of a job, then `ow up`: a later attempt completes, nothing else is needed."""
    # Longer than the worker, which is stopped first, may take to stop.
    job = stack.running(ow.steady.create(tag=stack.tag("down"), seconds=16))
    stack.down()
    assert stack.processes() == []
    stack.up()
    stack.holds(job, attempts=2)


def test_idle_pods_end(stack: Stack) -> None:
    """After all of that, without work, every pod of ours ends and its row says so; foreign ones stay."""
    eventually(lambda: stack.report()["alive"] == [], IDLE_SECONDS + 20, "no pod bills any more")
    eventually(
        lambda: {row["status"] for row in stack.call("list_workers")} == {"terminated"},
        30,
        "every row of a pod is terminated",
    )
    stack.money_is_safe()
