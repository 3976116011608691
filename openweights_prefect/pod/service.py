"""Puts the agent of this pod together, and serves with it until the pod is to end."""

from __future__ import annotations

import asyncio
import functools
import logging
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Collection, MutableMapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

from openweights_prefect.errors import AuthenticationError, InvalidParameterError, OpenWeightsError
from openweights_prefect.files.selection import open_store
from openweights_prefect.ledger.connect import access_tokens, connect_pod, redeem_bootstrap
from openweights_prefect.ledger.identity import hash_secret
from openweights_prefect.ledger.keyring import FILE_NAME, Keyring
from openweights_prefect.ledger.notifications import notifications
from openweights_prefect.ledger.protocol import ask_one
from openweights_prefect.orchestration.flow_runs import FlowRuns
from openweights_prefect.pod.agent import Agent
from openweights_prefect.pod.cleaning import remove_old_runs
from openweights_prefect.pod.collaborators import Executing
from openweights_prefect.pod.deadline import Deadline
from openweights_prefect.pod.execution import Execution
from openweights_prefect.pod.folder import short_temporary_folder
from openweights_prefect.pod.gpu_check import GpuNeeds
from openweights_prefect.pod.library import Library
from openweights_prefect.pod.machine import LocalMachine
from openweights_prefect.pod.nursery import Nursery
from openweights_prefect.pod.preloading import Preloading
from openweights_prefect.pod.processes import adopt_orphans
from openweights_prefect.pod.server import Answer, serve
from openweights_prefect.pod.session import PodIdentity, proxy_token
from openweights_prefect.runtime.wire import POD_SOCKET
from openweights_prefect.settings import Settings

logger = logging.getLogger(__name__)

_PAUSE_SECONDS = 1.0
_SHUTDOWN_FILE = "shutdown.txt"


def main(
    settings: Settings,
    environment: MutableMapping[str, str],
    *,
    folder: Path,
    session: str,
    deadline: Deadline,
    spared: Collection[int],
) -> bool:
    """Serve as this pod's agent; True when a signal ended it. `spared` are children that belong to no run."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    adopt_orphans()
    gpus = GpuNeeds.of(environment)
    identity = PodIdentity.take(environment)
    machine = LocalMachine(
        root=folder,
        deadline=deadline,
        gpus=gpus,
        gpu_check=settings.gpu_check,
        job_python=settings.job_python,
        shutdown_file=Path.home() / _SHUTDOWN_FILE,
        spared=spared,
    )
    pod = _Pod(settings, identity, session=session, folder=folder, machine=machine, spared=spared)
    return asyncio.run(pod.serve(Nursery(environment)))


class _Pod:
    """What the parts of one agent share."""

    def __init__(
        self,
        settings: Settings,
        identity: PodIdentity,
        *,
        session: str,
        folder: Path,
        machine: LocalMachine,
        spared: Collection[int],
    ) -> None:
        self._settings = settings
        self._identity = identity
        self._session = session
        self._folder = folder
        self._machine = machine
        self._spared = spared

    async def serve(self, nursery: Nursery) -> bool:
        """Run the agent to its end."""
        settings, identity = self._settings, self._identity
        if not await _redeem(settings, identity, self._session):
            return False
        access = access_tokens(settings, self._session)
        ledger = connect_pod(settings, self._session, access=access)
        store = open_store(settings, bearer=access.bearer if access else None)
        library = Library(ledger=ledger, store=store, organization_id=ledger.organization_id)
        runs = self._folder / "runs"
        await asyncio.to_thread(remove_old_runs, runs)
        async with (
            FlowRuns.connect(settings) as flow_runs,
            Preloading(self._folder / "preloaded", job_python=settings.job_python) as preloading,
        ):
            # The pod's calls are the agent's, which is made last.
            calls: dict[str, Answer] = {}

            def executing(run_id: UUID, boot: UUID) -> Executing:
                return Execution(
                    run_id=run_id,
                    worker_id=identity.worker_id,
                    boot=boot,
                    ledger=ledger,
                    library=library,
                    flow_runs=flow_runs,
                    nursery=nursery,
                    keyring=Keyring(settings.home / FILE_NAME),
                    root=runs,
                    cancel_grace_seconds=settings.cancel_grace_seconds,
                    spared=self._spared,
                    pod_calls=calls,
                    preloading=preloading,
                )

            agent = Agent(
                worker_id=identity.worker_id,
                settings=settings,
                ask=functools.partial(ask_one, ledger),
                hints=functools.partial(notifications, settings.database_url, "ow_pod"),
                zygote=nursery,
                executions=executing,
                machine=self._machine,
                proxy_hash=hash_secret(proxy_token(self._session)) if settings.prefect_proxy_url else None,
                provider_id=identity.provider_id,
            )
            calls.update(pod_calls(agent))
            _end_on_signals(agent)
            async with local_socket(self._folder, calls):
                await agent.run()
        ledger.close()
        return agent.signaled


def pod_calls(agent: Agent) -> dict[str, Answer]:
    """What may be asked about the pod, by jobs and by people on its machine."""

    async def ttl(hours: float | None = None, added: bool = False) -> dict[str, Any]:
        if hours is not None and not 0 <= hours <= 30 * 24:
            raise InvalidParameterError(f"{hours!r} hours are not between 0 and 720.")
        return await agent.time_to_live(hours, added=added)

    return {"ttl": ttl}


@asynccontextmanager
async def local_socket(folder: Path, calls: MutableMapping[str, Answer]) -> AsyncIterator[None]:
    """Answer on a socket that a link in the folder leads to, for a shell on this machine."""
    sockets = Path(tempfile.mkdtemp(prefix="ow-", dir=short_temporary_folder()))
    link = folder / POD_SOCKET
    server = await serve(sockets / "pod.sock", calls)
    try:
        link.unlink(missing_ok=True)
        link.symlink_to(sockets / "pod.sock")
        yield
    finally:
        link.unlink(missing_ok=True)
        server.close()
        shutil.rmtree(sockets, ignore_errors=True)


def _end_on_signals(agent: Agent) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, agent.end)


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
