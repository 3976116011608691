"""One run on this pod, from claim to finish."""

from __future__ import annotations

import asyncio
import base64
import logging
import os
import shutil
import signal
import tempfile
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.client.schemas.objects import FlowRun

from openweights_prefect.errors import InvalidParameterError, OpenWeightsError
from openweights_prefect.ledger.keyring import Keyring
from openweights_prefect.ledger.protocol import Ledger, Row
from openweights_prefect.orchestration.flow_runs import FlowRunGone, FlowRuns
from openweights_prefect.orchestration.progress import RunReport
from openweights_prefect.pod import folder as folders
from openweights_prefect.pod.library import Library
from openweights_prefect.pod.nursery import Child, Nursery
from openweights_prefect.pod.outage import call_until_answered
from openweights_prefect.pod.redaction import Redaction
from openweights_prefect.pod.secrets import job_secrets
from openweights_prefect.pod.server import Answer, serve
from openweights_prefect.pod.shipping import Shipper, StaleRun
from openweights_prefect.runtime.entrypoint import FOLDER_VARIABLE, RunFolder
from openweights_prefect.runtime.wire import JOB_VARIABLE, RUN_VARIABLE, SOCKET_VARIABLE

logger = logging.getLogger(__name__)

_GRACE_SECONDS = 3.0
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
        self._sockets = Path(tempfile.mkdtemp(prefix="ow-", dir=_short_temporary_folder()))
        self._job: Row = {}
        self._secrets: dict[str, str] = {}
        self._redaction = Redaction([])
        self._child: Child | None = None
        self._entrypoint_pid: int | None = None
        self._intent: tuple[str, str] | None = None  # how it was told to end, and why
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._shipper: Shipper | None = None
        self._background: set[asyncio.Task[None]] = set()

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
        except StaleRun as exc:
            logger.warning("%s", exc)
        finally:
            if not self._finished:
                self.kill()

    async def settle(self) -> None:
        """Wait a bounded time for the flow's own end, then remove everything of the run."""
        try:
            if self._child is not None and self._finished:
                # A flow that cannot tell Prefect how it ended must not stay; the worker will tell.
                await asyncio.wait([self._child.exit_code], timeout=_AFTERLIFE_SECONDS)
        finally:
            self.kill()
            await asyncio.to_thread(shutil.rmtree, self._sockets, True)
            await asyncio.to_thread(folders.remove, self._folder)

    @property
    def _finished(self) -> bool:
        """The ledger has its end."""
        return self._ended.done()

    def cancel(self, result: str = "canceled", why: str = "canceled by the user") -> None:
        """Ask the run to end: SIGTERM to the entrypoint, SIGKILL after a grace. Repeated calls do nothing."""
        if self._intent is None and not self._finished:
            self._intent = (result, why)
            self._background.add(asyncio.create_task(self._end_entrypoint()))

    def kill(self) -> None:
        """End everything of the run at once, without a word to anybody."""
        if self._child is not None and not self._child.exit_code.done():
            self._child.kill()
        self._signal_entrypoint(signal.SIGKILL)

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
        except (OpenWeightsError, OSError) as exc:
            await self._finish("failed", f"The run's files could not be prepared: {exc}")
            return
        job_server = await serve(job_socket, self._job_calls())
        flow_server = await serve(self._sockets / "flow.sock", {**self._job_calls(), **self._flow_calls()})
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

    async def _finish_for_child(self, code: int) -> None:
        """The flow process ended without having finished the run."""
        self.kill()  # what the entrypoint started may live on, and must not when the run is given away
        if self._intent is not None:
            await self._finish(*self._intent)
        elif self._job.get("entrypoint") is None:
            result, why = await self._flow_runs.outcome(self.run_id)
            await self._finish(result, why)
        else:
            await self._finish("lost", f"the flow process ended with exit code {code} before the job did")

    async def _finish(self, result: str, why: str | None, outputs: dict[str, Any] | None = None) -> Row:
        assert self._shipper is not None
        await self._shipper.drain(last=True)
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
        row = await asyncio.to_thread(
            self._library.upload, str(path), purpose="log", name=f"{self.run_id}.log"
        )
        return str(row["id"])

    # What a job may ask -------------------------------------------------------------------------

    def _job_calls(self) -> dict[str, Answer]:
        return {
            "flush": self._on_flush,
            "upload": self._on_upload,
            "fetch": self._on_fetch,
            "get_file": self._on_get_file,
            "events": self._on_events,
        }

    def _flow_calls(self) -> dict[str, Answer]:
        return {
            "started": self._on_started,
            "secrets": self._on_secrets,
            "collect": self._on_collect,
            "finish": self._on_finish,
            "read_result": self._on_read_result,
            "write_result": self._on_write_result,
        }

    async def _on_flush(self) -> dict[str, Any]:
        assert self._shipper is not None
        await self._shipper.drain()
        return {}

    async def _on_upload(self, path: str, purpose: str, name: str) -> dict[str, Any]:
        shown = self._redaction.text(name)
        return {"file": await asyncio.to_thread(self._library.upload, path, purpose=purpose, name=shown)}

    async def _on_get_file(self, id: str) -> dict[str, Any]:
        return {"file": await asyncio.to_thread(self._library.describe, id)}

    async def _on_fetch(self, id: str) -> dict[str, Any]:
        await asyncio.to_thread(self._library.describe, id)
        target = self._folder.path / "fetched" / id.replace(":", "-")
        target.parent.mkdir(exist_ok=True)
        await asyncio.to_thread(self._library.fetch, id, target)
        return {"path": str(target)}

    async def _on_events(self, run_id: str | None = None) -> dict[str, Any]:
        events: list[Row] = []
        while page := await self._events_page(run_id, events[-1]["id"] if events else 0):
            events += page
        return {"events": events}

    async def _events_page(self, run_id: str | None, after: int) -> list[Row]:
        return await asyncio.to_thread(
            self._ledger.call,
            "list_events",
            for_job=self._job["id"],
            for_run=UUID(run_id) if run_id else None,
            after_id=after,
        )

    # What its flow may ask ----------------------------------------------------------------------

    async def _on_started(self, pid: int) -> dict[str, Any]:
        self._entrypoint_pid = pid
        if self._intent is not None:  # it was canceled before it was there
            self._background.add(asyncio.create_task(self._end_entrypoint()))
        return {}

    async def _on_secrets(self) -> dict[str, Any]:
        return {"values": self._secrets}

    async def _on_collect(self) -> dict[str, Any]:
        """Upload what the run left in `uploads/`; each file is an event."""
        assert self._shipper is not None
        try:
            uploads = await asyncio.to_thread(folders.left_files, self._folder)
        except InvalidParameterError as exc:  # The job's own fault: another attempt would end the same.
            why = self._redaction.text(f"A file in `uploads/`: {exc}")
            return {"files": [], "intent": self._intent or ("failed", why)}
        files = []
        for found, path in uploads:
            name = self._redaction.text(found)
            row = await asyncio.to_thread(self._library.upload, str(path), purpose="result", name=name)
            files.append({"path": name, "file": row["id"]})
        return {"files": files, "intent": self._intent}

    async def _on_finish(
        self, result: str, why: str | None = None, outputs: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        job = await self._finish(result, why, outputs)
        return {"status": job["status"], "outputs": job["outputs"]}

    async def _on_read_result(self, key: str) -> dict[str, Any]:
        data = await asyncio.to_thread(self._library.read_result, key)
        return {"content": None if data is None else base64.b64encode(data).decode("ascii")}

    async def _on_write_result(self, key: str, content: str) -> dict[str, Any]:
        data = base64.b64decode(content, validate=True)
        await asyncio.to_thread(self._library.write_result, key, data)
        return {}

    # Ending early -------------------------------------------------------------------------------

    def _start_timeout(self) -> asyncio.TimerHandle | None:
        seconds = self._job.get("timeout_seconds")
        if not seconds:
            return None
        why = f"The job ran longer than its timeout of {seconds} s."
        return asyncio.get_running_loop().call_later(float(seconds), self.cancel, "failed", why)

    async def _end_entrypoint(self) -> None:
        self._signal_entrypoint(signal.SIGTERM)
        await asyncio.sleep(_GRACE_SECONDS)
        self._signal_entrypoint(signal.SIGKILL)
        await asyncio.sleep(_GRACE_SECONDS)
        if not self._finished and self._child is not None:
            self._child.kill()  # a flow that does not see its entrypoint's end, or has none

    def _signal_entrypoint(self, number: signal.Signals) -> None:
        if self._entrypoint_pid is None:
            return
        try:
            os.killpg(self._entrypoint_pid, number)
        except (ProcessLookupError, PermissionError):
            self._entrypoint_pid = None

    async def _call(self, function: str, **arguments: Any) -> Row:
        return await call_until_answered(self._ledger, function, **arguments)


def _flow_of(job: Row) -> str | None:
    """The preloaded flow of the job's type; None for a flow of the user's own."""
    if job.get("entrypoint") is None:
        return None
    return "fine_tuning" if job["type"] == "fine_tuning" else "custom_job"


def _short_temporary_folder() -> str:
    """A folder whose socket paths stay below the 107 bytes that Unix allows."""
    folder = tempfile.gettempdir()
    return folder if len(folder) < 60 else "/tmp"
