"""Secrets on a pod: who gets which, what is left out of logs and events, and what if one is gone."""

from __future__ import annotations

import base64
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import UUID

import pytest
from local_stack import Stack, eventually
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId

from openweights_prefect import JobFailed, OpenWeights
from openweights_prefect.resources.job import Job

pytestmark = pytest.mark.stack

_WAIT: dict[str, Any] = {"timeout": 90, "progress": False}
_SHOW = """
python -c 'import json, os; json.dump(dict(os.environ), open("uploads/environment.json", "w"))'
"""
_OWN_FLOW = """
import os
from prefect import flow, get_run_logger

BEFORE = os.environ.get("TEST_TOKEN")

@flow
def own() -> None:
    get_run_logger().warning("logged %s", os.environ["TEST_TOKEN"])
    print("printed", os.environ["TEST_TOKEN"])
    os.write(1, b"wrote " + os.environ["TEST_TOKEN"].encode())
    assert os.environ["TEST_TOKEN"] == BEFORE
    assert "OTHER_TOKEN" not in os.environ
"""


@pytest.fixture
def values(ow: OpenWeights) -> Iterator[dict[str, str]]:
    """Secrets of the organization."""
    names = ("TEST_TOKEN", "OTHER_TOKEN", "TEST_KEY")
    stored = {name: f"{name.lower()}+/{secrets.token_hex(16)}" for name in names}
    stored["TEST_KEY"] += f"\n{secrets.token_hex(16)}\n"
    for name, value in stored.items():
        ow.secrets.set(name, value)
    yield stored
    for name in stored:
        ow.secrets.delete(name)


def environment_of(ow: OpenWeights, job: Job) -> dict[str, str]:
    """The environment that the job's command had."""
    [file] = [
        event["data"]["file"] for event in job.events() if event["data"].get("path") == "environment.json"
    ]
    content: dict[str, str] = json.loads(ow.files.content(file))
    return content


def shown(stack: Stack, ow: OpenWeights, job: Job) -> str:
    """Everything that the ledger, the file store and Prefect show of a job, but the contents of its files."""
    run = job.runs[-1]
    with stack.prefect() as client:
        of_run = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[UUID(run.id)]))
        logs = [log.message for log in client.read_logs(of_run)]
        state = client.read_flow_run(UUID(run.id)).state
    rows = [
        stack.call(f, **a) for f, a in (("get_job", {"job_id": job.id}), ("list_runs", {"for_job": job.id}))
    ]
    log = ow.files.content(run.log_file).decode("utf-8", "replace") if run.log_file else ""
    events = [event["data"] for event in job.events()]
    return json.dumps(
        [rows, events, list(job.logs()), log, logs, str(state)], default=str, ensure_ascii=False
    )


def test_a_job_gets_the_secrets_that_it_names(ow: OpenWeights, stack: Stack, values: dict[str, str]) -> None:
    """As they were stored, several lines included; no other one, and another job on the same pod none."""
    job = ow.command.create(tag=stack.tag("some"), command=_SHOW, secrets=["TEST_TOKEN", "TEST_KEY"])
    found = environment_of(ow, job.wait(**_WAIT))
    assert {name: found.get(name) for name in values} == {**values, "OTHER_TOKEN": None}
    nothing = environment_of(ow, ow.command.create(tag=stack.tag("none"), command=_SHOW).wait(**_WAIT))
    assert not {*values} & {*nothing}
    assert set(found) - set(nothing) == {"TEST_TOKEN", "TEST_KEY"}
    stack.agrees(job)


