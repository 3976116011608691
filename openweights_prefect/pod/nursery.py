"""The agent's side of the zygote: forks children and waits for them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect.client.schemas.objects import FlowRun

from openweights_prefect.errors import OpenWeightsError


class ZygoteDied(OpenWeightsError):
    """The preloaded process ended; its children ended with it."""


@dataclass
class Child:
    """A forked flow process."""

    pid: int
    exit_code: asyncio.Future[int]

    def kill(self) -> None:
        """SIGKILL the process group; silent when it is gone."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)


class Nursery:
    """Keeps one zygote alive and hands out children.

    Each of them begins with the `environment` of now, whatever became of it or of other runs meanwhile.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = dict(environment)
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._reader_task: asyncio.Task[None] | None = None
        self._ready: asyncio.Future[None] | None = None
        self._born: dict[str, asyncio.Future[Child]] = {}
        self._alive: dict[str, Child] = {}
        self._starting = asyncio.Lock()

    async def start(self) -> None:
        """Start the zygote unless it lives; returns when everything is imported."""
        async with self._starting:
            if self._reader_task is not None and not self._reader_task.done():
                return
            ours, theirs = socket.socketpair()
            with theirs:
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    "openweights_prefect.pod.zygote",
                    str(theirs.fileno()),
                    pass_fds=(theirs.fileno(),),
                    env=self._environment,
                    stdin=asyncio.subprocess.DEVNULL,
                )
            reader, self._writer = await asyncio.open_connection(sock=ours)
            self._ready = asyncio.get_running_loop().create_future()
            self._reader_task = asyncio.create_task(self._read(reader))
            await self._ready

    async def fork(
        self, flow_run: FlowRun, *, flow: str | None, environment: dict[str, str], output: Path
    ) -> Child:
        """Fork a child that executes the flow run; raises `ZygoteDied` when that cannot be."""
        run_id = str(flow_run.id)
        await self.start()
        assert self._writer is not None
        assert self._reader_task is not None
        born: asyncio.Future[Child] = asyncio.get_running_loop().create_future()
        self._born[run_id] = born
        order = {
            "run": run_id,
            "flow_run": flow_run.model_dump(mode="json"),
            "flow": flow,
            "environment": environment,
            "output": str(output),
        }
        self._writer.write(json.dumps(order).encode() + b"\n")
        either: list[asyncio.Future[Any]] = [born, self._reader_task]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not born.done():
            self._born.pop(run_id, None)
            raise ZygoteDied("The preloaded process of the agent ended.")
        return await born

    async def stop(self) -> None:
        """End the zygote and with it every child."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while line := await reader.readline():
                self._handle(json.loads(line))
        except ConnectionError:
            pass  # as at the end of the stream: the zygote is gone
        died = ZygoteDied("The preloaded process of the agent ended.")
        for future in [self._ready, *self._born.values()]:
            if future is not None and not future.done():
                future.set_exception(died)
        for child in self._alive.values():
            child.kill()  # where the system does not do it
            child.exit_code.set_result(-signal.SIGKILL)
        self._born.clear()
        self._alive.clear()

    def _handle(self, message: dict[str, Any]) -> None:
        if "pid" in message:
            child = Child(message["pid"], asyncio.get_running_loop().create_future())
            self._alive[message["run"]] = child
            self._born.pop(message["run"]).set_result(child)
        elif "exit" in message:
            self._alive.pop(message["run"]).exit_code.set_result(message["exit"])
        elif self._ready is not None and not self._ready.done():
            self._ready.set_result(None)
