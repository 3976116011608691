"""A user's flow runs as if there were no proxy, with nothing but its pod's token."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import OTHER_ORGANIZATION_ID, Pod, World
from local_wait import eventually
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterParentFlowRunId,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.client.schemas.objects import FlowRun, Log, TaskRun
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

from openweights_prefect.orchestration.flow_runs import FlowRuns
from openweights_prefect.stack.environment import QUIET_PREFECT


def run_engine(world: World, pod: Pod, folder: Path) -> subprocess.CompletedProcess[str]:
    """The flow run's process, as Prefect starts it; all it has of Prefect is the proxy and the token."""
    environment = {
        "PATH": os.defpath,
        "HOME": str(folder),
        "PREFECT_HOME": str(folder / "prefect"),
        **QUIET_PREFECT,
        "PREFECT_API_URL": world.proxy_url,
        "PREFECT_API_AUTH_STRING": pod.token,
        "PREFECT_LOGGING_LEVEL": "INFO",
        "PREFECT__FLOW_RUN_ID": str(pod.run_id),
    }
    command = [sys.executable, "-m", "prefect.engine"]
    return subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=180, check=False
    )


def children_of(world: World, pod: Pod) -> list[FlowRun]:
    with world.prefect() as client:
        mine = FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[pod.run_id]))
        return client.read_flow_runs(flow_run_filter=mine)


def shown(world: World, flow_run_id: Any) -> tuple[list[TaskRun], list[Log]]:
    """What Prefect shows on a flow run's page."""
    with world.prefect() as client:
        mine = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id]))
        logs = client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow_run_id])))
        return client.read_task_runs(flow_run_filter=mine), logs


def test_a_flow_of_another_repository_runs_through_the_proxy(world: World, tmp_path: Path) -> None:
    """Pull step, own imports, tasks, a retry, a subflow, logs, an artifact: all of it is in Prefect."""
    pod = world.pod(run=world.flow_run(n=2))
    before = len(world.log.read_text())
    said = run_engine(world, pod, tmp_path)
    assert said.returncode == 0, said.stdout + said.stderr
    with world.prefect() as client:
        state = client.read_flow_run(pod.run_id).state
    assert state is not None
    assert state.is_completed(), state
    [child] = children_of(world, pod)
    assert child.state is not None
    assert child.state.is_completed()

    def all_is_there() -> bool:
        tasks, logs = shown(world, pod.run_id)
        lines = {log.message for log in logs}
        done = [task.state_type for task in tasks if task.state_type and task.state_type.value == "COMPLETED"]
        inner = {log.message for log in shown(world, child.id)[1]}
        return (
            len(done) >= 3
            and {"etl of 2", "printed by etl", "extract 0", "extract 1"} <= lines
            and "load [0, 2]" in inner
        )

    eventually(all_is_there, 20, "its task runs and log lines are in Prefect")
    assert "Refused" not in world.log.read_text()[before:]
    assert "left out" not in world.log.read_text()[before:]
    assert "Unable to connect" not in said.stderr


def test_an_agent_claims_and_reports_through_the_proxy(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the token as `PREFECT_API_KEY`, which Prefect's client sends as a bearer token."""
    pod = world.pod()

    async def act() -> None:
        async with PrefectClient(world.proxy_url, api_key=pod.token) as client:
            flow_runs = FlowRuns(client)
            claimed = await flow_runs.claim(pod.run_id, owner=pod.worker_id)
            assert claimed is not None
            assert claimed.id == pod.run_id
            await flow_runs.log_lines(pod.run_id, ["a line of the job"], datetime.now(UTC))
            assert await flow_runs.outcome(pod.run_id) == (
                "lost",
                "the flow process ended before its flow did",
            )

    asyncio.run(act())
    assert [log.message for log in shown(world, pod.run_id)[1]] == ["a line of the job"]


def socket_to(world: World, path: str) -> connect:
    url = world.proxy_url.replace("http", "ws", 1) + path
    return connect(url, subprotocols=[Subprotocol("prefect")], proxy=None)


def test_event_sockets_refuse_strangers_and_ended_pods(world: World) -> None:
    """Without a token of a living pod nobody gets in, and who is in is put out when his pod ends."""
    pod = world.pod()

    async def greet(token: str | None, path: str) -> str:
        async with socket_to(world, path) as socket:
            await socket.send(json.dumps({"type": "auth", "token": token}))
            try:
                return str(json.loads(await socket.recv())["type"])
            except ConnectionClosed:
                return "closed"

    async def stay() -> float:
        async with socket_to(world, "/events/in") as socket:
            await socket.send(json.dumps({"type": "auth", "token": pod.token}))
            assert json.loads(await socket.recv())["type"] == "auth_success"
            await asyncio.to_thread(world.end, pod)
            ended = time.monotonic()
            with pytest.raises(ConnectionClosed):
                await asyncio.wait_for(socket.recv(), 10)
            return time.monotonic() - ended

    for path in ("/events/in", "/events/out"):
        for token in (None, "", "owx_" + "0" * 64):
            assert asyncio.run(greet(token, path)) == "closed"
        assert asyncio.run(greet(pod.token, path)) == "auth_success"
    assert asyncio.run(stay()) < 6


def test_a_pod_hears_of_its_own_flow_run_only(world: World) -> None:
    """Whatever filter it asks for: another organization's events do not reach it."""
    pod, other = world.pod(), world.pod(OTHER_ORGANIZATION_ID)
    since = (datetime.now(UTC) - timedelta(minutes=5)).isoformat()
    until = (datetime.now(UTC) + timedelta(days=1)).isoformat()

    async def listen() -> list[str]:
        async with socket_to(world, "/events/out") as socket:
            await socket.send(json.dumps({"type": "auth", "token": pod.token}))
            await socket.recv()
            wanted = {
                "occurred": {"since": since, "until": until},
                "any_resource": {"id_prefix": ["prefect."]},
            }
            await socket.send(json.dumps({"type": "filter", "filter": wanted}))
            await asyncio.sleep(0.5)
            for each in (other, pod):
                await asyncio.to_thread(emit, world, each)
            heard = []
            while f"prefect.flow-run.{pod.run_id}" not in heard:
                message = json.loads(await asyncio.wait_for(socket.recv(), 20))
                heard.append(message["event"]["resource"]["prefect.resource.id"])
            return heard

    assert set(asyncio.run(listen())) == {f"prefect.flow-run.{pod.run_id}"}


def emit(world: World, pod: Pod) -> None:
    """The server says something about the flow run of a pod."""
    event = {
        "occurred": datetime.now(UTC).isoformat(),
        "event": "prefect.flow-run.Suspended",
        "id": str(pod.boot),
        "resource": {"prefect.resource.id": f"prefect.flow-run.{pod.run_id}"},
    }
    with world.prefect() as client:
        client._client.post("/events", json=[event]).raise_for_status()