def test_what_a_job_shows_by_accident_is_left_out(
    ow: OpenWeights, stack: Stack, values: dict[str, str]
) -> None:
    """In its log, live and uploaded, its events, names of files, its outputs, and on its Prefect page."""
    program = """
        import base64, os, sys, time, urllib.parse
        from pathlib import Path
        from openweights_prefect import OpenWeights
        ow, value, key = OpenWeights(), os.environ["TEST_TOKEN"], os.environ["TEST_KEY"]
        print("plain", value, repr(key)); print(key, file=sys.stderr)
        print("encoded", base64.b64encode(value.encode()).decode(), urllib.parse.quote(value, safe=""))
        print("basic", base64.b64encode(f"user:{value}".encode()).decode())
        for character in f"slowly {value} end":
            print(character, end="", flush=True); time.sleep(0.02)
        print("x" * 300_000 + value + "x" * 300_000)
        ow.run.log({value: [{"nested": f"a {value} b"}], "cut": value[:20], "n": 1})
        Path("uploads", f"{value.replace('/', '-')}.txt").write_text("content")
        Path("uploads", "of_one.txt").write_text("content")
        raise SystemExit(f"failed with {value}")
    """
    lines = "\n".join(line[8:] for line in program.splitlines())
    command = f"cat > job.py <<'END'\n{lines}\nEND\npython job.py"
    job = ow.command.create(tag=stack.tag("shows"), command=command, secrets=["TEST_TOKEN", "TEST_KEY"])
    with pytest.raises(JobFailed) as failure:
        job.wait(**_WAIT)
    stack.agrees(job)
    value = values["TEST_TOKEN"]
    parts = [value, quote(value, safe=""), base64.b64encode(value.encode()).decode()]
    parts += [base64.b64encode(f"user:{value}".encode()).decode()[8:-6], value[:20]]
    parts += values["TEST_KEY"].split()
    everything = shown(stack, ow, job) + str(failure.value)
    assert [part for part in parts if part in everything] == []
    log = ow.files.content(str(job.runs[-1].log_file)).decode()
    assert "".join(f"{line}\n" for line in job.logs()) == log
    assert "plain *** '***'" in log
    assert "slowly *** end" in log
    assert f"{'x' * 300_000}***{'x' * 300_000}" in log
    [event] = [event["data"] for event in job.events() if "n" in event["data"]]
    assert event == {"***": [{"nested": "a *** b"}], "cut": "***", "n": 1}


def test_a_secret_that_is_gone_fails_the_run_and_says_so(
    ow: OpenWeights, stack: Stack, values: dict[str, str]
) -> None:
    """The command does not begin; stored again and restarted, the job completes."""
    marker = stack.home / "began"
    job = ow.command.create(
        tag=stack.tag("gone"), command=f"touch {marker}", secrets=["TEST_TOKEN"], min_cuda="99.0"
    )
    ow.secrets.delete("TEST_TOKEN")
    stack.sql("update ledger.jobs set min_cuda = null where id = %s", job.id)
    with pytest.raises(JobFailed, match=r"no secret 'TEST_TOKEN' any more.*`ow env set TEST_TOKEN`"):
        job.wait(**_WAIT)
    assert not marker.exists()
    stack.agrees(job)
    ow.secrets.set("TEST_TOKEN", values["TEST_TOKEN"])
    job.restart().wait(**_WAIT)
    assert marker.exists()


def test_a_key_file_that_others_can_read_is_refused_on_the_pod(
    ow: OpenWeights, stack: Stack, values: dict[str, str]
) -> None:
    """The run fails with the mend."""
    path = stack.home / "secrets.key"
    job = ow.command.create(tag=stack.tag("open"), command="true", secrets=["TEST_TOKEN"])
    path.chmod(0o644)
    try:
        with pytest.raises(JobFailed, match="chmod 600"):
            job.wait(**_WAIT)
    finally:
        path.chmod(0o600)


def test_rotation_between_two_runs_changes_nothing_for_jobs(
    ow: OpenWeights, stack: Stack, values: dict[str, str]
) -> None:
    """The pod, which lives on, opens what the new key sealed."""
    for number in range(2):
        job = ow.command.create(tag=stack.tag("rotated"), command=_SHOW, secrets=["TEST_TOKEN"])
        assert environment_of(ow, job.wait(**_WAIT))["TEST_TOKEN"] == values["TEST_TOKEN"], number
        ow.secrets.rotate()


def test_a_job_cannot_ask_for_secrets_by_its_socket(
    ow: OpenWeights, stack: Stack, values: dict[str, str]
) -> None:
    """The call belongs to the flow's socket."""
    ask = "python -c 'from openweights_prefect.runtime import wire; print(wire.request(\"secrets\"))'"
    job = ow.command.create(tag=stack.tag("ask"), command=ask, secrets=["TEST_TOKEN"])
    with pytest.raises(JobFailed, match="The agent has no such call"):
        job.wait(**_WAIT)


