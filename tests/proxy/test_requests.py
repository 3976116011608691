"""What a pod may ask of Prefect through the proxy: its own flow runs, and nothing else."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from conftest import OTHER_ORGANIZATION_ID, POOL, Pod, World
from local_wait import eventually
from prefect.blocks.system import Secret
from services import PASSWORD

NIL = str(uuid.UUID(int=0))
NOW = "2026-01-01T00:00:00Z"
SECRET = "a-secret-that-a-block-holds"


class Case:
    """One request; `{run}` and the like stand for ids of the pod whose things are asked for."""

    def __init__(self, method: str, path: str, body: Any = None) -> None:
        self.method, self.path, self.body = method, path, body

    def __repr__(self) -> str:
        return f"{self.method} {self.path}"

    def for_things(self, things: dict[str, str]) -> tuple[str, str, Any]:
        return self.method, _filled(self.path, things), _filled(self.body, things)


def _filled(value: Any, things: dict[str, str]) -> Any:
    if isinstance(value, str):
        for name, text in things.items():
            value = value.replace("{" + name + "}", text)
        return value
    if isinstance(value, dict):
        return {name: _filled(each, things) for name, each in value.items()}
    return [_filled(each, things) for each in value] if isinstance(value, list) else value


def log(**changes: Any) -> dict[str, Any]:
    return {"name": "x", "level": 20, "message": "hello", "timestamp": NOW, "flow_run_id": "{run}", **changes}


def event(name: str, resource: str, *related: str, **changes: Any) -> dict[str, Any]:
    return {
        "occurred": NOW,
        "event": name,
        "id": str(uuid.uuid4()),
        "resource": {"prefect.resource.id": resource},
        "related": [{"prefect.resource.id": each, "prefect.resource.role": "flow-run"} for each in related],
        **changes,
    }


def task_event(task_run: str = "{new}", **task: str) -> dict[str, Any]:
    payload = {
        "validated_state": {"type": "RUNNING", "name": "Running"},
        "task_run": {"name": "t", "task_key": "t", "dynamic_key": "{new}", **task},
    }
    resource = f"prefect.task-run.{task_run}"
    return event("prefect.task-run.Running", resource, "prefect.flow-run.{run}", payload=payload)


def running(**details: str) -> dict[str, Any]:
    return {
        "state": {"type": "RUNNING", "state_details": {"flow_run_id": "{run}", **details}},
        "force": False,
    }


ARTIFACT = {"key": "k", "type": "markdown", "data": "x", "flow_run_id": "{run}"}
TASK = {"task_key": "t", "dynamic_key": "{new}", "flow_run_id": "{run}"}
SUBFLOW = {"flow_id": "{flow}", "parent_task_run_id": "{task}", "state": {"type": "PENDING"}}
GIVE_INPUT = Case("POST", "/flow_runs/{run}/input", {"key": "answer", "value": "1"})

OWN = [
    Case("GET", "/flow_runs/{run}"),
    Case("PATCH", "/flow_runs/{run}", {"flow_version": "1", "name": "renamed"}),
    Case("POST", "/flow_runs/{run}/set_state", running()),
    Case("POST", "/flow_runs/filter", {"flow_runs": {"id": {"any_": ["{run}"]}}, "flows": None}),
    Case("POST", "/flow_runs/filter", {"flow_runs": {"parent_task_run_id": {"any_": ["{task}"]}}}),
    Case("POST", "/flow_runs/", SUBFLOW),
    Case("GET", "/deployments/{deployment}"),
    Case("GET", "/work_queues/{queue}"),
    Case("POST", "/logs/", [log(), log(task_run_id="{task}")]),
    Case("POST", "/artifacts/", ARTIFACT),
    Case("PATCH", "/artifacts/{artifact}", {"data": "y"}),
    Case("POST", "/task_runs/", TASK),
    Case("GET", "/task_runs/{task}"),
    Case("POST", "/task_runs/{task}/set_state", {"state": {"type": "RUNNING"}}),
    GIVE_INPUT,
    Case("GET", "/flow_runs/{run}/input/answer"),
    Case("POST", "/events", [event("prefect.flow-run.heartbeat", "prefect.flow-run.{run}")]),
    Case("POST", "/events", [event("mine", "thing", "prefect.flow-run.{run}")]),
    Case("POST", "/events", [event("prefect.artifact.updated", "prefect.artifact.{artifact}")]),
    Case("POST", "/events", [task_event()]),
]
"""Allowed for the pod's own things, refused for those of anybody else."""

