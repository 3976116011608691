"""A Prefect server that asks for a credential which only the control plane has: pods go through the proxy."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
import pytest
from local_stack import Stack, eventually
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterId,
    LogFilter,
    LogFilterFlowRunId,
)

from openweights_prefect import OpenWeights
from openweights_prefect.ledger import embedded
from openweights_prefect.simulator.processes import POD_VARIABLE
from openweights_prefect.stack import databases, health, processes, services
from openweights_prefect.stack.addresses import write_private
from openweights_prefect.stack.environment import common_environment
from openweights_prefect.stack.service import SERVICE_VARIABLE, Folders, Service

pytestmark = pytest.mark.stack

PASSWORD = f"admin:{secrets.token_hex(16)}"
_FORMS = (PASSWORD.encode(), base64.b64encode(PASSWORD.encode()))
"""As it is configured, and as a header carries it."""
_PRINTED = f"printed-{secrets.token_hex(8)}"
"""What the job prints: a search that does not find this would not find a password either."""

_JOB = """
import json, os, time
from pathlib import Path
from openweights_prefect import OpenWeights

ow = OpenWeights()
print(os.environ["PRINTED"], flush=True)
ow.run.log({"progress": 0.5})
ow.run.log({"step": 1, "loss": 0.25})
while not Path(os.environ["GATE"]).exists():
    print("waiting", flush=True)
    time.sleep(0.5)
ow.run.log({"progress": 1.0})
Path("uploads", "environment.json").write_text(json.dumps(dict(os.environ)))
"""
_OWN_FLOW = """
import json, os, time
from pathlib import Path
from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact

@task
def double(number: int) -> int:
    return 2 * number

@flow
def inner(number: int) -> int:
    return double(number)

@flow
def own(folder: str) -> int:
    get_run_logger().info("logged by the flow")
    Path(folder, "environment.json").write_text(json.dumps(dict(os.environ)))
    while not Path(folder, "gate").exists():
        time.sleep(0.1)
    create_markdown_artifact("made by the flow", key="of-the-flow")
    return inner(double(3))
"""


class GuardedStack(Stack):
    """A local stack whose Prefect server, once it has the deployments, is started anew with a password."""

    def __init__(self, parent: Path) -> None:
        super().__init__(parent / "home")
        self._folders = Folders(self.home)
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        self.proxy_url = f"http://127.0.0.1:{port}/api"
        self.environment["HOME"] = str(parent)  # What pods leave there is looked at, too.
        self.environment["OW_PREFECT_PROXY_URL"] = self.proxy_url
        self._proxy = Service(
            name="proxy",
            title="proxy",
            argv=services.module_command("openweights_prefect.proxy", "--port", str(port)),
            address=self.proxy_url,
            healthy=lambda _: health.answers(f"{self.proxy_url}/health"),
        )
        self.api_url = ""
        self.direct = socket.create_server(("127.0.0.1", 0))
        """Listens where pods are told that the Prefect API is."""

    def up(self) -> None:
        super().up()
        settings = self.settings
        self.api_url = settings.prefect_api_url
        planned = services.plan(
            settings,
            self._folders,
            prefect_database_url=databases.locate(self._folders).prefect_url,
            api_key=services.stored_api_key(settings),
        )
        for service in (planned.worker, planned.prefect):
            processes.stop(service, self._folders)
        addresses = json.loads(self._folders.addresses.read_text(encoding="utf-8"))
        addresses["prefect_api_url"] = f"http://127.0.0.1:{self.direct.getsockname()[1]}/api"
        write_private(self._folders.addresses, json.dumps(addresses))
        credential = {"PREFECT_API_URL": self.api_url, "PREFECT_API_AUTH_STRING": PASSWORD}
        self._launch(planned.prefect, {"PREFECT_SERVER_API_AUTH_STRING": PASSWORD})
        self._launch(self._proxy, credential)
        self._launch(dataclasses.replace(planned.worker, healthy=self._has_worker), credential)

    def down(self) -> None:
        super().down()
        self.direct.close()

    def prefect(self) -> SyncPrefectClient:
        return SyncPrefectClient(self.api_url, auth_string=PASSWORD)

    def bypassed(self) -> bool:
        """Whether anybody tried to reach Prefect otherwise than through the proxy."""
        self.direct.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            self.direct.accept()[0].close()
            return True
        return False

    def _launch(self, service: Service, more: dict[str, str]) -> None:
        service = dataclasses.replace(service, environment={**service.environment, **more})
        common = common_environment(self._folders, self.environment)
        process = processes.launch(service, self._folders, common)
        processes.await_healthy(service, process, self._folders)

    def _has_worker(self, process: processes.ServiceProcess) -> bool:
        with self.prefect() as client:
            path = f"/work_pools/{self.settings.work_pool}/workers/filter"
            workers = client._client.post(path, json={}).json()
        return any(health.is_online(each, since=process.started_at) for each in workers)


@pytest.fixture
def stack() -> Iterator[GuardedStack]:
    parent = Path(tempfile.mkdtemp(prefix="ow-guarded-"))
    parent.chmod(0o755)  # PostgreSQL of root runs as another account
    stack = GuardedStack(parent)
    try:
        stack.up()
        yield stack
    finally:
        stack.down()
        embedded.remove(stack.home / "postgres")
        shutil.rmtree(parent)


def test_pods_work_without_the_credential_of_the_prefect_server(
    stack: GuardedStack, ow: OpenWeights, tmp_path: Path
) -> None:
    """A job and a flow of a user's own, complete in Prefect; the credential stays with the control plane."""
    assert health.ask(f"{stack.api_url}/work_pools/{stack.settings.work_pool}").status == 401
    tmp_path.chmod(0o755)
    job_gate = tmp_path / "job-gate"
    job = ow.command.create(
        tag=stack.tag("guarded"),
        command=f"cat > job.py <<'END'\n{_JOB}\nEND\npython job.py",
        env={"PRINTED": _PRINTED, "GATE": str(job_gate)},
    )
    eventually(lambda: job.refresh().status == "in_progress", 90, "the job runs")
    run_id = job.runs[-1].id
    eventually(lambda: artifacts(stack, run_id).get("progress") == 50.0, 30, "Prefect shows its progress")
    assert environments_with(_PRINTED.encode()) == {"pod"}
    assert any("/disk/runs/" in name for name in files_with(stack.home.parent, _PRINTED.encode()))
    the_credential_is_kept(stack)
    job_gate.touch()
    job.wait(timeout=90, progress=False)

    stack.agrees(job)
    assert stack.state_of(run_id) == "COMPLETED"
    eventually(lambda: _PRINTED in log_of(stack, run_id), 20, "Prefect shows what it printed")
    eventually(lambda: {"progress", "metrics", "report"} <= {*artifacts(stack, run_id)}, 20, "its artifacts")
    assert artifacts(stack, run_id)["progress"] == 100.0
    [file] = [event["data"]["file"] for event in job.events() if "environment.json" in event["data"].values()]
    holds_no_credential(json.loads(ow.files.content(file)))

    own = run_own_flow(stack, tmp_path)
    environment = json.loads((tmp_path / "environment.json").read_text(encoding="utf-8"))
    holds_no_credential(environment)
    assert environment["PREFECT_API_URL"] == stack.proxy_url
    assert environment["PREFECT_API_AUTH_STRING"].startswith("owx_")
    eventually(lambda: "logged by the flow" in log_of(stack, own), 20, "Prefect shows what it logged")
    eventually(lambda: task_states(stack, own) == ["COMPLETED"] * 2, 20, "Prefect shows its tasks")
    assert list(artifacts(stack, own).values()) == ["made by the flow"]

    the_credential_is_kept(stack)
    assert not stack.bypassed()
    log = (stack.home / "logs" / "proxy.log").read_text(encoding="utf-8")
    assert "Refused" not in log
    assert "left out" not in log
    stack.money_is_safe()