def test_job_variables_in_prefect_name_secrets(ow: OpenWeights, stack: Stack, values: dict[str, str]) -> None:
    """A form, a schedule or a script of Prefect's names them."""
    parameters: dict[str, Any] = {
        "name": "command",
        "entrypoint": _SHOW,
        "params": {"tag": stack.tag("form"), "command": "x"},
    }
    found = run_in_prefect(
        stack, "custom-job/custom-job", parameters, {"requires_vram_gb": 0, "secrets": ["TEST_TOKEN"]}
    )
    assert found["type"] == "COMPLETED", found
    [job] = ow.jobs.find(tag=parameters["params"]["tag"])
    assert environment_of(ow, job)["TEST_TOKEN"] == values["TEST_TOKEN"]


def test_an_unknown_secret_ends_a_flow_run_of_prefect(ow: OpenWeights, stack: Stack) -> None:
    """Its state names the secret and the mend; no job is stored."""
    tag = stack.tag("unknown")
    parameters = {"name": "command", "entrypoint": "true", "params": {"tag": tag, "command": "x"}}
    found = run_in_prefect(stack, "custom-job/custom-job", parameters, {"secrets": ["NO_SUCH_TOKEN"]})
    assert found["type"] == "FAILED", found
    assert "`ow env set NO_SUCH_TOKEN`" in found["message"]
    assert ow.jobs.find(tag=tag) == []


@pytest.mark.parametrize("named_by", ["deployment", "run"])
def test_a_flow_of_a_users_own_has_them_in_its_environment(
    ow: OpenWeights, stack: Stack, values: dict[str, str], tmp_path: Path, named_by: str
) -> None:
    """Already when its file is loaded; what it logs to Prefect is without them."""
    (tmp_path / "own.py").write_text(_OWN_FLOW, encoding="utf-8")
    tmp_path.chmod(0o755)
    variables = {"requires_vram_gb": 0, "secrets": ["TEST_TOKEN"]}
    with stack.prefect() as client:
        flow_id = client.create_flow_from_name("own")
        client.create_deployment(
            flow_id,
            name=f"by-{named_by}",
            entrypoint="own.py:own",
            work_pool_name=stack.settings.work_pool,
            job_variables=variables if named_by == "deployment" else {},
            pull_steps=[{"prefect.deployments.steps.set_working_directory": {"directory": str(tmp_path)}}],
        )
    found = run_in_prefect(stack, f"own/by-{named_by}", {}, variables if named_by == "run" else {})
    assert found["type"] == "COMPLETED", found
    job = ow.jobs.retrieve(f"flow-{found['run']}")
    eventually(lambda: job.refresh().status == "completed", 10, "the ledger says completed")
    eventually(lambda: "logged ***" in shown(stack, ow, job), 10, "Prefect has the log")
    everything = shown(stack, ow, job)
    assert values["TEST_TOKEN"] not in everything
    assert [word for word in ("logged ***", "printed ***", "wrote ***") if word not in everything] == []


def run_in_prefect(
    stack: Stack, deployment: str, parameters: dict[str, Any], variables: dict[str, Any]
) -> dict[str, str]:
    """Start a flow run as a form does; its id, and the type and message of its final state."""
    with stack.prefect() as client:
        found = client.read_deployment_by_name(deployment)
        run = client.create_flow_run_from_deployment(found.id, parameters=parameters, job_variables=variables)

        def end() -> dict[str, str] | None:
            state = client.read_flow_run(run.id).state
            if state is None or not state.is_final():
                return None
            return {"run": str(run.id), "type": state.type.value, "message": state.message or ""}

        ended = eventually(end, 90, "the flow run ends")
    assert ended is not None
    return ended


def test_no_process_of_the_stack_is_left_with_them(
    stack: Stack, ow: OpenWeights, values: dict[str, str]
) -> None:
    """Only the command and what it started had them, neither the agent nor the flow's process."""
    job = ow.command.create(tag=stack.tag("processes"), command="echo begun; sleep 3", secrets=["TEST_TOKEN"])
    eventually(lambda: job.refresh().status == "in_progress" and list(job.logs()), 60, "it runs")
    value = values["TEST_TOKEN"].encode()
    command = stack.entrypoint_of(job)
    assert value in Path(f"/proc/{command.pid}/environ").read_bytes()
    for process in (stack.flow_process_of(job), stack.zygote_of(job), stack.agent_of(job)):
        assert value not in Path(f"/proc/{process.pid}/environ").read_bytes()
        assert value not in Path(f"/proc/{process.pid}/cmdline").read_bytes()
    assert value.decode() not in os.environ.values()
    job.wait(**_WAIT)
