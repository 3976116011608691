"""The agent's side of the preloaded process: a second small job on a pod does not wait for torch."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import secrets
import shutil
import sys
import tempfile
from pathlib import Path
from types import TracebackType

import openweights_prefect
from openweights_prefect.pod.folder import short_temporary_folder
from openweights_prefect.runtime import forking, wire
from openweights_prefect.runtime.entrypoint import base_environment

logger = logging.getLogger(__name__)

_PLAN = "openweights_prefect.jobs.preloading"
_MOST_STARTS = 3
_MOST_MEMORY = 2 << 30
_LEAST_MEMORY_LEFT = 4 << 30


class Preloading:
    """Keeps one preloaded process from when it is first wanted to the end of the pod.

    It is in the session of this process, so nobody takes it for what a run has left.
    """

    def __init__(self, folder: Path, *, job_python: str, plan: str = _PLAN) -> None:
        self._folder = folder
        self._job_python = job_python
        self._plan = plan
        self._token = secrets.token_urlsafe(32)
        self._sockets = Path(tempfile.mkdtemp(prefix="ow-", dir=short_temporary_folder()))
        self._socket = self._sockets / "preloaded.sock"
        self._starts = 0
        self._process: asyncio.subprocess.Process | None = None
        self._running: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Preloading:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait([self._running])
        shutil.rmtree(self._sockets, ignore_errors=True)

    def variables(self) -> dict[str, str]:
        """What the flow of a job of ours is told, to have it forked; nothing before the process is ready."""
        if self._running is None or not self._socket.exists():
            return {}
        return {forking.SOCKET_VARIABLE: str(self._socket), forking.TOKEN_VARIABLE: self._token}

    def want(self) -> None:
        """Start the process unless it is there; to be called when a run of a job of ours has ended.

        Returns at once. Jobs only gain time by it: what keeps it from running is logged, and no error.
        """
        if self._running is not None:
            if self._process is not None and _memory(self._process.pid) > _MOST_MEMORY:
                self._process.kill()
            return
        if sys.platform != "linux" or self._starts >= _MOST_STARTS or _memory_left() < _LEAST_MEMORY_LEFT:
            return
        self._starts += 1
        self._running = asyncio.create_task(self._run())

    async def _run(self) -> None:
        try:
            process = self._process = await self._start()
            try:
                code = await process.wait()
                logger.warning("The preloaded process of our jobs ended with exit code %s.", code)
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
        except OSError as exc:
            logger.warning("The preloaded process of our jobs cannot be started: %s", exc)
        finally:
            self._socket.unlink(missing_ok=True)
            self._process = self._running = None

    async def _start(self) -> asyncio.subprocess.Process:
        library = self._folder / "lib"
        library.mkdir(parents=True, exist_ok=True)
        package = Path(openweights_prefect.__file__).parent
        (library / package.name).unlink(missing_ok=True)
        (library / package.name).symlink_to(package)
        base = base_environment(self._job_python)
        return await asyncio.create_subprocess_exec(
            shutil.which("python", path=base["PATH"]) or sys.executable,
            "-m",
            "openweights_prefect.runtime.preloaded",
            str(self._socket),
            hashlib.sha256(self._token.encode()).hexdigest(),
            self._plan,
            cwd=self._folder,
            env={**base, "PYTHONPATH": str(library), wire.RUN_VARIABLE: forking.UNMARKED},
            stdin=asyncio.subprocess.DEVNULL,
        )


def _memory(pid: int) -> int:
    """Bytes that a process has in memory; 0 when it is gone."""
    try:
        pages = (Path("/proc") / str(pid) / "statm").read_text(encoding="ascii").split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def _memory_left() -> int:
    """Bytes that this machine could give to another process."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return 0
