"""Prefect's side in memory: flow runs that are created once a key, claimed once, and canceled by people."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import httpx

from openweights_prefect.orchestration.flow_runs import Ends, FlowRunGone
from openweights_prefect.orchestration.queues import PoolState


@dataclass
class FlowRunState:
    id: UUID
    key: str
    state: str = "scheduled"


class ModelFlowRuns:
    """What `FlowRuns` does, for every process of the simulation."""

    def __init__(self, random: Random) -> None:
        self.flow_runs: dict[UUID, FlowRunState] = {}
        self.by_key: dict[str, FlowRunState] = {}
        self.down = False
        self.paused = False
        """Somebody paused the work pool."""
        self.limit: int | None = None
        self._random = random

    async def create(
        self,
        deployment: str,
        *,
        job_id: str,
        attempt: int,
        parameters: Mapping[str, Any],
        variables: Mapping[str, Any],
        tags: Iterable[str],
        **_: Any,
    ) -> UUID:
        await self._way()
        key = f"{job_id}:{attempt}"
        if key not in self.by_key:
            flow_run = FlowRunState(UUID(int=self._random.getrandbits(128)), key)
            self.by_key[key] = self.flow_runs[flow_run.id] = flow_run
        await self._way()
        return self.by_key[key].id

    async def claim(self, flow_run_id: UUID, *, owner: str) -> Any:
        await self._way()
        flow_run = self.flow_runs.get(flow_run_id)
        if flow_run is None:
            raise FlowRunGone(str(flow_run_id))
        if flow_run.state not in ("scheduled", "pending"):
            return None
        flow_run.state = "pending"
        await self._way()
        return SimpleNamespace(id=flow_run_id)

    async def outcome(self, flow_run_id: UUID) -> tuple[str, str | None]:
        await self._way()
        return "lost", "the flow process ended before its flow did"

    async def mirror(self, flow_run_id: UUID, *, status: str, reason: str | None) -> None:
        await self._way()
        if flow_run_id in self.flow_runs:
            self.flow_runs[flow_run_id].state = status

    async def answer(self, flow_run_id: UUID, state: Any) -> None:
        await self.mirror(flow_run_id, status=str(state.type), reason=None)

    async def ends_among(self, flow_run_ids: Sequence[UUID]) -> Ends:
        await self._way()
        found = [self.flow_runs[name] for name in flow_run_ids if name in self.flow_runs]
        return Ends(
            canceled=[flow_run.id for flow_run in found if flow_run.state == "canceled"],
            ended=[flow_run.id for flow_run in found if flow_run.state in ("completed", "failed", "lost")],
        )

    async def pool_state(self, pool: str) -> PoolState:
        await self._way()
        return PoolState(paused=self.paused, paused_queues=frozenset(), concurrency_limit=self.limit)

    async def held_back(self, state: PoolState, flow_run_ids: Sequence[UUID]) -> dict[UUID, str]:
        why = state.reason(None)
        return {} if why is None else dict.fromkeys(flow_run_ids, why)

    async def restore(self, flow_run_id: UUID) -> None:
        await self._way()
        if flow_run_id in self.flow_runs:
            self.flow_runs[flow_run_id].state = "pending"

    async def deployment_of(self, flow_run: Any) -> tuple[str | None, dict[str, Any]]:
        return None, {}

    async def settle(self) -> None:
        """Nothing was spawned."""

    async def _way(self) -> None:
        await asyncio.sleep(self._random.uniform(0.01, 0.1))
        if self.down:
            raise httpx.ConnectError("Prefect is away")
