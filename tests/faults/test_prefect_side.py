"""What somebody starts in Prefect: the same jobs, their duplicates, bad parameters, flows of a user's own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from local_stack import Stack, eventually
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.client.schemas.objects import FlowRun
from prefect.states import AwaitingRetry

from openweights_prefect import JobFailed, OpenWeights
from openweights_prefect.bundle import deploy_root
from openweights_prefect.resources.job import Job

pytestmark = pytest.mark.stack

_POLL_SECONDS = 30
"""The worker asks Prefect for what others scheduled every ten seconds or so."""
_OWN_FLOW = """
from prefect import flow

@flow
def own(word: str) -> str:
    print("said", word)
    if word == "fail":
        raise ValueError("as it was told")
    return word
"""


def parameters_of(job: Job) -> dict[str, Any]:
    """What a form of Prefect would hold for the same job."""
    return {
        "name": job.type,
        "entrypoint": job.entrypoint,
        "params": job.params["validated_params"],
        "mounts": job.mounts,
    }


def start(stack: Stack, parameters: dict[str, Any], **options: Any) -> str:
    """Create a flow run of `custom-job/custom-job`; returns its id."""
    with stack.prefect() as client:
        deployment = client.read_deployment_by_name("custom-job/custom-job")
        run = client.create_flow_run_from_deployment(deployment.id, parameters=parameters, **options)
    return str(run.id)


def prefect(stack: Stack, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line of Prefect in the checkout, against the stack."""
    environment = {
        **stack.environment,
        "PREFECT_API_URL": stack.settings.prefect_api_url,
        "PREFECT_HOME": str(stack.home / "prefect"),
        "DO_NOT_TRACK": "1",
    }
    argv = [str(Path(sys.executable).with_name("prefect")), *arguments]
    said = subprocess.run(
        argv, env=environment, cwd=deploy_root(), capture_output=True, text=True, timeout=120, check=False
    )
    assert said.returncode == 0, said.stdout + said.stderr
    return said


def deployments(stack: Stack) -> list[dict[str, Any]]:
    """What Prefect holds of each deployment, but for times, versions and an empty part of a schema."""
    passing = {"id", "created", "updated", "version", "version_id", "version_info", "last_polled", "status"}
    with stack.prefect() as client:
        found = [deployment.model_dump(mode="json") for deployment in client.read_deployments()]
    for deployment in found:
        deployment["parameter_openapi_schema"].setdefault("definitions", {})
    kept = [{name: value for name, value in each.items() if name not in passing} for each in found]
    return sorted(kept, key=lambda deployment: str(deployment["name"]))


def ended(stack: Stack, flow_run_id: str, seconds: float = _POLL_SECONDS) -> FlowRun:
    """The flow run, once its state is final."""

    def look() -> FlowRun | None:
        with stack.prefect() as client:
            run = client.read_flow_run(UUID(flow_run_id))
        return run if run.state is not None and run.state.is_final() else None

    found = eventually(look, seconds, "the flow run ends")
    assert found is not None
    return found


def test_prefect_deploy_makes_the_same_deployments(stack: Stack) -> None:
    """`prefect deploy --all` of the checkout changes nothing that `ow up` registered but the version."""
    before = deployments(stack)
    prefect(stack, "--no-prompt", "deploy", "--all")
    assert deployments(stack) == before


def test_a_work_pool_is_made_by_the_prefect_command_line(stack: Stack) -> None:
    """The type `runpod` is known to Prefect once the package is installed; its form has our variables."""
    prefect(stack, "work-pool", "create", "handmade", "--type", "runpod")
    with stack.prefect() as client:
        template = client.read_work_pool("handmade").base_job_template
        client.delete_work_pool("handmade")
    assert {"requires_vram_gb", "allowed_hardware", "docker_image"} <= set(
        template["variables"]["properties"]
    )