FREE = [
    Case("GET", "/admin/version"),
    Case("GET", "/admin/storage"),
    Case("GET", "/flows/{flow}"),
    Case("GET", f"/work_pools/{POOL}"),
    Case("POST", "/flows/", {"name": "etl", "tags": [], "labels": {}}),
]

NEVER = [
    Case("GET", "/block_documents/{block}?include_secrets=true"),
    Case("GET", "/block_documents/{block}"),
    Case("POST", "/block_documents/filter", {"include_secrets": True}),
    Case("GET", "/block_types/slug/secret/block_documents/name/password?include_secrets=true"),
    Case("POST", "/block_documents/", {"name": "x"}),
    Case("PUT", "/admin/storage", {"default_result_storage_block_id": "{block}"}),
    Case("GET", "/admin/settings"),
    Case("POST", "/admin/database/clear", {"confirm": True}),
    Case("GET", "/variables/name/x"),
    Case("POST", "/variables/filter", {}),
    Case("DELETE", "/flow_runs/{run}"),
    Case("DELETE", "/deployments/{deployment}"),
    Case("PATCH", "/deployments/{deployment}", {"paused": True}),
    Case("POST", "/deployments/{deployment}/create_flow_run", {}),
    Case("POST", "/deployments/filter", {}),
    Case("POST", "/flow_runs/paginate", {}),
    Case("POST", "/flow_runs/bulk_set_state", {}),
    Case("POST", "/logs/filter", {"logs": {"flow_run_id": {"any_": ["{run}"]}}}),
    Case("POST", "/events/filter", {}),
    Case("POST", "/automations/", {}),
    Case("POST", f"/work_pools/{POOL}/get_scheduled_flow_runs", {}),
    Case("PATCH", f"/work_pools/{POOL}", {"is_paused": True}),
    Case("POST", f"/work_pools/{POOL}/workers/heartbeat", {"name": "x"}),
    # Our own things, in a way that reaches for others.
    Case("PATCH", "/flow_runs/{run}", {"job_variables": {"priority": 100}}),
    Case("PATCH", "/flow_runs/{run}", {"infrastructure_pid": "x"}),
    Case("POST", "/flow_runs/filter", {}),
    Case("POST", "/flow_runs/filter", {"flow_runs": {"id": {"any_": []}}}),
    Case("POST", "/flow_runs/filter", {"flow_runs": {"operator": "or_", "id": {"any_": ["{run}"]}}}),
    Case("POST", "/flow_runs/filter", {"flow_runs": {"id": {"any_": ["{run}"]}}, "flows": {}}),
    Case("POST", "/flow_runs/", {"flow_id": "{flow}", "state": {"type": "SCHEDULED"}}),
    Case("POST", "/flow_runs/", {**SUBFLOW, "work_pool_name": POOL}),
    Case("POST", "/flow_runs/", {**SUBFLOW, "deployment_id": "{deployment}"}),
    Case("POST", "/flow_runs/", {**SUBFLOW, "idempotency_key": "x"}),
    Case("POST", "/task_runs/", {"task_key": "t", "dynamic_key": "1"}),
    Case("POST", "/logs/", [log(flow_run_id=None)]),
    Case("POST", "/logs/", [log(worker_id=NIL)]),
    Case("POST", "/artifacts/", {"key": "k", "type": "markdown", "data": "x"}),
    Case("POST", "/events", [event("prefect.flow-run.Failed", "prefect.deployment.{deployment}")]),
    Case("POST", "/events", [event("mine", "prefect.artifact.{artifact}")]),
    Case("POST", "/events", [event("prefect.artifact.created", "prefect.artifact.{new}")]),
    Case("POST", "/events", [event("prefect.artifact.created", "prefect.deployment.{deployment}")]),
    Case(
        "POST",
        "/events",
        [event("prefect.work-pool.ready", "prefect.work-pool.x", "prefect.flow-run.{run}")],
    ),
    Case(
        "POST",
        "/events",
        [event("openweights.pod.lost", "openweights.pod.x", "prefect.flow-run.{run}")],
    ),
    Case(
        "POST",
        "/events",
        [event("prefect.task-run.Running", "prefect.flow-run.{run}", payload={})],
    ),
    # Paths that two readers may read in two ways, and queries.
    Case("GET", "/flow_runs/{run}/"),
    Case("GET", "/flow_runs//{run}"),
    Case("GET", "/flow_runs/{run}/../../block_documents/{block}"),
    Case("GET", "/flow_runs/%2e%2e/block_documents/{block}"),
    Case("GET", "/flow_runs/{run}%2F..%2F..%2Fblock_documents%2F{block}"),
    Case("GET", "/flow_runs/{run};x"),
    Case("GET", "/flow_runs/{run}?include_secrets=true"),
    Case("GET", "/flow_runs/{run}%00"),
    Case("GET", "/FLOW_RUNS/{run}"),
]
"""Refused whoever asks, for his own things too."""

