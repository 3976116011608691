"""Takes up flow runs that somebody else created: a schedule, a form, another flow, the Retry button."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any
from uuid import UUID

import httpx
from prefect.client.schemas.objects import FlowRun, State
from prefect.exceptions import ObjectNotFound
from prefect.states import Failed

from openweights_prefect.errors import InvalidParameterError, OpenWeightsError
from openweights_prefect.jobs.models import JobModel, model_of_job
from openweights_prefect.jobs.secrets import unknown_secrets
from openweights_prefect.ledger.protocol import Ledger, Row, ask, ask_one
from openweights_prefect.orchestration.flow_runs import FlowRuns, attempt_named_by, cached_state
from openweights_prefect.settings import Settings
from openweights_prefect.worker.adoption import job_of_flow_run, model_job_of
from openweights_prefect.worker.configuration import job_variables_of

logger = logging.getLogger(__name__)

_EXPECTED = (OpenWeightsError, httpx.HTTPError, ObjectNotFound, OSError)


class Intake:
    """Makes jobs of scheduled flow runs, or answers them at once."""

    def __init__(self, *, ledger: Ledger, flow_runs: FlowRuns, settings: Settings) -> None:
        self._ledger = ledger
        self._flow_runs = flow_runs
        self._settings = settings

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
            job_model = await self._job_model(deployment, flow_run.parameters)
            job = job_of_flow_run(
                flow_run.id, deployment, flow_run.parameters, variables, self._settings, job_model=job_model
            )
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

    async def _job_model(self, deployment: str | None, parameters: dict[str, Any]) -> JobModel | None:
        job_id = model_job_of(deployment, parameters)
        return None if job_id is None else await asyncio.to_thread(model_of_job, self._ledger, job_id)


def _missing_state(missing: Sequence[str]) -> State[Any]:
    return Failed(message=f"These files are not in the organization: {', '.join(missing)}")
