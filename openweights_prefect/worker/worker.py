"""The Prefect worker of type `runpod`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import anyio.abc
from prefect.client.schemas.objects import FlowRun
from prefect.workers.base import BaseWorker

from openweights_prefect.errors import ConfigurationError, OpenWeightsError, PermissionDeniedError
from openweights_prefect.ledger.connect import check_organization, connect
from openweights_prefect.ledger.protocol import Ledger
from openweights_prefect.orchestration.flow_runs import FlowRuns
from openweights_prefect.orchestration.pod_events import PodEvents
from openweights_prefect.orchestration.queues import ensure_queues
from openweights_prefect.provisioning.runpod.client import RunPodClient
from openweights_prefect.provisioning.runpod.contract import check_contract
from openweights_prefect.settings import Settings
from openweights_prefect.worker.configuration import (
    RunPodJobConfiguration,
    RunPodVariables,
    RunPodWorkerResult,
)
from openweights_prefect.worker.fleet import Fleet
from openweights_prefect.worker.intake import Intake
from openweights_prefect.worker.observer import Observer
from openweights_prefect.worker.purchases import Purchases

logger = logging.getLogger(__name__)


class RunPodWorker(BaseWorker[RunPodJobConfiguration, RunPodVariables, RunPodWorkerResult]):
    """Gives every flow run of its pool a pod on RunPod, reuses warm pods, and never leaks one.

    Unlike other workers it submits nothing itself: it provides pods, and a pod's agent claims the run.
    `limit` is the most pods alive at once, of all workers together.
    """

    type = "runpod"
    job_configuration = RunPodJobConfiguration
    job_configuration_variables = RunPodVariables
    _description = "Run flows on GPU pods of RunPod; pods are reused while warm, and end when idle."
    _display_name = "RunPod"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self._work_queues:
            raise ConfigurationError(
                f"--work-queue {sorted(self._work_queues)} is not for a worker of type 'runpod': it serves "
                "all queues of its pool, which share the warm pods. Start it without; to hold a queue back, "
                "pause it (`prefect work-queue pause`)."
            )
        self._has_queues = False
        self._intake: Intake | None = None
        self._resources = AsyncExitStack()

    async def start(
        self, run_once: bool = False, with_healthcheck: bool = False, printer: Callable[..., None] = print
    ) -> None:
        """Serve until stopped; `run_once` is refused, since pods must be watched as long as they live."""
        if run_once:
            raise ConfigurationError(
                "A worker of type 'runpod' cannot run once: the pods that it buys need it until they end. "
                "Start it without `--run-once`."
            )
        await super().start(with_healthcheck=with_healthcheck, printer=printer)

    async def setup(self) -> None:
        """Connect to Prefect, the ledger and RunPod, and start the observer."""
        await super().setup()
        settings = Settings.load()
        ledger = connect(settings, role="ow_worker")
        self._resources.callback(ledger.close)
        if settings.api_key:
            settings = await asyncio.to_thread(_settings_of_token, settings, ledger)
        settings = replace(settings, work_pool=self._work_pool_name)
        if self._limit is not None:
            settings = replace(settings, max_workers=min(settings.max_workers, self._limit))
        flow_runs = await self._resources.enter_async_context(FlowRuns.connect(settings))
        events = PodEvents(
            flow_runs.client, work_pool=settings.work_pool, organization_id=settings.organization_id
        )
        self._resources.push_async_callback(events.close)
        provider = RunPodClient(base_url=settings.runpod_api_url, api_key=settings.runpod_api_key)
        purchases = Purchases(provider=provider, ledger=ledger, settings=settings, announce=events.emit)
        fleet = Fleet(
            provider=provider, ledger=ledger, settings=settings, purchases=purchases, announce=events.emit
        )
        observer = Observer(
            ledger=ledger, flow_runs=flow_runs, purchases=purchases, fleet=fleet, settings=settings
        )
        self._intake = Intake(ledger=ledger, flow_runs=flow_runs, settings=settings)
        assert self._runs_task_group is not None
        self._runs_task_group.start_soon(self._check_contract, provider)
        self._runs_task_group.start_soon(observer.run)

    async def _check_contract(self, provider: RunPodClient) -> None:
        """Say at the start what RunPod has changed, rather than when a pod is to be bought or ended."""
        contract = await check_contract(provider)
        for problem in contract.problems:
            self._logger.warning("%s", problem)
        if not contract.problems:
            self._logger.info("RunPod's description of its API agrees with what is sent to it.")

    async def teardown(self, *exc_info: Any) -> None:
        """Stop the observer. Pods and runs go on: the next worker finds them."""
        if self._runs_task_group is not None:
            self._runs_task_group.cancel_scope.cancel()
        await super().teardown(*exc_info)
        await self._resources.aclose()

    async def get_and_submit_flow_runs(self) -> list[FlowRun]:
        """Take note of scheduled flow runs; the observer places them. Nothing is claimed here."""
        if self._intake is None or not self._has_successfully_synced:
            return []
        if not self._has_queues:
            await ensure_queues(self.client, self._work_pool_name)
            self._has_queues = True
        responses = await self._get_scheduled_flow_runs()
        flow_runs = [response.flow_run for response in responses]
        try:
            await self._intake.adopt(flow_runs, self.work_pool.base_job_template)
        except OpenWeightsError as exc:  # the base class would end the worker
            logger.warning("The ledger could not be asked about %d flow runs: %s", len(flow_runs), exc)
            return []
        self._last_polled_time = _now()
        return []

    async def run(
        self,
        flow_run: FlowRun,
        configuration: RunPodJobConfiguration,
        task_status: anyio.abc.TaskStatus[int] | None = None,
    ) -> RunPodWorkerResult:
        """Take up a run that was submitted directly, and return at once: the observer places it."""
        assert self._intake is not None, "the worker is not set up"
        await self._intake.adopt([flow_run], self.work_pool.base_job_template)
        if task_status is not None:
            task_status.started(0)
        return RunPodWorkerResult(identifier=str(flow_run.id), status_code=0)

    async def kill_infrastructure(
        self, infrastructure_pid: str, configuration: RunPodJobConfiguration, grace_seconds: int = 30
    ) -> None:
        """Stop what runs under a flow run's id; its pod lives on for the next run."""
        assert self._intake is not None, "the worker is not set up"
        await self._intake.cancel(infrastructure_pid)


def _settings_of_token(settings: Settings, ledger: Ledger) -> Settings:
    """With the token's organization, which the settings may not know; refuses a token of another role."""
    organization_id = check_organization(settings, ledger)
    role = ledger.call("whoami")[0]["role"]
    if role != "worker":
        raise PermissionDeniedError(
            f"A worker needs a token of the role 'worker', and OPENWEIGHTS_API_KEY is one of the role "
            f"{role!r}. An admin makes one with `ow token create NAME --role worker`."
        )
    return replace(settings, organization_id=organization_id)


def _now() -> Any:
    from prefect.types._datetime import now

    return now("UTC")