def test_the_command_line_of_prefect_starts_the_same_job(stack: Stack, ow: OpenWeights) -> None:
    """`prefect deployment run` with the parameters of a finished job ends as Cached; no pod is touched."""
    job = ow.command.create(tag=stack.tag("cli"), command="echo hello").wait(timeout=60, progress=False)
    pods, runs = stack.report()["created"], len(job.runs)
    arguments = ["deployment", "run", "custom-job/custom-job"]
    for name, value in parameters_of(job).items():
        arguments += ["--param", f"{name}={json.dumps(value)}"]
    prefect(stack, *arguments)
    with stack.prefect() as client:
        [*_, flow_run] = sorted(client.read_flow_runs(), key=lambda run: str(run.created))
    assert str(flow_run.id) not in {run.id for run in job.runs}
    run = ended(stack, str(flow_run.id))
    assert run.state is not None
    assert run.state.name == "Cached"
    assert job.id in str(run.state.message)
    assert (len(job.runs), stack.report()["created"]) == (runs, pods)


def test_a_job_started_in_prefect_is_the_job_of_the_sdk(stack: Stack, ow: OpenWeights) -> None:
    """Its flow run is the run; the SDK joins it."""
    tag = stack.tag("form")
    parameters = {
        "name": "command",
        "entrypoint": "echo hello; sleep 2",
        "params": {"tag": tag, "command": "echo hello; sleep 2"},
    }
    flow_run_id = start(stack, parameters, job_variables={"requires_vram_gb": 0})
    eventually(lambda: ow.jobs.find(tag=tag), _POLL_SECONDS, "the job is in the ledger")
    job = ow.command.create(tag=tag, command="echo hello; sleep 2")
    job.wait(timeout=60, progress=False)
    assert [run.id for run in job.runs] == [flow_run_id]
    stack.agrees(job)


def test_a_second_flow_run_follows_the_first(stack: Stack, ow: OpenWeights) -> None:
    """While the job runs it waits; then it ends like the job, and the job has run once."""
    good = ow.command.create(tag=stack.tag("follows"), command="sleep 15")
    bad = ow.command.create(tag=stack.tag("follows"), command="sleep 15; exit 3")
    followers = []
    for job in (good, bad):
        eventually(lambda job=job: job.refresh().status == "in_progress", 60, "the job runs")  # type: ignore[misc]
        followers.append(start(stack, parameters_of(job), job_variables={"requires_vram_gb": 0}))
    for job, follower, end in zip((good, bad), followers, ("COMPLETED", "FAILED"), strict=True):
        run = ended(stack, follower, 15 + _POLL_SECONDS)
        assert run.state is not None
        assert (run.state.type.value, job.refresh().status) == (end, end.lower())
        assert end == "COMPLETED" or "exited with code 3" in str(run.state.message)
        assert len(job.runs) == 1


def test_bad_parameters_fail_with_one_clear_message(stack: Stack) -> None:
    """The flow run fails, names what is wrong, and no job is made; others are not held up by it."""
    unknown = "custom_job_file:file-000000000000"
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"name": "Not a name!"}, {}, "Not a name!"),
        ({"name": "fine_tuning"}, {}, "fine_tuning"),
        ({"entrypoint": "  "}, {}, "entrypoint"),
        ({"mounts": {"../evil": unknown}}, {}, "../evil"),
        ({"mounts": {"data": unknown}}, {}, unknown),
        ({}, {"allowed_hardware": ["1x NOPE"]}, "NOPE"),
    ]
    jobs = len(stack.call("list_jobs", max_rows=1000))
    started = []
    for change, variables, _ in cases:
        parameters = {"name": "command", "entrypoint": "true", "params": {"tag": stack.tag("bad")}, **change}
        started.append(start(stack, parameters, job_variables=variables))
    for flow_run_id, (_, _, message) in zip(started, cases, strict=True):
        run = ended(stack, flow_run_id)
        assert run.state is not None
        assert run.state.type.value == "FAILED", message
        assert message in str(run.state.message)
        assert "Traceback" not in str(run.state.message)
    assert len(stack.call("list_jobs", max_rows=1000)) == jobs


