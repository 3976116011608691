"""The agent: registers its pod, keeps the lease, and executes one run after another until the pod ends."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from openweights_prefect.errors import AuthenticationError, OpenWeightsError
from openweights_prefect.files.selection import open_store
from openweights_prefect.ledger.connect import access_tokens, connect_pod, redeem_bootstrap
from openweights_prefect.ledger.keyring import FILE_NAME, Keyring
from openweights_prefect.ledger.notifications import notifications
from openweights_prefect.ledger.protocol import Ledger, Row
from openweights_prefect.orchestration.flow_runs import FlowRuns
from openweights_prefect.pod.execution import Execution
from openweights_prefect.pod.library import Library
from openweights_prefect.pod.nursery import Nursery
from openweights_prefect.pod.session import PodIdentity, session_secret
from openweights_prefect.settings import Settings

logger = logging.getLogger(__name__)

_END_SECONDS = 8.0
_PAUSE_SECONDS = 1.0
_MOST_SETTLING = 2


class Agent:
    """One pod's agent. `run()` returns when the pod is to end."""

    def __init__(
        self,
        *,
        worker_id: str,
        settings: Settings,
        ledger: Ledger,
        library: Library,
        flow_runs: FlowRuns,
        root: Path,
    ) -> None:
        self._worker_id = worker_id
        self._settings = settings
        self._ledger = ledger
        self._library = library
        self._flow_runs = flow_runs
        self._root = root
        self._nursery = Nursery()
        self.signaled = False
        self._boot = uuid4()
        self._safe_until = 0.0
        self._beat_lock = asyncio.Lock()
        self._ended = asyncio.Event()
        self._models: list[str] = []
        self._execution: Execution | None = None
        self._task: asyncio.Task[None] | None = None
        self._settling: set[asyncio.Task[None]] = set()
        self._idle_since = time.monotonic()

    async def run(self) -> None:
        """Serve until idle for too long, past the deadline, or told to end."""
        await self._nursery.start()  # a pod that cannot run anything never becomes active
        await self._register()
        loops = [asyncio.create_task(loop()) for loop in (self._keep_beating, self._listen, self._fence)]
        ended = asyncio.create_task(self._ended.wait())
        try:
            done, _ = await asyncio.wait([*loops, ended], return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in [*loops, ended]:
                task.cancel()
            if unfinished := [task for task in (self._task, *self._settling) if task is not None]:
                await asyncio.wait(unfinished, timeout=_END_SECONDS)
            if self._execution is not None:
                self._execution.kill()
            await self._nursery.stop()

    def end(self) -> None:
        """End now, as on SIGTERM: the pod is going away. The run is given back for another pod."""
        self.signaled = True
        if self._execution is not None:
            self._execution.cancel("lost", "the pod was told to end")
        self._ended.set()

    async def _register(self) -> None:
        while not self._ended.is_set():
            try:
                started = time.monotonic()
                answer = await self._call(
                    "register_pod",
                    for_worker=self._worker_id,
                    as_boot=self._boot,
                    lease_seconds=self._settings.lease_seconds,
                    models=self._models,
                )
            except OpenWeightsError as exc:
                logger.warning("Cannot register yet: %s", exc)
                await asyncio.sleep(1)
                continue
            if answer["outcome"] != "registered":
                logger.info("The ledger says that this pod is to end (%s).", answer["outcome"])
                self._ended.set()
                return
            self._renewed(started)
            logger.info("Pod %s is registered.", self._worker_id)
            return

    async def _keep_beating(self) -> None:
        while True:
            await self._beat()
            await asyncio.sleep(self._settings.heartbeat_seconds)

    async def _listen(self) -> None:
        """Beat at once when somebody points at this pod."""
        async for payload in notifications(self._settings.database_url, "ow_pod"):
            if payload in ("", self._worker_id):
                await self._beat()

    async def _beat(self) -> None:
        async with self._beat_lock:
            started = time.monotonic()
            try:
                answer = await self._call(
                    "renew_lease",
                    for_worker=self._worker_id,
                    as_boot=self._boot,
                    lease_seconds=self._settings.lease_seconds,
                    models=self._models,
                )
                if answer["fenced"]:
                    await self._lost_lease()
                    return
                self._renewed(started)
                await self._obey(answer)
            except OpenWeightsError as exc:
                logger.warning("A heartbeat failed: %s", exc)

    async def _obey(self, answer: Row) -> None:
        if answer["cancel"] and self._execution is not None:
            self._execution.cancel()
        past_deadline = time.time() > answer["deadline_at"]
        if self._task is not None and not self._task.done():
            if past_deadline and self._execution is not None:
                self._execution.cancel("lost", "the pod reached its deadline")
            return
        if answer["run_id"]:
            await self._give_back(answer["run_id"])
        if answer["shutdown"] or past_deadline:
            await self._release("told to end" if answer["shutdown"] else "deadline", forced=True)
        elif answer["next_run"]:
            self._start(UUID(answer["next_run"]))
        elif time.monotonic() - self._idle_since > self._settings.pod_idle_seconds:
            await self._release("idle", forced=False)

    def _start(self, run_id: UUID) -> None:
        self._execution = Execution(
            run_id=run_id,
            worker_id=self._worker_id,
            boot=self._boot,
            ledger=self._ledger,
            library=self._library,
            flow_runs=self._flow_runs,
            nursery=self._nursery,
            keyring=Keyring(self._settings.home / FILE_NAME),
            root=self._root,
        )
        self._task = asyncio.create_task(self._execute(self._execution))

    async def _execute(self, execution: Execution) -> None:
        try:
            await execution.execute()
        except Exception:
            # The edge of one run: the ledger's lease and reconciler deal with it, the pod goes on.
            logger.exception("Run %s ended in an error of the agent", execution.run_id)
            await asyncio.sleep(_PAUSE_SECONDS)  # what it needs may be down: do not ask without pause
        finally:
            self._settling.add(settling := asyncio.create_task(execution.settle()))
            settling.add_done_callback(self._settling.discard)
            if len(self._settling) > _MOST_SETTLING:
                await asyncio.wait(self._settling, return_when=asyncio.FIRST_COMPLETED)
            self._execution = None
            self._task = None
            self._idle_since = time.monotonic()
        await self._beat()  # there may be a next one

    async def _give_back(self, run_id: str) -> None:
        """The ledger holds us to a run that ended in an error here: it is lost, and tried again."""
        why = f"its execution on pod {self._worker_id} ended in an error"
        await self._call("finish_run", for_run=UUID(run_id), as_boot=self._boot, result="lost", why=why)

    async def _release(self, why: str, *, forced: bool) -> None:
        answer = await self._call(
            "release_pod", for_worker=self._worker_id, as_boot=self._boot, why=why, forced=forced
        )
        if answer["outcome"] == "draining":
            logger.info("Pod %s ends: %s.", self._worker_id, why)
            self._ended.set()

    async def _fence(self) -> None:
        """Stop the run before the lease can be given away: whoever cannot renew must not go on."""
        while True:
            if self._execution is not None and time.monotonic() > self._safe_until:
                logger.error(
                    "The lease could not be renewed in time; run %s is stopped.", self._execution.run_id
                )
                self._execution.kill()
            await asyncio.sleep(0.5)

    async def _lost_lease(self) -> None:
        if self._execution is not None:
            self._execution.kill()
        self._boot = uuid4()
        await self._register()

    def _renewed(self, at: float) -> None:
        self._safe_until = at + 0.8 * self._settings.lease_seconds

    async def _call(self, function: str, **arguments: Any) -> Row:
        rows = await asyncio.to_thread(self._ledger.call, function, **arguments)
        return rows[0]


async def serve(settings: Settings, environment: MutableMapping[str, str]) -> bool:
    """Run the agent of this pod to its end; True when a signal ended it."""
    identity = PodIdentity.take(environment)
    session = session_secret(Path.cwd() / ".session")
    if not await _redeem(settings, identity, session):
        return False
    access = access_tokens(settings, session)
    ledger = connect_pod(settings, session, access=access)
    store = open_store(settings, bearer=access.bearer if access else None)
    library = Library(ledger=ledger, store=store, organization_id=ledger.organization_id)
    async with FlowRuns.connect(settings) as flow_runs:
        agent = Agent(
            worker_id=identity.worker_id,
            settings=settings,
            ledger=ledger,
            library=library,
            flow_runs=flow_runs,
            root=Path.cwd() / "runs",
        )
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, agent.end)
        await agent.run()
    ledger.close()
    return agent.signaled


async def _redeem(settings: Settings, identity: PodIdentity, session: str) -> bool:
    """Trade the one-time token for the session; False when the pod is not what it was bought for any more."""
    while True:
        try:
            await asyncio.to_thread(redeem_bootstrap, settings, identity.bootstrap, session)
        except AuthenticationError as exc:
            logger.error("%s", exc)
            return False
        except OpenWeightsError as exc:
            logger.warning("Cannot redeem the one-time token yet: %s", exc)
            await asyncio.sleep(_PAUSE_SECONDS)
        else:
            return True


def main(settings: Settings) -> None:
    """Serve as this pod's agent, then wait to be terminated."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    if asyncio.run(serve(settings, os.environ)):
        return
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    while True:  # a container that exits is restarted by RunPod, and bills on: wait to be terminated
        signal.pause()
