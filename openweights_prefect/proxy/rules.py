"""What a pod may ask of Prefect: a table of routes, and for each what its path and body name.

Pure: a rule turns a request into a `Demand`, the things that must be the caller's own. What is not in the
table is refused. In bodies, too, only known fields pass: one of a later Prefect must be looked at first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from uuid import UUID

_ID = r"(?P<id>[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12})"
_SAFE_PATH = re.compile(r"(?:/[A-Za-z0-9_~-][A-Za-z0-9_.~-]*)+/?")
_MOST_ITEMS = 5000
_FLOW_RUN = "prefect.flow-run."
_TASK_RUN = "prefect.task-run."
_ARTIFACT = "prefect.artifact."
_OF_A_RUN = ("prefect.asset.", _ARTIFACT)
_RESERVED = ("prefect.", "openweights.")

Answer = Literal["forward", "no_storage", "work_pool"]


class Refused(Exception):
    """The request may not pass; the text says why, for whoever reads the pod's log."""


@dataclass(frozen=True)
class Demand:
    """What must belong to the caller's flow runs for a request to pass."""

    flow_runs: set[UUID] = field(default_factory=set)
    task_runs: dict[UUID, UUID | None] = field(default_factory=dict)
    """Task runs, each with the flow run that the request says it belongs to."""
    artifacts: set[UUID] = field(default_factory=set)
    object_id: tuple[str, str] | None = None
    """A field of flow runs and the value that one of the caller's own must have in it."""
    answer: Answer = "forward"


Rule = Callable[[Mapping[str, str], Any], Demand]


def demand_of(method: str, raw_path: str, query: str, body: Any) -> Demand:
    """What a request needs. `raw_path` is as it was sent, below `/api`; raises `Refused`."""
    if _SAFE_PATH.fullmatch(raw_path) is None:
        raise Refused("The path is not written plainly.")
    for name, pattern, rule in _RULES:
        match = pattern.fullmatch(raw_path)
        if name == method and match is not None:
            if query and rule is not _csrf:
                raise Refused("A query is not allowed here.")
            return rule({**match.groupdict(), "query": query}, body)
    raise Refused(f"A pod may not call {method} of this path.")


def demand_of_event(event: Any) -> Demand:
    """What one event needs: it is about a flow run or an artifact of the caller, or relates to a flow run."""
    event = _object(event)
    name = _text(event.get("event"))
    resource = _resource_id(event.get("resource"))
    related = [_resource_id(each) for each in _items(event.get("related") or [])]
    flow_runs = {
        _uuid(text.removeprefix(_FLOW_RUN)) for text in (resource, *related) if text.startswith(_FLOW_RUN)
    }
    if not flow_runs and name.startswith(_ARTIFACT) and resource.startswith(_ARTIFACT):
        # Prefect's client names no flow run when an artifact is made outside of its process, as a job's are.
        return Demand(artifacts={_uuid(resource.removeprefix(_ARTIFACT))})
    if not flow_runs:
        raise Refused("An event must be about a flow run of the pod.")
    if name.startswith(_TASK_RUN) or resource.startswith(_TASK_RUN):
        return _demand_of_task_run_event(event, resource, flow_runs)
    if resource.startswith(_FLOW_RUN) or name.startswith(_OF_A_RUN):
        return Demand(flow_runs)
    if name.startswith(_RESERVED) or resource.startswith(_RESERVED):
        raise Refused("Events of this name are not a pod's.")
    return Demand(flow_runs)


def _demand_of_task_run_event(event: dict[str, Any], resource: str, flow_runs: set[UUID]) -> Demand:
    task_run = _uuid(resource.removeprefix(_TASK_RUN))
    if len(flow_runs) != 1:
        raise Refused("A task run belongs to one flow run.")
    payload = _object(event.get("payload"))
    _object(payload.get("validated_state"))
    # Prefect stores these fields over the ids that it took from the event's resources.
    for name in ("id", "flow_run_id", "state", "state_id"):
        if name in _object(payload.get("task_run")):
            raise Refused(f"The task run of an event must not carry {name!r}.")
    return Demand(flow_runs, {task_run: next(iter(flow_runs))})


# One function per kind of request -----------------------------------------------------------------


def _free(_: Mapping[str, str], __: Any) -> Demand:
    return Demand()


def _csrf(path: Mapping[str, str], _: Any) -> Demand:
    if re.fullmatch(r"client=[0-9a-fA-F-]{36}", path["query"]) is None:
        raise Refused("A CSRF token is asked for one client.")
    return Demand()