def test_a_flow_of_the_users_own_runs_on_a_pod(stack: Stack, ow: OpenWeights, tmp_path: Path) -> None:
    """Deployed to the pool with a pull step of Prefect's; the ledger holds it as a job that runs once."""
    (tmp_path / "own.py").write_text(_OWN_FLOW)
    with stack.prefect() as client:
        deployment = client.create_deployment(
            flow_id=client.create_flow_from_name("own"),
            name="own",
            entrypoint="own.py:own",
            work_pool_name=stack.settings.work_pool,
            pull_steps=[{"prefect.deployments.steps.set_working_directory": {"directory": str(tmp_path)}}],
        )
        runs = {
            end: client.create_flow_run_from_deployment(deployment, parameters={"word": word})
            for word, end in (("hello", "completed"), ("fail", "failed"))
        }
    for end, flow_run in runs.items():
        run = ended(stack, str(flow_run.id), 60)
        assert run.state is not None
        assert run.state.type.value == end.upper(), run.state.message
        job = ow.jobs.retrieve(f"flow-{flow_run.id}")
        eventually(lambda: job.refresh().status == end, 10, f"the ledger says {end}")  # noqa: B023
        [held] = job.runs
        assert (held.id, held.status) == (str(flow_run.id), end)
        assert held.worker_id is not None
        assert any(line.startswith("said ") for line in job.logs())
    assert "as it was told" in str(job.error)


def test_retry_of_a_failed_flow_run_is_a_new_attempt_of_its_job(stack: Stack, ow: OpenWeights) -> None:
    """Prefect's Retry button schedules the same flow run again: it ends, the job goes on in another one."""
    marker = stack.home / "retried"
    command = f"test -e {marker} || {{ touch {marker}; exit 1; }}"
    job = ow.command.create(tag=stack.tag("retry"), command=command)
    with pytest.raises(JobFailed):
        job.wait(timeout=60, progress=False)
    first = job.runs[0].id
    eventually(lambda: stack.call("get_run", run_id=first)[0]["mirrored"], 30, "it is mirrored")
    with stack.prefect() as client:
        client.set_flow_run_state(UUID(first), AwaitingRetry(), force=True)
    eventually(lambda: job.refresh().status == "completed", _POLL_SECONDS + 30, "the job completes")
    assert [run.status for run in job.runs] == ["failed", "completed"]
    state = ended(stack, first).state
    assert state is not None
    assert "goes on in another flow run" in (state.message or "")


def test_retry_of_a_completed_flow_run_is_answered_from_its_job(stack: Stack, ow: OpenWeights) -> None:
    """Nothing runs again."""
    job = ow.command.create(tag=stack.tag("retry-done"), command="true").wait(timeout=60, progress=False)
    run = job.runs[0].id
    eventually(lambda: stack.call("get_run", run_id=run)[0]["mirrored"], 30, "it is mirrored")
    with stack.prefect() as client:
        client.set_flow_run_state(UUID(run), AwaitingRetry(), force=True)
    assert ended(stack, run).state_name == "Cached"
    assert len(job.runs) == 1


def test_a_run_shows_its_progress_metrics_and_report(stack: Stack, ow: OpenWeights) -> None:
    """Log lines and three artifacts are on the page of the run."""
    program = (
        "from openweights_prefect import OpenWeights; ow = OpenWeights(); print('hello page'); "
        "[ow.run.log({'step': n, 'loss': 5 - n, 'progress': n / 4}) for n in range(5)]; "
        "open('uploads/result.txt', 'w').write('done')"
    )
    job = ow.command.create(tag=stack.tag("page"), command=f'python -c "{program}"')
    job.wait(timeout=60, progress=False)
    run = UUID(job.runs[0].id)
    mine = FlowRunFilter(id=FlowRunFilterId(any_=[run]))

    def artifacts() -> dict[str, Any] | None:
        with stack.prefect() as client:
            found = client.read_artifacts(flow_run_filter=mine)
        return {str(each.type): each.data for each in found} if len(found) >= 3 else None

    shown = eventually(artifacts, 20, "there are three artifacts")
    assert shown is not None
    assert float(shown["progress"]) == 100
    assert "result.txt" in shown["markdown"]
    table = json.loads(shown["table"]) if isinstance(shown["table"], str) else shown["table"]
    assert [row["loss"] for row in table] == [5, 4, 3, 2, 1]
    with stack.prefect() as client:
        logs = client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run])))
    assert "hello page" in [log.message for log in logs]
