"""Whether a flow run, task run or artifact is the caller's own: Prefect itself knows who made what."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, TypeVar
from uuid import UUID

import httpx

from openweights_prefect.proxy.pods import Caller
from openweights_prefect.proxy.rules import Demand, Refused

_DEEPEST = 20
_NOBODY = UUID(int=0)
"""The flow run of a task run that has none."""
_MOST_KNOWN = 50_000
_FIELDS = ("flow_id", "deployment_id", "work_queue_id", "work_pool_name")

Fact = TypeVar("Fact")


class Kinship:
    """Answers from what Prefect says of parents, which never changes and so is kept.

    A subflow run is its parent's: it has a task run of the parent's for a parent.
    """

    def __init__(self, upstream: httpx.AsyncClient) -> None:
        self._upstream = upstream
        self._flow_runs: OrderedDict[UUID, dict[str, Any]] = OrderedDict()
        self._task_runs: OrderedDict[UUID, UUID] = OrderedDict()
        self._artifacts: OrderedDict[UUID, UUID] = OrderedDict()
        self._children: OrderedDict[UUID, set[UUID]] = OrderedDict()

    async def check(self, caller: Caller, demand: Demand) -> None:
        """Raise `Refused` unless everything in the demand is the caller's own."""
        for flow_run in demand.flow_runs:
            if not await self._owns_flow_run(caller, flow_run):
                raise Refused(f"Flow run {flow_run} is not one of this pod's.")
        for task_run, owner in demand.task_runs.items():
            if not await self._owns_task_run(caller, task_run, owner):
                raise Refused(f"Task run {task_run} is not one of this pod's.")
        for artifact in demand.artifacts:
            maker = await self._maker_of(artifact)
            if maker is None or not await self._owns_flow_run(caller, maker):
                raise Refused("The artifact is not one of this pod's.")
        if demand.object_id is not None and not await self._has_field(caller, *demand.object_id):
            raise Refused("It does not belong to a flow run of this pod.")

    async def _owns_flow_run(self, caller: Caller, flow_run: UUID) -> bool:
        ancestor = flow_run
        for _ in range(_DEEPEST):
            if ancestor in caller.run_ids:
                if ancestor != flow_run:
                    _keep(self._children, ancestor, self._children.get(ancestor, set()) | {flow_run})
                return True
            parent = (await self._facts(ancestor)).get("parent_task_run_id")
            holder = await self._flow_run_of(UUID(parent)) if parent else None
            if holder is None:
                return False
            ancestor = holder
        return False

    async def _owns_task_run(self, caller: Caller, task_run: UUID, owner: UUID | None) -> bool:
        holder = await self._flow_run_of(task_run)
        if holder is None and owner is not None:
            # Prefect has not heard of it: an id that the caller made up just now, for a run of its own.
            holder = owner
            _keep(self._task_runs, task_run, holder)
        if holder is None or (owner is not None and holder != owner):
            return False
        return await self._owns_flow_run(caller, holder)

    async def _has_field(self, caller: Caller, name: str, value: str) -> bool:
        """Own runs and their subflow runs, as far as they have been seen here."""
        runs = [*caller.run_ids, *(child for run in caller.run_ids for child in self._children.get(run, ()))]
        for run in runs:
            if (await self._facts(run)).get(name) == value:
                return True
        return False

    async def _facts(self, flow_run: UUID) -> dict[str, Any]:
        if flow_run in self._flow_runs:
            self._flow_runs.move_to_end(flow_run)
            return self._flow_runs[flow_run]
        found = await self._read(f"/flow_runs/{flow_run}")
        if found is None:
            return {}
        facts = {name: found.get(name) for name in ("parent_task_run_id", *_FIELDS)}
        _keep(self._flow_runs, flow_run, facts)
        return facts

    async def _flow_run_of(self, task_run: UUID) -> UUID | None:
        if task_run in self._task_runs:
            self._task_runs.move_to_end(task_run)
            return self._task_runs[task_run]
        found = await self._read(f"/task_runs/{task_run}")
        if found is None:
            return None
        flow_run_id = found.get("flow_run_id")
        _keep(self._task_runs, task_run, holder := UUID(flow_run_id) if flow_run_id else _NOBODY)
        return holder

    async def _maker_of(self, artifact: UUID) -> UUID | None:
        """The flow run that an artifact is of."""
        if artifact in self._artifacts:
            self._artifacts.move_to_end(artifact)
            return self._artifacts[artifact]
        flow_run_id = (await self._read(f"/artifacts/{artifact}") or {}).get("flow_run_id")
        if flow_run_id is None:
            return None
        _keep(self._artifacts, artifact, maker := UUID(flow_run_id))
        return maker

    async def _read(self, path: str) -> dict[str, Any] | None:
        answer = await self._upstream.get(path)
        if answer.status_code == 404:
            return None
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()
        return found


def _keep(known: OrderedDict[UUID, Fact], key: UUID, fact: Fact) -> None:
    known[key] = fact
    known.move_to_end(key)
    while len(known) > _MOST_KNOWN:
        known.popitem(last=False)