def run_own_flow(stack: GuardedStack, folder: Path) -> str:
    """Its flow run, Completed; looked at while it ran."""
    (folder / "own.py").write_text(_OWN_FLOW, encoding="utf-8")
    with stack.prefect() as client:
        deployment = client.create_deployment(
            client.create_flow_from_name("own"),
            name="guarded",
            entrypoint="own.py:own",
            work_pool_name=stack.settings.work_pool,
            pull_steps=[{"prefect.deployments.steps.set_working_directory": {"directory": str(folder)}}],
            parameter_openapi_schema={"type": "object", "properties": {"folder": {"type": "string"}}},
        )
        run = client.create_flow_run_from_deployment(
            deployment, parameters={"folder": str(folder)}, job_variables={"requires_vram_gb": 0}
        )
    run_id = str(run.id)
    eventually((folder / "environment.json").exists, 90, "the flow runs")
    the_credential_is_kept(stack)
    (folder / "gate").touch()
    eventually(lambda: stack.state_of(run_id) == "COMPLETED", 60, "the flow completes")
    return run_id


def the_credential_is_kept(stack: GuardedStack) -> None:
    """It is with three services of the control plane, and in no file."""
    assert files_with(stack.home.parent, *_FORMS) == []
    assert environments_with(*_FORMS) == {"prefect", "proxy", "worker"}


def environments_with(*texts: bytes) -> set[str]:
    """Which services' processes have any of the texts in their environment or arguments; "pod" for pods'."""
    found = set()
    for pid in psutil.pids():
        with contextlib.suppress(OSError):
            environment = Path(f"/proc/{pid}/environ").read_bytes()
            if any(text in environment + Path(f"/proc/{pid}/cmdline").read_bytes() for text in texts):
                marks = dict(each.partition(b"=")[::2] for each in environment.split(b"\0"))
                is_pod = POD_VARIABLE.encode() in marks
                found.add("pod" if is_pod else marks.get(SERVICE_VARIABLE.encode(), b"?").decode())
    return found


def files_with(folder: Path, *texts: bytes) -> list[str]:
    found = []
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            if path.is_file() and not path.is_symlink():
                content = path.read_bytes()
                if any(text in content for text in texts):
                    found.append(str(path))
    return found


def holds_no_credential(environment: dict[str, str]) -> None:
    text = json.dumps(environment).encode()
    assert not any(form in text for form in _FORMS)


def log_of(stack: Stack, run_id: str) -> list[str]:
    with stack.prefect() as client:
        of_run = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[UUID(run_id)]))
        return [log.message for log in client.read_logs(of_run)]


def artifacts(stack: Stack, run_id: str) -> dict[str, Any]:
    """What Prefect shows on the run's page, by the last part of the key."""
    with stack.prefect() as client:
        of_run = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[UUID(run_id)]))
        found = client.read_artifacts(artifact_filter=of_run)
    return {(each.key or "").rpartition("-")[2]: each.data for each in found}


def task_states(stack: Stack, run_id: str) -> list[str]:
    with stack.prefect() as client:
        of_run = FlowRunFilter(id=FlowRunFilterId(any_=[UUID(run_id)]))
        runs = client.read_task_runs(flow_run_filter=of_run)
    return [run.state_type.value for run in runs if run.state_type is not None]