IN_BODY = [
    Case("POST", "/flow_runs/{run}/set_state", running(flow_run_id="{other_run}")),
    Case("POST", "/flow_runs/{run}/set_state", running(child_flow_run_id="{other_run}")),
    Case("POST", "/flow_runs/filter", {"flow_runs": {"id": {"any_": ["{run}", "{other_run}"]}}}),
    Case("POST", "/logs/", [log(), log(flow_run_id="{other_run}")]),
    Case("POST", "/logs/", [log(task_run_id="{other_task}")]),
    Case("POST", "/artifacts/", {**ARTIFACT, "task_run_id": "{other_task}"}),
    Case("POST", "/task_runs/", {**TASK, "id": "{other_task}"}),
    Case("POST", "/flow_runs/", {**SUBFLOW, "parent_task_run_id": "{other_task}"}),
    Case("POST", "/events", [event("x", "thing", "prefect.flow-run.{run}", "prefect.flow-run.{other_run}")]),
    Case("POST", "/events", [task_event("{other_task}")]),
    Case("POST", "/events", [task_event(flow_run_id="{other_run}")]),
    Case("POST", "/events", [task_event(id="{other_task}")]),
]
"""The path is the pod's own, the body names something of another organization."""


def things_of(world: World, pod: Pod) -> dict[str, str]:
    """Ids for the table: a flow run with a task run and an artifact, and where it came from."""
    with world.prefect() as client:
        run = client.read_flow_run(pod.run_id)
        http = client._client
        task = {"task_key": "t", "dynamic_key": str(uuid.uuid4()), "flow_run_id": str(pod.run_id)}
        artifact = {"key": "a", "type": "markdown", "data": "x", "flow_run_id": str(pod.run_id)}
        return {
            "run": str(pod.run_id),
            "flow": str(run.flow_id),
            "deployment": str(run.deployment_id),
            "queue": str(run.work_queue_id),
            "task": http.post("/task_runs/", json=task).raise_for_status().json()["id"],
            "artifact": http.post("/artifacts/", json=artifact).raise_for_status().json()["id"],
        }


class Asker:
    """Sends requests as one pod."""

    def __init__(self, world: World, token: str | None) -> None:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._base = world.proxy_url
        self._http = httpx.Client(headers=headers, trust_env=False, timeout=30)

    def ask(self, case: Case, things: dict[str, str]) -> httpx.Response:
        method, path, body = case.for_things({**things, "new": str(uuid.uuid4())})
        # Built by hand: httpx would tidy up the paths that are to be refused.
        url = httpx.URL(self._base).copy_with(raw_path=f"/api{path}".encode())
        return self._http.request(method, url, json=body)


