"""Flow runs, as the control plane and the pods see them: the one place that speaks to the Prefect API."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import LogCreate
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.responses import OrchestrationResult, SetStateStatus
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Completed, Crashed, Failed, Pending, Running

from openweights_prefect.orchestration.queues import PoolState, pool_state, priority_in, queue_of
from openweights_prefect.settings import Settings

logger = logging.getLogger(__name__)

FOREIGN_END_SECONDS = 15.0
"""For how long Prefect shows an end before a run counts as ended by a stranger."""

_CLOSE_SECONDS = 10.0
_PAGE = 200
_CANCELED = (StateType.CANCELLING, StateType.CANCELLED)
_ENDED = (StateType.CRASHED, StateType.FAILED, StateType.COMPLETED)


class FlowRunGone(LookupError):
    """Prefect has no such flow run: somebody deleted it."""


class Ends(NamedTuple):
    """What Prefect shows of runs that have no end in the ledger."""

    canceled: list[UUID]
    """Somebody canceled them."""
    ended: list[UUID]
    """They have been ended for a while: a living run's own flow did not do that.

    The end of a user's own flow is in Prefect a moment before it is in the ledger, hence the while.
    """


class FlowRuns:
    """A thin adapter over Prefect's client; every state that we set passes here."""

    def __init__(self, client: PrefectClient) -> None:
        self._client = client
        self._deployments: dict[str, UUID] = {}
        self._ended_since: dict[UUID, float] = {}
        self._background: set[asyncio.Task[Any]] = set()

    @classmethod
    @asynccontextmanager
    async def connect(cls, settings: Settings) -> AsyncIterator[FlowRuns]:
        """Open a client of the API that `settings` (and so Prefect's own environment) names."""
        async with get_client(httpx_settings={"timeout": 30.0}) as client:
            flow_runs = cls(client)
            try:
                yield flow_runs
            finally:
                await flow_runs.settle()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something whose failure must not disturb the caller; `settle()` waits for it."""
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def settle(self) -> None:
        """Wait a bounded time for what `spawn()` started."""
        if self._background:
            await asyncio.wait(self._background, timeout=_CLOSE_SECONDS)

    # Creating and claiming ----------------------------------------------------------------------

    async def create(
        self,
        deployment: str,
        *,
        job_id: str,
        attempt: int,
        parameters: Mapping[str, Any],
        variables: Mapping[str, Any],
        tags: Iterable[str],
    ) -> UUID:
        """The flow run of one attempt, in the queue of its priority; asked again, the same one."""
        if deployment not in self._deployments:
            self._deployments[deployment] = (await self._client.read_deployment_by_name(deployment)).id
        try:
            flow_run = await self._client.create_flow_run_from_deployment(
                self._deployments[deployment],
                parameters=dict(parameters),
                job_variables=dict(variables),
                name=job_id if attempt == 1 else f"{job_id} attempt {attempt}",
                idempotency_key=_key(job_id, attempt),
                tags=list(tags),
                work_queue_name=queue_of(int(variables.get("priority") or 0)),
            )
        except ObjectNotFound:
            self._deployments.pop(deployment)  # it was deployed anew; the next pass finds it
            raise
        return flow_run.id

    async def claim(self, flow_run_id: UUID, *, owner: str) -> FlowRun | None:
        """Scheduled -> Pending, which Prefect grants once; None when somebody else has it or it has ended.

        A run left Pending by a dead pod may be taken over: the ledger's `open_run` is the gate that decides.

        Raises:
            FlowRunGone: The flow run was deleted.
        """
        pending: State[Any] = Pending(message=f"Claimed by pod {owner}")
        try:
            flow_run: FlowRun
            answer: OrchestrationResult[Any]
            flow_run, answer = await asyncio.gather(
                self._client.read_flow_run(flow_run_id),
                self._client.set_flow_run_state(flow_run_id, pending),
            )
            if answer.status != SetStateStatus.ACCEPT:
                flow_run = await self._client.read_flow_run(flow_run_id)
        except ObjectNotFound as exc:
            raise FlowRunGone(str(flow_run_id)) from exc
        if answer.status == SetStateStatus.ACCEPT:
            flow_run.state = answer.state
            return flow_run
        return flow_run if flow_run.state is not None and flow_run.state.is_pending() else None

    async def outcome(self, flow_run_id: UUID) -> tuple[str, str | None]:
        """How a flow of the user's own ended, in the ledger's words, and why."""
        state = (await self._client.read_flow_run(flow_run_id)).state
        if state is None or not state.is_final():
            return "lost", "the flow process ended before its flow did"
        words = {
            StateType.COMPLETED: "completed",
            StateType.FAILED: "failed",
            StateType.CANCELLED: "canceled",
        }
        return words.get(state.type, "lost"), None if state.is_completed() else state.message

    # Reconciling --------------------------------------------------------------------------------

    async def mirror(self, flow_run_id: UUID, *, status: str, reason: str | None) -> None:
        """Make Prefect show what the ledger decided; a flow run that is gone or agrees is left alone."""
        wanted = _state(status, reason)
        try:
            held = (await self._client.read_flow_run(flow_run_id)).state
            if held is None or held.type != wanted.type:
                await self._client.set_flow_run_state(flow_run_id, wanted, force=True)
        except ObjectNotFound:
            logger.info("Flow run %s is gone from Prefect", flow_run_id)

    async def answer(self, flow_run_id: UUID, state: State[Any]) -> None:
        """End a scheduled flow run without running it."""
        await self._client.set_flow_run_state(flow_run_id, state, force=True)

    async def ends_among(self, flow_run_ids: Sequence[UUID]) -> Ends:
        """Those of runs without an end in the ledger that Prefect shows as canceled or ended."""
        types = FlowRunFilterStateType(any_=[*_CANCELED, *_ENDED])
        found = await self._read_all(flow_run_ids, FlowRunFilterState(type=types))
        now = asyncio.get_running_loop().time()
        self._ended_since = {
            flow_run.id: self._ended_since.get(flow_run.id, now)
            for flow_run in found
            if flow_run.state_type in _ENDED
        }
        return Ends(
            canceled=[flow_run.id for flow_run in found if flow_run.state_type in _CANCELED],
            ended=[each for each, since in self._ended_since.items() if now - since >= FOREIGN_END_SECONDS],
        )

    async def restore(self, flow_run_id: UUID) -> None:
        """Make Prefect show a flow run as running that is, by the ledger."""
        message = "It was ended in Prefect, but its pod is at work on it; cancel it to stop it."
        logger.warning("Flow run %s was ended in Prefect while it runs; it is shown as running.", flow_run_id)
        self._ended_since.pop(flow_run_id, None)
        try:
            await self._client.set_flow_run_state(flow_run_id, Running(message=message), force=True)
        except ObjectNotFound:
            logger.info("Flow run %s is gone from Prefect", flow_run_id)

    async def _read_all(
        self, flow_run_ids: Sequence[UUID], state: FlowRunFilterState | None = None
    ) -> list[FlowRun]:
        """By their ids, as many at once as Prefect answers with."""
        found: list[FlowRun] = []
        for start in range(0, len(flow_run_ids), _PAGE):
            ids = FlowRunFilterId(any_=list(flow_run_ids[start : start + _PAGE]))
            found += await self._client.read_flow_runs(flow_run_filter=FlowRunFilter(id=ids, state=state))
        return found

    # Work pool and queues -----------------------------------------------------------------------

    async def deployment_of(self, flow_run: FlowRun) -> tuple[str | None, dict[str, Any]]:
        """`flow/deployment` of a flow run, or None, and the job variables of that and of its queue."""
        variables: dict[str, Any] = {}
        if not flow_run.work_pool_name:  # Scheduled ones, as a worker gets them, do not name it.
            flow_run = await self._client.read_flow_run(flow_run.id)
        if flow_run.work_pool_name and flow_run.work_queue_name:
            queues = await self._client.read_work_queues(work_pool_name=flow_run.work_pool_name)
            if priority := priority_in(flow_run.work_queue_name, queues):
                variables["priority"] = priority
        if flow_run.deployment_id is None:
            return None, variables
        deployment = await self._client.read_deployment(flow_run.deployment_id)
        flow = await self._client.read_flow(deployment.flow_id)
        return f"{flow.name}/{deployment.name}", {**variables, **(deployment.job_variables or {})}

    async def pool_state(self, pool: str) -> PoolState:
        """Whether the pool or queues of it are paused, and its concurrency limit."""
        return await pool_state(self._client, pool)

    async def held_back(self, state: PoolState, flow_run_ids: Sequence[UUID]) -> dict[UUID, str]:
        """Those that may not start as the pool is, and why; asks Prefect only when queues are paused."""
        if state.paused or not state.paused_queues:
            why = state.reason(None)
            return {} if why is None else dict.fromkeys(flow_run_ids, why)
        reasons = {
            flow_run.id: state.reason(flow_run.work_queue_name)
            for flow_run in await self._read_all(flow_run_ids)
        }
        return {flow_run_id: why for flow_run_id, why in reasons.items() if why}

    # Logs and artifacts -------------------------------------------------------------------------

    async def log_lines(self, flow_run_id: UUID, lines: Iterable[str], at: datetime) -> None:
        """Show lines of the job on its page."""
        logs = [
            LogCreate(
                name="job", level=20, message=line[:10_000] or " ", timestamp=at, flow_run_id=flow_run_id
            )
            for line in lines
        ]
        if logs:
            await self._client.create_logs(logs)

    @property
    def client(self) -> PrefectClient:
        """The client itself, for the other modules of this package."""
        return self._client


def attempt_named_by(idempotency_key: str | None) -> tuple[str, int]:
    """Job id and attempt of a flow run that `create()` made; an empty job id for any other key."""
    job_id, _, attempt = (idempotency_key or "").rpartition(":")
    return (job_id, int(attempt)) if attempt.isdecimal() else ("", 0)


def _key(job_id: str, attempt: int) -> str:
    return f"{job_id}:{attempt}"


def cached_state(job_id: str) -> State[Any]:
    """What a flow run gets whose job had finished before: no pod was touched."""
    return Completed(
        name="Cached", message=f"Job {job_id} had completed before; its outputs are in the ledger."
    )


def _state(status: str, reason: str | None) -> State[Any]:
    match status:
        case "completed":
            return Completed(message=reason)
        case "failed":
            return Failed(message=reason)
        case "canceled":
            return Cancelled(message=reason or "The job was canceled.")
        case _:
            return Crashed(message=reason)
