"""The work pool behaves as any other: queues, pauses, cancels, crashes, workers, flows of any shape."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest
from local_stack import Stack, eventually
from prefect.client.schemas.actions import WorkPoolUpdate
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterParentFlowRunId,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.client.schemas.objects import State, StateType
from prefect.states import Crashed

from openweights_prefect import OpenWeights
from openweights_prefect.stack.service import HOME_VARIABLE
from openweights_prefect.stack.services import foreground_worker

pytestmark = pytest.mark.stack

_POLL_SECONDS = 30
"""The worker asks Prefect for what others scheduled every ten seconds or so."""
_CANCEL_SECONDS = 5
_REPOSITORY = Path(__file__).parents[1] / "proxy" / "repository"
_PULL = {"prefect.deployments.steps.set_working_directory": {"directory": str(_REPOSITORY)}}


def worker_command(stack: Stack, *options: str) -> tuple[list[str], dict[str, str]]:
    """A worker beside the stack's own, and its environment."""
    command, variables = foreground_worker(stack.settings, pool=None, name=None)
    environment = {
        **stack.environment,
        **variables,
        HOME_VARIABLE: str(stack.home),
        "OW_DATABASE_URL": stack.settings.database_url,
        "OW_RUNPOD_API_URL": stack.settings.runpod_api_url,
        "PREFECT_HOME": str(stack.home / "prefect"),
    }
    return [*command, *options], environment


@contextlib.contextmanager
def second_worker(stack: Stack, *options: str, **variables: str) -> Iterator[Path]:
    """It runs meanwhile; gives its log."""
    command, environment = worker_command(stack, "--name", "second", *options)
    log = stack.home / "logs" / "second-worker.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env={**environment, **variables}, stdout=output, stderr=output, stdin=subprocess.DEVNULL
        )
    try:
        eventually(lambda: "started!" in log.read_text() or process.poll() is not None, 60, "it starts")
        assert process.poll() is None, log.read_text()
        yield log
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def deploy(stack: Stack, name: str, **options: Any) -> UUID:
    """The flow of the user's repository, in the pool of the stack."""
    with stack.prefect() as client:
        return client.create_deployment(
            flow_id=client.create_flow_from_name("etl"),
            name=name,
            entrypoint="pkg/flows.py:etl",
            work_pool_name=stack.settings.work_pool,
            pull_steps=[_PULL],
            **options,
        )


def start(stack: Stack, deployment: UUID, **options: Any) -> UUID:
    """A flow run of it."""
    with stack.prefect() as client:
        return client.create_flow_run_from_deployment(deployment, parameters={"n": 2}, **options).id


def completes(stack: Stack, flow_run_id: UUID, seconds: float = 90) -> None:
    """Return when the flow run has completed."""
    eventually(
        lambda: stack.state_of(str(flow_run_id)) in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"),
        seconds,
        "the flow run ends",
    )
    assert stack.state_of(str(flow_run_id)) == "COMPLETED"


def everything_is_shown(stack: Stack, flow_run_id: UUID) -> bool:
    """Task runs, log lines, and those of its subflow."""
    with stack.prefect() as client:
        mine = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id]))
        children = client.read_flow_runs(
            flow_run_filter=FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[flow_run_id]))
        )
        runs = [flow_run_id, *(child.id for child in children)]
        logs = client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=runs)))
        tasks = {task.name.split("-")[0] for task in client.read_task_runs(flow_run_filter=mine)}
    lines = {"etl of 2", "printed by etl", "extract 0", "extract 1", "load [0, 2]"}
    return lines <= {log.message for log in logs} and {"extract", "flaky"} <= tasks


def test_a_flow_of_another_repository_runs_on_a_pod(stack: Stack, ow: OpenWeights) -> None:
    """A package in a subfolder with modules of its own, tasks, a retry, a subflow; from the queue `high`."""
    flow_run_id = start(stack, deploy(stack, "in-high", work_queue_name="high"))
    completes(stack, flow_run_id)
    eventually(lambda: everything_is_shown(stack, flow_run_id), 20, "all of it is in Prefect")
    [job] = stack.call("get_job", job_id=f"flow-{flow_run_id}")
    assert job["priority"] == 10