@pytest.fixture(scope="module")
def mine(world: World) -> tuple[Pod, dict[str, str]]:
    pod = world.pod()
    return pod, things_of(world, pod)


@pytest.fixture(scope="module")
def theirs(world: World) -> tuple[Pod, dict[str, str]]:
    """Of another organization, from another deployment."""
    run = world.flow_run(n=1)
    with world.prefect() as client:
        other = client.create_deployment(flow_id=client.create_flow_from_name("other"), name="other")
        run = client.create_flow_run_from_deployment(other)
    pod = world.pod(OTHER_ORGANIZATION_ID, run)
    things = things_of(world, pod)
    with world.prefect() as client:
        queue = client._client.post(f"/work_pools/{POOL}/queues", json={"name": "theirs"})
        things["queue"] = queue.json()["id"]
    return pod, things


@pytest.fixture(scope="module")
def block(world: World) -> Iterator[str]:
    """A secret in Prefect."""
    with world.prefect() as client:
        http = client._client
        slug = {"name": "Secret", "slug": "secret"}
        kind = http.get("/block_types/slug/secret")
        kind_id = (kind if kind.status_code == 200 else http.post("/block_types/", json=slug)).json()["id"]
        schema = http.post(
            "/block_schemas/", json={"block_type_id": kind_id, "fields": Secret.model_json_schema()}
        )
        document = {"block_schema_id": schema.json()["id"], "block_type_id": kind_id}
        made = http.post(
            "/block_documents/", json={**document, "name": "password", "data": {"value": SECRET}}
        )
        yield made.raise_for_status().json()["id"]


@pytest.mark.parametrize("case", [*FREE, *OWN], ids=repr)
def test_a_pod_reaches_its_own(world: World, mine: tuple[Pod, dict[str, str]], case: Case) -> None:
    """What an agent and its flow processes call is passed on to Prefect, which accepts it."""
    pod, things = mine
    if case.method == "GET" and "input" in case.path:
        Asker(world, pod.token).ask(GIVE_INPUT, things)
    answer = Asker(world, pod.token).ask(case, things)
    already = (409,) if case.path.endswith("/input") else ()
    assert answer.is_success or answer.status_code in already, answer.text


@pytest.mark.parametrize("case", OWN, ids=repr)
def test_a_pod_reaches_nothing_of_another_organization(
    world: World, mine: tuple[Pod, dict[str, str]], theirs: tuple[Pod, dict[str, str]], case: Case
) -> None:
    """The same requests about another organization's flow run are refused, both ways.

    A proxy knows the pods of one organization; those of others are nobody to it.
    """
    assert Asker(world, mine[0].token).ask(case, theirs[1]).status_code == 403
    assert Asker(world, theirs[0].token).ask(case, mine[1]).status_code == 401


def test_a_pod_reaches_nothing_of_its_neighbour(world: World, mine: tuple[Pod, dict[str, str]]) -> None:
    """Another pod of the same organization holds another run."""
    asker, things = Asker(world, world.pod().token), mine[1]
    for case in OWN:
        if not case.path.startswith(("/deployments", "/work_queues")):  # They share these.
            assert asker.ask(case, things).status_code == 403, case


@pytest.mark.parametrize("case", IN_BODY, ids=repr)
def test_bodies_are_read(
    world: World, mine: tuple[Pod, dict[str, str]], theirs: tuple[Pod, dict[str, str]], case: Case
) -> None:
    """A path of the pod's own does not carry something else along."""
    others = {"other_run": theirs[1]["run"], "other_task": theirs[1]["task"]}
    answer = Asker(world, mine[0].token).ask(case, {**mine[1], **others})
    assert answer.status_code == 403, answer.text


