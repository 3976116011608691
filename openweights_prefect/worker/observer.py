"""The worker's loop: creates flow runs for jobs, places waiting runs on pods, and makes both sides agree.

Stateless: everything it knows it reads in each pass, so a killed worker is replaced by starting another,
and several may run at once. It claims nothing: pods do.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine, Mapping, Sequence, Set
from typing import Any
from uuid import UUID

import httpx
from prefect.exceptions import ObjectNotFound

from openweights_prefect.errors import OpenWeightsError
from openweights_prefect.ledger.notifications import notifications
from openweights_prefect.ledger.protocol import Ledger, Row, ask, ask_one
from openweights_prefect.orchestration.flow_runs import FlowRuns
from openweights_prefect.orchestration.queues import PoolState
from openweights_prefect.provisioning.placement import Plan, Pod, WaitingRun, place
from openweights_prefect.settings import Settings
from openweights_prefect.types.hardware import Needs
from openweights_prefect.worker.adoption import deployment_of, parameters_of, variables_of
from openweights_prefect.worker.fleet import Fleet
from openweights_prefect.worker.purchases import Purchases

logger = logging.getLogger(__name__)

_SECOND_LOOK_SECONDS = 0.2
_PASS_SECONDS = 2.0
_AGREE_SECONDS = 1.5
_RECONCILE_SECONDS = 5.0
_PUBLISH_SECONDS = 60.0
_POOL_SECONDS = 10.0
_SNAPSHOT_SECONDS = 1.0
_SILENT_HEARTBEATS = 2
_MOST_RELEASED = 180
_RETRY_SECONDS = 10.0
_EXPIRE_SECONDS = 3600.0
_EXPIRE_ROWS = 10_000
_CREATES_AT_ONCE = 4
_EXPECTED = (OpenWeightsError, httpx.HTTPError, ObjectNotFound, OSError)


class Observer:
    """One organization's control loop."""

    def __init__(
        self,
        *,
        ledger: Ledger,
        flow_runs: FlowRuns,
        purchases: Purchases,
        fleet: Fleet,
        settings: Settings,
    ) -> None:
        self._ledger = ledger
        self._flow_runs = flow_runs
        self._purchases = purchases
        self._fleet = fleet
        self._settings = settings
        self._pool = PoolState(paused=False, paused_queues=frozenset(), concurrency_limit=None)
        self._snapshot: Row = {}
        self._snapshot_at = float("-inf")
        self._silent_since: dict[str, float] = {}
        self._wake = asyncio.Event()
        self._creates = asyncio.Semaphore(_CREATES_AT_ONCE)
        self._buying: dict[str, asyncio.Task[None]] = {}
        self._not_before: dict[str, float] = {}
        self._warned = ""

    async def run(self) -> None:
        """Loop until canceled; an error of one pass is logged, and the next one tries again."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._listen())
            group.create_task(self._loop("placement", self.place_once, _PASS_SECONDS, self._wake))
            group.create_task(self._loop("agreement with Prefect", self.agree_once, _AGREE_SECONDS, None))
            group.create_task(self._loop("reconciliation", self.reconcile_once, _RECONCILE_SECONDS, None))
            group.create_task(self._loop("catalogue", self.publish_once, _PUBLISH_SECONDS, None))
            group.create_task(self._loop("look at the pool", self.look_at_pool_once, _POOL_SECONDS, None))
            group.create_task(self._loop("retention", self.expire_once, _EXPIRE_SECONDS, None))

    async def place_once(self) -> None:
        """One pass: flow runs for jobs without one, hints, purchases, reasons."""
        # Before the snapshot: a pod that is bought while it is read is not in it.
        buying = {*self._buying}
        snapshot = await self._look(max_age_seconds=0)
        rows = snapshot["waiting"]
        self._purchases.learn(snapshot["refusals"])
        waiting = {row["job_id"] for row in rows}
        self._not_before = {job: at for job, at in self._not_before.items() if job in waiting}
        ceilings = self._ceilings(rows, snapshot)
        room = max(0, _MOST_RELEASED - snapshot["released"])
        await self._create_flow_runs([row for row in rows if row["run_id"] is None][:room], ceilings)
        buying |= {*self._buying}
        held = await self._held_back(rows, snapshot["pods"])
        await self._set_ceilings(rows, {**ceilings, **dict.fromkeys(held, 0.0)})
        plan = place(
            [WaitingRun.from_row(row) for row in rows if row["job_id"] not in {*buying, *held}],
            [Pod.from_row(row) for row in snapshot["pods"]],
            fitting=snapshot["fitting"],
            being_bought=self._purchases.under_way,
            max_workers=self._settings.max_workers,
            paused=self._purchases.paused,
            later={job for job, at in self._not_before.items() if at > _now()},
        )
        plan.reasons.update(held)
        await self._carry_out(plan, {row["job_id"]: row["pending_reason"] for row in rows})

    def _ceilings(self, rows: Sequence[Row], snapshot: Row) -> dict[str, float | None]:
        """By job: what a warm pod may cost to be worth taking; one that was bought for them is worth it."""
        waiting = {row["job_id"] for row in rows}
        bought = {
            pod["id"]: float(pod["price_per_hour"])
            for pod in snapshot["pods"]
            if pod["status"] == "starting" or pod["bought_for"] in waiting
        }
        known: dict[str, float | None] = {}
        for row in rows:
            kind = row["needs_class"]
            if kind not in known:
                ceiling = self._purchases.ceiling(Needs.from_row(row))
                prices = [bought[pod] for pod in snapshot["fitting"].get(kind, ()) if pod in bought]
                known[kind] = None if ceiling is None else max([ceiling, *prices])
        return {row["job_id"]: 0.0 if self._pool.paused else known[row["needs_class"]] for row in rows}

    async def _set_ceilings(self, rows: Sequence[Row], ceilings: Mapping[str, float | None]) -> None:
        """Tell the ledger too, because pods look for work themselves; a ceiling of 0 holds a run back."""
        changed = {}
        for row in rows:
            if row["run_id"] is not None and row["ceiling_per_hour"] != ceilings[row["job_id"]]:
                row["ceiling_per_hour"] = changed[row["run_id"]] = ceilings[row["job_id"]]
        if changed:
            await ask(self._ledger, "set_ceilings", ceilings=changed)

    async def look_at_pool_once(self) -> None:
        """One pass: whether somebody paused the pool or a queue of it, and its limit."""
        self._pool = await self._flow_runs.pool_state(self._settings.work_pool)

    async def _held_back(self, rows: Sequence[Row], pods: Sequence[Row]) -> dict[str, str]:
        """Jobs that may not start as the pool is, and why."""
        jobs = {UUID(row["run_id"]): row["job_id"] for row in rows if row["run_id"]}
        held = {jobs[run]: why for run, why in (await self._flow_runs.held_back(self._pool, [*jobs])).items()}
        if self._pool.concurrency_limit is not None:
            room = max(0, self._pool.concurrency_limit - sum(pod["run_id"] is not None for pod in pods))
            why = f"the work pool's concurrency limit of {self._pool.concurrency_limit} is reached"
            free = [row["job_id"] for row in rows if row["job_id"] not in held]
            held |= dict.fromkeys(free[room:], why)
        return held

    async def agree_once(self) -> None:
        """One pass: what somebody canceled or ended in Prefect, and Prefect's view of what ended."""
        snapshot = await self._look()
        jobs = {UUID(row["run_id"]): row["job_id"] for row in snapshot["waiting"] if row["run_id"]}
        running = [UUID(pod["run_id"]) for pod in snapshot["pods"] if pod["run_id"]]
        for row in await ask(self._ledger, "known_runs", flow_runs=running):
            jobs[UUID(row["run_id"])] = row["job_id"]
        ends = await self._flow_runs.ends_among([*jobs])
        for flow_run_id in ends.canceled:
            await ask_one(self._ledger, "cancel_job", job_id=jobs[flow_run_id])
        if ended := {*ends.ended}.intersection(running):
            await self._undo_foreign_ends(ended)
        await self._mirror(snapshot["unmirrored"])

    async def _undo_foreign_ends(self, ended: Set[UUID]) -> None:
        """Somebody ended a flow run in Prefect that runs: the ledger is right."""
        pods = (await self._look(max_age_seconds=0))["pods"]
        alive = {UUID(pod["run_id"]) for pod in pods if pod["run_id"] and pod["silent_seconds"] <= 0}
        for flow_run_id in alive & ended:
            await self._flow_runs.restore(flow_run_id)

    async def reconcile_once(self) -> None:
        """One pass: silent pods and scripts, and the provider's list."""
        await ask(self._ledger, "expire_scripts")
        snapshot = await self._look()
        pods = [Pod.from_row(row) for row in snapshot["pods"]]
        if silent := self._silent_for_a_while(pods):
            await ask(self._ledger, "expire_leases", silent=silent)
            pods = [Pod.from_row(row) for row in (await self._look(max_age_seconds=0))["pods"]]
        await self._fleet.reconcile(pods)

    async def publish_once(self) -> None:
        """One pass: what can be bought, and under which limits, for those who ask why they wait."""
        await self._purchases.publish(
            {
                "max_workers": self._settings.max_workers,
                "idle_seconds": self._settings.pod_idle_seconds,
                "pod_ttl_hours": self._settings.pod_ttl_hours,
                "paused": self._purchases.paused,
            }
        )

    def _silent_for_a_while(self, pods: Sequence[Pod]) -> list[str]:
        """Pods that were silent in each look of the last seconds, by a clock that nobody sets.

        After an outage of the ledger, a pause of this process or a jump of the ledger's clock every lease has
        run out, and the pods only need a moment to renew them.
        """
        now = _now()
        patience = _SILENT_HEARTBEATS * self._settings.heartbeat_seconds
        self._silent_since = {
            pod.id: self._silent_since.get(pod.id, now)
            for pod in pods
            if pod.silent_seconds is not None and pod.silent_seconds > 0
        }
        return [pod for pod, since in self._silent_since.items() if now - since >= patience]

    async def _look(self, *, max_age_seconds: float = _SNAPSHOT_SECONDS) -> Row:
        """The ledger's snapshot; the passes that can do with a slightly older one share it."""
        if _now() - self._snapshot_at > max_age_seconds or not self._snapshot:
            asked_at = _now()
            self._snapshot = await ask_one(self._ledger, "control_snapshot")
            self._snapshot_at = asked_at
        return self._snapshot

    async def expire_once(self) -> None:
        """One pass: events older than the retention of the settings, a batch at a time."""
        days = self._settings.event_retention_days
        while days > 0:
            answer = await ask_one(self._ledger, "expire_events", older_than_days=days, max_rows=_EXPIRE_ROWS)
            if answer["deleted"] < _EXPIRE_ROWS:
                return

    async def _create_flow_runs(self, rows: list[Row], ceilings: Mapping[str, float | None]) -> None:
        """Create the flow runs of the outbox and fill in their ids."""

        async def create(row: Row) -> None:
            async with self._creates:
                if row["type"] == "flow":
                    return  # its flow run existed before; a lost one is not run again by us
                flow_run_id = await self._flow_runs.create(
                    deployment_of(row["type"]),
                    job_id=row["job_id"],
                    attempt=row["attempt"],
                    tags=[row["job_id"], row["type"]],
                    parameters=parameters_of(row["type"], row["params"], row["mounts"], row["entrypoint"]),
                    variables=variables_of(row, self._settings),
                )
                answer = await ask_one(
                    self._ledger,
                    "record_flow_run",
                    for_job=row["job_id"],
                    for_attempt=row["attempt"],
                    flow_run=flow_run_id,
                    ceiling=ceilings[row["job_id"]],
                )
                if answer["outcome"] == "recorded":
                    row["run_id"] = str(flow_run_id)
                    row["ceiling_per_hour"] = ceilings[row["job_id"]]

        await asyncio.gather(*map(create, rows))

    async def _carry_out(self, plan: Plan, shown_reasons: dict[str, str | None]) -> None:
        if plan.hints:
            await ask(self._ledger, "hint_runs", hints=plan.hints)
        for worker_id in plan.retire:
            logger.info("Pod %s is idle, fits nothing that waits, and makes room.", worker_id)
            await ask(self._ledger, "request_shutdown", for_worker=worker_id)
        for run in plan.purchases:
            self._buying[run.job_id] = asyncio.create_task(self._buy(run))
        reasons = {job: why for job, why in plan.reasons.items() if shown_reasons.get(job) != why}
        if reasons:
            await ask_one(self._ledger, "set_pending_reasons", reasons=reasons)

    async def _buy(self, run: WaitingRun) -> None:
        try:
            why = await self._purchases.buy(run)
            self._not_before.pop(run.job_id, None)
            if why is not None:
                self._not_before[run.job_id] = _now() + _RETRY_SECONDS
                await ask(self._ledger, "set_pending_reasons", reasons={run.job_id: why})
        except OpenWeightsError:
            logger.exception("No pod could be bought for job %s", run.job_id)
        finally:
            self._buying.pop(run.job_id, None)

    async def _mirror(self, rows: Sequence[Row]) -> None:
        for row in rows:
            await self._flow_runs.mirror(UUID(row["run_id"]), status=row["status"], reason=row["error"])
        if rows:
            await ask_one(self._ledger, "mark_mirrored", run_ids=[UUID(row["run_id"]) for row in rows])

    async def _listen(self) -> None:
        async for _ in notifications(self._settings.database_url, "ow_control"):
            self._wake.set()
            # Of changes at the same moment only one notifies, and it may be seen before the others.
            asyncio.get_running_loop().call_later(_SECOND_LOOK_SECONDS, self._wake.set)

    async def _loop(self, name: str, once: Any, seconds: float, wake: asyncio.Event | None) -> None:
        while True:
            if wake is not None:
                wake.clear()
            started = _now()
            try:
                await once()
                self._warned = ""
            except _EXPECTED as exc:
                if self._warned != (text := f"{name}: {exc}"):
                    self._warned = text
                    logger.warning("The %s is delayed: %s: %s", name, type(exc).__name__, exc)
                await asyncio.sleep(1.0)
            except Exception:
                # The edge of the loop: a pass that fails must not end the others.
                logger.exception("The %s failed", name)
                await asyncio.sleep(1.0)
            await _sleep_until(started + seconds, wake)


async def _sleep_until(at: float, wake: asyncio.Event | None) -> None:
    remaining = max(0.0, at - _now())
    work: Coroutine[Any, Any, Any] = asyncio.sleep(remaining) if wake is None else wake.wait()
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(work, timeout=remaining if wake is not None else None)


def _now() -> float:
    return asyncio.get_running_loop().time()
