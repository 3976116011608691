"""One run on this pod, from claim to finish."""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.client.schemas.objects import FlowRun

from openweights_prefect.errors import OpenWeightsError
from openweights_prefect.files.store import FileStoreError
from openweights_prefect.jobs.request import JOB_TYPES
from openweights_prefect.ledger.keyring import Keyring
from openweights_prefect.ledger.protocol import Ledger, Row
from openweights_prefect.orchestration.flow_runs import FlowRunGone, FlowRuns
from openweights_prefect.orchestration.progress import RunReport
from openweights_prefect.pod import folder as folders
from openweights_prefect.pod.answers import Answers
from openweights_prefect.pod.ending import Ending
from openweights_prefect.pod.gpu_check import names_gpu_error
from openweights_prefect.pod.library import Library
from openweights_prefect.pod.nursery import Child, Nursery
from openweights_prefect.pod.outage import call_until_answered, upload_until_stored
from openweights_prefect.pod.preloading import Preloading
from openweights_prefect.pod.processes import RunProcesses
from openweights_prefect.pod.redaction import Redaction
from openweights_prefect.pod.secrets import job_secrets
from openweights_prefect.pod.server import Answer, serve
from openweights_prefect.pod.shipping import Shipper, StaleRun
from openweights_prefect.runtime.entrypoint import FOLDER_VARIABLE, RunFolder
from openweights_prefect.runtime.wire import JOB_VARIABLE, RUN_VARIABLE, SOCKET_VARIABLE

logger = logging.getLogger(__name__)

_AFTERLIFE_SECONDS = 20.0