@pytest.mark.parametrize("case", NEVER, ids=repr)
def test_everything_else_is_refused(
    world: World, mine: tuple[Pod, dict[str, str]], block: str, case: Case
) -> None:
    """With a reason, and before Prefect hears of it."""
    answer = Asker(world, mine[0].token).ask(case, {**mine[1], "block": block})
    assert answer.status_code == 403, answer.text
    assert answer.json()["detail"]
    assert SECRET not in answer.text


@pytest.mark.parametrize("case", [*FREE, *OWN, *NEVER], ids=repr)
def test_without_a_token_nothing_is_answered(
    world: World, mine: tuple[Pod, dict[str, str]], block: str, case: Case
) -> None:
    """Nor with a token that no pod has, nor with the server's own password."""
    for token in (None, "owx_" + "0" * 64, "not a token", PASSWORD):
        assert Asker(world, token).ask(case, {**mine[1], "block": block}).status_code == 401


def test_the_form_of_the_work_pool_stays_hidden(world: World, mine: tuple[Pod, dict[str, str]]) -> None:
    """Its defaults may hold secrets; a flow only wants to know the pool's name."""
    shown = Asker(world, mine[0].token).ask(Case("GET", f"/work_pools/{POOL}"), mine[1]).json()
    assert shown["name"] == POOL
    assert shown["base_job_template"] == {}


def test_the_token_of_an_ended_pod_is_worth_nothing_soon(world: World) -> None:
    """Within a few seconds."""
    pod = world.pod()
    things, asker = things_of(world, pod), Asker(world, pod.token)
    assert asker.ask(OWN[0], things).status_code == 200
    world.end(pod)
    eventually(lambda: asker.ask(OWN[0], things).status_code == 401, 5, "the proxy refuses it")


def test_a_run_that_a_pod_was_just_given_can_be_claimed_at_once(world: World) -> None:
    """However short ago the ledger was asked about the pod."""
    pod = world.pod()
    asker = Asker(world, pod.token)
    assert asker.ask(Case("GET", "/flow_runs/{run}"), {"run": str(pod.run_id)}).status_code == 200
    callers = next(iter(world.callers.values()))
    callers.call("finish_run", for_run=pod.run_id, as_boot=pod.boot, result="completed", why=None)
    run = world.flow_run(n=1)
    job = {"id": f"flow-{run.id}", "type": "flow", "docker_image": "image", "params": {}, "files": []}
    callers.call("adopt_flow_run", job=job, flow_run=run.id, created=None)
    callers.call("hint_runs", hints={str(run.id): pod.worker_id})
    eventually(lambda: asker.ask(OWN[0], {"run": str(run.id)}).status_code == 200, 1, "it is allowed")
    # A flow says goodbye to Prefect after the ledger has its end.
    assert asker.ask(OWN[2], {"run": str(pod.run_id)}).status_code < 300


def test_large_bodies_and_broken_ones_are_refused(world: World, mine: tuple[Pod, dict[str, str]]) -> None:
    """No more is read than is allowed, and a field that is there twice is not guessed at."""
    pod, things = mine
    headers = {"Authorization": f"Bearer {pod.token}", "Content-Type": "application/json"}
    url = f"{world.proxy_url}/flow_runs/{things['run']}/set_state"
    bodies = {b"[" + b" " * (9 << 20) + b"]": 413, b"{": 403, b"[" * 100_000: 403}
    bodies[b'{"state": {"type": "RUNNING"}, "state": {"type": "CRASHED"}}'] = 403
    for body, status in bodies.items():
        assert httpx.post(url, content=body, headers=headers, trust_env=False).status_code == status


def test_the_log_of_the_proxy_holds_no_secret(world: World, mine: tuple[Pod, dict[str, str]]) -> None:
    """After all of the above: no token, no password, nothing of a body."""
    Asker(world, mine[0].token).ask(Case("POST", "/logs/", [log(message=SECRET, flow_run_id=NIL)]), mine[1])
    said = world.log.read_text()
    assert "Refused" in said
    for secret in (mine[0].token, PASSWORD, SECRET):
        assert secret not in said
