"""The worker's loop: creates flow runs for jobs, places waiting runs on pods, and makes both sides agree.

Stateless: everything it knows it reads in each pass, so a killed worker is replaced by starting another,
and several may run at once. It claims nothing: pods do.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine, Sequence
from typing import Any
from uuid import UUID

import httpx
from prefect.client.schemas.objects import FlowRun, State
from prefect.exceptions import ObjectNotFound
from prefect.states import Failed

from openweights_prefect.errors import InvalidParameterError, OpenWeightsError
from openweights_prefect.jobs.secrets import unknown_secrets
from openweights_prefect.ledger.notifications import notifications
from openweights_prefect.ledger.protocol import Ledger, Row, ask, ask_one
from openweights_prefect.orchestration.flow_runs import FlowRuns, attempt_named_by, cached_state
from openweights_prefect.provisioning.placement import Plan, Pod, WaitingRun, place
from openweights_prefect.settings import Settings
from openweights_prefect.types.hardware import Needs
from openweights_prefect.worker.adoption import deployment_of, job_of_flow_run, parameters_of, variables_of
from openweights_prefect.worker.configuration import job_variables_of
from openweights_prefect.worker.fleet import Fleet
from openweights_prefect.worker.purchases import Purchases

logger = logging.getLogger(__name__)

_SECOND_LOOK_SECONDS = 0.2
_PASS_SECONDS = 2.0
_AGREE_SECONDS = 1.5
_RECONCILE_SECONDS = 5.0
_PUBLISH_SECONDS = 60.0
_SNAPSHOT_SECONDS = 1.0
_SILENT_HEARTBEATS = 2
_MOST_RELEASED = 180
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
        self._snapshot: Row = {}
        self._snapshot_at = float("-inf")
        self._silent_since: dict[str, float] = {}
        self._wake = asyncio.Event()
        self._creates = asyncio.Semaphore(_CREATES_AT_ONCE)
        self._buying: dict[str, asyncio.Task[None]] = {}
        self._warned = ""

    async def run(self) -> None:
        """Loop until canceled; an error of one pass is logged, and the next one tries again."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._listen())
            group.create_task(self._loop("placement", self.place_once, _PASS_SECONDS, self._wake))
            group.create_task(self._loop("agreement with Prefect", self.agree_once, _AGREE_SECONDS, None))
            group.create_task(self._loop("reconciliation", self.reconcile_once, _RECONCILE_SECONDS, None))
            group.create_task(self._loop("catalogue", self.publish_once, _PUBLISH_SECONDS, None))
            group.create_task(self._loop("retention", self.expire_once, _EXPIRE_SECONDS, None))

    async def place_once(self) -> None:
        """One pass: flow runs for jobs without one, hints, purchases, reasons."""
        # Before the snapshot: a pod that is bought while it is read is not in it.
        buying = {*self._buying}
        snapshot = await self._look(max_age_seconds=0)
        rows = snapshot["waiting"]
        self._purchases.learn(snapshot["refusals"])
        await self._set_ceilings(rows)
        room = max(0, _MOST_RELEASED - snapshot["released"])
        await self._create_flow_runs([row for row in rows if row["run_id"] is None][:room])
        buying |= {*self._buying}
        plan = place(
            [WaitingRun.from_row(row) for row in rows if row["job_id"] not in buying],
            [Pod.from_row(row) for row in snapshot["pods"]],
            fitting=snapshot["fitting"],
            being_bought=self._purchases.under_way,
            max_workers=self._settings.max_workers,
            paused=self._purchases.paused,
        )
        await self._carry_out(plan, {row["job_id"]: row["pending_reason"] for row in rows})

    async def _set_ceilings(self, rows: Sequence[Row]) -> None:
        """Say which warm pods are worth taking, because pods look for work themselves, too."""
        known: dict[str, float | None] = {}
        changed: dict[str, float | None] = {}
        for row in rows:
            if row["needs_class"] not in known:
                known[row["needs_class"]] = self._purchases.ceiling(Needs.from_row(row))
            ceiling = known[row["needs_class"]]
            if row["run_id"] is not None and row["ceiling_per_hour"] != ceiling:
                changed[row["run_id"]] = ceiling
            row["ceiling_per_hour"] = ceiling
        if changed:
            await ask(self._ledger, "set_ceilings", ceilings=changed)

    async def agree_once(self) -> None:
        """One pass: canceled flow runs, and Prefect's view of what ended."""
        snapshot = await self._look()
        await self._heed_cancellations(snapshot)
        await self._mirror(snapshot["unmirrored"])

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

    async def adopt(self, flow_runs: Sequence[FlowRun], base_template: dict[str, Any]) -> None:
        """Take up scheduled flow runs that the ledger does not know; the next poll tries again what fails."""
        known = await ask(self._ledger, "known_runs", flow_runs=[run.id for run in flow_runs])
        runs = {row["run_id"]: row for row in known}
        for flow_run in flow_runs:
            run = runs.get(str(flow_run.id))
            try:
                if run is not None:
                    await self._answer_retry(flow_run, run)
                elif not await self._adopt_own(flow_run):
                    await self._adopt(flow_run, base_template)
            except _EXPECTED as exc:
                logger.warning(
                    "Flow run %s is not taken up yet: %s: %s", flow_run.id, type(exc).__name__, exc
                )

    async def cancel(self, flow_run_id: str) -> None:
        """Cancel the job of a flow run; silent when there is none or it has ended."""
        for row in await ask(self._ledger, "known_runs", flow_runs=[UUID(flow_run_id)]):
            await ask_one(self._ledger, "cancel_job", job_id=row["job_id"])

    async def _answer_retry(self, flow_run: FlowRun, run: Row) -> None:
        """Somebody pressed Retry on a flow run that had ended: an attempt never runs twice, its job may."""
        if not run["mirrored"]:
            return  # it waits for its pod, or Prefect does not show its end yet
        answer = await ask_one(self._ledger, "restart_job", job_id=run["job_id"])
        if answer["outcome"] == "missing_files":
            await self._flow_runs.answer(flow_run.id, _missing_state(answer["missing"]))
        elif answer["job"]["status"] == "completed":
            await self._flow_runs.answer(flow_run.id, cached_state(run["job_id"]))
        else:
            status = answer["job"]["status"]
            reason = (
                f"An attempt never runs twice. Job {run['job_id']} is {status}; start its deployment anew."
            )
            if answer["outcome"] == "reset":
                reason = f"An attempt never runs twice: job {run['job_id']} goes on in another flow run."
            await self._flow_runs.mirror(flow_run.id, status="canceled", reason=reason)

    async def _adopt_own(self, flow_run: FlowRun) -> bool:
        """A flow run of the outbox whose row could not be written: its key says which attempt it is."""
        job_id, attempt = attempt_named_by(flow_run.idempotency_key)
        if not job_id or not await ask(self._ledger, "get_job", job_id=job_id):
            return False
        answer = await ask_one(
            self._ledger, "record_flow_run", for_job=job_id, for_attempt=attempt, flow_run=flow_run.id
        )
        if answer["outcome"] == "stale":
            await self._flow_runs.mirror(flow_run.id, status="canceled", reason="It is not wanted any more.")
        return True

    async def _adopt(self, flow_run: FlowRun, base_template: dict[str, Any]) -> None:
        deployment, own = await self._flow_runs.deployment_of(flow_run)
        variables = job_variables_of({**own, **(flow_run.job_variables or {})}, base_template)
        try:
            job = job_of_flow_run(flow_run.id, deployment, flow_run.parameters, variables, self._settings)
        except InvalidParameterError as exc:
            await self._flow_runs.answer(flow_run.id, Failed(message=str(exc)))
            return
        created = flow_run.created.isoformat() if flow_run.created else None
        answer = await ask_one(self._ledger, "adopt_flow_run", job=job, flow_run=flow_run.id, created=created)
        match answer["outcome"]:
            case "completed":
                await self._flow_runs.answer(flow_run.id, cached_state(job["id"]))
            case "missing_files":
                await self._flow_runs.answer(flow_run.id, _missing_state(answer["missing"]))
            case "missing_secrets":
                reason = str(unknown_secrets(answer["missing"]))
                await self._flow_runs.answer(flow_run.id, Failed(message=reason))
            case "limit":
                reason = "The token of the worker has used up its spending limit; an admin raises it."
                await self._flow_runs.answer(flow_run.id, Failed(message=reason))
            case "failed" | "canceled" as status:
                await self._flow_runs.mirror(flow_run.id, status=status, reason=answer["job"]["error"])
            case outcome:
                logger.info("Flow run %s is %s as job %s", flow_run.id, outcome, job["id"])

    async def _create_flow_runs(self, rows: list[Row]) -> None:
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
                    ceiling=row["ceiling_per_hour"],
                )
                if answer["outcome"] == "recorded":
                    row["run_id"] = str(flow_run_id)

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
            if why is not None:
                await ask_one(self._ledger, "set_pending_reasons", reasons={run.job_id: why})
                await asyncio.sleep(_PASS_SECONDS)
        except OpenWeightsError:
            logger.exception("No pod could be bought for job %s", run.job_id)
        finally:
            self._buying.pop(run.job_id, None)
            self._wake.set()

    async def _heed_cancellations(self, snapshot: Row) -> None:
        """Somebody canceled a flow run in Prefect: cancel its job."""
        jobs = {UUID(row["run_id"]): row["job_id"] for row in snapshot["waiting"] if row["run_id"]}
        running = [UUID(pod["run_id"]) for pod in snapshot["pods"] if pod["run_id"]]
        for row in await ask(self._ledger, "known_runs", flow_runs=running):
            jobs[UUID(row["run_id"])] = row["job_id"]
        for flow_run_id in await self._flow_runs.canceled_among(list(jobs)):
            await ask_one(self._ledger, "cancel_job", job_id=jobs[flow_run_id])

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


def _missing_state(missing: Sequence[str]) -> State[Any]:
    return Failed(message=f"These files are not in the organization: {', '.join(missing)}")


async def _sleep_until(at: float, wake: asyncio.Event | None) -> None:
    remaining = max(0.0, at - _now())
    work: Coroutine[Any, Any, Any] = asyncio.sleep(remaining) if wake is None else wake.wait()
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(work, timeout=remaining if wake is not None else None)


def _now() -> float:
    return asyncio.get_running_loop().time()