def test_a_flow_deployed_from_local_storage_runs_on_a_pod(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`flow.from_source(...).deploy(...)`, as Prefect's documentation has it."""
    monkeypatch.setenv("PREFECT_API_URL", stack.settings.prefect_api_url)
    script = (
        "import sys; from prefect import flow\n"
        "found = flow.from_source(source=sys.argv[1], entrypoint='pkg/flows.py:etl')\n"
        "print(found.deploy(name='from-source', work_pool_name=sys.argv[2], print_next_steps=False))\n"
    )
    argv = [sys.executable, "-c", script, str(_REPOSITORY), stack.settings.work_pool]
    environment = {**os.environ, "PREFECT_HOME": str(stack.home / "prefect"), "DO_NOT_TRACK": "1"}
    said = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert said.returncode == 0, said.stderr
    flow_run_id = start(stack, UUID(said.stdout.split()[-1]))
    completes(stack, flow_run_id)
    eventually(lambda: everything_is_shown(stack, flow_run_id), 20, "all of it is in Prefect")


def test_nothing_of_a_paused_pool_starts(stack: Stack, ow: OpenWeights) -> None:
    """A job waits with that reason, no pod is bought, and it goes on when the pool does."""

    def pause(paused: bool) -> None:
        with stack.prefect() as client:
            client.update_work_pool(stack.settings.work_pool, WorkPoolUpdate(is_paused=paused))

    pause(True)
    try:
        time.sleep(12)  # The worker looks every ten seconds.
        pods = stack.report()["created"]
        job = ow.command.create(tag=stack.tag("paused"), command="true")
        eventually(
            lambda: "the work pool is paused" in str(job.refresh().pending_reason), 20, "it says why it waits"
        )
        assert (job.status, stack.report()["created"]) == ("pending", pods)
    finally:
        pause(False)
    job.wait(timeout=60, progress=False)


def test_a_killed_pod_needs_no_automation(stack: Stack, ow: OpenWeights) -> None:
    """Its flow run ends Crashed, and the job goes on in another one."""
    with stack.prefect() as client:
        assert client._client.post("/automations/filter", json={}).json() == []
    job = stack.running(ow.steady.create(tag=stack.tag("crash"), events=100, seconds=10))
    first = job.runs[0].id
    stack.kill(stack.agent_of(job))
    stack.holds(job, attempts=2, seconds=120)
    assert stack.state_of(first) == "CRASHED"
    with stack.prefect() as client:
        assert client._client.post("/automations/filter", json={}).json() == []


def test_row_27_a_stranger_crashes_a_living_run(stack: Stack, ow: OpenWeights) -> None:
    """The ledger is the truth: the run keeps its pod, is shown as running again, and completes."""
    job = stack.running(ow.steady.create(tag=stack.tag("stranger"), events=300, seconds=45))
    run, pod = job.runs[0].id, job.worker_id
    with stack.prefect() as client:
        client.set_flow_run_state(UUID(run), Crashed(message="by a stranger"), force=True)
    eventually(lambda: stack.state_of(run) == "RUNNING", 25, "Prefect shows it as running again")
    stack.holds(job, attempts=1, seconds=90)
    assert job.worker_id == pod


@pytest.mark.parametrize("phase", ["booting", "running"])
def test_cancelling_in_prefect_agrees_on_both_sides(stack: Stack, ow: OpenWeights, phase: str) -> None:
    """Within five seconds."""
    job = ow.command.create(tag=stack.tag(phase), command="echo begun; sleep 600", allowed_hardware=["2x L4"])
    if phase == "booting":
        eventually(lambda: job.refresh().status == "pending" and job.runs, 20, "its flow run is created")
    else:
        eventually(lambda: job.refresh().status == "in_progress" and "begun" in [*job.logs()], 60, "it runs")
    run = job.runs[-1].id
    with stack.prefect() as client:
        client.set_flow_run_state(UUID(run), State(type=StateType.CANCELLING), force=True)
    eventually(
        lambda: job.refresh().status == "canceled" and stack.state_of(run) == "CANCELLED",
        _CANCEL_SECONDS,
        "both sides say canceled",
    )


def test_several_workers_on_one_pool_do_not_fight(stack: Stack, ow: OpenWeights) -> None:
    """Each job runs once, and the limit of pods holds for both together; the second says what it checked."""
    with second_worker(stack) as log:
        jobs = [ow.command.create(tag=stack.tag("two"), command="sleep 1") for _ in range(12)]
        most = 0
        while any(job.refresh().status in ("pending", "in_progress") for job in jobs):
            most = max(most, len([w for w in stack.call("list_workers") if w["status"] != "terminated"]))
        assert most <= stack.settings.max_workers
        assert [job.status for job in jobs] == ["completed"] * 12
        assert [len(job.runs) for job in jobs] == [1] * 12
        for job in jobs:
            stack.agrees(job)
        assert "RunPod's description of its API" in log.read_text()
    stack.money_is_safe()


def test_a_new_worker_takes_over_what_lives(stack: Stack, ow: OpenWeights) -> None:
    """The stack's worker dies during a run; another one finds pod and run, and the run does not notice."""
    job = stack.running(ow.steady.create(tag=stack.tag("takeover"), events=150, seconds=15))
    pod = job.worker_id
    stack.kill(stack.pid("worker"))
    try:
        with second_worker(stack):
            stack.holds(job, attempts=1)
            assert job.worker_id == pod
    finally:
        stack.up()


def test_pods_are_in_the_event_feed(stack: Stack, ow: OpenWeights) -> None:
    """With their job and hardware, and neither tokens nor environment."""
    job = ow.command.create(tag=stack.tag("events"), command="true").wait(timeout=60, progress=False)

    def kinds() -> set[str]:
        wanted = {"event": {"prefix": ["openweights.pod."]}}
        url = f"{stack.settings.prefect_api_url}/events/filter"
        answer = httpx.post(url, json={"filter": wanted, "limit": 50}, trust_env=False).json()
        assert "owb_" not in str(answer)
        assert "OW_POD_TOKEN" not in str(answer)
        mine = f"openweights.pod.{job.worker_id}"
        return {e["event"] for e in answer["events"] if e["resource"]["prefect.resource.id"] == mine}

    eventually(
        lambda: {"openweights.pod.created", "openweights.pod.active"} <= kinds() or None, 20, "its events"
    )


@pytest.mark.parametrize(
    ("options", "says"), [(["--work-queue", "high"], "--work-queue"), (["--run-once"], "--run-once")]
)
def test_what_a_worker_cannot_do_is_said_at_once(stack: Stack, options: list[str], says: str) -> None:
    """Instead of half doing it."""
    command, environment = worker_command(stack, "--name", "refused", *options)
    said = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert said.returncode != 0
    assert "Start it without" in said.stdout + said.stderr
    assert options[0] in said.stdout + said.stderr


def test_the_options_of_any_worker_work(stack: Stack) -> None:
    """A limit, the time ahead, and the server that tells whether it is well."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    options = ("--limit", "2", "--prefetch-seconds", "5", "--with-healthcheck")
    with second_worker(
        stack, *options, PREFECT_WORKER_WEBSERVER_PORT=port, PREFECT_WORKER_WEBSERVER_HOST="127.0.0.1"
    ):

        def well() -> bool:
            try:
                return httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200
            except httpx.HTTPError:
                return False

        eventually(well, 30, "it says that it is well")


def test_the_form_of_the_pool_explains_each_variable(stack: Stack) -> None:
    """Every variable has a title and a sentence."""
    with stack.prefect() as client:
        template = client.read_work_pool(stack.settings.work_pool).base_job_template
        queues = {
            each.name: each.priority
            for each in client.read_work_queues(work_pool_name=stack.settings.work_pool)
        }
    ours = set(template["variables"]["properties"]) - {"name", "env", "labels", "command"}
    assert {"docker_image", "requires_vram_gb", "cloud", "min_cuda", "priority", "secrets"} <= ours
    for name in ours:
        spec = template["variables"]["properties"][name]
        assert spec["title"], name
        assert spec["description"].endswith("."), name
    assert queues["high"] < queues["default"] < queues["low"]