def _no_storage(_: Mapping[str, str], __: Any) -> Demand:
    return Demand(answer="no_storage")


def _flow_run(path: Mapping[str, str], _: Any) -> Demand:
    return Demand({_uuid(path["id"])})


def _task_run(path: Mapping[str, str], _: Any) -> Demand:
    return Demand(task_runs={_uuid(path["id"]): None})


def _of_own_run(name: str, answer: Answer = "forward") -> Rule:
    def rule(path: Mapping[str, str], _: Any) -> Demand:
        return Demand(
            object_id=(name, path["id"].lower() if name.endswith("_id") else path["id"]), answer=answer
        )

    return rule


def _update_flow_run(path: Mapping[str, str], body: Any) -> Demand:
    _only(body, "name", "flow_version", "parameters", "empirical_policy", "tags")
    return _flow_run(path, body)


def _set_flow_run_state(path: Mapping[str, str], body: Any) -> Demand:
    body = _only(body, "state", "force")
    flow_runs, task_runs = _own_state(body.get("state"))
    return Demand({_uuid(path["id"]), *flow_runs}, dict.fromkeys(task_runs))


def _set_task_run_state(path: Mapping[str, str], body: Any) -> Demand:
    flow_runs, task_runs = _own_state(_only(body, "state", "force").get("state"))
    return Demand(flow_runs, dict.fromkeys({_uuid(path["id"]), *task_runs}))


def _create_subflow_run(_: Mapping[str, str], body: Any) -> Demand:
    known = ("state", "name", "flow_id", "flow_version", "parameters", "context", "parent_task_run_id")
    body = _only(body, *known, "empirical_policy", "tags", "labels")
    flow_runs, task_runs = _own_state(body.get("state"))
    parent = _uuid(body.get("parent_task_run_id"))
    return Demand(flow_runs, dict.fromkeys({parent, *task_runs}))


def _filter_flow_runs(_: Mapping[str, str], body: Any) -> Demand:
    """By ids or parents that are the caller's own; nothing else narrows the answer safely."""
    body = _only(body, "flow_runs", "sort", "limit", "offset")
    chosen = _only(body.get("flow_runs"), "id", "parent_task_run_id", "state")
    ids = _any_of(chosen.get("id"))
    parents = _any_of(chosen.get("parent_task_run_id"))
    if not ids and not parents:
        raise Refused("Flow runs can be listed by their ids, or by their parents.")
    return Demand(ids, dict.fromkeys(parents))


def _create_task_run(_: Mapping[str, str], body: Any) -> Demand:
    body = _object(body)
    flow_runs, task_runs = _own_state(body.get("state"))
    owner = _uuid(body.get("flow_run_id"))
    named: dict[UUID, UUID | None] = dict.fromkeys(task_runs)
    if body.get("id") is not None:
        named[_uuid(body["id"])] = owner
    return Demand({owner, *flow_runs}, named)


def _create_flow(_: Mapping[str, str], body: Any) -> Demand:
    _only(body, "name", "tags", "labels")
    return Demand()


def _create_logs(_: Mapping[str, str], body: Any) -> Demand:
    flow_runs: set[UUID] = set()
    task_runs: dict[UUID, UUID | None] = {}
    for each in _items(body):
        line = _only(each, "name", "level", "message", "timestamp", "flow_run_id", "task_run_id", "worker_id")
        if line.get("worker_id") is not None:
            raise Refused("A pod writes no log of a worker.")
        flow_runs.add(owner := _uuid(line.get("flow_run_id")))
        if line.get("task_run_id") is not None:
            task_run = _uuid(line["task_run_id"])
            if task_runs.setdefault(task_run, owner) != owner:
                raise Refused("A task run belongs to one flow run.")
    return Demand(flow_runs, task_runs)


def _create_artifact(_: Mapping[str, str], body: Any) -> Demand:
    known = ("key", "type", "description", "data", "metadata_", "flow_run_id", "task_run_id")
    body = _only(body, *known)
    owner = _uuid(body.get("flow_run_id"))
    task_run = body.get("task_run_id")
    return Demand({owner}, {} if task_run is None else {_uuid(task_run): owner})


def _update_artifact(path: Mapping[str, str], body: Any) -> Demand:
    _only(body, "data", "description", "metadata_")
    return Demand(artifacts={_uuid(path["id"])})