class Execution:
    """Executes one flow run that this pod may open; `cancel()` and `kill()` end it early."""

    def __init__(
        self,
        *,
        run_id: UUID,
        worker_id: str,
        boot: UUID,
        ledger: Ledger,
        library: Library,
        flow_runs: FlowRuns,
        nursery: Nursery,
        keyring: Keyring,
        root: Path,
        cancel_grace_seconds: float = 3.0,
        spared: Collection[int] = (),
        pod_calls: Mapping[str, Answer] | None = None,
        preloading: Preloading | None = None,
    ) -> None:
        self.run_id = run_id
        self._worker_id = worker_id
        self._boot = boot
        self._ledger = ledger
        self._library = library
        self._flow_runs = flow_runs
        self._nursery = nursery
        self._keyring = keyring
        self._folder = RunFolder(root / str(run_id))
        self._sockets = Path(tempfile.mkdtemp(prefix="ow-", dir=folders.short_temporary_folder()))
        self._job: Row = {}
        self._secrets: dict[str, str] = {}
        self._redaction = Redaction([])
        self._child: Child | None = None
        self._cancel_grace_seconds = cancel_grace_seconds
        self._pod_calls = pod_calls or {}
        self._preloading = preloading
        self._processes = RunProcesses(run_id, spared=spared)
        self._ending = Ending(self._processes, abandon=self._abandon)
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._shipper: Shipper | None = None
        self.gpu_suspected = False

    async def execute(self) -> None:
        """Claim, open, run, ship, finish; nothing is raised for a run that was lost or refused.

        Returns when the ledger has the run's end. Its flow may still be telling Prefect: see `settle()`.
        """
        try:
            flow_run = await self._claim()
            if flow_run is None:
                return
            opened = await self._call(
                "open_run", for_run=self.run_id, for_worker=self._worker_id, as_boot=self._boot
            )
            if opened["outcome"] != "opened":
                logger.info("Run %s was not opened: %s", self.run_id, opened["reason"])
                return
            self._job = opened["job"]
            await self._run_opened(flow_run, gpu_count=opened["gpu_count"])
            if self._preloading is not None and self._job["type"] in JOB_TYPES:
                self._preloading.want()
        except StaleRun as exc:
            logger.warning("%s", exc)
        finally:
            self._ending.close()
            if not self._finished:
                self.kill()

    async def settle(self) -> None:
        """Wait a bounded time for the flow's own end, then remove everything of the run."""
        try:
            if self._child is not None and self._finished:
                # A flow that cannot tell Prefect how it ended must not stay; the worker will tell.
                await asyncio.wait([self._child.exit_code], timeout=_AFTERLIFE_SECONDS)
        finally:
            self._abandon()
            await asyncio.to_thread(self._processes.sweep_marked)  # of this run only: another one may go on
            await asyncio.to_thread(shutil.rmtree, self._sockets, True)
            await asyncio.to_thread(folders.remove, self._folder)

    @property
    def _finished(self) -> bool:
        """The ledger has its end."""
        return self._ended.done()

    def cancel(
        self,
        result: str = "canceled",
        why: str = "canceled by the user",
        *,
        grace_seconds: float | None = None,
    ) -> None:
        """Ask the run to end: SIGTERM to the entrypoint, SIGKILL after a grace to all that it started.

        Repeated calls change nothing, unless they leave less time.
        """
        if not self._finished:
            grace = self._cancel_grace_seconds if grace_seconds is None else grace_seconds
            self._ending.begin(result, why, grace_seconds=grace)

    def kill(self) -> None:
        """End everything of the run at once, without a word to anybody."""
        self._abandon()
        self._ending.kill()

    def _abandon(self) -> None:
        if self._child is not None and not self._child.exit_code.done():
            self._child.kill()

    async def _claim(self) -> FlowRun | None:
        try:
            return await self._flow_runs.claim(self.run_id, owner=self._worker_id)
        except FlowRunGone:
            await self._call("abandon_run", for_run=self.run_id, why="its flow run was deleted from Prefect")
            return None

    async def _run_opened(self, flow_run: FlowRun, *, gpu_count: int) -> None:
        report = RunReport(self._flow_runs, self.run_id, str(self._job["id"]))
        refusal = await self._fetch_secrets()
        self._shipper = Shipper(
            ledger=self._ledger,
            folder=self._folder,
            run_id=self.run_id,
            boot=self._boot,
            observer=report.observe,
            redaction=self._redaction,
        )
        if refusal is not None:
            await self._finish("failed", refusal)
            return
        job_socket = self._sockets / "job.sock"
        try:
            await asyncio.to_thread(
                folders.prepare, self._folder, self._job, job_socket=job_socket, fetch=self._library.fetch
            )
            (self._sockets / "tmp").symlink_to(self._folder.temporary)
        except (OpenWeightsError, OSError) as exc:
            await self._finish("failed", f"The run's files could not be prepared: {exc}")
            return
        answers = self._answers(self._shipper)
        job_server = await serve(job_socket, answers.for_job())
        flow_server = await serve(self._sockets / "flow.sock", answers.for_flow())
        timeout = self._start_timeout()
        shipping = asyncio.create_task(self._shipper.run())
        try:
            await self._run_child(flow_run, gpu_count, shipping)
        finally:
            shipping.cancel()
            if timeout is not None:
                timeout.cancel()
            job_server.close()
            flow_server.close()
            await report.close(self._job.get("outputs"))

    def _answers(self, shipper: Shipper) -> Answers:
        return Answers(
            job=self._job,
            folder=self._folder,
            library=self._library,
            ledger=self._ledger,
            shipper=shipper,
            ending=self._ending,
            finish=self._finish,
            secrets=self._secrets,
            redaction=self._redaction,
            of_the_pod=self._pod_calls,
        )

    async def _fetch_secrets(self) -> str | None:
        """Get what the job names; returns why the run cannot be, or None."""
        try:
            self._secrets = await job_secrets(
                self._ledger, self._keyring, self._job, run_id=self.run_id, boot=self._boot
            )
        except OpenWeightsError as exc:
            return f"The run's secrets could not be fetched: {exc}"
        self._redaction = Redaction(self._secrets.values())
        return None

    async def _run_child(self, flow_run: FlowRun, gpu_count: int, shipping: asyncio.Task[None]) -> None:
        self._child = await self._nursery.fork(
            flow_run,
            flow=_flow_of(self._job),
            environment={
                FOLDER_VARIABLE: str(self._folder.path),
                RUN_VARIABLE: str(self.run_id),
                JOB_VARIABLE: str(self._job["id"]),
                SOCKET_VARIABLE: str(self._sockets / "flow.sock"),
                "N_GPUS": str(gpu_count),
                **self._preloaded(),
            },
            output=self._folder.log,
        )
        exited = self._child.exit_code
        either: list[asyncio.Future[Any]] = [exited, self._ended, shipping]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if shipping.done() and not (exited.done() or self._finished):
            await shipping  # raises what stopped it: the run is not ours any more
        if not self._finished:
            code = await exited
        if not self._finished:
            await self._finish_for_child(code)

    def _preloaded(self) -> dict[str, str]:
        """How the flow of a job of ours reaches the preloaded process; others are not told."""
        if self._preloading is None or self._job["type"] not in JOB_TYPES:
            return {}
        return self._preloading.variables()

    async def _finish_for_child(self, code: int) -> None:
        """The flow process ended without having finished the run."""
        # What the entrypoint started may live on, and must not when the run is given away.
        await asyncio.to_thread(self._processes.sweep)
        if self._ending.intent is not None:
            await self._finish(*self._ending.intent)
        elif self._job.get("entrypoint") is None:
            result, why = await self._flow_runs.outcome(self.run_id)
            await self._finish(result, why)
        else:
            await self._finish("lost", f"the flow process ended with exit code {code} before the job did")

    async def _finish(self, result: str, why: str | None, outputs: dict[str, Any] | None = None) -> Row:
        assert self._shipper is not None
        await self._shipper.drain(last=True)
        if result == "failed":
            self.gpu_suspected = await asyncio.to_thread(names_gpu_error, self._folder.log)
        log_file = await self._upload_log()
        answer = await self._call(
            "finish_run",
            for_run=self.run_id,
            as_boot=self._boot,
            result=result,
            why=None if why is None else self._redaction.text(why),
            log_file_id=log_file,
            result_outputs=self._redaction.data(outputs),
        )
        if answer["outcome"] != "finished":
            raise StaleRun(f"Run {self.run_id} was finished by somebody else: {answer}")
        if not self._finished:
            self._ended.set_result(None)
        self._job = answer["job"]
        return self._job

    async def _upload_log(self) -> str | None:
        if not self._folder.log.exists() or self._folder.log.stat().st_size == 0:
            return None
        path = self._folder.log
        if self._redaction:
            path = self._folder.path / "log.redacted"
            await asyncio.to_thread(self._redaction.copy, self._folder.log, path)
        try:
            row = await upload_until_stored(
                self._library, str(path), purpose="log", name=f"{self.run_id}.log"
            )
        except FileStoreError as exc:
            logger.error("The log of run %s is in the ledger alone: %s", self.run_id, exc)
            return None
        return str(row["id"])

    def _start_timeout(self) -> asyncio.TimerHandle | None:
        seconds = self._job.get("timeout_seconds")
        if not seconds:
            return None
        why = f"The job ran longer than its timeout of {seconds} s."
        return asyncio.get_running_loop().call_later(float(seconds), self.cancel, "failed", why)

    async def _call(self, function: str, **arguments: Any) -> Row:
        return await call_until_answered(self._ledger, function, **arguments)


def _flow_of(job: Row) -> str | None:
    """The preloaded flow of the job's type; None for a flow of the user's own."""
    if job.get("entrypoint") is None:
        return None
    return str(job["type"]) if job["type"] in JOB_TYPES else "custom_job"