def _create_events(_: Mapping[str, str], body: Any) -> Demand:
    flow_runs: set[UUID] = set()
    artifacts: set[UUID] = set()
    task_runs: dict[UUID, UUID | None] = {}
    for event in _items(body):
        demand = demand_of_event(event)
        flow_runs |= demand.flow_runs
        artifacts |= demand.artifacts
        for task_run, owner in demand.task_runs.items():
            if task_runs.setdefault(task_run, owner) != owner:
                raise Refused("A task run belongs to one flow run.")
    return Demand(flow_runs, task_runs, artifacts)


_TABLE: list[tuple[str, str, Rule]] = [
    ("GET", "/admin/version", _free),
    ("GET", "/csrf-token", _csrf),
    ("GET", "/admin/storage", _no_storage),
    ("GET", f"/flow_runs/{_ID}", _flow_run),
    ("PATCH", f"/flow_runs/{_ID}", _update_flow_run),
    ("POST", f"/flow_runs/{_ID}/set_state", _set_flow_run_state),
    ("POST", f"/flow_runs/{_ID}/input", _flow_run),
    ("POST", f"/flow_runs/{_ID}/input/filter", _flow_run),
    ("GET", f"/flow_runs/{_ID}/input/[A-Za-z0-9_.-]+", _flow_run),
    ("DELETE", f"/flow_runs/{_ID}/input/[A-Za-z0-9_.-]+", _flow_run),
    ("POST", "/flow_runs/", _create_subflow_run),
    ("POST", "/flow_runs/filter", _filter_flow_runs),
    ("POST", "/task_runs/", _create_task_run),
    ("GET", f"/task_runs/{_ID}", _task_run),
    ("POST", f"/task_runs/{_ID}/set_state", _set_task_run_state),
    ("POST", "/flows/", _create_flow),
    ("GET", f"/flows/{_ID}", _of_own_run("flow_id")),
    ("GET", f"/deployments/{_ID}", _of_own_run("deployment_id")),
    ("GET", f"/work_queues/{_ID}", _of_own_run("work_queue_id")),
    ("GET", r"/work_pools/(?P<id>[A-Za-z0-9_.~-]+)", _of_own_run("work_pool_name", "work_pool")),
    ("POST", "/logs/", _create_logs),
    ("POST", "/artifacts/", _create_artifact),
    ("PATCH", f"/artifacts/{_ID}", _update_artifact),
    ("POST", "/events", _create_events),
]
_RULES = [(method, re.compile(pattern), rule) for method, pattern, rule in _TABLE]


# Reading bodies -----------------------------------------------------------------------------------


def parsed(content: bytes | str) -> Any:
    """The JSON of a body, None for an empty one; raises `Refused` for what may be read in two ways."""
    if not content:
        return None
    try:
        return json.loads(content, object_pairs_hook=_unambiguous)
    except (ValueError, RecursionError):
        raise Refused("The body is not JSON.") from None


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise Refused("The body names a field twice.")
    return found


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Refused("The body does not have the form that Prefect's client gives it.")
    return value


def _resource_id(resource: Any) -> str:
    return _text(_object(resource).get("prefect.resource.id"))


def _items(value: Any) -> list[Any]:
    if not isinstance(value, list) or len(value) > _MOST_ITEMS:
        raise Refused("The body must be a list, and not too long.")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise Refused("The body does not have the form that Prefect's client gives it.")
    return value


def _only(value: Any, *known: str) -> dict[str, Any]:
    """An object without fields that say something beside the known ones."""
    found = _object(value)
    unknown = [name for name, given in found.items() if name not in known and given is not None]
    if unknown:
        raise Refused(f"The field {unknown[0]!r:.60} is not allowed here.")
    return found


def _any_of(value: Any) -> set[UUID]:
    if value is None:
        return set()
    return {_uuid(each) for each in _items(_only(value, "any_").get("any_"))}


def _uuid(value: Any) -> UUID:
    try:
        return UUID(_text(value))
    except ValueError:
        raise Refused("An id is not a UUID.") from None


def _own_state(state: Any) -> tuple[set[UUID], set[UUID]]:
    """Flow runs and task runs that a state names in its details."""
    details = _object(_object(state or {}).get("state_details") or {})
    flow_runs = [details.get(name) for name in ("flow_run_id", "child_flow_run_id")]
    task_run = details.get("task_run_id")
    return (
        {_uuid(each) for each in flow_runs if each is not None},
        set() if task_run is None else {_uuid(task_run)},
    )
